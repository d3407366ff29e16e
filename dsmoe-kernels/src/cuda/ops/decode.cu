// Attention of single tokens over caches. The number of positions held lies on the device, so that a recorded step can be
// run again.

// Appends keys and values of rows of qkv to the caches at *length + row, or at `start` + row without a length.
extern "C" __global__ void append(bf16* keys, bf16* values, const bf16* qkv, const u32* length, int start, int rows,
                                  int stride, int first, int width) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (i64)rows * width) return;
  const i64 r = i / width, c = i % width, at = (length ? *length : start) + r;
  keys[at * width + c] = qkv[r * stride + first + c];
  values[at * width + c] = qkv[r * stride + first + width + c];
}

// With WINDOW, the query sees itself and the keys before it, `window` in all; with CAPPED, scores are cap tanh(score / cap).
#if WINDOW || CAPPED
#define VARIANT , int window, float cap
#else
#define VARIANT
#endif
#if WINDOW
#define FIRST_SEEN(count) max(0, (count) - window)
#define SEEN(key, count) ((key) < (count) && (key) >= FIRST_SEEN(count))
#else
#define FIRST_SEEN(count) 0
#define SEEN(key, count) ((key) < (count))
#endif

// A block has CHUNK keys and one query head:
// partials [heads, chunks, HD + 2] get the largest score, the sum and the weighted values.
extern "C" __global__ void __launch_bounds__(CHUNK, 4)
chunks(float* partials, const bf16* qkv, const bf16* keys, const bf16* values, const u32* length, int heads, int kv_heads,
       float scale VARIANT) {
  __shared__ float p[CHUNK], q[HD], shared[32];
  const int head = blockIdx.y, kv = head / (heads / kv_heads), count = *length + 1, first = blockIdx.x * CHUNK;
  if (first >= count) return;
#if WINDOW
  if (first + CHUNK <= FIRST_SEEN(count)) return;
#endif
  const int j = first + threadIdx.x, here = min(CHUNK, count - first);
  const i64 width = (i64)kv_heads * HD;
  const bf16* key = keys + j * width + kv * HD;
  for (int i = threadIdx.x; i < HD; i += CHUNK) q[i] = to_f32(qkv[head * HD + i]) * scale * 1.4426950408889634f;
  __syncthreads();
  float s = -1e30f;
  if (SEEN(j, count)) {
    s = 0.0f;
#if HD % 8 == 0
    for (int i = 0; i < HD; i += 8) {
      const U4 k = *(const U4*)(key + i);
      s += q[i] * lo_f32(k.x) + q[i + 1] * hi_f32(k.x) + q[i + 2] * lo_f32(k.y) + q[i + 3] * hi_f32(k.y) +
           q[i + 4] * lo_f32(k.z) + q[i + 5] * hi_f32(k.z) + q[i + 6] * lo_f32(k.w) + q[i + 7] * hi_f32(k.w);
    }
#else
    for (int i = 0; i < HD; i++) s += q[i] * to_f32(key[i]);
#endif
#if CAPPED
    const float top = cap * 1.4426950408889634f;
    s = top * tanhf(s / top);
#endif
  }
  const float top = block_max(s, shared);
  const float e = SEEN(j, count) ? exp2f(s - top) : 0.0f;
  p[threadIdx.x] = e;
  const float sum = block_sum(e, shared);
  float* to = partials + ((i64)head * gridDim.x + blockIdx.x) * (HD + 2);
  if (threadIdx.x == 0) {
    to[0] = top;
    to[1] = sum;
  }
  for (int i = threadIdx.x; i < HD; i += CHUNK) {
    float v = 0.0f;
#pragma unroll 16
    for (int r = 0; r < here; r++) v += p[r] * to_f32(values[(first + r) * width + kv * HD + i]);
    to[2 + i] = v;
  }
}

// A block per head adds its chunks, in order.
extern "C" __global__ void combine(bf16* out, const float* partials, const u32* length, int chunks VARIANT) {
  const int count = (*length + CHUNK) / CHUNK, first = FIRST_SEEN((int)*length + 1) / CHUNK;
  const float* from = partials + (i64)blockIdx.x * chunks * (HD + 2);
  float top = -1e30f;
  for (int c = first; c < count; c++) top = fmaxf(top, from[(i64)c * (HD + 2)]);
  for (int i = threadIdx.x; i < HD; i += blockDim.x) {
    float sum = 0.0f, v = 0.0f;
    for (int c = first; c < count; c++) {
      const float* at = from + (i64)c * (HD + 2);
      const float w = exp2f(at[0] - top);
      sum += w * at[1];
      v += w * at[2 + i];
    }
    out[blockIdx.x * HD + i] = to_bf16(v / sum);
  }
}
