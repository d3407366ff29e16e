// One block per row. HIDDEN is the row's length; a thread keeps what it read of the row.
#define PER ((HIDDEN + THREADS - 1) / THREADS)
// With OFFSET, weights are stored as their distance from `offset`.
#if OFFSET
#define VARIANT , float offset
#define VARIANT_ARGS , offset
#define WEIGHT(i) (weight[i] + offset)
#else
#define VARIANT
#define VARIANT_ARGS
#define WEIGHT(i) weight[i]
#endif

template <bool SUM>
DEV void normalize(bf16* h, float* rstd, float* out, const float* x, const float* y, const float* weight, float eps VARIANT) {
  __shared__ float shared[32];
  const i64 row = (i64)blockIdx.x * HIDDEN;
  float v[PER], squares = 0.0f;
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    v[j] = 0.0f;
    if (i < HIDDEN) {
      v[j] = x[row + i];
      if (SUM) {
        v[j] += y[row + i];
        out[row + i] = v[j];
      }
    }
    squares += v[j] * v[j];
  }
  const float r = rsqrtf(block_sum(squares, shared) / HIDDEN + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    if (i < HIDDEN) h[row + i] = to_bf16(v[j] * r * WEIGHT(i));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
forward(bf16* h, float* rstd, const float* x, const float* weight, float eps VARIANT) {
  normalize<false>(h, rstd, nullptr, x, nullptr, weight, eps VARIANT_ARGS);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
forward_sum(bf16* h, float* rstd, float* out, const float* x, const float* y, const float* weight, float eps VARIANT) {
  normalize<true>(h, rstd, out, x, y, weight, eps VARIANT_ARGS);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
restore(bf16* h, const float* x, const float* weight, const float* rstd VARIANT) {
  const i64 row = (i64)blockIdx.x * HIDDEN;
  const float r = rstd[blockIdx.x];
  for (int i = threadIdx.x; i < HIDDEN; i += THREADS) h[row + i] = to_bf16(x[row + i] * r * WEIGHT(i));
}

// A block takes the rows b, b + blocks, ...: dx of each, and its part of the weight's gradient.
//   dx = r (g - x r^2 mean(g x)),  g = dy weight;  dweight = sum over rows of dy x r
extern "C" __global__ void __launch_bounds__(THREADS, 1)
backward(float* dx, float* partials, const float* dy, const float* x, const float* weight, const float* rstd, int rows,
         int add VARIANT) {
  __shared__ float shared[32];
  float dw[PER];
#pragma unroll
  for (int j = 0; j < PER; j++) dw[j] = 0.0f;
  for (int t = blockIdx.x; t < rows; t += gridDim.x) {
    const i64 row = (i64)t * HIDDEN;
    const float r = rstd[t];
    float g[PER], xs[PER], dot = 0.0f;
#pragma unroll
    for (int j = 0; j < PER; j++) {
      const int i = j * THREADS + threadIdx.x;
      g[j] = xs[j] = 0.0f;
      if (i < HIDDEN) {
        const float d = dy[row + i];
        xs[j] = x[row + i];
        g[j] = d * WEIGHT(i);
        dw[j] += d * xs[j] * r;
      }
      dot += g[j] * xs[j];
    }
    const float scale = block_sum(dot, shared) * r * r / HIDDEN;
#pragma unroll
    for (int j = 0; j < PER; j++) {
      const int i = j * THREADS + threadIdx.x;
      if (i < HIDDEN) {
        const float d = r * (g[j] - xs[j] * scale);
        dx[row + i] = add ? dx[row + i] + d : d;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    if (i < HIDDEN) partials[(i64)blockIdx.x * HIDDEN + i] = dw[j];
  }
}

// dweight += the rows of `partials`, in order.
extern "C" __global__ void sum_partials(float* dweight, const float* partials, int rows, int width) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= width) return;
  float sum = 0.0f;
  for (int p = 0; p < rows; p++) sum += partials[(i64)p * width + i];
  dweight[i] += sum;
}

// A block per head of a row: HIDDEN is the width of a head. The heads of rows `stride` apart are normed in place; their old
// values go to `saved`, if it is there.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
norm_heads(bf16* x, bf16* saved, float* rstd, const float* weight, int heads, int stride, float eps, float offset) {
  __shared__ float shared[32];
  bf16* at = x + (i64)(blockIdx.x / heads) * stride + (i64)(blockIdx.x % heads) * HIDDEN;
  float v[PER], squares = 0.0f;
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    v[j] = i < HIDDEN ? to_f32(at[i]) : 0.0f;
    squares += v[j] * v[j];
    if (saved && i < HIDDEN) saved[(i64)blockIdx.x * HIDDEN + i] = at[i];
  }
  const float r = rsqrtf(block_sum(squares, shared) / HIDDEN + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    if (i < HIDDEN) at[i] = to_bf16(v[j] * r * (weight[i] + offset));
  }
}

// The gradient of the above, in place; x holds the old values. A block takes the heads b, b + blocks, ...
extern "C" __global__ void __launch_bounds__(THREADS, 1)
backward_heads(bf16* dx, float* partials, const bf16* x, const float* weight, const float* rstd, int count, int heads,
               int stride, float offset) {
  __shared__ float shared[32];
  float dw[PER];
#pragma unroll
  for (int j = 0; j < PER; j++) dw[j] = 0.0f;
  for (int t = blockIdx.x; t < count; t += gridDim.x) {
    bf16* at = dx + (i64)(t / heads) * stride + (i64)(t % heads) * HIDDEN;
    const float r = rstd[t];
    float g[PER], xs[PER], dot = 0.0f;
#pragma unroll
    for (int j = 0; j < PER; j++) {
      const int i = j * THREADS + threadIdx.x;
      g[j] = xs[j] = 0.0f;
      if (i < HIDDEN) {
        const float d = to_f32(at[i]);
        xs[j] = to_f32(x[(i64)t * HIDDEN + i]);
        g[j] = d * (weight[i] + offset);
        dw[j] += d * xs[j] * r;
      }
      dot += g[j] * xs[j];
    }
    const float scale = block_sum(dot, shared) * r * r / HIDDEN;
#pragma unroll
    for (int j = 0; j < PER; j++) {
      const int i = j * THREADS + threadIdx.x;
      if (i < HIDDEN) at[i] = to_bf16(r * (g[j] - xs[j] * scale));
    }
  }
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    if (i < HIDDEN) partials[(i64)blockIdx.x * HIDDEN + i] = dw[j];
  }
}
