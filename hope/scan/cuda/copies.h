// Between global memory and Fragments, shared memory, or what lies there.
#pragma once
#include "block.h"

namespace hope {

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

// Add to [M, N] row after row, of which no other thread touches this one's elements meanwhile.
template <int M, int N>
DEVICE void add(real* to, const Fragment<M, N>& x) {
#ifdef __CUDACC_RTC__
  using P = Fragment<M, N>;
  if (!P::has()) return;
  to += P::first_row() * N + P::first_column();
#pragma unroll
  for (int e = 0; e < P::SIZE; e += 2) {
    float* target = to + (P::down(e) * N + P::across(e));
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(target), "f"(x[e]), "f"(x[e + 1])
                 : "memory");
  }
#else
  for (int e = 0; e < M * N; e++) to[e] += x[e];
#endif
}

// Copy operands [ROWS, COLUMNS] that lie row after row to shared memory, or back. `fetch` is under
// way until `fetched()`, and a barrier behind that.
#ifdef __CUDACC_RTC__
// f(number of 16 bytes in global memory, their address in shared memory).
template <int ROWS, int COLUMNS, class F>
DEVICE void sixteens(Matrix<COLUMNS> x, F f) {
  constexpr int ROW = COLUMNS / 8, ALL = ROWS * ROW;
  const unsigned n = threadIdx.x, begin = x.begin(n / ROW, n % ROW * 8);
#pragma unroll
  for (int more = 0; more < ALL; more += THREADS)
    if (ALL % THREADS == 0 || n + more < ALL) f(n + more, x.address(begin, more / ROW, 0));
}
#endif
template <int ROWS, int COLUMNS>
DEVICE void fetch(const half* from, Matrix<COLUMNS> to) {
#ifdef __CUDACC_RTC__
  sixteens<ROWS>(to, [&](unsigned n, unsigned target) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(from + n * 8)
                 : "memory");
  });
#else
  for (int n = 0; n < ROWS * COLUMNS; n++) to.at[to.place(n / COLUMNS, n % COLUMNS)] = from[n];
#endif
}
// The same of M numbers.
template <int M>
DEVICE void fetch(const real* from, real* to) {
#ifdef __CUDACC_RTC__
  if (threadIdx.x >= M / 4) return;
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to + threadIdx.x * 4));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target),
               "l"(from + threadIdx.x * 4)
               : "memory");
#else
  for (int n = 0; n < M; n++) to[n] = from[n];
#endif
}
DEVICE void fetched() {
#ifdef __CUDACC_RTC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
template <int ROWS, int COLUMNS>
DEVICE void keep(Matrix<COLUMNS> from, half* to) {
#ifdef __CUDACC_RTC__
  sixteens<ROWS>(from, [&](unsigned n, unsigned source) {
    int4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(source)
                 : "memory");
    reinterpret_cast<int4*>(to)[n] = x;
  });
#else
  for (int n = 0; n < ROWS * COLUMNS; n++) to[n] = from.at[from.place(n / COLUMNS, n % COLUMNS)];
#endif
}

}  // namespace hope
