// Grouped-query attention over packed documents, causal or in both directions, forward and backward: the formulas of
// ops/attention.py.
//
// A task is one segment and one key/value head with the query heads that share it (or one of these heads, if there are
// few tasks). It packs the keys and values once. Then it computes block by block of queries and, for each block, piece by
// piece of the keys that it sees: their scores, the softmax and the following products, while all of it is in the
// second-level cache. Keys that no query of the block sees are never multiplied.
//
// The forward keeps the largest score and the sum of each query over the pieces so far. If a piece has a larger score,
// the sums before it are scaled [arXiv:1805.02867; 2205.14135, algorithm 1]. On request it writes ℓ.
//
// The backward computes P again and works on transposed pieces (keys, queries), so that every product finds its operands
// packed and sums over keys run down the lanes. With ℓ and O of the forward, it takes a piece at a time. Without, all
// keys that a block sees are one piece, and on request it also recomputes O from the same P, one product in six.
//
// Results do not depend on the number of threads. Each task writes separate places. What several tasks sum (∂L/∂K and
// ∂L/∂V of continued segments, and those of a group whose heads are tasks) goes to buffers that are added in a fixed
// order.
#include <algorithm>
#include <cstdlib>

#include "arena.h"
#include "attention_backward.h"
#include "attention_forward.h"
#include "dtypes.h"
#include "mutants.h"

namespace {

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

// Neighbouring segments of one tree that a task computes. It sums ∂L/∂K and ∂L/∂V of the tree's continued segments, of
// `rows` rows, in its own buffer, which begins after `place` rows of other buffers.
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
  List<int64_t> row_of;  // of each token, -1 if no segment continues its segment
  int64_t rows = 0;      // of all buffers

  explicit Plan(const Segments& segments) {
    int64_t trees = 0;
    for (int64_t i = 0; i < segments.count; ++i) {
      trees += segments.parent(i) < 0 && segments.continued(i);
      while (row_of.size() < segments.start(i) + segments.length(i)) row_of.push_back(-1);
    }
    for (int64_t first = 0, last; first < segments.count; first = last) {
      last = segments.tree_end(first);
      // With few trees, each is divided into several tasks.
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
  // With few tasks, each head of a group is a task, with its own buffer for all tokens.
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
  // A buffer of `rows` rows after `before` rows of others.
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

// Compute output (tokens, heads, head_dim) from q, k and v, each given by its address and the strides of its tokens and
// heads, and, unless null, ℓ (heads, tokens) in the kernel's units. table: (3, segments), see segments.h. A query sees
// itself and window - 1 keys before it and, unless `causal`, as many after it; no segment then continues another. sinks:
// (heads,) or null. Returns 1 if there is no memory, else 0.
BACKHAND_EXPORT int backhand_attention_forward(int dtype, const void* q, int64_t q_token, int64_t q_head, const void* k,
                                               int64_t k_token, int64_t k_head, const void* v, int64_t v_token,
                                               int64_t v_head, void* output, int64_t output_token, int64_t output_head,
                                               void* logsumexp, int64_t tokens, const int64_t* table, int64_t segments,
                                               int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t window,
                                               double scaling, const double* sinks, int causal) {
  const Shape shape{{table, segments}, heads, kv_heads, head_dim, window, scaling, sinks, causal != 0};
  BY_DTYPE(dtype, T, {
    const Forward<Operands<T>, T> run{shape,
                                      {static_cast<const T*>(q), q_token, q_head},
                                      {static_cast<const T*>(k), k_token, k_head},
                                      {static_cast<const T*>(v), v_token, v_head},
                                      {static_cast<T*>(output), output_token, output_head},
                                      static_cast<Wide<T>*>(logsumexp),
                                      tokens};
    return forward(run);
  });
}

// Compute the gradients of q, k and v from d_y, the gradient of the output. `logsumexp` is ℓ of the forward, and y its
// output, or both are null. Then, if `output` is not null, the output is written to it. The other arguments are those of
// the forward.
BACKHAND_EXPORT int backhand_attention_backward(
    int dtype, const void* q, int64_t q_token, int64_t q_head, const void* k, int64_t k_token, int64_t k_head,
    const void* v, int64_t v_token, int64_t v_head, const void* d_y, int64_t d_y_token, int64_t d_y_head, void* d_q,
    int64_t d_q_token, int64_t d_q_head, void* d_k, int64_t d_k_token, int64_t d_k_head, void* d_v, int64_t d_v_token,
    int64_t d_v_head, const void* y, int64_t y_token, int64_t y_head, void* output, int64_t output_token,
    int64_t output_head, const void* logsumexp, int64_t tokens, const int64_t* table, int64_t segments, int64_t heads,
    int64_t kv_heads, int64_t head_dim, int64_t window, double scaling, const double* sinks, int causal) {
  const Shape shape{{table, segments}, heads, kv_heads, head_dim, window, scaling, sinks, causal != 0};
  BY_DTYPE(dtype, T, {
    const Backward<Operands<T>, T> run{shape,
                                       {static_cast<const T*>(q), q_token, q_head},
                                       {static_cast<const T*>(k), k_token, k_head},
                                       {static_cast<const T*>(v), v_token, v_head},
                                       {static_cast<const T*>(d_y), d_y_token, d_y_head},
                                       {static_cast<const T*>(y), y_token, y_head},
                                       {static_cast<T*>(d_q), d_q_token, d_q_head},
                                       {static_cast<T*>(d_k), d_k_token, d_k_head},
                                       {static_cast<T*>(d_v), d_v_token, d_v_head},
                                       {static_cast<T*>(output), output_token, output_head},
                                       static_cast<const Wide<T>*>(logsumexp),
                                       tokens};
    return backward(run);
  });
}
