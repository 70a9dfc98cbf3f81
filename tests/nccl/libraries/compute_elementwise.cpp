// Elementwise kernels of float32 (ATen/native/cuda/CUDALoops.cuh): a functor, and the tensors that it is applied to.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <array>

#include "kernels.h"

namespace simulated {
namespace {

constexpr size_t STATE = 16;  // bytes of the largest functor below
using State = std::array<char, STATE>;

template <class T>
T field(const State& state, size_t offset) {
  T value;
  memcpy(&value, state.data() + offset, sizeof value);
  return value;
}

float number(const State& state, size_t offset = 0) { return field<float>(state, offset); }

// aten/src/ATen/native/cuda/TensorCompare.cu: {ClampLimits limits; float lower, upper}
float clamp(const State& state, const float* in) {
  int limits = field<int>(state, 0);
  float value = in[0];
  if (isnan(value)) return value;
  if (limits == 0 || limits == 2) value = std::max(value, number(state, 4));
  if (limits == 1) value = std::min(value, number(state, 4));
  if (limits == 2) value = std::min(value, number(state, 8));
  return value;
}

struct Functor {
  const char *name, *detail;  // both are in the kernel's name
  int inputs;
  size_t size;  // of its state
  float (*compute)(const State& state, const float* in);
  bool to_bool = false;
};

#define BINARY(op) "::BinaryFunctor<float, float, float, at::native::binary_internal::" op "<float>"
#define FIRST_IS_SCALAR(op) "::AUnaryFunctor<float, float, float, at::native::binary_internal::" op "<float>"
#define SECOND_IS_SCALAR(op) "::BUnaryFunctor<float, float, float, at::native::binary_internal::" op "<float>"
#define COMPUTE [](const State& state, const float* in) -> float

const Functor functors[] = {
    {"FillFunctor<float>", "", 0, 4, COMPUTE { return number(state); }},
    {"direct_copy_kernel_cuda", "{lambda(float)#1}", 1, 0, COMPUTE { return in[0]; }},
    {"CUDAFunctor_add<float>", "", 2, 4, COMPUTE { return in[0] + number(state) * in[1]; }},
    {"CUDAFunctorOnSelf_add<float>", "", 1, 8, COMPUTE { return in[0] + number(state, 4) * number(state); }},
    {BINARY("MulFunctor"), "", 2, 0, COMPUTE { return in[0] * in[1]; }},
    {BINARY("DivFunctor"), "", 2, 0, COMPUTE { return in[0] / in[1]; }},
    {FIRST_IS_SCALAR("MulFunctor"), "", 1, 8, COMPUTE { return number(state, 4) * in[0]; }},
    {SECOND_IS_SCALAR("MulFunctor"), "", 1, 8, COMPUTE { return in[0] * number(state, 4); }},
    {SECOND_IS_SCALAR("DivFunctor"), "", 1, 8, COMPUTE { return in[0] / number(state, 4); }},
    {"CompareEqFunctor<float>", "::BinaryFunctor<float, float, bool", 2, 4,
     COMPUTE { return (in[0] == in[1]) != (field<int>(state, 0) == 1); }, true},
    {"launch_clamp_scalar", "{lambda(float)#1}", 1, 12, clamp},
    {"threshold_kernel_impl<float>", "", 2, 8, COMPUTE { return in[0] <= number(state) ? number(state, 4) : in[1]; }},
    {"pow_tensor_scalar_kernel_impl<float, float>", "{lambda(float)#1}", 1, 0, COMPUTE { return in[0] * in[0]; }},
    {"mse_kernel_cuda", "{lambda(float, float)#1}", 2, 0, COMPUTE { return (in[0] - in[1]) * (in[0] - in[1]); }},
    {"mse_backward_cuda_kernel", "{lambda(float, float, float)#1}", 3, 4,
     COMPUTE { return number(state) * (in[0] - in[1]) * in[2]; }},
    {"neg_kernel_cuda", "{lambda(float)#1}", 1, 0, COMPUTE { return -in[0]; }},
    {"reciprocal_kernel_cuda", "{lambda(float)#1}", 1, 0, COMPUTE { return 1 / in[0]; }},
    {"sqrt_kernel_cuda", "{lambda(float)#1}", 1, 0, COMPUTE { return sqrtf(in[0]); }},
};

const Functor* functor_of(const std::string& name) {
  for (const Functor& each : functors)
    if (contains(name, each.name) && contains(name, each.detail)) return &each;
  return nullptr;
}

void store(const Functor& functor, const State& state, const float* in, char* to, size_t index) {
  float value = functor.compute(state, in);
  if (functor.to_bool)
    reinterpret_cast<bool*>(to)[index] = value != 0;
  else
    reinterpret_cast<float*>(to)[index] = value;
}

State state_at(const Functor& functor, const void* from) {
  State state{};
  memcpy(state.data(), from, functor.size);
  return state;
}

// vectorized_elementwise_kernel(int elements, Functor, std::array<char*, 1 + inputs>): all tensors are contiguous.
Work contiguous(const Functor& functor, const Launch& launch) {
  State state = state_at(functor, launch.parameters[1]);
  std::array<char*, 4> data{};
  memcpy(data.data(), launch.parameters[2], sizeof(char*) * (1 + functor.inputs));
  return [&functor, state, data, elements = parameter<int>(launch, 0)] {
    for (int index = 0; index < elements; index++) {
      float in[3];
      for (int input = 0; input < functor.inputs; input++)
        in[input] = reinterpret_cast<const float*>(data[1 + input])[index];
      store(functor, state, in, data[0], index);
    }
  };
}

// elementwise_kernel(int elements, closure): the closure of gpu_kernel_impl_nocast has the offsets, the data and the
// functor, in this order.
template <int N>
struct Closure {
  Offsets<N> offsets;
  char* data[N];
  char state[STATE];
};

template <int N>
Work strided(const Functor& functor, const Launch& launch) {
  auto closure = std::make_shared<Closure<N>>();
  memcpy(closure.get(), launch.parameters[1], offsetof(Closure<N>, state) + functor.size);
  State state = state_at(functor, closure->state);
  return [&functor, state, closure, elements = parameter<int>(launch, 0)] {
    for (int index = 0; index < elements; index++) {
      float in[3];
      for (int input = 1; input < N; input++)
        in[input - 1] = *reinterpret_cast<const float*>(closure->data[input] + closure->offsets.get(index, input));
      store(functor, state, in, closure->data[0] + closure->offsets.get(index, 0), 0);
    }
  };
}

// FillFunctor of any other type, by its size.
template <class T>
Work fill(const Launch& launch) {
  return [value = parameter<T>(launch, 1), to = parameter<T*>(launch, 2), elements = parameter<int>(launch, 0)] {
    std::fill(to, to + elements, value);
  };
}

// vectorized_elementwise_kernel of two tensors of int32: pipelining's stages agree by products of 0 and 1.
Work product_of_integers(const Launch& launch) {
  auto data = parameter<std::array<int*, 3>>(launch, 2);
  return [data, elements = parameter<int>(launch, 0)] {
    for (int index = 0; index < elements; index++) data[0][index] = data[1][index] * data[2][index];
  };
}

}  // namespace

Bind elementwise_kernel(const std::string& name) {
  bool is_contiguous = contains(name, "void at::native::vectorized_elementwise_kernel<");
  if (!is_contiguous && !(contains(name, "void at::native::elementwise_kernel<") && contains(name, "_impl_nocast<")))
    return nullptr;
  if (const Functor* functor = functor_of(name)) {
    if (is_contiguous) return [functor](const Launch& launch) { return contiguous(*functor, launch); };
    constexpr Work (*by_inputs[])(const Functor&, const Launch&) = {strided<1>, strided<2>, strided<3>, strided<4>};
    return [functor, work = by_inputs[functor->inputs]](const Launch& launch) { return work(*functor, launch); };
  }
  if (!is_contiguous) return nullptr;
  if (contains(name, "::BinaryFunctor<int, int, int, at::native::binary_internal::MulFunctor<int>"))
    return product_of_integers;
  if (contains(name, "FillFunctor<long>") || contains(name, "FillFunctor<double>")) return fill<int64_t>;
  if (contains(name, "FillFunctor<int>")) return fill<int32_t>;
  if (contains(name, "FillFunctor<c10::BFloat16>") || contains(name, "FillFunctor<c10::Half>")) return fill<int16_t>;
  if (contains(name, "FillFunctor<bool>") || contains(name, "FillFunctor<unsigned char>")) return fill<int8_t>;
  return nullptr;
}

}  // namespace simulated
