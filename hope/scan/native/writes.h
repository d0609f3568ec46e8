// Writing a block into a memory (Eqs. 88, 90; hope/scan/writes.py).
#pragma once
#include "frame.h"

namespace hope {

// W1's keys of a block, from act of its keys [H][TOKENS] (stride 2 TOKENS): e, and with the delta
// term on W1 |act| and one over it (else e = act).
template <class T>
inline void w1_keys(const Call<T>& call, const Sizes& s, const T* act, T* e, T* length,
                    T* inverse) {
  if (call.w1_delta()) {
    inverse_lengths(s.H, act, 2 * TOKENS, inverse, length);
    scale_tokens(s.H, act, 2 * TOKENS, inverse, e, TOKENS);
  } else {
    each<T>([&](int t) {
      for (int i = 0; i < s.H; i++) store(e + i * TOKENS + t, load(act + i * 2 * TOKENS + t));
    });
  }
}

constexpr double STEP_FLOOR = 0.01;  // added to |act|^2 in W1's step

// Write a block into one memory: from record.delta to `next`, which may be the same. W1's keys stay
// in work.hidden[1].
template <class T>
void write(const Call<T>& call, const Sizes& s, const Frame<T>& f, Pair<T> frozen, Pair<T> base,
           Record<T>& record, Pair<T> next, Work<T>& work) {
  T *act = work.hidden[0], *e = work.hidden[1], *slope = work.hidden[2], *gap = work.hidden[3];
  T *g1 = work.wide[0], *scaled = work.hidden[4], *rows = work.hidden[5];
  alignas(64) T length[TOKENS], inverse[TOKENS];
  const Pair<T> delta = record.delta;
  const bool target = call.rule == TARGET;

  set_product(s.H, 2 * TOKENS, s.d, plain(frozen.w2, s.D), {f.kv, 2 * TOKENS},
              {record.z, 2 * TOKENS});
  for (int i = 0; i < s.H; i++)
    each<T>([&](int t) {
      const T* z = record.z + i * 2 * TOKENS + t;
      const Gelu<T> key = gelu<T, 1>(load(z));
      const Vec<T> value = gelu<T, 0>(load(z + TOKENS)).value;
      store(act + i * 2 * TOKENS + t, key.value);
      store(slope + i * TOKENS + t, key.slope);
      store(gap + i * TOKENS + t, target ? value : key.value - value);
    });
  if (target) {
    T* y = work.wide[1];
    sum_product(s.D, TOKENS, s.h, plain(frozen.w1, s.H), {gap, TOKENS}, {y, TOKENS},
                {f.kv + TOKENS, 2 * TOKENS});
    inverse_lengths(s.D, y, TOKENS, record.pulled);
    each<T>([&](int t) {
      const Vec<T> scale = load(record.pulled + t);
      for (int i = 0; i < s.D; i++)
        store(record.r + i * TOKENS + t,
              load(f.kv + i * 2 * TOKENS + t) - load(y + i * TOKENS + t) * scale);
    });
  } else {
    sum_product(s.D, TOKENS, s.h, plain(frozen.w1, s.H), {gap, TOKENS}, {record.r, TOKENS},
                {f.gap, TOKENS});
    set_product(s.H, TOKENS, s.d, transposed(frozen.w1, s.H), {record.r, TOKENS},
                {record.pulled, TOKENS});
  }

  w1_keys(call, s, act, e, length, inverse);
  if (call.w1_delta()) {
    alignas(64) T step[TOKENS];
    for (int t = 0; t < TOKENS; t++) step[t] = length[t] / (length[t] * length[t] + T(STEP_FLOOR));
    scale_tokens(s.D, record.r, TOKENS, step, g1, TOKENS);
    if (base.w1) add_product(s.D, TOKENS, s.h, plain(base.w1, s.H), {e, TOKENS}, {g1, TOKENS});
    scale_tokens(s.H, e, TOKENS, f.prev, scaled, TOKENS);
    add_product(s.D, TOKENS, s.h, plain(delta.w1, s.H), {scaled, TOKENS}, {g1, TOKENS});
    set_product(TOKENS, TOKENS, s.h, transposed(e, TOKENS), {e, TOKENS}, {work.square[0], TOKENS});
    solve_system(f, work.square[0], record.solve, work.square[1]);
  } else {
    std::memcpy(g1, record.r, sizeof(T) * s.D * TOKENS);
    diagonal_system(f, record.solve, work.square[1]);
  }
  set_product(s.D, TOKENS, TOKENS, plain(g1, TOKENS), {work.square[1], TOKENS},
              {record.u1, TOKENS});
  if (call.w2_written()) {
    T* g2 = slope;
    for (int i = 0; i < s.H * TOKENS; i += LANES<T>)
      store(g2 + i, load(slope + i) * load(record.pulled + i));
    if (call.w2_delta()) {
      if (base.w2)
        add_product(s.H, TOKENS, s.d, plain(base.w2, s.D), {f.kv, 2 * TOKENS}, {g2, TOKENS});
      add_product(s.H, TOKENS, s.d, plain(delta.w2, s.D), {f.k_prev, TOKENS}, {g2, TOKENS});
    }
    set_product(s.H, TOKENS, TOKENS, plain(g2, TOKENS), {f.solve_t, TOKENS}, {record.u2, TOKENS});
  }
  if (!next.w1) return;
  turn_tokens(s.H, e, TOKENS, rows, s.H, f.end);
  less_product(s.D, s.H, TOKENS, plain(record.u1, TOKENS), {rows, s.H}, {next.w1, s.H},
               {delta.w1, s.H}, f.total[0]);
  if (call.w2_written()) {
    less_product(s.H, s.D, TOKENS, plain(record.u2, TOKENS), {f.k_end_rows, s.D}, {next.w2, s.D},
                 {delta.w2, s.D}, f.total[0]);
  } else {
    for (int64_t i = 0; i < int64_t(s.D) * s.H; i += LANES<T>)
      store(next.w2 + i, load(delta.w2 + i) * f.total[0]);
  }
}

}  // namespace hope
