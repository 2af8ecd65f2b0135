// Attention's forward of one segment and key/value head: a task of attention.cpp, and a token's in decode_step.cpp.
#pragma once

#include "attention.h"
#include "mutants.h"

namespace {

// Transposed keys are stored in panels of this many keys, which scores read one after another.
constexpr int64_t PANEL = 64;

// The softmax of one query over the keys that were read so far: the largest score, and Σ e^(score - largest).
template <class C>
struct RunningSoftmax {
  C largest;
  Compensated<Vector<C>> sum;
};

template <class Op, class T>
struct Forward {
  typedef typename Op::Sum C;
  typedef typename Op::Element E;
  typedef typename Op::Unit U;
  Shape shape;
  Heads<const T> q, k, v;
  Heads<T> output;
  C* logsumexp = nullptr;  // (heads, tokens), in the units of `Op::power`; null if it is not requested
  int64_t tokens = 0;

  size_t scratch(int64_t keys) const {
    const int64_t n = rounded_up(keys, KEYS), width = shape.width(), block = MOST_QUERIES;
    const int64_t piece = std::min(n, KEYS_A_PIECE);
    const int64_t numbers = 2 * n * width + width * (n + PANEL) + n * width + block * (piece + 3 * width);
    return static_cast<size_t>(numbers) * sizeof(C) + 16 * 64;
  }

  void task(const Document& doc, int64_t kv_head, int64_t first_head, int64_t last_head, Arena& arena) const {
    arena.clear();
    const int64_t n = rounded_up(doc.keys(), KEYS), width = shape.width(), units = width / Op::PACK;
    const int64_t block = MOST_QUERIES, row = std::min(n, KEYS_A_PIECE);
    E* rows = arena.take<E>(n * width);
    U *keys = arena.take<U>(units * rounded_up(n, PANEL)), *spare = arena.take<U>(Op::PACK == 1 ? 0 : n / Op::PACK * width);
    C *scores = arena.take<C>(block * row), *sums = arena.take<C>(block * width);
    // P overwrites the scores, each row its own.
    E *p = reinterpret_cast<E*>(scores), *queries = arena.take<E>(block * width);
    const int64_t p_row = row * static_cast<int64_t>(sizeof(C) / sizeof(E));
    RunningSoftmax<C> softmax[MOST_QUERIES];
    pack_rows<Op>(k, kv_head, doc, 0, doc.keys(), n, shape.head_dim, width, rows);
    for (int64_t j = 0; j < n; j += PANEL)
      transpose(reinterpret_cast<const U*>(rows) + j * units, units, std::min(PANEL, n - j), units, keys + j * units,
                PANEL);
    pack_rows<Op>(v, kv_head, doc, 0, doc.keys(), n, shape.head_dim, width, rows);
    const U* values = by_places<Op>(rows, width, n, spare);
    for (int64_t head = first_head; head < last_head; ++head)
      for (int64_t begin = 0; begin < doc.length; begin += block) {
        const int64_t count = std::min(block, doc.length - begin), first = doc.before + begin;
        const Range range = seen(shape, doc.keys(), first, count);
        const int64_t rows_of_block = by_corners<Op> ? rounded_up(count, SIDE) : count;
        pack_rows<Op>(q, head, doc, first, count, rows_of_block, shape.head_dim, width, queries);
        for (int64_t i = 0; i < count; ++i) softmax[i] = start(head);
        for (int64_t low = range.low, next; low < range.high; low = next) {
          next = std::min(range.high, (low / KEYS_A_PIECE + 1) * KEYS_A_PIECE);
          const int64_t span = next - low, diagonal = range.diagonal - (low - range.low);
          const bool more = low > range.low;
          for (int64_t j = low, last; j < next; j = last) {
            last = std::min(next, (j / PANEL + 1) * PANEL);
            scores_by_queries<Op>(rows_of_block, last - j, units, reinterpret_cast<const U*>(queries),
                                  keys + j / PANEL * PANEL * units + j % PANEL, PANEL, scores + (j - low), row,
                                  diagonal - (j - low));
          }
          for (int64_t i = 0; i < count; ++i)
            softmax_row(scores + i * row, p + i * p_row, doc.keys(), first + i, low, span,
                        keys_read<Op>(rows_of_block, span, diagonal, by_corners<Op> ? count : i), softmax[i],
                        more ? sums + i * width : nullptr);
          for (int64_t i = count; i < rows_of_block; ++i) std::fill(p + i * p_row, p + i * p_row + span, E(0));
          sum_over_keys<Op>(rows_of_block, width, span, Rows<U>{reinterpret_cast<const U*>(p), p_row / Op::PACK},
                            values + low / Op::PACK * width, width, sums, width, diagonal,
                            MUTATED("attention: keys of the last piece only", more, false));
        }
        for (int64_t i = 0; i < count; ++i) {
          C* values_of_query = sums + i * width;
          const C sum = sum_of<C>(softmax[i].sum.sum), inverse = 1 / sum;
          for (int64_t j = 0; j < width; j += lanes<C>)
            store(values_of_query + j, load<C>(values_of_query + j) * inverse);
          write_row<C>(values_of_query, output.at(doc.token(first + i), head), shape.head_dim);
          if (logsumexp == nullptr) continue;
          const C logarithm = sum == sum ? natural_logarithm<C>(all<C>(sum))[0] * static_cast<C>(Op::POWER_OF) : sum;
          logsumexp[head * tokens + doc.token(first + i)] =
              softmax[i].largest + MUTATED("attention: sum missing in log-sum-exp", logarithm, C(0));
        }
      }
  }

  // The state before the first key. A sink is a term of the sum, whose key has no value.
  RunningSoftmax<C> start(int64_t head) const {
    RunningSoftmax<C> softmax{C(-3e38), {}};
    if (shape.sinks == nullptr) return softmax;
    softmax.largest = static_cast<C>(shape.sinks[head] * Op::POWER_OF);
    softmax.sum.sum[0] = MUTATED("attention: sink missing", C(1), C(0));
    return softmax;
  }

  // Write e^(c s - largest) of the visible keys among low … low + span - 1 to p, zeros elsewhere up to `end`, and add
  // them to the sum. If a score is larger than all before it, the sum and `sums` (width), unless null, are scaled.
  void softmax_row(const C* scores, E* p, int64_t keys, int64_t position, int64_t low, int64_t span, int64_t end,
                   RunningSoftmax<C>& softmax, C* sums) const {
    constexpr int W = lanes<C>;
    const int64_t window = MUTATED("attention: window ignored", shape.window, position + 1);
    const int64_t from = std::max<int64_t>(low, position - window + 1) - low;
    const int64_t after = seen_end(shape, keys, position);
    const int64_t to = std::min(span, MUTATED("attention: next key seen", after, after + 1) - low);
    int64_t j = 0;
    if (from < to) {
      const Vector<C> scaling = all<C>(static_cast<C>(shape.scaling * Op::POWER_OF)), least = all<C>(C(-3e38));
      Vector<C> most = least;
      const auto visible = [=](int64_t i) {
        const Bits<C> key = counted_from<C>(i);
        return (key >= static_cast<int32_t>(from)) & (key < static_cast<int32_t>(to));
      };
      const int64_t begin = from / W * W;
      for (int64_t i = begin; i < to; i += W) {
        Vector<C> s = load<C>(scores + i) * scaling;
        if (i < from || i + W > to) s = visible(i) ? s : least;
        most = larger(s, most);
      }
      if (const C largest = largest_of<C>(most); largest > softmax.largest) {
        const Vector<C> factor = Op::power(all<C>(softmax.largest - largest));
        softmax.largest = largest;
        softmax.sum.sum *= MUTATED("attention: sum not scaled to a larger score", factor, all<C>(1));
        softmax.sum.lost *= factor;
        const Vector<C> of_values = MUTATED("attention: output not scaled to a larger score", factor, all<C>(1));
        for (int64_t i = 0; sums != nullptr && i < shape.width(); i += W)
          store(sums + i, load<C>(sums + i) * of_values);
      }
      const Vector<C> top = all<C>(softmax.largest);
      for (; j < begin; j += W) Op::put(p + j, Vector<C>{});
      while (j < to) {
        Vector<C> part = MUTATED("attention: naive sum", Vector<C>{}, softmax.sum.sum);
        const int64_t last = std::min(to, j + MUTATED("attention: naive sum", W * KEYS_A_SUM, to));
        for (; j < last; j += W) {
          Vector<C> e = Op::power(load<C>(scores + j) * scaling - top);
          if (j < from || j + W > to) e = visible(j) ? e : Vector<C>{};
          part = MUTATED("attention: naive sum", part + e, one_by_one(part, e));
          Op::put(p + j, e);
        }
        Compensated<Vector<C>> total = softmax.sum;
        total.add(part);
        softmax.sum = MUTATED("attention: naive sum", total, (Compensated<Vector<C>>{part, Vector<C>{}}));
      }
    }
    for (; j < end; j += W) Op::put(p + j, Vector<C>{});
  }
};

}  // namespace
