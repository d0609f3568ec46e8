// What a call, a chunk and a block are made of, and where they lie.
//
// A block is up to TOKENS tokens of one memory chunk; lanes behind them have k = v = x = q = 0,
// eta = 0 and alpha = 1, and change nothing. States are Delta = W - base, base being M_0 with decay
// towards the initial state and absent (null) with decay towards zero.
#pragma once
#include "vectors.h"

namespace hope {

enum Rule : int64_t { NORMALISED = 0, INPUT = 1, OFF = 2, TARGET = 3 };
enum Memory { K = 0, V = 1, ETA = 2, ALPHA = 3, MEM = 4, Q = 5 };

// The arguments of a call; hope/scan/native/call.py has the same fields in the same order.
// Strides are in elements, features lie together; the rest is contiguous. Optional ones are null.
template <class T>
struct Call {
  int64_t rows, heads, tokens, width, hidden, memories;
  int64_t memory_chunk, projection_chunk, segment_chunks;
  int64_t rule, initial, causal, threads;
  double eta_max;
  int64_t x_row, x_head, x_token, q_row, q_head, q_token, d_row, d_head, d_token;
  const T *x, *q;                              // [B, N, T, d]
  const T *w1, *w2;                            // [M, N, d, h], [M, N, h, d]
  const T *w_eta, *b_eta, *w_alpha, *b_alpha;  // [N, d], [N]
  const T *state1, *state2;                    // [M, B, N, d, h], [M, B, N, h, d], optional
  const uint8_t* reset;                        // [B, projection chunks], optional
  T *out, *final1, *final2;                    // like x (contiguous), like the states
  T *saved1, *saved2;                          // [segments - 1, M, N, B, ...]; forward: optional
  const T *d_out, *d_final1, *d_final2;        // optional
  T *dx, *dq;                                  // [B, N, T, d]
  T *d_w1, *d_w2, *d_readout, *d_bias;         // [B, M, N, ...], [B, 2, N, d], [B, 2, N]
  T *d_state1, *d_state2;                      // optional
  char* scratch;                               // scratch_bytes a thread
  int64_t scratch_bytes;

  bool w1_delta() const { return rule == NORMALISED || rule == TARGET; }
  bool w2_delta() const { return rule == NORMALISED || rule == INPUT; }
  bool w2_written() const { return rule != TARGET; }
  int64_t chunks() const { return (tokens + projection_chunk - 1) / projection_chunk; }
};

// Memory handed out once, piece by piece; without memory it only counts.
struct Arena {
  char* at;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = at ? reinterpret_cast<T*>(at + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

// Two layers of weights: w1 [D][H] and w2 [H][D], D and H padded.
template <class T>
struct Pair {
  T *w1, *w2;

  static Pair take(Arena& arena, int D, int H) {
    return {arena.take<T>(int64_t(D) * H), arena.take<T>(int64_t(D) * H)};
  }
};

// Sizes: width and hidden as they are (inner lengths of products) and padded (rows and strides).
struct Sizes {
  int d, h, D, H;
};

// What a block's memories share. k and v lie beside each other: kv [D][2 TOKENS].
template <class T>
struct Frame {
  T *x, *q, *source;  // [D][TOKENS]; q: what M_mem is asked; source: M_q's input, if adaptive
  T *kv, *gap;        // [D][2 TOKENS], [D][TOKENS]: k - v
  T *k_prev, *k_end;  // [D][TOKENS]: keys times the decays before and after
  T *kv_rows, *k_end_rows, *k_prev_rows, *k_lost_rows;  // [2 TOKENS][D], [TOKENS][D]
  T *ratio, *ratio_t;                      // [t][s]: A_{t-1} / A_s for s < t, else 0; [s][t]
  T *solve, *solve_t;                      // W2's (I + T)^-1 diag(eta): [t][s], [s][t]
  T *prev, *end, *lost, *eta, *log_alpha;  // [TOKENS]; lost: 1 - prev
  T *z, *z_q;                              // [4][H][TOKENS], [H][TOKENS]: W2 x of what projects
  T *inverse, *rest;  // [3][TOKENS]: one over the lengths of k, v, q; [2][TOKENS]: 1 - sigmoid
  T* total;           // [2]: A_c and 1 - A_c
  int first, count;   // its tokens in the sequence
  bool opens;         // a memory chunk

  static Frame take(Arena& arena, const Sizes& s, bool adaptive) {
    const int64_t wide = int64_t(s.D) * TOKENS, hidden = int64_t(s.H) * TOKENS;
    constexpr int square = TOKENS * TOKENS;
    Frame f;
    f.x = arena.take<T>(wide);
    f.q = arena.take<T>(wide);
    f.source = adaptive ? arena.take<T>(wide) : nullptr;
    f.kv = arena.take<T>(2 * wide);
    f.gap = arena.take<T>(wide);
    f.k_prev = arena.take<T>(wide);
    f.k_end = arena.take<T>(wide);
    f.kv_rows = arena.take<T>(2 * wide);
    f.k_end_rows = arena.take<T>(wide);
    f.k_prev_rows = arena.take<T>(wide);
    f.k_lost_rows = arena.take<T>(wide);
    f.ratio = arena.take<T>(square);
    f.ratio_t = arena.take<T>(square);
    f.solve = arena.take<T>(square);
    f.solve_t = arena.take<T>(square);
    f.prev = arena.take<T>(TOKENS);
    f.end = arena.take<T>(TOKENS);
    f.lost = arena.take<T>(TOKENS);
    f.eta = arena.take<T>(TOKENS);
    f.log_alpha = arena.take<T>(TOKENS);
    f.z = arena.take<T>(4 * hidden);
    f.z_q = adaptive ? arena.take<T>(hidden) : nullptr;
    f.inverse = arena.take<T>(3 * TOKENS);
    f.rest = arena.take<T>(2 * TOKENS);
    f.total = arena.take<T>(2);
    return f;
  }
};

// What backward needs of a block in one memory: the results of products and the Delta before it.
template <class T>
struct Record {
  T* z;        // [H][2 TOKENS]: W2 (k, v)
  T* r;        // [D][TOKENS]
  T* pulled;   // [H][TOKENS]: W1^T r; with `target` [TOKENS]: one over the target's length before
  T *u1, *u2;  // [D][TOKENS], [H][TOKENS]
  T* solve;    // [t][s]: W1's (I + T)^-1 diag(eta)
  Pair<T> delta;

  static Record take(Arena& arena, const Sizes& s, bool with_delta) {
    const int64_t wide = int64_t(s.D) * TOKENS, hidden = int64_t(s.H) * TOKENS;
    Record r;
    r.z = arena.take<T>(2 * hidden);
    r.r = arena.take<T>(wide);
    r.pulled = arena.take<T>(hidden);
    r.u1 = arena.take<T>(wide);
    r.u2 = arena.take<T>(hidden);
    r.solve = arena.take<T>(TOKENS * TOKENS);
    r.delta = with_delta ? Pair<T>::take(arena, s.D, s.H) : Pair<T>{nullptr, nullptr};
    return r;
  }
};

// What backward needs of a block's read of M_mem.
template <class T>
struct Read {
  T *act, *slope;        // [H][TOKENS]
  T *across1, *across2;  // [t][s]: decayed products of W1's and W2's keys with the reads

  static Read take(Arena& arena, const Sizes& s) {
    const int64_t hidden = int64_t(s.H) * TOKENS;
    return {arena.take<T>(hidden), arena.take<T>(hidden), arena.take<T>(TOKENS * TOKENS),
            arena.take<T>(TOKENS * TOKENS)};
  }
};

// Buffers of a block's work, overwritten by the next.
template <class T>
struct Work {
  T* wide[6];     // [D][2 TOKENS] each
  T* hidden[12];  // [H][2 TOKENS] each
  T* square[2];   // [TOKENS][TOKENS] each
  T* features;    // [max(D, H)]

  static Work take(Arena& arena, const Sizes& s) {
    Work w;
    for (T*& z : w.wide) z = arena.take<T>(int64_t(s.D) * 2 * TOKENS);
    for (T*& z : w.hidden) z = arena.take<T>(int64_t(s.H) * 2 * TOKENS);
    for (T*& z : w.square) z = arena.take<T>(TOKENS * TOKENS);
    w.features = arena.take<T>(s.D > s.H ? s.D : s.H);
    return w;
  }
};

// W = base + Delta
template <class T>
inline void freeze(const Sizes& s, Pair<T> delta, Pair<T> base, Pair<T> frozen) {
  const int64_t size = int64_t(s.D) * s.H;
  for (int64_t i = 0; i < size; i += LANES<T>) {
    Vec<T> a = load(delta.w1 + i), b = load(delta.w2 + i);
    if (base.w1) {
      a += load(base.w1 + i);
      b += load(base.w2 + i);
    }
    store(frozen.w1 + i, a);
    store(frozen.w2 + i, b);
  }
}

// to += from
template <class T>
inline void add_pair(const Sizes& s, Pair<T> from, Pair<T> to) {
  freeze(s, from, to, to);
}

template <class T>
inline void zero_pair(const Sizes& s, Pair<T> z) {
  std::memset(z.w1, 0, sizeof(T) * s.D * s.H);
  std::memset(z.w2, 0, sizeof(T) * s.D * s.H);
}

template <class T>
inline void copy_pair(const Sizes& s, Pair<T> from, Pair<T> to) {
  std::memcpy(to.w1, from.w1, sizeof(T) * s.D * s.H);
  std::memcpy(to.w2, from.w2, sizeof(T) * s.D * s.H);
}

// Weights [d, h] and [h, d] of the caller (null: zero) into padded ones, and back.
template <class T>
inline void read_pair(const Sizes& s, const T* w1, const T* w2, Pair<T> to) {
  zero_pair(s, to);
  for (int i = 0; w1 && i < s.d; i++)
    std::memcpy(to.w1 + i * s.H, w1 + int64_t(i) * s.h, sizeof(T) * s.h);
  for (int i = 0; w2 && i < s.h; i++)
    std::memcpy(to.w2 + i * s.D, w2 + int64_t(i) * s.d, sizeof(T) * s.d);
}
template <class T>
inline void write_pair(const Sizes& s, Pair<T> from, T* w1, T* w2) {
  for (int i = 0; i < s.d; i++)
    std::memcpy(w1 + int64_t(i) * s.h, from.w1 + i * s.H, sizeof(T) * s.h);
  for (int i = 0; i < s.h; i++)
    std::memcpy(w2 + int64_t(i) * s.d, from.w2 + i * s.D, sizeof(T) * s.d);
}

// Tokens [count, d] of the caller into [D][TOKENS], padding zero, and back.
template <class T>
inline void read_tokens(const Sizes& s, const T* from, int64_t stride, int count, T* to) {
  if (count == TOKENS && s.d == s.D) return transpose(TOKENS, s.D, from, stride, to, TOKENS);
  std::memset(to, 0, sizeof(T) * s.D * TOKENS);
  for (int t = 0; t < count; t++)
    for (int i = 0; i < s.d; i++) to[i * TOKENS + t] = from[t * stride + i];
}
template <class T>
inline void write_tokens(const Sizes& s, const T* from, int count, T* to) {
  if (count == TOKENS && s.d == s.D) return transpose(s.D, TOKENS, from, TOKENS, to, s.d);
  for (int t = 0; t < count; t++)
    for (int i = 0; i < s.d; i++) to[int64_t(t) * s.d + i] = from[i * TOKENS + t];
}

}  // namespace hope
