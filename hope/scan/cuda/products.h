// Matrix products of operands in shared memory, into Fragments.
#pragma once
#include "block.h"

namespace hope {

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

// Where rows i..i+15 of a left operand begin for the thread, and from there its columns k..k+15 as
// mma.sync takes them; k is known when compiled.
template <int N>
DEVICE unsigned left_begin(Matrix<N> of, unsigned i) {
  return of.begin(i + lane() % 16, lane() / 16 * 8);
}
template <int N>
DEVICE unsigned left_begin(Turned<N> x, unsigned i) {
  return x.of.begin(lane() % 8 + lane() / 16 * 8, i + lane() / 8 % 2 * 8);
}
template <int N>
DEVICE unsigned left_begin(Scaled<N> x, unsigned i) {
  return left_begin(Turned<N>{x.of}, i);
}
template <int N>
DEVICE void left(unsigned (&a)[4], Matrix<N> of, unsigned begin, int k) {
  load4(a, of.address(begin, 0, k));
}
template <int N>
DEVICE void left(unsigned (&a)[4], Turned<N> x, unsigned begin, int k) {
  load4_turned(a, x.of.address(begin, k, 0));
}
template <int N>
DEVICE void left(unsigned (&a)[4], Scaled<N> x, unsigned begin, int k) {
  left(a, Turned<N>{x.of}, begin, k);
  const float* factor = x.factor + k + lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const float2 f = *reinterpret_cast<const float2*>(factor + n / 2 * 8);
    a[n] = packed(__uint_as_float(a[n] << 16) * f.x, __uint_as_float(a[n] & 0xffff0000u) * f.y);
  }
}

// The same of columns from j on of a right operand, and from there of k..k+15 and columns `more` to
// more + 15 further: two tiles of 8 columns, registers 0 and 1, 2 and 3, or one in registers 0
// and 1. k and more are known when compiled.
template <int N>
DEVICE unsigned right_begin(Matrix<N> of, unsigned j, bool pair) {
  return of.begin(lane() % 16, pair ? j + lane() / 16 * 8 : j);
}
template <int N>
DEVICE unsigned right_begin(Turned<N> x, unsigned j, bool pair) {
  return x.of.begin(pair ? j + lane() % 8 + lane() / 16 * 8 : j + lane() % 8, lane() / 8 % 2 * 8);
}
template <int N>
DEVICE void right(unsigned (&b)[4], Matrix<N> of, unsigned begin, int k, int more) {
  load4_turned(b, of.address(begin, k, more));
}
template <int N>
DEVICE void right(unsigned (&b)[4], Turned<N> x, unsigned begin, int k, int more) {
  load4(b, x.of.address(begin, more, k));
}
template <int N>
DEVICE void right8(unsigned (&b)[4], Matrix<N> of, unsigned begin, int k) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(of.address(begin, k, 0)));
}
template <int N>
DEVICE void right8(unsigned (&b)[4], Turned<N> x, unsigned begin, int k) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(x.of.address(begin, 0, k)));
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
  const unsigned from_left = left_begin(a, P::row());
  const unsigned from_right = right_begin(b, P::column(), P::TILES > 1);
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    unsigned l[4], r[4];
    left(l, a, from_left, k);
    if constexpr (P::TILES == 1) {
      right8(r, b, from_right, k);
      mma(c.v, l, r[0], r[1]);
    } else {
#pragma unroll
      for (int tile = 0; tile < P::TILES; tile += 2) {
        right(r, b, from_right, k, 8 * tile);
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
}  // namespace hope
