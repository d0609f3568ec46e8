// What backward has of a block, and the derivative of M_mem's reads (Eqs. 83, 90).
#pragma once
#include "projections.h"

namespace hope {

// Shared memory of `write_backward`. What is written late has the place of what is read early.
struct Gradients {
  Matrix<H> frozen1, frozen2, base1, base2, delta1, delta2, state1, state2;
  Matrix<D> key, value, value_again, r, u1, x1, back, given, query;
  Matrix<H> e, gap, u2, x2, x_slope, dz_k, dz_v, act_q, dz;
  Split<D> side1;
  Split<H> side2;
  Split<C> system1, system2;
  Matrix<C> gram1, gram2, across1, across2, d_across1, d_across2;
  Decays decays;
  real *length, *inverse, *shorter, *along_act, *rows, *room, *room2, *room3;

  DEVICE explicit Gradients(Shared& shared) : decays(shared) {
    frozen1 = shared.state(), frozen2 = shared.state();
    if (INITIAL) base1 = shared.state(), base2 = shared.state();
    delta1 = shared.state(), delta2 = shared.state();
    state1 = shared.state(), state2 = shared.state();
    key = shared.tokens(), e = shared.hidden(), gap = shared.hidden(), value = shared.tokens();
    r = value;
    u1 = shared.tokens(), u2 = shared.hidden(), x1 = shared.tokens(), x2 = shared.hidden();
    x_slope = shared.hidden(), back = shared.tokens(), dz_k = {x1.at}, dz_v = x2;
    value_again = u1;
    gram1 = shared.square(), gram2 = shared.square();
    side1 = {back, u1}, side2 = {x_slope, u2};
    system1 = {gram1, gram2}, system2 = {{x1.at}, {x2.at}};
    if (READ != NONE) given = shared.tokens(), query = shared.tokens(), dz = shared.hidden();
    if (READ != NONE) act_q = shared.hidden();
    if (READ == CAUSAL) {
      across1 = shared.square(), across2 = shared.square();
      d_across1 = shared.square(), d_across2 = shared.square();
    }
    length = shared.row(), inverse = shared.row(), shorter = shared.row();
    along_act = shared.row(), rows = shared.row();
    room = shared.room(), room2 = shared.room();
    room3 = shared.take<real>(WARPS);
  }
  static_assert(Matrix<C>::size(C) <= C * H);

  DEVICE Projection projection() const {
    return {frozen1, frozen2, key, back, e, x_slope, room, room2, rows};
  }
};

using Tokens = Fragment<C, D>;
using Hidden = Fragment<C, H>;
using State = Fragment<D, H>;

// S: the gradient of W behind what is still to come.
struct Sent {
  State s1, s2;
};

// What a block's passes hand on in a thread's registers.
struct Passed {
  Tokens u1;
  Hidden u2;
  Tokens r;    // and then its gradient
  Tokens du1;  // gradients of U1 and U2, then of their systems' right-hand sides
  Hidden du2;
  Hidden de;  // of W1's keys
  Tokens d_key;
  Rows<C> rows, p;  // what the decay before a token multiplies; <dU, U>
  real boundary;    // <S, Delta> behind the block

  DEVICE void load(const Record& record) {
    u1 = read<C, D>(record.u1);
    if (WRITES2) u2 = read<C, H>(record.u2);
  }
};

// The derivative of a causal read: into U1, U2, the query, its keys; what it sends to the state is
// left in shared memory.
DEVICE void read_causal_backward(const Call& call, const Gradients& s, const Team& team,
                                 const Block& block, const Record& record, Passed& b) {
  const auto d_written = product<C, C, D>(s.given, turned(s.u1));
  put<C>(s.d_across1, [&](int i, int j, int e) { return -d_written[e] * s.decays.ratio(i, j); });
  Fragment<C, C> across = {};
  if (WRITES2) {
    across = product<C, C, D>(s.query, turned(s.key));
    each<C, C>([&](int i, int j, int e) { across[e] *= s.decays.ratio(i, j); });
    put<C>(s.across2, across);
  }
  barrier();
  less_product<C>(b.du1, turned(s.across1), s.given);
  auto d_act = product<C, H, D>(s.given, s.delta1);
  each<C, H>([&](int i, int, int e) { d_act[e] *= s.decays.prev[i]; });
  add_product<C>(d_act, s.d_across1, s.e);
  const auto z_q = read<C, H>(record.z_q);
  each<C, H>([&](int i, int, int e) { b.rows.add(i, e, d_act[e] * gelu(z_q[e]).value); });
  if (INITIAL) add_product<D>(d_act, s.given, s.base1);
  put<C>(s.dz, [&](int, int, int e) { return d_act[e] * gelu(z_q[e]).slope; });
  barrier();
  auto d_query = product<C, D, H>(s.dz, turned(s.delta2));
  const auto query = read<C, D>(call.q + block.at_q, block.valid);
  const auto given = read<C, D>(call.d_out + block.token * D, block.valid);
  each<C, D>([&](int i, int, int e) {
    d_query[e] *= s.decays.prev[i];
    b.rows.add(i, e, d_query[e] * query[e]);
    if (team.counts()) d_query[e] += given[e];
  });
  if (INITIAL) add_product<H>(d_query, s.dz, turned(s.base2));
  if (WRITES2) {
    less_product<C>(b.du2, turned(s.across2), s.dz);
    const auto d_read = product<C, C, H>(s.dz, turned(s.u2));
    each<C, C>([&](int i, int, int e) { b.rows.add(i, e, -d_read[e] * across[e]); });
    put<C>(s.d_across2, [&](int i, int j, int e) { return -d_read[e] * s.decays.ratio(i, j); });
    barrier();
    add_product<C>(d_query, s.d_across2, s.key);
    add_product<C>(b.d_key, turned(s.d_across2), s.query);
  }
  if (SHARDS == 1)
    write<C, D>(call.dq + block.at_q, d_query, block.valid);
  else
    team.send(Team::THIRD, d_query);
}

// The derivative of `read_start`.
DEVICE void read_start_backward(const Call& call, const Gradients& s, Team& team,
                                const Block& block, Sent& sent) {
  const auto given = read<C, D>(call.d_out + block.token * D, block.valid);
  put<C>(s.given, given);
  put<C>(s.query, read<C, D>(call.q + block.at_q, block.valid));
  barrier();
  const auto z = product<C, H, D>(s.query, s.frozen2), d_act = product<C, H, D>(s.given, s.frozen1);
  put<C>(s.act_q, [&](int, int, int e) { return gelu(z[e]).value; });
  put<C>(s.dz, [&](int, int, int e) { return d_act[e] * gelu(z[e]).slope; });
  barrier();
  auto d_query = product<C, D, H>(s.dz, turned(s.frozen2));
  team.add_up(d_query);
  each<C, D>([&](int, int, int e) { d_query[e] += given[e]; });
  if (team.counts()) write<C, D>(call.dq + block.at_q, d_query, block.valid);
  add_product<C>(sent.s1, turned(s.given), s.act_q);
  add_product<C>(sent.s2, turned(s.query), s.dz);
}

}  // namespace hope
