#define IGNORE 0xffffffffu

// With CAPPED, logits are cap tanh(product / cap).
#if CAPPED
#define VARIANT , float cap
#define SLOPE(z) (1.0f - (z) / cap * ((z) / cap))
#else
#define VARIANT
#define SLOPE(z) 1.0f
#endif

// Logits from products of hidden states and head, in place.
extern "C" __global__ void logits(float* z, i64 n, float by VARIANT) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
#if CAPPED
  z[i] = cap * tanhf(z[i] * by / cap);
#else
  z[i] *= by;
#endif
}

// Largest value, the first place of it, and log of the sum of exponentials of a row of `vocab` logits.
struct Row { float max, log_sum; u32 first; };
DEV Row of_row(const float* z, int vocab) {
  __shared__ float shared[32];
  __shared__ u32 firsts[32];
  float m = -__int_as_float(0x7f800000);
  u32 first = 0xffffffffu;
  for (int i = threadIdx.x; i < vocab; i += blockDim.x)
    if (z[i] > m) m = z[i], first = i;
  Row row;
  row.max = block_max(m, shared);
  if (m != row.max) first = 0xffffffffu;
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const u32 other = __shfl_xor_sync(0xffffffffu, first, o);
    if (other < first) first = other;
  }
  if ((threadIdx.x & 31) == 0) firsts[threadIdx.x >> 5] = first;
  __syncthreads();
  row.first = firsts[0];
  for (int i = 1; i < (int)(blockDim.x >> 5); i++)
    if (firsts[i] < row.first) row.first = firsts[i];
  float sum = 0.0f;
  for (int i = threadIdx.x; i < vocab; i += blockDim.x) sum += expf(z[i] - row.max);
  row.log_sum = row.max + logf(block_sum(sum, shared));
  return row;
}

// The loss of a row and its gradient by the products, times `scale`.
extern "C" __global__ void __launch_bounds__(1024)
chunk(float* losses, bf16* dlogits, const float* logits, const u32* targets, float scale, int vocab VARIANT) {
  const float* z = logits + (i64)blockIdx.x * vocab;
  bf16* dz = dlogits + (i64)blockIdx.x * vocab;
  const u32 target = targets[blockIdx.x];
  if (target == IGNORE) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) dz[i] = to_bf16(0.0f);
    return;
  }
  const Row row = of_row(z, vocab);
  if (threadIdx.x == 0) losses[blockIdx.x] = row.log_sum - z[target];
  for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
    const float p = expf(z[i] - row.log_sum);
    dz[i] = to_bf16(scale * (p - (i == (int)target ? 1.0f : 0.0f)) * SLOPE(z[i]));
  }
}

extern "C" __global__ void __launch_bounds__(1024)
forward(float* losses, const float* logits, const u32* targets, int vocab) {
  const float* z = logits + (i64)blockIdx.x * vocab;
  const u32 target = targets[blockIdx.x];
  if (target == IGNORE) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
    return;
  }
  const Row row = of_row(z, vocab);
  if (threadIdx.x == 0) losses[blockIdx.x] = row.log_sum - z[target];
}

// Log-probability of targets[i] in row rows[i], and whether it is the first of the likeliest.
extern "C" __global__ void __launch_bounds__(1024)
likelihoods(float* found, u32* greedy, const float* logits, const u32* rows, const u32* targets, int vocab) {
  const float* z = logits + (i64)rows[blockIdx.x] * vocab;
  const Row row = of_row(z, vocab);
  if (threadIdx.x == 0) {
    found[blockIdx.x] = z[targets[blockIdx.x]] - row.log_sum;
    greedy[blockIdx.x] = row.first == targets[blockIdx.x];
  }
}
