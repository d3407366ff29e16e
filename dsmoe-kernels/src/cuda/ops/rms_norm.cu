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
// With SCALED, a sum adds its second part times `scale`.
#if SCALED
#define OF_SUM , float scale
#define PART(y) (scale * (y))
#else
#define OF_SUM
#define PART(y) (y)
#endif

// The reciprocal standard deviation of a row that the block's threads have read.
DEV float deviation(const float (&v)[PER], float eps) {
  __shared__ float shared[32];
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < PER; j++) squares += v[j] * v[j];
  return rsqrtf(block_sum(squares, shared) / HIDDEN + eps);
}

template <typename T> DEV void read(float (&v)[PER], const T* from) {
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    v[j] = i < HIDDEN ? to_f32(from[i]) : 0.0f;
  }
}

// Sets `to` to the normed row, and `rstd` to its reciprocal standard deviation.
template <typename T>
DEV void normalize(T* to, float* rstd, const float (&v)[PER], const float* weight, float eps VARIANT) {
  const float r = deviation(v, eps);
  if (threadIdx.x == 0) *rstd = r;
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    if (i < HIDDEN) to[i] = from_f32<T>(v[j] * r * WEIGHT(i));
  }
}

template <typename T>
DEV void forward(T* h, float* rstd, const float* x, const float* weight, float eps VARIANT) {
  const i64 row = (i64)blockIdx.x * HIDDEN;
  float v[PER];
  read(v, x + row);
  normalize(h + row, rstd + blockIdx.x, v, weight, eps VARIANT_ARGS);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
forward_bf16(bf16* h, float* rstd, const float* x, const float* weight, float eps VARIANT) {
  forward(h, rstd, x, weight, eps VARIANT_ARGS);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
forward_f32(float* h, float* rstd, const float* x, const float* weight, float eps VARIANT) {
  forward(h, rstd, x, weight, eps VARIANT_ARGS);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
forward_sum(bf16* h, float* rstd, float* out, const float* x, const float* y, const float* weight, float eps VARIANT OF_SUM) {
  const i64 row = (i64)blockIdx.x * HIDDEN;
  float v[PER];
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    v[j] = 0.0f;
    if (i < HIDDEN) out[row + i] = v[j] = x[row + i] + PART(y[row + i]);
  }
  normalize(h + row, rstd + blockIdx.x, v, weight, eps VARIANT_ARGS);
}

// As forward_sum; y is the sum of the parts [slots, HIDDEN] of a token, in the order of its groups. `slots` is [T, pieces + n].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
forward_parts(bf16* h, float* rstd, float* out, const float* x, const bf16* parts, const u32* slots, const u32* active,
              int pieces, int n, const float* weight, float eps VARIANT OF_SUM) {
  const i64 t = blockIdx.x, row = t * HIDDEN;
  const u32* mine = slots + t * (pieces + n);
  const int count = pieces + active[t];
  float v[PER] = {};
  for (int s = 0; s < count; s++) {
    const bf16* part = parts + (i64)mine[s] * HIDDEN;
#pragma unroll
    for (int j = 0; j < PER; j++) {
      const int i = j * THREADS + threadIdx.x;
      if (i < HIDDEN) v[j] += to_f32(part[i]);
    }
  }
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    if (i < HIDDEN) out[row + i] = v[j] = x[row + i] + PART(v[j]);
  }
  normalize(h + row, rstd + blockIdx.x, v, weight, eps VARIANT_ARGS);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
restore(bf16* h, const float* x, const float* weight, const float* rstd VARIANT) {
  const i64 row = (i64)blockIdx.x * HIDDEN;
  const float r = rstd[blockIdx.x];
  for (int i = threadIdx.x; i < HIDDEN; i += THREADS) h[row + i] = to_bf16(x[row + i] * r * WEIGHT(i));
}

// Sets dx, which may be dy, to the gradient of a row, or adds it; adds to the part dw of the weight's gradient.
//   dx = r (g - x r^2 mean(g x)),  g = dy weight;  dweight = sum over rows of dy x r
template <typename D, typename X>
DEV void gradient(float (&dw)[PER], D* dx, const D* dy, const X* x, const float* weight, float r, bool add VARIANT) {
  __shared__ float shared[32];
  float g[PER], xs[PER], dot = 0.0f;
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    g[j] = xs[j] = 0.0f;
    if (i < HIDDEN) {
      const float d = to_f32(dy[i]);
      xs[j] = to_f32(x[i]);
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
      dx[i] = from_f32<D>(add ? to_f32(dx[i]) + d : d);
    }
  }
}

DEV void store_part(float* partials, const float (&dw)[PER]) {
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int i = j * THREADS + threadIdx.x;
    if (i < HIDDEN) partials[(i64)blockIdx.x * HIDDEN + i] = dw[j];
  }
}

// A block takes the rows b, b + blocks, ...: dx of each, and its part of the weight's gradient.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
backward(float* dx, float* partials, const float* dy, const float* x, const float* weight, const float* rstd, int rows,
         int add VARIANT) {
  float dw[PER] = {};
  for (int t = blockIdx.x; t < rows; t += gridDim.x) {
    const i64 row = (i64)t * HIDDEN;
    gradient(dw, dx + row, dy + row, x + row, weight, rstd[t], add VARIANT_ARGS);
  }
  store_part(partials, dw);
}

// dweight += the rows of `partials`, in order.
extern "C" __global__ void sum_partials(float* dweight, const float* partials, int rows, int width) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= width) return;
  float sum = 0.0f;
  for (int p = 0; p < rows; p++) sum += partials[(i64)p * width + i];
  dweight[i] += sum;
}

// The head `t` of rows `stride` apart that have `heads` of them.
template <typename T> DEV T* head_of(T* x, int t, int heads, int stride) {
  return x + (i64)(t / heads) * stride + (i64)(t % heads) * HIDDEN;
}

// A block per head of a row: HIDDEN is the width of a head. Heads are normed in place; their old values go to `saved`, if it is
// there.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
norm_heads(bf16* x, bf16* saved, float* rstd, const float* weight, int heads, int stride, float eps VARIANT) {
  bf16* at = head_of(x, blockIdx.x, heads, stride);
  float v[PER];
  read(v, at);
  if (saved)
    for (int i = threadIdx.x; i < HIDDEN; i += THREADS) saved[(i64)blockIdx.x * HIDDEN + i] = at[i];
  normalize(at, rstd + blockIdx.x, v, weight, eps VARIANT_ARGS);
}

// The gradient of the above, in place; x holds the old values. A block takes the heads b, b + blocks, ...
extern "C" __global__ void __launch_bounds__(THREADS, 1)
backward_heads(bf16* dx, float* partials, const bf16* x, const float* weight, const float* rstd, int count, int heads,
               int stride VARIANT) {
  float dw[PER] = {};
  for (int t = blockIdx.x; t < count; t += gridDim.x) {
    bf16* at = head_of(dx, t, heads, stride);
    gradient(dw, at, at, x + (i64)t * HIDDEN, weight, rstd[t], false VARIANT_ARGS);
  }
  store_part(partials, dw);
}
