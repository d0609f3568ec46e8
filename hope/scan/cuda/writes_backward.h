// The derivative of writing blocks into a memory; the mathematics is
// hope/scan/writes_backward.py's.
#pragma once
#include "reads_backward.h"

namespace hope {

// Load what a block needs but for Delta, which is under way, and S as products take it.
DEVICE void load_block(const Call& call, const Gradients& s, const Block& block,
                       const Record& record, const Sent& sent) {
  s.decays.load(call, block);
  range(C, [&](int i) {
    s.length[i] = record.length[i];
    s.inverse[i] = record.inverse[i];
    if (AIMED) s.shorter[i] = record.shorter[i];
  });
  put<C>(s.key, read<C, D>(call.k + block.here * D));
  put<C>(s.value, read<C, D>(call.v + block.here * D));
  put<D>(s.state1, sent.s1);
  put<D>(s.state2, sent.s2);
  if (READ == CAUSAL) {
    put<C>(s.u1, read<C, D>(record.u1));
    if (WRITES2) put<C>(s.u2, read<C, H>(record.u2));
    put<C>(s.given, read<C, D>(call.d_out + block.token * D, block.valid));
    put<C>(s.query, read<C, D>(call.q + block.at_q, block.valid));
    const auto z_q = read<C, H>(record.z_q);
    put<C>(s.act_q, [&](int, int, int e) { return gelu(z_q[e]).value; });
    put<C>(s.across1, read<C, C>(record.across1));
  }
}

// W1's keys, what makes r, and decays; boundary is still to be scaled.
DEVICE void activate_again(const Gradients& s, const Sent& sent, Passed& b) {
  real along = 0;
  {
    const auto delta1 = get<D>(s.delta1);
    each<D, H>([&](int, int, int e) { along += sent.s1[e] * delta1[e]; });
  }
  in_order();
  {
    const auto delta2 = get<D>(s.delta2);
    each<D, H>([&](int, int, int e) { along += sent.s2[e] * delta2[e]; });
  }
  in_order();
  const auto z_k = product<C, H, D>(s.key, s.frozen2);
  const auto z_v = product<C, H, D>(s.value, s.frozen2);
  Tokens gap;
  put<C>(s.e, [&](int i, int, int e) {
    const real key = gelu(z_k[e]).value, value = gelu(z_v[e]).value;
    gap[e] = AIMED ? value : key - value;
    return key * s.inverse[i];
  });
  put<C>(s.gap, gap);
  b.boundary = along;
  s.decays.fill();
}

// r again, and the gradients of U1 and U2: what the state behind the block sends them, and what a
// causal read does.
DEVICE void reach_u(const Call& call, const Gradients& s, const Block& block, const Record& record,
                    Passed& b) {
  const auto key = read<C, D>(call.k + block.here * D), value = read<C, D>(call.v + block.here * D);
  b.r = product<C, D, H>(s.gap, turned(s.frozen1));
  each<C, D>([&](int i, int, int e) {
    if (AIMED)
      b.r[e] = key[e] - (b.r[e] + value[e]) * s.shorter[i];
    else
      b.r[e] += key[e] - value[e];
  });
  put<C>(s.r, b.r);
  b.boundary *= s.decays.total[0];
  const auto u1 = read<C, D>(record.u1);
  b.du1 = product<C, D, H>(s.e, turned(s.state1));
  each<C, D>([&](int i, int, int e) {
    b.du1[e] *= -s.decays.end[i];
    b.boundary += b.du1[e] * u1[e];
  });
  if (WRITES2) {
    const auto u2 = read<C, H>(record.u2);
    b.du2 = product<C, H, D>(s.key, s.state2);
    each<C, H>([&](int i, int, int e) {
      b.du2[e] *= -s.decays.end[i];
      b.boundary += b.du2[e] * u2[e];
    });
  }
  if (READ == CAUSAL) read_causal_backward(call, s, block, record, b);
}

// du, of U = system x, becomes the gradient of x / eta times eta: X1 and X2, stored with U1 and U2.
DEVICE void through_systems(const Gradients& s, const Record& record, const real* system2,
                            Passed& b) {
  if (DELTA1) {
    put<C>(s.side1, b.du1);
    put<C>(s.system1, read<C, C>(record.system1));
  }
  in_order();
  if (DELTA2) {
    put<C>(s.side2, b.du2);
    put<C>(s.system2, read<C, C>(system2));
  }
  barrier();
  const auto u1 = read<C, D>(record.u1);
  Fragment<C, H> u2 = {};
  if (WRITES2) u2 = read<C, H>(record.u2);
  if (DELTA1) b.du1 = exact_product<C, D, C>(turned(s.system1), s.side1);
  if (DELTA2) b.du2 = exact_product<C, H, C>(turned(s.system2), s.side2);
  each<C, D>([&](int i, int, int e) {
    b.p.add(i, e, b.du1[e] * u1[e] + (WRITES2 ? b.du2[e] * u2[e] : real(0)));
    b.du1[e] *= s.decays.eta[i];
    if (WRITES2) b.du2[e] *= s.decays.eta[i];
  });
  barrier();
  put<C>(s.x1, b.du1);
  put<C>(s.u1, u1);
  if (WRITES2) {
    put<C>(s.x2, b.du2);
    put<C>(s.u2, u2);
  }
  barrier();
}

// Gram matrices of a system and its transpose, weighed: what U's own block sends to its keys.
DEVICE void both_grams(const Gradients& s, Matrix<WIDTH> x, Matrix<WIDTH> u, Matrix<C> gram) {
  const auto one = product<C, C, WIDTH>(x, turned(u)), other = product<C, C, WIDTH>(u, turned(x));
  put<C>(gram, [&](int i, int j, int e) {
    return one[e] * s.decays.ratio(i, j) + other[e] * s.decays.ratio(j, i);
  });
}

// From X1, X2 in shared memory: S before the block but for its frozen terms, what M_0 gets at fixed
// W, the gradients of keys. b.r becomes the gradient of r from W1's step.
DEVICE void reach_keys(const Gradients& s, real* d_base, Passed& b, Sent& sent) {
  Rows<C> along = {};
  each<C, D>([&](int i, int, int e) { along.add(i, e, b.du1[e] * b.r[e]); });
  store_rows(along, s.room);
  each<C, D>([&](int i, int, int e) {
    const real pace = s.length[i] * inverted(s.length[i] * s.length[i] + STEP_FLOOR);
    b.r[e] = DELTA1 ? b.du1[e] * pace : b.du1[e];
  });
  const auto z_k = product<C, H, D>(s.key, s.frozen2);
  if (DELTA1 && INITIAL) b.de = product<C, H, D>(s.x1, s.base1);
  Tokens x_slope;
  each<C, H>([&](int i, int, int e) {
    const Gelu key = gelu(z_k[e]);
    x_slope[e] = b.du2[e] * key.slope;
    if (DELTA1 && INITIAL) b.rows.add(i, e, -b.de[e] * key.value * s.inverse[i]);
  });
  if (WRITES2) put<C>(s.x_slope, x_slope);
  in_order();
  if (DELTA1) {
    const auto moved = product<C, H, D>(s.x1, s.delta1);
    each<C, H>([&](int i, int, int e) { b.de[e] += moved[e] * s.decays.prev[i]; });
  }
  in_order();
  {
    const auto out = product<C, H, D>(s.u1, s.state1);
    each<C, H>([&](int i, int, int e) { b.de[e] -= out[e] * s.decays.end[i]; });
  }
  if (READ == CAUSAL) add_product<C>(b.de, turned(s.d_across1), s.act_q);
  in_order();
  if (WRITES2) {
    const auto out = product<C, D, H>(s.u2, turned(s.state2));
    each<C, D>([&](int i, int, int e) { b.d_key[e] -= out[e] * s.decays.end[i]; });
    in_order();
    if (DELTA2) {
      const auto moved = product<C, D, H>(s.x2, turned(s.delta2));
      each<C, D>([&](int i, int, int e) { b.d_key[e] += moved[e] * s.decays.prev[i]; });
      if (INITIAL) {
        const auto own = product<C, D, H>(s.x2, turned(s.base2));
        const auto key = get<C>(s.key);
        each<C, D>([&](int i, int, int e) {
          b.d_key[e] += own[e];
          b.rows.add(i, e, -own[e] * key[e]);
        });
      }
    }
  }
  in_order();
  if (DELTA1) both_grams(s, s.x1, s.u1, s.gram1);
  if (DELTA2) both_grams(s, s.x2, s.u2, s.gram2);
  in_order();
  const real total = s.decays.total[0], total_lost = s.decays.total[1];
  if (INITIAL) {
    State own;
    each<D, H>([&](int, int, int e) { own[e] = sent.s1[e] * total_lost; });
    if (DELTA1) add_product<C>(own, turned(s.x1, s.decays.lost), s.e);
    if (READ == CAUSAL) add_product<C>(own, turned(s.given, s.decays.lost), s.act_q);
    add<D, H>(d_base, own);
    in_order();
    each<D, H>([&](int, int, int e) { own[e] = sent.s2[e] * total_lost; });
    if (DELTA2) add_product<C>(own, turned(s.key, s.decays.lost), s.x2);
    if (READ == CAUSAL) add_product<C>(own, turned(s.query, s.decays.lost), s.dz);
    add<D, H>(d_base + SIZE, own);
    in_order();
  }
  each<D, H>([&](int, int, int e) {
    sent.s1[e] *= total;
    sent.s2[e] *= total;
  });
  if (DELTA1) add_product<C>(sent.s1, turned(s.x1, s.decays.prev), s.e);
  if (DELTA2) add_product<C>(sent.s2, turned(s.key, s.decays.prev), s.x2);
  if (READ == CAUSAL) {
    add_product<C>(sent.s1, turned(s.given, s.decays.prev), s.act_q);
    add_product<C>(sent.s2, turned(s.query, s.decays.prev), s.dz);
  }
  barrier();
}

// From the gradients of the frozen terms into k and v (dk, dv, d_log of the block), and what the
// chunk-start W gets of them, as operands of `add_frozen`.
DEVICE void through_frozen(const Call& call, const Gradients& s, const Block& block, int m,
                           Passed& b) {
  // Where the memory's own part of what goes back begins, and the block in it.
  const long long here = ((long long)(call.offset + m) * call.count) * call.length + block.here;
  put<C>(s.value_again, read<C, D>(call.v + block.here * D));
  auto z_k = product<C, H, D>(s.key, s.frozen2);
  if (DELTA1) less_product<C>(b.de, s.gram1, s.e);
  in_order();
  if (DELTA2) less_product<C>(b.d_key, s.gram2, s.key);
  range(C, [&](int i) {
    const real along = row<C>(s.room, i), floor = s.length[i] * s.length[i] + STEP_FLOOR;
    const real share = inverted(floor);
    s.rows[i] = DELTA1 ? -along * s.length[i] * share : -along;
    s.along_act[i] = DELTA1 ? along * (2 * STEP_FLOOR - floor) * share * share : real(0);
  });
  Rows<C> along = {};
  each<C, H>(
      [&](int i, int, int e) { along.add(i, e, b.de[e] * gelu(z_k[e]).value * s.inverse[i]); });
  store_rows(along, s.room2);
  Tokens back;
  if (AIMED) {
    barrier();
    auto unit = get<C>(s.key);
    const auto r = get<C>(s.r);
    Rows<C> through = {};
    each<C, D>([&](int i, int, int e) {
      unit[e] -= r[e];
      through.add(i, e, b.r[e] * unit[e]);
    });
    store_rows(through, s.room);
    barrier();
    const auto sums = per_row<C>(
        [&](int i) { return s.shorter[i] > real(0.999) / NORM_EPS ? real(0) : row<C>(s.room, i); });
    each<C, D>(
        [&](int i, int, int e) { back[e] = -(b.r[e] - unit[e] * sums.at(i, e)) * s.shorter[i]; });
  } else {
    add_product<H>(b.r, s.x_slope, turned(s.frozen1));
    back = b.r;
  }
  put<C>(s.back, back);
  barrier();
  forget(z_k);
  const auto d_act = product<C, H, D>(s.back, s.frozen1);
  {
    const auto z_v = product<C, H, D>(s.value_again, s.frozen2);
    put<C>(s.dz_v, [&](int, int, int e) {
      const real own = d_act[e] * gelu(z_v[e]).slope;
      return AIMED ? own : -own;
    });
  }
  in_order();
  Fragment<C, H> pulled = {};
  if (WRITES2) pulled = product<C, H, D>(s.r, s.frozen1);
  const auto sums = per_row<C>(
      [&](int i) { return s.inverse[i] > real(0.999) / NORM_EPS ? real(0) : row<C>(s.room2, i); });
  each<C, H>([&](int i, int, int e) {
    const Gelu key = gelu(z_k[e]);
    real da = b.de[e];
    if (DELTA1) {
      const real unit = key.value * s.inverse[i];
      da = (da - unit * sums.at(i, e)) * s.inverse[i] + unit * s.along_act[i];
    }
    if (AIMED) {
      b.de[e] = da * key.slope;
    } else {
      const real through = b.du2[e] * pulled[e];
      b.rows.add(i, e, -through * key.slope);
      b.de[e] = through * key.curvature + (da + d_act[e]) * key.slope;
    }
  });
  put<C>(s.dz_k, b.de);
  store_rows(b.rows, s.room);
  store_whole(b.boundary, s.room3);
  barrier();
  range(C, [&](int i) { s.rows[i] += row<C>(s.room, i); });
  store_rows(b.p, s.room2);
  add_product<H>(b.d_key, s.dz_k, turned(s.frozen2));
  auto d_value = product<C, D, H>(s.dz_v, turned(s.frozen2));
  each<C, D>([&](int, int, int e) {
    b.d_key[e] += b.r[e];
    d_value[e] += AIMED ? back[e] : -b.r[e];
  });
  write<C, D>(call.dk + here * D, b.d_key);
  write<C, D>(call.dv + here * D, d_value);
  barrier();
  running<C>([&](int i) { return s.rows[i]; },
             [&](int i, real, real later) {
               const real p = row<C>(s.room2, i);
               call.d_log_eta[here + i] = p;
               call.d_log_alpha[here + i] = whole(s.room3) + later - p;
             });
}

// What a block sends to the chunk-start W, from the operands that `through_frozen` left.
DEVICE void add_frozen(const Gradients& s, Sent& sent) {
  if (WRITES2) add_product<C>(sent.s1, turned(s.r), s.x_slope);
  add_product<C>(sent.s1, turned(s.back), s.gap);
  add_product<C>(sent.s2, turned(s.key), s.dz_k);
  add_product<C>(sent.s2, turned(s.value_again), s.dz_v);
}

// Those operands of a block out of the way, and back.
DEVICE void stash(const Gradients& s, half* to) {
  keep<C>(s.r, to);
  keep<C>(s.x_slope, to + C * WIDTH);
  keep<C>(s.back, to + 2 * C * WIDTH);
  keep<C>(s.gap, to + 3 * C * WIDTH);
  keep<C>(s.dz_k, to + 4 * C * WIDTH);
  keep<C>(s.dz_v, to + 5 * C * WIDTH);
}
DEVICE void unstash(const Call& call, const Gradients& s, const Block& block, const half* from) {
  fetch<C>(from, s.r);
  fetch<C>(from + C * WIDTH, s.x_slope);
  fetch<C>(from + 2 * C * WIDTH, s.back);
  fetch<C>(from + 3 * C * WIDTH, s.gap);
  fetch<C>(from + 4 * C * WIDTH, s.dz_k);
  fetch<C>(from + 5 * C * WIDTH, s.dz_v);
  put<C>(s.key, read<C, D>(call.k + block.here * D));
  put<C>(s.value_again, read<C, D>(call.v + block.here * D));
  fetched();
}

// W of the chunk that a block is in.
DEVICE void fetch_frozen(const Call& call, const Gradients& s, const Place& place, int number) {
  const half* start = place.opening(call, number);
  fetch<D>(start, s.frozen1);
  fetch<D>(start + SIZE, s.frozen2);
}

// Delta before a block.
DEVICE void fetch_delta(const Gradients& s, const Place& place, int number) {
  const half* before = place.deltas + (long long)number * 2 * SIZE;
  fetch<D>(before, s.delta1);
  fetch<D>(before + SIZE, s.delta2);
}

// Derivative of `project` and then of `write_forward`: more_blocks behind the call's first, whose
// inputs' gradients all launches before have left, then those themselves; d_state, the gradient of
// W behind them, becomes that of W before them. The blocks that share a frozen W are gone through
// last to first, then what all of them send to it is added.
DEVICE void write_backward(const Call& call, int g, int m, char* memory) {
  Shared shared = {memory};
  const Gradients s(shared);
  const Place place(call, g, m);
  const long long own = (long long)m * call.count + g;
  real *d_state = call.d_state + own * 2 * SIZE, *d_base = call.d_base + own * 2 * SIZE;
  half* stashed = call.stash + own * call.open * 6 * C * WIDTH;
  Sent sent;
  sent.s1 = read<D, H>(d_state), sent.s2 = read<D, H>(d_state + SIZE);
  if (READ == NONE && call.more_blocks) {
    fetch_frozen(call, s, place, call.first_block + call.blocks);
    fetched();
    project_backward(call, s.projection(), g, m, call.first + call.blocks * C, call.more_blocks,
                     sent.s1, sent.s2);
  }
  if (INITIAL) {
    fetch<D>(place.base, s.base1);
    fetch<D>(place.base + SIZE, s.base2);
  }
  fetch_delta(s, place, call.first_block + call.blocks - 1);
  const int sets = (call.blocks + call.open - 1) / call.open;
  for (int set = sets - 1; set >= 0; set--) {
    const int opening = set * call.open, together = smaller(call.blocks - opening, call.open);
    fetch_frozen(call, s, place, call.first_block + opening);
    for (int nth = together - 1; nth >= 0; nth--) {
      const int number = call.first_block + opening + nth;
      const Block block(call, g, call.first + (opening + nth) * C);
      const Record record(place.work + (long long)number * Record::size);
      if (starts_again(call, g, call.first_token + block.local + C)) {
        add<D, H>(d_base, sent.s1);
        add<D, H>(d_base + SIZE, sent.s2);
        sent = {};
      }
      Passed b = {};
      load_block(call, s, block, record, sent);
      fetched();
      barrier();
      activate_again(s, sent, b);
      barrier();
      reach_u(call, s, block, record, b);
      through_systems(s, record, place.systems + (long long)number * C * C, b);
      reach_keys(s, d_base, b, sent);
      if (number > call.first_block) fetch_delta(s, place, number - 1);
      through_frozen(call, s, block, m, b);
      if (together > 1)
        stash(s, stashed + nth * 6 * C * WIDTH);
      else
        add_frozen(s, sent);
      barrier();
    }
    for (int nth = 0; nth < together; nth++) {
      const Block block(call, g, call.first + (opening + nth) * C);
      if (together > 1) {
        unstash(call, s, block, stashed + nth * 6 * C * WIDTH);
        barrier();
        add_frozen(s, sent);
      }
      if (READ == START) read_start_backward(call, s, block, sent);
      barrier();
    }
  }
  write<D, H>(d_state, sent.s1);
  write<D, H>(d_state + SIZE, sent.s2);
}

// Derivative of `project_forward`.
DEVICE void projection_backward(const Call& call, int g, int m, char* memory) {
  Shared shared = {memory};
  const Gradients s(shared);
  real* d_state = call.d_state + ((long long)m * call.count + g) * 2 * SIZE;
  auto s1 = read<D, H>(d_state), s2 = read<D, H>(d_state + SIZE);
  fetch_frozen(call, s, Place(call, g, m), call.first_block);
  fetched();
  project_backward(call, s.projection(), g, m, call.first, call.blocks, s1, s2);
  write<D, H>(d_state, s1);
  write<D, H>(d_state + SIZE, s2);
}

}  // namespace hope
