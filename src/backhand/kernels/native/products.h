// Small matrix products of one thread, C (M, N) = or += A (M, K) B (K, N), on operands that the caller has packed.
//
// An operand is stored as elements, `PACK` of which along K are one unit: a number, or a pair of bfloat16, which
// AVX512-BF16 and ARM's BFDOT multiply and add at once, in float. A stores the units of each row consecutively. B (K,
// N) stores, for each unit of K, the units of all columns. N is a multiple of 16 for every instruction set. AMX's tiles
// multiply 16 rows by 16 columns along 16 pairs at once; with AMX, M, N and K are multiples of 32 (`SIDE`), and two by
// two tiles are computed.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace {

#if defined(__AMX_BF16__) || defined(BACKHAND_CORNERS)
constexpr int64_t SIDE = 32;
#else
constexpr int64_t SIDE = 16;
#endif

inline int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Plain numbers: float, or double.
template <class C>
struct Plain {
  typedef C Sum;
  typedef C Element;
  typedef C Unit;
  static constexpr int PACK = 1;
  static inline Vector<C> spread(C unit) { return all<C>(unit); }
  static inline Vector<C> units(const C* place) { return load<C>(place); }
  static inline Vector<C> multiply_add(Vector<C> a, Vector<C> b, Vector<C> c) { return fma(a, b, c); }
  static inline void put(C* place, Vector<C> value) { store(place, value); }
  static inline void put_two(C* place, Vector<C> first, Vector<C> second) {
    store(place, first);
    store(place + lanes<C>, second);
  }
  // power(x · POWER_OF) = eˣ
  static constexpr double POWER_OF = 1;
  static inline Vector<C> power(Vector<C> x) { return exponential<C>(x); }
};

#if defined(BACKHAND_PAIRS)
struct Pairs {
  typedef float Sum;
  typedef bfloat16 Element;
  typedef uint32_t Unit;
  static constexpr int PACK = 2;
#if defined(__AVX512BF16__)
  static inline __m512i spread(uint32_t unit) { return _mm512_set1_epi32(static_cast<int>(unit)); }
  static inline __m512i units(const uint32_t* place) { return _mm512_loadu_si512(place); }
  static inline Vector<float> multiply_add(__m512i a, __m512i b, Vector<float> c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  // Round to nearest, ties to even. Subnormal numbers become zero, as in the products themselves.
  static inline void put(bfloat16* place, Vector<float> value) {
    const __m256bh halves = _mm512_cvtneps_pbh(value);
    std::memcpy(place, &halves, sizeof halves);
  }
  static inline void put_two(bfloat16* place, Vector<float> first, Vector<float> second) {
    _mm512_storeu_si512(place, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
#else
  static inline uint32x4_t spread(uint32_t unit) { return vdupq_n_u32(unit); }
  static inline uint32x4_t units(const uint32_t* place) { return vld1q_u32(place); }
  // BFDOT reads subnormal numbers as zero, and rounds inexact sums to odd numbers.
  static inline Vector<float> multiply_add(uint32x4_t a, uint32x4_t b, Vector<float> c) {
    return vbfdotq_f32(c, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
  }
  static inline void put(bfloat16* place, Vector<float> value) { store(place, value); }
  static inline void put_two(bfloat16* place, Vector<float> first, Vector<float> second) {
    put(place, first);
    put(place + lanes<float>, second);
  }
#endif
  static constexpr double POWER_OF = 1.44269504088896340736;
  static inline Vector<float> power(Vector<float> x) { return rough_power_of_two(x); }
};
#endif

// True if products of these units use AMX's tiles.
template <class Op>
#if defined(__AMX_BF16__)
constexpr bool by_tiles = Op::PACK == 2;
#else
constexpr bool by_tiles = false;
#endif

// The left operand of a product: units row by row, or, in `interleave`'s layout, the units of all rows at one position
// of K after those at the position before.
template <class Unit>
struct Rows {
  const Unit* data;
  int64_t row;
  const Unit* from(int64_t i) const { return data + i * row; }
  Unit at(const Unit* first, int64_t i, int64_t k) const { return first[i * row + k]; }
  Rows from_column(int64_t k) const { return {data + k, row}; }
};
template <class Unit>
struct Interleaved {
  const Unit* data;
  int64_t place;
  const Unit* from(int64_t i) const { return data + i; }
  Unit at(const Unit* first, int64_t i, int64_t k) const { return first[k * place + i]; }
  Interleaved from_column(int64_t k) const { return {data + k * place, place}; }
};

// Receives the sums of one tile, one register at a time: those of row i from column j on. It is a separate function,
// since inside larger ones the compiler runs out of registers and keeps sums in memory, which costs a quarter of the
// time.
template <class Op, int ROWS, int VECTORS, class Left, class Finish>
__attribute__((noinline)) void tile(int64_t k_units, Left a, const typename Op::Unit* b, int64_t b_row, int64_t row,
                                    int64_t column, const Finish& given) {
  typedef typename Op::Sum C;
  constexpr int W = lanes<C>;
  const Finish finish = given;  // by itself, so that a store cannot change the address of the next register
  const typename Op::Unit* first = a.from(row);
  b += column;
  Vector<C> sums[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = Vector<C>{};
  for (int64_t k = 0; k < k_units; ++k) {
    decltype(Op::units(b)) right[VECTORS];
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) right[j] = Op::units(b + k * b_row + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const auto left = Op::spread(a.at(first, i, k));
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = Op::multiply_add(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) finish(row + i, column + j * W, sums[i][j]);
}

// The rows of a tile of `vectors` registers' width: with one row of the right operand, its sums fill the registers.
constexpr int tile_rows(int vectors) {
#if defined(__AVX512F__)
  return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
#elif defined(__FMA__) || defined(__aarch64__)
  return vectors == 1 ? 12 : 6;
#else
  return vectors == 1 ? 8 : 4;
#endif
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Call body(rows of a tile, its first row) for rows begin … m - 1.
template <int VECTORS, class Body>
inline void by_tile_rows(int64_t begin, int64_t m, const Body& body) {
  constexpr int ROWS = tile_rows(VECTORS);
  int64_t i = begin;
  for (; i + ROWS <= m; i += ROWS) body(Constant<ROWS>(), i);
  if constexpr (ROWS > 4)
    for (; i + 4 <= m; i += 4) body(Constant<4>(), i);
  for (; i + 2 <= m; i += 2) body(Constant<2>(), i);
  if (i < m) body(Constant<1>(), i);
}

// Call body(registers of a tile, its first column) for n columns.
template <class Op, class Body>
inline void by_panels(int64_t n, const Body& body) {
  constexpr int W = lanes<typename Op::Sum>;
#if defined(__AVX512F__)
  constexpr int MOST = 4;
#else
  constexpr int MOST = 2;
#endif
  int64_t j = 0;
  for (; j + MOST * W <= n; j += MOST * W) body(Constant<MOST>(), j);
  if constexpr (MOST > 2) {
    for (; j + 3 * W <= n; j += 3 * W) body(Constant<3>(), j);
    for (; j + 2 * W <= n; j += 2 * W) body(Constant<2>(), j);
  }
  for (; j + W <= n; j += W) body(Constant<1>(), j);
}

// Rows begin … m - 1 of `VECTORS` registers from `column` on.
template <class Op, int VECTORS, class Left, class Finish>
inline void columns(int64_t begin, int64_t m, int64_t k_units, Left a, const typename Op::Unit* b, int64_t b_row,
                    int64_t column, const Finish& finish) {
  by_tile_rows<VECTORS>(begin, m, [&](auto rows, int64_t i) {
    tile<Op, rows(), VECTORS>(k_units, a, b, b_row, i, column, finish);
  });
}

// A product whose sums stay in registers until they are complete; `finish` receives all rows and columns.
template <class Op, class Left, class Finish>
inline void finished_product(int64_t m, int64_t n, int64_t k_units, Left a, const typename Op::Unit* b, int64_t b_row,
                             const Finish& finish) {
  by_panels<Op>(n, [&](auto vectors, int64_t j) { columns<Op, vectors()>(0, m, k_units, a, b, b_row, j, finish); });
}

// Write sums to C, or add them to C. The addition comes last, so that long sums round no more than short ones and their
// number.
template <class C>
struct Onto {
  C* data;
  int64_t row;
  bool add;
  void operator()(int64_t i, int64_t j, Vector<C> sum) const {
    C* place = data + i * row + j;
    store(place, add ? load<C>(place) + sum : sum);
  }
};

template <class Op, class Left>
inline void product_of_part(int64_t m, int64_t n, int64_t k_units, Left a, const typename Op::Unit* b, int64_t b_row,
                            typename Op::Sum* c, int64_t c_row, bool add) {
  finished_product<Op>(m, n, k_units, a, b, b_row, Onto<typename Op::Sum>{c, c_row, add});
}

constexpr int64_t LONGEST_SUM = 128;

#if defined(__AMX_BF16__)
// Load a tile. GCC's own `_tile_loadd` does not declare that it reads memory, so that stores before it, such as to a
// local array in a loop, may be moved after it.
#define LOAD_TILE(tile, from, bytes)   \
  do {                                 \
    __asm__ volatile("" ::: "memory"); \
    _tile_loadd(tile, from, bytes);    \
    __asm__ volatile("" ::: "memory"); \
  } while (0)

// During its lifetime, this thread's tiles are 16 rows of 64 bytes each.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

inline void product_by_tiles(int64_t m, int64_t n, int64_t k_units, const uint32_t* a, int64_t a_row, const uint32_t* b,
                             int64_t b_row, float* c, int64_t c_row, bool add) {
  const int64_t a_bytes = a_row * 4, b_bytes = b_row * 4, c_bytes = c_row * 4;
  for (int64_t j = 0; j < n; j += 32)
    for (int64_t i = 0; i < m; i += 32) {
      float* place = c + i * c_row + j;
      if (add) {
        LOAD_TILE(0, place, c_bytes);
        LOAD_TILE(1, place + 16, c_bytes);
        LOAD_TILE(2, place + 16 * c_row, c_bytes);
        LOAD_TILE(3, place + 16 * c_row + 16, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < k_units; k += 16) {
        LOAD_TILE(4, a + i * a_row + k, a_bytes);
        LOAD_TILE(6, b + k * b_row + j, b_bytes);
        LOAD_TILE(7, b + k * b_row + j + 16, b_bytes);
        LOAD_TILE(5, a + (i + 16) * a_row + k, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, place, c_bytes);
      _tile_stored(1, place + 16, c_bytes);
      _tile_stored(2, place + 16 * c_row, c_bytes);
      _tile_stored(3, place + 16 * c_row + 16, c_bytes);
    }
}
#else
struct Tiles {
  Tiles() {}  // no configuration
};
#endif

template <class Op>
inline void product(int64_t m, int64_t n, int64_t k_units, const typename Op::Unit* a, int64_t a_row,
                    const typename Op::Unit* b, int64_t b_row, typename Op::Sum* c, int64_t c_row, bool add) {
#if defined(__AMX_BF16__)
  if constexpr (Op::PACK == 2) return product_by_tiles(m, n, k_units, a, a_row, b, b_row, c, c_row, add);
#endif
  for (int64_t k = 0; k == 0 || k < k_units; k += LONGEST_SUM)
    product_of_part<Op>(m, n, k_units - k < LONGEST_SUM ? k_units - k : LONGEST_SUM,
                        Rows<typename Op::Unit>{a + k, a_row}, b + k * b_row, b_row, c, c_row, add || k > 0);
}

#if defined(__AVX512F__)
// 16 × 16 numbers of four bytes, by exchanging ever larger quarters.
inline void transpose_square(const uint32_t* from, int64_t from_row, uint32_t* to, int64_t to_row) {
  __m512i x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + i * from_row);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // x[4 g + c] holds, in its quarter q, column 4 q + c of rows 4 g … 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x44), high = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xee);
    const __m512i more_low = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x44);
    const __m512i more_high = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xee);
    _mm512_storeu_si512(to + c * to_row, _mm512_shuffle_i32x4(low, more_low, 0x88));
    _mm512_storeu_si512(to + (4 + c) * to_row, _mm512_shuffle_i32x4(low, more_low, 0xdd));
    _mm512_storeu_si512(to + (8 + c) * to_row, _mm512_shuffle_i32x4(high, more_high, 0x88));
    _mm512_storeu_si512(to + (12 + c) * to_row, _mm512_shuffle_i32x4(high, more_high, 0xdd));
  }
}
#endif

// Transpose (rows, columns) units to (columns, rows), with a row stride of `to_row`.
template <class Unit>
inline void transpose(const Unit* from, int64_t from_row, int64_t rows, int64_t columns, Unit* to, int64_t to_row) {
  constexpr int64_t STEP = 16;
  for (int64_t i = 0; i < rows; i += STEP)
    for (int64_t j = 0; j < columns; j += STEP) {
#if defined(__AVX512F__)
      if constexpr (sizeof(Unit) == 4)
        if (i + STEP <= rows && j + STEP <= columns) {
          transpose_square(reinterpret_cast<const uint32_t*>(from + i * from_row + j), from_row,
                           reinterpret_cast<uint32_t*>(to + j * to_row + i), to_row);
          continue;
        }
#endif
      const int64_t last_i = i + STEP < rows ? i + STEP : rows, last_j = j + STEP < columns ? j + STEP : columns;
      for (int64_t y = j; y < last_j; ++y)
        for (int64_t x = i; x < last_i; ++x) to[y * to_row + x] = from[x * from_row + y];
    }
}

#if defined(__AVX512BF16__)
// Interleave 32 columns of two rows, so that each column's two numbers are adjacent: the first 16 columns and the last.
struct TwoRows {
  __m512i low, high;
};
inline TwoRows interleaved(__m512i even, __m512i odd) {
  alignas(64) static constexpr uint16_t LOW[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  return {_mm512_permutex2var_epi16(even, low, odd), _mm512_permutex2var_epi16(even, high, odd)};
}
inline void interleave_two(const bfloat16* even, const bfloat16* odd, uint32_t* to) {
  const TwoRows two = interleaved(_mm512_loadu_si512(even), _mm512_loadu_si512(odd));
  _mm512_storeu_si512(to, two.low);
  _mm512_storeu_si512(to + 16, two.high);
}
// The same for up to 32 columns; zeros for a missing second row.
inline void interleave_some(const bfloat16* even, const bfloat16* odd, int64_t columns, uint32_t* to) {
  const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << columns) - 1);
  const __m512i second = odd == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, odd);
  const TwoRows two = interleaved(_mm512_maskz_loadu_epi16(mask, even), second);
  _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), two.low);
  _mm512_mask_storeu_epi32(to + 16, static_cast<__mmask16>(mask >> 16), two.high);
}
#elif defined(BACKHAND_PAIRS)
inline void interleave_two(const bfloat16* even, const bfloat16* odd, uint32_t* to) {
#pragma GCC unroll 4
  for (int j = 0; j < 32; j += 8) {
    const uint16x8_t a = vld1q_u16(even + j), b = vld1q_u16(odd + j);
    vst1q_u32(to + j, vreinterpretq_u32_u16(vzip1q_u16(a, b)));
    vst1q_u32(to + j + 4, vreinterpretq_u32_u16(vzip2q_u16(a, b)));
  }
}
inline void interleave_some(const bfloat16* even, const bfloat16* odd, int64_t columns, uint32_t* to) {
  for (int64_t j = 0; j < columns; ++j) to[j] = even[j] | (odd == nullptr ? 0u : uint32_t{odd[j]} << 16);
}
#endif

// Rows as units along the row index: rows 2 i and 2 i + 1 are interleaved if units are pairs. The result has a row
// stride of `to_row`, with zeros after the columns.
template <class Op, class T>
inline void interleave(const T* rows, int64_t row, int64_t count, int64_t columns, typename Op::Unit* to,
                       int64_t to_row) {
  typedef typename Op::Unit U;
  for (int64_t i = 0; i < count; i += Op::PACK) {
    const T* from = rows + i * row;
    U* units = to + i / Op::PACK * to_row;
    int64_t j = 0;
    if constexpr (Op::PACK == 1) {
      typedef typename Op::Sum C;
      for (; j + lanes<C> <= columns; j += lanes<C>) store(units + j, load<C>(from + j));
      for (; j < columns; ++j) units[j] = static_cast<U>(widened(from[j]));
    } else {
      const bool both = i + 1 < count;
      for (; both && j + 32 <= columns; j += 32) interleave_two(from + j, from + row + j, units + j);
      for (; j < columns; j += 32)
        interleave_some(from + j, both ? from + row + j : nullptr, columns - j < 32 ? columns - j : 32, units + j);
      j = columns;
    }
    for (; j < to_row; ++j) units[j] = U(0);
  }
}

#if defined(BACKHAND_PAIRS)
template <class T>
struct OperandsOf {
  typedef Plain<Wide<T>> type;
};
template <>
struct OperandsOf<bfloat16> {
  typedef Pairs type;
};
// The units of a storage type's products.
template <class T>
using Operands = typename OperandsOf<T>::type;
#else
template <class T>
using Operands = Plain<Wide<T>>;
#endif

}  // namespace
