// Reading M_mem for a block, and the derivative (Eqs. 83, 90; hope/scan/reads.py).
#pragma once
#include "frame.h"

namespace hope {

// M_mem of each token's predecessor applied to its query: out [D][TOKENS] (Eq. 83). delta: M_mem's
// before the block, which is written already (its keys in e).
template <class T>
void read_causal(const Call<T>& call, const Sizes& s, const Frame<T>& f, Pair<T> base,
                 Pair<T> delta, const Record<T>& record, const T* e, Read<T>& read, T* out,
                 Work<T>& work) {
  T *q_prev = work.wide[0], *act_prev = work.hidden[0], *z = work.hidden[2];
  T* across = work.square[0];
  scale_tokens(s.D, f.q, TOKENS, f.prev, q_prev, TOKENS);
  set_product(s.H, TOKENS, s.d, plain(delta.w2, s.D), {q_prev, TOKENS}, {z, TOKENS});
  if (base.w2) add_product(s.H, TOKENS, s.d, plain(base.w2, s.D), {f.q, TOKENS}, {z, TOKENS});
  const auto decayed = [&](const T* keys, int stride, int inner, const T* asked, T* kept) {
    set_product(TOKENS, TOKENS, inner, transposed(keys, stride), {const_cast<T*>(asked), TOKENS},
                {across, TOKENS});
    for (int i = 0; i < TOKENS * TOKENS; i += LANES<T>)
      store(across + i, load(across + i) * load(f.ratio_t + i));
    turn_tokens(TOKENS, across, TOKENS, kept, TOKENS);
  };
  if (call.w2_written()) {
    decayed(f.kv, 2 * TOKENS, s.d, f.q, read.across2);
    less_product(s.H, TOKENS, TOKENS, plain(record.u2, TOKENS), {across, TOKENS}, {z, TOKENS},
                 {z, TOKENS});
  }
  for (int i = 0; i < s.H * TOKENS; i += LANES<T>) {
    const Gelu<T> g = gelu<T, 1>(load(z + i));
    store(read.act + i, g.value);
    store(read.slope + i, g.slope);
  }
  scale_tokens(s.H, read.act, TOKENS, f.prev, act_prev, TOKENS);
  sum_product(s.D, TOKENS, s.h, plain(delta.w1, s.H), {act_prev, TOKENS}, {out, TOKENS},
              {f.q, TOKENS});
  if (base.w1)
    add_product(s.D, TOKENS, s.h, plain(base.w1, s.H), {read.act, TOKENS}, {out, TOKENS});
  decayed(e, TOKENS, s.h, read.act, read.across1);
  less_product(s.D, TOKENS, TOKENS, plain(record.u1, TOKENS), {across, TOKENS}, {out, TOKENS},
               {out, TOKENS});
}

// M_mem of the memory chunk's start applied to the queries: out [D][TOKENS] (Eq. 90).
template <class T>
void read_start(const Sizes& s, const Frame<T>& f, Pair<T> frozen, Read<T>& read, T* out,
                Work<T>& work) {
  T* z = work.hidden[2];
  set_product(s.H, TOKENS, s.d, plain(frozen.w2, s.D), {f.q, TOKENS}, {z, TOKENS});
  for (int i = 0; i < s.H * TOKENS; i += LANES<T>) {
    const Gelu<T> g = gelu<T, 1>(load(z + i));
    store(read.act + i, g.value);
    store(read.slope + i, g.slope);
  }
  sum_product(s.D, TOKENS, s.h, plain(frozen.w1, s.H), {read.act, TOKENS}, {out, TOKENS},
              {f.q, TOKENS});
}

// What a causal read sends back into the block of M_mem that it read.
template <class T>
struct ReadGradient {
  T *u1, *u2, *e;             // [D][TOKENS], [H][TOKENS], [H][TOKENS]
  T *dz, *act_rows, *q_rows;  // [H][TOKENS]; [TOKENS][H], [TOKENS][D], decayed: of the state

  static ReadGradient take(Arena& arena, const Sizes& s) {
    const int64_t hidden = int64_t(s.H) * TOKENS, wide = int64_t(s.D) * TOKENS;
    return {arena.take<T>(wide),   arena.take<T>(hidden), arena.take<T>(hidden),
            arena.take<T>(hidden), arena.take<T>(hidden), arena.take<T>(wide)};
  }
};

// From d_out [D][TOKENS] of `read_causal`: into the query and the keys, and what `into` names;
// gradients of the base are added to d_base.
template <class T>
void read_causal_backward(const Call<T>& call, const Sizes& s, const Frame<T>& f, Pair<T> base,
                          const Record<T>& record, const T* e, const Read<T>& read, T* d_out,
                          Pair<T> d_base, FrameGradient<T>& grad, const ReadGradient<T>& into,
                          Work<T>& work) {
  T *d_act = work.hidden[3], *dz = into.dz, *rows = work.hidden[4];
  T *dq = work.wide[0], *across = work.square[0], *across_t = work.square[1];
  const Pair<T> delta = record.delta;
  // -(grad of read . U) ratio, as [s][t] in across_t and [t][s] in across.
  const auto decayed = [&](const T* u, int inner, T* asked) {
    minus_product(TOKENS, TOKENS, inner, transposed(u, TOKENS), {asked, TOKENS},
                  {across_t, TOKENS});
    for (int i = 0; i < TOKENS * TOKENS; i += LANES<T>)
      store(across_t + i, load(across_t + i) * load(f.ratio_t + i));
    turn_tokens(TOKENS, across_t, TOKENS, across, TOKENS);
  };

  set_product(s.H, TOKENS, s.d, transposed(delta.w1, s.H), {d_out, TOKENS}, {d_act, TOKENS});
  scale_tokens(s.H, d_act, TOKENS, f.prev, d_act, TOKENS);
  decayed(record.u1, s.d, d_out);
  add_product(s.H, TOKENS, TOKENS, plain(e, TOKENS), {across_t, TOKENS}, {d_act, TOKENS});
  add_dots(s.H, d_act, TOKENS, read.act, TOKENS, grad.rows);
  set_product(s.H, TOKENS, TOKENS, plain(read.act, TOKENS), {across, TOKENS}, {into.e, TOKENS});
  minus_product(s.D, TOKENS, TOKENS, plain(d_out, TOKENS), {read.across1, TOKENS},
                {into.u1, TOKENS});
  turn_tokens(s.H, read.act, TOKENS, into.act_rows, s.H, f.prev);
  if (base.w1) {
    add_product(s.H, TOKENS, s.d, transposed(base.w1, s.H), {d_out, TOKENS}, {d_act, TOKENS});
    turn_tokens(s.H, read.act, TOKENS, rows, s.H, f.lost);
    add_outer(s.D, s.H, d_out, rows, d_base.w1);
  }

  for (int i = 0; i < s.H * TOKENS; i += LANES<T>)
    store(dz + i, load(d_act + i) * load(read.slope + i));
  set_product(s.D, TOKENS, s.h, transposed(delta.w2, s.D), {dz, TOKENS}, {dq, TOKENS});
  scale_tokens(s.D, dq, TOKENS, f.prev, dq, TOKENS);
  if (call.w2_written()) {
    decayed(record.u2, s.h, dz);
    add_product(s.D, TOKENS, TOKENS, plain(f.kv, 2 * TOKENS), {across_t, TOKENS}, {dq, TOKENS});
    add_product(s.D, TOKENS, TOKENS, plain(f.q, TOKENS), {across, TOKENS}, {grad.kv, 2 * TOKENS});
    minus_product(s.H, TOKENS, TOKENS, plain(dz, TOKENS), {read.across2, TOKENS},
                  {into.u2, TOKENS});
  }
  add_dots(s.D, dq, TOKENS, f.q, TOKENS, grad.rows);
  turn_tokens(s.D, f.q, TOKENS, into.q_rows, s.D, f.prev);
  if (base.w2) {
    add_product(s.D, TOKENS, s.h, transposed(base.w2, s.D), {dz, TOKENS}, {dq, TOKENS});
    turn_tokens(s.D, f.q, TOKENS, rows, s.D, f.lost);
    add_outer(s.H, s.D, dz, rows, d_base.w2);
  }
  add_rows(s.D, dq, TOKENS, grad.query, TOKENS);
  add_rows(s.D, d_out, TOKENS, grad.query, TOKENS);
}

// From d_out [D][TOKENS] of `read_start`.
template <class T>
void read_start_backward(const Sizes& s, const Frame<T>& f, Pair<T> frozen, const Read<T>& read,
                         T* d_out, Pair<T> d_frozen, FrameGradient<T>& grad, Work<T>& work) {
  T *dz = work.hidden[4], *rows = work.hidden[5];
  set_product(s.H, TOKENS, s.d, transposed(frozen.w1, s.H), {d_out, TOKENS}, {dz, TOKENS});
  for (int i = 0; i < s.H * TOKENS; i += LANES<T>)
    store(dz + i, load(dz + i) * load(read.slope + i));
  turn_tokens(s.H, read.act, TOKENS, rows, s.H);
  add_outer(s.D, s.H, d_out, rows, d_frozen.w1);
  turn_tokens(s.D, f.q, TOKENS, rows, s.D);
  add_outer(s.H, s.D, dz, rows, d_frozen.w2);
  sum_product(s.D, TOKENS, s.h, transposed(frozen.w2, s.D), {dz, TOKENS}, {grad.query, TOKENS},
              {d_out, TOKENS});
}

}  // namespace hope
