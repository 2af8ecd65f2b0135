// Softmax and cross-entropy of a chunk of logits: the formulas of ops/linear_cross_entropy.py, one row at a time, so
// that its three passes find it in the second-level cache.
#include <atomic>
#include <cstdlib>

#include "dtypes.h"
#include "mutants.h"
#include "vectors.h"

namespace {

// ln x for x ≥ 1, by Newton's method on the exponential from the exponent of x: the error is squared five times.
inline double logarithm(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  double y = static_cast<double>((bits >> 52) - 1023) * 0.693147180559945309417 + 0.34;
  for (int i = 0; i < 5; ++i) {
    double power[lanes<double>];
    store(power, exponential<double>(all<double>(-y)));
    y += x * power[0] - 1;
  }
  return y;
}

template <class C, class T>
inline C largest(const T* z, int64_t n) {
  constexpr int W = lanes<C>;
  Vector<C> most[2] = {all<C>(widened(z[0])), all<C>(widened(z[0]))};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    most[0] = larger(load<C>(z + i), most[0]);
    most[1] = larger(load<C>(z + i + W), most[1]);
  }
  C found = largest_of<C>(larger(most[0], most[1]));
  for (; i < n; ++i) found = widened(z[i]) > found ? widened(z[i]) : found;
  return found;
}

// Write e^(z - most) of a row to `powers`, and return their sum, in double over stretches. Within a stretch each lane
// keeps its rounding error: next to the largest term, which is 1, a plain float sum would lose thousands of tiny terms,
// and 1 - p of a nearly certain token consists of these.
template <class C, class T>
inline double powers_of(const T* z, int64_t n, C most, C* powers) {
  constexpr int W = lanes<C>;
  const int64_t stretch = MUTATED("softmax_losses: naive sum", 4096, n);
  double sum = 0;
  for (int64_t first = 0; first < n; first += stretch) {
    const int64_t last = first + stretch < n ? first + stretch : n;
    Compensated<Vector<C>> part[2];
    int64_t i = first;
    for (; i + 2 * W <= last; i += 2 * W)
      for (int k = 0; k < 2; ++k) {
        const Vector<C> power = exponential<C>(load<C>(z + i + k * W) - most);
        store(powers + i + k * W, power);
        part[k].add(power);
        part[k].lost = MUTATED("softmax_losses: naive sum", part[k].lost, Vector<C>{});
      }
    double rest = 0;
    for (; i < last; i += W) {
      const int64_t count = last - i < W ? last - i : W;
      C some[W];
      store(some, exponential<C>(load_some<C>(z + i, count) - most));
      for (int64_t k = 0; k < count; ++k) rest += static_cast<double>(powers[i + k] = some[k]);
    }
    C sums[W], rounded_off[W];
    for (int k = 0; k < 2; ++k) {
      store(sums, part[k].sum);
      store(rounded_off, part[k].lost);
      for (int lane = 0; lane < W; ++lane) rest += static_cast<double>(sums[lane]) - static_cast<double>(rounded_off[lane]);
    }
    sum += rest;
  }
  return sum;
}

enum : int { DONE = 0, NO_MEMORY = 1, TARGET_OUTSIDE = 2 };

template <class T>
int losses_of(T* z, int64_t row_stride, const int64_t* targets, Wide<T>* losses, int64_t rows, int64_t n,
               bool gradient) {
  typedef Wide<T> C;
  std::atomic<int> outcome{DONE};
  parallel(rows, 1 + 8192 / n, [=, &outcome](int64_t begin, int64_t end) {
    C* powers = static_cast<C*>(std::malloc(static_cast<size_t>(n) * sizeof(C)));
    if (powers == nullptr) {
      outcome = NO_MEMORY;
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      T* logits = z + row * row_stride;
      const int64_t target = targets[row];
      if (target < 0 || target >= n) {
        outcome = TARGET_OUTSIDE;
        continue;
      }
      const C most = largest<C>(logits, n), at_target = widened(logits[target]);
      const double sum = powers_of<C>(logits, n, most, powers);
      losses[row] = static_cast<C>(static_cast<double>(most) - static_cast<double>(at_target) + logarithm(sum));
      if (!gradient) continue;
      const C inverse = static_cast<C>(1 / sum);
      // Rounded once: 1 is subtracted from the target's probability first, since that may be near one.
      const C share = static_cast<C>(static_cast<double>(powers[target]) / sum -
                                     MUTATED("softmax_losses: one-hot forgotten", 1.0, 0.0));
      along<C>(
          n, [=](int64_t i) { store(logits + i, load<C>(powers + i) * inverse); },
          [=](int64_t i, int64_t count) { store_some<C>(logits + i, load_some<C>(powers + i, count) * inverse, count); });
      put(logits + target, share);
    }
    std::free(powers);
  });
  return outcome;
}

}  // namespace

// losses (rows,) in the wide type from logits z (rows, n); with `gradient`, softmax - onehot replaces z. Returns 0; 1
// without memory for a row, 2 for a target outside [0, n).
BACKHAND_EXPORT int backhand_softmax_losses(int dtype, void* z, int64_t row_stride, const int64_t* targets,
                                            void* losses, int64_t rows, int64_t n, int gradient) {
  if (rows <= 0 || n <= 0) return rows > 0 ? TARGET_OUTSIDE : DONE;
  BY_DTYPE(dtype, T, {
    return losses_of(static_cast<T*>(z), row_stride, targets, static_cast<Wide<T>*>(losses), rows, n, gradient != 0);
  });
}
