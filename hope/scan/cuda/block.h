// What all threads of a block do together, each in a phase of its own between two barriers: here
// what a thread has of a matrix, and operands in shared memory; copies.h, products.h, sums.h and
// systems.h have the rest.
//
// The programs above this file name no thread. On a device (NVRTC) a thread has some elements of
// every Fragment, and products are mma.sync of 16 x 8 x 16 in bfloat16; elsewhere the one thread
// there is has all elements, and the same program is plain loops, in any type: that is how its
// mathematics is tested. Whatever a phase stores in shared memory is read after the next
// `barrier()`, and not overwritten before the one after that.
#pragma once

#ifdef __CUDACC_RTC__
#define DEVICE __device__ __forceinline__
extern __shared__ __align__(256) char shared_memory[];
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#define DEVICE inline
#endif

namespace hope {

// Given when compiled: WIDTH of a head (64 or 128).
constexpr int WARPS = WIDTH / 8, THREADS = 32 * WARPS;

// `real` accumulates, `half` is what products take and what states are kept in beside it.
#ifdef __CUDACC_RTC__
using real = float;
struct half {
  unsigned short bits;
};
DEVICE float number(half x) {
  return __uint_as_float(unsigned(x.bits) << 16);
}
DEVICE unsigned packed(float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
DEVICE half rounded(float x) {
  return {static_cast<unsigned short>(packed(x, 0.0f) & 0xffff)};
}
DEVICE float exponential(float x) {
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x * 1.4426950408889634f));
  return x;
}
DEVICE float inverted(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
DEVICE float decayed(float log_share) {
  return expf(log_share);
}
DEVICE float lost(float log_share) {  // 1 - exp(log_share)
  return -expm1f(log_share);
}
DEVICE float log_sigmoid(float x) {
  return fminf(x, 0.0f) - log1pf(expf(-fabsf(x)));
}
DEVICE float root(float x) {
  asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
DEVICE unsigned lane() {
  return threadIdx.x & 31u;
}
DEVICE unsigned warp() {
  return threadIdx.x >> 5;
}
// What all threads of a warp agree on, so that the compiler knows that they do.
DEVICE bool whole_warp(bool x) {
  return __shfl_sync(0xffffffffu, int(x), 0) != 0;
}
DEVICE void barrier() {
  __syncthreads();
}
// Loads behind this are not brought before it: registers are scarcer than instructions.
DEVICE void in_order() {
  __syncwarp();
}
// Of the programs that write what one another reads, the memories of a (row, head): what they have
// written to global memory before it is there for all of them behind it.
DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
#else
#ifndef REAL
#define REAL double
#endif
using real = REAL;
#ifdef ROUND  // operands in bfloat16
struct half {
  uint16_t bits;
};
inline real number(half x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline half rounded(real x) {
  const float value = float(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
#else
using half = real;
inline real number(half x) {
  return x;
}
inline half rounded(real x) {
  return x;
}
#endif
inline real exponential(real x) {
  return std::exp(x);
}
inline real decayed(real log_share) {
  return std::exp(log_share);
}
inline real lost(real log_share) {
  return -std::expm1(log_share);
}
inline real log_sigmoid(real x) {
  return std::fmin(x, real(0)) - std::log1p(std::exp(-std::abs(x)));
}
inline real root(real x) {
  return std::sqrt(x);
}
inline real inverted(real x) {
  return 1 / x;
}
inline void barrier() {}
inline void in_order() {}
void cluster_barrier();
#endif

template <class T>
DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}

// ---- what a thread has of a matrix ------------------------------------------------------------

// Elements of a matrix [M, N] that one thread has: WARPS are DOWN x ACROSS over it, a warp has 16
// rows and TILES times 8 columns, as mma.sync lays out its sums.
template <int M, int N>
struct Fragment {
  static constexpr int DOWN = M / 16, ACROSS = WARPS / DOWN;
  static constexpr int TILES = (N / 8 + ACROSS - 1) / ACROSS;
#ifdef __CUDACC_RTC__
  static constexpr int SIZE = 4 * TILES;
  static DEVICE unsigned row() { return 16 * (warp() % DOWN); }
  static DEVICE unsigned column() { return 8 * TILES * (warp() / DOWN); }
  static DEVICE bool has() { return ACROSS * TILES * 8 == N || whole_warp(column() < N); }
  // Its first element's row and column, and where number e lies from there.
  static DEVICE unsigned first_row() { return row() + lane() / 4; }
  static DEVICE unsigned first_column() { return column() + lane() % 4 * 2; }
  static constexpr int down(int e) { return e / 2 % 2 * 8; }
  static constexpr int across(int e) { return e / 4 * 8 + e % 2; }
#else
  static constexpr int SIZE = M * N;
#endif
  real v[SIZE];
  DEVICE real& operator[](int e) { return v[e]; }
  DEVICE real operator[](int e) const { return v[e]; }
};

// f(i, j, e) for every element (i, j) that the thread has, number e of its Fragment.
template <int M, int N, class F>
DEVICE void each(F f) {
#ifdef __CUDACC_RTC__
  using P = Fragment<M, N>;
  if (!P::has()) return;
  const int i = P::first_row(), j = P::first_column();
#pragma unroll
  for (int e = 0; e < P::SIZE; e++) f(i + P::down(e), j + P::across(e), e);
#else
  for (int e = 0; e < M * N; e++) f(e / N, e % N, e);
#endif
}

// What is computed from x behind this is computed anew: registers are scarcer than instructions.
#ifdef __CUDACC_RTC__
DEVICE unsigned anew(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}
#endif
template <int M, int N>
DEVICE void forget(Fragment<M, N>& x) {
#ifdef __CUDACC_RTC__
#pragma unroll
  for (int e = 0; e < x.SIZE; e++) asm volatile("" : "+f"(x[e]));
#endif
}

// f(n) for n < count, shared out among the threads.
template <class F>
DEVICE void range(int count, F f) {
#ifdef __CUDACC_RTC__
#pragma unroll 1
  for (int n = threadIdx.x; n < count; n += THREADS) f(n);
#else
  for (int n = 0; n < count; n++) f(n);
#endif
}

// ---- matrices in shared memory ----------------------------------------------------------------

// [rows][COLUMNS] of operands. Eight rows' 16 bytes lie in different banks: 64 or 128 columns by
// turning the order of their eights with the row, fewer by a gap behind every row.
template <int COLUMNS>
struct Matrix {
  static constexpr bool TURNS = COLUMNS >= 64;
  static constexpr int STRIDE = TURNS ? COLUMNS : COLUMNS + 8;
  static constexpr int size(int rows) { return rows * STRIDE; }
  static DEVICE unsigned place(unsigned i, unsigned j) {
    return i * STRIDE + (TURNS ? (j / 8 ^ i % 8) * 8 + j % 8 : j);
  }
#ifdef __CUDACC_RTC__
  unsigned at;  // bytes from the beginning of shared memory, known when compiled

  // The address of (i, j) in a matrix that begins where shared memory does: one register serves all
  // matrices, whose own `at` is part of the instruction.
  static DEVICE unsigned begin(unsigned i, unsigned j) {
    return anew(static_cast<unsigned>(__cvta_generic_to_shared(shared_memory)) + 2 * place(i, j));
  }
  // Of row i + down and column j + across from `begin` of (i, j), for multiples of 8 that have no
  // bit in common with j.
  DEVICE unsigned address(unsigned begin, int down, int across) const {
    return (TURNS ? begin ^ 2 * across : begin + 2 * across) + (2 * down * STRIDE + at);
  }
#else
  half* at;
#endif
};
#ifdef __CUDACC_RTC__
DEVICE void store(unsigned address, unsigned two) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(two) : "memory");
}
DEVICE unsigned load(unsigned address) {
  unsigned two;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(two) : "r"(address) : "memory");
  return two;
}
#endif

// Store f(i, j, e) of every element, rounded.
template <int M, int N, class F>
DEVICE void put(Matrix<N> to, F f) {
#ifdef __CUDACC_RTC__
  using P = Fragment<M, N>;
  if (!P::has()) return;
  const unsigned i = P::first_row(), j = P::first_column(), begin = to.begin(i, j);
#pragma unroll
  for (int e = 0; e < P::SIZE; e += 2) {
    const int down = P::down(e), across = P::across(e);
    store(to.address(begin, down, across),
          packed(f(i + down, j + across, e), f(i + down, j + across + 1, e + 1)));
  }
#else
  for (int e = 0; e < M * N; e++) to.at[to.place(e / N, e % N)] = rounded(f(e / N, e % N, e));
#endif
}
template <int M, int N>
DEVICE void put(Matrix<N> to, const Fragment<M, N>& from) {
  put<M>(to, [&](int, int, int e) { return from[e]; });
}

// The inverse.
template <int M, int N>
DEVICE Fragment<M, N> get(Matrix<N> from) {
  Fragment<M, N> to = {};
#ifdef __CUDACC_RTC__
  using P = Fragment<M, N>;
  if (!P::has()) return to;
  const unsigned begin = from.begin(P::first_row(), P::first_column());
#pragma unroll
  for (int e = 0; e < P::SIZE; e += 2) {
    const unsigned two = load(from.address(begin, P::down(e), P::across(e)));
    to[e] = __uint_as_float(two << 16);
    to[e + 1] = __uint_as_float(two & 0xffff0000u);
  }
#else
  for (int e = 0; e < M * N; e++) to[e] = number(from.at[from.place(e / N, e % N)]);
#endif
  return to;
}

// A matrix as two: its operands, and what rounding left of it.
template <int COLUMNS>
struct Split {
  Matrix<COLUMNS> high, low;
};
template <int M, int N>
DEVICE void put(Split<N> to, const Fragment<M, N>& from) {
  put<M>(to.high, from);
  put<M>(to.low, [&](int, int, int e) { return from[e] - number(rounded(from[e])); });
}

}  // namespace hope
