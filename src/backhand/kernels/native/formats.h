// The blocks of GGUF's types, unpacked: a struct per type with
//
//     values, bytes         of one block
//     expand(block, out)    its values, in the order of the row, float32 or bfloat16 (blocks of 32: see there)
//
// Every struct first reads its scales, then spreads the block's packed integers over bytes by loops that compilers turn into
// wide instructions, and passes them to expand.h. Layouts: the gguf package's quants.py.
#pragma once

#include "common.h"
#include "expand.h"

namespace {

const int8_t kUnsigned4[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
const int8_t kSigned4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
const int8_t kNonLinear4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
const int8_t kE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // doubled

// Groups of 32 codes of 4 bits, each group with a scale and a minimum.
template <class T>
inline void groups_of_levels(int groups, const uint8_t* codes, const int8_t* levels, const float* scales,
                             const float* minima, bool finite, T* out) {
  if (finite) {
    for (int g = 0; g < groups; ++g) expand_levels(codes + 32 * g, levels, scales[g], minima[g], out + 32 * g);
    return;
  }
  for (int g = 0; g < groups; ++g) {
    int8_t q[32];
    for (int i = 0; i < 32; ++i) q[i] = levels[codes[32 * g + i]];
    expand_careful(q, 32, scales[g], minima[g], out + 32 * g);
  }
}

// Groups of `Size` integers of 8 bits, each group with a scale and a minimum.
template <int Size, class T>
inline void groups_of_signed(int groups, const int8_t* q, const float* scales, const float* minima, bool finite,
                             T* out) {
  for (int g = 0; g < groups; ++g) {
    if (finite) {
      for (int i = 0; i < Size; i += 16) {
        expand_signed(q + Size * g + i, scales[g], minima[g], out + Size * g + i);
      }
    } else {
      expand_careful(q + Size * g, Size, scales[g], minima[g], out + Size * g);
    }
  }
}

// 16 bytes → 32 codes: the low halves, then the high halves. Written explicitly, since compilers split such short runs
// of bytes.
inline void halves(const uint8_t* packed, uint8_t* codes) {
#if defined(__SSE2__)
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), mask = _mm_set1_epi8(15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm_and_si128(both, mask));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm_and_si128(_mm_srli_epi16(both, 4), mask));
#else
  for (int half = 0; half < 2; ++half) {
    uint64_t eight;
    std::memcpy(&eight, packed + 8 * half, 8);
    const uint64_t low = eight & 0x0f0f0f0f0f0f0f0full, high = (eight >> 4) & 0x0f0f0f0f0f0f0f0full;
    std::memcpy(codes + 8 * half, &low, 8);
    std::memcpy(codes + 16 + 8 * half, &high, 8);
  }
#endif
}

// 32 integers of 5 bits: their low four in 16 bytes, their fifth in 32 bits; `offset` is subtracted from each.
inline void fives(const uint8_t* fifth, const uint8_t* packed, int offset, int8_t* q) {
#if defined(__SSE2__)
  int32_t word;
  std::memcpy(&word, fifth, 4);
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), mask = _mm_set1_epi8(15);
  const __m128i twice = _mm_unpacklo_epi8(_mm_cvtsi32_si128(word), _mm_cvtsi32_si128(word));
  const __m128i bit = _mm_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));  // byte j looks at bit j
  for (int half = 0; half < 2; ++half) {
    // Eight copies of each of two bytes of the word.
    const __m128i two = half ? _mm_shuffle_epi32(_mm_shufflelo_epi16(twice, 0xfa), 0x50)
                             : _mm_shuffle_epi32(_mm_shufflelo_epi16(twice, 0x50), 0x50);
    const __m128i top = _mm_and_si128(_mm_cmpeq_epi8(_mm_and_si128(two, bit), bit), _mm_set1_epi8(16));
    const __m128i four = _mm_and_si128(half ? _mm_srli_epi16(both, 4) : both, mask);
    const __m128i five = _mm_sub_epi8(_mm_or_si128(four, top), _mm_set1_epi8(static_cast<char>(offset)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * half), five);
  }
#else
  uint8_t codes[32];
  halves(packed, codes);
  for (int i = 0; i < 32; ++i) {
    q[i] = static_cast<int8_t>((codes[i] | ((fifth[i / 8] >> (i % 8)) & 1) << 4) - offset);
  }
#endif
}

// The eight scales and eight minima of 6 bits of Q4_K and Q5_K.
inline void six_bits(const uint8_t* packed, uint8_t* scales, uint8_t* minima) {
  for (int j = 0; j < 4; ++j) {
    scales[j] = packed[j] & 63;
    minima[j] = packed[4 + j] & 63;
    scales[4 + j] = (packed[8 + j] & 15) | ((packed[j] >> 2) & 48);
    minima[4 + j] = (packed[8 + j] >> 4) | ((packed[4 + j] >> 2) & 48);
  }
}

// ---- blocks of 32 ----------------------------------------------------------------------------------------------------

// Eight blocks are computed at a time, like the eight groups of the larger blocks, since a single group would wait for
// its own bytes. `unpack` returns one block's integers, scale and minimum, and true if both are finite.

template <const int8_t* Levels, bool Minimum>
struct FourBits {  // Q4_0, Q4_1, IQ4_NL
  static constexpr int values = 32, bytes = Minimum ? 20 : 18;
  static constexpr const int8_t* levels = Levels;
  static bool unpack(const uint8_t* block, uint8_t* codes, float& scale, float& minimum) {
    scale = half_to_float(block);
    minimum = Minimum ? -half_to_float(block + 2) : 0.0f;
    halves(block + (Minimum ? 4 : 2), codes);
    return is_finite(scale) && is_finite(minimum);
  }
};

struct MXFP4 {
  static constexpr int values = 32, bytes = 17;
  static constexpr const int8_t* levels = kE2M1;
  static bool unpack(const uint8_t* block, uint8_t* codes, float& scale, float& minimum) {
    const uint32_t exponent = block[0];  // a power of two, which may be subnormal
    scale = float_of(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
    minimum = 0.0f;
    halves(block + 1, codes);
    return true;
  }
};

template <bool Minimum>
struct FiveBits {  // Q5_0, Q5_1
  static constexpr int values = 32, bytes = Minimum ? 24 : 22;
  static bool unpack(const uint8_t* block, int8_t* q, float& scale, float& minimum) {
    scale = half_to_float(block);
    minimum = Minimum ? -half_to_float(block + 2) : 0.0f;
    const uint8_t* fifth = block + (Minimum ? 4 : 2);
    fives(fifth, fifth + 4, Minimum ? 0 : 16, q);
    return is_finite(scale) && is_finite(minimum);
  }
};

struct Q8_0 {
  static constexpr int values = 32, bytes = 34;
  static bool unpack(const uint8_t* block, int8_t* q, float& scale, float& minimum) {
    scale = half_to_float(block);
    minimum = 0.0f;
    std::memcpy(q, block + 2, 32);
    return is_finite(scale);
  }
};

template <class Format, class T>
void eights_of_levels(const uint8_t* source, int64_t blocks, T* out) {
  while (blocks > 0) {
    const int count = blocks < 8 ? static_cast<int>(blocks) : 8;
    uint8_t codes[256];
    float scales[8], minima[8];
    bool finite = true;
    for (int b = 0; b < count; ++b) {
      finite &= Format::unpack(source + b * Format::bytes, codes + 32 * b, scales[b], minima[b]);
    }
    groups_of_levels(count, codes, Format::levels, scales, minima, finite, out);
    source += count * Format::bytes, out += count * 32, blocks -= count;
  }
}

template <class Format, class T>
void eights_of_signed(const uint8_t* source, int64_t blocks, T* out) {
  while (blocks > 0) {
    const int count = blocks < 8 ? static_cast<int>(blocks) : 8;
    int8_t q[256];
    float scales[8], minima[8];
    bool finite = true;
    for (int b = 0; b < count; ++b) {
      finite &= Format::unpack(source + b * Format::bytes, q + 32 * b, scales[b], minima[b]);
    }
    groups_of_signed<32>(count, q, scales, minima, finite, out);
    source += count * Format::bytes, out += count * 32, blocks -= count;
  }
}

// ---- blocks of 256 ---------------------------------------------------------------------------------------------------

struct Q2_K {
  static constexpr int values = 256, bytes = 84;
  template <class T>
  static void expand(const uint8_t* block, T* out) {
    const uint8_t *packed = block + 16, *both = block;
    const float d = half_to_float(block + 80), d_minimum = half_to_float(block + 82);
    float scales[16], minima[16];
    for (int g = 0; g < 16; ++g) {
      scales[g] = d * static_cast<float>(both[g] & 15);
      minima[g] = d_minimum * static_cast<float>(both[g] >> 4);
    }
    int8_t q[256];
    for (int n = 0; n < 2; ++n) {
      for (int s = 0; s < 4; ++s) {
        for (int i = 0; i < 32; ++i) q[128 * n + 32 * s + i] = (packed[32 * n + i] >> (2 * s)) & 3;
      }
    }
    groups_of_signed<16>(16, q, scales, minima, is_finite(d) && is_finite(d_minimum), out);
  }
};

struct Q3_K {
  static constexpr int values = 256, bytes = 110;
  template <class T>
  static void expand(const uint8_t* block, T* out) {
    const uint8_t *high = block, *packed = block + 32, *six = block + 96;
    const float d = half_to_float(block + 108), zero[16] = {};
    float scales[16];
    for (int g = 0; g < 16; ++g) {
      const int low = (six[g % 8] >> (4 * (g / 8))) & 15, top = (six[8 + g % 4] >> (2 * (g / 4))) & 3;
      scales[g] = d * static_cast<float>((low | (top << 4)) - 32);
    }
    int8_t q[256];
    for (int n = 0; n < 2; ++n) {
      for (int s = 0; s < 4; ++s) {
        for (int i = 0; i < 32; ++i) {
          const int set = (high[i] >> (4 * n + s)) & 1;  // a set bit subtracts nothing
          q[128 * n + 32 * s + i] = static_cast<int8_t>(((packed[32 * n + i] >> (2 * s)) & 3) - 4 + 4 * set);
        }
      }
    }
    groups_of_signed<16>(16, q, scales, zero, is_finite(d), out);
  }
};

// Scales and minima of the eight groups of Q4_K and Q5_K; returns whether all are finite.
inline bool grouped_scales(const uint8_t* block, float* scales, float* minima) {
  const float d = half_to_float(block), d_minimum = half_to_float(block + 2);
  uint8_t six[8], six_minima[8];
  six_bits(block + 4, six, six_minima);
  for (int g = 0; g < 8; ++g) {
    scales[g] = d * static_cast<float>(six[g]);
    minima[g] = d_minimum * static_cast<float>(six_minima[g]);
  }
  return is_finite(d) && is_finite(d_minimum);
}

struct Q4_K {
  static constexpr int values = 256, bytes = 144;
  template <class T>
  static void expand(const uint8_t* block, T* out) {
    const uint8_t* packed = block + 16;
    float scales[8], minima[8];
    const bool finite = grouped_scales(block, scales, minima);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(T) == 2) {
      if (finite) {
        for (int g = 0; g < 4; ++g) expand_nibbles(packed + 32 * g, scales + 2 * g, minima + 2 * g, out + 64 * g);
        return;
      }
    }
#endif
    uint8_t codes[256];
    for (int g = 0; g < 4; ++g) {
      for (int i = 0; i < 32; ++i) {
        codes[64 * g + i] = packed[32 * g + i] & 15;
        codes[64 * g + 32 + i] = packed[32 * g + i] >> 4;
      }
    }
    groups_of_levels(8, codes, kUnsigned4, scales, minima, finite, out);
  }
};

struct Q5_K {
  static constexpr int values = 256, bytes = 176;
  template <class T>
  static void expand(const uint8_t* block, T* out) {
    const uint8_t *fifth = block + 16, *packed = block + 48;
    float scales[8], minima[8];
    const bool finite = grouped_scales(block, scales, minima);
    int8_t q[256];
    for (int g = 0; g < 4; ++g) {
      for (int i = 0; i < 32; ++i) {
        const uint8_t two = fifth[i] >> (2 * g);
        q[64 * g + i] = (packed[32 * g + i] & 15) | ((two & 1) << 4);
        q[64 * g + 32 + i] = (packed[32 * g + i] >> 4) | ((two & 2) << 3);
      }
    }
    groups_of_signed<32>(8, q, scales, minima, finite, out);
  }
};

struct Q6_K {
  static constexpr int values = 256, bytes = 210;
  template <class T>
  static void expand(const uint8_t* block, T* out) {
    const uint8_t *packed = block, *high = block + 128;
    const int8_t* eight = reinterpret_cast<const int8_t*>(block + 192);
    const float d = half_to_float(block + 208), zero[16] = {};
    float scales[16];
    for (int g = 0; g < 16; ++g) scales[g] = d * static_cast<float>(eight[g]);
    int8_t q[256];
    for (int n = 0; n < 2; ++n) {
      const uint8_t *low = packed + 64 * n, *two = high + 32 * n;
      int8_t* place = q + 128 * n;
      for (int i = 0; i < 32; ++i) {
        place[i] = static_cast<int8_t>(((low[i] & 15) | ((two[i] & 3) << 4)) - 32);
        place[32 + i] = static_cast<int8_t>(((low[32 + i] & 15) | ((two[i] & 12) << 2)) - 32);
        place[64 + i] = static_cast<int8_t>(((low[i] >> 4) | (two[i] & 48)) - 32);
        place[96 + i] = static_cast<int8_t>(((low[32 + i] >> 4) | ((two[i] >> 2) & 48)) - 32);
      }
    }
    groups_of_signed<16>(16, q, scales, zero, is_finite(d), out);
  }
};

struct IQ4_XS {
  static constexpr int values = 256, bytes = 136;
  template <class T>
  static void expand(const uint8_t* block, T* out) {
    const uint8_t *low = block + 4, *packed = block + 8;
    const float d = half_to_float(block), zero[8] = {};
    const uint32_t high = block[2] | static_cast<uint32_t>(block[3]) << 8;
    float scales[8];
    for (int g = 0; g < 8; ++g) {
      const int six = ((low[g / 2] >> (4 * (g % 2))) & 15) | (((high >> (2 * g)) & 3) << 4);
      scales[g] = d * static_cast<float>(six - 32);
    }
    uint8_t codes[256];
    for (int g = 0; g < 8; ++g) halves(packed + 16 * g, codes + 32 * g);
    groups_of_levels(8, codes, kNonLinear4, scales, zero, is_finite(d), out);
  }
};

}  // namespace
