// Panels of a product's right operand W, in units along K: of dense numbers, or of a stored matrix, whose blocks are
// unpacked a few rows at a time within the first-level cache. Both give the same units.
#pragma once

#include "kinds.h"
#include "low_rank.h"

namespace {

// Rows and columns that are summed at once, and units along K in a step.
constexpr int64_t BLOCK = 32, STEP_UNITS = 16;
// Numbers of a row that are unpacked at a time, which are whole blocks of every type, and the row stride: not a power
// of two, which would share few places of the cache.
constexpr int64_t UNPACKED = 256, UNPACKED_ROW = UNPACKED + 32;
// The distance in rows at which stored rows are prefetched if they are read one by one.
constexpr int64_t ROWS_AHEAD = 12;

// Rows of a stored matrix in blocks of one type: first … last - 1 of W in stored layout.
struct StoredRows {
  const Kind* kind;
  const uint8_t* blocks;
  int64_t row_bytes;
  const int64_t* ids;  // the stored row of the first row, the second, …; null for stored order
  int64_t first, last;

  const uint8_t* place(int64_t row, int64_t column) const {
    const int64_t own = row - first, stored = ids == nullptr ? own : MUTATED("panels: order of rows ignored", ids[own], own);
    return blocks + stored * row_bytes + column / kind->values * kind->bytes;
  }
  // Unpack `values` numbers of a row from `column` on, in whole blocks, and prefetch the row `ahead` of it.
  template <class T>
  void unpack(int64_t row, int64_t column, int64_t values, int64_t ahead, T* out) const {
    if (row + ahead < last) {
      const uint8_t* later = place(row + ahead, column);
      const int64_t bytes = values / kind->values * kind->bytes;
      for (int64_t line = 0; line < bytes; line += LINE) __builtin_prefetch(later + line, 0, 2);
    }
    expand(*kind, place(row, column), values, out);
  }
};

// W (k, n): numbers, or stacked parts of a stored matrix.
template <class T>
struct RightOperand {
  Matrix<const T> numbers;
  bool transposed;  // it is stored as (n, k)
  const StoredRows* parts;
  int64_t part_count;

  bool stored() const { return part_count > 0; }
  // The part of a row, starting the search at another part.
  static const StoredRows* part_of(const StoredRows* part, int64_t row) {
    while (row >= part->last) ++part;
    while (row < part->first) --part;
    return part;
  }
  // Multiples at which parts of K may begin, and panels should: whole blocks.
  int64_t k_edge(int64_t step) const { return stored() && transposed ? UNPACKED : step; }
  int64_t column_edge() const {
    int64_t values = 1;
    for (const StoredRows* part = parts; part < parts + part_count; ++part) values = std::max(values, part->kind->values);
    return transposed || values <= BLOCK ? BLOCK : UNPACKED;
  }
};

// Pack a W of numbers.
template <class Op, class T>
inline void pack_numbers(const RightOperand<T>& w, int64_t k0, int64_t length, int64_t j, int64_t columns,
                         typename Op::Unit* to, int64_t block_units) {
  const int64_t units = units_of<Op>(length);
  if (w.transposed) {
    for (int64_t i = 0; i < columns; i += BLOCK, to += block_units)
      turn<Op>(Matrix<const T>{w.numbers.at(j + i, k0), w.numbers.row}, std::min(BLOCK, columns - i), length, to, BLOCK);
    return;
  }
  // Rows are outermost, which is their order in memory.
  for (int64_t u = 0; u < units; ++u)
    for (int64_t i = 0; i < columns; i += BLOCK) {
#if defined(BACKHAND_PAIRS)
      // This is nearly all of W and bound by memory. The masks of the rest would make the processor see fewer rows
      // ahead.
      if constexpr (Op::PACK == 2)
        if (length - u * Op::PACK >= Op::PACK && columns - i >= BLOCK) {
          const T* from = w.numbers.at(k0 + u * Op::PACK, j + i);
          interleave_two(from, from + w.numbers.row, to + i / BLOCK * block_units + u * BLOCK);
          continue;
        }
#endif
      interleave<Op>(w.numbers.at(k0 + u * Op::PACK, j + i), w.numbers.row,
                     std::min<int64_t>(Op::PACK, length - u * Op::PACK), std::min(BLOCK, columns - i),
                     to + i / BLOCK * block_units + u * BLOCK, BLOCK);
    }
}

// Pack a stored W.
template <class Op, class T>
inline void pack_stored(const RightOperand<T>& w, int64_t k0, int64_t length, int64_t j, int64_t columns,
                        typename Op::Unit* to, int64_t block_units) {
  alignas(64) T rows[BLOCK * UNPACKED_ROW];
  const StoredRows* part = w.parts;
  if (w.transposed) {
    for (int64_t i = 0; i < columns; i += BLOCK, to += block_units)
      for (int64_t k = 0; k < length; k += UNPACKED) {
        const int64_t values = std::min(UNPACKED, length - k), count = std::min(BLOCK, columns - i);
        for (int64_t y = 0; y < count; ++y) {
          part = w.part_of(part, j + i + y);
          part->unpack(j + i + y, MUTATED("panels: places of the first part", k0, int64_t{0}) + k, values, BLOCK,
                       rows + y * UNPACKED_ROW);
        }
        turn<Op>(Matrix<const T>{rows, UNPACKED_ROW}, count, values, to + k / Op::PACK * BLOCK, BLOCK);
      }
    return;
  }
  // Columns are outermost, so that the panel's lines of few blocks stay in the cache.
  for (int64_t c = j / UNPACKED * UNPACKED; c < j + columns; c += UNPACKED) {
    const int64_t begin = std::max(c, j), end = std::min(c + UNPACKED, j + columns);
    for (int64_t k = 0; k < length; k += Op::PACK) {
      const int64_t count = std::min<int64_t>(Op::PACK, length - k);
      for (int64_t y = 0; y < count; ++y) {
        part = w.part_of(part, k0 + k + y);
        const int64_t whole = part->kind->values, from = begin / whole * whole;
        part->unpack(k0 + k + y, from, rounded_up(end, whole) - from, ROWS_AHEAD,
                     rows + y * UNPACKED_ROW + from - c);
      }
      const int64_t first = MUTATED("panels: every columns the first", begin - j, int64_t{0}) / BLOCK;
      typename Op::Unit* place = to + first * block_units + k / Op::PACK * BLOCK;
      for (int64_t i = begin; i < end; i += BLOCK, place += block_units)
        interleave<Op>(rows + (i - c), UNPACKED_ROW, count, std::min(BLOCK, end - i), place, BLOCK);
    }
  }
}

// The positions k0 … k0 + length - 1 of the columns j … j + columns - 1: (units, 32) per block, zeros up to whole
// steps.
template <class Op, class T>
inline void pack_panel(const RightOperand<T>& w, int64_t k0, int64_t length, int64_t j, int64_t columns,
                       typename Op::Unit* to, int64_t block_units) {
  typedef typename Op::Unit U;
  if (w.stored()) {
    pack_stored<Op>(w, k0, length, j, columns, to, block_units);
  } else {
    pack_numbers<Op>(w, k0, length, j, columns, to, block_units);
  }
  const int64_t units = units_of<Op>(length), padded = rounded_up(units, STEP_UNITS);
  for (int64_t i = 0; i < columns; i += BLOCK, to += block_units)
    std::fill(to + units * BLOCK, to + padded * BLOCK, U(0));
}

}  // namespace
