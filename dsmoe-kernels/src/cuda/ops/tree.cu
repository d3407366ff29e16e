// Sums along the binary tree over the numbers of parts; see the CPU's comm::tree.

#define GROUP 8

template <typename T> DEV T load(const float* p);
template <> DEV float load<float>(const float* p) { return *p; }
template <> DEV F4 load<F4>(const float* p) { return *(const F4*)p; }
DEV void put(float* p, float v) { *p = v; }
DEV void put(float* p, F4 v) { *(F4*)p = v; }
DEV float plus(float a, float b) { return a + b; }
DEV F4 plus(F4 a, F4 b) {
  F4 r;
  r.x = a.x + b.x;
  r.y = a.y + b.y;
  r.z = a.z + b.z;
  r.w = a.w + b.w;
  return r;
}

// The sum of up to GROUP neighbours, `gap` values apart: levels of the tree, left + right, an odd one passes up.
template <typename T> DEV T node(const float* part, i64 gap, int count) {
  T v[GROUP];
#pragma unroll
  for (int r = 0; r < GROUP; r++)
    if (r < count) v[r] = load<T>(part + r * gap);
#pragma unroll
  for (int apart = 1; apart < GROUP; apart *= 2) {
#pragma unroll
    for (int left = 0; left + apart < GROUP; left += 2 * apart)
      if (left + apart < count) v[left] = plus(v[left], v[left + apart]);
  }
  return v[0];
}

// A thread per four values, a row of blocks per group of parts. A group's sum may replace its first part.
extern "C" __global__ void comm_tree(float* out, i64 out_gap, const float* parts, i64 gap, i64 len, int count) {
  const i64 i = 4 * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
  const int first = GROUP * blockIdx.y, members = min(GROUP, count - first);
  const float* part = parts + first * gap;
  out += blockIdx.y * out_gap;
  const bool aligned = (((u64)out | (u64)part | 4 * (u64)gap) & 15) == 0;
  if (i + 4 <= len && aligned) {
    put(out + i, node<F4>(part + i, gap, members));
  } else {
    for (i64 j = i; j < len && j < i + 4; j++) put(out + j, node<float>(part + j, gap, members));
  }
}
