// Sums over rows, columns and all of a matrix that threads share, triangular systems, activations.
#pragma once
#include "block.h"

namespace hope {

// One number for every row of [M, N] that the thread has elements of; N does not matter.
template <int M>
struct Rows {
#ifdef __CUDACC_RTC__
  real v[2];
  DEVICE void add(int, int e, real x) { v[e / 2 % 2] += x; }
  DEVICE real at(int, int e) const { return v[e / 2 % 2]; }
#else
  real v[M];
  void add(int i, int, real x) { v[i] += x; }
  real at(int i, int) const { return v[i]; }
#endif
};

// Numbers that `store_rows` and `row` need for M rows.
constexpr int row_room(int M) {
  return WARPS * 16 / M * M;
}

// Store what all threads have of each row; `row` adds it up behind the next barrier.
template <int M>
DEVICE void store_rows(const Rows<M>& rows, real* room) {
#ifdef __CUDACC_RTC__
  constexpr int DOWN = M / 16;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    float sum = rows.v[n];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane() % 4 == 0) room[warp() / DOWN * M + 16 * (warp() % DOWN) + lane() / 4 + 8 * n] = sum;
  }
#else
  for (int n = 0; n < row_room(M); n++) room[n] = n < M ? rows.v[n] : real(0);
#endif
}
template <int M>
DEVICE real row(const real* room, int i) {
  real sum = 0;
#pragma unroll
  for (int n = 0; n < row_room(M) / M; n++) sum += room[n * M + i];
  return sum;
}

// Store the sums over the rows of f(i, j, e) of [M, N]; `column` gives them behind the next
// barrier.
template <int M, int N, class F>
DEVICE void store_columns(F f, real* room) {
#ifdef __CUDACC_RTC__
  using P = Fragment<M, N>;
  const int i = P::first_row(), j = P::first_column();
#pragma unroll
  for (int e = 0; e < P::SIZE; e += e % 2 ? 3 : 1) {
    float sum = f(i, j + P::across(e), e) + f(i + 8, j + P::across(e), e + 2);
    for (int n = 4; n < 32; n *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, n);
    if (lane() < 4) room[P::row() / 16 * N + j + P::across(e)] = sum;
  }
#else
  for (int n = 0; n < M / 16 * N; n++) room[n] = 0;
  for (int e = 0; e < M * N; e++) room[e % N] += f(e / N, e % N, e);
#endif
}
template <int M, int N>
DEVICE real column(const real* room, int j) {
  real sum = 0;
#pragma unroll
  for (int n = 0; n < M / 16; n++) sum += room[n * N + j];
  return sum;
}

// Store every warp's sum of x; `whole` adds them up behind the next barrier.
DEVICE void store_whole(real x, real* room) {
#ifdef __CUDACC_RTC__
#pragma unroll
  for (int n = 16; n > 0; n /= 2) x += __shfl_xor_sync(0xffffffffu, x, n);
  if (lane() == 0) room[warp()] = x;
#else
  for (int n = 0; n < WARPS; n++) room[n] = n ? real(0) : x;
#endif
}
DEVICE real whole(const real* room) {
  real sum = 0;
#pragma unroll
  for (int n = 0; n < WARPS; n++) sum += room[n];
  return sum;
}

// A number for every row that the thread has elements of.
template <int M, class F>
DEVICE Rows<M> per_row(F f) {
  Rows<M> x;
#ifdef __CUDACC_RTC__
  const int i = Fragment<M, 8>::first_row();
  x.v[0] = f(i);
  x.v[1] = f(i + 8);
#else
  for (int i = 0; i < M; i++) x.v[i] = f(i);
#endif
  return x;
}

// ---- triangular systems ------------------------------------------------------------------------

// (I + strict)^-1 of `count` strictly lower [C, C], one behind another: the blocks of 16 on their
// diagonals.
template <int C>
DEVICE void invert_diagonals(int count, const real* strict, real* inverse) {
  range(count * C, [&](int n) {
    const int column = n % C, first = column / 16 * 16;
    const real* row = strict + n / C * C * C + first * C + first;
    real* to = inverse + n / C * C * C + first * C + column;
    real x[16];
#pragma unroll
    for (int t = 0; t < 16; t++) {
      x[t] = first + t == column;
#pragma unroll
      for (int s = 0; s < t; s++) x[t] -= row[t * C + s] * x[s];
      to[t * C] = x[t];
    }
  });
}

// What is left of them for C = 32, in two phases, behind a barrier; room for 256 numbers each.
template <int C>
DEVICE void invert_below(int count, const real* strict, real* inverse, real* room) {
  static_assert(C == 16 || C == 32);
  if constexpr (C == 32) {
    range(count * 256, [&](int n) {
      const int which = n / 256 * C * C, i = n % 256 / 16, j = n % 16;
      real sum = 0;
#pragma unroll
      for (int s = 0; s < 16; s++)
        sum += strict[which + (16 + i) * C + s] * inverse[which + s * C + j];
      room[n] = sum;
    });
    barrier();
    range(count * 256, [&](int n) {
      const int which = n / 256 * C * C, i = n % 256 / 16, j = n % 16;
      real sum = 0;
#pragma unroll
      for (int s = 0; s < 16; s++)
        sum -= inverse[which + (16 + i) * C + 16 + s] * room[n / 256 * 256 + s * 16 + j];
      inverse[which + (16 + i) * C + j] = sum;
      inverse[which + i * C + 16 + j] = 0;
    });
    barrier();
  }
}

// ---- functions ---------------------------------------------------------------------------------

struct Gelu {
  real value, slope, curvature;
};

// tanh-GELU and its derivatives; see hope.scan.kernels.primitives.gelu.
DEVICE Gelu gelu(real z) {
  const real one = real(1.5957691216057308), three = real(0.07135481627260025);
  const real square = z * z;
  const real gate = inverted(1 + exponential(-z * (one + three * square)));
  const real rise = one + 3 * three * square, tilt = gate * (1 - gate);
  return {z * gate, gate + z * tilt * rise,
          tilt * (rise * (2 + z * rise * (1 - 2 * gate)) + 6 * three * square)};
}

}  // namespace hope
