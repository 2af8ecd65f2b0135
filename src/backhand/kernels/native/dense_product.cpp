// A product with all that is added to it, on torch's threads; see dense_product.h.
#include "dense_product.h"

namespace {

struct Shares {
  bool by_columns;
  int64_t count, each;  // shares, and the blocks of 32 of one
};

inline Shares shares_of(bool stored, int64_t m, int64_t n, int64_t k, int64_t threads) {
  // Each thread packs the other operand for itself. W is packed at half the speed, and unpacked at a fraction of it, so
  // that each thread needs enough columns.
  const bool by_columns = n >= m || ((stored ? 8 : 2) * n >= m && n >= 4 * threads * BLOCK);
  const int64_t blocks = std::max<int64_t>(1, ((by_columns ? n : m) + BLOCK - 1) / BLOCK);
  const int64_t worth = 1 + static_cast<int64_t>(static_cast<double>(m) * n * k / FEWEST_MULTIPLICATIONS);
  const int64_t wanted = std::max<int64_t>(1, std::min({threads, blocks, worth}));
  const int64_t each = (blocks + wanted - 1) / wanted;
  return {by_columns, (blocks + each - 1) / each, each};
}

template <class Op, class T>
inline Cut<Op> cut_of(const DenseProduct<T>& p, const Shares& shares, int64_t term_steps) {
  const int64_t own = shares.each * BLOCK;
  return Cut<Op>(p.w, shares.by_columns ? p.m : std::min(p.m, own), shares.by_columns ? std::min(p.n, own) : p.n, p.k,
                 term_steps, p.down_ranks(), shares.count);
}

// Read the parts of a stored matrix (rows, columns) from the table described below; return false if they are invalid.
inline bool stored_rows(const int64_t* table, int64_t count, int64_t rows, int64_t columns, StoredRows* parts) {
  int64_t before = 0;
  for (StoredRows* part = parts; part < parts + count; ++part, table += 6) {
    const int64_t there = table[3], taken = table[5];
    const int64_t* ids = reinterpret_cast<const int64_t*>(table[4]);
    *part = {kind_of(static_cast<int>(table[0])), reinterpret_cast<const uint8_t*>(table[1]), table[2], ids, before,
             before + taken};
    before += taken;
    if (part->kind == nullptr || columns % part->kind->values != 0) return false;
    if (columns / part->kind->values * part->kind->bytes > part->row_bytes || (ids == nullptr && taken > there)) return false;
    for (int64_t i = 0; ids != nullptr && i < taken; ++i)
      if (ids[i] < 0 || ids[i] >= there) return false;
  }
  return count == 0 || before == rows;
}

template <class T>
inline void run(const DenseProduct<T>& p, const Shares& shares, const Cut<Operands<T>>& cut, char* workspace) {
  const int64_t apart = rounded_up(static_cast<int64_t>(cut.bytes()), 64);
  parallel(shares.count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = share * shares.each * BLOCK, last = first + shares.each * BLOCK;
      char* own = workspace + share * apart;
      if (shares.by_columns) {
        dense_part<Operands<T>, T>(p, 0, p.m, first, std::min(p.n, last), cut, own);
      } else {
        dense_part<Operands<T>, T>(p, first, std::min(p.m, last), 0, p.n, cut, own);
      }
    }
  });
}

}  // namespace

// y (m, n) = residual + x W + bias + Σ scalingᵢ hᵢ Fᵢᵀ, with x (m, k) and W (k, n), or (n, k) if `transposed`.
//
//   w           numbers with row stride w_row; not read if there are stored parts
//   stored      6 numbers per part of a W in blocks, in the order of its rows: ggml's type, address, bytes of a row, number
//               of stored rows, address of the row indices (int64; 0 for all rows), number of rows of this part
//   residual    (m, n), or null; may be y itself
//   bias        (n), or null
//   table       10 numbers per term: first column, n and rank; address and row stride of h (m, rank); those of F, (n, rank),
//               or of its transpose if the next number is not 0; those of A (rank, k) if h = x Aᵀ is to be written, else 0
//   workspace   `workspace_bytes` bytes for the threads
//
// Returns the needed bytes of workspace if fewer were given, and does nothing then; else 0. Returns -1 for too many terms
// or parts, and -2 for a part of an unknown type, or with missing rows or columns.
BACKHAND_EXPORT int64_t backhand_dense_product(int dtype, const void* x, int64_t x_row, const void* w, int64_t w_row,
                                               int transposed, int64_t part_count, const int64_t* stored, void* y,
                                               int64_t y_row, const void* residual, int64_t residual_row,
                                               const void* bias, int64_t term_count, const int64_t* table,
                                               const double* scalings, int64_t m, int64_t n, int64_t k,
                                               int64_t threads, void* workspace, int64_t workspace_bytes) {
  constexpr int64_t MOST_TERMS = 8, NUMBERS = 10, MOST_PARTS = 8;
  if (term_count > MOST_TERMS || part_count > MOST_PARTS) return -1;
  StoredRows parts[MOST_PARTS];
  if (!stored_rows(stored, part_count, transposed ? n : k, transposed ? k : n, parts)) return -2;
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
    const RightOperand<T> right{{static_cast<const T*>(w), w_row}, transposed != 0, parts, part_count};
    const DenseProduct<T> product{{static_cast<const T*>(x), x_row}, right, {static_cast<T*>(y), y_row},
                                  static_cast<const T*>(residual), residual_row, static_cast<const T*>(bias), terms,
                                  term_count, m, n, k};
    const Shares shares = shares_of(right.stored(), m, n, k, threads);
    const Cut<Op> cut = cut_of<Op>(product, shares, term_steps);
    const int64_t needed = shares.count * static_cast<int64_t>(rounded_up(static_cast<int64_t>(cut.bytes()), 64));
    if (needed > workspace_bytes) return needed;
    if (m > 0 && n > 0) run<T>(product, shares, cut, static_cast<char*>(workspace));
    return 0;
  });
}
