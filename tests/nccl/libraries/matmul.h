// A product of float32 matrices as both cuBLAS libraries define it, column by column, on a stream.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#include <utility>

#define API extern "C" __attribute__((visibility("default")))

namespace simulated {

struct Matrix {
  const float* data = nullptr;
  bool transposed = false;
  int64_t leading = 0;  // dimension
  int64_t stride = 0;  // between the matrices of a batch

  float at(int64_t batch, int64_t row, int64_t column) const {
    if (transposed) std::swap(row, column);
    return data[batch * stride + row + column * leading];
  }
};

struct Product {
  int64_t rows, columns, inner;
  float alpha, beta;
  Matrix a{}, b{}, c{};
  float* to = nullptr;
  int64_t leading = 0, stride = 0, batches = 1;
  const float* bias = nullptr;  // one number a row
  bool relu = false;

  void compute() const {
    for (int64_t batch = 0; batch < batches; batch++)
      for (int64_t column = 0; column < columns; column++)
        for (int64_t row = 0; row < rows; row++) {
          double sum = 0;
          for (int64_t k = 0; k < inner; k++) sum += (double)a.at(batch, row, k) * b.at(batch, k, column);
          sum = alpha * sum + (beta ? beta * c.at(batch, row, column) : 0) + (bias ? bias[row] : 0);
          to[batch * stride + row + column * leading] = relu && sum < 0 ? 0 : (float)sum;
        }
  }

  int launch(cudaStream_t stream) const {
    auto run = [](void* data) { static_cast<Product*>(data)->compute(); };
    return cudaLaunchHostFunc(stream, run, new Product(*this)) == cudaSuccess ? 0 : 13;  // kept: a graph runs it again
  }
};

}  // namespace simulated
