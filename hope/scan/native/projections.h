// What the projection memories make of a block: k, v, eta, alpha (and q), Eqs. 83-86, and the
// derivative (hope/scan/projections.py).
#pragma once
#include "frame.h"

namespace hope {

template <class T>
struct Readout {
  const T* weight[2];  // of eta and alpha, [D]
  T bias[2];
  T* pulled[2];  // [H]: W1^T w at the chunk's start
};

template <class T>
inline void pull_readout(const Sizes& s, const Pair<T>* frozen, Readout<T>& readout) {
  for (int i = 0; i < 2; i++) {
    const T* w1 = frozen[ETA + i].w1;
    std::memset(readout.pulled[i], 0, sizeof(T) * s.H);
    for (int o = 0; o < s.d; o++)
      for (int j = 0; j < s.H; j += LANES<T>)
        store(readout.pulled[i] + j,
              load(readout.pulled[i] + j) + readout.weight[i][o] * load(w1 + int64_t(o) * s.H + j));
  }
}

// z = W2 x and y = x + W1 act(z), then y / |y|: x, unit with their strides.
template <class T>
inline void project_unit(const Sizes& s, Pair<T> frozen, const T* x, T* z, T* unit, int stride,
                         T* inverse, Work<T>& work) {
  set_product(s.H, TOKENS, s.d, plain(frozen.w2, s.D), {const_cast<T*>(x), TOKENS}, {z, TOKENS});
  T* act = work.hidden[0];
  for (int i = 0; i < s.H * TOKENS; i += LANES<T>) store(act + i, gelu<T, 0>(load(z + i)).value);
  T* y = work.wide[0];
  sum_product(s.D, TOKENS, s.h, plain(frozen.w1, s.H), {act, TOKENS}, {y, TOKENS},
              {const_cast<T*>(x), TOKENS});
  inverse_lengths(s.D, y, TOKENS, inverse);
  scale_tokens(s.D, y, TOKENS, inverse, unit, stride);
}

// k, v, eta, alpha (and q) of a block whose x (and source) is there.
template <class T>
void project(const Call<T>& call, const Sizes& s, const Pair<T>* frozen, const Readout<T>& readout,
             Frame<T>& f, Work<T>& work) {
  const int64_t hidden = int64_t(s.H) * TOKENS;
  for (int m : {K, V})
    project_unit(s, frozen[m], f.x, f.z + m * hidden, f.kv + m * TOKENS, 2 * TOKENS,
                 f.inverse + m * TOKENS, work);
  alignas(64) T logit[2][TOKENS];
  for (int i = 0; i < 2; i++) {
    T* z = f.z + (ETA + i) * hidden;
    set_product(s.H, TOKENS, s.d, plain(frozen[ETA + i].w2, s.D), {f.x, TOKENS}, {z, TOKENS});
    each<T>([&](int t) {
      Vec<T> sum = all(readout.bias[i]);
      for (int o = 0; o < s.d; o++) sum += readout.weight[i][o] * load(f.x + o * TOKENS + t);
      for (int j = 0; j < s.h; j++)
        sum += readout.pulled[i][j] * gelu<T, 0>(load(z + j * TOKENS + t)).value;
      store(logit[i] + t, sum);
    });
  }
  for (int t = 0; t < TOKENS; t++) {
    const bool there = t < f.count;
    for (int i = 0; i < 2; i++) {
      const T z = logit[i][t];
      f.rest[i * TOKENS + t] = there ? T(1) / (T(1) + std::exp(z)) : T(0);
    }
    f.eta[t] = there ? T(call.eta_max) / (T(1) + std::exp(-logit[0][t])) : T(0);
    const T z = logit[1][t];
    f.log_alpha[t] = there ? std::min(z, T(0)) - std::log1p(std::exp(-std::abs(z))) : T(0);
  }
  if (f.source)
    project_unit(s, frozen[Q], f.source, f.z_q, f.q, TOKENS, f.inverse + 2 * TOKENS, work);
}

// Derivative of `project_unit`, from that of the unit vectors, d: dx and d_frozen are added to.
template <class T>
inline void project_unit_backward(const Sizes& s, Pair<T> frozen, T* x_rows, const T* z,
                                  const T* unit, int unit_stride, const T* inverse, const T* d,
                                  int d_stride, Pair<T> d_frozen, T* dx, Work<T>& work) {
  T *dy = work.wide[0], *act = work.hidden[0], *dz = work.hidden[2];
  T* turned = work.hidden[3];
  unit_backward(s.D, d, d_stride, unit, unit_stride, inverse, dy, TOKENS);
  set_product(s.H, TOKENS, s.d, transposed(frozen.w1, s.H), {dy, TOKENS}, {dz, TOKENS});
  for (int i = 0; i < s.H * TOKENS; i += LANES<T>) {
    const Gelu<T> g = gelu<T, 1>(load(z + i));
    store(act + i, g.value);
    store(dz + i, load(dz + i) * g.slope);
  }
  turn_tokens(s.H, act, TOKENS, turned, s.H);
  add_outer(s.D, s.H, dy, turned, d_frozen.w1);
  add_outer(s.H, s.D, dz, x_rows, d_frozen.w2);
  add_product(s.D, TOKENS, s.h, transposed(frozen.w2, s.D), {dz, TOKENS}, {dx, TOKENS});
  add_rows(s.D, dy, TOKENS, dx, TOKENS);
}

// Derivative of `project`: dx [D][TOKENS] (and d_source), the frozen W's added to d_frozen, the
// readout's to d_readout [2][d] and d_bias [2]. d_log [2][TOKENS]: of log eta and log alpha.
template <class T>
void project_backward(const Sizes& s, const Pair<T>* frozen, const Readout<T>& readout,
                      const Frame<T>& f, FrameGradient<T>& grad, const T* d_log,
                      const Pair<T>* d_frozen, T* dx, T* d_source, T* const* d_readout, T* d_bias,
                      Work<T>& work) {
  const int64_t hidden = int64_t(s.H) * TOKENS;
  T* x_rows = work.wide[1];
  std::memset(dx, 0, sizeof(T) * s.D * TOKENS);
  turn_tokens(s.D, f.x, TOKENS, x_rows, s.D);
  for (int m : {K, V})
    project_unit_backward(s, frozen[m], x_rows, f.z + m * hidden, f.kv + m * TOKENS, 2 * TOKENS,
                          f.inverse + m * TOKENS, grad.kv + m * TOKENS, 2 * TOKENS, d_frozen[m], dx,
                          work);
  T *dz = work.hidden[2], *d_pulled = work.features;
  for (int i = 0; i < 2; i++) {
    const Pair<T> w = frozen[ETA + i], d_w = d_frozen[ETA + i];
    const T* z = f.z + (ETA + i) * hidden;
    alignas(64) T d_logit[TOKENS];
    for (int t = 0; t < TOKENS; t++) {
      d_logit[t] = d_log[i * TOKENS + t] * f.rest[i * TOKENS + t];
      d_bias[i] += d_logit[t];
    }
    for (int j = 0; j < s.H; j++) {
      Vec<T> sum = {};
      each<T>([&](int t) {
        const Gelu<T> g = gelu<T, 1>(load(z + j * TOKENS + t));
        const Vec<T> d = load(d_logit + t);
        sum += d * g.value;
        store(dz + j * TOKENS + t, d * g.slope * readout.pulled[i][j]);
      });
      T total = 0;
      for (int t = 0; t < LANES<T>; t++) total += sum[t];
      d_pulled[j] = total;
    }
    for (int o = 0; o < s.d; o++) {
      Vec<T> sum = {};
      const Vec<T> weight = all(readout.weight[i][o]);
      for (int j = 0; j < s.H; j += LANES<T>) {
        const Vec<T> d = load(d_pulled + j);
        T* at = d_w.w1 + int64_t(o) * s.H + j;
        store(at, load(at) + weight * d);
        sum += load(w.w1 + int64_t(o) * s.H + j) * d;
      }
      each<T>([&](int t) {
        const Vec<T> d = load(d_logit + t);
        sum += load(f.x + o * TOKENS + t) * d;
        store(dx + o * TOKENS + t, load(dx + o * TOKENS + t) + weight * d);
      });
      for (int t = 0; t < LANES<T>; t++) d_readout[i][o] += sum[t];
    }
    add_outer(s.H, s.D, dz, x_rows, d_w.w2);
    add_product(s.D, TOKENS, s.h, transposed(w.w2, s.D), {dz, TOKENS}, {dx, TOKENS});
  }
  if (!f.source) return;
  std::memset(d_source, 0, sizeof(T) * s.D * TOKENS);
  T* source_rows = work.wide[2];
  turn_tokens(s.D, f.source, TOKENS, source_rows, s.D);
  project_unit_backward(s, frozen[Q], source_rows, f.z_q, f.q, TOKENS, f.inverse + 2 * TOKENS,
                        grad.query, TOKENS, d_frozen[Q], d_source, work);
}

}  // namespace hope
