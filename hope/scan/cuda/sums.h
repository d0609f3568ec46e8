// Sums over rows, columns and all of a matrix that threads share, and activations.
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

// Numbers that `store_rows` and `row` need for a row: one of each warp that has a part of it.
template <int M>
constexpr int PARTS = WARPS * 16 / M;
static_assert(PARTS<16> % 4 == 0 && PARTS<32> % 4 == 0);
constexpr int ROOM = 16 * WARPS;  // of any number of rows, and of `store_columns`

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
    const unsigned i = 16 * (warp() % DOWN) + lane() / 4 + 8 * n;
    if (lane() % 4 == 0) room[i * PARTS<M> + warp() / DOWN] = sum;
  }
#else
  for (int n = 0; n < M * PARTS<M>; n++) room[n] = n % PARTS<M> ? real(0) : rows.v[n / PARTS<M>];
#endif
}
template <int M>
DEVICE real row(const real* room, int i) {
  real sum = 0;
#ifdef __CUDACC_RTC__
  const float4* parts = reinterpret_cast<const float4*>(room + i * PARTS<M>);
#pragma unroll
  for (int n = 0; n < PARTS<M> / 4; n++) {
    const float4 four = parts[n];
    sum += (four.x + four.y) + (four.z + four.w);
  }
#else
  for (int n = 0; n < PARTS<M>; n++) sum += room[i * PARTS<M> + n];
#endif
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

// use(i, before, behind) for every row i of M: sums of f(j) over the rows before it and behind it.
template <int M, class F, class G>
DEVICE void running(F f, G use) {
#ifdef __CUDACC_RTC__
  static_assert(M <= 32);
  if (!whole_warp(warp() == 0)) return;
  const unsigned i = lane(), everyone = 0xffffffffu;
  float before = i < M ? f(i) : 0.0f, behind = before;
#pragma unroll
  for (int n = 1; n < M; n *= 2) {
    const float above = __shfl_sync(everyone, before, i - n);
    const float below = __shfl_sync(everyone, behind, i + n);
    before += i >= n ? above : 0.0f;
    behind += i + n < M ? below : 0.0f;
  }
  before = __shfl_sync(everyone, before, i - 1), behind = __shfl_sync(everyone, behind, i + 1);
  if (i < M) use(i, i > 0 ? before : 0.0f, i + 1 < M ? behind : 0.0f);
#else
  for (int i = 0; i < M; i++) {
    real before = 0, behind = 0;
    for (int j = 0; j < i; j++) before += f(j);
    for (int j = i + 1; j < M; j++) behind += f(j);
    use(i, before, behind);
  }
#endif
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
