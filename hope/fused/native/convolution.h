// Causal depthwise convolution and its derivative, a block of tokens at a time.
#pragma once
#include <algorithm>

#include "../../native/threads.h"
#include "rows.h"

namespace hope {

// x, out, dx [rows][tokens][channels]; tail, d_tail [rows][width - 1][channels], or null, which is
// zeros; weight [width][channels], the last of x_t; reach [rows][tokens]: how many tokens before
// each are of its document, at most width - 1, or null: all; d_weight [rows][blocks of the inputs,
// tail included][width][channels].
struct Convolution {
  int64_t rows, tokens, channels, width, threads;
  const void *x, *weight, *tail;
  const int32_t* reach;
  const void* d_out;
  void *out, *dx, *d_weight, *d_tail;
};

constexpr int64_t CHANNELS = 128;  // whose sums stay in the L1 cache

// A row of a call. Positions count from its first token, those of the tail are negative.
template <class S>
struct ConvolvedRow {
  typedef typename Computed<S>::type T;
  const Convolution& call;
  int64_t row;

  int64_t before() const { return call.width - 1; }
  int64_t at(int64_t position) const { return (row * call.tokens + position) * call.channels; }
  int64_t at_tail(int64_t position) const {
    return (row * before() + before() + position) * call.channels;
  }
  const S* input(int64_t position) const {
    return position < 0 ? static_cast<const S*>(call.tail) + at_tail(position)
                        : static_cast<const S*>(call.x) + at(position);
  }
  // What x `back` tokens before is multiplied with.
  const T* tap(int64_t back) const {
    return static_cast<const T*>(call.weight) + (before() - back) * call.channels;
  }
  int64_t reach(int64_t position) const {
    const int64_t known = call.tail ? before() : std::min(before(), position);
    return call.reach ? std::min<int64_t>(known, call.reach[row * call.tokens + position]) : known;
  }
  // Calls f(first, count) for some channels after the others.
  template <class F>
  void each(F f) const {
    for (int64_t c = 0; c < call.channels; c += CHANNELS)
      f(c, std::min(CHANNELS, call.channels - c));
  }
};

template <class S>
void convolve(const Convolution& call) {
  typedef typename Computed<S>::type T;
  const int64_t blocks = blocks_of(call.tokens);
  for_each(call.rows * blocks, int(call.threads), [&](int64_t task, int) {
    const ConvolvedRow<S> here{call, task / blocks};
    const int64_t begin = task % blocks * BLOCK, end = std::min(begin + BLOCK, call.tokens);
    for (int64_t t = begin; t < end; t++) {
      const int64_t reach = here.reach(t);
      S* out = static_cast<S*>(call.out) + here.at(t);
      here.each([&](int64_t first, int64_t count) {
        T sum[CHANNELS] = {};
        for (int64_t back = reach; back >= 0; back--) {
          const S* x = here.input(t - back) + first;
          const T* tap = here.tap(back) + first;
          for (int64_t c = 0; c < count; c++) sum[c] += tap[c] * T(x[c]);
        }
        for (int64_t c = 0; c < count; c++) out[first + c] = S(sum[c]);
      });
    }
  });
}

template <class S>
void convolve_backward(const Convolution& call) {
  typedef typename Computed<S>::type T;
  const int64_t tail = call.tail ? call.width - 1 : 0, blocks = blocks_of(call.tokens + tail);
  const int64_t taps = call.width * call.channels;
  for_each(call.rows * blocks, int(call.threads), [&](int64_t task, int) {
    const ConvolvedRow<S> here{call, task / blocks};
    const int64_t begin = task % blocks * BLOCK - tail;
    const int64_t end = std::min(begin + BLOCK, call.tokens);
    Sums<T> d_taps(taps);
    for (int64_t t = begin; t < end; t++) {
      const S* input = here.input(t);
      S* dx = t < 0 ? static_cast<S*>(call.d_tail) + here.at_tail(t)
                    : static_cast<S*>(call.dx) + here.at(t);
      const int64_t last = std::min(here.before(), call.tokens - 1 - t);
      here.each([&](int64_t first, int64_t count) {
        T sum[CHANNELS] = {}, x[CHANNELS];
        for (int64_t c = 0; c < count; c++) x[c] = T(input[first + c]);
        for (int64_t back = std::max<int64_t>(0, -t); back <= last; back++) {
          if (back > here.reach(t + back)) continue;
          const S* d_out = static_cast<const S*>(call.d_out) + here.at(t + back) + first;
          const T* tap = here.tap(back) + first;
          T* d_tap = d_taps.part.data() + (here.before() - back) * call.channels + first;
          for (int64_t c = 0; c < count; c++) {
            const T gradient = T(d_out[c]);
            sum[c] += tap[c] * gradient;
            d_tap[c] += x[c] * gradient;
          }
        }
        for (int64_t c = 0; c < count; c++) dx[first + c] = S(sum[c]);
      });
      d_taps.after(t - begin + 1);
    }
    d_taps.write(static_cast<T*>(call.d_weight) + task * taps);
  });
}

}  // namespace hope
