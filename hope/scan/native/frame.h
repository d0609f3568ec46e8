// What the memories share of a block: decays, W2's system and keys (hope/scan/closed_form.py), and
// what they send back to it.
#pragma once
#include "memory.h"

namespace hope {

// (I + T)^-1 diag(eta) with T = eta_t ratio[t][s] gram[t][s], as [t][s] and [s][t].
template <class T>
inline void solve_system(const Frame<T>& f, const T* gram, T* solve, T* solve_t) {
  constexpr int L = LANES<T>, N = TOKENS / L;
  Vec<T> inverse[TOKENS][N];
  for (int t = 0; t < TOKENS; t++) {
    alignas(64) T unit[TOKENS] = {};
    unit[t] = 1;
    for (int j = 0; j < N; j++) inverse[t][j] = load(unit + j * L);
    for (int i = 0; i < t; i++) {
      const Vec<T> step = all(f.eta[t] * f.ratio[t * TOKENS + i] * gram[t * TOKENS + i]);
      for (int j = 0; j < N; j++) inverse[t][j] -= step * inverse[i][j];
    }
  }
  for (int t = 0; t < TOKENS; t++)
    for (int j = 0; j < N; j++)
      store(solve + t * TOKENS + j * L, inverse[t][j] * load(f.eta + j * L));
  turn_tokens(TOKENS, solve, TOKENS, solve_t, TOKENS);
}

template <class T>
inline void diagonal_system(const Frame<T>& f, T* solve, T* solve_t) {
  std::memset(solve, 0, sizeof(T) * TOKENS * TOKENS);
  for (int t = 0; t < TOKENS; t++) solve[t * TOKENS + t] = f.eta[t];
  std::memcpy(solve_t, solve, sizeof(T) * TOKENS * TOKENS);
}

// Decays, W2's system and the keys in every form, from kv, eta and log_alpha.
template <class T>
void make_frame(const Call<T>& call, const Sizes& s, bool backward, Frame<T>& f, Work<T>& work) {
  alignas(64) T log_prev[TOKENS], log_end[TOKENS];
  T sum = 0;
  for (int t = 0; t < TOKENS; t++) {
    log_prev[t] = sum;
    sum += f.log_alpha[t];
    log_end[t] = sum;
  }
  f.total[0] = std::exp(sum);
  f.total[1] = -std::expm1(sum);
  for (int t = 0; t < TOKENS; t++) f.lost[t] = -std::expm1(log_prev[t]);
  each<T>([&](int t) {
    store(f.prev + t, exponential<T>(load(log_prev + t)));
    store(f.end + t, exponential<T>(sum - load(log_end + t)));
  });
  for (int t = 0; t < TOKENS; t++) {
    each<T>([&](int j) {
      store(f.ratio + t * TOKENS + j, exponential<T>(log_prev[t] - load(log_end + j)));
    });
    for (int j = t; j < TOKENS; j++) f.ratio[t * TOKENS + j] = 0;
  }
  turn_tokens(TOKENS, f.ratio, TOKENS, f.ratio_t, TOKENS);

  each<T>([&](int t) {
    for (int i = 0; i < s.D; i++)
      store(f.gap + i * TOKENS + t,
            load(f.kv + i * 2 * TOKENS + t) - load(f.kv + (2 * i + 1) * TOKENS + t));
  });
  turn_tokens(s.D, f.kv, 2 * TOKENS, f.kv_rows, s.D);
  if (backward) turn_tokens(s.D, f.kv + TOKENS, 2 * TOKENS, f.kv_rows + TOKENS * s.D, s.D);
  if (!call.w2_written()) return;
  scale_tokens(s.D, f.kv, 2 * TOKENS, f.prev, f.k_prev, TOKENS);
  scale_tokens(s.D, f.kv, 2 * TOKENS, f.end, f.k_end, TOKENS);
  for (int t = 0; t < TOKENS; t++)
    for (int i = 0; i < s.D; i += LANES<T>) {
      const Vec<T> k = load(f.kv_rows + t * s.D + i);
      store(f.k_end_rows + t * s.D + i, k * f.end[t]);
      if (backward) {
        store(f.k_prev_rows + t * s.D + i, k * f.prev[t]);
        store(f.k_lost_rows + t * s.D + i, k * f.lost[t]);
      }
    }
  if (!call.w2_delta()) return diagonal_system(f, f.solve, f.solve_t);
  set_product(TOKENS, TOKENS, s.d, transposed(f.kv, 2 * TOKENS), {f.kv, 2 * TOKENS},
              {work.square[0], TOKENS});
  solve_system(f, work.square[0], f.solve, f.solve_t);
}

// What the memories send back to what they share of a block.
template <class T>
struct FrameGradient {
  T *kv, *query;  // [D][2 TOKENS], [D][TOKENS]
  T *p, *rows;    // [TOKENS]: <dU, U> times eta; what the decay before t multiplies
  T* gram;        // [t][s]: of W2's system, over all memories
  T boundary;     // <dDelta, Delta> behind the block

  static FrameGradient take(Arena& arena, const Sizes& s) {
    const int64_t wide = int64_t(s.D) * TOKENS;
    return {arena.take<T>(2 * wide),        arena.take<T>(wide),
            arena.take<T>(TOKENS),          arena.take<T>(TOKENS),
            arena.take<T>(TOKENS * TOKENS), T(0)};
  }
  void zero(const Sizes& s) {
    std::memset(kv, 0, sizeof(T) * s.D * 2 * TOKENS);
    std::memset(query, 0, sizeof(T) * s.D * TOKENS);
    std::memset(p, 0, sizeof(T) * TOKENS);
    std::memset(rows, 0, sizeof(T) * TOKENS);
    std::memset(gram, 0, sizeof(T) * TOKENS * TOKENS);
    boundary = 0;
  }
};

// both = gram * ratio and its transpose, [t][s]; gram is overwritten.
template <class T>
inline void add_turned(const Frame<T>& f, T* gram, T* both) {
  constexpr int size = TOKENS * TOKENS;
  for (int i = 0; i < size; i += LANES<T>) store(gram + i, load(gram + i) * load(f.ratio + i));
  turn_tokens(TOKENS, gram, TOKENS, both, TOKENS);
  for (int i = 0; i < size; i += LANES<T>) store(both + i, load(both + i) + load(gram + i));
}

// What all memories sent to W2's system: into the keys.
template <class T>
void frame_backward(const Call<T>& call, const Sizes& s, const Frame<T>& f, FrameGradient<T>& grad,
                    Work<T>& work) {
  for (int t = 0; t < TOKENS; t++) grad.p[t] += grad.gram[t * TOKENS + t];
  if (!call.w2_delta()) return;
  T* both = work.square[0];
  add_turned(f, grad.gram, both);
  less_product(s.D, TOKENS, TOKENS, plain(f.kv, 2 * TOKENS), {both, TOKENS}, {grad.kv, 2 * TOKENS},
               {grad.kv, 2 * TOKENS});
}

// d += left right^T over a block's tokens: left [rows][TOKENS], right given as rows of tokens.
template <class T>
inline void add_outer(int rows, int columns, const T* left, T* right_rows, T* d) {
  add_product(rows, columns, TOKENS, plain(left, TOKENS), {right_rows, columns}, {d, columns});
}

}  // namespace hope
