// Causal depthwise convolution over packed documents, forward and backward. Plain or followed by SiLU, by the formulas
// of ops/causal_conv.py; or between two gates, by those of ops/gated_conv.py.
//
// A task is a block of channels of all documents, token by token. It uses the last few rows of the input, and in the
// backward the last few rows of C, which stay in the first-level cache. Sums are rounded once. The gradients that
// segments add to the segment they continue are added in the order of the segments.
#include <algorithm>

#include "activations.h"
#include "arena.h"
#include "dtypes.h"
#include "segments.h"

namespace {

enum : int { PLAIN = 0, WITH_SILU = 1, GATED = 2 };
constexpr int64_t CHANNELS = 256, MOST_TAPS = 8;

template <class T>
struct Convolution {
  const T* x;  // rows of `channels` numbers, or of [B | C | x] if gated
  int64_t x_row;
  const T* weight;  // (channels, taps), the tap of the token itself last
  int64_t weight_row;
  const T* bias;  // or null
  Segments segments;
  int64_t channels, taps;
};

// A segment, and the tokens 1, 2, … places before its first one, as far as there are tokens and taps.
struct Place {
  int64_t number, start, length, before;
  int64_t earlier[MOST_TAPS];
};

template <class T>
struct Rows {
  T* data;
  int64_t row;
  T* at(int64_t i) const { return data + i * row; }
};

template <class C, class T>
inline Vector<C> get(const T* place, int64_t count) {
  return count >= lanes<C> ? load<C>(place) : load_some<C>(place, count);
}

template <class C, class T>
inline void set(T* place, Vector<C> value, int64_t count) {
  if (count >= lanes<C>) store(place, value);
  else store_some<C>(place, value, count);
}

template <class T, int mode>
class Block {
 public:
  typedef Wide<T> C;

  Block(const Convolution<T>& op, int64_t first)
      : op_(op), first_(first), width_(std::min(CHANNELS, op.channels - first)) {
    for (int64_t j = 0; j < width_; ++j) {
      const T* taps = op.weight + (first + j) * op.weight_row;
      for (int64_t s = 0; s < op.taps; ++s) w_[s][j] = widened(taps[op.taps - 1 - s]);
      bias_[j] = op.bias == nullptr ? C(0) : C(widened(op.bias[first + j]));
    }
  }

  void forward(Rows<T> y) {
    for_segments([&](const Place& place) {
      for (int64_t t = 0; t < place.length; ++t) {
        T* out = y.at(place.start + t) + first_;
        const T* gates = row(place.start + t) + op_.channels;
        summed(place, t, [=](int64_t j, int64_t count, Vector<C> c) {
          if constexpr (mode == WITH_SILU) c = divided<T, C>(c, 1 + power_of<SILU, T, C>(c));
          if constexpr (mode == GATED) c = c * get<C>(gates + j, count);
          set<C>(out + j, c, count);
        });
      }
    });
  }

  void backward(Rows<const T> d_y, Rows<T> d_x) {
    const int64_t reach = op_.taps - 1;
    const Segments& segments = op_.segments;
    // Gradients of the last tokens of continued segments, which end with row taps - 2.
    List<int64_t> tail_of(segments.count, -1);
    int64_t continued = 0;
    for (int64_t i = 0; i < segments.count; ++i) tail_of[i] = segments.continued(i) ? continued++ : -1;
    List<C> tails(continued * MOST_TAPS * CHANNELS, C(0));
    const auto tail = [&](int64_t number, int64_t row) {
      return tails.data() + (tail_of[number] * MOST_TAPS + row) * CHANNELS;
    };
    for_segments([&](const Place& place) {
      const int64_t start = place.start, length = place.length;
      for (int64_t t = 0; t < length + reach; ++t) {
        if (t < length) {
          through_activation(d_y, d_x, place, t);
          // Tokens before the segment that this one reads.
          for (int64_t s = t + 1; s < op_.taps && s - t <= place.before; ++s) {
            int64_t distance = s - t, number = segments.parent(place.number);
            for (; distance > segments.length(number); number = segments.parent(number))
              distance -= segments.length(number);
            add(s, d_c_[t % op_.taps], tail(number, reach - distance));
          }
        }
        const int64_t at = t - reach;
        if (at < 0) continue;
        // Kept until all segments that continue it are done.
        const bool kept = tail_of[place.number] >= 0 && at >= length - reach;
        C* sum = kept ? tail(place.number, reach + at - length) : sum_;
        if (!kept) std::fill(sum_, sum_ + CHANNELS, C(0));
        for (int64_t s = 0; s < op_.taps && at + s < length; ++s)
          add(MUTATED("causal_conv: taps not turned round", s, op_.taps - 1 - s), d_c_[(at + s) % op_.taps], sum);
        if (!kept) write(d_x, start + at, sum);
      }
    });
    for (int64_t i = 0; i < segments.count; ++i) {
      const int64_t length = segments.length(i);
      for (int64_t at = std::max<int64_t>(0, length - reach); tail_of[i] >= 0 && at < length; ++at)
        write(d_x, segments.start(i) + at, tail(i, reach + at - length));
    }
  }

 private:
  template <class Body>
  void for_segments(const Body& body) const {
    const Segments& segments = op_.segments;
    for (int64_t i = 0; i < segments.count; ++i) {
      Place place{i, segments.start(i), segments.length(i), 0, {}};
      for (int64_t p = segments.parent(i); p >= 0; p = segments.parent(p))
        for (int64_t at = segments.length(p) - 1; at >= 0 && place.before < op_.taps - 1; --at)
          place.earlier[place.before++] = segments.start(p) + at;
      place.before = MUTATED("causal_conv: prefix not seen", place.before, int64_t{0});
      body(place);
    }
  }

  const T* row(int64_t token) const { return op_.x + token * op_.x_row + first_; }

  // Call finish(j, count, c) for the channels j … of the block, with c at token t of a segment.
  template <class Finish>
  void summed(const Place& place, int64_t t, const Finish& finish) const {
    const T* rows[MOST_TAPS];
    int64_t seen = 0;
    for (int64_t s = 0; s < op_.taps && s <= t + place.before; ++s)
      rows[seen++] = row(s <= t ? place.start + t - s : place.earlier[s - t - 1]);
    if (seen == 4) return summed_of<4>(rows, seen, finish);
    if (seen == 3) return summed_of<3>(rows, seen, finish);
    summed_of<0>(rows, seen, finish);
  }

  // Sum over ROWS rows, or over `seen` rows if ROWS is 0.
  template <int ROWS, class Finish>
  void summed_of(const T* const* rows, int64_t seen, const Finish& finish) const {
    for (int64_t j = 0; j < width_; j += lanes<C>) {
      const int64_t count = std::min<int64_t>(lanes<C>, width_ - j);
      Vector<C> c = load<C>(bias_ + j);
      for (int64_t s = 0; s < (ROWS > 0 ? ROWS : seen); ++s) {
        Vector<C> x = get<C>(rows[s] + j, count);
        if constexpr (mode == GATED) x = x * get<C>(rows[s] + 2 * op_.channels + j, count);
        c = fma(load<C>(w_[s] + j), x, c);
      }
      finish(j, count, c);
    }
  }

  // Compute ∂L/∂c at token t in its row of d_c_, and the gradient of the output gate.
  void through_activation(Rows<const T> d_y, Rows<T> d_x, const Place& place, int64_t t) {
    const int64_t start = place.start;
    const T* up = d_y.at(start + t) + first_;
    C* out = d_c_[t % op_.taps];
    if constexpr (mode == PLAIN) {
      for (int64_t j = 0; j < width_; j += lanes<C>) store(out + j, get<C>(up + j, width_ - j));
    } else {
      const T* gates = row(start + t) + op_.channels;
      T* d_gates = d_x.at(start + t) + op_.channels + first_;
      summed(place, t, [=](int64_t j, int64_t count, Vector<C> c) {
        const Vector<C> g = get<C>(up + j, count);
        if constexpr (mode == WITH_SILU) {
          store(out + j, g * MUTATED("causal_conv: slope forgotten", (activated<SILU, T, C>(c).slope), all<C>(1)));
        } else {
          set<C>(d_gates + j, g * c, count);
          store(out + j, g * MUTATED("gated_conv: gate forgotten", get<C>(gates + j, count), all<C>(1)));
        }
      });
    }
  }

  // into += w_s ⊙ d_c
  void add(int64_t s, const C* d_c, C* into) const {
    for (int64_t j = 0; j < width_; j += lanes<C>)
      store(into + j, fma(load<C>(w_[s] + j), load<C>(d_c + j), load<C>(into + j)));
  }

  void write(Rows<T> d_x, int64_t token, const C* sum) const {
    T* out = d_x.at(token) + first_;
    const T* in = row(token);
    const int64_t x_offset = 2 * op_.channels;
    for (int64_t j = 0; j < width_; j += lanes<C>) {
      const int64_t count = width_ - j;
      const Vector<C> d = load<C>(sum + j);
      if constexpr (mode == GATED) {
        set<C>(out + j, d * get<C>(in + x_offset + j, count), count);
        const Vector<C> b = MUTATED("gated_conv: by the wrong factor", get<C>(in + j, count), all<C>(1));
        set<C>(out + x_offset + j, d * b, count);
      } else {
        set<C>(out + j, d, count);
      }
    }
  }

  const Convolution<T>& op_;
  const int64_t first_, width_;
  // Taps by distance, and ∂L/∂c of the last tokens.
  alignas(64) C w_[MOST_TAPS][CHANNELS] = {};
  alignas(64) C bias_[CHANNELS] = {};
  alignas(64) C d_c_[MOST_TAPS][CHANNELS], sum_[CHANNELS];
};

template <class T, class Body>
void by_mode(int mode, const Convolution<T>& op, const Body& body) {
  parallel((op.channels + CHANNELS - 1) / CHANNELS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * CHANNELS;
      if (mode == GATED) {
        Block<T, GATED> one(op, first);
        body(one);
      } else if (mode == WITH_SILU) {
        Block<T, WITH_SILU> one(op, first);
        body(one);
      } else {
        Block<T, PLAIN> one(op, first);
        body(one);
      }
    }
  });
}

}  // namespace

// Compute y (tokens, channels) from x (tokens, channels), or (tokens, 3 channels) with mode 2. The row strides are in
// numbers. table: (3, segments), see segments.h. At most eight taps.
BACKHAND_EXPORT void backhand_causal_conv_forward(int dtype, int mode, const void* x, int64_t x_row, const void* weight,
                                                  int64_t weight_row, const void* bias, const int64_t* table,
                                                  int64_t segments, int64_t channels, int64_t taps, void* y,
                                                  int64_t y_row) {
  BY_DTYPE(dtype, T, {
    const Convolution<T> op{static_cast<const T*>(x), x_row, static_cast<const T*>(weight), weight_row,
                            static_cast<const T*>(bias), {table, segments}, channels, taps};
    by_mode(mode, op, [=](auto& block) { block.forward({static_cast<T*>(y), y_row}); });
  });
}

// Compute d_x, of x's shape; rows of tokens that belong to no document are not written.
BACKHAND_EXPORT void backhand_causal_conv_backward(int dtype, int mode, const void* x, int64_t x_row,
                                                   const void* weight, int64_t weight_row, const void* bias,
                                                   const int64_t* table, int64_t segments, int64_t channels,
                                                   int64_t taps, const void* d_y, int64_t d_y_row, void* d_x,
                                                   int64_t d_x_row) {
  BY_DTYPE(dtype, T, {
    const Convolution<T> op{static_cast<const T*>(x), x_row, static_cast<const T*>(weight), weight_row,
                            static_cast<const T*>(bias), {table, segments}, channels, taps};
    by_mode(mode, op, [=](auto& block) {
      block.backward({static_cast<const T*>(d_y), d_y_row}, {static_cast<T*>(d_x), d_x_row});
    });
  });
}
