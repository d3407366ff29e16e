// Code that all kernels share. It includes no header, so NVRTC needs no folder of them.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEV __device__ __forceinline__

struct alignas(2) bf16 { u16 bits; };
struct alignas(16) U4 { u32 x, y, z, w; };
struct alignas(16) F4 { float x, y, z, w; };
struct alignas(8) U2 { u32 x, y; };

DEV float to_f32(bf16 v) { return __uint_as_float((u32)v.bits << 16); }
DEV float to_f32(float v) { return v; }
DEV float lo_f32(u32 pair) { return __uint_as_float(pair << 16); }
DEV float hi_f32(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
// Two values rounded to nearest even, the first in the low half.
DEV u32 pack(float lo, float hi);
DEV bf16 to_bf16(float v) {
  bf16 r;
  r.bits = (u16)(pack(v, 0.0f) & 0xffffu);
  return r;
}
template <typename T> DEV T from_f32(float v);
template <> DEV float from_f32<float>(float v) { return v; }
template <> DEV bf16 from_f32<bf16>(float v) { return to_bf16(v); }

DEV float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}
DEV double warp_sum(double v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}
DEV float warp_max(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
// The sum over a block of whole warps, in one order, for all threads. `shared` has room for 32 values; its next use
// must come after a barrier.
template <typename T> DEV T block_sum(T v, T* shared) {
  v = warp_sum(v);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  if (lane == 0) shared[warp] = v;
  __syncthreads();
  T s = 0;
  for (int i = 0; i < warps; i++) s += shared[i];
  __syncthreads();
  return s;
}
DEV float block_max(float v, float* shared) {
  v = warp_max(v);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  if (lane == 0) shared[warp] = v;
  __syncthreads();
  float s = shared[0];
  for (int i = 1; i < warps; i++) s = fmaxf(s, shared[i]);
  __syncthreads();
  return s;
}

// An operand of a warpgroup's products at a place of shared memory, swizzled over 128 bytes: rows of 64 terms, eight of them in
// 1024 bytes, or blocks of 64 columns with a row for each term, `next` bytes apart.
DEV u64 matrix(u32 address, u32 next) {
  return (u64)((address & 0x3ffff) >> 4) | ((u64)(next >> 4) << 16) | ((u64)(1024 >> 4) << 32) | (1ull << 62);
}
