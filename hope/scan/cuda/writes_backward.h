// The derivative of writing blocks into a memory; the mathematics is
// hope/scan/writes_backward.py's.
#pragma once
#include "frozen_backward.h"

namespace hope {

// Load what a block needs but for Delta, which is under way, and S as products take it.
DEVICE void load_block(const Call& call, const Gradients& s, const Block& block,
                       const Record& record, const Inputs& given, const Sent& sent) {
  s.decays.load(call, block);
  fetch<C>(record.length, s.length);
  fetch<C>(record.inverse, s.inverse);
  if (AIMED) fetch<C>(record.shorter, s.shorter);
  put<C>(s.key, given.key);
  put<C>(s.value, given.value);
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

// W1's keys, what makes r, and decays; boundary is still to be scaled. What the next phase takes is
// asked for already, here as at the end of other phases.
DEVICE void activate_again(const Call& call, const Gradients& s, const Block& block,
                           const Record& record, const Sent& sent, Inputs& given, Passed& b) {
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
  Hidden gap;
  put<C>(s.e, [&](int i, int, int e) {
    const real key = gelu(z_k[e]).value, value = gelu(z_v[e]).value;
    gap[e] = AIMED ? value : key - value;
    return key * s.inverse[i];
  });
  put<C>(s.gap, gap);
  b.boundary = along;
  s.decays.fill();
  given.load(call, block);
}

// r again, and the gradients of U1 and U2: what the state behind the block sends them, and what a
// causal read does.
DEVICE void reach_u(const Call& call, const Gradients& s, Team& team, const Block& block,
                    const Record& record, const Inputs& given, Passed& b) {
  const auto &key = given.key, &value = given.value;
  b.r = product<C, D, H>(s.gap, turned(s.frozen1));
  const auto finish_r = [&] {
    each<C, D>([&](int i, int, int e) {
      if (AIMED)
        b.r[e] = key[e] - (b.r[e] + value[e]) * s.shorter[i];
      else
        b.r[e] += key[e] - value[e];
    });
    put<C>(s.r, b.r);
  };
  if (SHARDS == 1) finish_r();
  b.load(record);
  b.boundary *= s.decays.total[0];
  b.du1 = product<C, D, H>(s.e, turned(s.state1));
  each<C, D>([&](int i, int, int e) {
    b.du1[e] *= -s.decays.end[i];
    b.boundary += b.du1[e] * b.u1[e];
  });
  if (WRITES2) {
    b.du2 = product<C, H, D>(s.key, s.state2);
    each<C, H>([&](int i, int, int e) {
      b.du2[e] *= -s.decays.end[i];
      b.boundary += b.du2[e] * b.u2[e];
    });
  }
  if (READ == CAUSAL) read_causal_backward(call, s, team, block, record, b);
  if (SHARDS == 1) return;
  team.send(Team::FIRST, b.r);
  team.send(Team::SECOND, b.du1);
  team.meet();
  team.receive(Team::FIRST, b.r);
  team.receive(Team::SECOND, b.du1);
  if (READ == CAUSAL && team.counts()) {
    Tokens d_query = team.sent(Team::THIRD);
    team.receive(Team::THIRD, d_query);
    write<C, D>(call.dq + block.at_q, d_query, block.valid);
  }
  finish_r();
}

// du, of U = system x, becomes the gradient of x / eta times eta: X1 and X2, stored with U1 and U2.
DEVICE void through_systems(const Gradients& s, const Team& team, const Record& record,
                            const real* system2, Passed& b) {
  if (DELTA1) {
    put<C>(s.side1, b.du1);
    put<C>(s.system1, read<C, C>(record.system1));
  }
  in_order();
  if (DELTA2) {
    put<C>(s.side2, b.du2);
    put<C>(s.system2, read<C, C>(system2));
  }
  b.load(record);
  barrier();
  if (DELTA1) b.du1 = exact_product<C, D, C>(turned(s.system1), s.side1);
  if (DELTA2) b.du2 = exact_product<C, H, C>(turned(s.system2), s.side2);
  each<C, D>([&](int i, int, int e) {
    if (team.counts()) b.p.add(i, e, b.du1[e] * b.u1[e]);
    b.du1[e] *= s.decays.eta[i];
  });
  if (WRITES2)
    each<C, H>([&](int i, int, int e) {
      b.p.add(i, e, b.du2[e] * b.u2[e]);
      b.du2[e] *= s.decays.eta[i];
    });
  barrier();
  put<C>(s.x1, b.du1);
  put<C>(s.u1, b.u1);
  if (WRITES2) {
    put<C>(s.x2, b.du2);
    put<C>(s.u2, b.u2);
  }
  barrier();
}

// Gram matrices of a system and its transpose, weighed: what U's own block sends to its keys.
template <int COLUMNS>
DEVICE void both_grams(const Gradients& s, Matrix<COLUMNS> x, Matrix<COLUMNS> u, Matrix<C> gram) {
  const auto one = product<C, C, COLUMNS>(x, turned(u));
  const auto other = product<C, C, COLUMNS>(u, turned(x));
  put<C>(gram, [&](int i, int j, int e) {
    return one[e] * s.decays.ratio(i, j) + other[e] * s.decays.ratio(j, i);
  });
}

// From X1, X2 in shared memory: S before the block but for its frozen terms, what M_0 gets at fixed
// W, the gradients of keys. b.r becomes the gradient of r from W1's step.
DEVICE void reach_keys(const Call& call, const Gradients& s, const Block& block, real* d_base,
                       Inputs& given, Passed& b, Sent& sent) {
  Rows<C> along = {};
  each<C, D>([&](int i, int, int e) { along.add(i, e, b.du1[e] * b.r[e]); });
  store_rows(along, s.room);
  each<C, D>([&](int i, int, int e) {
    const real pace = s.length[i] * inverted(s.length[i] * s.length[i] + STEP_FLOOR);
    b.r[e] = DELTA1 ? b.du1[e] * pace : b.du1[e];
  });
  const auto z_k = product<C, H, D>(s.key, s.frozen2);
  if (DELTA1 && INITIAL) b.de = product<C, H, D>(s.x1, s.base1);
  Hidden x_slope;
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
  given.value = read<C, D>(call.v + block.here * D);
  barrier();
}

// W of a chunk.
DEVICE void fetch_frozen(const Gradients& s, const Place& place, int chunk) {
  const half* start = place.frozen + (long long)chunk * 2 * SIZE;
  fetch<D>(start, s.frozen1);
  fetch<D>(start + SIZE, s.frozen2);
}

// Delta before a block.
DEVICE void fetch_delta(const Gradients& s, const Place& place, int number) {
  const half* before = place.deltas + (long long)number * 2 * SIZE;
  fetch<D>(before, s.delta1);
  fetch<D>(before + SIZE, s.delta2);
}

// Derivative of `write_forward`: d_state, the gradient of W behind the call's blocks, becomes that
// of W before them. The blocks that share a frozen W are gone through last to first, then what all
// of them send to it is added. Memories that project wait for one another there: what all have sent
// to a chunk's k, v, eta and alpha goes through W at its start.
DEVICE void write_backward(const Call& call, int g, int program, char* memory) {
  Shared shared = {memory};
  const Gradients s(shared);
  const Place place(call, g, program);
  Team team(call, g, program);
  const long long own = (long long)program * call.count + g;
  real *d_state = call.d_state + own * 2 * SIZE, *d_base = call.d_base + own * 2 * SIZE;
  half* stashed = call.stash + own * call.open * STASHED;
  Inputs given;
  Sent sent;
  sent.s1 = read<D, H>(d_state), sent.s2 = read<D, H>(d_state + SIZE);
  if (INITIAL) {
    fetch<D>(place.base, s.base1);
    fetch<D>(place.base + SIZE, s.base2);
  }
  fetch_delta(s, place, call.blocks - 1);
  const int sets = (call.blocks + call.open - 1) / call.open;
  for (int set = sets - 1; set >= 0; set--) {
    const int opening = set * call.open, together = smaller(call.blocks - opening, call.open);
    fetch_frozen(s, place, set);
    for (int nth = together - 1; nth >= 0; nth--) {
      const int number = opening + nth;
      const Block block(call, g, number * C);
      const Record record(place.work + (long long)number * Record::size);
      if (starts_again(call, g, call.first_token + block.local + C)) {
        add<D, H>(d_base, sent.s1);
        add<D, H>(d_base + SIZE, sent.s2);
        sent = {};
      }
      Passed b = {};
      given.load(call, block);
      load_block(call, s, block, record, given, sent);
      fetched();
      barrier();
      activate_again(call, s, block, record, sent, given, b);
      barrier();
      reach_u(call, s, team, block, record, given, b);
      through_systems(s, team, record, place.systems + (long long)number * C * C, b);
      reach_keys(call, s, block, d_base, given, b, sent);
      if (number > 0) fetch_delta(s, place, number - 1);
      through_frozen(call, s, team, block, program, given, b);
      if (together > 1)
        stash(s, stashed + nth * STASHED);
      else
        add_frozen(s, sent);
      barrier();
    }
    for (int nth = 0; nth < together; nth++) {
      const Block block(call, g, (opening + nth) * C);
      if (together > 1) {
        unstash(call, s, block, stashed + nth * STASHED);
        barrier();
        add_frozen(s, sent);
      }
      if (READ == START) read_start_backward(call, s, team, block, sent);
      barrier();
    }
    if (READ == NONE) {
      cluster_barrier();
      project_backward(call, s.projection(), team, g, program, opening * C, together, sent.s1,
                       sent.s2);
    }
  }
  write<D, H>(d_state, sent.s1);
  write<D, H>(d_state + SIZE, sent.s2);
}

}  // namespace hope
