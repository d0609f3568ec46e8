// The CPU's side of hope/fused: each in one pass over its tensors. Compiled by
// hope/native/build.py, called by call.py; all tensors are float, double or bfloat16, none is kept.
#include "convolution.h"
#include "gated_norm.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define OPERATORS(NAME, TYPE)                                                \
  EXPORT void hope_convolve_##NAME(const hope::Convolution* call) {          \
    hope::convolve<TYPE>(*call);                                             \
  }                                                                          \
  EXPORT void hope_convolve_backward_##NAME(const hope::Convolution* call) { \
    hope::convolve_backward<TYPE>(*call);                                    \
  }                                                                          \
  EXPORT void hope_gated_norm_##NAME(const hope::GatedNorm* call) {          \
    hope::gated_norm<TYPE>(*call);                                           \
  }                                                                          \
  EXPORT void hope_gated_norm_backward_##NAME(const hope::GatedNorm* call) { \
    hope::gated_norm_backward<TYPE>(*call);                                  \
  }
OPERATORS(float32, float)
OPERATORS(float64, double)
OPERATORS(bfloat16, hope::Bfloat16)
