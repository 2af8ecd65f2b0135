// One new token of each row through all blocks of a decoder, with the keys and values of the tokens before it. This is the
// forward of nn/decoder/block.py for a Llama-like family, by the kernels of its ops, in one parallel region (crew.h).
//
//     n₁ = norm(x)     [q k v] = n₁ Wᵀ     q, k normed and rotated; k, v into the cache
//     o  = softmax(c q Kᵀ) V               x += m · norm(o Wᵀ)
//     n₂ = norm(x)     [a u] = n₂ Wᵀ       x += m · norm((φ(a) ⊙ u) Wᵀ)
//
// Each W has its bias and its adapter, y += s (x Aᵀ) Bᵀ. Norms exist where the family has them, and m is its residual
// multiplier. What an op rounds to the storage type is rounded to it here too; scores and their softmax stay in `Wide` of
// it. With AMX, products and attention are those of a training pass, and so are the bits of a row.
#include "arena.h"
#include "attention_forward.h"
#include "crew.h"
#include "few_rows_tiles.h"
#include "glu.h"
#include "rms_norm.h"
#include "rotary.h"

// Declared in nn/decoder/decode_step.py. The address of an omitted array is 0.
struct StoredRows {
  int64_t type;  // ggml's number, -1 for numbers of the storage type
  const uint8_t* weight;
  int64_t row_bytes;
  const int64_t* row_ids;  // the stored row of output 0, 1, …; or null
  int64_t outputs;
};

struct LowRank {  // of outputs first … first + outputs
  const void *lora_A, *lora_B;  // (rank, in), (outputs, rank)
  int64_t rank, first, outputs;
  double scaling;
};

struct Projection {  // stacked modules that share an input
  const StoredRows* parts;
  int64_t part_count;
  const LowRank* adapters;
  int64_t adapter_count;
  const void* bias;
  int64_t inputs, outputs;
  int64_t apart;  // true if a training pass computes h separately
};

struct Layer {
  Projection input, output, gate_up, down;
  const void *attention_norm, *after_attention_norm, *mlp_norm, *after_mlp_norm, *q_norm, *k_norm;
  const void *cosines, *sines, *query_cosines, *query_sines;  // (rows, pairs) of each token's position
  void *keys, *values;  // (key/value heads, places, head_dim)
  int64_t pairs, window;  // 0: nothing is rotated; every token is seen
};

struct Model {
  const Layer* layers;
  int64_t layer_count, hidden, heads, kv_heads, head_dim, width;
  int64_t norm_over_heads;  // true if the q/k norms span all heads
  int64_t activation, most_ranks;
  int64_t places;           // for tokens, in total for all rows
  const int64_t* place_of;  // the place of each row's tokens; rows may share their first tokens
  int64_t capacity;         // numbers per row of place_of
  int64_t quick_row;        // true if a single row may differ in its bits from the same row among others
  double eps, offset, attention_scaling, attention_cap, residual_multiplier;
};

namespace {

constexpr int64_t TASK_VALUES = 1 << 14;
constexpr int64_t PHASES_A_LAYER = 24;
constexpr int64_t GLU_PIECE = 512;
constexpr int64_t MOST_MEMBERS = 4;  // adapters of one projection

// The workspace of a pass, for all rows.
template <class T>
struct Workspace {
  T *normed, *qkv, *attended, *h, *gate_up, *product, *joined, *scaled;
  Wide<T>* factors;
  uint32_t *turned, *turned_h;  // operands of AMX's tiles
  Phase* phases;

  static int64_t widest(const Model& m) {
    int64_t most = m.heads * m.head_dim;
    for (const int64_t n : {m.hidden, m.width}) most = n > most ? n : most;
    return most;
  }
  // Numbers of s h per row in the layout of tiles.
  static int64_t of_terms(const Model& m) { return 2 * m.most_ranks + MOST_MEMBERS * 2 * 32; }

  // take(count, place) sets `place` to a piece of `count` numbers.
  template <class Take>
  Workspace(const Take& take, const Model& m, int64_t rows) {
    const int64_t blocks = rows + 15;  // whole tiles of 16 rows
    take(rows * m.hidden, normed);
    take(rows * (m.heads + 2 * m.kv_heads) * m.head_dim, qkv);
    take(rows * m.heads * m.head_dim, attended);
    take(rows * m.most_ranks, h);
    take(rows * 2 * m.width, gate_up);
    take(rows * m.width, product);
    take(rows * m.hidden, joined);
    take(rows * of_terms(m), scaled);
    take(rows * (m.heads + m.kv_heads + 1), factors);
    take(sizeof(T) == 2 ? blocks * (widest(m) + 32) / 2 : 0, turned);
    take(sizeof(T) == 2 ? blocks * of_terms(m) / 2 : 0, turned_h);
    take(m.layer_count * PHASES_A_LAYER, phases);
  }
};

// Replace scores s by eˢ, scaled and possibly capped, relative to the largest; return their sum.
template <class C>
C powers_of_scores(C* scores, int64_t count, C scaling, C cap) {
  Vector<C> most = all<C>(-__builtin_inf());
  const auto scaled = [=](Vector<C> score) -> Vector<C> {
    score = score * scaling;
    // κ tanh(s / κ), tanh z = 1 - 2 / (1 + e²ᶻ)
    if (MUTATED("decode step: scores as they come", cap, C(0)) == 0) return score;
    return cap - (2 * cap) / (1 + exponential<C>(score * (2 / cap)));
  };
  along<C>(
      count,
      [&](int64_t i) {
        const Vector<C> score = scaled(load<C>(scores + i));
        store(scores + i, score);
        most = larger(most, score);
      },
      [&](int64_t i, int64_t some) {
        const Vector<C> score = scaled(load_some<C>(scores + i, some));
        store_some<C>(scores + i, score, some);
        for (int64_t k = 0; k < some; ++k) most = larger(most, all<C>(scores[i + k]));
      });
  const Vector<C> largest = all<C>(largest_of<C>(most));
  Compensated<Vector<C>> sum;
  C rest = 0;
  for (int64_t first = 0; first < count; first += KEYS_A_SUM * lanes<C>) {
    Vector<C> part = {};
    const int64_t left = count - first, here = left < KEYS_A_SUM * lanes<C> ? left : KEYS_A_SUM * lanes<C>;
    along<C>(
        here,
        [&](int64_t i) {
          const Vector<C> power = exponential<C>(load<C>(scores + first + i) - largest);
          store(scores + first + i, power);
          part += power;
        },
        [&](int64_t i, int64_t some) {
          C* place = scores + first + i;
          store_some<C>(place, exponential<C>(load_some<C>(place, some) - largest), some);
          for (int64_t k = 0; k < some; ++k) rest += place[k];
        });
    sum.add(part);
  }
  return sum_of<C>(sum.sum) + rest;
}

// o = softmax(c q Kᵀ) V of one head, whose keys are at `places`; `scores` has room for one number per key.
template <class T>
void attend(const T* q, const T* keys, const T* values, const int64_t* places, int64_t count, int64_t head_dim,
            Wide<T> scaling, Wide<T> cap, Wide<T>* scores, T* out) {
  typedef Wide<T> C;
  constexpr int AT_ONCE = 4;
  int64_t j = 0;
  for (; j + AT_ONCE <= count; j += AT_ONCE) {
    const T* k[AT_ONCE];
    Vector<C> sums[AT_ONCE] = {};
    for (int r = 0; r < AT_ONCE; ++r) k[r] = keys + places[j + r] * head_dim;
    multiply<T, AT_ONCE>(k, q, head_dim, sums);
    for (int r = 0; r < AT_ONCE; ++r) scores[j + r] = sum_of<C>(sums[r]);
  }
  for (; j < count; ++j) {
    const T* k[1] = {keys + places[j] * head_dim};
    Vector<C> sum[1] = {};
    multiply<T, 1>(k, q, head_dim, sum);
    scores[j] = sum_of<C>(sum[0]);
  }
  const C share = 1 / powers_of_scores<C>(scores, count, scaling, cap);
  constexpr int W = lanes<C>;
  const auto each_sum = [=](const auto& add) {
    const int64_t step = MUTATED("decode step: naive sum", KEYS_A_SUM, count);
    for (int64_t k = 0; k < count; k += step) add(k, k + step < count ? k + step : count);
  };
  int64_t i = 0;
  for (; i + AT_ONCE * W <= head_dim; i += AT_ONCE * W) {
    Compensated<Vector<C>> totals[AT_ONCE];
    each_sum([&](int64_t begin, int64_t end) {
      Vector<C> sums[AT_ONCE] = {};
      for (int64_t k = begin; k < end; ++k)
        for (int n = 0; n < AT_ONCE; ++n) {
          sums[n] = fma(all<C>(scores[k]), load<C>(values + places[k] * head_dim + i + n * W), sums[n]);
        }
      for (int n = 0; n < AT_ONCE; ++n) totals[n].add(sums[n]);
    });
    for (int n = 0; n < AT_ONCE; ++n) store(out + i + n * W, totals[n].sum * share);
  }
  for (; i < head_dim; i += W) {
    const int64_t some = head_dim - i < W ? head_dim - i : W;
    Compensated<Vector<C>> total;
    each_sum([&](int64_t begin, int64_t end) {
      Vector<C> sum = {};
      for (int64_t k = begin; k < end; ++k) {
        const T* place = values + places[k] * head_dim + i;
        sum = fma(all<C>(scores[k]), some == W ? load<C>(place) : load_some<C>(place, some), sum);
      }
      total.add(sum);
    });
    store_some<C>(out + i, total.sum * share, some);
  }
}

template <class T>
struct Step {
  typedef Wide<T> C;
  static constexpr bool TILES = by_tiles<Operands<T>>;
  const Model& model;
  const Workspace<T>& workspace;
  int64_t rows;
  const int64_t* positions;
  T* x;
  std::atomic<int64_t>* there;  // threads that have workspace
  int64_t longest;              // keys of a row

  static const T* of(const void* place) { return static_cast<const T*>(place); }

  void norm(const T* in, const void* weight, int64_t count, int64_t n, T* out, C* factors) const {
    rms_norm_forward(in, Strides{1, n, 0}, of(weight), out, factors, false, count, n, model.eps, model.offset);
  }

  static int64_t tasks_of(int64_t outputs, int64_t each) { return (outputs + each - 1) / each; }

  // The neighbour that `task` belongs to, each of which has `tasks` tasks; `task` becomes the number within it.
  template <class Count>
  static int64_t member_of(int64_t& task, const Count& count) {
    int64_t member = 0;
    for (; task >= count(member); ++member) task -= count(member);
    return member;
  }

  // For a single row, multiplying a quantized matrix directly is faster than converting it to tiles.
  bool by_tiles_of(const Projection& p) const {
    return TILES && !(model.quick_row != 0 && rows == 1 && p.part_count > 0 && p.parts[0].type >= 0);
  }

  // y = residual + in Wᵀ + bias, plus the adapters' s h Bᵀ, h = in Aᵀ.
  void project(Worker& worker, const Projection& p, const T* in, const T* residual, T* y) const {
    const bool by_tiles = by_tiles_of(p);
    const int64_t unit = by_tiles ? 64 : SIDE_BY_SIDE;
    const int64_t each = unit * (1 + TASK_VALUES / (unit * (p.inputs > 0 ? p.inputs : 1)));
    int64_t ranks = 0, rank_tasks = 0, tasks = 0;
    for (int64_t a = 0; a < p.adapter_count; ++a) {
      ranks += p.adapters[a].rank;
      rank_tasks += tasks_of(p.adapters[a].rank, SIDE);
    }
    for (int64_t part = 0; part < p.part_count; ++part) tasks += tasks_of(p.parts[part].outputs, each);
    Tiled tiled = {}, plain = {};
    tiled.used = plain.used = by_tiles;
    if (by_tiles) worker.phase(1, [=](int64_t) { turn(in, p.inputs, p.inputs, workspace.turned); });
    if (ranks > 0) {
      worker.phase(rank_tasks, [=, &p](int64_t task) {
        const int64_t a = member_of(task, [&p](int64_t i) { return tasks_of(p.adapters[i].rank, SIDE); });
        int64_t before = 0;
        for (int64_t i = 0; i < a; ++i) before += p.adapters[i].rank;
        const StoredRows factor = {-1, static_cast<const uint8_t*>(p.adapters[a].lora_A),
                                   p.inputs * static_cast<int64_t>(sizeof(T)), nullptr, p.adapters[a].rank};
        rows_of(factor, p.inputs, in, nullptr, nullptr, 0, workspace.h + before, ranks, task * SIDE, SIDE, plain, 0,
                p.apart != 0);
      });
      if (by_tiles) tiled = turned_terms(worker, p, ranks);
    }
    worker.phase(tasks, [=, &p](int64_t task) {
      const int64_t part = member_of(task, [&p, each](int64_t i) { return tasks_of(p.parts[i].outputs, each); });
      int64_t first = 0;
      for (int64_t i = 0; i < part; ++i) first += p.parts[i].outputs;
      const T* bias = of(p.bias);
      const int64_t start = task * each;
      const int64_t count = rows_of(p.parts[part], p.inputs, in, bias == nullptr ? nullptr : bias + first,
                                    residual == nullptr ? nullptr : residual + first, p.outputs, y + first, p.outputs,
                                    start, each, tiled, first, false);
      if (by_tiles) return;
      const T* h = workspace.h;
      for (int64_t a = 0; a < p.adapter_count; h += p.adapters[a++].rank) {
        if (MUTATED("decode step: adapter forgotten", false, true)) continue;
        for (int64_t row = 0; row < rows; ++row)
          expand(p.adapters[a], h + row * ranks, first + start, first + start + count, y + row * p.outputs);
      }
    });
  }

#if defined(__AMX_BF16__)
  struct Tiled {
    TiledTerm terms[MOST_MEMBERS];
    int64_t count;
    bool used;
  };
  template <class U>
  void turn(const U* in, int64_t row, int64_t columns, uint32_t* to) const {
    if constexpr (sizeof(U) == 2) turn_rows(in, row, rows, columns, to);
  }
  // s h of all adapters in the layout of tiles.
  Tiled turned_terms(Worker& worker, const Projection& p, int64_t ranks) const {
    Tiled tiled = {};
    tiled.used = true;
    uint32_t* place = workspace.turned_h;
    for (int64_t a = 0; a < p.adapter_count; ++a) {
      const LowRank& adapter = p.adapters[a];
      const double scaling = MUTATED("decode step: adapter forgotten", adapter.scaling, 0.0);
      TiledTerm& term = tiled.terms[tiled.count++];
      term = {adapter.first, adapter.outputs, adapter.rank, static_cast<const bfloat16*>(adapter.lora_B), scaling, place};
      place += tile_blocks(rows) * tile_steps(term.columns()) * TILE * TILE;
    }
    worker.phase(1, [=](int64_t) {
      const auto *h = reinterpret_cast<const bfloat16*>(workspace.h);
      auto* scaled = reinterpret_cast<bfloat16*>(workspace.scaled);
      for (int64_t a = 0; a < tiled.count; h += tiled.terms[a++].rank) {
        const TiledTerm& term = tiled.terms[a];
        for (int64_t row = 0; row < rows; ++row) term.scale(h + row * ranks, scaled + row * term.columns());
        turn(scaled, term.columns(), term.columns(), const_cast<uint32_t*>(term.turned));
      }
    });
    return tiled;
  }
  template <class U>
  void multiply_by_tiles(const FewRows<U>& product, const Tiled& tiled, int64_t before, int64_t start,
                         bool apart) const {
    if constexpr (sizeof(U) == 2) {
      const TiledRows rows_of_tiles = {product, workspace.turned, tiled.terms, tiled.count, before};
      const int64_t begin = start / TILE, end = (product.outputs + TILE - 1) / TILE;
      apart ? rows_of_tiles.by_turns(begin, end) : rows_of_tiles(begin, end);
    }
  }
#else
  struct Tiled {
    bool used;
  };
  Tiled turned_terms(Worker&, const Projection&, int64_t) const { return {}; }
  template <class... Others>
  void turn(const Others&...) const {}
  template <class... Others>
  void multiply_by_tiles(const Others&...) const {}
#endif

  // Compute outputs start … start + count of one part, or as many as it has, and return their number. `before` outputs
  // of the projection precede the part.
  int64_t rows_of(const StoredRows& part, int64_t inputs, const T* in, const T* bias, const T* residual,
                  int64_t residual_row, T* y, int64_t y_row, int64_t start, int64_t count, const Tiled& tiled,
                  int64_t before, bool apart) const {
    const int64_t end = start + count < part.outputs ? start + count : part.outputs;
    const FewRows<T> product = {part.type < 0 ? nullptr : kind_of(static_cast<int>(part.type)),
                                part.weight, part.row_bytes, part.row_ids, end, inputs, in, inputs, rows, bias, residual,
                                residual_row, y, y_row};
    if (tiled.used) {
      multiply_by_tiles(product, tiled, before, start, apart);
    } else {
      product(start / SIDE_BY_SIDE, (end + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE);
    }
    return end - start;
  }

  // y += s h Bᵀ for those of the group's outputs begin … end that belong to this adapter.
  static void expand(const LowRank& adapter, const T* h, int64_t begin, int64_t end, T* y) {
    if (begin < adapter.first) begin = adapter.first;
    if (end > adapter.first + adapter.outputs) end = adapter.first + adapter.outputs;
    for (int64_t output = begin; output < end; ++output) {
      const T* row[1] = {of(adapter.lora_B) + (output - adapter.first) * adapter.rank};
      Vector<C> sum[1] = {};
      multiply<T, 1>(row, h, adapter.rank, sum);
      put(y + output, widened(y[output]) + C(adapter.scaling) * sum_of<C>(sum[0]));
    }
  }

  // x += m · norm(in Wᵀ)
  void join(Worker& worker, const Projection& p, const T* in, const void* after) const {
    const C m = static_cast<C>(model.residual_multiplier);
    if (after == nullptr && m == 1) return project(worker, p, in, x, x);
    project(worker, p, in, nullptr, workspace.joined);
    worker.phase(rows, [=](int64_t row) {
      T *y = workspace.joined + row * model.hidden, *sum = x + row * model.hidden;
      if (after != nullptr) norm(y, after, 1, model.hidden, y, workspace.factors + row);
      for (int64_t i = 0; i < model.hidden; ++i) {
        if (m != MUTATED("decode step: multiplier of the sum forgotten", C(1), m)) put(y + i, widened(y[i]) * m);
        put(sum + i, widened(sum[i]) + widened(y[i]));
      }
    });
  }

  const T* entered(Worker& worker, const void* weight) const {
    if (weight == nullptr) return x;
    worker.phase(rows, [=](int64_t row) {
      const int64_t place = row * model.hidden;
      norm(x + place, weight, 1, model.hidden, workspace.normed + place, workspace.factors + row);
    });
    return workspace.normed;
  }

  void rotated(T* heads, int64_t count, const void* cosines, const void* sines, int64_t pairs, int64_t row) const {
    if (pairs == 0) return;
    rotate(heads, count * model.head_dim, model.head_dim, heads, count * model.head_dim, model.head_dim,
           static_cast<const C*>(cosines) + row * pairs, static_cast<const C*>(sines) + row * pairs, 1, count, pairs,
           false);
  }

  int64_t qkv_width() const { return (model.heads + 2 * model.kv_heads) * model.head_dim; }
  // The places of a row's tokens, and the address of a head's keys or values.
  const int64_t* places_of(int64_t row) const { return model.place_of + row * model.capacity; }
  int64_t begin_of(int64_t head) const { return head * model.places * model.head_dim; }

  // Norm and rotate q and k of a row in place, and write k and v to the cache.
  void prepare(const Layer& layer, int64_t row) const {
    const int64_t d = model.head_dim, queries = model.heads * d, keys = model.kv_heads * d;
    T *q = workspace.qkv + row * qkv_width(), *k = q + queries, *v = k + keys;
    C* factors = workspace.factors + row * (model.heads + model.kv_heads);
    const bool over = model.norm_over_heads != 0;
    if (layer.q_norm != nullptr) norm(q, layer.q_norm, over ? 1 : model.heads, over ? queries : d, q, factors);
    if (layer.k_norm != nullptr) norm(k, layer.k_norm, over ? 1 : model.kv_heads, over ? keys : d, k, factors);
    rotated(q, model.heads, MUTATED("decode step: queries turned as keys", layer.query_cosines, layer.cosines),
         layer.query_sines, layer.pairs, row);
    rotated(k, model.kv_heads, layer.cosines, layer.sines, layer.pairs, row);
    for (int64_t head = 0; head < model.kv_heads; ++head) {
      const int64_t place = begin_of(head) + places_of(row)[positions[row]] * d;
      std::memcpy(static_cast<T*>(layer.keys) + place, k + head * d, static_cast<size_t>(d) * sizeof(T));
      std::memcpy(static_cast<T*>(layer.values) + place, v + head * d, static_cast<size_t>(d) * sizeof(T));
    }
  }

  Shape shape_of(int64_t window) const {
    return {{nullptr, 0}, model.heads, model.kv_heads, model.head_dim, window, model.attention_scaling, nullptr};
  }
  bool as_documents() const { return TILES && model.attention_cap == 0; }
  // The workspace of a thread for a row of `keys` keys.
  size_t bytes_for(int64_t keys) const {
    if (!as_documents()) return static_cast<size_t>(keys) * sizeof(C) + 64;
    return Forward<Operands<T>, T>{shape_of(keys), {}, {}, {}, {}}.scratch(keys);
  }

  // Attend with the queries of a row that share a key/value head.
  void attend_row(const Layer& layer, int64_t row, int64_t kv_head, Arena& arena) const {
    const int64_t d = model.head_dim, group = model.heads / model.kv_heads, seen = positions[row] + 1;
    const int64_t window = MUTATED("decode step: window ignored", layer.window, int64_t{0});
    const int64_t first = window > 0 && window < seen ? seen - window : 0;
    const int64_t lender = MUTATED("decode step: heads of a group apart", kv_head, (kv_head + 1) % model.kv_heads);
    const T *keys = of(layer.keys) + begin_of(lender), *values = of(layer.values) + begin_of(lender);
    const int64_t* places = places_of(MUTATED("decode step: keys of the first row", row, int64_t{0}));
    const T* queries = workspace.qkv + row * qkv_width();
    T* attended = workspace.attended + row * model.heads * d;
    const int64_t last = MUTATED("decode step: the token does not see itself", seen, seen - 1);
    if (as_documents()) {
      // Skip the whole steps of keys before the window, which a training pass would not read either.
      const int64_t skipped = first / KEYS * KEYS, token = last - 1 - skipped;
      const Shape shape = shape_of(window > 0 ? window : seen + 1);
      const Forward<Operands<T>, T> run{shape, {queries, 0, d}, {keys, d, 0}, {values, d, 0}, {attended, 0, d}};
      const Document document = {places[last - 1], 1, token, places + skipped};
      return run.task(document, 0, kv_head * group, (kv_head + 1) * group, arena);
    }
    C* scores = arena.take<C>(seen);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      attend(queries + head * d, keys, values, places + first, last - first, d,
             static_cast<C>(model.attention_scaling), static_cast<C>(model.attention_cap), scores, attended + head * d);
  }

  void block(Worker& worker, const Layer& layer, Arena& arena) const {
    const int64_t width = model.width, pieces = (width + GLU_PIECE - 1) / GLU_PIECE;
    project(worker, layer.input, entered(worker, layer.attention_norm), nullptr, workspace.qkv);
    worker.phase(rows, [=, &layer](int64_t row) { prepare(layer, row); });
    worker.phase(rows * model.kv_heads, [=, &layer, &arena](int64_t task) {
      arena.clear();
      attend_row(layer, task / model.kv_heads, task % model.kv_heads, arena);
    });
    join(worker, layer.output, workspace.attended, layer.after_attention_norm);

    project(worker, layer.gate_up, entered(worker, layer.mlp_norm), nullptr, workspace.gate_up);
    worker.phase(rows * pieces, [=](int64_t task) {
      const int64_t row = task / pieces, from = task % pieces * GLU_PIECE;
      const int64_t count = width - from < GLU_PIECE ? width - from : GLU_PIECE;
      const T* gate = workspace.gate_up + row * 2 * width + from;
      const auto run = model.activation == SILU ? glu_forward<SILU, T> : glu_forward<GELU_TANH, T>;
      run(gate, 0, gate + width, 0, workspace.product + row * width + from, 0, 1, count);
    });
    join(worker, layer.down, workspace.product, layer.after_mlp_norm);
  }

  void operator()(int64_t, int64_t) const {
    Arena arena(bytes_for(longest));
    if (!arena.there()) return;  // the other threads compute
    there->fetch_add(1);
    const TilesOf<Operands<T>> tiles;
    Worker worker(workspace.phases);
    for (int64_t layer = 0; layer < model.layer_count; ++layer) block(worker, model.layers[layer], arena);
  }
};

}  // namespace

// x (rows, hidden) = the last block's output of one token of each row, whose earlier tokens are in the cache.
//
//   x          the input of the first block
//   positions  (rows), of the tokens
//   threads    the number of threads to use
//
// Returns 0; 1 if the cache has no room for a token, 2 if there is no memory for the workspace, 3 if a projection has too
// many adapters.
BACKHAND_EXPORT int backhand_decode_step(int dtype, const Model* model, void* x, int64_t rows, const int64_t* positions,
                                         int64_t threads) {
  int64_t longest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (positions[row] < 0 || positions[row] >= model->capacity) return 1;
    longest = std::max(longest, positions[row] + 1);
  }
  for (const Layer* layer = model->layers; layer < model->layers + model->layer_count; ++layer)
    for (const Projection* p : {&layer->input, &layer->output, &layer->gate_up, &layer->down})
      if (p->adapter_count > MOST_MEMBERS) return 3;
  BY_DTYPE(dtype, T, {
    size_t bytes = 64;
    const auto count = [&bytes](int64_t number, auto& place) {
      place = nullptr;
      bytes += (static_cast<size_t>(number) * sizeof *place + 63) / 64 * 64;
    };
    (void)Workspace<T>(count, *model, rows);
    Arena arena(bytes);
    if (!arena.there()) return 2;
    const auto take = [&arena](int64_t number, auto& place) {
      place = arena.take<std::remove_reference_t<decltype(*place)>>(number);
    };
    const Workspace<T> workspace(take, *model, rows);
    for (int64_t i = 0; i < model->layer_count * PHASES_A_LAYER; ++i) new (workspace.phases + i) Phase;
    std::atomic<int64_t> there{0};
    const Step<T> step = {*model, workspace, rows, positions, static_cast<T*>(x), &there, longest};
    parallel(threads > 0 ? threads : 1, 1, step);
    return there.load() > 0 ? 0 : 2;
  });
}
