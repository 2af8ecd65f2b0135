// Dot products of one row of x with rows of quantized blocks, which are unpacked in registers: for bfloat16 on
// processors that multiply pairs of it, and for the most common block types.
//
// A block's numbers are those of expand.h, rounded to bfloat16 in the same way, 32 per register, and are summed in the
// order of the row. The bits are therefore those of the same numbers in memory. No number is subnormal, since scales
// and minima are multiples of 2⁻²⁴. Numbers that are not finite make the sum so, as they would from memory.
#pragma once

#include "formats.h"
#include "vectors.h"

namespace {

constexpr int64_t PIECE = 1024;  // numbers of a row at a time: whole blocks of every type

}  // namespace

#if defined(__AVX512BF16__)

namespace {

inline Vector<float> plus_products(Vector<float> sum, __m512i w, const bfloat16* x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
}

inline __m512 sixteen(const int8_t* levels) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels))));
}

// Look up 32 codes of 4 bits, in bytes, in a table of 16.
inline __m512i looked_up(__m256i codes, __m512 table) {
  const __m512i narrow = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(table));
  return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), narrow);
}

// Multiply 16 integers by one scale and 16 by another.
inline __m512i from_signed(__m256i q, __m512 low_scale, __m512 high_scale) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(q)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(q, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high_scale, high), _mm512_mul_ps(low_scale, low));
}

// Add Σ block · x to `sum`, for the block type.
template <class Format>
struct BlockDot;

template <const int8_t* Levels, bool Minimum>
struct BlockDot<FourBits<Levels, Minimum>> {
  typedef FourBits<Levels, Minimum> Format;
  static inline Vector<float> add(const uint8_t* block, const bfloat16* x, Vector<float> sum) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + (Minimum ? 4 : 2)));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
    const __m256i codes = _mm256_and_si256(both, _mm256_set1_epi8(15));
    int32_t both_halves;
    std::memcpy(&both_halves, block, 4);
    const __m128 scale = _mm_cvtph_ps(_mm_cvtsi32_si128(both_halves));  // and the minimum that is added, if there is one
    __m512 table = _mm512_mul_ps(_mm512_broadcastss_ps(scale), sixteen(Levels));
    if (Minimum) table = _mm512_add_ps(table, _mm512_broadcastss_ps(_mm_movehdup_ps(scale)));
    return plus_products(sum, looked_up(codes, table), x);
  }
};

template <>
struct BlockDot<Q8_0> {
  static inline Vector<float> add(const uint8_t* block, const bfloat16* x, Vector<float> sum) {
    const __m512 scale = _mm512_set1_ps(half_to_float(block));
    const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 2));
    return plus_products(sum, from_signed(q, scale, scale), x);
  }
};

template <>
struct BlockDot<Q4_K> {
  static inline Vector<float> add(const uint8_t* block, const bfloat16* x, Vector<float> sum) {
    float scales[8], minima[8];
    grouped_scales(block, scales, minima);
    const __m256i mask = _mm256_set1_epi8(15);
    for (int g = 0; g < 4; ++g) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 16 + 32 * g));
      const __m256i codes[2] = {_mm256_and_si256(both, mask), _mm256_and_si256(_mm256_srli_epi16(both, 4), mask)};
      for (int half = 0; half < 2; ++half) {
        const int group = 2 * g + half;
        const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(scales[group]), sixteen(kUnsigned4));
        const __m512 table = _mm512_sub_ps(scaled, _mm512_set1_ps(minima[group]));
        sum = plus_products(sum, looked_up(codes[half], table), x + 32 * group);
      }
    }
    return sum;
  }
};

template <>
struct BlockDot<Q6_K> {
  static inline Vector<float> add(const uint8_t* block, const bfloat16* x, Vector<float> sum) {
    const int8_t* eight = reinterpret_cast<const int8_t*>(block + 192);
    const float d = half_to_float(block + 208);
    const __m256i four = _mm256_set1_epi8(15), upper = _mm256_set1_epi8(48), offset = _mm256_set1_epi8(32);
    for (int n = 0; n < 2; ++n) {
      const __m256i* low = reinterpret_cast<const __m256i*>(block + 64 * n);
      const __m256i a = _mm256_loadu_si256(low), b = _mm256_loadu_si256(low + 1);
      const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 128 + 32 * n));
      // The fifth and sixth bit of each code come from two bits of `two`, in bytes.
      const __m256i tops[4] = {_mm256_slli_epi16(two, 4), _mm256_slli_epi16(two, 2), two, _mm256_srli_epi16(two, 2)};
      const __m256i lows[4] = {a, b, _mm256_srli_epi16(a, 4), _mm256_srli_epi16(b, 4)};
      for (int k = 0; k < 4; ++k) {
        const __m256i six = _mm256_or_si256(_mm256_and_si256(lows[k], four), _mm256_and_si256(tops[k], upper));
        const int group = 8 * n + 2 * k;
        const __m512 first = _mm512_set1_ps(d * static_cast<float>(eight[group]));
        const __m512 second = _mm512_set1_ps(d * static_cast<float>(eight[group + 1]));
        sum = plus_products(sum, from_signed(_mm256_sub_epi8(six, offset), first, second), x + 128 * n + 32 * k);
      }
    }
    return sum;
  }
};

template <class Format, int ROWS>
void block_dots(const uint8_t* const* w, int64_t columns, const bfloat16* x, Vector<float>* sums) {
  constexpr int64_t AT_ONCE = PIECE / Format::values;
  const int64_t blocks = columns / Format::values;
  for (int64_t first = 0; first < blocks; first += AT_ONCE) {
    const int64_t last = first + AT_ONCE < blocks ? first + AT_ONCE : blocks;
    Vector<float> sum[ROWS] = {};
    for (int64_t b = first; b < last; ++b)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const uint8_t* block = w[r] + b * Format::bytes;
        for (int64_t line = 0; line < Format::bytes; line += LINE) fetch_ahead(block + line);
        sum[r] = BlockDot<Format>::add(block, x + b * Format::values, sum[r]);
      }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sums[r] += sum[r];
  }
}

// Return true if the type is one of these, after adding the sums of `ROWS` rows.
template <int ROWS>
inline bool take_block_dots(int type, const uint8_t* const* w, int64_t columns, const bfloat16* x,
                            Vector<float>* sums) {
  switch (type) {
    case 2: return block_dots<FourBits<kSigned4, false>, ROWS>(w, columns, x, sums), true;
    case 3: return block_dots<FourBits<kUnsigned4, true>, ROWS>(w, columns, x, sums), true;
    case 8: return block_dots<Q8_0, ROWS>(w, columns, x, sums), true;
    case 12: return block_dots<Q4_K, ROWS>(w, columns, x, sums), true;
    case 14: return block_dots<Q6_K, ROWS>(w, columns, x, sums), true;
    case 20: return block_dots<FourBits<kNonLinear4, false>, ROWS>(w, columns, x, sums), true;
    default: return false;
  }
}

}  // namespace

#endif
