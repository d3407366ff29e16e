// Instructions that C++ has no words for. Kernels contain none themselves, so that a model of a device can run their text.
// Two values rounded to nearest even, the first in the low half.
DEV u32 pack(float lo, float hi) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// 16 bytes to shared memory, zeros behind the first `bytes` of them.
DEV void copy_async(u32 to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEV void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEV void load_matrix_x4(u32& a, u32& b, u32& c, u32& d, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address) : "memory");
}
DEV void load_matrix_x4_trans(u32& a, u32& b, u32& c, u32& d, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address) : "memory");
}
// c += a b: a is 16 x 16, b 16 x 8, c 16 x 8. Lane l has of c the rows l/4 and l/4 + 8, columns 2(l%4) and the next.
DEV void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Values of shared memory by its addresses.
DEV void put(u32 at, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
DEV void put(u32 at, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory"); }
DEV void put(u32 at, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(a), "f"(b) : "memory");
}
DEV U4 take(u32 at) {
  U4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}

// --- Hopper: barriers in shared memory, copies by descriptors, products of warpgroups ---------------------------------

// A descriptor of a matrix for copies, as the driver encodes it.
struct alignas(128) TensorMap { u64 opaque[16]; };

// The memory that a launch asks for, from its start.
DEV u8* dynamic_shared() {
  extern __shared__ __align__(16) u8 memory[];
  return memory;
}

#if __CUDA_ARCH__ >= 900
DEV void bar_init(u32 bar, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
DEV void bar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// An arrival at the barrier at the same place of another block of the cluster.
DEV void bar_arrive_at(u32 bar, u32 block) {
  asm volatile("{ .reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [r]; }" ::"r"(bar),
               "r"(block)
               : "memory");
}
DEV void bar_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
// An arrival that adds to the bytes that the phase waits for.
DEV void bar_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Waits for the end of a phase of this parity. With TRAP the kernel ends after some seconds instead of hanging.
DEV void bar_wait(u32 bar, u32 parity) {
#if TRAP
  for (u32 i = 0;; i++) {
    u32 ok;
    asm volatile("{ .reg .pred P; mbarrier.try_wait.parity.shared::cta.b64 P, [%1], %2; selp.u32 %0, 1, 0, P; }"
                 : "=r"(ok)
                 : "r"(bar), "r"(parity)
                 : "memory");
    if (ok) return;
    if (i > 20000000u) asm volatile("trap;");
  }
#else
  asm volatile(
      "{ .reg .pred P; W_%=: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1; @P bra.uni D_%=; bra.uni W_%=; D_%=: }" ::"r"(bar),
      "r"(parity)
      : "memory");
#endif
}
// An arrival once the copies of this thread so far are there. It is one of those that the barrier counts.
DEV void copy_arrive(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
// Orders what threads read and wrote before what copies by descriptors and products do after.
DEV void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Boxes of a matrix to shared memory; they arrive at `bar` with their bytes. Those of `all` go to both blocks of the cluster.
DEV void load2(u32 to, const TensorMap* m, u32 bar, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
               "l"(m), "r"(bar), "r"(x), "r"(y)
               : "memory");
}
DEV void load2_all(u32 to, const TensorMap* m, u32 bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(m), "r"(bar), "r"(x), "r"(y), "h"((u16)3)
      : "memory");
}
DEV void load4(u32 to, const TensorMap* m, u32 bar, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(m), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
DEV void load4_all(u32 to, const TensorMap* m, u32 bar, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(m), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w), "h"((u16)3)
      : "memory");
}
// Boxes from shared memory: stored, or added as f32.
DEV void store2(const TensorMap* m, u32 from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(m), "r"(from), "r"(x), "r"(y)
               : "memory");
}
DEV void store3(const TensorMap* m, u32 from, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(m), "r"(from), "r"(x),
               "r"(y), "r"(z)
               : "memory");
}
DEV void add3(const TensorMap* m, u32 from, int x, int y, int z) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(m), "r"(from),
               "r"(x), "r"(y), "r"(z)
               : "memory");
}
DEV void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but N groups of stores have read their boxes, and until all are done.
template <int N> DEV void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
DEV void store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Four blocks of 8 x 8 values, of which lane l has pair l % 4 of row l / 4; the lanes of a quarter give a block's rows.
DEV void put4(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEV void put4_turned(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Barriers of some of a block's threads: all of them wait, or those that announce go on.
DEV void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEV void announce(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEV u32 rank_in_cluster() {
  u32 r;
  asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(r));
  return r;
}
DEV void cluster_meet() { asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory"); }
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int R> DEV void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R)); }
template <int R> DEV void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R)); }
DEV void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEV void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Keeps the compiler from moving values while the tensor cores add to them.
template <int N> DEV void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d (+)= a b of 64 x N x 16 by a warpgroup: f32 sums of bf16. TA and TB say that rows of an operand are terms.
template <int N, int TA, int TB> struct Multiply;
#define R8(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define REGISTERS_8 R8(0, 1, 2, 3, 4, 5, 6, 7)
#define REGISTERS_16 REGISTERS_8 ", " R8(8, 9, 10, 11, 12, 13, 14, 15)
#define REGISTERS_24 REGISTERS_16 ", " R8(16, 17, 18, 19, 20, 21, 22, 23)
#define REGISTERS_32 REGISTERS_24 ", " R8(24, 25, 26, 27, 28, 29, 30, 31)
#define REGISTERS_40 REGISTERS_32 ", " R8(32, 33, 34, 35, 36, 37, 38, 39)
#define REGISTERS_48 REGISTERS_40 ", " R8(40, 41, 42, 43, 44, 45, 46, 47)
#define REGISTERS_56 REGISTERS_48 ", " R8(48, 49, 50, 51, 52, 53, 54, 55)
#define REGISTERS_64 REGISTERS_56 ", " R8(56, 57, 58, 59, 60, 61, 62, 63)
#define REGISTERS_72 REGISTERS_64 ", " R8(64, 65, 66, 67, 68, 69, 70, 71)
#define REGISTERS_80 REGISTERS_72 ", " R8(72, 73, 74, 75, 76, 77, 78, 79)
#define REGISTERS_88 REGISTERS_80 ", " R8(80, 81, 82, 83, 84, 85, 86, 87)
#define REGISTERS_96 REGISTERS_88 ", " R8(88, 89, 90, 91, 92, 93, 94, 95)
#define REGISTERS_104 REGISTERS_96 ", " R8(96, 97, 98, 99, 100, 101, 102, 103)
#define REGISTERS_112 REGISTERS_104 ", " R8(104, 105, 106, 107, 108, 109, 110, 111)
#define REGISTERS_120 REGISTERS_112 ", " R8(112, 113, 114, 115, 116, 117, 118, 119)
#define REGISTERS_128 REGISTERS_120 ", " R8(120, 121, 122, 123, 124, 125, 126, 127)
#define VALUES_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define VALUES_16(i) VALUES_8(i), VALUES_8(i + 8)
#define VALUES_24(i) VALUES_16(i), VALUES_8(i + 16)
#define VALUES_32(i) VALUES_24(i), VALUES_8(i + 24)
#define VALUES_40(i) VALUES_32(i), VALUES_8(i + 32)
#define VALUES_48(i) VALUES_40(i), VALUES_8(i + 40)
#define VALUES_56(i) VALUES_48(i), VALUES_8(i + 48)
#define VALUES_64(i) VALUES_56(i), VALUES_8(i + 56)
#define VALUES_72(i) VALUES_64(i), VALUES_8(i + 64)
#define VALUES_80(i) VALUES_72(i), VALUES_8(i + 72)
#define VALUES_88(i) VALUES_80(i), VALUES_8(i + 80)
#define VALUES_96(i) VALUES_88(i), VALUES_8(i + 88)
#define VALUES_104(i) VALUES_96(i), VALUES_8(i + 96)
#define VALUES_112(i) VALUES_104(i), VALUES_8(i + 104)
#define VALUES_120(i) VALUES_112(i), VALUES_8(i + 112)
#define VALUES_128(i) VALUES_120(i), VALUES_8(i + 120)
#define MULTIPLY(N, HALF, A, B, ADD, TURN_A, TURN_B)                                                        \
  template <int TA, int TB> struct Multiply<N, TA, TB> {                                                    \
    DEV static void run(float* d, u64 a, u64 b, int add) {                                                  \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ADD ", 0;\n"                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS_##HALF            \
                   "}, %" #A ", %" #B ", p, 1, 1, %" #TURN_A ", %" #TURN_B "; }\n"                          \
                   : VALUES_##HALF(0)                                                                       \
                   : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));                                           \
    }                                                                                                       \
  };
MULTIPLY(64, 32, 32, 33, 34, 35, 36)
MULTIPLY(96, 48, 48, 49, 50, 51, 52)
MULTIPLY(128, 64, 64, 65, 66, 67, 68)
MULTIPLY(144, 72, 72, 73, 74, 75, 76)
MULTIPLY(160, 80, 80, 81, 82, 83, 84)
MULTIPLY(176, 88, 88, 89, 90, 91, 92)
MULTIPLY(192, 96, 96, 97, 98, 99, 100)
MULTIPLY(208, 104, 104, 105, 106, 107, 108)
MULTIPLY(224, 112, 112, 113, 114, 115, 116)
MULTIPLY(240, 120, 120, 121, 122, 123, 124)
MULTIPLY(256, 128, 128, 129, 130, 131, 132)
#endif
