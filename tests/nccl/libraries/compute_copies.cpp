// Kernels that only move bytes: those with which DDP and FSDP2 pack tensors into buffers and unpack them.
#include <string.h>

#include <algorithm>

#include "kernels.h"

namespace simulated {
namespace {

// CatArrInputTensorMetadata of ATen/native/cuda/Shape.cu: up to 128 one-dimensional tensors, one a row of the grid.
struct Inputs {
  const char* data[128];
  unsigned offset[128], size[128], elements[128];
};

template <size_t ELEMENT>
Work concatenate(const Launch& launch) {
  auto inputs = std::make_shared<Inputs>(parameter<Inputs>(launch, 1));
  return [inputs, to = parameter<char*>(launch, 0), trailing = parameter<unsigned>(launch, 4), rows = launch.grid.y] {
    for (unsigned row = 0; row < rows; row++)
      memcpy(to + inputs->offset[row] * trailing * ELEMENT, inputs->data[row], inputs->elements[row] * ELEMENT);
  };
}

// ATen/native/cuda/TensorShape.cu: the chunks of each split become one tensor. The tables are on the device.
Work split_with_sizes(const Launch& launch) {
  return [to = parameter<char**>(launch, 0), from = parameter<char**>(launch, 1),
          sizes = parameter<int64_t*>(launch, 2), split_of_block = parameter<int64_t*>(launch, 3),
          stride = parameter<int64_t>(launch, 5), chunks = parameter<int64_t>(launch, 6), blocks = launch.grid.x] {
    int64_t splits = split_of_block[blocks - 1] + 1;
    for (int64_t split = 0; split < splits; split++)
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        memcpy(to[split] + chunk * sizes[split], from[split] + chunk * stride, sizes[split]);
  };
}

// As above: each tensor is cut into chunks of its padded size, and chunk k of all tensors becomes row k.
Work chunk_cat(const Launch& launch) {
  return [from = parameter<char**>(launch, 0), to = parameter<char*>(launch, 1),
          tensor_of_block = parameter<int64_t*>(launch, 2), starts = parameter<int64_t*>(launch, 3),
          sizes = parameter<int64_t*>(launch, 5), padded = parameter<int64_t*>(launch, 6),
          slice_size = parameter<int64_t>(launch, 8), chunk_size = parameter<int64_t>(launch, 9),
          grid = launch.grid] {
    int64_t tensors = tensor_of_block[grid.x - 1] + 1;
    for (int64_t slice = 0; slice < grid.z; slice++)
      for (int64_t chunk = 0; chunk < grid.y; chunk++)
        for (int64_t tensor = 0; tensor < tensors; tensor++) {
          int64_t begin = chunk * padded[tensor];
          int64_t there = std::min(padded[tensor], std::max<int64_t>(0, sizes[tensor] - begin));
          char* row = to + slice * slice_size + chunk * chunk_size + starts[tensor];
          memcpy(row, from[tensor] + slice * sizes[tensor] + begin, there);
          memset(row + there, 0, padded[tensor] - there);
        }
  };
}

}  // namespace

Bind copy_kernel(const std::string& name) {
  if (contains(name, "::CatArrayBatchedCopy")) {  // the third number is that of dimensions
    if (contains(name, "OpaqueType<4u>, unsigned int, 1, 128, 1")) return concatenate<4>;
    if (contains(name, "OpaqueType<8u>, unsigned int, 1, 128, 1")) return concatenate<8>;
  }
  if (contains(name, "split_with_sizes_copy_out_contiguous_no_cast_kernel(")) return split_with_sizes;
  if (contains(name, "chunk_cat_cuda_kernel<char, char>")) return chunk_cat;
  return nullptr;
}

}  // namespace simulated
