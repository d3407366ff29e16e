// The instructions of ptx.cuh for the model of a device.
#include <tuple>

inline u32 pack(float lo, float hi) {
  const auto round = [](float v) {
    const u32 bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return round(hi) << 16 | round(lo);
}
inline u8* dynamic_shared() { return emulator::now->block->memory.data(); }
inline u32 shared_address(const void* p) { return emulator::BASE + (u32)((const u8*)p - dynamic_shared()); }

inline void copy_async(u32 to, const void* from, u32 bytes) {
  if (to % 16 || (bytes && (u64)from % 16)) emulator::fail("a copy that is not aligned", to);
  emulator::now->copies.push_back({to, from, bytes});
}
inline void run_copies(emulator::Block* block, const std::vector<emulator::Copy>& copies) {
  for (const auto& copy : copies) {
    u8* to = emulator::shared(block, copy.to, 16);
    if (copy.bytes) memcpy(to, copy.from, copy.bytes);
    memset(to + copy.bytes, 0, 16 - copy.bytes);
  }
}
inline void copy_arrive(u32 bar) {
  emulator::waiting.push_back([=, block = emulator::now->block, copies = std::move(emulator::now->copies)] {
    run_copies(block, copies);
    emulator::arrive(block, bar);
  });
  emulator::now->copies.clear();
}
// Groups of copies: all that a wait allows stay undone.
inline void copy_commit() { emulator::now->copies.push_back({0, nullptr, 0}); }
template <int N> void copy_wait() {
  auto& copies = emulator::now->copies;
  int left = N;
  size_t end = copies.size();
  while (end > 0 && (copies[end - 1].to != 0 || left-- > 0)) end--;
  for (size_t i = 0; i < end; i++)
    if (copies[i].to != 0) run_copies(emulator::now->block, {copies[i]});
  copies.erase(copies.begin(), copies.begin() + end);
}

struct alignas(128) TensorMap { u64 opaque[16]; };
static_assert(sizeof(emulator::Map) <= sizeof(TensorMap));

inline void bar_init(u32 bar, u32 arrivals) {
  emulator::bar_at(emulator::now->block, bar) = {(int)arrivals, (int)arrivals, 0, 0, true};
}
inline void bar_init_fence() {}
inline void bar_arrive(u32 bar) { emulator::arrive(emulator::now->block, bar); }
inline void bar_arrive_at(u32 bar, u32 block) { emulator::arrive(&emulator::blocks[block], bar); }
inline void bar_expect(u32 bar, u32 bytes) { emulator::arrive(emulator::now->block, bar, (int)bytes); }
inline void bar_wait(u32 at, u32 parity) {
  auto& bar = emulator::bar_at(emulator::now->block, at);
  emulator::wait_until([&] { return (bar.phase & 1) != parity; });
}
inline void fence_async() {}
inline void load2(u32 to, const TensorMap* m, u32 bar, int x, int y) { emulator::load(to, m, bar, {x, y}, false); }
inline void load2_all(u32 to, const TensorMap* m, u32 bar, int x, int y) { emulator::load(to, m, bar, {x, y}, true); }
inline void load4(u32 to, const TensorMap* m, u32 bar, int x, int y, int z, int w) { emulator::load(to, m, bar, {x, y, z, w}, false); }
inline void load4_all(u32 to, const TensorMap* m, u32 bar, int x, int y, int z, int w) { emulator::load(to, m, bar, {x, y, z, w}, true); }
inline void store2(const TensorMap* m, u32 from, int x, int y) { emulator::store(m, from, {x, y}, false); }
inline void store3(const TensorMap* m, u32 from, int x, int y, int z) { emulator::store(m, from, {x, y, z}, false); }
inline void add3(const TensorMap* m, u32 from, int x, int y, int z) { emulator::store(m, from, {x, y, z}, true); }
inline void store_commit() {
  auto& fiber = *emulator::now;
  fiber.stores.push_back({false, std::move(fiber.boxes)});
  fiber.boxes.clear();
  if (emulator::chance(3) == 0) emulator::end_stores(0);
}
template <int N> void store_wait_read() { emulator::end_stores(N); }
inline void store_wait_all() { emulator::end_stores(0); }

// Lane l has pair l % 4 of row l / 4 of each block; turned, rows of the blocks in memory are their columns.
inline void put_blocks(u32 at, const u32 (&v)[4], bool turned) {
  const uint64_t mine[5] = {at, v[0], v[1], v[2], v[3]};
  const auto all = emulator::exchange(mine, 5);
  const int lane = threadIdx.x & 31;
  for (int b = 0; b < 4; b++)
    for (int c = 0; c < 2; c++) {
      const int pair = 2 * (lane % 4) + c, row = turned ? pair : lane / 4, column = turned ? lane / 4 : pair;
      const u16 half = (u16)(v[b] >> 16 * c);
      const u32 to = (u32)all[8 * b + row][0];
      if (to % 16) emulator::fail("a row that is not aligned", to);
      memcpy(emulator::shared(emulator::now->block, to + 2 * column, 2), &half, 2);
    }
}
inline void put4(u32 at, u32 a, u32 b, u32 c, u32 d) { put_blocks(at, {a, b, c, d}, false); }
inline void put4_turned(u32 at, u32 a, u32 b, u32 c, u32 d) { put_blocks(at, {a, b, c, d}, true); }
template <typename T> void put_at(u32 at, T v) {
  if (at % sizeof(T)) emulator::fail("a value that is not aligned", at);
  memcpy(emulator::shared(emulator::now->block, at, sizeof(T)), &v, sizeof(T));
}
inline void put(u32 at, float v) { put_at(at, v); }
inline void put(u32 at, u32 v) { put_at(at, v); }
inline void put(u32 at, float a, float b) { put_at(at, a), put_at(at + 4, b); }
inline U4 take(u32 at) {
  U4 v;
  memcpy(&v, emulator::shared(emulator::now->block, at, 16), 16);
  return v;
}
inline void meet(int id, int threads) { emulator::arrive_named(emulator::now->block->named[id], threads, true); }
inline void announce(int id, int threads) { emulator::arrive_named(emulator::now->block->named[id], threads, false); }
inline u32 rank_in_cluster() { return emulator::now->block->rank; }
inline void cluster_meet() { emulator::arrive_named(emulator::cluster, (int)(emulator::blocks.size() * blockDim.x), true); }
template <int R> void registers_up() {}
template <int R> void registers_down() {}

inline void products_fence() {}
inline void products_commit() {
  emulator::now->groups.push_back(std::move(emulator::now->products));
  emulator::now->products.clear();
  if (emulator::chance(4) == 0) emulator::end_products(0);
}
template <int N> void products_wait() { emulator::end_products(N); }
template <int N, int TA, int TB> struct Multiply {
  static void run(float* d, u64 a, u64 b, int add) { emulator::now->products.push_back({d, a, b, add, N, TA, TB}); }
};
template <int N> void hold(float (&)[N]) {}
