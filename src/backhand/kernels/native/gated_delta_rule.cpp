// The gated delta rule in chunks, forward and backward: the formulas of ops/gated_delta_rule.py.
//
// A task is a document and a key head with its value heads; if documents begin alike, it is a key head and all segments
// of the tree in order. A task computes chunk by chunk, while all matrices of a chunk are in the second-level cache.
// The backward first runs forward and saves the state before each chunk and its solution Y; everything else is
// recomputed. Workers allocate no memory: each uses its part of the given workspace, however many tasks it takes.
//
// Results do not depend on the number of threads: each task writes separate places, and sums over segments are in their
// order.
#include <atomic>

#include "arena.h"
#include "delta_chunk.h"
#include "segments.h"

namespace {

template <class T>
struct DeltaRule {
  typedef Wide<T> C;
  DeltaSizes sizes;
  Heads<const C> q, k;
  Heads<const T> v;
  Heads<const C> decay;
  Heads<const T> beta;
  Segments segments;

  int64_t chunks(int64_t i) const { return (segments.length(i) + sizes.chunk - 1) / sizes.chunk; }
  // The largest numbers of segments and of chunks in a document.
  int64_t most_segments() const {
    int64_t most = 0;
    for (int64_t i = 0; i < segments.count; ++i) {
      int64_t here = 1;
      for (int64_t p = segments.parent(i); p >= 0; p = segments.parent(p)) ++here;
      most = std::max(most, here);
    }
    return most;
  }
  int64_t most_chunks() const {
    int64_t most = 0;
    for (int64_t i = 0; i < segments.count; ++i) {
      int64_t here = 0;
      for (int64_t p = i; p >= 0; p = segments.parent(p)) here += chunks(p);
      most = std::max(most, here);
    }
    return most;
  }

  // Call of(key head, first segment, last) for each tree, by workers with `each` numbers of memory.
  template <class Of>
  void by_turns(C* memory, int64_t workers, int64_t each, const Of& of) const {
    List<int64_t> roots;
    for (int64_t i = 0; i < segments.count; i = segments.tree_end(i)) roots.push_back(i);
    const int64_t tasks = sizes.key_heads * roots.size();
    std::atomic<int64_t> next{0};
    parallel(workers, 1, [&](int64_t worker, int64_t) {
      for (int64_t task = next++; task < tasks; task = next++) {
        const int64_t root = roots[task / sizes.key_heads];
        of(memory + worker * each, task % sizes.key_heads, root, segments.tree_end(root));
      }
    });
  }
};

// ---------------------------------------------------------------------------------------------------------- forward

template <class T>
struct DeltaForward {
  typedef Wide<T> C;
  DeltaRule<T> rule;
  Heads<T> output;
  C* states;  // (documents, value heads, key width, value width), read and written; or null

  struct Memory {
    Chunk<C> chunk;
    C *ends, *state, *missing, *result;  // the states after the segments before the current one; the others
  };

  Memory lay_out(Pieces<C>& pieces) const {
    Memory m;
    m.chunk.lay_out(pieces, rule.sizes);
    m.ends = pieces.take((rule.most_segments() - 1) * rule.sizes.state());
    m.state = pieces.take(rule.sizes.state());
    m.missing = pieces.take(rule.sizes.chunk * rule.sizes.values());
    m.result = pieces.take(rule.sizes.chunk * rule.sizes.values());
    return m;
  }

  // Compute a document from the state `from`, null for zero; write the state after it to `to` if `wanted`.
  void scan(Memory& m, int64_t key_head, int64_t start, int64_t length, const C* from, C* to, bool wanted) const {
    const DeltaSizes& sizes = rule.sizes;
    Chunk<C>& chunk = m.chunk;
    for (int64_t first = 0; first < length; first += sizes.chunk) {
      const int64_t count = std::min(sizes.chunk, length - first), at = start + first;
      chunk.read_keys(sizes, rule.q, rule.k, key_head, at, count);
      for (int64_t r = 0; r < sizes.group; ++r) {
        const int64_t head = key_head * sizes.group + r, part = r * chunk.keys * chunk.values;
        const C* state = first > 0 ? to + part : from == nullptr ? nullptr : from + part;
        chunk.template read_rates<T>(rule.decay, rule.beta, head, at);
        chunk.solve(rule.v, head, at, sizes.value_width, state, true, m.missing);
        if (state != nullptr)
          for (int64_t i = 0; i < count; ++i)
            scaled(chunk.to_here[i], chunk.through + i * chunk.values, m.result + i * chunk.values, chunk.values);
        multiply(count, chunk.values, count, chunk.attended, chunk.tokens, chunk.update, chunk.values, m.result,
                 chunk.values, MUTATED("gated_delta_rule: state not read", state != nullptr, false));
        for (int64_t i = 0; i < count; ++i)
          write_row(m.result + i * chunk.values, output.at(at + i, head), sizes.value_width);
        if (wanted || first + count < length) chunk.advance(state, to + part);
      }
    }
  }

  // Copy a document's state from the caller's layout to that of the products, or back.
  void move_state(Memory& m, int64_t document, int64_t key_head, bool in) const {
    const DeltaSizes& sizes = rule.sizes;
    for (int64_t r = 0; r < sizes.group; ++r)
      for (int64_t i = 0; i < sizes.keys(); ++i) {
        C* row = m.state + (r * sizes.keys() + i) * sizes.values();
        const int64_t head = (document * sizes.key_heads + key_head) * sizes.group + r;
        C* outside = states + (head * sizes.key_width + i) * sizes.value_width;
        if (i >= sizes.key_width) {
          if (in) std::fill(row, row + sizes.values(), C(0));
        } else if (in) {
          read_row(outside, row, sizes.value_width, sizes.values());
        } else {
          write_row(row, outside, sizes.value_width);
        }
      }
  }

  void task(C* memory, int64_t key_head, int64_t i, int64_t last) const {
    Pieces<C> pieces(memory);
    Memory m = lay_out(pieces);
    const Segments& segments = rule.segments;
    const int64_t root = i, size = rule.sizes.state();
    List<int64_t> depth(last - i, 0);
    for (; i < last; ++i) {
      const int64_t parent = segments.parent(i), own = parent < 0 ? 0 : depth[parent - root] + 1;
      depth[i - root] = own;
      const C* begin = own == 0 ? nullptr : m.ends + (own - 1) * size;
      begin = MUTATED("gated_delta_rule: prefix forgotten", begin, static_cast<const C*>(nullptr));
      const bool continued = segments.continued(i);
      if (states != nullptr) move_state(m, i, key_head, true);
      scan(m, key_head, segments.start(i), segments.length(i), states != nullptr ? m.state : begin,
           continued ? m.ends + own * size : m.state, continued || states != nullptr);
      if (states != nullptr) move_state(m, i, key_head, false);
    }
  }
};

// --------------------------------------------------------------------------------------------------------- backward

template <class T>
struct DeltaBackward {
  typedef Wide<T> C;
  DeltaRule<T> rule;
  Heads<const T> d_y;
  Heads<C> d_q, d_k;
  Heads<T> d_v;
  Heads<C> d_decay;
  Heads<T> d_beta;

  struct Memory {
    Chunk<C> chunk;
    C *states, *missing;        // before each chunk but the first, and Y of each chunk; by value heads
    C *d_state, *d_ends;        // S̄, and its sum over the segments that continue a segment, by depth
    C *g_and_d_v;               // [G; dV] (2n, values)
    C *w;                       // W, then dU (n, values)
    C *sides;                   // Yᵀ, Sᵀ or S̄ᵀ
    C *by_missing;              // [G; dV] Yᵀ (2n, tokens)
    C *d_attended, *d_below;    // D ⊙ dP, D ⊙ dL (n, tokens), summed over value heads
    C *read, *by_state, *d_qk;  // [e^c ⊙ G; -e^c ⊙ dV] (2n, values); that times Sᵀ, and [dQ; dK] (2n, keys)
    double *columns, *d_sums;   // (tokens)
    C* by_sent;                 // U · the gradient of U through S' (tokens)
  };

  Memory lay_out(Pieces<C>& pieces) const {
    const DeltaSizes& sizes = rule.sizes;
    const int64_t most = sizes.chunk, keys = sizes.keys(), values = sizes.values(), tokens = sizes.tokens();
    const int64_t doubles = static_cast<int64_t>(sizeof(double) / sizeof(C));
    Memory m;
    m.chunk.lay_out(pieces, sizes);
    const int64_t chunks = rule.most_chunks();
    m.states = pieces.take(chunks * sizes.state());
    m.missing = pieces.take(chunks * sizes.group * most * values);
    m.d_state = pieces.take(sizes.state());
    m.d_ends = pieces.take((rule.most_segments() - 1) * sizes.state());
    m.g_and_d_v = pieces.take(2 * most * values);
    m.w = pieces.take(most * values);
    m.sides = pieces.take(values * std::max(keys, tokens));
    m.by_missing = pieces.take(2 * most * tokens);
    m.d_attended = pieces.take(most * tokens);
    m.d_below = pieces.take(most * tokens);
    m.read = pieces.take(2 * most * values);
    m.by_state = pieces.take(2 * most * keys);
    m.d_qk = pieces.take(2 * most * keys);
    m.columns = reinterpret_cast<double*>(pieces.take(tokens * doubles));
    m.d_sums = reinterpret_cast<double*>(pieces.take(tokens * doubles));
    m.by_sent = pieces.take(tokens);
    return m;
  }

  C* state_before(const Memory& m, int64_t number, int64_t r) const {
    const int64_t one = rule.sizes.keys() * rule.sizes.values();
    return number == 0 ? nullptr : m.states + number * rule.sizes.state() + r * one;
  }

  C* missing_of(const Memory& m, int64_t number, int64_t r) const {
    return m.missing + (number * rule.sizes.group + r) * rule.sizes.chunk * rule.sizes.values();
  }

  // Run a document's chunks forward; the first of them has the index `number` among the saved ones.
  void scan(Memory& m, int64_t key_head, int64_t start, int64_t length, int64_t number, bool wanted) const {
    const DeltaSizes& sizes = rule.sizes;
    Chunk<C>& chunk = m.chunk;
    for (int64_t first = 0; first < length; first += sizes.chunk, ++number) {
      const int64_t count = std::min(sizes.chunk, length - first), at = start + first;
      chunk.read_keys(sizes, rule.q, rule.k, key_head, at, count);
      for (int64_t r = 0; r < sizes.group; ++r) {
        const int64_t head = key_head * sizes.group + r;
        const C* state = state_before(m, number, r);
        chunk.template read_rates<T>(rule.decay, rule.beta, head, at);
        chunk.solve(rule.v, head, at, sizes.value_width, state, false, missing_of(m, number, r));
        if (wanted || first + count < length) chunk.advance(state, state_before(m, number + 1, r));
      }
    }
  }

  // Run back through a document's chunks. m.d_state holds S̄ after the last one, if `following`, and afterwards S̄
  // before the first one, if there is a state.
  void scan_back(Memory& m, int64_t key_head, int64_t start, int64_t length, int64_t number, bool following) const {
    const DeltaSizes& sizes = rule.sizes;
    for (int64_t c = (length + sizes.chunk - 1) / sizes.chunk - 1; c >= 0; --c) {
      const int64_t first = c * sizes.chunk, count = std::min(sizes.chunk, length - first), at = start + first;
      Chunk<C>& chunk = m.chunk;
      chunk.read_keys(sizes, rule.q, rule.k, key_head, at, count);
      std::fill(m.d_qk, m.d_qk + 2 * count * chunk.keys, C(0));
      for (int64_t r = 0; r < sizes.group; ++r) {
        chunk.template read_rates<T>(rule.decay, rule.beta, key_head * sizes.group + r, at);
        chunk_back(m, number + c, key_head, r, at, following);
      }
      // [dQ; dK] by Q Kᵀ and K Kᵀ.
      C *d_queries = m.d_qk, *d_keys = m.d_qk + count * chunk.keys;
      const int64_t keys = chunk.keys, tokens = chunk.tokens;
      multiply(count, keys, count, m.d_attended, tokens, chunk.k(), keys, d_queries, keys, true);
      multiply_turned(count, keys, count, m.d_attended, tokens, chunk.q(), keys, d_keys, keys, true);
      multiply(count, keys, count, m.d_below, tokens, chunk.k(), keys, d_keys, keys, true);
      multiply_turned(count, keys, count, m.d_below, tokens, chunk.k(), keys, d_keys, keys,
                      MUTATED("gated_delta_rule: one side of K Kᵀ", true, false));
      for (int64_t i = 0; i < count; ++i) {
        write_row(d_queries + i * keys, d_q.at(at + i, key_head), sizes.key_width);
        write_row(d_keys + i * keys, d_k.at(at + i, key_head), sizes.key_width);
      }
      following = true;
    }
  }

  // One value head: add to m.d_qk, write or add m.d_attended and m.d_below, and move m.d_state to the chunk before.
  void chunk_back(Memory& m, int64_t number, int64_t key_head, int64_t r, int64_t at, bool following) const {
    const Chunk<C>& chunk = m.chunk;
    const int64_t n = chunk.n, keys = chunk.keys, values = chunk.values, tokens = chunk.tokens;
    const int64_t head = key_head * rule.sizes.group + r;
    const C *state = state_before(m, number, r), *missing = missing_of(m, number, r);
    C *g = m.g_and_d_v, *d_missing = g + n * values, *d_state = m.d_state + r * keys * values;
    for (int64_t i = 0; i < n; ++i) read_row(d_y.at(at + i, head), g + i * values, rule.sizes.value_width, values);
    multiply_turned(n, values, n, chunk.attended, tokens, g, values, m.w, values, false);
    if (following) {
      multiply(n, values, keys, chunk.k(), keys, d_state, values, chunk.through, values, false);
      for (int64_t i = 0; i < n; ++i) {
        const C* sent = chunk.through + i * values;
        scaled(chunk.to_end[i], sent, m.w + i * values, values, true);
        m.by_sent[i] = chunk.to_end[i] * chunk.beta[i] * dot(sent, missing + i * values, values);
      }
    }
    chunk.template substitute<true>(m.w, d_missing);
    for (int64_t i = 0; i < n; ++i) {
      put(d_beta.at(at + i, head), dot(m.w + i * values, missing + i * values, values));
      write_row(d_missing + i * values, d_v.at(at + i, head), rule.sizes.value_width);
    }
    chunk.turned(missing, n, values, m.sides);
    multiply(2 * n, tokens, values, g, values, m.sides, tokens, m.by_missing, tokens, false);
    pairs_back(m, r > 0);
    if (state != nullptr) {
      for (int64_t i = 0; i < n; ++i) {
        scaled(chunk.to_here[i], g + i * values, m.read + i * values, values);
        scaled(-chunk.to_here[i], d_missing + i * values, m.read + (n + i) * values, values);
      }
      transpose(state, values, keys, values, m.sides, keys);
      multiply(2 * n, keys, values, m.read, values, m.sides, keys, m.by_state, keys, false);
      for (int64_t i = 0; i < n; ++i)
        m.d_sums[i] += dot(m.by_state + i * keys, chunk.qk + i * keys, keys) +
                       MUTATED("gated_delta_rule: decay of the correction forgotten",
                               dot(m.by_state + (n + i) * keys, chunk.qk + (n + i) * keys, keys), C(0));
      scaled(C(1), m.by_state, m.d_qk, 2 * n * keys, true);
    }
    double whole = 0;
    if (following) {
      for (int64_t i = 0; i < n; ++i)
        scaled(chunk.to_end[i] * chunk.beta[i], missing + i * values, chunk.sent + i * values, values);
      transpose(d_state, values, keys, values, m.sides, keys);
      multiply(n, keys, values, chunk.sent, values, m.sides, keys, m.d_qk + n * keys, keys,
               MUTATED("gated_delta_rule: key gradients overwritten", true, false));
      if (state != nullptr) {
        for (int64_t i = 0; i < keys; ++i) whole += dot(state + i * values, d_state + i * values, values);
        whole *= MUTATED("gated_delta_rule: decay of the state forgotten", chunk.over(), C(0));
        scaled(chunk.over(), d_state, d_state, keys * values);
      }
    }
    if (state != nullptr)
      multiply_turned(keys, values, 2 * n, chunk.qk, keys, m.read, values, d_state, values,
                      MUTATED("gated_delta_rule: later tokens forgotten", following, false));
    double above = 0, before = whole;
    for (int64_t i = n - 1; i >= 0; --i) {
      above += m.d_sums[i];
      m.d_sums[i] = above;
    }
    for (int64_t i = 0; i < n; ++i) {
      *d_decay.at(at + i, head) = static_cast<C>(m.d_sums[i] + before);
      if (following) before += MUTATED("gated_delta_rule: decay of sent updates forgotten", m.by_sent[i], C(0));
    }
  }

  // D ⊙ dP and D ⊙ dL, and the decays' gradient through P and L: rowsum(E) - colsum(E), which is accurate only in
  // double.
  void pairs_back(Memory& m, bool add) const {
    constexpr int W = lanes<C>;
    const Chunk<C>& chunk = m.chunk;
    const int64_t n = chunk.n, tokens = chunk.tokens;
    std::fill(m.columns, m.columns + tokens, 0.0);
    for (int64_t i = 0; i < n; ++i) {
      double row[W] = {};
      for (int64_t j = 0; j < tokens; j += W) {
        const int64_t place = i * tokens + j;
        if (j > i) {
          if (!add) store(m.d_attended + place, Vector<C>{}), store(m.d_below + place, Vector<C>{});
          continue;
        }
        const Vector<C> rate = load<C>(chunk.beta + j), pair = load<C>(chunk.pairs + place);
        const Vector<C> d_attended = load<C>(m.by_missing + place) * rate;
        const Vector<C> d_below = load<C>(m.by_missing + n * tokens + place) * rate;
        const Vector<C> by_below = load<C>(chunk.below + place) * d_below;
        Vector<C> exponents = fma(load<C>(chunk.attended + place), d_attended, -by_below);
        Vector<C> under = -(pair * d_below);
        if (j + W > i) {  // on the diagonal D is one and L is zero
          const Bits<C> there = Chunk<C>::template before<C>(i - j);
          exponents = there ? exponents : Vector<C>{};
          under = there ? under : Vector<C>{};
        }
        Vector<C> over = pair * d_attended;
        if (add) {
          over += MUTATED("gated_delta_rule: one head of the group", load<C>(m.d_attended + place), Vector<C>{});
          under += load<C>(m.d_below + place);
        }
        store(m.d_attended + place, over);
        store(m.d_below + place, under);
        C of_lanes[W];
        store(of_lanes, exponents);
        for (int lane = 0; lane < W; ++lane) {
          const double one = of_lanes[lane];
          row[lane] += one;
          m.columns[j + lane] += one;
        }
      }
      m.d_sums[i] = 0;
      for (int lane = 0; lane < W; ++lane) m.d_sums[i] += row[lane];
    }
    for (int64_t i = 0; i < n; ++i)
      m.d_sums[i] -= MUTATED("gated_delta_rule: decay of earlier tokens forgotten", m.columns[i], 0.0);
  }

  void task(C* memory, int64_t key_head, int64_t root, int64_t) const {
    Pieces<C> pieces(memory);
    Memory m = lay_out(pieces);
    subtree(m, key_head, root, 0, 0);
  }

  // Compute a segment and all that continue it, after `chunks` chunks and `depth` segments; return the next segment.
  // m.d_state then holds S̄ before it.
  int64_t subtree(Memory& m, int64_t key_head, int64_t i, int64_t number, int64_t depth) const {
    const Segments& segments = rule.segments;
    const int64_t start = segments.start(i), length = segments.length(i), size = rule.sizes.state();
    const bool continued = segments.continued(i);
    scan(m, key_head, start, length, number, continued);
    C* sum = m.d_ends + depth * size;
    if (continued) std::fill(sum, sum + size, C(0));
    int64_t next = i + 1;
    while (next < segments.count && segments.parent(next) == i) {
      next = subtree(m, key_head, next, number + rule.chunks(i), depth + 1);
      for (int64_t j = 0; j < size; ++j)
        sum[j] = MUTATED("gated_delta_rule: last document's share", sum[j], C(0)) + m.d_state[j];
    }
    if (continued) std::copy(sum, sum + size, m.d_state);
    scan_back(m, key_head, start, length, number, continued);
    return next;
  }
};

template <class Run>
inline int64_t numbers_of(const Run& run) {
  Pieces<typename Run::C> pieces(nullptr);
  run.lay_out(pieces);
  return pieces.used();
}

template <class T>
DeltaRule<T> rule_of(const DeltaSizes& sizes, const void* const* inputs, const int64_t* rows, const int64_t* table,
                     int64_t segments) {
  typedef Wide<T> C;
  const int64_t* by = rows;
  const auto wide = [=](int i) { return Heads<const C>{static_cast<const C*>(inputs[i]), by[2 * i], by[2 * i + 1]}; };
  const auto kept = [=](int i) { return Heads<const T>{static_cast<const T*>(inputs[i]), by[2 * i], by[2 * i + 1]}; };
  return {sizes, wide(0), wide(1), kept(2), wide(3), kept(4), {table, segments}};
}

}  // namespace

// The numbers that each worker needs, of the type that is computed in (float, or double for double).
BACKHAND_EXPORT int64_t backhand_gated_delta_rule_memory(int dtype, int backward, const int64_t* sizes,
                                                         const int64_t* table, int64_t segments) {
  const DeltaSizes all{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  if (segments == 0) return 0;
  BY_DTYPE(dtype, T, {
    const DeltaRule<T> rule{all, {}, {}, {}, {}, {}, {table, segments}};
    if (backward) return numbers_of(DeltaBackward<T>{rule, {}, {}, {}, {}, {}, {}});
    return numbers_of(DeltaForward<T>{rule, {}, nullptr});
  });
}

// sizes: key heads, value heads per key head, key width, value width, tokens per chunk. inputs: q, k, v, decay, beta,
// where q, k and decay are float (double for double). rows: the token stride and head stride of each input. states:
// (segments, value heads, key width, value width), of q's type, or null; if given, no segment continues another. table:
// (3, segments), see segments.h. memory: `workers` times the numbers that backhand_gated_delta_rule_memory returns.
BACKHAND_EXPORT void backhand_gated_delta_rule_forward(int dtype, const int64_t* sizes, const void* const* inputs,
                                                       const int64_t* rows, void* output, int64_t output_token,
                                                       int64_t output_head, void* states, const int64_t* table,
                                                       int64_t segments, void* memory, int64_t workers) {
  const DeltaSizes all{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  BY_DTYPE(dtype, T, {
    typedef Wide<T> C;
    const DeltaForward<T> run{rule_of<T>(all, inputs, rows, table, segments),
                              {static_cast<T*>(output), output_token, output_head},
                              static_cast<C*>(states)};
    run.rule.by_turns(static_cast<C*>(memory), workers, numbers_of(run),
                      [&](C* own, int64_t head, int64_t first, int64_t last) { run.task(own, head, first, last); });
  });
}

// gradients: of the inputs, in their order and types.
BACKHAND_EXPORT void backhand_gated_delta_rule_backward(int dtype, const int64_t* sizes, const void* const* inputs,
                                                        const int64_t* rows, const void* d_y, int64_t d_y_token,
                                                        int64_t d_y_head, void* const* gradients,
                                                        const int64_t* gradient_rows, const int64_t* table,
                                                        int64_t segments, void* memory, int64_t workers) {
  const DeltaSizes all{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  const int64_t* by = gradient_rows;
  BY_DTYPE(dtype, T, {
    typedef Wide<T> C;
    const DeltaBackward<T> run{rule_of<T>(all, inputs, rows, table, segments),
                               {static_cast<const T*>(d_y), d_y_token, d_y_head},
                               {static_cast<C*>(gradients[0]), by[0], by[1]},
                               {static_cast<C*>(gradients[1]), by[2], by[3]},
                               {static_cast<T*>(gradients[2]), by[4], by[5]},
                               {static_cast<C*>(gradients[3]), by[6], by[7]},
                               {static_cast<T*>(gradients[4]), by[8], by[9]}};
    run.rule.by_turns(static_cast<C*>(memory), workers, numbers_of(run),
                      [&](C* own, int64_t head, int64_t first, int64_t last) { run.task(own, head, first, last); });
  });
}
