// The scan of hope/scan/chunked.py in one pass over the sequence for each row and head, on a CPU:
// the states of all memories of a head stay in its core's caches, and nothing is called in between.
//
// Compiled by build.py and called by call.py; all tensors are float or double, none is kept.
#include <utility>

#include "../../native/threads.h"
#include "head.h"

namespace hope {

// Calls f(head) for every row and head, on call.threads threads.
template <class T, class F>
void for_each_head(const Call<T>& call, int keep, F f) {
  for_each(call.rows * call.heads, int(call.threads), [&](int64_t which, int thread) {
    Head<T> head(call, call.scratch + thread * call.scratch_bytes, keep);
    head.begin(int(which));
    f(head);
  });
}

template <class T>
void forward(const Call<T>& call) {
  for_each_head(call, 0, [&](Head<T>& head) {
    head.first_state(head.state);
    for (int64_t chunk = 0; chunk < call.chunks(); chunk++) {
      const int64_t segment = chunk / call.segment_chunks;
      if (call.saved1 && segment && chunk % call.segment_chunks == 0) {
        if (head.again(chunk)) head.fresh(head.state);
        head.save(segment);
      }
      head.run_chunk(chunk, 0, call.out);
    }
    for (int m = 0; m < head.memories; m++) {
      freeze(head.s, head.state[m], head.base(m), head.frozen[m]);
      head.write_state(m, head.frozen[m], call.final1, call.final2);
    }
  });
}

constexpr int64_t KEEP_TOKENS = 256;  // segments up to this long keep all records; as chunked.py

// What backward has of a row and head, beside the records.
template <class T>
struct Gradients {
  Pair<T> state[6], frozen[6], base[6];
  FrameGradient<T>* blocks;
  ReadGradient<T> read;
  T *d_out, *dx, *d_log, *d_source, *readout[2];
  T bias[2];
  Pair<T>* starts;  // [segment_chunks][memories] where not all records are kept

  Gradients(Head<T>& head, bool keep_all) {
    const Sizes& s = head.s;
    const int64_t wide = int64_t(s.D) * TOKENS;
    for (int m = 0; m < head.memories; m++)
      for (Pair<T>* z : {&state[m], &frozen[m], &base[m]}) *z = Pair<T>::take(head.arena, s.D, s.H);
    blocks = head.arena.template take<FrameGradient<T>>(head.chunk_blocks);
    for (int j = 0; j < head.chunk_blocks; j++)
      head.put(blocks, j, FrameGradient<T>::take(head.arena, s));
    read = ReadGradient<T>::take(head.arena, s);
    for (T** z : {&d_out, &dx, &d_source}) *z = head.arena.template take<T>(wide);
    d_log = head.arena.template take<T>(2 * TOKENS);
    for (T*& z : readout) z = head.arena.template take<T>(s.D);
    const int64_t count = keep_all ? 0 : head.call.segment_chunks * head.memories;
    starts = head.arena.template take<Pair<T>>(count);
    for (int i = 0; i < count; i++) head.put(starts, i, Pair<T>::take(head.arena, s.D, s.H));
  }
};

// Derivative of the chunk whose `count` records begin at block `at`, of `recorded` in all.
template <class T>
void chunk_backward(Head<T>& head, Gradients<T>& g, int at, int count, int recorded) {
  const Call<T>& call = head.call;
  const Sizes& s = head.s;
  Frame<T>* blocks = head.frames + at;
  for (int j = 0; j < count; j++) g.blocks[j].zero(s);
  for (int m = 0; m < head.memories; m++) {
    const Record<T>* records = head.records + m * head.capacity + at;
    for (int j = count - 1; j >= 0; j--) {
      const Frame<T>& f = blocks[j];
      if (j == count - 1 || (m == MEM && blocks[j + 1].opens)) {
        int opening = m == MEM ? j : 0;
        while (m == MEM && !blocks[opening].opens) opening--;
        freeze(s, records[opening].delta, head.base(m), head.frozen[m]);
      }
      const bool last = at + j + 1 == recorded;
      const Read<T>* read = nullptr;
      if (m == MEM) {
        head.load_gradient(f, g.d_out);
        if (call.causal)
          read = head.reads + at + j;
        else
          read_start_backward(s, f, head.frozen[m], head.reads[at + j], g.d_out, g.frozen[m],
                              g.blocks[j], head.work);
      }
      write_backward(call, s, f, head.frozen[m], head.base(m), records[j],
                     last ? head.state[m] : records[j + 1].delta, read, g.d_out, g.read, g.state[m],
                     g.frozen[m], g.base[m], g.blocks[j], head.work);
      if (m == MEM && f.opens) {
        add_pair(s, g.frozen[m], g.state[m]);
        zero_pair(s, g.frozen[m]);
      }
    }
  }

  pull_readout(s, head.frozen, head.readout);
  for (int j = count - 1; j >= 0; j--) {
    const Frame<T>& f = blocks[j];
    FrameGradient<T>& grad = g.blocks[j];
    frame_backward(call, s, f, grad, head.work);
    T later = 0;
    for (int t = TOKENS - 1; t >= 0; t--) {
      const T p = grad.p[t] / std::max(f.eta[t], std::numeric_limits<T>::min());
      g.d_log[t] = p;
      g.d_log[TOKENS + t] = later - p + grad.boundary;
      later += grad.rows[t];
    }
    project_backward(s, head.frozen, head.readout, f, grad, g.d_log, g.frozen, g.dx, g.d_source,
                     g.readout, g.bias, head.work);
    const int64_t place = head.place_of(f);
    write_tokens(s, g.dx, f.count, call.dx + place);
    write_tokens(s, f.source ? g.d_source : grad.query, f.count, call.dq + place);
  }
  for (int m = 0; m < head.memories; m++) {
    if (m == MEM) continue;
    add_pair(s, g.frozen[m], g.state[m]);
    zero_pair(s, g.frozen[m]);
  }
}

// The gradients of a row and head, from those of its outputs.
template <class T>
void head_backward(Head<T>& head, bool keep_all) {
  const Call<T>& call = head.call;
  const Sizes& s = head.s;
  Gradients<T> g(head, keep_all);
  for (int m = 0; m < head.memories; m++) {
    zero_pair(s, g.frozen[m]);
    zero_pair(s, g.base[m]);
    head.read_state(m, call.d_final1, call.d_final2, g.state[m]);
  }
  for (int i = 0; i < 2; i++) {
    std::memset(g.readout[i], 0, sizeof(T) * s.D);
    g.bias[i] = 0;
  }
  const auto restart = [&](int64_t chunk) {
    if (!head.again(chunk)) return;
    for (int m = 0; m < head.memories; m++) {
      add_pair(s, g.state[m], g.base[m]);
      zero_pair(s, g.state[m]);
    }
  };

  const int64_t chunks = call.chunks(), length = std::min(call.segment_chunks, chunks);
  for (int64_t first = (chunks - 1) / length * length; first >= 0; first -= length) {
    const int64_t stop = std::min(first + length, chunks);
    head.load_saved(first / length);
    if (keep_all) {
      int recorded = 0, last = 0;
      for (int64_t chunk = first; chunk < stop; chunk++)
        recorded += last = head.run_chunk(chunk, recorded, nullptr);
      for (int64_t chunk = stop - 1, at = recorded - last; chunk >= first; chunk--) {
        chunk_backward(head, g, int(at), last, recorded);
        restart(chunk);
        last = head.chunk_blocks;  // all but a sequence's last chunk are whole
        at -= last;
      }
      continue;
    }
    for (int64_t chunk = first; chunk < stop; chunk++) {
      for (int m = 0; m < head.memories; m++)
        copy_pair(s, head.state[m], g.starts[(chunk - first) * head.memories + m]);
      if (chunk + 1 < stop) head.run_chunk(chunk, 0, nullptr);
    }
    for (int64_t chunk = stop - 1; chunk >= first; chunk--) {
      for (int m = 0; m < head.memories; m++)
        copy_pair(s, g.starts[(chunk - first) * head.memories + m], head.state[m]);
      const int count = head.run_chunk(chunk, 0, nullptr);
      chunk_backward(head, g, 0, count, count);
      restart(chunk);
    }
  }

  for (int m = 0; m < head.memories; m++) {
    if (call.d_state1)
      head.write_state(m, g.state[m], call.d_state1, call.d_state2);
    else
      add_pair(s, g.state[m], g.base[m]);
    const int64_t at = ((head.row * head.memories + m) * call.heads + head.head) * head.size();
    write_pair(s, g.base[m], call.d_w1 + at, call.d_w2 + at);
  }
  for (int i = 0; i < 2; i++) {
    const int64_t at = (head.row * 2 + i) * call.heads + head.head;
    std::memcpy(call.d_readout + at * call.width, g.readout[i], sizeof(T) * call.width);
    call.d_bias[at] = g.bias[i];
  }
}

// Blocks whose records backward keeps, and whether those are all of a segment's.
template <class T>
int kept_blocks(const Call<T>& call, bool& all) {
  const int64_t length = std::min(call.segment_chunks, call.chunks());
  const int blocks = Head<T>::blocks_of_chunk(call);
  all = length == 1 || length * call.projection_chunk <= KEEP_TOKENS;
  return int(all ? length * blocks : blocks);
}

template <class T>
void backward(const Call<T>& call) {
  bool all;
  const int keep = kept_blocks(call, all);
  for_each_head(call, keep, [&](Head<T>& head) { head_backward(head, all); });
}

template <class T>
int64_t scratch_bytes(const Call<T>& call, bool backward) {
  bool all = true;
  Head<T> head(call, nullptr, backward ? kept_blocks(call, all) : 0);
  if (backward) Gradients<T>(head, all);
  return head.arena.used;
}

}  // namespace hope

#define EXPORT extern "C" __attribute__((visibility("default")))
#define OPERATORS(KIND)                                                                \
  EXPORT int64_t hope_scratch_##KIND(const hope::Call<KIND>* call, int64_t backward) { \
    return hope::scratch_bytes(*call, backward);                                       \
  }                                                                                    \
  EXPORT void hope_forward_##KIND(const hope::Call<KIND>* call) {                      \
    hope::forward(*call);                                                              \
  }                                                                                    \
  EXPORT void hope_backward_##KIND(const hope::Call<KIND>* call) {                     \
    hope::backward(*call);                                                             \
  }
OPERATORS(float)
OPERATORS(double)
#ifdef COUNT_PRODUCTS
EXPORT int64_t hope_multiply_adds() {
  return std::exchange(hope::multiply_adds, 0);
}
#endif
