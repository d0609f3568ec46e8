// What all threads of a block do together: matrix products, sums and copies, each in a phase of its
// own between two barriers.
//
// The programs above this file name no thread. On a device (NVRTC) a thread has some elements of
// every Fragment, and products are mma.sync of 16 x 8 x 16 in bfloat16; elsewhere the one thread
// there is has all elements, and the same program is plain loops, in any type: that is how its
// mathematics is tested. Whatever a phase stores in shared memory is read after the next
// `barrier()`, and not overwritten before the one after that.
#pragma once

#ifdef __CUDACC_RTC__
#define DEVICE __device__ __forceinline__
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#define DEVICE inline
#endif

namespace hope {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int WIDTH = 64;  // of a head and of its memories' hidden layer

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
  return __expf(x);
}
DEVICE float inverted(float x) {
  return __fdividef(1.0f, x);
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
  return sqrtf(x);
}
DEVICE unsigned lane() {
  return threadIdx.x & 31u;
}
DEVICE unsigned warp() {
  return threadIdx.x >> 5;
}
DEVICE void barrier() {
  __syncthreads();
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
#endif

template <class T>
DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}

// ---- what a thread has of a matrix ----------------------------------------------------------

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
  static DEVICE bool has() { return ACROSS * TILES * 8 == N || column() < N; }
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

// [rows][COLUMNS] of operands. Eight rows' 16 bytes lie in different banks: 64 columns by turning
// the order of their eights with the row, fewer by a gap behind every row.
template <int COLUMNS>
struct Matrix {
  static constexpr int STRIDE = COLUMNS == 64 ? 64 : COLUMNS + 8;
  half* at;

  static DEVICE unsigned place(unsigned i, unsigned j) {
    return COLUMNS == 64 ? i * 64 + ((j / 8 ^ i % 8) * 8 + j % 8) : i * STRIDE + j;
  }
  // Of row i + down and column j + across from that of (i, j), for multiples of 8 that have no bit
  // in common with j.
  static DEVICE unsigned further(unsigned place, int down, int across) {
    return COLUMNS == 64 ? (place ^ across) + down * STRIDE : place + down * STRIDE + across;
  }
  static constexpr int size(int rows) { return rows * STRIDE; }
};

// Store f(i, j, e) of every element, rounded.
template <int M, int N, class F>
DEVICE void put(Matrix<N> to, F f) {
#ifdef __CUDACC_RTC__
  using P = Fragment<M, N>;
  if (!P::has()) return;
  const unsigned i = P::first_row(), j = P::first_column(), place = to.place(i, j);
#pragma unroll
  for (int e = 0; e < P::SIZE; e += 2) {
    const int down = P::down(e), across = P::across(e);
    *reinterpret_cast<unsigned*>(to.at + to.further(place, down, across)) =
        packed(f(i + down, j + across, e), f(i + down, j + across + 1, e + 1));
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
  const unsigned place = from.place(P::first_row(), P::first_column());
#pragma unroll
  for (int e = 0; e < P::SIZE; e += 2) {
    const unsigned two = *reinterpret_cast<const unsigned*>(
        from.at + from.further(place, P::down(e), P::across(e)));
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

// ---- global memory ----------------------------------------------------------------------------

// The thread's elements of [M, N] whose rows are N numbers one after another; rows from `count` on
// are zero.
template <int M, int N, class T>
DEVICE Fragment<M, N> read(const T* from, int count = M) {
  Fragment<M, N> to = {};
#ifdef __CUDACC_RTC__
  using P = Fragment<M, N>;
  if (!P::has()) return to;
  const int i = P::first_row();
  from += i * N + P::first_column();
#pragma unroll
  for (int e = 0; e < P::SIZE; e += 2) {
    if (i + P::down(e) >= count) continue;
    const T* source = from + (P::down(e) * N + P::across(e));
    if constexpr (sizeof(T) == 4) {
      const float2 two = *reinterpret_cast<const float2*>(source);
      to[e] = two.x;
      to[e + 1] = two.y;
    } else {
      const unsigned two = *reinterpret_cast<const unsigned*>(source);
      to[e] = __uint_as_float(two << 16);
      to[e + 1] = __uint_as_float(two & 0xffff0000u);
    }
  }
#else
  for (int e = 0; e < count * N; e++) {
    if constexpr (std::is_floating_point_v<T>)
      to[e] = from[e];
    else
      to[e] = number(from[e]);
  }
#endif
  return to;
}

template <int M, int N, class T>
DEVICE void write(T* to, const Fragment<M, N>& from, int count = M) {
#ifdef __CUDACC_RTC__
  using P = Fragment<M, N>;
  if (!P::has()) return;
  const int i = P::first_row();
  to += i * N + P::first_column();
#pragma unroll
  for (int e = 0; e < P::SIZE; e += 2) {
    if (i + P::down(e) >= count) continue;
    T* target = to + (P::down(e) * N + P::across(e));
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float2*>(target) = make_float2(from[e], from[e + 1]);
    else
      *reinterpret_cast<unsigned*>(target) = packed(from[e], from[e + 1]);
  }
#else
  for (int e = 0; e < count * N; e++) {
    if constexpr (std::is_floating_point_v<T>)
      to[e] = T(from[e]);
    else
      to[e] = rounded(from[e]);
  }
#endif
}

// Copy operands [ROWS, 64] that lie row after row to shared memory, or back. `fetch` is under way
// until `fetched()`, and a barrier behind that.
#ifdef __CUDACC_RTC__
// f(number of 16 bytes in global memory, place in shared memory).
template <int ROWS, class F>
DEVICE void sixteens(F f) {
  const unsigned n = threadIdx.x, place = Matrix<64>::place(n / 8, n % 8 * 8);
#pragma unroll
  for (int more = 0; more < ROWS * 8; more += THREADS)
    if (ROWS * 8 % THREADS == 0 || n + more < ROWS * 8) f(n + more, place + more * 8);
}
#endif
template <int ROWS>
DEVICE void fetch(const half* from, Matrix<64> to) {
#ifdef __CUDACC_RTC__
  sixteens<ROWS>([&](unsigned n, unsigned place) {
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to.at)) + 2 * place;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(from + n * 8)
                 : "memory");
  });
#else
  for (int n = 0; n < ROWS * 64; n++) to.at[to.place(n / 64, n % 64)] = from[n];
#endif
}
DEVICE void fetched() {
#ifdef __CUDACC_RTC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
template <int ROWS>
DEVICE void keep(Matrix<64> from, half* to) {
#ifdef __CUDACC_RTC__
  sixteens<ROWS>([&](unsigned n, unsigned place) {
    reinterpret_cast<int4*>(to)[n] = *reinterpret_cast<const int4*>(from.at + place);
  });
#else
  for (int n = 0; n < ROWS * 64; n++) to[n] = from.at[from.place(n / 64, n % 64)];
#endif
}

// ---- products -----------------------------------------------------------------------------------

// An operand as it lies, or with rows and columns exchanged, or that with a factor for every row as
// it lies (the k of a left operand).
template <int COLUMNS>
struct Turned {
  Matrix<COLUMNS> of;
};
template <int COLUMNS>
struct Scaled {
  Matrix<COLUMNS> of;
  const real* factor;
};
template <int COLUMNS>
DEVICE Turned<COLUMNS> turned(Matrix<COLUMNS> of) {
  return {of};
}
template <int COLUMNS>
DEVICE Scaled<COLUMNS> turned(Matrix<COLUMNS> of, const real* factor) {
  return {of, factor};
}

#ifdef __CUDACC_RTC__
// The address of a place in a matrix; its beginning is known when compiled.
template <int N>
DEVICE unsigned address(Matrix<N> of, unsigned place) {
  return static_cast<unsigned>(__cvta_generic_to_shared(of.at)) + 2 * place;
}
DEVICE void load4(unsigned (&r)[4], unsigned at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}
DEVICE void load4_turned(unsigned (&r)[4], unsigned at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}

// Rows i..i+15 and k..k+15 of a left operand as mma.sync takes them; k is known when compiled.
template <int N>
DEVICE void left(unsigned (&a)[4], Matrix<N> of, unsigned i, int k) {
  load4(a, address(of, of.further(of.place(i + lane() % 16, lane() / 16 * 8), 0, k)));
}
template <int N>
DEVICE void left(unsigned (&a)[4], Turned<N> x, unsigned i, int k) {
  const unsigned place = x.of.place(lane() % 8 + lane() / 16 * 8, i + lane() / 8 % 2 * 8);
  load4_turned(a, address(x.of, x.of.further(place, k, 0)));
}
template <int N>
DEVICE void left(unsigned (&a)[4], Scaled<N> x, unsigned i, int k) {
  left(a, Turned<N>{x.of}, i, k);
  const float* factor = x.factor + k + lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const float2 f = *reinterpret_cast<const float2*>(factor + n / 2 * 8);
    a[n] = packed(__uint_as_float(a[n] << 16) * f.x, __uint_as_float(a[n] & 0xffff0000u) * f.y);
  }
}

// k..k+15 of a right operand, whose first column is j, and columns j + more to j + more + 15: two
// tiles of 8 columns, registers 0 and 1, 2 and 3. k and more are known when compiled.
template <int N>
DEVICE void right(unsigned (&b)[4], Matrix<N> of, int k, unsigned j, int more) {
  const unsigned place = of.place(lane() % 16, j + lane() / 16 * 8);
  load4_turned(b, address(of, of.further(place, k, more)));
}
template <int N>
DEVICE void right(unsigned (&b)[4], Turned<N> x, int k, unsigned j, int more) {
  const unsigned place = x.of.place(j + lane() % 8 + lane() / 16 * 8, lane() / 8 % 2 * 8);
  load4(b, address(x.of, x.of.further(place, more, k)));
}
// The same of one tile.
template <int N>
DEVICE void right8(unsigned (&b)[2], Matrix<N> of, int k, unsigned j) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(address(of, of.further(of.place(lane() % 16, j), k, 0))));
}
template <int N>
DEVICE void right8(unsigned (&b)[2], Turned<N> x, int k, unsigned j) {
  const unsigned place = x.of.place(j + lane() % 8, lane() / 8 % 2 * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(address(x.of, x.of.further(place, 0, k))));
}
DEVICE void mma(real* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
template <int N>
inline real left_element(Matrix<N> a, int i, int k) {
  return number(a.at[a.place(i, k)]);
}
template <int N>
inline real left_element(Turned<N> a, int i, int k) {
  return left_element(a.of, k, i);
}
template <int N>
inline real left_element(Scaled<N> a, int i, int k) {
  return number(rounded(left_element(a.of, k, i) * a.factor[k]));
}
template <int N>
inline real right_element(Matrix<N> b, int k, int j) {
  return left_element(b, k, j);
}
template <int N>
inline real right_element(Turned<N> b, int k, int j) {
  return left_element(b.of, j, k);
}
#endif

// c += a b, over K.
template <int K, int M, int N, class A, class B>
DEVICE void add_product(Fragment<M, N>& c, A a, B b) {
#ifdef __CUDACC_RTC__
  using P = Fragment<M, N>;
  if (!P::has()) return;
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    unsigned l[4];
    left(l, a, P::row(), k);
    if constexpr (P::TILES == 1) {
      unsigned r[2];
      right8(r, b, k, P::column());
      mma(c.v, l, r[0], r[1]);
    } else {
#pragma unroll
      for (int tile = 0; tile < P::TILES; tile += 2) {
        unsigned r[4];
        right(r, b, k, P::column(), 8 * tile);
        mma(c.v + 4 * tile, l, r[0], r[1]);
        mma(c.v + 4 * tile + 4, l, r[2], r[3]);
      }
    }
  }
#else
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      real sum = 0;
      for (int k = 0; k < K; k++) sum += left_element(a, i, k) * right_element(b, k, j);
      c[i * N + j] += sum;
    }
#endif
}
template <int K, int M, int N, class A, class B>
DEVICE void less_product(Fragment<M, N>& c, A a, B b) {
  Fragment<M, N> own = {};
  add_product<K>(own, a, b);
#pragma unroll
  for (int e = 0; e < c.SIZE; e++) c[e] -= own[e];
}
template <int M, int N, int K, class A, class B>
DEVICE Fragment<M, N> product(A a, B b) {
  Fragment<M, N> c = {};
  add_product<K>(c, a, b);
  return c;
}

// a b of matrices that were stored with what rounding left of them.
template <int COLUMNS>
struct TurnedSplit {
  Turned<COLUMNS> high, low;
};
template <int COLUMNS>
DEVICE TurnedSplit<COLUMNS> turned(Split<COLUMNS> x) {
  return {{x.high}, {x.low}};
}
template <int M, int N, int K, class A, class B>
DEVICE Fragment<M, N> exact_product(A a, B b) {
  Fragment<M, N> c = {};
  add_product<K>(c, a.high, b.low);
  add_product<K>(c, a.low, b.high);
  add_product<K>(c, a.high, b.high);
  return c;
}

// ---- sums -----------------------------------------------------------------------------------------

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

// Store the sums over the rows of f(i, j, e) of [M, N]; `column` gives them behind the next barrier.
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

// ---- triangular systems -------------------------------------------------------------------------

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

// ---- functions ------------------------------------------------------------------------------------

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
