// A dense product with all that is added to it, by torch's threads; see dense_product.h.
#include "dense_product.h"

namespace {

struct Shares {
  bool by_columns;
  int64_t count, each;  // shares, and the blocks of 32 of one
};

inline Shares shares_of(int64_t m, int64_t n, int64_t k, int64_t threads) {
  // Each thread packs the other operand for itself; W is packed at half the speed, and columns have to suffice.
  const bool by_columns = n >= m || (2 * n >= m && n >= 4 * threads * BLOCK);
  const int64_t blocks = std::max<int64_t>(1, ((by_columns ? n : m) + BLOCK - 1) / BLOCK);
  const int64_t worth = 1 + static_cast<int64_t>(static_cast<double>(m) * n * k / FEWEST_MULTIPLICATIONS);
  const int64_t wanted = std::max<int64_t>(1, std::min({threads, blocks, worth}));
  const int64_t each = (blocks + wanted - 1) / wanted;
  return {by_columns, (blocks + each - 1) / each, each};
}

template <class Op>
inline Cut<Op> cut_of(const Shares& shares, int64_t m, int64_t n, int64_t k, int64_t term_steps, int64_t shrunk) {
  const int64_t own = shares.each * BLOCK;
  return Cut<Op>(shares.by_columns ? m : std::min(m, own), shares.by_columns ? std::min(n, own) : n, k, term_steps,
                 shrunk);
}

template <class T>
inline void run(const DenseProduct<T>& p, const Shares& shares, const Cut<Operands<T>>& cut, char* room) {
  const int64_t apart = rounded_up(static_cast<int64_t>(cut.bytes()), 64);
  parallel(shares.count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = share * shares.each * BLOCK, last = first + shares.each * BLOCK;
      char* own = room + share * apart;
      if (shares.by_columns) {
        dense_part<Operands<T>, T>(p, 0, p.m, first, std::min(p.n, last), cut, own);
      } else {
        dense_part<Operands<T>, T>(p, first, std::min(p.m, last), 0, p.n, cut, own);
      }
    }
  });
}

}  // namespace

// y (m, n) = residual + x W + bias + Σ scalingᵢ hᵢ Fᵢᵀ, with x (m, k) and W (k, n), or (n, k) if `turned`.
//
//   residual  (m, n), or null; may be y itself.    bias  (n), or null
//   table     10 numbers a term: first column, n and rank; address and row of h (m, rank); of F, (n, rank), or of its
//             transpose if the number behind them is not 0; of A (rank, k), if h is to be written, x Aᵀ, else 0 and 0
//   room      of `room_bytes`, for what threads work with
//
// Returns the bytes of room that it needs where it was given fewer, and then does nothing; else 0.
BACKHAND_EXPORT int64_t backhand_dense_product(int dtype, const void* x, int64_t x_row, const void* w, int64_t w_row,
                                               int turned, void* y, int64_t y_row, const void* residual,
                                               int64_t residual_row, const void* bias, int64_t term_count,
                                               const int64_t* table, const double* scalings, int64_t m, int64_t n,
                                               int64_t k, int64_t threads, void* room, int64_t room_bytes) {
  constexpr int64_t MOST_TERMS = 8, NUMBERS = 10;
  if (term_count > MOST_TERMS) return -1;
  BY_DTYPE(dtype, T, {
    typedef Operands<T> Op;
    Term<T> terms[MOST_TERMS];
    int64_t term_steps = 0;
    for (int64_t i = 0; i < term_count; ++i, table += NUMBERS) {
      terms[i] = {table[0], table[1], table[2],
                  {{reinterpret_cast<const T*>(table[5]), table[6]}, table[7] != 0},
                  {reinterpret_cast<T*>(table[3]), table[4]},
                  {reinterpret_cast<const T*>(table[8]), table[9]}, scalings[i]};
      term_steps += steps_of<Op>(terms[i]);
    }
    const DenseProduct<T> product{{static_cast<const T*>(x), x_row}, {static_cast<const T*>(w), w_row}, turned != 0,
                                  {static_cast<T*>(y), y_row}, static_cast<const T*>(residual), residual_row,
                                  static_cast<const T*>(bias), terms, term_count, m, n, k};
    const Shares shares = shares_of(m, n, k, threads);
    const Cut<Op> cut = cut_of<Op>(shares, m, n, k, term_steps, product.shrunk());
    const int64_t needed = shares.count * static_cast<int64_t>(rounded_up(static_cast<int64_t>(cut.bytes()), 64));
    if (needed > room_bytes) return needed;
    if (m > 0 && n > 0) run<T>(product, shares, cut, static_cast<char*>(room));
    return 0;
  });
}
