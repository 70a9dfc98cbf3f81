// The kernels of `torch._foreach_*` on float32 (ATen/native/cuda/MultiTensorApply.cuh), of which the optimizers are made.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "kernels.h"

namespace simulated {
namespace {

// Limits of a launch, as torch has them for CUDA 13.
constexpr int TENSORS[] = {770, 448, 336, 252}, TENSORS_WITH_SCALARS[] = {672, 448, 336, 252};
constexpr int BLOCKS = 2240;
constexpr int64_t CHUNK = 65536;

template <int DEPTH>
struct Lists {  // TensorListMetadata
  static constexpr int most = TENSORS[DEPTH - 1];
  float* addresses[DEPTH][most];
  int64_t elements[most];
  uint16_t tensor_of_block[BLOCKS];
  int32_t chunk_of_block[BLOCKS];
  int32_t first_tensor;
  float scalar(int, float same) const { return same; }
};

template <int DEPTH>
struct ListsWithScalars {  // TensorListScalarListMetadata<float, DEPTH>
  static constexpr int most = TENSORS_WITH_SCALARS[DEPTH - 1];
  float* addresses[DEPTH][most];
  int64_t elements[most];
  float scalars[most];
  uint16_t tensor_of_block[BLOCKS];
  int32_t chunk_of_block[BLOCKS];
  float scalar(int tensor, float) const { return scalars[tensor]; }
};

using Compute = float (*)(float a, float b, float c, float scalar);

#define COMPUTE [](float a, float b, float c, float scalar) -> float

struct Functor {
  const char *name, *operation;  // both are in the kernel's name
  int parameters;                // before the scalar, if that is one of the launch's; 0: none
  Compute compute;
};

const Functor functors[] = {
    {"BinaryOpListAlphaFunctor<float", "std::plus<", 3, COMPUTE { return a + scalar * b; }},
    {"BinaryOpListAlphaFunctor<float", "std::minus<", 3, COMPUTE { return a - scalar * b; }},
    {"BinaryOpListAlphaFunctor<float", "std::multiplies<", 3, COMPUTE { return a * (scalar * b); }},
    {"BinaryOpListAlphaFunctor<float", "std::divides<", 3, COMPUTE { return a / (scalar * b); }},
    {"BinaryOpScalarFunctor<float", "std::plus<", 3, COMPUTE { return a + scalar; }},
    {"BinaryOpScalarFunctor<float", "std::multiplies<", 3, COMPUTE { return a * scalar; }},
    {"BinaryOpScalarFunctor<float", "std::divides<", 3, COMPUTE { return a / scalar; }},
    {"BinaryOpScalarListFunctor<float", "std::plus<", 0, COMPUTE { return a + scalar; }},
    {"BinaryOpScalarListFunctor<float", "std::multiplies<", 0, COMPUTE { return a * scalar; }},
    {"BinaryOpScalarListFunctor<float", "std::divides<", 0, COMPUTE { return a / scalar; }},
    {"TernaryOpScalarFunctor<float", "LerpFunctor<float>", 3,
     COMPUTE { return fabsf(scalar) < 0.5f ? a + scalar * (b - a) : b - (b - a) * (1 - scalar); }},
    {"PointwiseOpScalarFunctor<float", "std::multiplies<", 3, COMPUTE { return a + scalar * (b * c); }},
    {"PointwiseOpScalarFunctor<float", "std::divides<", 3, COMPUTE { return a + scalar * (b / c); }},
    {"PointwiseOpScalarListFunctor<float", "std::multiplies<", 0, COMPUTE { return a + scalar * (b * c); }},
    {"PointwiseOpScalarListFunctor<float", "std::divides<", 0, COMPUTE { return a + scalar * (b / c); }},
    {"UnaryOpFunctor<float", "Sqrt<float>", 0, COMPUTE { return sqrtf(a); }},
    {"UnaryOpFunctor<float", "Copy<float, float>", 0, COMPUTE { return a; }},
};

// Of `Functor<float, depth, inputs, result>`: the list that the result is written to.
int result_list(const std::string& name, const char* functor) {
  size_t end = name.find('>', name.find(functor));
  return end == std::string::npos ? 0 : name[end - 1] - '0';
}

template <class All, int DEPTH>
Work apply(const Functor& functor, int result, const Launch& launch) {
  auto all = std::make_shared<All>();
  memcpy(all.get(), launch.parameters[0], sizeof(All));
  float same = functor.parameters ? parameter<float>(launch, functor.parameters) : 0;
  return [&functor, result, all, same, blocks = launch.grid.x] {
    for (unsigned block = 0; block < blocks; block++) {
      int tensor = all->tensor_of_block[block];
      int64_t begin = all->chunk_of_block[block] * CHUNK;
      int64_t end = std::min(begin + CHUNK, all->elements[tensor]);
      auto in = [&](int list, int64_t index) { return list < DEPTH ? all->addresses[list % DEPTH][tensor][index] : 0; };
      float scalar = all->scalar(tensor, same);
      for (int64_t index = begin; index < end; index++)
        all->addresses[result][tensor][index] =
            functor.compute(in(0, index), in(1, index), in(2, index), scalar);
    }
  };
}

using Apply = Work (*)(const Functor& functor, int result, const Launch& launch);
constexpr Apply with_one_scalar[] = {apply<Lists<1>, 1>, apply<Lists<2>, 2>, apply<Lists<3>, 3>, apply<Lists<4>, 4>};
constexpr Apply with_scalars[] = {apply<ListsWithScalars<1>, 1>, apply<ListsWithScalars<2>, 2>,
                                  apply<ListsWithScalars<3>, 3>, apply<ListsWithScalars<4>, 4>};

}  // namespace

Bind foreach_kernel(const std::string& name) {
  if (!contains(name, "multi_tensor_apply_kernel<")) return nullptr;
  const std::string one = "TensorListMetadata<", several = "TensorListScalarListMetadata<float, ";
  bool scalars = contains(name, several.c_str());
  size_t at = name.find(scalars ? several : one);
  if (at == std::string::npos) return nullptr;
  int depth = name[at + (scalars ? several : one).size()] - '0';
  if (depth < 1 || depth > 4) return nullptr;
  for (const Functor& each : functors) {
    if (!contains(name, each.name) || !contains(name, each.operation)) continue;
    Apply apply = (scalars ? with_scalars : with_one_scalar)[depth - 1];
    int result = result_list(name, each.name);
    return [&each, apply, result](const Launch& launch) { return apply(each, result, launch); };
  }
  return nullptr;
}

}  // namespace simulated
