// A loop shared out over threads.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE__
#include <xmmintrin.h>
#endif
#include <cstdint>

namespace hope {

// How this thread treats denormal numbers, for others to do the same.
#if defined(__SSE__)
inline unsigned rounding_mode() {
  return _mm_getcsr();
}
inline void set_rounding_mode(unsigned mode) {
  _mm_setcsr(mode);
}
#else
inline unsigned rounding_mode() {
  return 0;
}
inline void set_rounding_mode(unsigned) {}
#endif

// Calls f(i, thread) for every i below count.
template <class F>
void for_each(int64_t count, int threads, F f) {
  const unsigned mode = rounding_mode();
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; i++) {
#ifdef _OPENMP
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    set_rounding_mode(mode);
    f(i, thread);
  }
}

}  // namespace hope
