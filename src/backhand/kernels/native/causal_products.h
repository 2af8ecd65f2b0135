// Products of a block of queries with keys, of which causality leaves a part, on operands packed as in products.h.
//
// Query q, a row or column of the block, sees key k, counted from the block's first key, if k ≤ q + diagonal, which may be
// negative. Sums that
// no query sees are not computed, and terms that are zero by causality are skipped, both in whole tiles. A tile reads
// what its last query sees, and therefore needs zeros where its other queries see nothing. AMX's tiles skip one corner,
// the block's first `SIDE` queries with its last `SIDE` keys.
//
// A sum over keys adds them in order from the first on, `LONGEST_SUM` at a time, whatever the tile. The bits of a row
// therefore do not depend on where its block begins.
#pragma once

#include <algorithm>

#include "mutants.h"
#include "products.h"

namespace {

// True if one corner is skipped. Proofs in float64 use tiles of registers like float32. If BACKHAND_CORNERS is defined,
// all types skip corners, for a test that proves them.
template <class Op>
#if defined(BACKHAND_CORNERS)
constexpr bool by_corners = true;
#else
constexpr bool by_corners = by_tiles<Op>;
#endif

// How many keys after those of a query its tile's last query may see; as many zeros are read.
constexpr int64_t EXTRA_KEYS = 16;

// The corner's side, or 0 if the block has none.
inline int64_t corner_of(int64_t queries, int64_t keys, int64_t diagonal) {
  const int64_t least = diagonal + MUTATED("attention: corner cut too early", SIDE, int64_t{0});
  return queries > SIDE && keys - SIDE >= least ? SIDE : 0;
}

// The number of keys, out of `keys`, that are read for queries up to `last`. Those that a query does not see must be
// zero.
template <class Op>
inline int64_t keys_read(int64_t queries, int64_t keys, int64_t diagonal, int64_t last) {
  if constexpr (by_corners<Op>) {
    const int64_t corner = corner_of(queries, keys, diagonal);
    return last < corner ? keys - corner : keys;
  }
  return std::min(keys, last + diagonal + 1 + EXTRA_KEYS);
}

// Compute rows begin … m - 1 of `VECTORS` registers from `column` on. From row `end` on the first register is skipped,
// W rows later the second one, and so on.
template <class Op, int VECTORS>
inline void descending(int64_t begin, int64_t end, int64_t m, int64_t k_units, Rows<typename Op::Unit> a,
                       const typename Op::Unit* b, int64_t b_row, int64_t column, const Onto<typename Op::Sum>& onto) {
  constexpr int64_t W = lanes<typename Op::Sum>;
  columns<Op, VECTORS>(begin, std::min(end, m), k_units, a, b, b_row, column, onto);
  if constexpr (VECTORS > 1)
    if (end < m)
      descending<Op, VECTORS - 1>(std::max(begin, end), end + W, m, k_units, a, b, b_row, column + W, onto);
}

// Compute rows begin … m - 1 of the first register from `column` on; from row `end` on one more register, and so on.
template <class Op, int VECTORS, int MOST>
inline void ascending(int64_t begin, int64_t end, int64_t m, int64_t k_units, Rows<typename Op::Unit> a,
                      const typename Op::Unit* b, int64_t b_row, int64_t column, const Onto<typename Op::Sum>& onto) {
  constexpr int64_t W = lanes<typename Op::Sum>;
  const int64_t last = VECTORS == MOST ? m : std::min(std::max(begin, end), m);
  columns<Op, VECTORS>(begin, last, k_units, a, b, b_row, column, onto);
  if constexpr (VECTORS < MOST)
    if (last < m) ascending<Op, VECTORS + 1, MOST>(last, end + W, m, k_units, a, b, b_row, column, onto);
}

// C (keys, queries) = A (keys, units) B (units, queries), where a query sees the key.
template <class Op>
inline void scores_by_keys(int64_t keys, int64_t queries, int64_t units, const typename Op::Unit* a,
                           const typename Op::Unit* b, int64_t b_row, typename Op::Sum* c, int64_t c_row,
                           int64_t diagonal) {
  if constexpr (by_corners<Op>) {
    const int64_t corner = corner_of(queries, keys, diagonal), most = keys - corner;
    product<Op>(most, queries, units, a, units, b, b_row, c, c_row, false);
    if (corner > 0)
      product<Op>(corner, queries - corner, units, a + most * units, units, b + corner, b_row,
                  c + most * c_row + corner, c_row, false);
  } else {
    constexpr int64_t W = lanes<typename Op::Sum>;
    for (int64_t k = 0; k < units; k += LONGEST_SUM) {
      const int64_t some = std::min(units - k, LONGEST_SUM);
      by_panels<Op>(queries, [&](auto vectors, int64_t j) {
        const int64_t all_see = j + diagonal + MUTATED("attention: scores of last keys lost", W, 0);
        const int64_t seen = std::min(keys, j + diagonal + vectors() * W);
        descending<Op, vectors()>(0, all_see, seen, some, {a + k, units}, b + k * b_row, b_row, j, {c, c_row, k > 0});
      });
    }
  }
}

// C (queries, keys) = A (queries, units) B (units, keys), where a query sees the key.
template <class Op>
inline void scores_by_queries(int64_t queries, int64_t keys, int64_t units, const typename Op::Unit* a,
                              const typename Op::Unit* b, int64_t b_row, typename Op::Sum* c, int64_t c_row,
                              int64_t diagonal) {
  if constexpr (by_corners<Op>) {
    const int64_t corner = corner_of(queries, keys, diagonal), most = keys - corner;
    product<Op>(queries, most, units, a, units, b, b_row, c, c_row, false);
    if (corner > 0)
      product<Op>(queries - corner, corner, units, a + corner * units, units, b + most, b_row,
                  c + corner * c_row + most, c_row, false);
  } else {
    constexpr int64_t W = lanes<typename Op::Sum>;
    for (int64_t k = 0; k < units; k += LONGEST_SUM) {
      const int64_t some = std::min(units - k, LONGEST_SUM);
      by_panels<Op>(keys, [&](auto vectors, int64_t j) {
        const int64_t first = j - diagonal;  // the first query that sees key j
        const int64_t more = MUTATED("attention: scores cut too early", first + W, queries);
        ascending<Op, 1, vectors()>(std::max<int64_t>(0, first), more, queries, some, {a + k, units}, b + k * b_row,
                                    b_row, j, {c, c_row, k > 0});
      });
    }
  }
}

// C (keys, n) += A (keys, queries) B (queries, n), over the queries that see the key.
template <class Op>
inline void add_over_queries(int64_t keys, int64_t n, int64_t queries, const typename Op::Unit* a, int64_t a_row,
                             const typename Op::Unit* b, int64_t b_row, typename Op::Sum* c, int64_t c_row,
                             int64_t diagonal) {
  const int64_t units = queries / Op::PACK;
  if constexpr (by_corners<Op>) {
    const int64_t corner = corner_of(queries, keys, diagonal), most = keys - corner, skipped = corner / Op::PACK;
    product<Op>(most, n, units, a, a_row, b, b_row, c, c_row, true);
    if (MUTATED("attention: gradient of a corner's keys lost", corner, int64_t{0}) > 0)
      product<Op>(corner, n, units - skipped, a + most * a_row + skipped, a_row, b + skipped * b_row, b_row,
                  c + most * c_row, c_row, true);
  } else {
    by_panels<Op>(n, [&](auto vectors, int64_t j) {
      constexpr int VECTORS = vectors();
      by_tile_rows<VECTORS>(0, keys, [&](auto rows, int64_t i) {
        const int64_t before = std::max<int64_t>(0, i - diagonal) / Op::PACK;
        const int64_t from = before + MUTATED("attention: first query of a key lost", 0, 1);
        tile<Op, rows(), VECTORS>(units - from, Rows<typename Op::Unit>{a + from, a_row}, b + from * b_row, b_row, i, j,
                                  Onto<typename Op::Sum>{c, c_row, true});
      });
    });
  }
}

// C (queries, n) = or += A (queries, keys) B (keys, n), over the keys that a query sees. AMX's tiles take all.
template <class Op, class Left>
inline void sum_over_keys(int64_t queries, int64_t n, int64_t keys, Left a, const typename Op::Unit* b, int64_t b_row,
                          typename Op::Sum* c, int64_t c_row, int64_t diagonal, bool add) {
  const int64_t units = keys / Op::PACK;
  if constexpr (by_corners<Op>) {
    product<Op>(queries, n, units, a.data, a.row, b, b_row, c, c_row, add);
  } else {
    for (int64_t k = 0; k < units; k += LONGEST_SUM)
      by_panels<Op>(n, [&](auto vectors, int64_t j) {
        constexpr int VECTORS = vectors();
        by_tile_rows<VECTORS>(std::max<int64_t>(0, k * Op::PACK - diagonal), queries, [&](auto rows, int64_t i) {
          const int64_t last = i + rows() - 1 + diagonal;
          const int64_t end = std::min(units, last / Op::PACK + MUTATED("attention: last key of a query lost", 1, 0));
          tile<Op, rows(), VECTORS>(std::min(end - k, LONGEST_SUM), a.from_column(k), b + k * b_row, b_row, i, j,
                                    Onto<typename Op::Sum>{c, c_row, add || k > 0});
        });
      });
  }
}

// C (n, queries) = or += A (n, keys) B (keys, queries), over the keys that a query sees, by AMX's tiles, for which sums over
// keys are transposed.
template <class Op>
inline void turned_sum_over_keys(int64_t queries, int64_t n, int64_t keys, const typename Op::Unit* a, int64_t a_row,
                                 const typename Op::Unit* b, int64_t b_row, typename Op::Sum* c, int64_t c_row,
                                 int64_t diagonal, bool add) {
  const int64_t corner = corner_of(queries, keys, diagonal), most = (keys - corner) / Op::PACK;
  product<Op>(n, queries, most, a, a_row, b, b_row, c, c_row, add);
  if (MUTATED("attention: a corner's keys lost to their queries", corner, int64_t{0}) > 0)
    product<Op>(n, queries - corner, corner / Op::PACK, a + most, a_row, b + most * b_row + corner, b_row, c + corner,
                c_row, true);
}

}  // namespace
