// k, v, eta, alpha and the adaptive query, read out of the memories that make them (Eqs. 84-86),
// and the derivative: hope/scan/kernels/projections.py. Memory m makes what `Memory` says.
#pragma once
#include "program.h"

namespace hope {

// Shared memory: W, the inputs and what they activate; for the derivative also gradients.
struct Projection {
  Matrix<H> frozen1, frozen2;
  Matrix<D> x, dy;
  Matrix<H> act, dz;
  real *room, *room2, *d_logit;
};

DEVICE bool is_gate(int m) {
  return m == ETA || m == ALPHA;
}

// M(x) of a block's inputs, and z = W2 x.
DEVICE void apply(const Call& call, const Projection& s, Team& team, int m, const Block& block,
                  Fragment<C, D>& y, Fragment<C, H>& z) {
  y = read<C, D>((m == QUERY ? call.source : call.x) + block.token * D, block.valid);
  put<C>(s.x, y);
  barrier();
  z = product<C, H, D>(s.x, s.frozen2);
  put<C>(s.act, [&](int, int, int e) { return gelu(z[e]).value; });
  barrier();
  if (SHARDS == 1) {
    add_product<H>(y, s.act, turned(s.frozen1));
  } else {
    auto added = product<C, D, H>(s.act, turned(s.frozen1));
    team.add_up(added);
    each<C, D>([&](int, int, int e) { y[e] += added[e]; });
  }
}

// Store <w, y> of every token; `row` has it behind the next barrier.
DEVICE void read_out(const Call& call, const Projection& s, int g, int m, const Fragment<C, D>& y) {
  const real* weight = call.readout + ((m - ETA) * call.heads + g % call.heads) * D;
  Rows<C> logit = {};
  each<C, D>([&](int i, int j, int e) { logit.add(i, e, y[e] * weight[j]); });
  store_rows(logit, s.room);
}

// Fill the buffers for `blocks` blocks from `local` on.
DEVICE void project(const Call& call, const Projection& s, Team& team, int g, int m, int local,
                    int blocks) {
  for (int n = 0; n < blocks; n++, local += C) {
    const Block block(call, g, local);
    Fragment<C, D> y;
    Fragment<C, H> z;
    apply(call, s, team, m, block, y, z);
    if (is_gate(m)) {
      read_out(call, s, g, m, y);
      barrier();
      const real bias = call.bias[(m - ETA) * call.heads + g % call.heads];
      range(C, [&](int i) {
        const real logit = row<C>(s.room, i) + bias;
        const bool there = i < block.valid;
        if (!team.counts()) return;
        if (m == ETA)
          call.eta[block.here + i] = there ? real(call.eta_max) / (1 + decayed(-logit)) : real(0);
        else
          call.log_alpha[block.here + i] = there ? log_sigmoid(logit) : real(0);
      });
    } else {
      Rows<C> square = {};
      each<C, D>([&](int i, int, int e) { square.add(i, e, y[e] * y[e]); });
      store_rows(square, s.room);
      barrier();
      const auto inverse =
          per_row<C>([&](int i) { return inverted(larger(root(row<C>(s.room, i)), NORM_EPS)); });
      each<C, D>([&](int i, int, int e) { y[e] *= inverse.at(i, e); });
      if (!team.counts()) continue;
      write<C, D>((m == KEY ? call.k : m == VALUE ? call.v : call.query) + block.here * D, y);
    }
  }
}

// The gradient of y from what all memories send to k or v, M_mem to the query.
DEVICE void unit_backward(const Call& call, const Projection& s, int m, const Block& block,
                          Fragment<C, D>& y) {
  Fragment<C, D> grad = {};
  if (m == QUERY) {
    grad = read<C, D>(call.d_query + block.here * D, block.valid);
  } else {
    const real* sent = (m == KEY ? call.dk : call.dv) + block.here * D;
    for (int n = 0; n < call.all_programs; n++) {
      const auto own = read<C, D>(sent + (long long)n * call.count * call.length * D);
      each<C, D>([&](int, int, int e) { grad[e] += own[e]; });
    }
  }
  Rows<C> square = {}, along = {};
  each<C, D>([&](int i, int, int e) {
    square.add(i, e, y[e] * y[e]);
    along.add(i, e, grad[e] * y[e]);
  });
  store_rows(square, s.room);
  store_rows(along, s.room2);
  barrier();
  const auto inverse =
      per_row<C>([&](int i) { return inverted(larger(root(row<C>(s.room, i)), NORM_EPS)); });
  const auto share = per_row<C>([&](int i) { return row<C>(s.room2, i); });
  each<C, D>([&](int i, int, int e) {
    const real scale = inverse.at(i, e);
    const real cut = scale > real(0.999) / NORM_EPS ? real(0) : share.at(i, e) * scale * scale;
    y[e] = (grad[e] - y[e] * cut) * scale;
  });
}

// The same from what all memories send to a gate; adds the readout's gradient.
DEVICE void gate_backward(const Call& call, const Projection& s, const Team& team, int g, int m,
                          const Block& block, Fragment<C, D>& y) {
  const int gate = m - ETA, own = gate * call.count + g;
  read_out(call, s, g, m, y);
  barrier();
  range(C, [&](int i) {
    const real logit = row<C>(s.room, i) + call.bias[gate * call.heads + g % call.heads];
    const real* sent = (m == ETA ? call.d_log_eta : call.d_log_alpha) + block.here + i;
    real sum = 0;
    for (int n = 0; n < call.all_programs; n++)
      sum += sent[(long long)n * call.count * call.length];
    s.d_logit[i] = i < block.valid ? sum / (1 + decayed(logit)) : real(0);
  });
  barrier();
  store_columns<C, D>([&](int i, int, int e) { return s.d_logit[i] * y[e]; }, s.room);
  const real* weight = call.readout + (gate * call.heads + g % call.heads) * D;
  each<C, D>([&](int i, int j, int e) { y[e] = s.d_logit[i] * weight[j]; });
  barrier();
  range(team.counts() ? D : 0, [&](int j) {
    call.d_readout[own * D + j] += column<C, D>(s.room, j);
    if (j > 0) return;
    real sum = 0;
    for (int t = 0; t < C; t++) sum += s.d_logit[t];
    call.d_bias[own] += sum;
  });
}

// Derivative of `project`: adds to the gradients of W, writes dx.
DEVICE void project_backward(const Call& call, const Projection& s, Team& team, int g, int program,
                             int local, int blocks, Fragment<D, H>& d_w1, Fragment<D, H>& d_w2) {
  const int m = program / SHARDS;
  real* dx = call.dx + (long long)program * call.count * call.length * D;
  for (int n = 0; n < blocks; n++, local += C) {
    const Block block(call, g, local);
    Fragment<C, D> y;
    Fragment<C, H> z;
    apply(call, s, team, m, block, y, z);
    if (is_gate(m))
      gate_backward(call, s, team, g, m, block, y);
    else
      unit_backward(call, s, m, block, y);
    put<C>(s.dy, y);
    barrier();
    const auto d_act = product<C, H, D>(s.dy, s.frozen1);
    put<C>(s.dz, [&](int, int, int e) { return d_act[e] * gelu(z[e]).slope; });
    barrier();
    if (!team.counts()) y = {};
    add_product<H>(y, s.dz, turned(s.frozen2));
    write<C, D>(dx + block.here * D, y);
    add_product<C>(d_w1, turned(s.dy), s.act);
    add_product<C>(d_w2, turned(s.x), s.dz);
    barrier();
  }
}

}  // namespace hope
