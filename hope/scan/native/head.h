// A row and head: its memories and the way through a chunk.
#pragma once
#include "projections.h"
#include "writes_backward.h"

namespace hope {

// A row and head: its memories, the chunk it is at and the buffers for both.
template <class T>
struct Head {
  const Call<T>& call;
  const Sizes s;
  const int memories, chunk_blocks, capacity;  // blocks of a chunk; blocks whose records are kept
  Arena arena;
  int row = 0, head = 0;

  Pair<T> start[6], frozen[6], state[6], spare;  // M_0; chunk-start W; Delta; the next Delta
  Readout<T> readout;
  T* weight[2];
  Frame<T>* frames;
  Record<T>* records;  // [memories][capacity] or one
  Read<T>* reads;      // [capacity] or one
  Work<T> work;

  // Records for `keep` blocks, or none (0).
  Head(const Call<T>& call, char* memory, int keep)
      : call(call),
        s{int(call.width), int(call.hidden), padded(int(call.width)), padded(int(call.hidden))},
        memories(int(call.memories)),
        chunk_blocks(blocks_of_chunk(call)),
        capacity(keep),
        arena{memory} {
    for (int m = 0; m < memories; m++) {
      start[m] = Pair<T>::take(arena, s.D, s.H);
      frozen[m] = Pair<T>::take(arena, s.D, s.H);
      state[m] = Pair<T>::take(arena, s.D, s.H);
    }
    spare = Pair<T>::take(arena, s.D, s.H);
    for (int i = 0; i < 2; i++) {
      readout.weight[i] = weight[i] = arena.take<T>(s.D);
      readout.pulled[i] = arena.take<T>(s.H);
    }
    work = Work<T>::take(arena, s);
    const int count = keep ? keep : chunk_blocks, kept = keep ? keep * memories : 1;
    frames = arena.take<Frame<T>>(count);
    for (int i = 0; i < count; i++) put(frames, i, Frame<T>::take(arena, s, memories > Q));
    records = arena.take<Record<T>>(kept);
    for (int i = 0; i < kept; i++) put(records, i, Record<T>::take(arena, s, keep > 0));
    reads = arena.take<Read<T>>(keep ? keep : 1);
    for (int i = 0; i < (keep ? keep : 1); i++) put(reads, i, Read<T>::take(arena, s));
  }

  template <class S>
  static void put(S* array, int at, const S& value) {
    if (array) array[at] = value;
  }

  // Blocks of the longest chunk there is.
  static int blocks_of_chunk(const Call<T>& call) {
    const int64_t tokens = std::min(call.projection_chunk, call.tokens);
    const int64_t mem = std::min(call.memory_chunk, tokens);
    return int((tokens + mem - 1) / mem * ((mem + TOKENS - 1) / TOKENS));
  }

  Pair<T> base(int m) const { return call.initial ? start[m] : Pair<T>{nullptr, nullptr}; }
  int64_t size() const { return call.width * call.hidden; }

  // Load M_0 and the readout of another row and head.
  void begin(int which) {
    row = which / int(call.heads);
    head = which % int(call.heads);
    for (int m = 0; m < memories; m++) {
      const int64_t at = (m * call.heads + head) * size();
      read_pair(s, call.w1 + at, call.w2 + at, start[m]);
    }
    const T* weights[2] = {call.w_eta, call.w_alpha};
    for (int i = 0; i < 2; i++) {
      std::memset(weight[i], 0, sizeof(T) * s.D);
      std::memcpy(weight[i], weights[i] + head * call.width, sizeof(T) * call.width);
    }
    readout.bias[0] = call.b_eta[head];
    readout.bias[1] = call.b_alpha[head];
  }

  // Delta of a row that starts from the weights.
  void fresh(Pair<T>* to) const {
    for (int m = 0; m < memories; m++)
      call.initial ? zero_pair(s, to[m]) : copy_pair(s, start[m], to[m]);
  }

  // One memory's part of [M, B, N, ...], zero where there is nothing; and its inverse.
  void read_state(int m, const T* w1, const T* w2, Pair<T> to) const {
    const int64_t at = ((m * call.rows + row) * call.heads + head) * size();
    read_pair(s, w1 ? w1 + at : nullptr, w2 ? w2 + at : nullptr, to);
  }
  void write_state(int m, Pair<T> from, T* w1, T* w2) const {
    const int64_t at = ((m * call.rows + row) * call.heads + head) * size();
    write_pair(s, from, w1 + at, w2 + at);
  }

  // Delta before the first token.
  void first_state(Pair<T>* to) const {
    if (!call.state1) return fresh(to);
    for (int m = 0; m < memories; m++) {
      read_state(m, call.state1, call.state2, to[m]);
      if (!call.initial) continue;
      for (int64_t i = 0; i < int64_t(s.D) * s.H; i++) {
        to[m].w1[i] -= start[m].w1[i];
        to[m].w2[i] -= start[m].w2[i];
      }
    }
  }

  bool again(int64_t chunk) const { return call.reset && call.reset[row * call.chunks() + chunk]; }

  int64_t saved_at(int64_t segment, int m) const {  // in [segments - 1, M, N, B], from segment 1
    return ((((segment - 1) * memories + m) * call.heads + head) * call.rows + row) * size();
  }
  void save(int64_t segment) const {
    for (int m = 0; m < memories; m++) {
      const int64_t at = saved_at(segment, m);
      write_pair(s, state[m], call.saved1 + at, call.saved2 + at);
    }
  }
  void load_saved(int64_t segment) {
    if (segment == 0) return first_state(state);
    for (int m = 0; m < memories; m++) {
      const int64_t at = saved_at(segment, m);
      read_pair(s, call.saved1 + at, call.saved2 + at, state[m]);
    }
  }

  // Cut a chunk into blocks and load its tokens; returns how many blocks there are.
  int load_blocks(int64_t chunk, Frame<T>* to) const {
    const int64_t from = chunk * call.projection_chunk;
    const int64_t until = std::min(from + call.projection_chunk, call.tokens);
    int count = 0;
    for (int64_t mem = from; mem < until; mem += call.memory_chunk) {
      const int64_t stop = std::min(mem + call.memory_chunk, until);
      for (int64_t first = mem; first < stop; first += TOKENS) {
        Frame<T>& f = to[count++];
        f.first = int(first);
        f.count = int(std::min<int64_t>(TOKENS, stop - first));
        f.opens = first == mem;
        read_tokens(s, call.x + row * call.x_row + head * call.x_head + first * call.x_token,
                    call.x_token, f.count, f.x);
        read_tokens(s, call.q + row * call.q_row + head * call.q_head + first * call.q_token,
                    call.q_token, f.count, f.source ? f.source : f.q);
      }
    }
    return count;
  }

  // Where a block lies in the contiguous [B, N, T, d].
  int64_t place_of(const Frame<T>& f) const {
    return ((int64_t(row) * call.heads + head) * call.tokens + f.first) * call.width;
  }
  void load_gradient(const Frame<T>& f, T* to) const {
    if (!call.d_out) {
      std::memset(to, 0, sizeof(T) * s.D * TOKENS);
      return;
    }
    const int64_t at = row * call.d_row + head * call.d_head + f.first * call.d_token;
    read_tokens(s, call.d_out + at, call.d_token, f.count, to);
  }

  // The chunk-start states, and what the blocks of a chunk share.
  void open_chunk(Frame<T>* blocks, int count) {
    for (int m = 0; m < memories; m++) freeze(s, state[m], base(m), frozen[m]);
    pull_readout(s, frozen, readout);
    for (int j = 0; j < count; j++) {
      project(call, s, frozen, readout, blocks[j], work);
      make_frame(call, s, capacity > 0, blocks[j], work);
    }
  }

  // M_mem's answers to a block that is written already.
  void read_block(const Frame<T>& f, const Record<T>& record, Read<T>& read, T* out) {
    T* own = work.wide[3];
    if (call.causal)
      read_causal(call, s, f, base(MEM), record.delta, record, work.hidden[1], read, own, work);
    else
      read_start(s, f, frozen[MEM], read, own, work);
    if (out) write_tokens(s, own, f.count, out + place_of(f));
  }

  // Run a chunk from `state` to the state behind it; out may be null. With records it is the one
  // that begins at block `at` of them.
  int run_chunk(int64_t chunk, int at, T* out) {
    if (again(chunk)) fresh(state);
    Frame<T>* blocks = frames + at;
    const int count = load_blocks(chunk, blocks);
    open_chunk(blocks, count);
    for (int m = 0; m < memories; m++) {
      if (capacity) copy_pair(s, state[m], records[m * capacity + at].delta);
      for (int j = 0; j < count; j++) {
        const Frame<T>& f = blocks[j];
        Record<T>& record = records[capacity ? m * capacity + at + j : 0];
        if (!capacity) record.delta = state[m];
        if (m == MEM && f.opens && j) freeze(s, record.delta, base(m), frozen[m]);
        // The next Delta: into the next record, or where the one before the last was.
        const Pair<T> next = capacity && j + 1 < count ? (&record + 1)->delta
                             : capacity                ? state[m]
                                                       : spare;
        write(call, s, f, frozen[m], base(m), record, next, work);
        if (m == MEM) read_block(f, record, reads[capacity ? at + j : 0], out);
        if (!capacity) std::swap(state[m], spare);
      }
    }
    return count;
  }
};

}  // namespace hope
