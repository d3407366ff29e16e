// out [m, n] = a b, any steps; 16 x 16 values per block.
template <typename T>
DEV void gemm(T* out, const bf16* a, const bf16* b, int m, int n, int k, i64 a_row, i64 a_k, i64 b_k, i64 b_col,
              i64 ldc, int add) {
  __shared__ float as[16][17], bs[16][17];
  const int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
  const i64 row0 = (i64)blockIdx.y * 16, col0 = (i64)blockIdx.x * 16;
  float sum = 0.0f;
  for (int k0 = 0; k0 < k; k0 += 16) {
    const i64 ar = row0 + ty, bc = col0 + tx;
    as[ty][tx] = ar < m && k0 + tx < k ? to_f32(a[ar * a_row + (k0 + tx) * a_k]) : 0.0f;
    bs[ty][tx] = bc < n && k0 + ty < k ? to_f32(b[(k0 + ty) * b_k + bc * b_col]) : 0.0f;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16; i++) sum += as[ty][i] * bs[i][tx];
    __syncthreads();
  }
  const i64 row = row0 + ty, col = col0 + tx;
  if (row < m && col < n) {
    T* to = out + row * ldc + col;
    *to = from_f32<T>(add ? to_f32(*to) + sum : sum);
  }
}

extern "C" __global__ void gemm_f32(float* out, const bf16* a, const bf16* b, int m, int n, int k, i64 a_row, i64 a_k,
                                    i64 b_k, i64 b_col, i64 ldc, int add) {
  gemm(out, a, b, m, n, k, a_row, a_k, b_k, b_col, ldc, add);
}
extern "C" __global__ void gemm_bf16(bf16* out, const bf16* a, const bf16* b, int m, int n, int k, i64 a_row, i64 a_k,
                                     i64 b_k, i64 b_col, i64 ldc, int add) {
  gemm(out, a, b, m, n, k, a_row, a_k, b_k, b_col, ldc, add);
}
