// Causal grouped-query attention over packed documents, forward and backward: the formulas of ops/attention.py.
//
// One task is one segment and one key/value head with the query heads that share it (or one of these, where tasks are
// few). It packs the keys and values once, then takes block by block of queries: the block's scores against all keys
// that it sees, their softmax, and the products that follow, while all of it lies in the second-level cache. Keys
// behind the block's last query, and before its window, are never multiplied. The backward normalises P afresh and
// works on transposed blocks (keys, queries), so that every product finds its operands as packed, and sums over keys
// run down the lanes. Where it is asked to, it gives O once more from the same P, for one product in six.
//
// Results do not depend on the number of threads: each task writes places of its own, and what several add up (∂L/∂K and
// ∂L/∂V of segments that others continue, and those of a group whose heads are tasks) goes to buffers, added in a fixed
// order.
#include <algorithm>
#include <cstdlib>

#include "arena.h"
#include "attention_backward.h"
#include "dtypes.h"
#include "mutants.h"

namespace {

// ---------------------------------------------------------------------------------------------------------- forward

// Turned keys lie so many units further apart than there are: powers of two would share a few places of a cache.
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
        const Range range = seen(shape, first, count);
        const int64_t span = range.high - range.low, diagonal = first - range.low;
        const int64_t rows_of_block = by_corners<Op> ? rounded_up(count, SIDE) : count;
        pack_rows<Op>(q, head, doc, first, count, rows_of_block, shape.head_dim, width, queries);
        scores_by_queries<Op>(rows_of_block, span, units, reinterpret_cast<const U*>(queries), keys + range.low, apart,
                              scores, n, diagonal);
        for (int64_t i = 0; i < count; ++i)
          inverse[i] = softmax_row(scores + i * n, p + i * n, first + i, range.low,
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
  C softmax_row(C* scores, E* p, int64_t position, int64_t low, int64_t span, int64_t head) const {
    constexpr int W = lanes<C>;
    const int64_t window = MUTATED("attention: window ignored", shape.window, position + 1);
    const int64_t from = std::max<int64_t>(low, position - window + 1) - low;
    const int64_t to = MUTATED("attention: next key seen", position, position + 1) + 1 - low;
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

// ------------------------------------------------------------------------------------------------------------ tasks

constexpr int64_t FEW_TASKS = 8, MOST_PIECES = 8;
constexpr int64_t SPLIT_BYTES = int64_t{1} << 28;

template <class Op, class T>
int forward(const Forward<Op, T>& run) {
  const Shape& shape = run.shape;
  const Documents documents(shape.segments);
  const int64_t count = shape.segments.count;
  const int64_t parts = count * shape.kv_heads < FEW_TASKS ? shape.group() : 1;
  const int64_t heads = shape.group() / parts;
  const size_t bytes = run.scratch(documents.longest());
  std::atomic<bool> enough{true};
  by_turns(count * shape.kv_heads * parts, [&](std::atomic<int64_t>& next) {
    Arena arena(bytes);
    if (!arena.there()) {
      enough = false;
      return;
    }
    const Tiles tiles;
    for (int64_t task = next++; task < count * shape.kv_heads * parts; task = next++) {
      const int64_t kv_head = task / parts % shape.kv_heads, head = kv_head * shape.group() + task % parts * heads;
      run.task(documents[task / parts / shape.kv_heads], kv_head, head, head + heads, arena);
    }
  });
  return enough ? 0 : 1;
}

// Neighbouring segments of one tree that a task takes. It adds up ∂L/∂K and ∂L/∂V of the tree's continued segments, of
// so many rows, in a buffer of its own; so many rows of buffers stand before it.
struct Piece {
  int64_t first, last, rows, place;
};

// A token of a continued segment, its row in the buffers, and the pieces of its tree.
struct Continued {
  int64_t token, row, first_piece, last_piece;
};

struct Plan {
  List<Piece> pieces;
  List<Continued> continued;
  List<int64_t> row_of;  // of each token, -1 where nothing continues its segment
  int64_t rows = 0;      // of all buffers

  explicit Plan(const Segments& segments) {
    int64_t trees = 0;
    for (int64_t i = 0; i < segments.count; ++i) {
      trees += segments.parent(i) < 0 && segments.continued(i);
      while (row_of.size() < segments.start(i) + segments.length(i)) row_of.push_back(-1);
    }
    for (int64_t first = 0, last; first < segments.count; first = last) {
      last = segments.tree_end(first);
      // Few trees: several tasks for each.
      const int64_t count = std::min(last - first, std::max<int64_t>(1, MOST_PIECES / std::max<int64_t>(trees, 1)));
      const int64_t piece = pieces.size();
      int64_t own = 0;
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; segments.continued(i) && j < segments.length(i); ++j) {
          row_of[segments.start(i) + j] = own;
          continued.push_back({segments.start(i) + j, own++, piece, piece + count});
        }
      for (int64_t j = 0; j < count; ++j) {
        pieces.push_back({first + (last - first) * j / count, first + (last - first) * (j + 1) / count, own, rows});
        rows += own;
      }
    }
  }
};

template <class Op, class T>
int backward(const Backward<Op, T>& run) {
  typedef typename Op::Sum C;
  const Shape& shape = run.shape;
  const Documents documents(shape.segments);
  const Plan plan(shape.segments);
  const int64_t width = shape.width(), group = shape.group(), most_keys = documents.longest();
  const int64_t padded = rounded_up(most_keys, KEYS), tokens = plan.row_of.size();
  const int64_t pieces = plan.pieces.size();
  // Few tasks: each head of a group is one, with a buffer of its own for all tokens.
  const bool split = plan.rows == 0 && group > 1 && pieces * shape.kv_heads < FEW_TASKS &&
                     tokens * shape.heads * width * 2 * static_cast<int64_t>(sizeof(C)) <= SPLIT_BYTES;
  const int64_t heads = split ? 1 : group, parts = split ? group : 1;
  const int64_t tasks = pieces * shape.kv_heads * parts;
  const int64_t all_rows = split ? shape.heads * tokens : shape.kv_heads * plan.rows;
  C* shares = nullptr;
  if (all_rows > 0) {
    shares = static_cast<C*>(std::malloc(static_cast<size_t>(all_rows * width * 2) * sizeof(C)));
    if (shares == nullptr) return 1;
  }
  // A buffer of so many rows behind others.
  const auto buffer = [=](int64_t before, int64_t rows) {
    C* d_k = shares + before * width * 2;
    return Accumulated<C>{d_k, d_k + rows * width};
  };
  const auto shares_of = [&](const Piece& piece, int64_t kv_head) {
    return buffer(piece.place * shape.kv_heads + kv_head * piece.rows, piece.rows);
  };
  const size_t bytes = run.scratch(most_keys) + static_cast<size_t>(2 * padded * width) * sizeof(C) + 256;
  std::atomic<bool> enough{true};
  by_turns(tasks, [&](std::atomic<int64_t>& next) {
    Arena arena(bytes);
    if (!arena.there()) {
      enough = false;
      return;
    }
    const Tiles tiles;
    for (int64_t task = next++; task < tasks; task = next++) {
      const Piece& piece = plan.pieces[task / parts / shape.kv_heads];
      const int64_t kv_head = task / parts % shape.kv_heads, head = kv_head * group + task % parts * heads;
      Accumulated<C> mine{nullptr, nullptr};
      if (piece.rows > 0) {
        mine = shares_of(piece, kv_head);
        std::fill(mine.d_k, mine.d_k + 2 * piece.rows * width, C(0));
      }
      const auto add = [=](int64_t row, const C* d_k, const C* d_v) {
        for (int64_t c = 0; c < width; ++c) {
          mine.d_k[row * width + c] += d_k[c];
          mine.d_v[row * width + c] += d_v[c];
        }
      };
      for (int64_t index = piece.first; index < piece.last; ++index) {
        const Document doc = documents[index];
        const int64_t n = rounded_up(doc.keys(), KEYS);
        arena.clear();
        Accumulated<C> into{arena.take<C>(n * width), arena.take<C>(n * width)};
        std::fill(into.d_k, into.d_k + n * width, C(0));
        std::fill(into.d_v, into.d_v + n * width, C(0));
        run.task(doc, kv_head, head, head + heads, arena, into);
        for (int64_t key = 0; key < MUTATED("attention: prefix's share missing", doc.before, int64_t{0}); ++key)
          add(plan.row_of[doc.earlier[key]], into.d_k + key * width, into.d_v + key * width);
        for (int64_t i = 0; i < doc.length; ++i) {
          const int64_t token = doc.start + i;
          const C *d_k = into.d_k + (doc.before + i) * width, *d_v = into.d_v + (doc.before + i) * width;
          if (plan.row_of[token] >= 0) {
            add(plan.row_of[token], d_k, d_v);
          } else if (split) {
            const Accumulated<C> of_head = buffer(head * tokens, tokens);
            std::copy(d_k, d_k + width, of_head.d_k + token * width);
            std::copy(d_v, d_v + width, of_head.d_v + token * width);
          } else {
            write_row<C>(d_k, run.d_k.at(token, kv_head), shape.head_dim);
            write_row<C>(d_v, run.d_v.at(token, kv_head), shape.head_dim);
          }
        }
      }
    }
  });
  if (enough && shares != nullptr) {
    // Σ over the heads of a group, or over the pieces of a tree, in their order.
    const int64_t sums = split ? tokens : plan.continued.size();
    parallel(sums * shape.kv_heads, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t kv_head = i % shape.kv_heads;
        const Continued one = split ? Continued{i / shape.kv_heads, i / shape.kv_heads, 0, group}
                                    : plan.continued[i / shape.kv_heads];
        const auto part = [&](int64_t j) {
          return split ? buffer((kv_head * group + j) * tokens, tokens) : shares_of(plan.pieces[j], kv_head);
        };
        const Accumulated<C> total = part(one.first_piece);
        const int64_t place = one.row * width;
        for (int64_t j = one.first_piece + 1; j < one.last_piece; ++j) {
          const Accumulated<C> more = part(j);
          for (int64_t c = 0; c < width; ++c) {
            total.d_k[place + c] += MUTATED("attention: first head of the group only", more.d_k[place + c], C(0));
            total.d_v[place + c] += more.d_v[place + c];
          }
        }
        write_row<C>(total.d_k + place, run.d_k.at(one.token, kv_head), shape.head_dim);
        write_row<C>(total.d_v + place, run.d_v.at(one.token, kv_head), shape.head_dim);
      }
    });
  }
  std::free(shares);
  return enough ? 0 : 1;
}

}  // namespace

// output (tokens, heads, head_dim) from q, k and v, each given by its address and the distances of its tokens and of
// its heads. table: (3, segments), see segments.h. A query sees itself and window - 1 keys before it. sinks: (heads,) or
// null. Returns 1 when there is no memory, else 0.
BACKHAND_EXPORT int backhand_attention_forward(int dtype, const void* q, int64_t q_token, int64_t q_head, const void* k,
                                               int64_t k_token, int64_t k_head, const void* v, int64_t v_token,
                                               int64_t v_head, void* output, int64_t output_token, int64_t output_head,
                                               const int64_t* table, int64_t segments, int64_t heads, int64_t kv_heads,
                                               int64_t head_dim, int64_t window, double scaling, const double* sinks) {
  const Shape shape{{table, segments}, heads, kv_heads, head_dim, window, scaling, sinks};
  BY_DTYPE(dtype, T, {
    const Forward<Operands<T>, T> run{shape,
                                      {static_cast<const T*>(q), q_token, q_head},
                                      {static_cast<const T*>(k), k_token, k_head},
                                      {static_cast<const T*>(v), v_token, v_head},
                                      {static_cast<T*>(output), output_token, output_head}};
    return forward(run);
  });
}

// The gradients of q, k and v from d_y, the gradient of the output; the output once more in `again`, if that is not
// null. The rest as in the forward.
BACKHAND_EXPORT int backhand_attention_backward(
    int dtype, const void* q, int64_t q_token, int64_t q_head, const void* k, int64_t k_token, int64_t k_head,
    const void* v, int64_t v_token, int64_t v_head, const void* d_y, int64_t d_y_token, int64_t d_y_head, void* d_q,
    int64_t d_q_token, int64_t d_q_head, void* d_k, int64_t d_k_token, int64_t d_k_head, void* d_v, int64_t d_v_token,
    int64_t d_v_head, void* again, int64_t again_token, int64_t again_head, const int64_t* table, int64_t segments,
    int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t window, double scaling, const double* sinks) {
  const Shape shape{{table, segments}, heads, kv_heads, head_dim, window, scaling, sinks};
  BY_DTYPE(dtype, T, {
    const Backward<Operands<T>, T> run{shape,
                                       {static_cast<const T*>(q), q_token, q_head},
                                       {static_cast<const T*>(k), k_token, k_head},
                                       {static_cast<const T*>(v), v_token, v_head},
                                       {static_cast<const T*>(d_y), d_y_token, d_y_head},
                                       {static_cast<T*>(d_q), d_q_token, d_q_head},
                                       {static_cast<T*>(d_k), d_k_token, d_k_head},
                                       {static_cast<T*>(d_v), d_v_token, d_v_head},
                                       {static_cast<T*>(again), again_token, again_head}};
    return backward(run);
  });
}
