// Losses of a chunk of logits: softmax and cross-entropy by the formulas of ops/linear_cross_entropy.py, and divergences
// of two softmaxes by those of ops/linear_divergence.py. One row at a time, so that its passes find it in the
// second-level cache.
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

enum Divergence : int { FORWARD = 0, REVERSE = 1, JENSEN_SHANNON = 2 };

// log(q / m) for m = β p + (1 - β) q, from δ = log(q / p). The power is of -|δ|, so that it never overflows:
// δ ≥ 0: -log(1 - β + β e^-δ); δ < 0: δ - log(β + (1 - β) e^δ).
template <class C>
inline Vector<C> ratio_to_mixture(Vector<C> delta, C beta) {
  const Vector<C> none = all<C>(0), mine = all<C>(1 - beta), theirs = all<C>(beta);
  const Vector<C> first = delta < none ? theirs : mine, second = delta < none ? mine : theirs;
  const Vector<C> power = exponential<C>(delta < none ? delta : -delta);
  return (delta < none ? delta : none) - natural_logarithm<C>(fma(second, power, first));
}

// One row: q and p are its softmaxes before normalization, δ = log(q / p) = z_s - z_t + shift.
template <class C, class T>
struct DivergenceRow {
  T* student;
  const T* teacher;
  const C *q, *p;
  C q_scale, p_scale, shift, beta;

  Vector<C> delta(int64_t i) const { return (load<C>(student + i) - load<C>(teacher + i)) + shift; }
  Vector<C> delta(int64_t i, int64_t count) const {
    return (load_some<C>(student + i, count) - load_some<C>(teacher + i, count)) + shift;
  }

  // Call term(q, p, δ) for all numbers of the row and return the sum of the results, in double over stretches.
  template <class Term>
  double sum(int64_t n, const Term& term) const {
    constexpr int64_t STRETCH = 64 * lanes<C>;
    double total = 0;
    for (int64_t first = 0; first < n; first += STRETCH) {
      Vector<C> part = {};
      along<C>(
          first + STRETCH < n ? STRETCH : n - first,
          [&](int64_t i) {
            i += first;
            part += term(load<C>(q + i) * q_scale, load<C>(p + i) * p_scale, delta(i));
          },
          [&](int64_t i, int64_t count) {
            i += first;
            C some[lanes<C>];
            const Vector<C> mine = load_some<C>(q + i, count) * q_scale, theirs = load_some<C>(p + i, count) * p_scale;
            store(some, term(mine, theirs, delta(i, count)));
            for (int64_t k = 0; k < count; ++k) total += static_cast<double>(some[k]);
          });
      total += static_cast<double>(sum_of<C>(part));
    }
    return total;
  }

  // Replace the student's logits by term(q, p, δ).
  template <class Term>
  void replace(int64_t n, const Term& term) const {
    along<C>(
        n, [&](int64_t i) { store(student + i, term(load<C>(q + i) * q_scale, load<C>(p + i) * p_scale, delta(i))); },
        [&](int64_t i, int64_t count) {
          const Vector<C> mine = load_some<C>(q + i, count) * q_scale, theirs = load_some<C>(p + i, count) * p_scale;
          store_some<C>(student + i, term(mine, theirs, delta(i, count)), count);
        });
  }

  double divergence(int64_t n, Divergence kind, bool gradient) const {
    typedef Vector<C> V;
    if (kind == FORWARD) {
      const double loss = sum(n, [](V, V theirs, V d) { return -theirs * d; });
      if (gradient) replace(n, [](V mine, V theirs, V) { return mine - MUTATED("divergence: teacher forgotten", theirs, 0 * theirs); });
      return loss;
    }
    if (kind == REVERSE) {
      const double loss = sum(n, [](V mine, V, V d) { return mine * d; });
      const C mean = static_cast<C>(MUTATED("divergence: mean forgotten", loss, 0.0));
      if (gradient) replace(n, [=](V mine, V, V d) { return mine * (d - mean); });
      return loss;
    }
    const C b = beta;
    const double of_student = sum(n, [=](V mine, V, V d) { return mine * ratio_to_mixture<C>(d, b); });
    const double of_teacher = sum(n, [=](V, V theirs, V d) { return theirs * (ratio_to_mixture<C>(d, b) - d); });
    const C mean = static_cast<C>(of_student), share = MUTATED("divergence: share of the other", 1 - b, b);
    if (gradient) replace(n, [=](V mine, V, V d) { return share * mine * (ratio_to_mixture<C>(d, b) - mean); });
    return static_cast<double>(b) * of_teacher + (1 - static_cast<double>(b)) * of_student;
  }
};

template <class T>
int divergences_of(T* student, int64_t student_stride, const T* teacher, int64_t teacher_stride, Wide<T>* losses,
                   int64_t rows, int64_t n, Divergence kind, double beta, bool gradient) {
  typedef Wide<T> C;
  std::atomic<int> outcome{DONE};
  parallel(rows, 1 + 4096 / n, [=, &outcome](int64_t begin, int64_t end) {
    C* powers = static_cast<C*>(std::malloc(static_cast<size_t>(2 * n) * sizeof(C)));
    if (powers == nullptr) {
      outcome = NO_MEMORY;
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      T* mine = student + row * student_stride;
      const T* theirs = teacher + row * teacher_stride;
      C *q = powers, *p = powers + n;
      const C most_q = largest<C>(mine, n), most_p = largest<C>(theirs, n);
      const double sum_q = powers_of<C>(mine, n, most_q, q), sum_p = powers_of<C>(theirs, n, most_p, p);
      const double shift = static_cast<double>(most_p) - static_cast<double>(most_q) + logarithm(sum_p) - logarithm(sum_q);
      const DivergenceRow<C, T> one = {mine, theirs, q, p, static_cast<C>(1 / sum_q), static_cast<C>(1 / sum_p),
                                       static_cast<C>(shift), static_cast<C>(beta)};
      losses[row] = static_cast<C>(one.divergence(n, kind, gradient));
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

// losses (rows,) in the wide type from two sets of logits (rows, n); with `gradient`, ∂ℓ/∂student replaces the
// student's logits. Returns 0, or 1 without memory for a row.
BACKHAND_EXPORT int backhand_divergences(int dtype, void* student, int64_t student_stride, const void* teacher,
                                         int64_t teacher_stride, void* losses, int64_t rows, int64_t n, int kind,
                                         double beta, int gradient) {
  if (rows <= 0 || n <= 0) return DONE;
  BY_DTYPE(dtype, T, {
    return divergences_of(static_cast<T*>(student), student_stride, static_cast<const T*>(teacher), teacher_stride,
                          static_cast<Wide<T>*>(losses), rows, n, static_cast<Divergence>(kind), beta, gradient != 0);
  });
}
