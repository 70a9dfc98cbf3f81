// libcublasLt: products of float32 matrices, with a bias and ReLU. Of other types, each succeeds and computes nothing.
#define __CUDA_FP16_H__  // the wheels lack some headers that these include
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
struct __half;
struct __nv_bfloat16;
#include <cublasLt.h>
#include <string.h>

#include <map>
#include <vector>

#include "matmul.h"

using simulated::Product;

namespace {

struct Layout {
  cudaDataType_t type;
  uint64_t rows, columns;
  int64_t leading, batches = 1, stride = 0;
};

struct Description {
  std::map<int, std::vector<char>> attributes;

  template <class T>
  T get(cublasLtMatmulDescAttributes_t attribute, T otherwise) const {
    auto found = attributes.find(attribute);
    if (found != attributes.end()) memcpy(&otherwise, found->second.data(), sizeof(T));
    return otherwise;
  }
};

template <class Handle>
const Layout& layout_of(Handle handle) {
  return *reinterpret_cast<const Layout*>(handle);
}

bool all_float32(std::initializer_list<cublasLtMatrixLayout_t> layouts) {
  for (auto each : layouts)
    if (layout_of(each).type != CUDA_R_32F) return false;
  return true;
}

}  // namespace

API cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(new char);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type, uint64_t rows,
                                              uint64_t columns, int64_t leading) {
  *layout = reinterpret_cast<cublasLtMatrixLayout_t>(new Layout{type, rows, columns, leading});
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete reinterpret_cast<Layout*>(layout);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t handle,
                                                    cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                    size_t) {
  Layout* layout = reinterpret_cast<Layout*>(handle);
  if (attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) layout->batches = *static_cast<const int32_t*>(value);
  if (attribute == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET) memcpy(&layout->stride, value, sizeof layout->stride);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* description, cublasComputeType_t, cudaDataType_t) {
  *description = reinterpret_cast<cublasLtMatmulDesc_t>(new Description);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
  delete reinterpret_cast<Description*>(description);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                                  cublasLtMatmulDescAttributes_t attribute, const void* value,
                                                  size_t size) {
  const char* bytes = static_cast<const char*>(value);
  reinterpret_cast<Description*>(description)->attributes[attribute].assign(bytes, bytes + size);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                                  cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                  cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                                  cublasLtMatmulHeuristicResult_t* found, int* count) {
  memset(found, 0, sizeof *found);
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t description, const void* alpha,
                                  const void* a, cublasLtMatrixLayout_t layout_a, const void* b,
                                  cublasLtMatrixLayout_t layout_b, const void* beta, const void* c,
                                  cublasLtMatrixLayout_t layout_c, void* d, cublasLtMatrixLayout_t layout_d,
                                  const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t stream) {
  if (!all_float32({layout_a, layout_b, layout_c, layout_d})) return CUBLAS_STATUS_SUCCESS;
  const auto& wanted = *reinterpret_cast<const Description*>(description);
  const Layout &la = layout_of(layout_a), &lb = layout_of(layout_b), &lc = layout_of(layout_c),
               &ld = layout_of(layout_d);
  bool transpose_a = wanted.get(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_N) != CUBLAS_OP_N;
  bool transpose_b = wanted.get(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N) != CUBLAS_OP_N;
  int epilogue = wanted.get<int>(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_DEFAULT);
  int64_t inner = (int64_t)(transpose_a ? la.rows : la.columns);
  Product product{(int64_t)ld.rows, (int64_t)ld.columns, inner, *(const float*)alpha, *(const float*)beta};
  product.a = {(const float*)a, transpose_a, la.leading, la.stride};
  product.b = {(const float*)b, transpose_b, lb.leading, lb.stride};
  product.c = {(const float*)c, false, lc.leading, lc.stride};
  product.to = (float*)d;
  product.leading = ld.leading;
  product.stride = ld.stride;
  product.batches = ld.batches;
  if (epilogue & CUBLASLT_EPILOGUE_BIAS)
    product.bias = wanted.get<const float*>(CUBLASLT_MATMUL_DESC_BIAS_POINTER, nullptr);
  product.relu = epilogue & CUBLASLT_EPILOGUE_RELU;
  return (cublasStatus_t)product.launch(stream);
}
