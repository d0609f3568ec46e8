// Writing blocks into a memory, and M_mem's read (Eqs. 83-90; the closed form is
// hope/scan/closed_form.py's and hope/scan/writes.py's).
#pragma once
#include "projections.h"

namespace hope {

// Shared memory of `write_forward`. What is written late has the place of what is read early.
struct Buffers {
  Matrix<H> frozen1, frozen2, base1, base2, delta1, delta2;
  Matrix<D> key, value, r, query, u1;
  Matrix<H> act, gap, act_q, u2;
  Split<D> side1;  // right-hand sides
  Split<H> side2;
  Split<C> system1, system2;
  Matrix<C> across1, across2;
  Decays decays;
  real *length, *inverse, *reach, *shorter, *room, *squares;
  real *strict1, *strict2, *room1, *room2;  // of both systems

  DEVICE explicit Buffers(Shared& shared) : decays(shared) {
    frozen1 = shared.state(), frozen2 = shared.state();
    delta1 = shared.state(), delta2 = shared.state();
    if (INITIAL) base1 = shared.state(), base2 = shared.state();
    key = shared.tokens(), value = shared.tokens(), act = shared.hidden(), u1 = shared.tokens();
    r = value, gap = {u1.at};
    u2 = shared.hidden();
    side1 = {shared.tokens(), shared.tokens()}, side2 = {shared.hidden(), shared.hidden()};
    system1 = {shared.square(), shared.square()}, system2 = {shared.square(), shared.square()};
    if (READ != NONE) query = shared.tokens(), act_q = shared.hidden();
    if (READ == CAUSAL) across1 = shared.square(), across2 = shared.square();
    length = shared.row(), inverse = shared.row(), reach = shared.row(), shorter = shared.row();
    room = shared.take<real>(2 * ROOM);
    if (SHARDS > 1) squares = shared.row();
    strict1 = shared.take<real>(Triangle<C>::size), strict2 = shared.take<real>(Triangle<C>::size);
    room1 = shared.take<real>(Triangle<C>::room), room2 = shared.take<real>(Triangle<C>::room);
  }

  DEVICE Projection projection() const {
    return {frozen1, frozen2, key, value, act, gap, room, room + ROOM, shorter};
  }
};

// act and slope of keys at the frozen state, and what values give; |act|^2 in room.
DEVICE void activate(const Buffers& s, Fragment<C, H>& slope) {
  const auto z = product<C, H, D>(s.key, s.frozen2);
  const auto z_v = product<C, H, D>(s.value, s.frozen2);
  Fragment<C, H> act, gap;
  Rows<C> square = {};
  each<C, H>([&](int i, int, int e) {
    const Gelu key = gelu(z[e]);
    const real value = gelu(z_v[e]).value;
    act[e] = key.value;
    slope[e] = key.slope;
    gap[e] = AIMED ? value : key.value - value;
    square.add(i, e, key.value * key.value);
  });
  put<C>(s.act, act);
  put<C>(s.gap, gap);
  store_rows(square, s.room);
  s.decays.fill();
}

// Sums over a memory's hidden features: r, what U1 starts from, the keys' gram matrix and squares.
DEVICE void add_up(const Buffers& s, Team& team, Fragment<C, D>& r, Fragment<C, D>& u1,
                   Fragment<C, C>& gram) {
  team.send(Team::FIRST, r);
  if (DELTA1) {
    team.send(Team::SECOND, u1);
    team.send(Team::SQUARE, gram);
    range(C, [&](int i) { team.send(Team::ROW, i, row<C>(s.room, i)); });
  }
  team.meet();
  team.receive(Team::FIRST, r);
  if (DELTA1) {
    team.receive(Team::SECOND, u1);
    team.receive(Team::SQUARE, gram);
    range(C, [&](int i) { s.squares[i] = row<C>(s.room, i) + team.received(Team::ROW, i); });
    barrier();
  }
}

// U1, U2 of a block whose keys, values and Delta are there; both also in shared memory. The systems
// are inverted by a warp each while the others make what they are applied to.
DEVICE void solve(const Call& call, const Buffers& s, Team& team, const Inputs& given,
                  const Record& record, real* shares, Fragment<C, D>& u1, Fragment<C, H>& u2) {
  const auto &key = given.key, &value = given.value;
  Fragment<C, H> slope;
  activate(s, slope);
  barrier();
  const auto length = [&](int i) { return root(SHARDS > 1 ? s.squares[i] : row<C>(s.room, i)); };
  const auto inverse = [&](int i) { return inverted(larger(length(i), NORM_EPS)); };
  auto r = product<C, D, H>(s.gap, turned(s.frozen1));
  if (DELTA1) {
    u1 = product<C, D, H>(s.act, turned(s.delta1));
    each<C, D>([&](int i, int, int e) { u1[e] *= s.decays.prev[i]; });
    if (INITIAL) add_product<H>(u1, s.act, turned(s.base1));
  }
  Fragment<C, C> gram = {};
  if (SHARDS > 1) {
    if (DELTA1) gram = product<C, C, H>(s.act, turned(s.act));
    add_up(s, team, r, u1, gram);
  }
  if (DELTA1) {
    const auto inverses = per_row<C>(inverse);
    each<C, D>([&](int i, int, int e) { u1[e] *= inverses.at(i, e); });
    if (SHARDS == 1) gram = product<C, C, H>(s.act, turned(s.act));
    each<C, C>([&](int i, int j, int e) {
      const real scale = s.decays.ratio(i, j) * s.decays.eta[i];
      s.strict1[i * Triangle<C>::ROW + j] = gram[e] * scale * inverses.at(i, e) * inverse(j);
    });
  }
  if (DELTA2) {
    const auto keys = product<C, C, D>(s.key, turned(s.key));
    each<C, C>([&](int i, int j, int e) {
      s.strict2[i * Triangle<C>::ROW + j] = keys[e] * s.decays.ratio(i, j) * s.decays.eta[i];
    });
  }
  if (READ == CAUSAL && WRITES2) {
    const auto across = product<C, C, D>(s.query, turned(s.key));
    put<C>(s.across2, [&](int i, int j, int e) { return across[e] * s.decays.ratio(i, j); });
  }
  range(C, [&](int i) {
    s.length[i] = DELTA1 ? length(i) : real(0);
    s.inverse[i] = DELTA1 ? inverse(i) : real(1);
    s.reach[i] = s.inverse[i] * s.decays.end[i];
  });
  if (AIMED) {
    Rows<C> square = {};
    each<C, D>([&](int i, int, int e) {
      r[e] += value[e];
      square.add(i, e, r[e] * r[e]);
    });
    store_rows(square, s.room2);
    barrier();
    range(C, [&](int i) { s.shorter[i] = inverted(larger(root(row<C>(s.room2, i)), NORM_EPS)); });
    barrier();
    each<C, D>([&](int i, int, int e) { r[e] = key[e] - r[e] * s.shorter[i]; });
  } else {
    each<C, D>([&](int, int, int e) { r[e] += key[e] - value[e]; });
  }
  put<C>(s.r, r);
  const auto pace = per_row<C>([&](int i) {
    const real own = length(i);
    return DELTA1 ? own * inverted(own * own + STEP_FLOOR) : real(1);
  });
  each<C, D>([&](int i, int, int e) {
    u1[e] = (r[e] * pace.at(i, e) + (DELTA1 ? u1[e] : real(0))) * s.decays.eta[i];
  });
  if (DELTA1) put<C>(s.side1, u1);
  barrier();
  if (DELTA1) invert<C>(0, s.strict1, s.room1, s.system1, call.keep ? record.system1 : nullptr);
  if (DELTA2) invert<C>(1, s.strict2, s.room2, s.system2, call.keep ? shares : nullptr);
  if (WRITES2) {
    u2 = product<C, H, D>(s.r, s.frozen1);
    each<C, H>([&](int, int, int e) { u2[e] *= slope[e]; });
    if (DELTA2) {
      const auto own = product<C, H, D>(s.key, s.delta2);
      each<C, H>([&](int i, int, int e) { u2[e] += own[e] * s.decays.prev[i]; });
      if (INITIAL) add_product<D>(u2, s.key, s.base2);
    }
    each<C, H>([&](int i, int, int e) { u2[e] *= s.decays.eta[i]; });
    if (DELTA2) put<C>(s.side2, u2);
  }
  barrier();
  if (DELTA1) u1 = exact_product<C, D, C>(s.system1, s.side1);
  put<C>(s.u1, u1);
  if (WRITES2) {
    if (DELTA2) u2 = exact_product<C, H, C>(s.system2, s.side2);
    put<C>(s.u2, u2);
  }
  barrier();
}

// The queries and what the memory adds to them.
DEVICE void answer_with(const Call& call, Team& team, const Block& block, Fragment<C, D>& answer) {
  team.add_up(answer);
  if (!team.counts()) return;
  const auto query = read<C, D>(call.q + block.at_q, block.valid);
  each<C, D>([&](int, int, int e) { answer[e] += query[e]; });
  write<C, D>(call.out + block.token * D, answer, block.valid);
}

// M_mem of each token's predecessor applied to its query, stored in `out` (Eq. 83); where the call
// keeps, what the derivative needs instead.
DEVICE void read_causal(const Call& call, const Buffers& s, Team& team, const Block& block,
                        const Record& record) {
  auto z = product<C, H, D>(s.query, s.delta2);
  each<C, H>([&](int i, int, int e) { z[e] *= s.decays.prev[i]; });
  if (INITIAL) add_product<D>(z, s.query, s.base2);
  if (WRITES2) less_product<C>(z, s.across2, s.u2);
  if (call.keep) write<C, H>(record.z_q, z);
  put<C>(s.act_q, [&](int, int, int e) { return gelu(z[e]).value; });
  barrier();
  auto across = product<C, C, H>(s.act_q, turned(s.act));
  each<C, C>([&](int i, int j, int e) { across[e] *= s.decays.ratio(i, j) * s.inverse[j]; });
  if (call.keep) {
    write<C, C>(record.across1, across);
    return;
  }
  put<C>(s.across1, across);
  auto answer = product<C, D, H>(s.act_q, turned(s.delta1));
  each<C, D>([&](int i, int, int e) { answer[e] *= s.decays.prev[i]; });
  if (INITIAL) add_product<H>(answer, s.act_q, turned(s.base1));
  barrier();
  less_product<C>(answer, s.across1, s.u1);
  answer_with(call, team, block, answer);
}

// The memory of the chunk's start applied to the queries (Eq. 90).
DEVICE void read_start(const Call& call, const Buffers& s, Team& team, const Block& block) {
  const auto z = product<C, H, D>(s.query, s.frozen2);
  put<C>(s.act_q, [&](int, int, int e) { return gelu(z[e]).value; });
  barrier();
  auto answer = product<C, D, H>(s.act_q, turned(s.frozen1));
  answer_with(call, team, block, answer);
}

// Write a segment's blocks, and read M_mem. The memories that project fill the buffers themselves,
// a chunk at a time from W at its start, and wait for one another before they write it.
DEVICE void write_forward(const Call& call, int g, int program, char* memory) {
  Shared shared = {memory};
  const Buffers s(shared);
  const Place place(call, g, program);
  const int m = program / SHARDS;
  Team team(call, g, program);
  // Where the records are, and the frozen W, of `opened` chunks one after another.
  int slot = 0, chunk = 0, inside = 0;
  fetch<D>(place.frozen, s.frozen1);
  fetch<D>(place.frozen + SIZE, s.frozen2);
  if (INITIAL) {
    fetch<D>(place.base, s.base1);
    fetch<D>(place.base + SIZE, s.base2);
  }
  real* state = call.state + ((long long)program * call.count + g) * 2 * SIZE;
  auto d1 = read<D, H>(state), d2 = read<D, H>(state + SIZE);
  put<D>(s.delta1, d1);
  put<D>(s.delta2, d2);
  fetched();
  if (READ == NONE) {
    project(call, s.projection(), team, g, m, 0, smaller(call.open, call.blocks));
    cluster_barrier();
  }
  Block block(call, g, 0);
  Inputs given;
  given.load(call, block);
  s.decays.load(call, block);
  for (int n = 0; n < call.blocks; n++) {
    const Record record(place.work + (long long)slot * Record::size);
    put<C>(s.key, given.key);
    put<C>(s.value, given.value);
    if (READ != NONE) put<C>(s.query, read<C, D>(call.q + block.at_q, block.valid));
    fetched();
    barrier();

    Fragment<C, D> u1;
    Fragment<C, H> u2;
    real* shares = program == 0 ? place.systems + (long long)slot * C * C : nullptr;
    solve(call, s, team, given, record, shares, u1, u2);
    const bool closes = ++inside == call.open;
    const int left = call.blocks - n - 1;
    const Block next(call, g, block.local + (left > 0 ? C : 0));
    if (READ != NONE || !closes) {
      given.load(call, next);
      s.decays.load(call, next);
    }
    if (call.keep) {
      half* before = place.deltas + (long long)slot * 2 * SIZE;
      keep<D>(s.delta1, before);
      keep<D>(s.delta2, before + SIZE);
      write<C, D>(record.u1, u1);
      if (WRITES2) write<C, H>(record.u2, u2);
      range(C, [&](int i) {
        record.length[i] = s.length[i];
        record.inverse[i] = s.inverse[i];
        if (AIMED) record.shorter[i] = s.shorter[i];
      });
    }
    if (READ == CAUSAL) read_causal(call, s, team, block, record);
    if (READ == START && !call.keep) read_start(call, s, team, block);

    const real total = s.decays.total[0];
    const auto written1 = product<D, H, C>(turned(s.u1, s.reach), s.act);
    each<D, H>([&](int, int, int e) { d1[e] = d1[e] * total - written1[e]; });
    if (WRITES2) {
      const auto written2 = product<D, H, C>(turned(s.key, s.decays.end), s.u2);
      each<D, H>([&](int, int, int e) { d2[e] = d2[e] * total - written2[e]; });
    } else {
      each<D, H>([&](int, int, int e) { d2[e] *= total; });
    }
    const bool again = starts_again(call, g, call.first_token + block.local + C);
    Fragment<D, H> fresh1 = {}, fresh2 = {};
    if (closes || again) fresh1 = read<D, H>(place.fresh), fresh2 = read<D, H>(place.fresh + SIZE);
    if (again) {
      each<D, H>([&](int, int, int e) {
        d1[e] = INITIAL ? real(0) : fresh1[e];
        d2[e] = INITIAL ? real(0) : fresh2[e];
      });
    }
    barrier();
    put<D>(s.delta1, d1);
    put<D>(s.delta2, d2);
    if (closes) {
      if (INITIAL)
        each<D, H>([&](int, int, int e) {
          fresh1[e] += d1[e];
          fresh2[e] += d2[e];
        });
      else
        fresh1 = d1, fresh2 = d2;
      put<D>(s.frozen1, fresh1);
      put<D>(s.frozen2, fresh2);
      inside = 0, chunk = chunk + 1 < call.opened ? chunk + 1 : 0;
      half* after = place.frozen + (long long)chunk * 2 * SIZE;
      write<D, H>(after, fresh1);
      write<D, H>(after + SIZE, fresh2);
      if (READ == NONE && left > 0) {
        project(call, s.projection(), team, g, m, next.local, smaller(call.open, left));
        cluster_barrier();
        given.load(call, next);
        s.decays.load(call, next);
      }
    }
    slot = slot + 1 < call.works ? slot + 1 : 0;
    block = next;
  }
  write<D, H>(state, d1);
  write<D, H>(state + SIZE, d2);
}

}  // namespace hope
