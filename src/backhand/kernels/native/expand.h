// The arithmetic of dequantising per instruction set: small integers q with one scale and one minimum become
//
//     value = scale · q - minimum        float32, two roundings (never contracted), then one more to bfloat16
//
// in the gguf package's order of operations, so that the results are the same bit for bit on every path. Formats that add
// their minimum pass its negative, those without one +0: x - (+0) is x, including the sign of a zero.
//
//   expand_levels   32 codes of 4 bits that index one of 16 integers. The 16 values are computed and rounded once and then
//                   looked up: by a permutation of words (AVX-512), or of their low and high bytes (AVX2, NEON).
//   expand_nibbles  64 codes that are integers: the low halves of 32 bytes form one group, the high halves the next one. One
//                   register holds the values of both groups; AVX-512 only.
//   expand_signed   16 integers of 8 bits, each multiplied.
//   expand_halves, expand_floats    16 stored numbers.
//
// The first three require a finite scale and minimum. `expand_careful` accepts any, and makes every NaN the same one: which
// NaN an instruction returns depends on the order of its operands, and so on the compiler.
#pragma once

#include "common.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

inline bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }
inline bool is_finite(float value) { return (bits_of(value) & 0x7f800000u) != 0x7f800000u; }

// A value that may be a NaN: then the one quiet NaN.
template <class T>
inline void put_careful(T* place, float value) {
  put(place, is_nan(bits_of(value)) ? float_of(0x7fc00000u) : value);
}

template <class T>
void expand_careful(const int8_t* q, int count, float scale, float minimum, T* out) {
  for (int i = 0; i < count; ++i) put_careful(out + i, scale * static_cast<float>(q[i]) - minimum);
}

// ---- rounding ------------------------------------------------------------------------------------------------------

#if defined(__AVX512BW__) && defined(__AVX512VL__)
// 16 float32, no NaN among them, to bfloat16: to the nearest, ties to even, subnormal numbers kept.
inline __m256i rounded16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}

// The same for values that are zero or normal, for which the processor has an instruction.
inline __m256i rounded16_normal(__m512 values) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(values);
#else
  return rounded16(values);
#endif
}

inline __m512i rounded32_normal(__m512 low, __m512 high) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(rounded16(low)), rounded16(high), 1);
#endif
}
#elif defined(__AVX2__)
inline __m256i rounded8_wide(__m256 values) {  // 8 bfloat16 in the low halves of 32 bits
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
  return _mm256_srli_epi32(sum, 16);
}

inline __m256i rounded16(__m256 low, __m256 high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded8_wide(low), rounded8_wide(high)), 0xd8);
}
#endif

// ---- 16 integers, each multiplied ------------------------------------------------------------------------------------

#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline __m512 multiplied16(const int8_t* q, float scale, float minimum) {
  const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
  return _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(scale), wide), _mm512_set1_ps(minimum));
}

inline void expand_signed(const int8_t* q, float scale, float minimum, float* out) {
  _mm512_storeu_ps(out, multiplied16(q, scale, minimum));
}

inline void expand_signed(const int8_t* q, float scale, float minimum, bfloat16* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded16_normal(multiplied16(q, scale, minimum)));
}
#elif defined(__AVX2__)
inline __m256 multiplied8(const int8_t* q, float scale, float minimum) {
  const __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
  return _mm256_sub_ps(_mm256_mul_ps(_mm256_set1_ps(scale), wide), _mm256_set1_ps(minimum));
}

inline void expand_signed(const int8_t* q, float scale, float minimum, float* out) {
  _mm256_storeu_ps(out, multiplied8(q, scale, minimum));
  _mm256_storeu_ps(out + 8, multiplied8(q + 8, scale, minimum));
}

inline void expand_signed(const int8_t* q, float scale, float minimum, bfloat16* out) {
  const __m256i both = rounded16(multiplied8(q, scale, minimum), multiplied8(q + 8, scale, minimum));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), both);
}
#else
template <class T>
inline void expand_signed(const int8_t* q, float scale, float minimum, T* out) {
  for (int i = 0; i < 16; ++i) put(out + i, scale * static_cast<float>(q[i]) - minimum);
}
#endif

// ---- 32 codes of 16 levels -------------------------------------------------------------------------------------------

#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline void expand_levels(const uint8_t* codes, const int8_t* levels, float scale, float minimum, float* out) {
  const __m512 table = multiplied16(levels, scale, minimum);
  for (int half = 0; half < 2; ++half) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * half));
    _mm512_storeu_ps(out + 16 * half, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(narrow), table));
  }
}

inline void expand_levels(const uint8_t* codes, const int8_t* levels, float scale, float minimum, bfloat16* out) {
  const __m512i table = _mm512_castsi256_si512(rounded16(multiplied16(levels, scale, minimum)));
  const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(wide, table));
}
#elif defined(__AVX2__)
inline void expand_levels(const uint8_t* codes, const int8_t* levels, float scale, float minimum, float* out) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  alignas(32) int8_t q[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(q), _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), narrow));
  expand_signed(q, scale, minimum, out);
  expand_signed(q + 16, scale, minimum, out + 16);
}

inline void expand_levels(const uint8_t* codes, const int8_t* levels, float scale, float minimum, bfloat16* out) {
  const __m256i table = rounded16(multiplied8(levels, scale, minimum), multiplied8(levels + 8, scale, minimum));
  const __m256i low16 = _mm256_and_si256(table, _mm256_set1_epi16(0xff)), high16 = _mm256_srli_epi16(table, 8);
  // The 16 low bytes, and the 16 high ones, in both halves of a register.
  const __m256i low = _mm256_permute4x64_epi64(_mm256_packus_epi16(low16, low16), 0x88);
  const __m256i high = _mm256_permute4x64_epi64(_mm256_packus_epi16(high16, high16), 0x88);
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i lows = _mm256_shuffle_epi8(low, narrow), highs = _mm256_shuffle_epi8(high, narrow);
  const __m256i a = _mm256_unpacklo_epi8(lows, highs), b = _mm256_unpackhi_epi8(lows, highs);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_permute2x128_si256(a, b, 0x31));
}
#else
template <class T>
inline void expand_levels(const uint8_t* codes, const int8_t* levels, float scale, float minimum, T* out) {
  T table[16];
  expand_signed(levels, scale, minimum, table);
#if defined(__ARM_NEON)
  if (sizeof(T) == 2) {  // never run by us
    const uint8x16x2_t planes = vld2q_u8(reinterpret_cast<const uint8_t*>(table));  // low bytes, high bytes
    for (int half = 0; half < 2; ++half) {
      const uint8x16_t narrow = vld1q_u8(codes + 16 * half);
      const uint8x16x2_t found = {{vqtbl1q_u8(planes.val[0], narrow), vqtbl1q_u8(planes.val[1], narrow)}};
      vst2q_u8(reinterpret_cast<uint8_t*>(out + 16 * half), found);
    }
    return;
  }
#endif
  for (int i = 0; i < 32; ++i) out[i] = table[codes[i]];
}
#endif

#if defined(__AVX512BW__) && defined(__AVX512VL__)
// Scales and minima are half-precision numbers times integers, so that the result is zero or normal.
inline void expand_nibbles(const uint8_t* packed, const float* scales, const float* minima, bfloat16* out) {
  const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 values[2];
  for (int group = 0; group < 2; ++group) {
    values[group] = _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(scales[group]), levels), _mm512_set1_ps(minima[group]));
  }
  const __m512i table = rounded32_normal(values[0], values[1]);
  const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  const __m512i low = _mm512_and_si512(both, _mm512_set1_epi16(15));
  const __m512i high = _mm512_or_si512(_mm512_srli_epi16(both, 4), _mm512_set1_epi16(16));  // the second 16 values
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(low, table));
  _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi16(high, table));
}
#endif

// ---- single numbers --------------------------------------------------------------------------------------------------

inline float half_to_float(const uint8_t* place) {
  uint16_t half;
  std::memcpy(&half, place, 2);
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  // A subnormal half is a normal float with units of 2⁻²⁴.
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(fraction) * 5.9604644775390625e-8f));
  if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13));
  return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
#endif
}

inline float float_at(const uint8_t* place) {
  float value;
  std::memcpy(&value, place, 4);
  return value;
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline __m512 careful16(__m512 values) {
  const __mmask16 missing = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(values, missing, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}

inline void put16(float* out, __m512 values) { _mm512_storeu_ps(out, values); }
inline void put16(bfloat16* out, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded16(values));
}

template <class T>
inline void expand_halves(const uint8_t* source, T* out) {
  put16(out, careful16(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))));
}

template <class T>
inline void expand_floats(const uint8_t* source, T* out) {
  put16(out, careful16(_mm512_loadu_ps(source)));
}
#elif defined(__AVX2__)
inline __m256 careful8(__m256 values) {
  const __m256 missing = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
  return _mm256_blendv_ps(values, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), missing);
}

inline void put16(float* out, __m256 low, __m256 high) {
  _mm256_storeu_ps(out, low);
  _mm256_storeu_ps(out + 8, high);
}
inline void put16(bfloat16* out, __m256 low, __m256 high) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded16(low, high));
}

template <class T>
inline void expand_halves(const uint8_t* source, T* out) {
  const __m128i *low = reinterpret_cast<const __m128i*>(source), *high = low + 1;
  put16(out, careful8(_mm256_cvtph_ps(_mm_loadu_si128(low))), careful8(_mm256_cvtph_ps(_mm_loadu_si128(high))));
}

template <class T>
inline void expand_floats(const uint8_t* source, T* out) {
  const float* values = reinterpret_cast<const float*>(source);
  put16(out, careful8(_mm256_loadu_ps(values)), careful8(_mm256_loadu_ps(values + 8)));
}
#else
template <class T>
inline void expand_halves(const uint8_t* source, T* out) {
  for (int i = 0; i < 16; ++i) put_careful(out + i, half_to_float(source + 2 * i));
}

template <class T>
inline void expand_floats(const uint8_t* source, T* out) {
  for (int i = 0; i < 16; ++i) put_careful(out + i, float_at(source + 4 * i));
}
#endif

}  // namespace
