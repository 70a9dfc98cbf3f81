// libcublas: products of float32 matrices. Of the other types and functions, each succeeds and computes nothing.
#include "matmul.h"

using simulated::Product;

namespace {
struct Handle {
  cudaStream_t stream = nullptr;
  int pointer_mode = 0, math_mode = 0;
};
constexpr int FLOAT32 = 0;  // CUDA_R_32F
}  // namespace

API int cublasCreate_v2(Handle** handle) {
  *handle = new Handle;
  return 0;
}
API int cublasDestroy_v2(Handle* handle) {
  delete handle;
  return 0;
}
API int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return 0;
}
API int cublasGetPointerMode_v2(Handle* handle, int* mode) {
  *mode = handle->pointer_mode;
  return 0;
}
API int cublasSetPointerMode_v2(Handle* handle, int mode) {
  handle->pointer_mode = mode;
  return 0;
}
API int cublasGetMathMode(Handle* handle, int* mode) {
  *mode = handle->math_mode;
  return 0;
}
API int cublasSetMathMode(Handle* handle, int mode) {
  handle->math_mode = mode;
  return 0;
}
API int cublasSgemmStridedBatched(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k,
                                  const float* alpha, const float* a, int lda, long long stride_a, const float* b,
                                  int ldb, long long stride_b, const float* beta, float* c, int ldc,
                                  long long stride_c, int batches) {
  Product product{m, n, k, *alpha, *beta};
  product.a = {a, transpose_a != 0, lda, stride_a};
  product.b = {b, transpose_b != 0, ldb, stride_b};
  product.c = {c, false, ldc, stride_c};
  product.to = c;
  product.leading = ldc;
  product.stride = stride_c;
  product.batches = batches;
  return product.launch(handle->stream);
}
API int cublasSgemm_v2(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k, const float* alpha,
                       const float* a, int lda, const float* b, int ldb, const float* beta, float* c, int ldc) {
  return cublasSgemmStridedBatched(handle, transpose_a, transpose_b, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c,
                                   ldc, 0, 1);
}
API int cublasGemmEx(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha,
                     const void* a, int type_a, int lda, const void* b, int type_b, int ldb, const void* beta, void* c,
                     int type_c, int ldc, int, int) {
  if (type_a != FLOAT32 || type_b != FLOAT32 || type_c != FLOAT32) return 0;
  return cublasSgemm_v2(handle, transpose_a, transpose_b, m, n, k, (const float*)alpha, (const float*)a, lda,
                        (const float*)b, ldb, (const float*)beta, (float*)c, ldc);
}
