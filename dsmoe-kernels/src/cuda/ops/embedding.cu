// With SCALED, rows are multiplied by `scale`.
#if SCALED
#define VARIANT , float scale
#define VARIANT_ARGS , scale
#define TIMES(v) (scale * (v))
#else
#define VARIANT
#define VARIANT_ARGS
#define TIMES(v) (v)
#endif

template <typename T> DEV void rows(float* out, const T* table, const u32* ids, int hidden VARIANT) {
  const T* from = table + (i64)ids[blockIdx.x] * hidden;
  float* to = out + (i64)blockIdx.x * hidden;
  for (int i = threadIdx.x; i < hidden; i += blockDim.x) to[i] = TIMES(to_f32(from[i]));
}
extern "C" __global__ void forward_f32(float* out, const float* table, const u32* ids, int hidden VARIANT) {
  rows(out, table, ids, hidden VARIANT_ARGS);
}
extern "C" __global__ void forward_bf16(float* out, const bf16* table, const u32* ids, int hidden VARIANT) {
  rows(out, table, ids, hidden VARIANT_ARGS);
}

// A block per id that occurs, and as many without a position as there are repetitions, so that the grid is that of any
// batch: positions, in order, are added to the id's row.
extern "C" __global__ void backward(float* dtable, const float* dout, const u32* ids, const u32* offsets,
                                    const u32* positions, int hidden VARIANT) {
  const u32 first = offsets[blockIdx.x], last = offsets[blockIdx.x + 1];
  if (first == last) return;
  float* row = dtable + (i64)ids[blockIdx.x] * hidden;
  for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
    float sum = 0.0f;
    for (u32 p = first; p < last; p++) sum += dout[(i64)positions[p] * hidden + i];
    row[i] += TIMES(sum);
  }
}
