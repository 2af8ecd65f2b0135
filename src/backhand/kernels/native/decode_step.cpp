// One new token through all blocks of a decoder, against the keys and values of those before it: the forward of
// nn/decoder/block.py for a Llama-like family, by the loops of its ops, in one region of threads (crew.h).
//
//     n₁ = norm(x)     [q k v] = n₁ Wᵀ     q, k normed and rotated; k, v into the cache
//     o  = softmax(c q Kᵀ) V               x += m · norm(o Wᵀ)
//     n₂ = norm(x)     [a u] = n₂ Wᵀ       x += m · norm((φ(a) ⊙ u) Wᵀ)
//
// each W with its bias and its adapter, y += s (x Aᵀ) Bᵀ, norms where the family has them, m its residual multiplier.
// What an op rounds to the storage type is rounded to it here too; scores and their softmax stay in `Wide` of it.
#include "arena.h"
#include "crew.h"
#include "few_rows.h"
#include "glu.h"
#include "rms_norm.h"
#include "rotary.h"

// As nn/decoder/decode_step.py declares them. Addresses are 0 where there is nothing.
struct StoredRows {
  int64_t type;  // ggml's number, -1 for numbers of the storage type
  const uint8_t* weight;
  int64_t row_bytes;
  const int64_t* row_ids;  // which stored row is output 0, 1, …, or null
  int64_t outputs;
};

struct LowRank {  // of outputs first … first + outputs
  const void *lora_A, *lora_B;  // (rank, in), (outputs, rank)
  int64_t rank, first, outputs;
  double scaling;
};

struct Projection {  // modules that share an input, one below the other
  const StoredRows* parts;
  int64_t part_count;
  const LowRank* adapters;
  int64_t adapter_count;
  const void* bias;
  int64_t inputs, outputs;
};

struct Layer {
  Projection input, output, gate_up, down;
  const void *attention_norm, *after_attention_norm, *mlp_norm, *after_mlp_norm, *q_norm, *k_norm;
  const void *cosines, *sines, *query_cosines, *query_sines;  // (pairs) of the token's position
  void *keys, *values;  // (key/value heads, capacity, head_dim)
  int64_t pairs, window;  // 0: nothing turns, everything is seen
};

struct Model {
  const Layer* layers;
  int64_t layer_count, hidden, heads, kv_heads, head_dim, width;
  int64_t norm_over_heads;  // whether the q/k norms go over all heads at once
  int64_t activation, capacity, most_ranks;
  double eps, offset, attention_scaling, attention_cap, residual_multiplier;
};

namespace {

constexpr int64_t TASK_VALUES = 1 << 14;
constexpr int64_t PHASES_A_LAYER = 16;
constexpr int64_t GLU_PIECE = 512;
// So many keys are added up before what they come to is added to what others have come to.
constexpr int64_t KEYS_A_SUM = 128;

// What a pass works in.
template <class T>
struct Workspace {
  T *normed, *qkv, *attended, *h, *gate_up, *product, *joined;
  Wide<T> *factors, *scores;
  Phase* phases;

  Workspace(Arena& arena, const Model& m, int64_t tokens)
      : normed(arena.take<T>(m.hidden)),
        qkv(arena.take<T>((m.heads + 2 * m.kv_heads) * m.head_dim)),
        attended(arena.take<T>(m.heads * m.head_dim)),
        h(arena.take<T>(m.most_ranks)),
        gate_up(arena.take<T>(2 * m.width)),
        product(arena.take<T>(m.width)),
        joined(arena.take<T>(m.hidden)),
        factors(arena.take<Wide<T>>(m.heads + m.kv_heads + 1)),
        scores(arena.take<Wide<T>>(m.heads * tokens)),
        phases(arena.take<Phase>(m.layer_count * PHASES_A_LAYER)) {}
};

// eˢ of scores s in place, scaled and perhaps capped, each relative to the largest; returns their sum.
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

// o = softmax(c q Kᵀ) V of one head; `scores` has room for as many numbers as there are keys.
template <class T>
void attend(const T* q, const T* keys, const T* values, int64_t count, int64_t head_dim, Wide<T> scaling, Wide<T> cap,
            Wide<T>* scores, T* out) {
  typedef Wide<T> C;
  constexpr int AT_ONCE = 4;
  int64_t j = 0;
  for (; j + AT_ONCE <= count; j += AT_ONCE) {
    const T* k[AT_ONCE];
    Vector<C> sums[AT_ONCE] = {};
    for (int r = 0; r < AT_ONCE; ++r) k[r] = keys + (j + r) * head_dim;
    multiply<T, AT_ONCE>(k, q, head_dim, sums);
    for (int r = 0; r < AT_ONCE; ++r) scores[j + r] = sum_of<C>(sums[r]);
  }
  for (; j < count; ++j) {
    const T* k[1] = {keys + j * head_dim};
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
          sums[n] = fma(all<C>(scores[k]), load<C>(values + k * head_dim + i + n * W), sums[n]);
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
        const T* place = values + k * head_dim + i;
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
  const Model& model;
  const Workspace<T>& workspace;
  int64_t position;
  T* x;

  static const T* of(const void* place) { return static_cast<const T*>(place); }

  void norm(const T* in, const void* weight, int64_t rows, int64_t n, T* out) const {
    rms_norm_forward(in, Strides{1, n, 0}, of(weight), out, workspace.factors, false, rows, n, model.eps, model.offset);
  }

  static int64_t tasks_of(int64_t outputs, int64_t each) { return (outputs + each - 1) / each; }

  // y = residual + in Wᵀ + bias, and the adapters' s h Bᵀ on it, h = in Aᵀ.
  void project(Worker& worker, const Projection& p, const T* in, const T* residual, T* y) const {
    const int64_t each = SIDE_BY_SIDE * (1 + TASK_VALUES / (SIDE_BY_SIDE * (p.inputs > 0 ? p.inputs : 1)));
    int64_t ranks = 0, tasks = 0;
    for (int64_t a = 0; a < p.adapter_count; ++a) ranks += tasks_of(p.adapters[a].rank, SIDE_BY_SIDE);
    for (int64_t part = 0; part < p.part_count; ++part) tasks += tasks_of(p.parts[part].outputs, each);
    if (ranks > 0) {
      worker.phase(ranks, [=, &p](int64_t task) {
        int64_t a = 0, before = 0;
        for (; task >= tasks_of(p.adapters[a].rank, SIDE_BY_SIDE); before += p.adapters[a++].rank) {
          task -= tasks_of(p.adapters[a].rank, SIDE_BY_SIDE);
        }
        const StoredRows factor = {-1, static_cast<const uint8_t*>(p.adapters[a].lora_A),
                                   p.inputs * static_cast<int64_t>(sizeof(T)), nullptr, p.adapters[a].rank};
        rows_of(factor, p.inputs, in, nullptr, nullptr, workspace.h + before, task * SIDE_BY_SIDE, SIDE_BY_SIDE);
      });
    }
    worker.phase(tasks, [=, &p](int64_t task) {
      int64_t part = 0, first = 0;
      for (; task >= tasks_of(p.parts[part].outputs, each); first += p.parts[part++].outputs) {
        task -= tasks_of(p.parts[part].outputs, each);
      }
      const T *bias = of(p.bias), *more = residual;
      const int64_t start = task * each;
      const int64_t count = rows_of(p.parts[part], p.inputs, in, bias == nullptr ? nullptr : bias + first,
                                    more == nullptr ? nullptr : more + first, y + first, start, each);
      const T* h = workspace.h;
      for (int64_t a = 0; a < p.adapter_count; h += p.adapters[a++].rank) {
        if (MUTATED("decode step: adapter forgotten", false, true)) continue;
        expand(p.adapters[a], h, first + start, first + start + count, y);
      }
    });
  }

  // Outputs start … start + count of one part, or as many as there are; returns how many.
  int64_t rows_of(const StoredRows& part, int64_t inputs, const T* in, const T* bias, const T* residual, T* y,
                  int64_t start, int64_t count) const {
    const int64_t end = start + count < part.outputs ? start + count : part.outputs;
    const FewRows<T> product = {part.type < 0 ? nullptr : kind_of(static_cast<int>(part.type)),
                                part.weight, part.row_bytes, part.row_ids, end, inputs, in, inputs, 1, bias, residual,
                                end, y, end};
    product(start / SIDE_BY_SIDE, (end + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE);
    return end - start;
  }

  // y += s h Bᵀ for outputs begin … end of the group, as far as they are this adapter's.
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
    T* y = workspace.joined;
    project(worker, p, in, nullptr, y);
    worker.phase(1, [=](int64_t) {
      if (after != nullptr) norm(y, after, 1, model.hidden, y);
      for (int64_t i = 0; i < model.hidden; ++i) {
        if (m != MUTATED("decode step: multiplier of the sum forgotten", C(1), m)) put(y + i, widened(y[i]) * m);
        put(x + i, widened(x[i]) + widened(y[i]));
      }
    });
  }

  const T* entered(Worker& worker, const void* weight) const {
    if (weight == nullptr) return x;
    worker.phase(1, [=](int64_t) { norm(x, weight, 1, model.hidden, workspace.normed); });
    return workspace.normed;
  }

  void turn(T* heads, int64_t count, const void* cosines, const void* sines, int64_t pairs) const {
    if (pairs == 0) return;
    rotate(heads, count * model.head_dim, model.head_dim, heads, count * model.head_dim, model.head_dim,
           static_cast<const C*>(cosines), static_cast<const C*>(sines), 1, count, pairs, false);
  }

  // q and k normed and rotated in their place, k and v into the cache.
  void prepare(const Layer& layer) const {
    const int64_t d = model.head_dim, queries = model.heads * d, keys = model.kv_heads * d;
    T *q = workspace.qkv, *k = q + queries, *v = k + keys;
    const bool over = model.norm_over_heads != 0;
    if (layer.q_norm != nullptr) norm(q, layer.q_norm, over ? 1 : model.heads, over ? queries : d, q);
    if (layer.k_norm != nullptr) norm(k, layer.k_norm, over ? 1 : model.kv_heads, over ? keys : d, k);
    turn(q, model.heads, MUTATED("decode step: queries turned as keys", layer.query_cosines, layer.cosines),
         layer.query_sines, layer.pairs);
    turn(k, model.kv_heads, layer.cosines, layer.sines, layer.pairs);
    for (int64_t head = 0; head < model.kv_heads; ++head) {
      const int64_t place = (head * model.capacity + position) * d;
      std::memcpy(static_cast<T*>(layer.keys) + place, k + head * d, static_cast<size_t>(d) * sizeof(T));
      std::memcpy(static_cast<T*>(layer.values) + place, v + head * d, static_cast<size_t>(d) * sizeof(T));
    }
  }

  void block(Worker& worker, const Layer& layer) const {
    const int64_t d = model.head_dim, group = model.heads / model.kv_heads, width = model.width;
    const int64_t seen = position + 1;
    const int64_t window = MUTATED("decode step: window ignored", layer.window, int64_t{0});
    const int64_t first = window > 0 && window < seen ? seen - window : 0;

    project(worker, layer.input, entered(worker, layer.attention_norm), nullptr, workspace.qkv);
    worker.phase(1, [=, &layer](int64_t) { prepare(layer); });
    worker.phase(model.heads, [=, &layer](int64_t head) {
      const int64_t lender = MUTATED("decode step: heads of a group apart", head / group, head % model.kv_heads);
      const int64_t place = (lender * model.capacity + first) * d;
      attend(workspace.qkv + head * d, of(layer.keys) + place, of(layer.values) + place,
             MUTATED("decode step: the token does not see itself", seen - first, seen - first - 1), d,
             static_cast<C>(model.attention_scaling), static_cast<C>(model.attention_cap),
             workspace.scores + head * seen, workspace.attended + head * d);
    });
    join(worker, layer.output, workspace.attended, layer.after_attention_norm);

    project(worker, layer.gate_up, entered(worker, layer.mlp_norm), nullptr, workspace.gate_up);
    worker.phase((width + GLU_PIECE - 1) / GLU_PIECE, [=](int64_t piece) {
      const int64_t from = piece * GLU_PIECE, count = width - from < GLU_PIECE ? width - from : GLU_PIECE;
      const auto run = model.activation == SILU ? glu_forward<SILU, T> : glu_forward<GELU_TANH, T>;
      run(workspace.gate_up + from, 0, workspace.gate_up + width + from, 0, workspace.product + from, 0, 1, count);
    });
    join(worker, layer.down, workspace.product, layer.after_mlp_norm);
  }

  void operator()(int64_t, int64_t) const {
    Worker worker(workspace.phases);
    for (int64_t layer = 0; layer < model.layer_count; ++layer) block(worker, model.layers[layer]);
  }
};

}  // namespace

// x (hidden) = the last block's output of a token that has `position` ones before it in the cache.
//
//   x         what enters the first block
//   threads   how many to ask for
//
// Returns 0, or 1 where the cache has no room for the token, 2 where there is no memory to work in.
BACKHAND_EXPORT int backhand_decode_step(int dtype, const Model* model, void* x, int64_t position, int64_t threads) {
  if (position < 0 || position >= model->capacity) return 1;
  BY_DTYPE(dtype, T, {
    const int64_t seen = position + 1, d = model->head_dim;
    const int64_t narrow = 2 * model->hidden + (2 * model->heads + 2 * model->kv_heads) * d + model->most_ranks +
                           3 * model->width;
    const int64_t wide = model->heads * (seen + 1) + model->kv_heads + 1;
    Arena arena(static_cast<size_t>(narrow) * sizeof(T) + static_cast<size_t>(wide) * sizeof(Wide<T>) +
                static_cast<size_t>(model->layer_count * PHASES_A_LAYER) * sizeof(Phase) + 64 * 16);
    if (!arena.there()) return 2;
    const Workspace<T> workspace(arena, *model, seen);
    for (int64_t i = 0; i < model->layer_count * PHASES_A_LAYER; ++i) new (workspace.phases + i) Phase;
    const Step<T> step = {*model, workspace, position, static_cast<T*>(x)};
    parallel(threads > 0 ? threads : 1, 1, step);
  });
  return 0;
}
