// RMSNorm of every head, gain and SiLU gate, and their derivative, a block of tokens at a time.
#pragma once
#include <algorithm>
#include <cmath>

#include "../../native/registers.h"
#include "../../native/threads.h"
#include "rows.h"

namespace hope {

// read [rows][heads][tokens][features] with strides; weight [heads][features]; gate, out, d_out,
// d_gate [rows][tokens][heads][features]; d_read like read, contiguous; d_weight
// [rows][blocks][heads][features].
struct GatedNorm {
  int64_t rows, heads, tokens, features, threads, row_stride, head_stride, token_stride;
  double eps;
  const void *read, *weight, *gate, *d_out;
  void *out, *d_read, *d_weight, *d_gate;
};

// Features of a head in whole registers, zeros after the last.
template <class T>
struct Padded {
  int64_t features, size;
  std::vector<T> values;

  explicit Padded(int64_t features)
      : features(features), size((features + LANES<T> - 1) / LANES<T> * LANES<T>), values(size) {}

  template <class S>
  void load_from(const S* from) {
    T* to = values.data();
    for (int64_t i = 0; i < features; i++) to[i] = T(from[i]);
    for (int64_t i = features; i < size; i++) to[i] = 0;
  }
  template <class S>
  void store_to(S* to) const {
    const T* from = values.data();
    for (int64_t i = 0; i < features; i++) to[i] = S(from[i]);
  }
  Vec<T> get(int64_t i) const { return load(values.data() + i); }
  void set(int64_t i, Vec<T> value) { store(values.data() + i, value); }
};

template <class T>
inline T sum_of(Vec<T> lanes) {
  T sum[LANES<T>];
  store(sum, lanes);
  for (int width = LANES<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) sum[i] += sum[i + width];
  return sum[0];
}

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exponential<T>(-x));
}

// A head of a token.
template <class S>
struct NormedHead {
  typedef typename Computed<S>::type T;
  const GatedNorm& call;
  Padded<T> weight, x, gate;

  explicit NormedHead(const GatedNorm& call)
      : call(call), weight(call.features), x(call.features), gate(call.features) {}

  int64_t at(int64_t row, int64_t t, int64_t head) const {
    return ((row * call.tokens + t) * call.heads + head) * call.features;
  }
  // Loads them; returns 1 / sqrt(mean(x^2) + eps).
  T begin(int64_t row, int64_t t, int64_t head) {
    weight.load_from(static_cast<const T*>(call.weight) + head * call.features);
    x.load_from(static_cast<const S*>(call.read) + row * call.row_stride + head * call.head_stride +
                t * call.token_stride);
    gate.load_from(static_cast<const S*>(call.gate) + at(row, t, head));
    Vec<T> squares = {};
    for (int64_t i = 0; i < x.size; i += LANES<T>) squares += x.get(i) * x.get(i);
    return T(1) / std::sqrt(sum_of<T>(squares) / T(call.features) + T(call.eps));
  }
};

template <class S>
void gated_norm(const GatedNorm& call) {
  typedef typename Computed<S>::type T;
  const int64_t blocks = blocks_of(call.tokens);
  for_each(call.rows * blocks, int(call.threads), [&](int64_t task, int) {
    const int64_t row = task / blocks, begin = task % blocks * BLOCK;
    NormedHead<S> here(call);
    for (int64_t t = begin; t < std::min(begin + BLOCK, call.tokens); t++)
      for (int64_t head = 0; head < call.heads; head++) {
        const T scale = here.begin(row, t, head);
        for (int64_t i = 0; i < here.x.size; i += LANES<T>) {
          const Vec<T> gate = here.gate.get(i);
          here.x.set(i, here.x.get(i) * scale * here.weight.get(i) * (gate * sigmoid<T>(gate)));
        }
        here.x.store_to(static_cast<S*>(call.out) + here.at(row, t, head));
      }
  });
}

template <class S>
void gated_norm_backward(const GatedNorm& call) {
  typedef typename Computed<S>::type T;
  typedef Vec<T> V;
  const int64_t blocks = blocks_of(call.tokens);
  for_each(call.rows * blocks, int(call.threads), [&](int64_t task, int) {
    const int64_t row = task / blocks, begin = task % blocks * BLOCK;
    NormedHead<S> here(call);
    Padded<T> given(call.features), along(call.features);
    Sums<T> d_weight(call.heads * call.features);
    for (int64_t t = begin; t < std::min(begin + BLOCK, call.tokens); t++) {
      for (int64_t head = 0; head < call.heads; head++) {
        const T scale = here.begin(row, t, head);
        given.load_from(static_cast<const S*>(call.d_out) + here.at(row, t, head));
        V lengthwise = {};  // the unit vector's gradient with itself
        for (int64_t i = 0; i < given.size; i += LANES<T>) {
          const V unit = here.x.get(i) * scale, weight = here.weight.get(i);
          const V gate = here.gate.get(i), opened = sigmoid<T>(gate), silu = gate * opened;
          const V d_out = given.get(i), d_unit = d_out * silu * weight;
          along.set(i, d_out * silu * unit);
          here.gate.set(i, d_out * unit * weight * (opened + silu * (T(1) - opened)));
          here.x.set(i, unit);
          given.set(i, d_unit);
          lengthwise += d_unit * unit;
        }
        const T mean = sum_of<T>(lengthwise) / T(call.features);
        for (int64_t i = 0; i < given.size; i += LANES<T>)
          here.x.set(i, (given.get(i) - here.x.get(i) * mean) * scale);
        T* sum = d_weight.part.data() + head * call.features;
        for (int64_t i = 0; i < call.features; i++) sum[i] += along.values[i];
        const int64_t own = ((row * call.heads + head) * call.tokens + t) * call.features;
        here.x.store_to(static_cast<S*>(call.d_read) + own);
        here.gate.store_to(static_cast<S*>(call.d_gate) + here.at(row, t, head));
      }
      d_weight.after(t - begin + 1);
    }
    d_weight.write(static_cast<T*>(call.d_weight) + task * call.heads * call.features);
  });
}

}  // namespace hope
