// A model of a GPU's block, of a warp's exchanges and of Hopper's copies, barriers and products, on one processor thread: the
// text of kernels runs in it as C++. Threads are fibers that give way where they wait, in an order that a seed decides. What a
// device does asynchronously is put off as long as the seed likes: a box or a row may arrive, be stored or be read by a product
// at any time until its reader or writer waits for it, so that a missing wait shows as a wrong value. Shared memory starts as
// NaN. A kernel that hangs is reported. The order of proxies (fences) and the number of registers are not modelled.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL 1

namespace emulator {
[[noreturn]] inline void fail(const char* what, long value = 0) {
  fprintf(stderr, "emulator: %s (%ld)\n", what, value);
  exit(3);
}

// Numbers from the seed.
static uint64_t state;
inline uint32_t chance(uint32_t below) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (uint32_t)((state >> 33) % below);
}

struct Dim { unsigned x, y, z; };
struct Barrier { int arrivals, pending, bytes; unsigned phase; bool made; };
struct Named { int arrived; unsigned phase; };
// Lanes that met to exchange values.
struct Warp { int lanes, arrived; unsigned phase; uint64_t value[32][5], taken[32][5]; };
struct Product { float* d; uint64_t a, b; int add, n, turn_a, turn_b; };
struct Block;
struct Copy { uint32_t to; const void* from; uint32_t bytes; };
struct Fiber {
  Dim thread;
  Block* block;
  Warp* warp;
  bool done = false, begun = false;
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<uint8_t[]> stack;
  std::vector<Product> products;           // asked for, not committed
  std::vector<std::vector<Product>> groups;
  std::vector<Copy> copies;
  std::vector<std::function<void()>> boxes;  // stores, not committed
  std::vector<std::pair<bool, std::vector<std::function<void()>>>> stores;  // groups, and whether they are done
};
struct Block {
  Dim index;
  int rank;
  std::vector<uint8_t> memory;
  std::vector<Barrier> bars;
  Named named[16];
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int live;
};
static std::vector<Block> blocks;   // of the cluster that runs
static Fiber* now;
static Dim block_dim, grid_dim;
static jmp_buf scheduler;
static ucontext_t first;
static std::function<void()> body;
static uint64_t moves;                                 // grows when anything happens
static std::vector<std::function<void()>> waiting;     // what happens at some time
static Named cluster;

// Where dynamic shared memory starts as kernels see it.
constexpr uint32_t BASE = 1024;

__attribute__((noinline)) inline void give_way() {
  if (!_setjmp(now->place)) _longjmp(scheduler, 1);
}
template <typename C> void wait_until(C ready) {
  while (!ready()) give_way();
  moves++;
}
inline void begin() {
  body();
  now->done = true;
  now->block->live--;
  moves++;
  for (auto& group : now->groups) if (!group.empty()) fail("a thread ends before its products");
  for (auto& group : now->stores) if (!group.first) fail("a thread ends before its stores");
  if (!now->products.empty() || !now->boxes.empty()) fail("a thread ends with work that it did not commit");
  _longjmp(scheduler, 1);
}
inline void run_waiting(size_t i) {
  std::swap(waiting[i], waiting.back());
  const auto work = std::move(waiting.back());
  waiting.pop_back();
  work();
  moves++;
}

inline uint8_t* shared(Block* block, uint32_t at, size_t bytes) {
  if (at < BASE || at - BASE + bytes > block->memory.size()) fail("an address outside shared memory", at);
  return block->memory.data() + (at - BASE);
}
inline Barrier& bar_at(Block* block, uint32_t at) {
  shared(block, at, 8);
  if (at % 8) fail("a barrier that is not aligned", at);
  return block->bars[(at - BASE) / 8];
}
inline void turn_if_complete(Barrier& bar) {
  if (bar.pending == 0 && bar.bytes == 0) { bar.phase++; bar.pending = bar.arrivals; }
}
inline void arrive(Block* block, uint32_t at, int bytes = 0) {
  Barrier& bar = bar_at(block, at);
  if (!bar.made) fail("an arrival at no barrier", at);
  if (bar.pending == 0) fail("more arrivals than a barrier counts", at);
  bar.pending--;
  bar.bytes += bytes;
  turn_if_complete(bar);
  moves++;
}
inline void complete(Block* block, uint32_t at, int bytes) {
  Barrier& bar = bar_at(block, at);
  if (!bar.made) fail("bytes for no barrier", at);
  bar.bytes -= bytes;
  turn_if_complete(bar);
  moves++;
}

// All lanes of a warp give values and get those of all.
inline const uint64_t (*exchange(const uint64_t* mine, int count))[5] {
  Warp& warp = *now->warp;
  const int lane = now->thread.x & 31;
  const unsigned phase = warp.phase;
  for (int i = 0; i < count; i++) warp.value[lane][i] = mine[i];
  if (++warp.arrived == warp.lanes) {
    memcpy(warp.taken, warp.value, sizeof(warp.value));
    warp.arrived = 0;
    warp.phase++;
    moves++;
  } else {
    wait_until([&] { return warp.phase != phase; });
  }
  return warp.taken;
}
// What was taken stays until the last lane is back; a lane that is early at the next exchange waits for the others there.
template <typename T> uint64_t bits_of(T v) {
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(v));
  return bits;
}
template <typename T> T from_bits(uint64_t bits) {
  T v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}
inline void arrive_named(Named& named, int threads, bool wait) {
  const unsigned phase = named.phase;
  moves++;
  if (++named.arrived == threads) {
    named.arrived = 0;
    named.phase++;
  } else if (wait) {
    wait_until([&] { return named.phase != phase; });
  }
}

// Runs a cluster: fibers take turns, and what is put off happens at some time.
inline void run_cluster() {
  int idle = 0;
  while (true) {
    bool live = false;
    const uint64_t before = moves;
    for (auto& block : blocks) {
      const size_t warps = block.warps.size(), from = chance(warps);
      for (size_t w = 0; w < warps; w++) {
        const size_t warp = (from + w) % warps;
        // A warp may be late.
        if (idle == 0 && chance(4) == 0) { live = live || block.live > 0; continue; }
        for (size_t i = 32 * warp; i < std::min(32 * warp + 32, block.fibers.size()); i++) {
          Fiber& fiber = block.fibers[i];
          if (fiber.done) continue;
          live = true;
          now = &fiber;
          if (!_setjmp(scheduler)) {
            if (fiber.begun) _longjmp(fiber.place, 1);
            fiber.begun = true;
            setcontext(&fiber.start);
          }
        }
      }
    }
    for (size_t n = chance(4 + waiting.size() / 2); n > 0 && !waiting.empty(); n--) run_waiting(chance(waiting.size()));
    if (!live) break;
    idle = moves == before ? idle + 1 : 0;
    // Nobody goes on: now it has to happen.
    if (idle > 1 && !waiting.empty()) { run_waiting(chance(waiting.size())); idle = 0; }
    if (idle > 4) {
      for (auto& block : blocks)
        for (auto& fiber : block.fibers)
          if (!fiber.done) { fprintf(stderr, "emulator: block %u, thread %u waits\n", block.index.x, fiber.thread.x); break; }
      fail("the kernel hangs");
    }
  }
  while (!waiting.empty()) run_waiting(chance(waiting.size()));
}

struct Launch { Dim grid; unsigned threads, cluster, shared; };
inline void launch(const Launch& l) {
  block_dim = {l.threads, 1, 1};
  grid_dim = l.grid;
  const unsigned count = l.grid.x * l.grid.y * l.grid.z, clusters = count / l.cluster;
  if (count % l.cluster) fail("a grid that is no multiple of the cluster", count);
  std::vector<unsigned> order(clusters);
  for (unsigned i = 0; i < clusters; i++) order[i] = i;
  for (unsigned i = clusters; i > 1; i--) std::swap(order[i - 1], order[chance(i)]);
  for (const unsigned c : order) {
    blocks.clear();
    blocks.resize(l.cluster);
    cluster = {};
    for (unsigned rank = 0; rank < l.cluster; rank++) {
      Block& block = blocks[rank];
      const unsigned at = c * l.cluster + rank;
      block.index = {at % l.grid.x, at / l.grid.x % l.grid.y, at / l.grid.x / l.grid.y};
      block.rank = rank;
      block.memory.assign((l.shared + 2047) / 1024 * 1024, 0xff);
      block.bars.assign(block.memory.size() / 8, {});
      memset(block.named, 0, sizeof(block.named));
      block.live = l.threads;
      block.warps.assign((l.threads + 31) / 32, {});
      block.fibers.resize(l.threads);
      for (unsigned t = 0; t < l.threads; t++) {
        Fiber& fiber = block.fibers[t];
        fiber.thread = {t, 0, 0};
        fiber.block = &block;
        fiber.warp = &block.warps[t / 32];
        fiber.warp->lanes++;
        constexpr size_t STACK = 96 << 10;
        fiber.stack.reset(new uint8_t[STACK]);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = &first;
        makecontext(&fiber.start, begin, 0);
      }
    }
    run_cluster();
  }
}

// A descriptor as the tests write it: what the driver is told.
struct Map {
  uint64_t base;
  uint32_t rank, size, swizzle, sizes[5], box[5];
  uint64_t strides[5];   // of dimensions 1 to 4, in bytes
};
// Calls `each(byte of shared memory, address or null)` for the elements of a box.
template <typename E> void for_box(const Map& m, uint32_t at, const int* place, E each) {
  if (at % 128 || (m.rank > 1 && m.box[1] > 16 && at % 1024)) fail("a box that is not aligned", at);
  uint32_t count = 1;
  for (uint32_t i = 0; i < m.rank; i++) count *= m.box[i];
  for (uint32_t e = 0; e < count; e++) {
    uint64_t address = m.base;
    bool in = true;
    uint32_t rest = e;
    for (uint32_t i = 0; i < m.rank; i++) {
      const int64_t x = place[i] + (int64_t)(rest % m.box[i]);
      rest /= m.box[i];
      in = in && x >= 0 && x < (int64_t)m.sizes[i];
      address += x * (i == 0 ? m.size : m.strides[i - 1]);
    }
    uint32_t to = at + e * m.size;
    // Over rows of 128 bytes, or of 64.
    to ^= m.swizzle == 128 ? (to >> 7 & 7) << 4 : (to >> 7 & 3) << 4;
    each(to, in ? (uint8_t*)address : nullptr);
  }
}
inline uint32_t bytes_of(const Map& m) {
  uint32_t bytes = m.size;
  for (uint32_t i = 0; i < m.rank; i++) bytes *= m.box[i];
  return bytes;
}
inline void load(uint32_t to, const void* map, uint32_t bar, std::vector<int> place, bool all) {
  Map m;
  memcpy(&m, map, sizeof(m));
  if (m.rank != place.size()) fail("a box of another rank", m.rank);
  for (auto& block : blocks)
    if (all || &block == now->block)
      waiting.push_back([=, target = &block] {
        for_box(m, to, place.data(), [&](uint32_t at, uint8_t* from) {
          if (from) memcpy(shared(target, at, m.size), from, m.size);
          else memset(shared(target, at, m.size), 0, m.size);
        });
        complete(target, bar, bytes_of(m));
      });
}
inline void store(const void* map, uint32_t from, std::vector<int> place, bool add) {
  Map m;
  memcpy(&m, map, sizeof(m));
  if (m.rank != place.size()) fail("a box of another rank", m.rank);
  Block* block = now->block;
  now->boxes.push_back([=] {
    for_box(m, from, place.data(), [&](uint32_t at, uint8_t* to) {
      if (!to) return;
      const uint8_t* v = shared(block, at, m.size);
      if (add) *(float*)to += *(const float*)v;
      else memcpy(to, v, m.size);
    });
  });
}
// Ends all but the last `left` groups of stores.
inline void end_stores(size_t left) {
  auto& stores = now->stores;
  for (size_t i = 0; i + left < stores.size(); i++) {
    if (!stores[i].first) for (auto& box : stores[i].second) box();
    stores[i] = {true, {}};
  }
  moves++;
}

// What a product reads of 16 terms of a row: a row of 128 bytes in blocks of 8, or of 64 columns in rows of terms.
inline void read_terms(float* to, uint64_t matrix, int row, bool turned) {
  const uint32_t start = (matrix & 0x3fff) << 4, next = (matrix >> 16 & 0x3fff) << 4, groups = (matrix >> 32 & 0x3fff) << 4;
  const uint8_t* memory = now->block->memory.data();
  const uint32_t size = (uint32_t)now->block->memory.size();
  for (int k = 0; k < 16; k++) {
    uint32_t at = turned ? start + row / 64 * next + k / 8 * groups + k % 8 * 128 + row % 64 * 2
                         : start + row / 8 * groups + row % 8 * 128 + k * 2;
    at ^= (at >> 7 & 7) << 4;
    if (at < BASE || at - BASE + 2 > size) fail("a product outside shared memory", at);
    const uint8_t* from = memory + (at - BASE);
    const uint32_t bits = (uint32_t)from[0] << 16 | (uint32_t)from[1] << 24;
    memcpy(to + k, &bits, 4);
  }
}
inline void multiply(const Product& p) {
  for (const uint64_t matrix : {p.a, p.b})
    if (matrix >> 62 != 1 || matrix >> 46 & 0xffff) fail("a matrix that is not swizzled over 128 bytes");
  const int lane = now->thread.x & 31, warp = now->thread.x >> 5 & 3;
  float a[2][16], b[16];
  for (int h = 0; h < 2; h++) read_terms(a[h], p.a, 16 * warp + lane / 4 + 8 * h, p.turn_a);
  for (int j = 0; j < p.n / 8; j++)
    for (int c = 0; c < 2; c++) {
      read_terms(b, p.b, 8 * j + lane % 4 * 2 + c, p.turn_b);
      for (int h = 0; h < 2; h++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += a[h][k] * b[k];
        float& d = p.d[4 * j + 2 * h + c];
        d = (p.add ? d : 0.0f) + sum;
      }
    }
}
inline void end_products(size_t left) {
  auto& groups = now->groups;
  while (groups.size() > left) {
    for (auto& product : groups.front()) multiply(product);
    groups.erase(groups.begin());
  }
}

// --- Launches -----------------------------------------------------------------------------------------------------------
template <typename T> T take(const uint8_t*& at) {
  T v;
  memcpy((void*)&v, at, sizeof(T));
  at += (sizeof(T) + 7) / 8 * 8;
  return v;
}
using Entry = std::pair<const char*, std::function<void(const uint8_t*)>>;
template <typename... A> Entry entry(const char* name, void (*kernel)(A...)) {
  return {name, [kernel](const uint8_t* args) {
            body = [=] {
              const uint8_t* at = args;
              std::tuple<std::decay_t<A>...> all{take<std::decay_t<A>>(at)...};
              std::apply(kernel, all);
            };
          }};
}
// Reads buffers with their addresses and launches from one file, and writes the buffers to another.
inline int main(int argc, char** argv, std::vector<Entry> entries) {
  if (argc != 3) fail("arguments");
  FILE* in = fopen(argv[1], "rb");
  const auto number = [&] {
    uint64_t v;
    if (fread(&v, 8, 1, in) != 1) fail("the input ends");
    return v;
  };
  const auto bytes = [&](void* to, size_t count) {
    if (count && fread(to, count, 1, in) != 1) fail("the input ends");
  };
  state = number();
  std::vector<std::pair<uint8_t*, uint64_t>> buffers(number());
  for (auto& buffer : buffers) {
    const uint64_t at = number(), len = number();
    // Its last byte is the last of a page, behind which there is nothing.
    const uint64_t start = at & ~4095ull, end = (at + len + 4095) & ~4095ull;
    void* got = mmap((void*)start, end - start, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (got != (void*)start) fail("memory at an address");
    buffer = {(uint8_t*)at, len};
    bytes(buffer.first, len);
  }
  for (uint64_t launches = number(); launches > 0; launches--) {
    char name[64] = {};
    bytes(name, number());
    Launch l;
    l.grid.x = number(), l.grid.y = number(), l.grid.z = number();
    l.threads = number(), l.cluster = number(), l.shared = number();
    std::vector<uint8_t> args(number());
    bytes(args.data(), args.size());
    const auto found = std::find_if(entries.begin(), entries.end(), [&](auto& entry) { return !strcmp(entry.first, name); });
    if (found == entries.end()) fail(name);
    found->second(args.data());
    launch(l);
  }
  FILE* out = fopen(argv[2], "wb");
  for (auto& buffer : buffers) if (buffer.second) fwrite(buffer.first, buffer.second, 1, out);
  return fclose(out);
}
}  // namespace emulator

#define KERNEL(name) emulator::entry(#name, name)
#define threadIdx (emulator::now->thread)
#define blockIdx (emulator::now->block->index)
#define blockDim (emulator::block_dim)
#define gridDim (emulator::grid_dim)

using std::max;
using std::min;
inline float __uint_as_float(unsigned v) { return emulator::from_bits<float>(v); }
inline float __int_as_float(int v) { return emulator::from_bits<float>((unsigned)v); }
inline unsigned __float_as_uint(float v) { return (unsigned)emulator::bits_of(v); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline void __syncwarp() { uint64_t none = 0; emulator::exchange(&none, 1); }
inline void __syncthreads() { emulator::arrive_named(emulator::now->block->named[0], emulator::block_dim.x, true); }
template <typename T, typename F> T shuffled(T v, F from) {
  const uint64_t mine = emulator::bits_of(v);
  const int lane = threadIdx.x & 31, other = from(lane);
  const auto all = emulator::exchange(&mine, 1);
  return other < 0 || other > 31 ? v : emulator::from_bits<T>(all[other][0]);
}
template <typename T> T __shfl_xor_sync(unsigned, T v, int mask) { return shuffled(v, [=](int lane) { return lane ^ mask; }); }
template <typename T> T __shfl_up_sync(unsigned, T v, int by) { return shuffled(v, [=](int lane) { return lane - by; }); }
template <typename T> T __shfl_sync(unsigned, T v, int from) { return shuffled(v, [=](int) { return from; }); }
inline unsigned __ballot_sync(unsigned, bool v) {
  const uint64_t mine = v;
  const auto all = emulator::exchange(&mine, 1);
  unsigned bits = 0;
  for (int i = 0; i < emulator::now->warp->lanes; i++) bits |= (unsigned)all[i][0] << i;
  return bits;
}
inline unsigned __reduce_add_sync(unsigned, unsigned v) {
  const uint64_t mine = v;
  const auto all = emulator::exchange(&mine, 1);
  unsigned sum = 0;
  for (int i = 0; i < emulator::now->warp->lanes; i++) sum += (unsigned)all[i][0];
  return sum;
}
template <typename T> T atomicAdd(T* to, T v) { const T before = *to; *to += v; return before; }
