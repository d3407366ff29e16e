// y [T, outputs] = x W^T for a few tokens: a warp per row of W, which is read once for all TOKENS tokens.
template <typename Out>
DEV void gemv(Out* y, const bf16* x, const bf16* w, int inputs, int outputs) {
  const int o = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (o >= outputs) return;
  const bf16* row = w + (i64)o * inputs;
  float sums[TOKENS] = {};
  int i = 0;
#if ALIGNED
#pragma unroll(TOKENS == 1 ? 4 : 1)
  for (i = lane * 8; i + 8 <= inputs; i += 256) {
    const U4 v = *(const U4*)(row + i);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const U4 u = *(const U4*)(x + (i64)t * inputs + i);
      sums[t] += lo_f32(v.x) * lo_f32(u.x) + hi_f32(v.x) * hi_f32(u.x) + lo_f32(v.y) * lo_f32(u.y) +
                 hi_f32(v.y) * hi_f32(u.y) + lo_f32(v.z) * lo_f32(u.z) + hi_f32(v.z) * hi_f32(u.z) +
                 lo_f32(v.w) * lo_f32(u.w) + hi_f32(v.w) * hi_f32(u.w);
    }
  }
#else
  for (i = lane; i < inputs; i += 32) {
    const float v = to_f32(row[i]);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) sums[t] += v * to_f32(x[(i64)t * inputs + i]);
  }
#endif
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const float sum = warp_sum(sums[t]);
    if (lane == 0) y[(i64)t * outputs + o] = from_f32<Out>(sum);
  }
}
extern "C" __global__ void __launch_bounds__(256)
gemv_f32(float* y, const bf16* x, const bf16* w, int inputs, int outputs) { gemv(y, x, w, inputs, outputs); }
extern "C" __global__ void __launch_bounds__(256)
gemv_bf16(bf16* y, const bf16* x, const bf16* w, int inputs, int outputs) { gemv(y, x, w, inputs, outputs); }

// The divisor of a gate p: silu's 1 + e^-p, or with GELU that of the tanh form of GELU.
#if GELU
#define DIVISOR(p) (1.0f + expf(-(p) * (1.5957692f + 0.07135482f * (p) * (p))))
#else
#define DIVISOR(p) (1.0f + expf(-p))
#endif

// The factor of an expert for token t: 1 for the leading `core` of all n experts, and without coefficients.
DEV float factor(const float* coefficients, int t, int e, int n, int core) {
  return coefficients && e >= core ? coefficients[t * (n - core) + e - core] : 1.0f;
}

// c [T, width] = factor act(x Wg^T) (x Wu^T): a warp per neuron, none for one whose expert no token has active.
extern "C" __global__ void __launch_bounds__(256)
gemv_up(float* c, const bf16* x, const bf16* gate, const bf16* up, const float* coefficients, int inputs, int width,
       int n, int core) {
  const int o = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (o >= width) return;
  const int e = o / (width / n);
  float k[TOKENS];
  bool any = false;
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    k[t] = factor(coefficients, t, e, n, core);
    any |= k[t] != 0.0f;
  }
  if (!any) return;
  const bf16 *g = gate + (i64)o * inputs, *u = up + (i64)o * inputs;
  float a[TOKENS] = {}, b[TOKENS] = {};
#if ALIGNED
#pragma unroll(TOKENS == 1 ? 4 : 1)
  for (int i = lane * 8; i + 8 <= inputs; i += 256) {
    const U4 p = *(const U4*)(g + i), q = *(const U4*)(u + i);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const U4 v = *(const U4*)(x + (i64)t * inputs + i);
      a[t] += lo_f32(p.x) * lo_f32(v.x) + hi_f32(p.x) * hi_f32(v.x) + lo_f32(p.y) * lo_f32(v.y) +
              hi_f32(p.y) * hi_f32(v.y) + lo_f32(p.z) * lo_f32(v.z) + hi_f32(p.z) * hi_f32(v.z) +
              lo_f32(p.w) * lo_f32(v.w) + hi_f32(p.w) * hi_f32(v.w);
      b[t] += lo_f32(q.x) * lo_f32(v.x) + hi_f32(q.x) * hi_f32(v.x) + lo_f32(q.y) * lo_f32(v.y) +
              hi_f32(q.y) * hi_f32(v.y) + lo_f32(q.z) * lo_f32(v.z) + hi_f32(q.z) * hi_f32(v.z) +
              lo_f32(q.w) * lo_f32(v.w) + hi_f32(q.w) * hi_f32(v.w);
    }
  }
#else
  for (int i = lane; i < inputs; i += 32) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const float v = to_f32(x[(i64)t * inputs + i]);
      a[t] += v * to_f32(g[i]);
      b[t] += v * to_f32(u[i]);
    }
  }
#endif
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const float p = warp_sum(a[t]), q = warp_sum(b[t]);
    if (lane == 0) c[(i64)t * width + o] = k[t] * p / DIVISOR(p) * q;
  }
}

// partials [blocks of NEURONS, TOKENS, outputs]: the terms of y of these neurons of one expert; nothing where no token has the
// expert active. Four columns per thread.
extern "C" __global__ void __launch_bounds__(128)
gemv_down(float* partials, const float* c, const bf16* down, const float* coefficients, int outputs, int width, int n,
         int core, int blocks) {
  const int w = width / n, e = blockIdx.y / blocks, first = e * w + (blockIdx.y % blocks) * NEURONS;
  const int last = min(first + NEURONS, (e + 1) * w);
  __shared__ float cs[TOKENS][NEURONS];
  bool any = false;
#pragma unroll
  for (int t = 0; t < TOKENS; t++) any |= factor(coefficients, t, e, n, core) != 0.0f;
  if (!any) return;
  for (int i = threadIdx.x; i < TOKENS * NEURONS; i += blockDim.x) {
    const int t = i / NEURONS, j = i % NEURONS;
    // A token that has the expert shut adds nothing: its value was not set where no other has it open.
    const bool on = first + j < last && factor(coefficients, t, e, n, core) != 0.0f;
    cs[t][j] = on ? c[(i64)t * width + first + j] : 0.0f;
  }
  __syncthreads();
  const int col = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (col >= outputs) return;
  float sums[TOKENS][4] = {};
#pragma unroll(TOKENS == 1 ? 8 : 2)
  for (int j = 0; j < last - first; j++) {
    const bf16* row = down + (i64)(first + j) * outputs + col;
    float v[4];
#if ALIGNED
    const U2 p = *(const U2*)row;
    v[0] = lo_f32(p.x), v[1] = hi_f32(p.x), v[2] = lo_f32(p.y), v[3] = hi_f32(p.y);
#else
    for (int i = 0; i < 4; i++) v[i] = col + i < outputs ? to_f32(row[i]) : 0.0f;
#endif
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[t][i] += cs[t][j] * v[i];
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++)
    for (int i = 0; i < 4; i++)
      if (col + i < outputs) partials[((i64)blockIdx.y * TOKENS + t) * outputs + col + i] = sums[t][i];
}

// y [T, outputs]: the partial sums of open experts. A warp takes an eighth of them for 32 columns, then the eighths are
// added in order.
extern "C" __global__ void __launch_bounds__(256)
gemv_sum(float* y, const float* partials, const float* coefficients, int outputs, int n, int core, int blocks) {
  __shared__ float eighths[8][32];
  const int lane = threadIdx.x & 31, part = threadIdx.x >> 5, col = blockIdx.x * 32 + lane, t = blockIdx.y;
  const int all = n * blocks, first = all * part / 8, last = all * (part + 1) / 8;
  float sum = 0.0f;
  if (col < outputs) {
#pragma unroll 8
    for (int p = first; p < last; p++)
      if (factor(coefficients, t, p / blocks, n, core) != 0.0f)
        sum += partials[((i64)p * TOKENS + t) * outputs + col];
  }
  eighths[part][lane] = sum;
  __syncthreads();
  if (part != 0 || col >= outputs) return;
  sum = 0.0f;
  for (int i = 0; i < 8; i++) sum += eighths[i][lane];
  y[(i64)t * outputs + col] = sum;
}
