// A register of numbers for the instruction set of the file, by the compiler's vector types.
//
// Kernels are templates over the storage type (float, bfloat16, double) and compute in `Wide` of it: float, or double
// for double, in which `backhand verify` proves the same source to 1e-12. Only fused multiply-add is written
// explicitly, since contraction is disabled in the whole library. The exponential needs no mathematical library.
#pragma once

#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// True if the processor multiplies pairs of bfloat16 and adds them in float.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define BACKHAND_PAIRS
#endif

namespace {

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

template <class T>
struct WideOf {
  typedef float type;
};
template <>
struct WideOf<double> {
  typedef double type;
};
inline double widened(double value) { return value; }
inline void put(double* place, double value) { *place = value; }

// The type in which a storage type is computed.
template <class T>
using Wide = typename WideOf<T>::type;

template <class C>
constexpr int lanes = REGISTER_BYTES / static_cast<int>(sizeof(C));

template <class C>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(REGISTER_BYTES)));
  typedef int32_t bits __attribute__((vector_size(REGISTER_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(REGISTER_BYTES)));
  typedef int64_t bits __attribute__((vector_size(REGISTER_BYTES)));
};
template <class C>
using Vector = typename VectorOf<C>::type;
template <class C>
using Bits = typename VectorOf<C>::bits;

typedef uint16_t Halves __attribute__((vector_size(REGISTER_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(REGISTER_BYTES)));

template <class C>
inline Vector<C> all(C value) {
  return value - Vector<C>{};
}

template <class C>
inline Vector<C> load(const C* place) {
  Vector<C> value;
  std::memcpy(&value, place, sizeof value);
  return value;
}

template <class C>
inline Vector<C> load(const bfloat16* place) {
  Halves halves;
  std::memcpy(&halves, place, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vector<C> value;
  std::memcpy(&value, &words, sizeof value);
  return value;
}

template <class C>
inline void store(C* place, Vector<C> value) {
  std::memcpy(place, &value, sizeof value);
}

// Round to nearest, ties to even; a NaN stays one. Where AVX-512 rounds by itself, subnormal numbers become zero; ARM
// keeps them.
inline void store(bfloat16* place, Vector<float> value) {
#if defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh(value);
#elif defined(BACKHAND_PAIRS)
  const bfloat16x4_t halves = vcvt_bf16_f32(value);
#else
  Words words;
  std::memcpy(&words, &value, sizeof words);
  const Words rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
  const Bits<float> ordered = value == value;
  const Words kept = (rounded & (Words)ordered) | (~(Words)ordered & 0x7fc0u);
  const Halves halves = __builtin_convertvector(kept, Halves);
#endif
  std::memcpy(place, &halves, sizeof halves);
}

// The distance at which data that is read once, row by row, is prefetched: the processor's own prefetching ends with
// the page, and a wait for memory costs more than the sums of a row. An invalid address is no error.
constexpr int64_t BYTES_AHEAD = 4096, LINE = 64;
inline void fetch_ahead(const void* place) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(place) + BYTES_AHEAD));
}

// The first `count` numbers, with zeros after them.
template <class C, class T>
inline Vector<C> load_some(const T* place, int64_t count) {
  T part[lanes<C>] = {};
  std::memcpy(part, place, static_cast<size_t>(count) * sizeof(T));
  return load<C>(part);
}

template <class C, class T>
inline void store_some(T* place, Vector<C> value, int64_t count) {
  T part[lanes<C>];
  store(part, value);
  std::memcpy(place, part, static_cast<size_t>(count) * sizeof(T));
}

// Call whole(i) for every full register of n numbers, then part(i, count) for the rest.
template <class C, class Whole, class Part>
inline void along(int64_t n, const Whole& whole, const Part& part) {
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) whole(i);
  if (i < n) part(i, n - i);
}

// a b + c, rounded once if the processor can.
inline Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) { return a * b + c; }

template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// value, or the bound if it is exceeded; NaN stays NaN, since of an unordered pair the instructions return the second.
inline Vector<float> at_least(Vector<float> bound, Vector<float> value) {
#if defined(__AVX512F__)
  return _mm512_max_ps(bound, value);
#else
  return value < bound ? bound : value;
#endif
}
inline Vector<float> at_most(Vector<float> bound, Vector<float> value) {
#if defined(__AVX512F__)
  return _mm512_min_ps(bound, value);
#else
  return value > bound ? bound : value;
#endif
}

// A compensated sum of parts [Kahan 1965]: its error is that of the parts, whatever their number.
template <class V>
struct Compensated {
  V sum = {}, lost = {};
  void add(V part) {
    const V term = part - lost, total = sum + term;
    lost = (total - sum) - term;
    sum = total;
  }
};

// The same for a sum and its lost part in memory.
template <class C>
inline void add_compensated(C* sum, C* lost, Vector<C> part) {
  Compensated<Vector<C>> kept = {load<C>(sum), load<C>(lost)};
  kept.add(part);
  store(sum, kept.sum);
  store(lost, kept.lost);
}

// The sum of all lanes, by adding halves.
template <class C>
inline C sum_of(Vector<C> value) {
  C part[lanes<C>];
  store(part, value);
  for (int width = lanes<C> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

template <class C>
inline C largest_of(Vector<C> value) {
  C part[lanes<C>];
  store(part, value);
  for (int width = lanes<C> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
  return part[0];
}

#if defined(__AVX__)
// The same in registers, by adding halves; the compiler would go through memory.
template <>
inline float sum_of<float>(Vector<float> value) {
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)value;
  const __m256 eight = _mm256_add_ps(_mm256_castsi256_ps(_mm512_castsi512_si256(bits)),
                                     _mm256_castsi256_ps(_mm512_extracti64x4_epi64(bits, 1)));
#else
  const __m256 eight = (__m256)value;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <>
inline float largest_of<float>(Vector<float> value) {
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)value;
  const __m256 eight = _mm256_max_ps(_mm256_castsi256_ps(_mm512_castsi512_si256(bits)),
                                     _mm256_castsi256_ps(_mm512_extracti64x4_epi64(bits, 1)));
#else
  const __m256 eight = (__m256)value;
#endif
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#endif

template <class C>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr int DEGREE = 7, SHIFT = 23;
  static constexpr float LOWEST = -87.33654f, HIGHEST = 88.02969f, MAGIC = 12582912.0f;
  // ln 2 in two parts, the first short enough that its multiples are exact.
  static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440054690583e-4f;
};
template <>
struct Exponential<double> {
  static constexpr int DEGREE = 13, SHIFT = 52;
  static constexpr double LOWEST = -708.0, HIGHEST = 709.0, MAGIC = 6755399441055744.0;
  static constexpr double LN2_HIGH = 0.693147180369123816490, LN2_LOW = 1.90821492927058770002e-10;
};

template <class C>
constexpr C reciprocal_factorial(int k) {
  double value = 1;
  for (int i = 2; i <= k; ++i) value /= i;
  return static_cast<C>(value);
}

// eˣ by x = n ln 2 + r, |r| ≤ ln 2 / 2, and the series of eʳ, to about one unit of rounding. Outside the range in which
// the result is a normal number, the result at the end of the range; NaN stays NaN.
template <class C>
inline Vector<C> exponential(Vector<C> x) {
  typedef Exponential<C> E;
  x = x < E::LOWEST ? all<C>(E::LOWEST) : x;
  x = x > E::HIGHEST ? all<C>(E::HIGHEST) : x;
  // Adding the magic number rounds to an integer, which is then in the lowest bits.
  const Vector<C> shifted = fma(x, all<C>(static_cast<C>(1.44269504088896340736)), all<C>(E::MAGIC));
  const Vector<C> n = shifted - E::MAGIC;
  Vector<C> r = fma(n, all<C>(-E::LN2_HIGH), x);
  r = fma(n, all<C>(-E::LN2_LOW), r);
  Vector<C> series = all<C>(reciprocal_factorial<C>(E::DEGREE));
#pragma GCC unroll 16
  for (int k = E::DEGREE - 1; k >= 0; --k) series = fma(series, r, all<C>(reciprocal_factorial<C>(k)));
  Bits<C> power, bits;
  std::memcpy(&power, &shifted, sizeof power);
  std::memcpy(&bits, &series, sizeof bits);
  bits += power << E::SHIFT;
  Vector<C> result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// ln x of positive normal numbers, to about one unit of rounding: x = 2ᵉ m with m in [√½, √2), and the series of the
// area tangent, ln m = 2 (s + s³/3 + s⁵/5 + …) with s = (m - 1) / (m + 1), |s| < 0.172.
template <class C>
inline Vector<C> natural_logarithm(Vector<C> x) {
  typedef Exponential<C> E;
  constexpr int TERMS = sizeof(C) == 8 ? 10 : 4;
  const Vector<C> half_root = all<C>(static_cast<C>(0.70710678118654752));
  Bits<C> bits, lowest;
  std::memcpy(&bits, &x, sizeof bits);
  std::memcpy(&lowest, &half_root, sizeof lowest);
  // The exponent is counted from √½, so that m is at least √½.
  const Bits<C> exponent = (bits - lowest) >> E::SHIFT;
  bits -= exponent << E::SHIFT;
  Vector<C> m;
  std::memcpy(&m, &bits, sizeof m);
  const Vector<C> e = __builtin_convertvector(exponent, Vector<C>), s = (m - 1) / (m + 1), square = s * s;
  Vector<C> series = all<C>(static_cast<C>(2.0 / (2 * TERMS + 1)));
#pragma GCC unroll 10
  for (int k = TERMS - 1; k > 0; --k) series = fma(series, square, all<C>(static_cast<C>(2.0 / (2 * k + 1))));
  // 2 s + s³ (…), where 2 s is exact in s; the small part of ln 2 is added to the small terms.
  const Vector<C> small = fma(e, all<C>(E::LN2_LOW), s * square * series);
  return fma(e, all<C>(E::LN2_HIGH), 2 * s + small);
}

// 2ᵗ to 2.1e-7, for values that are rounded to bfloat16 next and t ≤ 126. Below the smallest normal number, that number;
// NaN stays NaN. The polynomial interpolates 2ʳ for |r| ≤ ½ at Chebyshev's places and is exactly one at zero.
inline Vector<float> rough_power_of_two(Vector<float> t) {
  constexpr float COEFFICIENTS[] = {1, 0.693147182f, 0.240223497f, 0.0555038117f, 0.00966636837f, 0.00133813021f};
  t = at_least(all<float>(-126.0f), t);
#if defined(__AVX512F__)
  const Vector<float> n = _mm512_roundscale_ps(t, 0), r = t - n;
#else
  const Vector<float> shifted = t + Exponential<float>::MAGIC, r = t - (shifted - Exponential<float>::MAGIC);
#endif
  Vector<float> series = all<float>(COEFFICIENTS[5]);
#pragma GCC unroll 8
  for (int k = 4; k >= 0; --k) series = fma(series, r, all<float>(COEFFICIENTS[k]));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(series, n);
#else
  Bits<float> power, bits;
  std::memcpy(&power, &shifted, sizeof power);
  std::memcpy(&bits, &series, sizeof bits);
  bits += power << Exponential<float>::SHIFT;
  Vector<float> result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

// a / b, if b and its reciprocal are normal numbers and a is finite; otherwise possibly NaN or 0. A rough reciprocal of
// the processor is refined: a division of such long registers takes as long as sixteen products, and this takes a third
// of it with an error larger by a twentieth of a unit. Two quotients by one b share the reciprocal.
inline Vector<double> quotient(Vector<double> a, Vector<double> b) { return a / b; }
inline Vector<float> quotient(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  const Vector<float> rough = _mm512_rcp14_ps(b), fine = fma(fma(-b, rough, all<float>(1)), rough, rough);
  const Vector<float> found = a * fine;
  return fma(fma(-found, b, a), fine, found);
#else
  return a / b;
#endif
}

// 1 / x to a few units of rounding, for normal numbers whose reciprocal is normal.
inline Vector<float> rough_reciprocal(Vector<float> x) {
#if defined(__AVX512F__)
  const Vector<float> estimate = _mm512_rcp14_ps(x);
  return estimate * fma(-x, estimate, all<float>(2));
#else
  return 1 / x;
#endif
}

}  // namespace
