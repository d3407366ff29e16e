DEV float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }
DEV float silu(float a) { return a * sigmoid(a); }

// c = coefficient silu(a) b, 0 where the coefficient is; two neighbours per thread.
extern "C" __global__ void activate(bf16* c, const bf16* a, const bf16* b, const float* coefficients, i64 tokens,
                                    int width, int n) {
  const i64 i = 2 * ((i64)blockIdx.x * blockDim.x + threadIdx.x), total = tokens * width;
  if (i >= total) return;
  const int last = i + 1 < total;
  float out[2] = {0.0f, 0.0f};
  for (int j = 0; j <= last; j++) {
    const float k = coefficients ? coefficients[(i + j) / width * n + (i + j) % width / (width / n)] : 1.0f;
    if (k != 0.0f) out[j] = k * silu(to_f32(a[i + j])) * to_f32(b[i + j]);
  }
  if (last)
    *(u32*)(c + i) = pack(out[0], out[1]);
  else
    c[i] = to_bf16(out[0]);
}

// A block per token, a warp per expert:
//   dcoefficient = sum of silu(a) b g,  dc = coefficient g
//   da = dc b silu'(a),  db = dc silu(a),  c as above
extern "C" __global__ void __launch_bounds__(256)
backward(bf16* da, bf16* db, bf16* c, float* dcoefficients, const bf16* g, const bf16* a, const bf16* b,
         const float* coefficients, int width, int n, int all_pairs) {
  const i64 t = blockIdx.x;
  const int lane = threadIdx.x & 31, w = width / n;
  for (int e = threadIdx.x >> 5; e < n; e += blockDim.x >> 5) {
    const float k = coefficients ? coefficients[t * n + e] : 1.0f;
    const i64 row = t * width + (i64)e * w;
    float sum = 0.0f;
    for (int i = lane; i < w; i += 32) {
      float of_a = 0.0f, of_b = 0.0f, of_c = 0.0f;
      if (k != 0.0f || all_pairs) {
        const float x = to_f32(a[row + i]), y = to_f32(b[row + i]), d = to_f32(g[row + i]);
        const float s = sigmoid(x), u = x * s;
        sum += u * y * d;
        of_c = k * u * y;
        of_b = k * d * u;
        of_a = k * d * y * s * (1.0f + x * (1.0f - s));
      }
      c[row + i] = to_bf16(of_c);
      da[row + i] = to_bf16(of_a);
      db[row + i] = to_bf16(of_b);
    }
    if (dcoefficients) {
      sum = warp_sum(sum);
      if (lane == 0) dcoefficients[t * n + e] = sum;
    }
  }
}
