// See the CPU's op; `lr` and `root` carry the corrections of the moments' bias.
extern "C" __global__ void adamw(float* p, bf16* rounded, float* m, float* v, const float* g, const float* scale, i64 n,
                                 float keep, float lr, float beta1, float gain1, float beta2, float gain2,
                                 float root, float eps) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float d = *scale * g[i];
  const float mi = beta1 * m[i] + gain1 * d, vi = beta2 * v[i] + gain2 * d * d;
  m[i] = mi;
  v[i] = vi;
  const float x = p[i] * keep - lr * mi / (sqrtf(vi) * root + eps);
  p[i] = x;
  rounded[i] = to_bf16(x);
}

template <bool SQUARES> DEV void sums(double* partials, const float* x, i64 n) {
  __shared__ double shared[32];
  double sum = 0.0;
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) {
    const double v = x[i];
    sum += SQUARES ? v * v : v;
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}
extern "C" __global__ void sum_squares(double* partials, const float* x, i64 n) { sums<true>(partials, x, n); }
extern "C" __global__ void sum(double* partials, const float* x, i64 n) { sums<false>(partials, x, n); }

extern "C" __global__ void add_partials(double* out, const double* partials, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; i++) sum += partials[i];
  *out += sum;
}
