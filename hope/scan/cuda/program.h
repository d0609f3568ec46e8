// What the programs have in common: options, arguments, shared memory, a block's decays.
//
// One block of threads is one shard of one memory of one (row, head), H of its hidden features; it
// walks over blocks of TOKENS tokens with the state's float32 numbers in registers and its operands
// in shared memory.
//
// Tensors, with programs the shards of a launch's memories, g = row * heads + head of `count`, F =
// `length` tokens of a segment's buffers, which begin at first_token of the sequence: x, source, q,
// out, d_out [G, T, D]; k, v, query [G, F, D]; eta, log_alpha [G, F]; fresh [programs, heads, 2, D,
// H]: M_0 (W1, then W2 transposed), base: the same as products take it; state [programs, G, 2,
// ...]: Delta, moved on in place; frozen [programs, G, opened, 2, ...]: W at the start of memory
// chunk c in slot c % opened; deltas [programs, G, works, 2, ...]: Delta before every block; work
// [programs, G, works, Record]; systems [G, works, C, C]: W2's (I + T)^-1; readout, d_readout,
// bias, d_bias of eta and alpha [2, heads or G, D] and [2, heads or G]; reset: [rows, chunks]
// bytes; sums [programs, G, 2, SUMS]: see `Team`. What programs send back has one for each of
// `all_programs`, of which the launch's begin at `offset`: dk, dv [.., G, F, D], d_log_eta,
// d_log_alpha [.., G, F]; dx [programs, G, F, D].
#pragma once
#include "copies.h"
#include "sums.h"
#include "systems.h"

namespace hope {

enum Rule { NORMALISED = 0, INPUT = 1, OFF = 2, TARGET = 3 };
enum Reading { NONE = 0, CAUSAL = 1, START = 2 };
enum Memory { KEY = 0, VALUE = 1, ETA = 2, ALPHA = 3, QUERY = 4 };  // of those that project

// Given when compiled: MEMORIES of a cluster, SHARDS of each (1 or 2), TOKENS (16 or 32), RULE,
// READ, INITIAL, HAS_RESET, and ADAPTIVE, where queries are the buffers' own numbers.
constexpr int C = TOKENS, D = WIDTH, H = 64, SIZE = D * H;
constexpr bool DELTA1 = RULE == NORMALISED || RULE == TARGET;
constexpr bool DELTA2 = RULE == NORMALISED || RULE == INPUT;
constexpr bool AIMED = RULE == TARGET, WRITES2 = !AIMED;
constexpr real NORM_EPS = real(1e-6), STEP_FLOOR = real(0.01);

#if ADAPTIVE
using Query = real;
#else
using Query = half;
#endif

// The arguments of a launch; hope/scan/cuda/call.py has the same fields in the same order.
struct Call {
  const half *x, *source;
  const Query* q;
  half* out;
  real *k, *v, *eta, *log_alpha, *query;
  const half* base;
  const real* fresh;
  real* state;
  half *frozen, *deltas;
  real *work, *systems;
  const real *readout, *bias;
  const unsigned char* reset;
  const half* d_out;
  Query* dq;
  real *dk, *dv, *d_log_eta, *d_log_alpha, *dx;
  const real* d_query;
  real *d_base, *d_state, *d_readout, *d_bias;
  half* stash;  // [programs, G, open, STASHED]
  real* sums;
  long long q_stride;
  int count, heads, q_first, tokens, length, first_token, blocks;
  int opened, works, open, chunk, chunks, keep, offset, all_programs;
  double eta_max;
};

// What the derivative needs of a block of one memory.
struct Record {
  real *u1, *u2, *system1, *length, *inverse, *shorter, *z_q, *across1;

  DEVICE explicit Record(real* at)
      : u1(at),
        u2(at + C * D),
        system1(u2 + C * H),
        length(system1 + C * C),
        inverse(length + C),
        shorter(length + 2 * C),
        z_q(length + 3 * C),
        across1(z_q + C * H) {}
  static constexpr int size = C * D + C * H + C * C + 3 * C + (READ == CAUSAL) * (C * H + C * C);
};

// Shared memory, piece by piece.
struct Shared {
  char* at;

  template <class T>
  DEVICE T* take(int count) {
    T* piece = reinterpret_cast<T*>(at);
    at += (count * int(sizeof(T)) + 127) / 128 * 128;
    return piece;
  }
  template <int N>
  DEVICE Matrix<N> matrix(int rows) {
    half* piece = take<half>(Matrix<N>::size(rows));
#ifdef __CUDACC_RTC__
    return {unsigned(reinterpret_cast<char*>(piece) - shared_memory)};
#else
    return {piece};
#endif
  }
  DEVICE Matrix<H> state() { return matrix<H>(D); }
  DEVICE Matrix<D> tokens() { return matrix<D>(C); }
  DEVICE Matrix<H> hidden() { return matrix<H>(C); }
  DEVICE Matrix<C> square() { return matrix<C>(C); }
  DEVICE real* row() { return take<real>(C); }
  DEVICE real* room() { return take<real>(ROOM); }
};

// A program's own part of a launch's tensors.
struct Place {
  const half* base;
  const real* fresh;
  half *frozen, *deltas;
  real *work, *systems;

  DEVICE Place(const Call& call, int g, int program) {
    const long long own = (long long)program * call.count + g;
    const int first = program * call.heads + g % call.heads;
    base = call.base + (long long)first * 2 * SIZE;
    fresh = call.fresh + (long long)first * 2 * SIZE;
    frozen = call.frozen + own * call.opened * 2 * SIZE;
    deltas = call.deltas + own * call.works * 2 * SIZE;
    work = call.work + own * call.works * Record::size;
    systems = call.systems + (long long)g * call.works * C * C;
  }
};

// The programs of a memory, each with a shard of its hidden features, and sums over all of these:
// each sends what it has of them, meets the others and receives theirs. All get the same numbers.
struct Team {
  static constexpr int SUMS = 3 * C * D + C * C + C;
  static constexpr int FIRST = 0, SECOND = C * D, THIRD = 2 * C * D, SQUARE = 3 * C * D,
                       ROW = SQUARE + C * C;  // where something of that size may lie
  real *own, *other;
  int shard, round = 0;

  DEVICE Team(const Call& call, int g, int program) : shard(program % SHARDS) {
    static_assert(SHARDS == 1 || SHARDS == 2);
    const long long step = (long long)call.count * 2 * SUMS;
    own = call.sums + program * step + (long long)g * 2 * SUMS;
    other = own + (shard ? -step : step);
  }
  // Of what all shards have alike, one counts.
  DEVICE bool counts() const { return SHARDS == 1 || shard == 0; }

  template <int M, int N>
  DEVICE void send(int place, const Fragment<M, N>& x) const {
    if (SHARDS > 1) write<M, N>(own + round * SUMS + place, x);
  }
  DEVICE void send(int place, int i, real x) const {
    if (SHARDS > 1) own[round * SUMS + place + i] = x;
  }
  // Also a barrier of the program's own threads. What is sent next does not touch what is received.
  DEVICE void meet() {
    if (SHARDS == 1) return;
    cluster_barrier();
    round ^= 1;
  }
  template <int M, int N>
  DEVICE void receive(int place, Fragment<M, N>& x) const {
    if (SHARDS == 1) return;
    const auto theirs = read<M, N>(other + (round ^ 1) * SUMS + place);
    each<M, N>([&](int, int, int e) { x[e] += theirs[e]; });
  }
  DEVICE Fragment<C, D> sent(int place) const {
    return read<C, D>(own + (round ^ 1) * SUMS + place);
  }
  // x becomes its sum over the shards.
  template <int M, int N>
  DEVICE void add_up(Fragment<M, N>& x) {
    send(FIRST, x);
    meet();
    receive(FIRST, x);
  }
  DEVICE real received(int place, int i) const { return other[(round ^ 1) * SUMS + place + i]; }
};

// A block of tokens: where it lies in the buffers, and how many of it there are.
struct Block {
  int local, valid;
  long long here, token;  // in [G, F] and in [G, T]
  long long at_q;

  DEVICE Block(const Call& call, int g, int local)
      : local(local),
        valid(call.tokens - call.first_token - local),
        here((long long)g * call.length + local),
        token((long long)g * call.tokens + call.first_token + local),
        at_q(g * call.q_stride + (long long)(call.q_first + local) * D) {
    if (valid > C) valid = C;
    if (valid < 0) valid = 0;
  }
};

// What a block of tokens is written from, in float32.
struct Inputs {
  Fragment<C, D> key, value;

  DEVICE void load(const Call& call, const Block& block) {
    key = read<C, D>(call.k + block.here * D);
    value = read<C, D>(call.v + block.here * D);
  }
};

// Decays of a block [C], as logs too: before a token, and behind it; total: of the whole block, and
// what it loses.
struct Decays {
  real *eta, *log_alpha, *before, *through, *prev, *end, *lost, *total;

  DEVICE explicit Decays(Shared& shared) {
    eta = shared.row(), log_alpha = shared.row(), before = shared.row(), through = shared.row();
    prev = shared.row(), end = shared.row(), lost = shared.row(), total = shared.row();
  }
  DEVICE void load(const Call& call, const Block& block) const {
    fetch<C>(call.eta + block.here, eta);
    fetch<C>(call.log_alpha + block.here, log_alpha);
  }
  // Behind `fetched` and a barrier.
  DEVICE void fill() const {
    running<C>([&](int i) { return log_alpha[i]; },
               [&](int i, real sum, real rest) {
                 before[i] = sum;
                 through[i] = sum + log_alpha[i];
                 prev[i] = decayed(sum);
                 lost[i] = hope::lost(sum);
                 end[i] = decayed(rest);
                 if (i == C - 1) {
                   total[0] = decayed(through[i]);
                   total[1] = hope::lost(through[i]);
                 }
               });
  }
  // A_{i-1} / A_j for j < i, else zero.
  DEVICE real ratio(int i, int j) const {
    const real share = exponential(before[i] - through[j]);
    return j < i ? share : real(0);
  }
};

// Whether the row starts again at token `end`: at the projection chunk that begins there.
DEVICE bool starts_again(const Call& call, int g, int end) {
#if HAS_RESET
  const int chunk = end / call.chunk;
  return end % call.chunk == 0 && chunk < call.chunks &&
         call.reset[(long long)(g / call.heads) * call.chunks + chunk];
#else
  return false;
#endif
}

DEVICE int smaller(int a, int b) {
  return a < b ? a : b;
}

}  // namespace hope
