// What backward has of a block, and the derivative of M_mem's reads (Eqs. 83, 90).
#pragma once
#include "projections.h"

namespace hope {

// Shared memory of `write_backward`. What is written late has the place of what is read early.
struct Gradients {
  Matrix<WIDTH> frozen1, frozen2, base1, base2, delta1, delta2, state1, state2;
  Matrix<WIDTH> key, value, e, gap, r, u1, u2, x1, x2, x_slope, back, dz_k, dz_v;
  Matrix<WIDTH> value_again;
  Matrix<WIDTH> given, query, act_q, dz;
  Split<WIDTH> side1, side2;
  Split<C> system1, system2;
  Matrix<C> gram1, gram2, across1, across2, d_across1, d_across2;
  Decays decays;
  real *length, *inverse, *shorter, *along_act, *rows, *room, *room2, *room3;

  DEVICE explicit Gradients(Shared& shared) : decays(shared) {
    frozen1 = shared.state(), frozen2 = shared.state();
    if (INITIAL) base1 = shared.state(), base2 = shared.state();
    delta1 = shared.state(), delta2 = shared.state();
    state1 = shared.state(), state2 = shared.state();
    key = shared.tokens(), e = shared.tokens(), gap = shared.tokens(), value = shared.tokens();
    r = value;
    u1 = shared.tokens(), u2 = shared.tokens(), x1 = shared.tokens(), x2 = shared.tokens();
    x_slope = shared.tokens(), back = shared.tokens(), dz_k = x1, dz_v = x2;
    value_again = u1;
    gram1 = shared.square(), gram2 = shared.square();
    side1 = {x_slope, back}, side2 = {u1, u2};
    system1 = {gram1, gram2}, system2 = {{x1.at}, {x2.at}};
    if (READ != NONE) given = shared.tokens(), query = shared.tokens(), dz = shared.tokens();
    if (READ != NONE) act_q = shared.tokens();
    if (READ == CAUSAL) {
      across1 = shared.square(), across2 = shared.square();
      d_across1 = shared.square(), d_across2 = shared.square();
    }
    length = shared.row(), inverse = shared.row(), shorter = shared.row();
    along_act = shared.row(), rows = shared.row();
    room = shared.take<real>(128);
    room2 = shared.take<real>(128);
    room3 = shared.take<real>(WARPS);
  }
  static_assert(Matrix<C>::size(C) <= C * WIDTH);

  DEVICE Projection projection() const {
    return {frozen1, frozen2, key, e, back, x_slope, room, room2, rows};
  }
};

using Tokens = Fragment<C, WIDTH>;
using State = Fragment<D, H>;

// S: the gradient of W behind what is still to come.
struct Sent {
  State s1, s2;
};

// What a block's passes hand on in a thread's registers.
struct Passed {
  Tokens u1, u2;
  Tokens r;          // and then its gradient
  Tokens du1, du2;   // gradients of U1 and U2, then of their systems' right-hand sides
  Tokens de, d_key;  // of W1's keys, of k
  Rows<C> rows, p;   // what the decay before a token multiplies; <dU, U>
  real boundary;     // <S, Delta> behind the block

  DEVICE void load(const Record& record) {
    u1 = read<C, D>(record.u1);
    if (WRITES2) u2 = read<C, H>(record.u2);
  }
};

// The derivative of a causal read: into U1, U2, the query, its keys; what it sends to the state is
// left in shared memory.
DEVICE void read_causal_backward(const Call& call, const Gradients& s, const Block& block,
                                 const Record& record, Passed& b) {
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
    d_query[e] += given[e];
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
  write<C, D>(call.dq + block.at_q, d_query, block.valid);
}

// The derivative of `read_start`.
DEVICE void read_start_backward(const Call& call, const Gradients& s, const Block& block,
                                Sent& sent) {
  const auto given = read<C, D>(call.d_out + block.token * D, block.valid);
  put<C>(s.given, given);
  put<C>(s.query, read<C, D>(call.q + block.at_q, block.valid));
  barrier();
  const auto z = product<C, H, D>(s.query, s.frozen2), d_act = product<C, H, D>(s.given, s.frozen1);
  put<C>(s.act_q, [&](int, int, int e) { return gelu(z[e]).value; });
  put<C>(s.dz, [&](int, int, int e) { return d_act[e] * gelu(z[e]).slope; });
  barrier();
  auto d_query = product<C, D, H>(s.dz, turned(s.frozen2));
  each<C, D>([&](int, int, int e) { d_query[e] += given[e]; });
  write<C, D>(call.dq + block.at_q, d_query, block.valid);
  add_product<C>(sent.s1, turned(s.given), s.act_q);
  add_product<C>(sent.s2, turned(s.query), s.dz);
}

}  // namespace hope
