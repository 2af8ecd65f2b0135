// Activations and their slopes by one exponential. Both are a σ(z(a)):
//     SiLU z = a;   GELU, tanh form, z = 2 κ (a + 0.044715 a³), since (1 + tanh(z / 2)) / 2 = σ(z);
//     φ = a σ,   φ' = σ + φ (1 - σ) z'.
#pragma once

#include "mutants.h"
#include "vectors.h"

namespace {

enum : int { SILU = 0, GELU_TANH = 1 };
constexpr double TWO_KAPPA = 1.5957691216057307118, CUBIC = 0.044715;

template <class C>
struct Activated {
  Vector<C> value, slope;
};

// True if results are rounded further when they are stored, which permits a cheaper exponential and division.
template <class T, class C>
constexpr bool rounded = sizeof(T) < sizeof(C);

// e^(-z(a)); σ = 1 / (1 + that).
template <int activation, class T, class C>
inline Vector<C> power_of(Vector<C> a) {
  constexpr double BY = rounded<T, C> ? -1.44269504088896340736 : -1;
  Vector<C> z = a * C(BY);
  if constexpr (activation == GELU_TANH) z = z * fma(a * a, all<C>(C(TWO_KAPPA * CUBIC)), all<C>(C(TWO_KAPPA)));
  if constexpr (rounded<T, C>) return rough_power_of_two(at_most(all<float>(126.0f), z));
  else return exponential<C>(z);
}

template <class T, class C>
inline Vector<C> divided(Vector<C> a, Vector<C> b) {
  if constexpr (rounded<T, C>) return a * rough_reciprocal(b);
  else return quotient(a, b);
}

template <int activation, class T, class C>
inline Activated<C> activated(Vector<C> a) {
  const Vector<C> power = power_of<activation, T, C>(a), sigmoid = divided<T, C>(all<C>(1), 1 + power);
  // A second division rounds once less, which matters only if results are not rounded further.
  const Vector<C> value = rounded<T, C> ? a * sigmoid : divided<T, C>(a, 1 + power);
  if constexpr (activation == SILU) {
    return {value, fma(value, MUTATED("glu: inner derivative missing", 1 - sigmoid, Vector<C>{}), sigmoid)};
  } else {
    const Vector<C> inner = fma(a * a, all<C>(C(3 * TWO_KAPPA * CUBIC)), all<C>(C(TWO_KAPPA)));
    // 1 - σ = power · σ, which does not cancel where σ is near one.
    return {value, fma(value * (power * sigmoid), MUTATED("glu: inner derivative of 1", inner, all<C>(1)), sigmoid)};
  }
}

}  // namespace
