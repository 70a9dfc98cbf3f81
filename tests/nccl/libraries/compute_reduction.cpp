// Sums, means and norms of float32 (ATen/native/cuda/Reduce.cuh), and the few kernels that are of no family.
#include <math.h>

#include <algorithm>

#include "kernels.h"

namespace simulated {
namespace {

// ReduceOp: the operation (a factor of MeanOps; sums and norms have no state), and ReduceConfig.
struct Reduction {
  float factor, identity;
  int element_size, inputs, outputs, not_used[11];
  bool vectorize_input;
  int output_vector_size;
  Offsets<1> input;
  Offsets<2> output;
  const char* source;
  char* destination[2];
  void *accumulation, *between_blocks;
  int* semaphores;
  int64_t base_index;
  bool accumulate, final_output;
  int destinations;
};

enum Kind { SUM, MEAN, NORM };

template <Kind kind>
Work reduce(const Launch& launch) {
  auto all = std::make_shared<Reduction>(parameter<Reduction>(launch, 0));
  return [all] {
    for (int output = 0; output < all->outputs; output++) {
      const char* from = all->source + all->output.get(output, 1);
      float* to = reinterpret_cast<float*>(all->destination[0] + all->output.get(output, 0));
      double sum = 0;
      for (int input = 0; input < all->inputs; input++) {
        float value = *reinterpret_cast<const float*>(from + all->input.get(input, 0));
        sum += kind == NORM ? (double)value * value : value;
      }
      if (kind == MEAN) sum *= all->factor;
      if (kind == NORM) sum = sqrt(sum);
      *to = (float)(all->accumulate ? *to + sum : sum);
    }
  };
}

// torch.cuda._sleep: a cycle is a nanosecond, as cudaDevAttrClockRate says.
Work sleep(const Launch& launch) {
  return [seconds = parameter<int64_t>(launch, 0) / 1e9] {
    for (double end = now() + seconds; now() < end && !faulted();)
      usleep((useconds_t)std::max(1.0, std::min(10e3, (end - now()) * 1e6)));
  };
}

// torch._assert_async: how a program breaks its device for good.
Work assert_async(const Launch& launch) {
  return [condition = parameter<const float*>(launch, 0)] {
    if (*condition == 0) fault(cudaErrorAssert, "device-side assert");
  };
}

}  // namespace

Bind reduction_kernel(const std::string& name) {
  if (!contains(name, "void at::native::reduce_kernel<") || !contains(name, "ReduceOp<float")) return nullptr;
  if (contains(name, "MeanOps<float, float, float, float>")) return reduce<MEAN>;
  if (contains(name, "sum_functor<float, float, float>")) return reduce<SUM>;
  if (contains(name, "NormTwoOps<float, float, float")) return reduce<NORM>;
  return nullptr;
}

Bind other_kernel(const std::string& name) {
  if (contains(name, "spin_kernel(")) return sleep;
  if (contains(name, "_assert_async_cuda_kernel<float>")) return assert_async;
  return nullptr;
}

}  // namespace simulated
