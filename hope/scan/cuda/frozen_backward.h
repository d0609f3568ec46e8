// The derivative of what a block does at its chunk's frozen W: the gradients of keys and values,
// and what it sends to that W.
#pragma once
#include "reads_backward.h"

namespace hope {

// From the gradients of the frozen terms into k and v (dk, dv, d_log of the block), and what the
// chunk-start W gets of them, as operands of `add_frozen`.
DEVICE void through_frozen(const Call& call, const Gradients& s, Team& team, const Block& block,
                           int program, const Inputs& given, Passed& b) {
  // Where the program's own part of what goes back begins, and the block in it.
  const long long here =
      ((long long)(call.offset + program) * call.count) * call.length + block.here;
  put<C>(s.value_again, given.value);
  in_order();
  auto z_k = product<C, H, D>(s.key, s.frozen2);
  in_order();
  if (DELTA1) less_product<C>(b.de, s.gram1, s.e);
  in_order();
  if (DELTA2) less_product<C>(b.d_key, s.gram2, s.key);
  range(C, [&](int i) {
    const real along = row<C>(s.room, i), floor = s.length[i] * s.length[i] + STEP_FLOOR;
    const real share = inverted(floor);
    s.rows[i] = !team.counts() ? real(0) : DELTA1 ? -along * s.length[i] * share : -along;
    // e is act / max(|act|, NORM_EPS), and |act| has the gradient act / |act|: 1 / |e| more of e.
    const real again = inverted(larger(s.length[i] * s.inverse[i], real(1e-20)));
    const real pull = along * (2 * STEP_FLOOR - floor) * share * share;
    s.along_act[i] = DELTA1 ? pull * again : real(0);
  });
  Rows<C> along = {};
  each<C, H>(
      [&](int i, int, int e) { along.add(i, e, b.de[e] * gelu(z_k[e]).value * s.inverse[i]); });
  store_rows(along, s.room2);
  Tokens back, added;
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
    if (SHARDS == 1) {
      add_product<H>(b.r, s.x_slope, turned(s.frozen1));
    } else {
      added = product<C, D, H>(s.x_slope, turned(s.frozen1));
      team.send(Team::FIRST, added);
    }
    back = b.r;
  }
  if (SHARDS > 1) {
    barrier();
    range(DELTA1 ? C : 0, [&](int i) { team.send(Team::ROW, i, row<C>(s.room2, i)); });
    team.meet();
    if (!AIMED) {
      team.receive(Team::FIRST, added);
      each<C, D>([&](int, int, int e) { b.r[e] += added[e]; });
      back = b.r;
    }
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
  const auto sums = per_row<C>([&](int i) {
    if (s.inverse[i] > real(0.999) / NORM_EPS) return real(0);
    return row<C>(s.room2, i) + (SHARDS > 1 && DELTA1 ? team.received(Team::ROW, i) : real(0));
  });
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
  if (team.counts()) {
    each<C, D>([&](int, int, int e) {
      b.d_key[e] += b.r[e];
      d_value[e] += AIMED ? back[e] : -b.r[e];
    });
  }
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
constexpr int STASHED = 2 * C * D + 4 * C * H;
DEVICE void stash(const Gradients& s, half* to) {
  keep<C>(s.r, to);
  keep<C>(s.back, to + C * D);
  to += 2 * C * D;
  keep<C>(s.x_slope, to);
  keep<C>(s.gap, to + C * H);
  keep<C>(s.dz_k, to + 2 * C * H);
  keep<C>(s.dz_v, to + 3 * C * H);
}
DEVICE void unstash(const Call& call, const Gradients& s, const Block& block, const half* from) {
  fetch<C>(from, s.r);
  fetch<C>(from + C * D, s.back);
  from += 2 * C * D;
  fetch<C>(from, s.x_slope);
  fetch<C>(from + C * H, s.gap);
  fetch<C>(from + 2 * C * H, s.dz_k);
  fetch<C>(from + 3 * C * H, s.dz_v);
  put<C>(s.key, read<C, D>(call.k + block.here * D));
  put<C>(s.value_again, read<C, D>(call.v + block.here * D));
  fetched();
}

}  // namespace hope
