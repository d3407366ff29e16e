// One value, or four neighbours, per thread.

extern "C" __global__ void cast(bf16* out, const float* x, i64 n) {
  const i64 i = 4 * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
  const bool aligned = (((u64)out & 7) | ((u64)x & 15)) == 0;
  if (i + 4 <= n && aligned) {
    const F4 v = *(const F4*)(x + i);
    U2 packed;
    packed.x = pack(v.x, v.y);
    packed.y = pack(v.z, v.w);
    *(U2*)(out + i) = packed;
  } else {
    for (i64 j = i; j < n && j < i + 4; j++) out[j] = to_bf16(x[j]);
  }
}

extern "C" __global__ void add(float* y, const float* x, i64 n) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] += x[i];
}

// out = scale x
template <typename T> DEV void scale(T* out, const float* x, i64 n, float factor) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = from_f32<T>(factor * x[i]);
}
extern "C" __global__ void scale_f32(float* out, const float* x, i64 n, float factor) { scale(out, x, n, factor); }
extern "C" __global__ void scale_bf16(bf16* out, const float* x, i64 n, float factor) { scale(out, x, n, factor); }

// out = x + scale y, and h is that rounded
extern "C" __global__ void join(bf16* h, float* out, const float* x, const float* y, i64 n, float factor) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float sum = x[i] + factor * y[i];
  out[i] = sum;
  h[i] = to_bf16(sum);
}

extern "C" __global__ void keep(float* x, const u8* mask, i64 n) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n && mask[i] == 0) x[i] = 0.0f;
}

// Rows picked by their number.
extern "C" __global__ void rows(bf16* out, const bf16* x, const u32* picked, int width) {
  const bf16* from = x + (i64)picked[blockIdx.x] * width;
  bf16* to = out + (i64)blockIdx.x * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

// y += bias, row by row.
template <typename T> DEV void add_bias(T* y, const float* bias, i64 n, int width) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = from_f32<T>(to_f32(y[i]) + bias[i % width]);
}
extern "C" __global__ void add_bias_f32(float* y, const float* bias, i64 n, int width) { add_bias(y, bias, n, width); }
extern "C" __global__ void add_bias_bf16(bf16* y, const float* bias, i64 n, int width) { add_bias(y, bias, n, width); }

// Row p of `partials`, which has a row per block row, gets the sum of the rows p, p + block rows, ... of dy.
extern "C" __global__ void sum_rows(float* partials, const bf16* dy, int rows, int width) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= width) return;
  float sum = 0.0f;
  for (int r = blockIdx.y; r < rows; r += gridDim.y) sum += to_f32(dy[(i64)r * width + c]);
  partials[(i64)blockIdx.y * width + c] = sum;
}
