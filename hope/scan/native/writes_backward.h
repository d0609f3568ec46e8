// The derivative of writing a block, derived by hand (hope/scan/writes_backward.py).
//
// Gradients of states are of W; those of the base are of M_0 at fixed W: what decay gives to it.
#pragma once
#include "reads.h"
#include "writes.h"

namespace hope {

// <a, b> over all weights; to += factor a where `to` is there.
template <class T>
inline T boundary_dot(int64_t size, const T* a, const T* b, T factor, T* to) {
  Vec<T> sum[4] = {};
  for (int64_t i = 0; i < size; i += 4 * LANES<T>)
    for (int j = 0; j < 4; j++) {
      const int64_t at = i + j * LANES<T>;
      const Vec<T> left = load(a + at);
      sum[j] += left * load(b + at);
      if (to) store(to + at, load(to + at) + factor * left);
    }
  const Vec<T> whole = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  T result = 0;
  for (int i = 0; i < LANES<T>; i++) result += whole[i];
  return result;
}

// The activations of a block that is gone through backward, from its record.
template <class T>
struct Hidden {
  T *act, *slope, *curvature;  // of keys and values [H][2 TOKENS]; curvature [H][TOKENS] of keys
  T* e;                        // W1's keys [H][TOKENS]
  T *length, *inverse;         // [TOKENS]
};

template <class T>
inline Hidden<T> hidden_again(const Call<T>& call, const Sizes& s, const Record<T>& record,
                              T* length, T* inverse, Work<T>& work) {
  Hidden<T> h = {work.hidden[0], work.hidden[2], work.hidden[6], work.hidden[1], length, inverse};
  for (int i = 0; i < s.H; i++)
    each<T>([&](int t) {
      const int64_t at = i * 2 * TOKENS + t;
      const Gelu<T> key = gelu<T, 2>(load(record.z + at));
      const Gelu<T> value = gelu<T, 1>(load(record.z + at + TOKENS));
      store(h.act + at, key.value);
      store(h.act + at + TOKENS, value.value);
      store(h.slope + at, key.slope);
      store(h.slope + at + TOKENS, value.slope);
      store(h.curvature + i * TOKENS + t, key.curvature);
    });
  w1_keys(call, s, h.act, h.e, h.length, h.inverse);
  return h;
}

// Through the frozen terms of a block: from dr1 [D][TOKENS], dr2 and de [H][TOKENS] (overwritten)
// to the frozen W (added to d_frozen) and to keys and values.
template <class T>
void frozen_backward(const Call<T>& call, const Sizes& s, const Frame<T>& f,
                     const Record<T>& record, const Hidden<T>& h, Pair<T> frozen, T* dr1, T* dr2,
                     T* de, Pair<T> d_frozen, T* rows, FrameGradient<T>& grad, Work<T>& work) {
  constexpr int two = 2 * TOKENS;
  T *dz = work.hidden[7], *d_act = work.hidden[8], *both_rows = work.hidden[9];
  T* right = work.hidden[10];
  T* both = work.wide[4];  // [D][2 TOKENS]: r and dr, or the target's gradient
  if (call.w1_delta()) {
    alignas(64) T d_step[TOKENS] = {}, step[TOKENS], along[TOKENS];
    add_dots(s.D, dr1, TOKENS, record.r, TOKENS, d_step);
    for (int t = 0; t < TOKENS; t++) {
      const T floor = h.length[t] * h.length[t] + T(STEP_FLOOR);
      step[t] = h.length[t] / floor;
      rows[t] += d_step[t] * step[t];
      along[t] = d_step[t] * (T(2 * STEP_FLOOR) - floor) / (floor * floor);
      // e is act / max(|act|, NORM_EPS), and |act| has the gradient act / |act|.
      if (h.length[t] < T(NORM_EPS) && h.length[t] > 0) along[t] *= T(NORM_EPS) / h.length[t];
    }
    scale_tokens(s.D, dr1, TOKENS, step, dr1, TOKENS);
    unit_backward(s.H, de, TOKENS, h.e, TOKENS, h.inverse, de, TOKENS);
    each<T>([&](int t) {
      const Vec<T> a = load(along + t);
      for (int i = 0; i < s.H; i++)
        store(de + i * TOKENS + t, load(de + i * TOKENS + t) + load(h.e + i * TOKENS + t) * a);
    });
  } else {
    add_dots(s.D, dr1, TOKENS, record.r, TOKENS, rows);
  }

  T* d_value = both;  // [D][TOKENS], stride two
  if (call.rule == TARGET) {
    T* unit = work.wide[5];
    each<T>([&](int t) {
      for (int i = 0; i < s.D; i++)
        store(unit + i * TOKENS + t, load(f.kv + i * two + t) - load(record.r + i * TOKENS + t));
    });
    unit_backward(s.D, dr1, TOKENS, unit, TOKENS, record.pulled, d_value, two);
    each<T>([&](int t) {
      for (int i = 0; i < s.D; i++) store(d_value + i * two + t, -load(d_value + i * two + t));
    });
    turn_tokens(s.H, h.act + TOKENS, two, both_rows, s.H);
    add_product(s.D, s.H, TOKENS, plain(d_value, two), {both_rows, s.H}, {d_frozen.w1, s.H});
    set_product(s.H, TOKENS, s.d, transposed(frozen.w1, s.H), {d_value, two}, {d_act, TOKENS});
    for (int i = 0; i < s.H; i++)
      each<T>([&](int t) {
        const int64_t at = i * two + t, own = i * TOKENS + t;
        store(dz + at, load(de + own) * load(h.slope + at));
        store(dz + at + TOKENS, load(d_act + own) * load(h.slope + at + TOKENS));
      });
  } else {
    each<T>([&](int t) {
      Vec<T> sum = load(rows + t);
      for (int i = 0; i < s.H; i++) {
        const int64_t at = i * two + t, own = i * TOKENS + t;
        const Vec<T> through = load(dr2 + own) * load(record.pulled + own);
        sum += through * load(h.slope + at);
        store(dz + at, through * load(h.curvature + own));
        store(dr2 + own, load(dr2 + own) * load(h.slope + at));
        store(right + own, load(h.act + at) - load(h.act + at + TOKENS));
      }
      store(rows + t, sum);
    });
    add_product(s.D, TOKENS, s.h, plain(frozen.w1, s.H), {dr2, TOKENS}, {dr1, TOKENS});
    each<T>([&](int t) {
      for (int i = 0; i < s.D; i++) {
        store(both + i * two + t, load(record.r + i * TOKENS + t));
        store(both + i * two + TOKENS + t, load(dr1 + i * TOKENS + t));
      }
    });
    d_value = both + TOKENS;  // its negative, see below
    turn_tokens(s.H, dr2, TOKENS, both_rows, s.H);
    turn_tokens(s.H, right, TOKENS, both_rows + TOKENS * s.H, s.H);
    add_product(s.D, s.H, two, plain(both, two), {both_rows, s.H}, {d_frozen.w1, s.H});
    set_product(s.H, TOKENS, s.d, transposed(frozen.w1, s.H), {dr1, TOKENS}, {d_act, TOKENS});
    for (int i = 0; i < s.H; i++)
      each<T>([&](int t) {
        const int64_t at = i * two + t, own = i * TOKENS + t;
        const Vec<T> d = load(d_act + own);
        store(dz + at, load(dz + at) + (load(de + own) + d) * load(h.slope + at));
        store(dz + at + TOKENS, -d * load(h.slope + at + TOKENS));
      });
  }
  add_product(s.H, s.D, two, plain(dz, two), {f.kv_rows, s.D}, {d_frozen.w2, s.D});
  add_product(s.D, two, s.h, transposed(frozen.w2, s.D), {dz, two}, {grad.kv, two});
  const T sign = call.rule == TARGET ? T(1) : T(-1);
  each<T>([&](int t) {
    for (int i = 0; i < s.D; i++) {
      T* d = grad.kv + i * two + t;
      store(d, load(d) + load(dr1 + i * TOKENS + t));
      store(d + TOKENS, load(d + TOKENS) + sign * load(d_value + i * two + t));
    }
  });
}

// Derivative of `write`, and of `read_causal` where there was one, whose gradient is d_out:
// d_state, of the state behind the block (whose Delta is `after`), becomes that of the state before
// it.
template <class T>
void write_backward(const Call<T>& call, const Sizes& s, const Frame<T>& f, Pair<T> frozen,
                    Pair<T> base, const Record<T>& record, Pair<T> after, const Read<T>* read,
                    T* d_out, const ReadGradient<T>& from_read, Pair<T> d_state, Pair<T> d_frozen,
                    Pair<T> d_base, FrameGradient<T>& grad, Work<T>& work) {
  alignas(64) T length[TOKENS], inverse[TOKENS], rows[TOKENS] = {};
  const Hidden<T> h = hidden_again(call, s, record, length, inverse, work);
  T *scaled = work.hidden[3], *turned = work.hidden[4], *de = work.hidden[5];
  T *du2 = work.hidden[9], *dr2 = work.hidden[11], *own = work.hidden[10];
  T *du1 = work.wide[0], *dr1 = work.wide[1], *narrow = work.wide[2];
  T *gram = work.square[0], *both = work.square[1];
  const Pair<T> delta = record.delta;
  const int64_t size = int64_t(s.D) * s.H;

  if (read)
    read_causal_backward(call, s, f, base, record, h.e, *read, d_out, d_base, grad, from_read,
                         work);
  grad.boundary +=
      boundary_dot(size, d_state.w1, after.w1, f.total[1], base.w1 ? d_base.w1 : nullptr);
  grad.boundary +=
      boundary_dot(size, d_state.w2, after.w2, f.total[1], base.w2 ? d_base.w2 : nullptr);

  // The U of the block, then through the triangular systems to their right-hand sides.
  scale_tokens(s.H, h.e, TOKENS, f.end, scaled, TOKENS);
  minus_product(s.D, TOKENS, s.h, plain(d_state.w1, s.H), {scaled, TOKENS}, {du1, TOKENS});
  if (read) add_rows(s.D, from_read.u1, TOKENS, du1, TOKENS);
  set_product(s.D, TOKENS, TOKENS, plain(du1, TOKENS), {record.solve, TOKENS}, {dr1, TOKENS});
  set_product(TOKENS, TOKENS, s.d, transposed(dr1, TOKENS), {record.u1, TOKENS}, {gram, TOKENS});
  for (int t = 0; t < TOKENS; t++) grad.p[t] += gram[t * TOKENS + t];
  scale_tokens(s.D, record.u1, TOKENS, f.end, narrow, TOKENS);
  minus_product(s.H, TOKENS, s.d, transposed(d_state.w1, s.H), {narrow, TOKENS}, {de, TOKENS});
  if (call.w1_delta()) {
    scale_tokens(s.D, dr1, TOKENS, f.prev, narrow, TOKENS);
    add_product(s.H, TOKENS, s.d, transposed(delta.w1, s.H), {narrow, TOKENS}, {de, TOKENS});
    add_turned(f, gram, both);
    less_product(s.H, TOKENS, TOKENS, plain(h.e, TOKENS), {both, TOKENS}, {de, TOKENS},
                 {de, TOKENS});
  }
  if (read) add_rows(s.H, from_read.e, TOKENS, de, TOKENS);

  if (call.w2_written()) {
    minus_product(s.H, TOKENS, s.d, plain(d_state.w2, s.D), {f.k_end, TOKENS}, {du2, TOKENS});
    if (read) add_rows(s.H, from_read.u2, TOKENS, du2, TOKENS);
    set_product(s.H, TOKENS, TOKENS, plain(du2, TOKENS), {f.solve, TOKENS}, {dr2, TOKENS});
    add_product(TOKENS, TOKENS, s.h, transposed(dr2, TOKENS), {record.u2, TOKENS},
                {grad.gram, TOKENS});
    scale_tokens(s.H, record.u2, TOKENS, f.end, scaled, TOKENS);
    less_product(s.D, TOKENS, s.h, transposed(d_state.w2, s.D), {scaled, TOKENS},
                 {grad.kv, 2 * TOKENS}, {grad.kv, 2 * TOKENS});
    if (call.w2_delta()) {
      scale_tokens(s.H, dr2, TOKENS, f.prev, scaled, TOKENS);
      add_product(s.D, TOKENS, s.h, transposed(delta.w2, s.D), {scaled, TOKENS},
                  {grad.kv, 2 * TOKENS});
    }
  }

  // The state before the block.
  const auto decay = [&](T* d) {
    for (int64_t i = 0; i < size; i += LANES<T>) store(d + i, load(d + i) * f.total[0]);
  };
  if (call.w1_delta()) {
    turn_tokens(s.H, h.e, TOKENS, turned, s.H, f.prev);
    sum_product(s.D, s.H, TOKENS, plain(dr1, TOKENS), {turned, s.H}, {d_state.w1, s.H},
                {d_state.w1, s.H}, f.total[0]);
    if (base.w1) {
      turn_tokens(s.H, h.e, TOKENS, turned, s.H, f.lost);
      add_outer(s.D, s.H, dr1, turned, d_base.w1);
      set_product(s.H, TOKENS, s.d, transposed(base.w1, s.H), {dr1, TOKENS}, {own, TOKENS});
      add_rows(s.H, own, TOKENS, de, TOKENS);
      add_dots(s.H, own, TOKENS, h.e, TOKENS, rows);
    }
  } else {
    decay(d_state.w1);
  }
  if (call.w2_delta()) {
    sum_product(s.H, s.D, TOKENS, plain(dr2, TOKENS), {f.k_prev_rows, s.D}, {d_state.w2, s.D},
                {d_state.w2, s.D}, f.total[0]);
    if (base.w2) {
      add_outer(s.H, s.D, dr2, f.k_lost_rows, d_base.w2);
      set_product(s.D, TOKENS, s.h, transposed(base.w2, s.D), {dr2, TOKENS}, {narrow, TOKENS});
      add_rows(s.D, narrow, TOKENS, grad.kv, 2 * TOKENS);
      add_dots(s.D, narrow, TOKENS, f.kv, 2 * TOKENS, rows);
    }
  } else {
    decay(d_state.w2);
  }
  if (read) {
    add_outer(s.D, s.H, d_out, from_read.act_rows, d_state.w1);
    add_outer(s.H, s.D, from_read.dz, from_read.q_rows, d_state.w2);
  }
  frozen_backward(call, s, f, record, h, frozen, dr1, dr2, de, d_frozen, rows, grad, work);
  for (int t = 0; t < TOKENS; t++) grad.rows[t] -= rows[t];
}

}  // namespace hope
