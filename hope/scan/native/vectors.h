// Small dense products and element-wise functions, for float and double.
//
// Activations lie feature by feature: [features][TOKENS], so that what belongs to a token (a step
// size, a decay, a length) is a lane. Weights are rows of a padded length. Every number of rows is
// a multiple of PAD: no product has a remainder.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../../native/registers.h"

namespace hope {

constexpr int TOKENS = 16;  // of a block
constexpr int PAD = 16;     // numbers of features are rounded up to multiples of it

constexpr int padded(int size) {
  return (size + PAD - 1) / PAD * PAD;
}

// ---- products ------------------------------------------------------------------------------

// A matrix operand whose element (i, k) is at[i * row + k * column].
template <class T>
struct Operand {
  const T* at;
  long row, column;
};
template <class T>
inline Operand<T> plain(const T* at, long stride) {
  return {at, stride, 1};
}
template <class T>
inline Operand<T> transposed(const T* at, long stride) {
  return {at, 1, stride};
}

constexpr int ROWS = BYTES == 32 ? 4 : 8;  // of a tile: ROWS x 2 registers hold its sums

template <class T, int COLUMNS, bool MINUS>
inline void product_tile(int inner, Operand<T> a, const T* b, long b_stride, T* c, long c_stride,
                         const T* from, long from_stride, T beta) {
  Vec<T> sum[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < COLUMNS; j++)
      sum[r][j] = from ? beta * load(from + r * from_stride + j * LANES<T>) : Vec<T>{};
  for (int k = 0; k < inner; k++) {
    Vec<T> right[COLUMNS];
    for (int j = 0; j < COLUMNS; j++) right[j] = load(b + k * b_stride + j * LANES<T>);
    for (int r = 0; r < ROWS; r++) {
      const Vec<T> left = all(a.at[r * a.row + k * a.column]);
      for (int j = 0; j < COLUMNS; j++)
        sum[r][j] = MINUS ? sum[r][j] - left * right[j] : sum[r][j] + left * right[j];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < COLUMNS; j++) store(c + r * c_stride + j * LANES<T>, sum[r][j]);
}

#ifdef COUNT_PRODUCTS
inline int64_t multiply_adds = 0;  // of all products, for tests
#endif

template <class T, bool MINUS>
void product(int rows, int columns, int inner, Operand<T> a, const T* b, long b_stride, T* c,
             long c_stride, const T* from, long from_stride, T beta) {
#ifdef COUNT_PRODUCTS
  multiply_adds += int64_t(rows) * columns * inner;
#endif
  constexpr int L = LANES<T>;
  int j = 0;
  for (; j + 2 * L <= columns; j += 2 * L)
    for (int i = 0; i < rows; i += ROWS)
      product_tile<T, 2, MINUS>(inner, {a.at + i * a.row, a.row, a.column}, b + j, b_stride,
                                c + i * c_stride + j, c_stride,
                                from ? from + i * from_stride + j : nullptr, from_stride, beta);
  for (; j < columns; j += L)
    for (int i = 0; i < rows; i += ROWS)
      product_tile<T, 1, MINUS>(inner, {a.at + i * a.row, a.row, a.column}, b + j, b_stride,
                                c + i * c_stride + j, c_stride,
                                from ? from + i * from_stride + j : nullptr, from_stride, beta);
}

// A matrix in memory: its first element and the distance between rows.
template <class T>
struct Matrix {
  T* at;
  long stride;
};

// c = a b (rows x inner, inner x columns)
template <class T>
inline void set_product(int rows, int columns, int inner, Operand<T> a, Matrix<T> b, Matrix<T> c) {
  product<T, false>(rows, columns, inner, a, b.at, b.stride, c.at, c.stride, nullptr, 0, T(0));
}
// c = beta from + a b
template <class T>
inline void sum_product(int rows, int columns, int inner, Operand<T> a, Matrix<T> b, Matrix<T> c,
                        Matrix<T> from, T beta = 1) {
  product<T, false>(rows, columns, inner, a, b.at, b.stride, c.at, c.stride, from.at, from.stride,
                    beta);
}
// c += a b
template <class T>
inline void add_product(int rows, int columns, int inner, Operand<T> a, Matrix<T> b, Matrix<T> c) {
  sum_product(rows, columns, inner, a, b, c, c);
}
// c = beta from - a b
template <class T>
inline void less_product(int rows, int columns, int inner, Operand<T> a, Matrix<T> b, Matrix<T> c,
                         Matrix<T> from, T beta = 1) {
  product<T, true>(rows, columns, inner, a, b.at, b.stride, c.at, c.stride, from.at, from.stride,
                   beta);
}
// c = -a b
template <class T>
inline void minus_product(int rows, int columns, int inner, Operand<T> a, Matrix<T> b,
                          Matrix<T> c) {
  product<T, true>(rows, columns, inner, a, b.at, b.stride, c.at, c.stride, nullptr, 0, T(0));
}

// Lanes of two registers in turns: of their first (half 0) or second (1) halves.
template <class T, int HALF, int... I>
inline Vec<T> interleaved(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int L = LANES<T>;
  return __builtin_shufflevector(a, b, (HALF * L / 2 + I / 2 + (I % 2) * L)...);
}

// A square of L registers turned over, in log2(L) rounds of interleaving.
template <class T>
inline void turn_square(Vec<T>* rows) {
  constexpr int L = LANES<T>;
  using Lanes = std::make_integer_sequence<int, L>;
  for (int round = 1; round < L; round *= 2) {
    Vec<T> next[L];
    for (int i = 0; i < L / 2; i++) {
      next[2 * i] = interleaved<T, 0>(rows[i], rows[i + L / 2], Lanes());
      next[2 * i + 1] = interleaved<T, 1>(rows[i], rows[i + L / 2], Lanes());
    }
    for (int i = 0; i < L; i++) rows[i] = next[i];
  }
}

// to [columns][rows] = from [rows][columns], both numbers multiples of PAD; each row of `to` times
// its factor.
template <class T>
inline void transpose(int rows, int columns, const T* from, long from_stride, T* to, long to_stride,
                      const T* factor = nullptr) {
  constexpr int L = LANES<T>;
  for (int i = 0; i < rows; i += L)
    for (int j = 0; j < columns; j += L) {
      Vec<T> square[L];
      for (int k = 0; k < L; k++) square[k] = load(from + (i + k) * from_stride + j);
      turn_square<T>(square);
      for (int k = 0; k < L; k++)
        store(to + (j + k) * to_stride + i, factor ? square[k] * factor[j + k] : square[k]);
    }
}

// Rows of tokens from features [rows][TOKENS], each times its token's factor.
template <class T>
inline void turn_tokens(int rows, const T* from, long from_stride, T* to, long to_stride,
                        const T* factor = nullptr) {
  transpose(rows, TOKENS, from, from_stride, to, to_stride, factor);
}

// ---- functions -----------------------------------------------------------------------------

// tanh-GELU is z sigmoid(w), w = GELU1 z + GELU3 z^3.
constexpr double GELU1 = 1.5957691216057308, GELU3 = GELU1 * 0.044715;

template <class T>
struct Gelu {
  Vec<T> value, slope, curvature;
};

// tanh-GELU with its first (DERIVATIVES >= 1) and second (2) derivative.
template <class T, int DERIVATIVES>
inline Gelu<T> gelu(Vec<T> z) {
  const Vec<T> square = z * z;
  const Vec<T> gate = T(1) / (T(1) + exponential<T>(-z * (T(GELU1) + T(GELU3) * square)));
  Gelu<T> g;
  g.value = z * gate;
  if (DERIVATIVES > 0) {
    const Vec<T> rise = T(GELU1) + T(3 * GELU3) * square;
    const Vec<T> rest = T(1) - gate;
    g.slope = gate + g.value * rest * rise;
    if (DERIVATIVES > 1)
      g.curvature =
          (((T(1) - T(2) * gate) * z * rise + T(2)) * rise + T(6 * GELU3) * square) * gate * rest;
  }
  return g;
}

// ---- rows of tokens --------------------------------------------------------------------------

// Calls f(offset) for the registers of a row of TOKENS.
template <class T, class F>
inline void each(F f) {
  for (int t = 0; t < TOKENS; t += LANES<T>) f(t);
}

// out[t] += sum over rows of a[.][t] b[.][t]
template <class T>
inline void add_dots(int rows, const T* a, long a_stride, const T* b, long b_stride, T* out) {
  each<T>([&](int t) {
    Vec<T> sum[4] = {load(out + t)};
    for (int i = 0; i < rows; i += 4)
      for (int j = 0; j < 4; j++)
        sum[j] += load(a + (i + j) * a_stride + t) * load(b + (i + j) * b_stride + t);
    store(out + t, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  });
}

// to = from times a factor for each token
template <class T>
inline void scale_tokens(int rows, const T* from, long from_stride, const T* factor, T* to,
                         long to_stride) {
  each<T>([&](int t) {
    const Vec<T> scale = load(factor + t);
    for (int i = 0; i < rows; i++)
      store(to + i * to_stride + t, load(from + i * from_stride + t) * scale);
  });
}

// to += from
template <class T>
inline void add_rows(int rows, const T* from, long from_stride, T* to, long to_stride) {
  each<T>([&](int t) {
    for (int i = 0; i < rows; i++)
      store(to + i * to_stride + t,
            load(to + i * to_stride + t) + load(from + i * from_stride + t));
  });
}

constexpr double NORM_EPS = 1e-6;  // as in hope.scan.reference

// inverse[t] = 1 / max(|z[.][t]|, NORM_EPS); length, where asked for, before the maximum
template <class T>
inline void inverse_lengths(int rows, const T* z, long stride, T* inverse, T* length = nullptr) {
  alignas(64) T squares[TOKENS] = {};
  add_dots(rows, z, stride, z, stride, squares);
  for (int t = 0; t < TOKENS; t++) {
    const T norm = std::sqrt(squares[t]);
    if (length) length[t] = norm;
    inverse[t] = T(1) / (norm < T(NORM_EPS) ? T(NORM_EPS) : norm);
  }
}

// out = gradient of z from that of e = z / |z|, with 1 / |z|; out may be grad
template <class T>
inline void unit_backward(int rows, const T* grad, long grad_stride, const T* e, long e_stride,
                          const T* inverse, T* out, long out_stride) {
  alignas(64) T along[TOKENS] = {};
  add_dots(rows, grad, grad_stride, e, e_stride, along);
  for (int t = 0; t < TOKENS; t++)
    if (inverse[t] > T(0.999 / NORM_EPS)) along[t] = 0;
  each<T>([&](int t) {
    const Vec<T> a = load(along + t), scale = load(inverse + t);
    for (int i = 0; i < rows; i++)
      store(out + i * out_stride + t,
            (load(grad + i * grad_stride + t) - load(e + i * e_stride + t) * a) * scale);
  });
}

}  // namespace hope
