// Unit triangular systems: each is inverted by one warp, in float32 but for the products that join
// its two halves, whose operands have two parts.
#pragma once
#include "products.h"

namespace hope {

// What a system of C rows lies in before it is inverted: rows of so many numbers, and room for it.
template <int C>
struct Triangle {
  static constexpr int ROW = C + 4, COLUMN = 20;  // eight rows' numbers lie in different banks
  static constexpr int size = C * ROW, room = C * COLUMN;
};

#ifdef __CUDACC_RTC__
// A left operand [16, 16] in two parts, of element (i, j) at from[i * DOWN + j * ACROSS]. Registers
// 0 and 2, 1 and 3 are right operands of 8 columns of its transpose.
struct Parts {
  unsigned high[4], low[4];

  DEVICE void set(int n, float a, float b) {
    high[n] = packed(a, b);
    low[n] = packed(a - __uint_as_float(high[n] << 16), b - __uint_as_float(high[n] & 0xffff0000u));
  }
};
template <int DOWN, int ACROSS>
DEVICE Parts parts(const float* from) {
  Parts x;
  from += lane() / 4 * DOWN + lane() % 4 * 2 * ACROSS;
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const float* two = from + n % 2 * 8 * DOWN + n / 2 * 8 * ACROSS;
    x.set(n, two[0], two[ACROSS]);
  }
  return x;
}
// c [16, 16] = a b^T.
DEVICE void product(real (&c)[8], const Parts& a, const Parts& b) {
#pragma unroll
  for (int e = 0; e < 8; e++) c[e] = 0.0f;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    mma(c + 4 * n, a.high, b.low[n], b.low[n + 2]);
    mma(c + 4 * n, a.low, b.high[n], b.high[n + 2]);
    mma(c + 4 * n, a.high, b.high[n], b.high[n + 2]);
  }
}
// Rows and columns of 16 from (first, left) on, as a left operand lies in registers.
template <int C>
DEVICE void store_part(Split<C> to, const Parts& x, int first, int left) {
  const unsigned begin = to.high.begin(lane() / 4, lane() % 4 * 2);
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const int down = first + n % 2 * 8, across = left + n / 2 * 8;
    store(to.high.address(begin, down, across), x.high[n]);
    store(to.low.address(begin, down, across), x.low[n]);
  }
}
// The same in float32, [C, C].
template <int C, class F>
DEVICE void write_part(real* to, F f, int first, int left) {
  to += (first + lane() / 4) * C + left + lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < 4; n++)
    *reinterpret_cast<float2*>(to + n % 2 * 8 * C + n / 2 * 8) =
        make_float2(f(2 * n), f(2 * n + 1));
}
#endif

// (I + strict)^-1 of a strictly lower [C, C] by warp number `which`, into `to` and, where there is
// one, `kept` [C, C] in global memory.
template <int C>
DEVICE void invert(int which, const real* strict, real* room, Split<C> to, real* kept) {
  static_assert(C == 16 || C == 32);
  using T = Triangle<C>;
#ifdef __CUDACC_RTC__
  if (!whole_warp(warp() == unsigned(which))) return;
  // The blocks of 16 on the diagonal, a column of one by each lane; transposed in `room`.
  if (lane() < C) {
    const unsigned column = lane() % 16, first = lane() / 16 * 16;
    const real* row = strict + first * T::ROW + first;
    real x[16];
#pragma unroll
    for (int t = 0; t < 16; t++) {
      x[t] = t == column;
#pragma unroll
      for (int s = 0; s < t; s++) x[t] -= row[t * T::ROW + s] * x[s];
    }
    float4* own = reinterpret_cast<float4*>(room + lane() * T::COLUMN);
#pragma unroll
    for (int t = 0; t < 16; t += 4) own[t / 4] = make_float4(x[t], x[t + 1], x[t + 2], x[t + 3]);
  }
  __syncwarp();
#pragma unroll
  for (int first = 0; first < C; first += 16) {
    const real* own = room + first * T::COLUMN;
    store_part<C>(to, parts<1, T::COLUMN>(own), first, first);
    if (kept) {
      own += lane() / 4 + lane() % 4 * 2 * T::COLUMN;
      write_part<C>(
          kept, [&](int e) { return own[e / 2 % 2 * 8 + (e / 4 * 8 + e % 2) * T::COLUMN]; }, first,
          first);
    }
  }
  if constexpr (C == 32) {
    // - D2 S D1, where D1 and D2 are those blocks and S is the one below.
    real turned[8], below[8];
    product(turned, parts<T::COLUMN, 1>(room), parts<T::ROW, 1>(strict + 16 * T::ROW));
    Parts middle, left, none = {};
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int e = n / 2 * 4 + n % 2 * 2;
      middle.set(n, turned[e], turned[e + 1]);
    }
    product(below, parts<1, T::COLUMN>(room + 16 * T::COLUMN), middle);
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int e = n / 2 * 4 + n % 2 * 2;
      left.set(n, -below[e], -below[e + 1]);
    }
    store_part<C>(to, left, 16, 0);
    store_part<C>(to, none, 0, 16);
    if (kept) {
      write_part<C>(kept, [&](int e) { return -below[e / 4 * 4 + e / 2 % 2 * 2 + e % 2]; }, 16, 0);
      write_part<C>(kept, [&](int) { return 0.0f; }, 0, 16);
    }
  }
#else
  for (int column = 0; column < C; column++) {
    real x[C];
    for (int t = 0; t < C; t++) {
      x[t] = t == column;
      for (int s = 0; s < t; s++) x[t] -= strict[t * T::ROW + s] * x[s];
      const auto place = to.high.place(t, column);
      to.high.at[place] = rounded(x[t]);
      to.low.at[place] = rounded(x[t] - number(to.high.at[place]));
      if (kept) kept[t * C + column] = x[t];
    }
  }
#endif
}

}  // namespace hope
