// Registers of the processor that this is compiled for, and the exponential, for float and double.
#pragma once
#include <cstdint>

namespace hope {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class T>
struct Register {
  // Unaligned: a row of the caller's tensors may begin anywhere.
  typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename Register<T>::type;
template <class T>
constexpr int LANES = BYTES / int(sizeof(T));

template <class T>
inline Vec<T> load(const T* from) {
  return *reinterpret_cast<const Vec<T>*>(from);
}
template <class T>
inline void store(T* to, Vec<T> value) {
  *reinterpret_cast<Vec<T>*>(to) = value;
}
template <class T>
inline Vec<T> all(T value) {
  return value - Vec<T>{};
}

template <class T>
struct Bits;
template <>
struct Bits<float> {
  typedef int32_t integer;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float low = -87.3f, high = 88.0f;
};
template <>
struct Bits<double> {
  typedef int64_t integer;
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double low = -708.0, high = 709.0;
};

// e^x, to two units in the last place; x below `low` gives what `low` gives (1e-38, 1e-307), NaN
// stays NaN.
template <class T>
inline Vec<T> exponential(Vec<T> x) {
  typedef typename Register<typename Bits<T>::integer>::type Integers;
  x = x < Bits<T>::low ? all(Bits<T>::low) : x;
  x = x > Bits<T>::high ? all(Bits<T>::high) : x;
  const Vec<T> shifted = x * T(1.4426950408889634) + Bits<T>::magic;
  const Vec<T> n = shifted - Bits<T>::magic;
  const T ln2_high = sizeof(T) == 4 ? T(0.693359375) : T(6.93145751953125e-1);
  const T ln2_low = sizeof(T) == 4 ? T(-2.12194440e-4) : T(1.42860682030941723212e-6);
  const Vec<T> r = (x - n * ln2_high) - n * ln2_low;
  Vec<T> p;
  if (sizeof(T) == 4) {
    p = all(T(1.0 / 5040));
    for (int i = 6; i >= 0; i--) {
      constexpr T inverse[] = {1,           1, T(1.0 / 2), T(1.0 / 6), T(1.0 / 24), T(1.0 / 120),
                               T(1.0 / 720)};
      p = p * r + inverse[i];
    }
  } else {
    T inverse = T(1.0 / 6227020800.0);  // 1 / 13!
    p = all(inverse);
    for (int i = 12; i >= 0; i--) {
      inverse *= T(i + 1);
      p = p * r + inverse;
    }
  }
  const Integers exponent = ((Integers)shifted - (Integers)all(Bits<T>::magic) + Bits<T>::bias)
                            << Bits<T>::mantissa;
  return p * (Vec<T>)exponent;
}

}  // namespace hope
