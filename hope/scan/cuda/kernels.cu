// The kernels; elsewhere than on a device the same as functions, for tests.
#include "writes.h"
#include "writes_backward.h"

#ifdef __CUDACC_RTC__
#define KERNEL(name, blocks, program)                                                         \
  extern "C" __global__ void __launch_bounds__(hope::THREADS, blocks) name(hope::Call call) { \
    hope::program(call, blockIdx.x, blockIdx.y, shared_memory);                               \
  }
KERNEL(write_forward, 2, write_forward)
KERNEL(write_backward, 2, write_backward)
#if !READ
KERNEL(project_forward, 2, project_forward)
KERNEL(project_backward, 2, projection_backward)
#endif
#else
#include <vector>

namespace hope {
template <class Buffers>
int needed() {
  Shared shared = {nullptr};
  Buffers buffers(shared);
  return int(shared.at - static_cast<char*>(nullptr));
}
template <class Program>
void run(const Call& call, int memories, int bytes, Program program) {
  std::vector<double> memory(bytes / sizeof(double) + 64);
  for (int m = 0; m < memories; m++)
    for (int g = 0; g < call.count; g++) {
      // Shared memory that nothing has written is not a number.
      for (double& x : memory) std::memset(&x, 0xff, sizeof(x));
      program(call, g, m, reinterpret_cast<char*>(memory.data()));
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
#define KERNEL(name, bytes, program)                           \
  extern "C" void name(const hope::Call* call, int memories) { \
    hope::run(*call, memories, bytes(), hope::program);        \
  }
KERNEL(write_forward, forward_bytes, write_forward)
KERNEL(write_backward, backward_bytes, write_backward)
KERNEL(project_forward, forward_bytes, project_forward)
KERNEL(project_backward, backward_bytes, projection_backward)
#endif
