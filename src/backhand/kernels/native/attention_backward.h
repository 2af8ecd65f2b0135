// The backward of one document and key/value head, block by block of queries: see attention.cpp.
#pragma once

#include "arena.h"
#include "attention.h"
#include "mutants.h"

namespace {

// ∂L/∂K and ∂L/∂V in the type of their sums: (rows, width) each.
template <class C>
struct Accumulated {
  C *d_k, *d_v;
};

template <class Op, class T>
struct Backward {
  typedef typename Op::Sum C;
  typedef typename Op::Element E;
  typedef typename Op::Unit U;
  Shape shape;
  Heads<const T> q, k, v, d_y, y;  // y is O
  Heads<T> d_q, d_k, d_v, output;  // the data of the last one is null if O is not requested
  const C* logsumexp;  // ℓ of the forward, (heads, tokens); null if it is not known, and then O is not read
  int64_t tokens;

  // With ℓ, more queries per block: long documents' keys and sums do not stay in the cache and are read by every block.
  static constexpr int64_t QUERIES_WITH_LSE = by_corners<Op> ? MOST_QUERIES : 2 * MOST_QUERIES;
  int64_t piece(int64_t keys) const {
    return logsumexp == nullptr ? rounded_up(keys, KEYS) : std::min(rounded_up(keys, KEYS), KEYS_A_BACKWARD_PIECE);
  }
  int64_t block_size(int64_t keys) const { return logsumexp == nullptr ? block_of(keys) : QUERIES_WITH_LSE; }

  size_t scratch(int64_t keys) const {
    const int64_t n = rounded_up(keys, KEYS), width = shape.width(), block = block_size(keys);
    const int64_t numbers = n * width * 7 + block * (5 * piece(keys) + 10 * width);
    return static_cast<size_t>(numbers) * sizeof(C) + 33 * 64;
  }

  // Add to `into` (keys, width); write ∂L/∂Q, and O if it is requested.
  void task(const Document& doc, int64_t kv_head, int64_t first_head, int64_t last_head, Arena& arena,
            Accumulated<C> into) const {
    const int64_t n = rounded_up(doc.keys(), KEYS), width = shape.width(), units = width / Op::PACK;
    const int64_t block = block_size(doc.keys()), most = piece(doc.keys());
    E *k_rows = arena.take<E>(n * width), *v_rows = arena.take<E>(n * width);
    C *scores = arena.take<C>(std::max(most, width) * block), *d_p = arena.take<C>(most * block);
    C* sums = arena.take<C>(width * block);
    // If the types are equal, P overwrites the scores, unless a result is transposed there, and ∂L/∂S overwrites ∂L/∂P.
    E* p = Op::PACK == 1 && !by_corners<Op> ? reinterpret_cast<E*>(scores) : arena.take<E>(most * block);
    E* d_s = Op::PACK == 1 ? reinterpret_cast<E*>(d_p) : arena.take<E>(most * block);
    const auto spare = [&](int64_t count) { return Op::PACK == 1 ? nullptr : arena.take<U>(count); };
    U *k_spare = spare(n / Op::PACK * width), *v_spare = spare(n / Op::PACK * width);
    U* right = spare(most / Op::PACK * block);
    U *q_spare = spare(block / Op::PACK * width), *g_spare = spare(block / Op::PACK * width);
    E *q_rows = arena.take<E>(block * width), *g_rows = arena.take<E>(block * width);
    U *q_turned = arena.take<U>(units * block), *g_turned = arena.take<U>(units * block);
    alignas(64) C lse[QUERIES_WITH_LSE], delta[QUERIES_WITH_LSE];
    pack_rows<Op>(k, kv_head, doc, 0, doc.keys(), n, shape.head_dim, width, k_rows);
    pack_rows<Op>(v, kv_head, doc, 0, doc.keys(), n, shape.head_dim, width, v_rows);
    const U* k_places = by_places<Op>(k_rows, width, n, k_spare);
    const U* v_places = output.data == nullptr ? nullptr : by_places<Op>(v_rows, width, n, v_spare);
    if constexpr (by_corners<Op>) {
      U* turned = arena.take<U>(width * (n / Op::PACK));
      transpose(k_places, width, n / Op::PACK, width, turned, n / Op::PACK);
      k_places = turned;
      if (output.data != nullptr) {
        turned = arena.take<U>(width * (n / Op::PACK));
        transpose(v_places, width, n / Op::PACK, width, turned, n / Op::PACK);
        v_places = turned;
      }
    }
    for (int64_t head = first_head; head < last_head; ++head)
      for (int64_t begin = 0; begin < doc.length; begin += block) {
        const int64_t count = std::min(block, doc.length - begin), first = doc.before + begin;
        const Range range = seen(shape, doc.keys(), first, count);
        const int64_t queries = by_corners<Op> ? block : rounded_up(count, SIDE);
        const auto pack_block = [&](const Heads<const T>& x, E* rows, U* turned) {
          pack_rows<Op>(x, head, doc, first, count, queries, shape.head_dim, width, rows);
          transpose(reinterpret_cast<const U*>(rows), units, queries, units, turned, block);
        };
        pack_block(d_y, g_rows, g_turned);
        if (logsumexp != nullptr) {
          pack_block(y, q_rows, q_turned);
          dot_columns(q_turned, g_turned, units, queries, block, delta);
          for (int64_t i = 0; i < queries; ++i)
            lse[i] = i < count ? logsumexp[head * tokens + doc.token(first + i)] : C(0);
        }
        pack_block(q, q_rows, q_turned);
        const U *q_places = by_places<Op>(q_rows, width, queries, q_spare);
        const U *g_places = by_places<Op>(g_rows, width, queries, g_spare);
        for (int64_t low = range.low, next; low < range.high; low = next) {
          next = logsumexp == nullptr ? range.high : std::min(range.high, (low / most + 1) * most);
          const int64_t diagonal = range.diagonal - (low - range.low), whole = next - low;
          const bool more = MUTATED("attention: gradient of queries by the last piece only", low > range.low, false);
          const int64_t span = by_corners<Op> ? whole : std::min(whole, rounded_up(diagonal + count, Op::PACK));
          // (keys, queries) from rows of keys and transposed queries.
          const auto multiply = [&](const E* rows, const U* turned, C* result) {
            scores_by_keys<Op>(span, queries, units, reinterpret_cast<const U*>(rows + low * width), turned, block,
                               result, block, diagonal);
          };
          multiply(k_rows, q_turned, scores);
          multiply(v_rows, g_turned, d_p);
          constexpr int64_t STEP = CHUNK * lanes<C>;
          for (int64_t column = 0; column < queries; column += STEP)
            softmax_columns(scores + column, d_p + column, p + column, d_s + column, block, doc.keys(), first + column,
                            low, std::max<int64_t>(0, std::min(span, diagonal + column + STEP)),
                            keys_read<Op>(queries, span, diagonal, column + STEP - 1), head, lse + column,
                            delta + column);
          // Adds (keys, width), from (keys, queries) and rows of queries.
          const auto add = [&](const E* left, const U* places, C* sum) {
            add_over_queries<Op>(span, width, queries, reinterpret_cast<const U*>(left), block / Op::PACK, places,
                                 width, sum + low * width, width, diagonal);
          };
          add(p, g_places, into.d_v);
          add(d_s, q_places, into.d_k);
          // Rows (count, head_dim) of one head from P or ∂L/∂S, (keys, queries), and values of keys.
          const auto write_product = [&](const E* of_keys, const U* values, const Heads<T>& to) {
            const U* shares = by_places<Op>(of_keys, block, span, right);
            C* rows = sums;
            if constexpr (by_corners<Op>) {
              turned_sum_over_keys<Op>(queries, width, span, values + low / Op::PACK, n / Op::PACK, shares, block, sums,
                                       block, diagonal, more);
            } else {
              sum_over_keys<Op>(count, width, span, Interleaved<U>{shares, block}, values + low / Op::PACK * width,
                                width, sums, width, diagonal, more);
            }
            if (next < range.high) return;
            if constexpr (by_corners<Op>) {
              rows = scores;
              transpose(sums, block, width, block, rows, width);
            }
            if (logsumexp != nullptr) scale(rows, count * width);
            for (int64_t i = 0; i < count; ++i)
              write_row<C>(rows + i * width, to.at(doc.token(first + i), head), shape.head_dim);
          };
          write_product(d_s, k_places, d_q);
          if (output.data != nullptr)
            write_product(p, MUTATED("attention: output made of keys", v_places, k_places), output);
        }
      }
    if (logsumexp != nullptr) scale(into.d_k, n * width);
  }

  // Multiply sums over ∂L/∂S by c.
  void scale(C* sums, int64_t count) const {
    const Vector<C> scaling = all<C>(static_cast<C>(shape.scaling));
    for (int64_t i = 0; i < count; i += lanes<C>) store(sums + i, load<C>(sums + i) * scaling);
  }

  // δ of each query: the products of two transposed blocks (units, queries), column by column. The terms are added as
  // in a product of registers, so that δ of a query that sees one key is exactly its ∂L/∂P.
  void dot_columns(const U* a, const U* b, int64_t units, int64_t queries, int64_t row, C* dots) const {
    for (int64_t column = 0; column < queries; column += lanes<C>) {
      Vector<C> sum = {};
      for (int64_t k = 0; k < units; k += LONGEST_SUM) {
        Vector<C> part = {};
        for (int64_t i = k; i < std::min(units, k + LONGEST_SUM); ++i)
          part = Op::multiply_add(Op::units(a + i * row + column), Op::units(b + i * row + column), part);
        sum = k == 0 ? part : sum + part;
      }
      store(dots + column, MUTATED("attention: δ of the output missing", sum, Vector<C>{}));
    }
  }

  static constexpr int CHUNK = 2;  // registers of queries at a time

  // Compute P and ∂L/∂S = P ⊙ (∂L/∂P - δ) of `CHUNK` registers of queries from position `first` on. Some of these queries
  // see keys from `low` on; the rest up to `end` is set to zero. Results may overwrite the operands. Without ℓ, these are
  // all keys that the queries see; the sums are then computed from them, and ∂L/∂S is scaled.
  void softmax_columns(C* scores, C* d_p, E* p, E* d_s, int64_t row, int64_t keys, int64_t first, int64_t low,
                       int64_t span, int64_t end, int64_t head, const C* lse, const C* deltas) const {
    constexpr int W = lanes<C>;
    const Vector<C> powers = all<C>(static_cast<C>(shape.scaling * Op::POWER_OF));
    Bits<C> position[CHUNK];
    for (int c = 0; c < CHUNK; ++c) position[c] = counted_from<C>(first + c * W);
    const int64_t last = first + CHUNK * W - 1;
    const int32_t reach = static_cast<int32_t>(std::min<int64_t>(shape.window, INT32_MAX / 2));
    const int32_t ahead = shape.causal ? 0 : reach - 1;  // the number of keys after its own that a query sees
    const int32_t key_count = static_cast<int32_t>(keys);
    const auto visible = [=](int64_t j, const Bits<C>& at) {
      const int32_t key = static_cast<int32_t>(j);
      // A key of the padding is seen by no query.
      const int32_t from = key < MUTATED("attention: padded keys seen", key_count, INT32_MAX) ? key - ahead : INT32_MAX;
      return (at >= MUTATED("attention: causal mask off by one", from, from - 1)) & (at < key + reach);
    };
    // body(row, true if some of the queries do not see its key); keys that all queries see are between the others.
    const int64_t all_see = std::min(std::max<int64_t>(0, last - reach + 1 - low), span);
    const int64_t some_see = std::min(std::max(all_see, seen_end(shape, keys, first) - low), span);
    const auto each_key = [=](int64_t i, int64_t end_of_keys, const auto& body) {
      for (; i < std::min(all_see, end_of_keys); ++i) body(i, std::true_type());
      for (; i < std::min(some_see, end_of_keys); ++i) body(i, std::false_type());
      for (; i < end_of_keys; ++i) body(i, std::true_type());
    };
    if (logsumexp != nullptr) {
      Vector<C> of_lse[CHUNK], delta[CHUNK];
      for (int c = 0; c < CHUNK; ++c) {
        of_lse[c] = load<C>(lse + c * W);
        delta[c] = load<C>(deltas + c * W);
      }
      each_key(0, span, [=](int64_t i, auto masked) {
        Vector<C> share[CHUNK], d_score[CHUNK];
        for (int c = 0; c < CHUNK; ++c) {
          const int64_t place = i * row + c * W;
          share[c] = Op::power(load<C>(scores + place) * powers - of_lse[c]);
          Vector<C> d_share = load<C>(d_p + place);
          if (masked()) {
            const Bits<C> seen_by = visible(low + i, position[c]);
            share[c] = seen_by ? share[c] : Vector<C>{};
            d_share = seen_by ? d_share : Vector<C>{};  // which may be undefined
          }
          d_score[c] = share[c] * (d_share - delta[c]);
        }
        Op::put_two(p + i * row, share[0], share[1]);
        Op::put_two(d_s + i * row, d_score[0], d_score[1]);
      });
    } else {
      Vector<C> inverse[CHUNK], delta[CHUNK];
      const C scaling = static_cast<C>(shape.scaling);
      exponentials(scores, d_p, row, low, span, head, powers, each_key, visible, position, inverse, delta);
      for (int64_t i = 0; i < span; ++i)
        for (int c = 0; c < CHUNK; ++c) {
          const int64_t place = i * row + c * W;
          const Vector<C> share = load<C>(scores + place) * inverse[c], d_share = load<C>(d_p + place);
          Op::put(p + place, share);
          Op::put(d_s + place, share * scaling * (d_share - delta[c]));
        }
    }
    for (int64_t i = span; i < end; ++i)
      for (int c = 0; c < CHUNK; ++c) {
        Op::put(p + i * row + c * W, Vector<C>{});
        Op::put(d_s + i * row + c * W, Vector<C>{});
      }
  }

  // Replace the scores by e^(c s - largest), hide ∂L/∂P of keys that a query does not see, and compute one over the sums
  // of the exponentials, and δ.
  template <class EachKey, class Visible>
  void exponentials(C* scores, C* d_p, int64_t row, int64_t low, int64_t span, int64_t head, Vector<C> powers,
                    const EachKey& each_key, const Visible& visible, const Bits<C>* position, Vector<C>* inverse,
                    Vector<C>* delta) const {
    constexpr int W = lanes<C>;
    Vector<C> most[CHUNK];
    Compensated<Vector<C>> sums[CHUNK], deltas[CHUNK];
    const bool sinks = shape.sinks != nullptr;
    const Vector<C> least = all<C>(C(-3e38));
    const Vector<C> sink = all<C>(sinks ? static_cast<C>(shape.sinks[head] * Op::POWER_OF) : C(0));
    for (int c = 0; c < CHUNK; ++c) most[c] = sinks ? sink : least;
    each_key(0, span, [&](int64_t i, auto masked) {
      for (int c = 0; c < CHUNK; ++c) {
        Vector<C> s = load<C>(scores + i * row + c * W) * powers;
        if (masked()) s = visible(low + i, position[c]) ? s : least;
        most[c] = larger(s, most[c]);
      }
    });
    for (int c = 0; c < CHUNK && sinks; ++c)
      sums[c].sum = MUTATED("attention: sink missing in backward", Op::power(sink - most[c]), Vector<C>{});
    // Steps begin at the same keys for every position of the block's first key.
    for (int64_t begin = 0; begin < span;) {
      const int64_t next = (low + begin) / KEYS_A_SUM * KEYS_A_SUM + KEYS_A_SUM - low;
      const int64_t last = std::min(span, next);
      Vector<C> sum[CHUNK] = {}, of_deltas[CHUNK] = {};
      each_key(begin, last, [&](int64_t i, auto masked) {
        for (int c = 0; c < CHUNK; ++c) {
          // Rounded like the largest, whose power is then exactly one: a key that is alone gets no gradient from δ.
          const int64_t place = i * row + c * W;
          Vector<C> e = Op::power(load<C>(scores + place) * powers - most[c]), d_share = load<C>(d_p + place);
          if (masked()) {
            const Bits<C> seen_by = visible(low + i, position[c]);
            e = seen_by ? e : Vector<C>{};
            d_share = seen_by ? d_share : Vector<C>{};  // which may be undefined
            store(d_p + place, d_share);
          }
          store(scores + place, e);
          sum[c] += e;
          of_deltas[c] = fma(e, d_share, of_deltas[c]);
        }
      });
      for (int c = 0; c < CHUNK; ++c) {
        sums[c].add(sum[c]);
        deltas[c].add(of_deltas[c]);
      }
      begin = last;
    }
    for (int c = 0; c < CHUNK; ++c) {
      // Padding queries after the last query may see no key at all.
      const Vector<C> sum = sums[c].sum;
      inverse[c] = sum > 0 ? 1 / sum : Vector<C>{};
      inverse[c] = sum == sum ? inverse[c] : sum;
      delta[c] = MUTATED("attention: delta missing", deltas[c].sum * inverse[c], Vector<C>{});
    }
  }
};

}  // namespace
