// One thread per pair of a head. `angles` has a row per position: cosines, then sines; heads are rotated in as many values.
DEV void rotate(bf16* x, const float* angles, u32 position, int rotated, int i, float sign) {
  const int half = rotated / 2;
  const float c = angles[(i64)position * rotated + i], s = sign * angles[(i64)position * rotated + half + i];
  const float a = to_f32(x[i]), b = to_f32(x[i + half]);
  x[i] = to_bf16(a * c - b * s);
  x[i + half] = to_bf16(b * c + a * s);
}

// Row t is at position start + t % seq, or at positions[t].
extern "C" __global__ void turn(bf16* x, const float* angles, const u32* positions, int rows, int seq, int start,
                                int heads, int head_dim, int rotated, int width, float sign) {
  const int half = rotated / 2, pairs = heads * half;
  const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= (i64)rows * pairs) return;
  const int t = (int)(at / pairs), pair = (int)(at % pairs);
  const u32 position = positions ? positions[t] : (u32)(start + t % seq);
  rotate(x + (i64)t * width + (pair / half) * head_dim, angles, position, rotated, pair % half, sign);
}
