// The kernels; elsewhere than on a device the same as functions, for tests.
#include "writes.h"
#include "writes_backward.h"

#ifdef __CUDACC_RTC__
#if READ && SHARDS == 1
#define CLUSTER
#else
#define CLUSTER __cluster_dims__(1, (MEMORIES * SHARDS), 1)
#endif
#define KERNEL(name)                                                                       \
  extern "C" __global__ void CLUSTER __launch_bounds__(hope::THREADS, 512 / hope::THREADS) \
      name(hope::Call call) {                                                              \
    hope::name(call, blockIdx.x, blockIdx.y, shared_memory);                               \
  }
KERNEL(write_forward)
KERNEL(write_backward)
#else
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace hope {
// Where a thread for each program of a (row, head) waits for the others.
std::mutex lock;
std::condition_variable all_there;
int expected, arrived, round_number;
void cluster_barrier() {
  std::unique_lock<std::mutex> held(lock);
  const int mine = round_number;
  if (++arrived == expected) {
    arrived = 0, round_number++;
    all_there.notify_all();
  } else {
    all_there.wait(held, [&] { return round_number != mine; });
  }
}

template <class Buffers>
int needed() {
  Shared shared = {nullptr};
  Buffers buffers(shared);
  return int(shared.at - static_cast<char*>(nullptr));
}
template <class Program>
void run(const Call& call, int programs, int bytes, Program program) {
  expected = programs;
  for (int g = 0; g < call.count; g++) {
    std::vector<std::thread> together;
    for (int n = 0; n < programs; n++)
      together.emplace_back([=, &call] {
        // Shared memory that nothing has written is not a number.
        std::vector<double> memory(bytes / sizeof(double) + 64);
        for (double& x : memory) std::memset(&x, 0xff, sizeof(x));
        program(call, g, n, reinterpret_cast<char*>(memory.data()));
      });
    for (std::thread& one : together) one.join();
  }
}
}  // namespace hope

extern "C" int forward_bytes() {
  return hope::needed<hope::Buffers>();
}
extern "C" int backward_bytes() {
  return hope::needed<hope::Gradients>();
}
extern "C" int record_size() {
  return hope::Record::size;
}
extern "C" int stash_size() {
  return hope::STASHED;
}
extern "C" int sums_size() {
  return 2 * hope::Team::SUMS;
}
#define KERNEL(name, bytes)                                    \
  extern "C" void name(const hope::Call* call, int programs) { \
    hope::run(*call, programs, bytes(), hope::name);           \
  }
KERNEL(write_forward, forward_bytes)
KERNEL(write_backward, backward_bytes)
#endif
