// What a call of the kernels is told, and numbers as they are kept and as they are computed with.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace hope {

// bfloat16, rounded to the nearest, ties to even.
struct Bfloat16 {
  uint16_t bits;
  Bfloat16() = default;
  explicit Bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const uint32_t rounded = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
    bits = value == value ? uint16_t(rounded) : uint16_t(0x7FC0);
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

template <class S>
struct Computed {
  typedef S type;
};
template <>
struct Computed<Bfloat16> {
  typedef float type;
};

constexpr int64_t BLOCK = 256;  // tokens of a task
constexpr int64_t SUMMED = 64;  // tokens whose parts of a sum are added in its own precision

inline int64_t blocks_of(int64_t tokens) {
  return (tokens + BLOCK - 1) / BLOCK;
}

// Sums over tokens, some of them at a time in `part`, of all in double.
template <class T>
struct Sums {
  std::vector<T> part;
  std::vector<double> total;
  explicit Sums(int64_t count) : part(count), total(count) {}

  // To be called after each token's part was added.
  void after(int64_t tokens) {
    if (tokens % SUMMED == 0) add();
  }
  void write(T* to) {
    add();
    for (size_t i = 0; i < total.size(); i++) to[i] = T(total[i]);
  }
  void add() {
    for (size_t i = 0; i < total.size(); i++) {
      total[i] += double(part[i]);
      part[i] = 0;
    }
  }
};

}  // namespace hope
