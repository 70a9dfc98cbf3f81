// What kernels compute. torch's own host code has chosen a kernel and packed its parameters; its device code cannot run
// here. A few dozen kernels are known by their names, and computed on the stream's thread from those parameters, whose
// layouts are those of torch's headers (named where they are used). All others take time and compute nothing.
#pragma once
#include <cuda_runtime_api.h>

#include <string>

#include "device.h"

namespace simulated {

struct Launch {
  dim3 grid;
  void** parameters;  // valid during the call that launches only
};

using Bind = std::function<Work(const Launch& launch)>;  // takes copies of the parameters

// Each file of `compute_*.cpp` knows some kernels by their demangled name. nullptr: not this one.
Bind elementwise_kernel(const std::string& name);
Bind reduction_kernel(const std::string& name);
Bind foreach_kernel(const std::string& name);
Bind copy_kernel(const std::string& name);
Bind other_kernel(const std::string& name);

inline bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

template <class T>
const T& parameter(const Launch& launch, int index) {
  return *static_cast<const T*>(launch.parameters[index]);
}

// ATen/cuda/detail/OffsetCalculator.cuh: the byte offsets of an element in each of N strided operands.
template <int N>
struct Offsets {
  struct Divider {
    unsigned divisor, magic, shift;
  };
  int dimensions;
  Divider sizes[25];
  unsigned strides[25][N];

  unsigned get(unsigned index, int operand) const {
    unsigned offset = 0;
    for (int dimension = 0; dimension < dimensions; dimension++) {
      offset += index % sizes[dimension].divisor * strides[dimension][operand];
      index /= sizes[dimension].divisor;
    }
    return offset;
  }
};

}  // namespace simulated
