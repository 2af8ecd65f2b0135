// Attention's forward of one segment and key/value head: a task of attention.cpp, and a token's in decode_step.cpp.
#pragma once

#include "attention.h"
#include "mutants.h"

namespace {

// Padding between transposed keys: with distances that are powers of two they would share few places of a cache.
constexpr int64_t APART = 16;

template <class Op, class T>
struct Forward {
  typedef typename Op::Sum C;
  typedef typename Op::Element E;
  typedef typename Op::Unit U;
  Shape shape;
  Heads<const T> q, k, v;
  Heads<T> output;

  size_t scratch(int64_t keys) const {
    const int64_t n = rounded_up(keys, KEYS), width = shape.width(), block = block_of(keys);
    const int64_t numbers = 2 * n * width + width * (n + APART) + n * width + block * (2 * n + 3 * width);
    return static_cast<size_t>(numbers) * sizeof(C) + 16 * 64;
  }

  void task(const Document& doc, int64_t kv_head, int64_t first_head, int64_t last_head, Arena& arena) const {
    arena.clear();
    const int64_t n = rounded_up(doc.keys(), KEYS), width = shape.width(), units = width / Op::PACK;
    const int64_t block = block_of(doc.keys());
    E* rows = arena.take<E>(n * width);
    const int64_t apart = n + APART;
    U *keys = arena.take<U>(units * apart), *spare = arena.take<U>(Op::PACK == 1 ? 0 : n / Op::PACK * width);
    C *scores = arena.take<C>(block * n), *sums = arena.take<C>(block * width);
    E *p = arena.take<E>(block * n), *queries = arena.take<E>(block * width);
    C inverse[64];
    pack_rows<Op>(k, kv_head, doc, 0, doc.keys(), n, shape.head_dim, width, rows);
    transpose(reinterpret_cast<const U*>(rows), units, n, units, keys, apart);
    pack_rows<Op>(v, kv_head, doc, 0, doc.keys(), n, shape.head_dim, width, rows);
    const U* values = by_places<Op>(rows, width, n, spare);
    for (int64_t head = first_head; head < last_head; ++head)
      for (int64_t begin = 0; begin < doc.length; begin += block) {
        const int64_t count = std::min(block, doc.length - begin), first = doc.before + begin;
        const Range range = seen(shape, doc.keys(), first, count);
        const int64_t span = range.high - range.low, diagonal = range.diagonal;
        const int64_t rows_of_block = by_corners<Op> ? rounded_up(count, SIDE) : count;
        pack_rows<Op>(q, head, doc, first, count, rows_of_block, shape.head_dim, width, queries);
        scores_by_queries<Op>(rows_of_block, span, units, reinterpret_cast<const U*>(queries), keys + range.low, apart,
                              scores, n, diagonal);
        for (int64_t i = 0; i < count; ++i)
          inverse[i] = softmax_row(scores + i * n, p + i * n, doc.keys(), first + i, range.low,
                                   keys_read<Op>(rows_of_block, span, diagonal, by_corners<Op> ? count : i), head);
        for (int64_t i = count; i < rows_of_block; ++i) std::fill(p + i * n, p + i * n + span, E(0));
        sum_over_keys<Op>(rows_of_block, width, span, Rows<U>{reinterpret_cast<const U*>(p), n / Op::PACK},
                          values + range.low / Op::PACK * width, width, sums, width, diagonal);
        for (int64_t i = 0; i < count; ++i) {
          C* row = sums + i * width;
          for (int64_t j = 0; j < width; j += lanes<C>) store(row + j, load<C>(row + j) * inverse[i]);
          write_row<C>(row, output.at(doc.token(first + i), head), shape.head_dim);
        }
      }
  }

  // e^(c s - largest) of the visible keys into p, zeros elsewhere up to `span`; returns one over their sum.
  C softmax_row(C* scores, E* p, int64_t keys, int64_t position, int64_t low, int64_t span, int64_t head) const {
    constexpr int W = lanes<C>;
    const int64_t window = MUTATED("attention: window ignored", shape.window, position + 1);
    const int64_t from = std::max<int64_t>(low, position - window + 1) - low;
    const int64_t end = seen_end(shape, keys, position);
    const int64_t to = MUTATED("attention: next key seen", end, end + 1) - low;
    const Vector<C> scaling = all<C>(static_cast<C>(shape.scaling * Op::POWER_OF)), least = all<C>(C(-3e38));
    Vector<C> most = least;
    const auto visible = [=](int64_t j) {
      const Bits<C> key = counted_from<C>(j);
      return (key >= static_cast<int32_t>(from)) & (key < static_cast<int32_t>(to));
    };
    const int64_t begin = from / W * W;
    for (int64_t j = begin; j < to; j += W) {
      Vector<C> s = load<C>(scores + j) * scaling;
      if (j < from || j + W > to) s = visible(j) ? s : least;
      most = larger(s, most);
    }
    C largest = largest_of<C>(most);
    const C sink = shape.sinks == nullptr ? C(0) : static_cast<C>(shape.sinks[head] * Op::POWER_OF);
    if (shape.sinks != nullptr) largest = std::max(largest, sink);
    const Vector<C> top = all<C>(largest);
    Compensated<Vector<C>> sum;
    if (shape.sinks != nullptr) sum.sum[0] = MUTATED("attention: sink missing", Op::power(all<C>(sink) - top)[0], C(0));
    for (int64_t j = 0; j < begin; j += W) Op::put(p + j, Vector<C>{});
    int64_t j = begin;
    while (j < to) {
      Vector<C> part = {};
      const int64_t last = std::min(to, j + MUTATED("attention: naive sum", W * KEYS_A_SUM, to));
      for (; j < last; j += W) {
        Vector<C> e = Op::power(load<C>(scores + j) * scaling - top);
        if (j < from || j + W > to) e = visible(j) ? e : Vector<C>{};
        part = MUTATED("attention: naive sum", part + e, one_by_one(part, e));
        Op::put(p + j, e);
      }
      sum.add(part);
    }
    for (; j < span; j += W) Op::put(p + j, Vector<C>{});
    return 1 / sum_of<C>(sum.sum);
  }
};

}  // namespace
