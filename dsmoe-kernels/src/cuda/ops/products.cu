// Products of the active pairs on Hopper. Pairs lie in slots, as `arrange` of router.cu orders them; all activations of pairs
// are [slots, wide], where wide is the width w of an expert, rounded up to 64 columns. A group is an expert or a piece of the
// core. Its weights are rows of [core + n w, hidden].
//
//   up       c = coefficient act(a) b, a | b = x [gate | up]^T     rows of x gathered; a and b are kept if asked for
//   project  g = dy W^T                                            rows of dy gathered
//   down     part = c W                                            parts [slots, hidden]
//   input    part = da gate + db up
//   weights  dW (+)= a^T x, three products at once                 terms of x gathered
//
// A tile is BM x BN in steps of 64 terms. A warpgroup brings operands into a ring of STAGES steps: weights and slots by
// descriptors, gathered rows by cp.async. Two warpgroups multiply: they have 64 rows of a tile each and start LEAD steps apart,
// so that one stores while the other multiplies, or with PINGPONG a tile each in turns. CL blocks of a cluster have the same
// columns and different rows; each brings 1 / CL of the weights for all. Blocks take tiles in steps of the grid. Each sum has
// one order in all variants: 64 terms at a time.
#define BM 128
#define MI (PINGPONG ? BM / 64 : 1)   // blocks of 64 rows of a consumer
#define A_BYTES (BM * BK * 2)
#define B_BYTES (BN * BK * 2)
#define STAGE_BYTES (A_BYTES + B_BYTES)
static_assert(BN % 64 == 0 && BN / 2 * MI <= 128, "columns of a tile");
static_assert(STAGES * STAGE_BYTES + OUT_BYTES + BAR_BYTES + 1024 <= 232448, "shared memory");

template <int FORM> struct Kind {
  static constexpr bool GATHER = FORM == UP || FORM == PROJECT || FORM == WEIGHTS;
  static constexpr int TA = FORM == WEIGHTS, TB = FORM == DOWN || FORM == INPUT || FORM == WEIGHTS;
};

// The next work of a block: rows of a group, or of WEIGHTS a product, its terms and columns of x.
struct Tile {
  int slot, rows, group, column, product, of_x, steps;
  bool shared;
};

template <int FORM> DEV int tiles_of(const Args& p) {
  if (FORM == WEIGHTS) return p.groups * 3 * ceil_div(p.hidden, BM * CL) * ceil_div(p.wide, BN);
  const int columns = FORM == UP ? ceil_div(p.wide, BN / 2) : FORM == PROJECT ? ceil_div(p.wide, BN) : ceil_div(p.hidden, BN);
  return (int)*p.pairs * (2 / CL) * columns;
}

template <int FORM> DEV Tile tile_of(int id, int rank, const Args& p) {
  Tile t = {};
  if (FORM == WEIGHTS) {
    const int columns = ceil_div(p.wide, BN), of_x = ceil_div(p.hidden, BM * CL);
    t.group = id / (3 * columns * of_x);
    t.product = id / (columns * of_x) % 3;
    t.of_x = id / columns % of_x * BM * CL + rank * BM;
    t.column = id % columns * BN;
    t.slot = p.starts[t.group];
    t.rows = p.sizes[t.group];
    t.steps = ceil_div(t.rows, BK);
    t.shared = CL > 1;
    return t;
  }
  const int columns = FORM == UP ? ceil_div(p.wide, BN / 2) : FORM == PROJECT ? ceil_div(p.wide, BN) : ceil_div(p.hidden, BN);
  const Half half = p.halves[id / columns * CL + rank];
  t.slot = half.slot;
  t.rows = half.what & 511;
  t.shared = CL > 1 && (half.what & 512);
  t.group = half.what >> 10;
  t.column = id % columns * (FORM == UP ? BN / 2 : BN);
  t.steps = FORM == DOWN ? p.wide / BK : FORM == INPUT ? 2 * (p.wide / BK) : ceil_div(p.hidden, BK);
  return t;
}

// Tiles that do nothing: of WEIGHTS those that would add nothing, and of single blocks those that fill a pair up.
template <int FORM> DEV bool is_empty(const Tile& t, const Args& p) {
  return FORM == WEIGHTS ? t.steps == 0 && !(p.flags & 2) : CL == 1 && t.rows == 0;
}
// The warpgroup that brings operands.
template <int FORM> DEV void load(const Maps& m, const Args& p, u32 stages, u32 full, u32 empty) {
  using K = Kind<FORM>;
  const int tid = threadIdx.x, rank = CL > 1 ? rank_in_cluster() : 0;
  if (!K::GATHER && tid != 0) return;
  const int tiles = tiles_of<FORM>(p), by = gridDim.x / CL, c = tid & 7, r0 = tid >> 3;
  int slot = 0;
  u32 parity = 1;
  for (int id = blockIdx.x / CL; id < tiles; id += by) {
    const Tile t = tile_of<FORM>(id, rank, p);
    if (is_empty<FORM>(t, p)) continue;
    const bf16* from = FORM == WEIGHTS && t.product == 2 ? p.rows[1] : p.rows[0];
    const int row = first_row(t.group, p);
    u32 at[BM / 16];
    if constexpr (K::GATHER && FORM != WEIGHTS)
#pragma unroll
      for (int j = 0; j < BM / 16; j++)
        at[j] = r0 + 16 * j < t.rows ? p.tokens[t.slot + r0 + 16 * j] * (u32)p.hidden + 8 * c : ~0u;
#pragma unroll 1
    for (int k = 0; k < t.steps; k++) {
      const u32 stage = stages + slot * STAGE_BYTES, b = stage + A_BYTES, bar = full + 8 * slot;
      u32 token[4];
      if constexpr (FORM == WEIGHTS)   // asked for before the wait
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int r = k * BK + r0 + 16 * j;
          token[j] = r < t.rows ? p.tokens[t.slot + r] : ~0u;
        }
      bar_wait(empty + 8 * slot, parity);
      if (tid == 0) {
        bar_expect(bar, (K::GATHER ? 0 : A_BYTES) + B_BYTES);
        const int half = p.wide / BK, second = FORM == INPUT && k >= half, step = second ? k - half : k;
        if constexpr (FORM == DOWN || FORM == INPUT) load2(stage, m.a + second, bar, step * BK, t.slot);
        if constexpr (FORM == UP || FORM == PROJECT) {
          // Each block brings its part, for all where they share.
#pragma unroll
          for (int q = 0; q < CL; q++) {
            if (t.shared && q != rank) continue;
            const u32 to = b + q * (B_BYTES / CL);
            if constexpr (FORM == UP) {
              const int y = (row + t.column) / 8 + q * (BN / 16 / CL);
              if (t.shared) load4_all(to, m.b, bar, k * BK, 0, 0, y);
              else load4(to, m.b, bar, k * BK, 0, 0, y);
            } else {
              const int y = row + t.column + q * (BN / CL);
              if (t.shared) load2_all(to, m.b, bar, k * BK, y);
              else load2(to, m.b, bar, k * BK, y);
            }
          }
        } else {
          const TensorMap* of = m.b + (FORM == WEIGHTS ? t.product : second);
          const int y = FORM == WEIGHTS ? t.slot + k * BK : row + step * BK;
#pragma unroll
          for (int j = 0; j < BN / 64; j++) {
            if (!t.shared) load2(b + j * BOX, of, bar, t.column + 64 * j, y);
            else if (j % CL == rank) load2_all(b + j * BOX, of, bar, t.column + 64 * j, y);
          }
        }
      }
      if constexpr (FORM == UP || FORM == PROJECT) {
        const u32 to = stage + r0 * 128 + ((c ^ (r0 & 7)) << 4);
        const bool terms = k * BK + 8 * c < p.hidden;
#pragma unroll
        for (int j = 0; j < BM / 16; j++) {
          const bool in = at[j] != ~0u && terms;
          copy_async(to + 2048 * j, from + (in ? at[j] + (u32)(k * BK) : 0u), in ? 16 : 0);
        }
        copy_arrive(bar);
      }
      if constexpr (FORM == WEIGHTS) {   // blocks of 64 columns
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int r = r0 + 16 * j;
#pragma unroll
          for (int h = 0; h < BM / 64; h++) {
            const int column = t.of_x + 64 * h + 8 * c;
            const bool in = token[j] != ~0u && column < p.hidden;
            copy_async(stage + h * BOX + r * 128 + ((c ^ (r & 7)) << 4), from + (in ? token[j] * (u32)p.hidden + column : 0u),
                       in ? 16 : 0);
          }
        }
        copy_arrive(bar);
      }
      if (++slot == STAGES) { slot = 0; parity ^= 1; }
    }
  }
}

// A box of bf16: `value(j, half)` packs columns 8 j + 2 (lane % 4) and the next of row lane / 4 + 8 half of a warp's rows.
template <typename V> DEV void box_of(u32 box, V value) {
  const int lane = threadIdx.x & 31, row = ((threadIdx.x >> 5) & 3) * 16 + (lane & 15);
  const u32 to = box + row * 128;
#pragma unroll
  for (int j = 0; j < 8; j += 2)
    put4(to + (((j + (lane >> 4)) ^ (row & 7)) << 4), value(j, 0), value(j, 1), value(j + 1, 0), value(j + 1, 1));
}

template <int FORM>
DEV void store_block(const float (&v)[BN / 2], int block, const Tile& t, const Maps& m, const Args& p, Outlet& outlet) {
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, row = block * 64 + warp * 16 + (lane >> 2);
  if constexpr (FORM == UP) {
    const int width = width_of(t.group, p);
    float s[2];
#pragma unroll
    for (int h = 0; h < 2; h++) s[h] = row + 8 * h < t.rows ? p.coefficients[t.slot + row + 8 * h] : 0.0f;
#pragma unroll
    for (int x = 0; x < BN / 2; x += 64) {
      const auto one = [&](int which, int j, int h) {
        const int o = 8 * (x / 8 + j) + 4 * which + 2 * h;
        return pack(v[o], v[o + 1]);
      };
      box_of(outlet.open(), [&](int j, int h) {
        // Neurons behind the group's are another's; their slots are zeros.
        if (t.column + x + 8 * j >= width) return 0u;
        const u32 a = one(0, j, h), b = one(1, j, h);
        return pack(s[h] * act(lo_f32(a)) * lo_f32(b), s[h] * act(hi_f32(a)) * hi_f32(b));
      });
      outlet.close([&](u32 box) { store2(m.out, box, t.column + x, t.slot + 64 * block); });
      if (p.flags & 1) {
#pragma unroll
        for (int which = 0; which < 2; which++) {
          box_of(outlet.open(), [&](int j, int h) { return one(which, j, h); });
          outlet.close([&](u32 box) { store2(m.out + 1 + which, box, t.column + x, t.slot + 64 * block); });
        }
      }
    }
  } else if constexpr (FORM == WEIGHTS) {
    // A row of v is a column of x: boxes of 64 neurons x 32 columns of x, f32.
    const bool of_core = t.group < p.pieces;
    const TensorMap* to = m.out + t.product + (of_core ? 3 : 0);
    const int neuron = of_core ? t.group * p.wide + t.column : t.column, z = of_core ? 0 : t.group - p.pieces;
#pragma unroll
    for (int n = 0; n < BN; n += 64)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const u32 box = outlet.open();
        if ((warp >> 1) == half)
#pragma unroll
          for (int j = 0; j < 8; j++)
#pragma unroll
            for (int q = 0; q < 4; q++) {
              const int r = 8 * j + 2 * (lane & 3) + (q & 1), cx = (warp & 1) * 16 + (lane >> 2) + 8 * (q >> 1);
              put(box + r * 128 + ((((cx >> 2) ^ (r & 7)) << 4) | ((cx & 3) << 2)), v[4 * (n / 8 + j) + q]);
            }
        outlet.close([&](u32 from) {
          const int x = t.of_x + 64 * block + 32 * half;
          if (p.flags & 2) store3(to, from, x, neuron + n, z);
          else add3(to, from, x, neuron + n, z);
        });
      }
  } else {
#pragma unroll
    for (int x = 0; x < BN; x += 64) {
      box_of(outlet.open(), [&](int j, int h) {
        const int o = 4 * (x / 8 + j) + 2 * h;
        return pack(v[o], v[o + 1]);
      });
      outlet.close([&](u32 box) { store2(m.out, box, t.column + x, t.slot + 64 * block); });
    }
  }
}

// A warpgroup that multiplies.
template <int FORM> DEV void multiply(const Maps& m, const Args& p, u32 stages, u32 full, u32 empty, u32 out) {
  using K = Kind<FORM>;
  // The same in all lanes, as the compiler has to see.
  const int me = __shfl_sync(0xffffffffu, (int)(threadIdx.x >> 7), 0) - 1, lane = threadIdx.x & 31;
  const int rank = CL > 1 ? rank_in_cluster() : 0;
  const int tiles = tiles_of<FORM>(p), by = gridDim.x / CL;
  Outlet outlet{out + me * RING * BOX, 0, 1 + me, (threadIdx.x & 127) == 0};
  float d[MI][BN / 2];
  int slot = 0;
  u32 parity = 0;
  const auto next = [&] {
    if (++slot == STAGES) { slot = 0; parity ^= 1; }
  };
  // Tells the cluster's producers that this warp is through with a step.
  const auto release = [&](int s) {
    if (CL == 1) {
      if (lane == 0) bar_arrive(empty + 8 * s);
    } else if (lane < CL) {
      bar_arrive_at(empty + 8 * s, lane);
    }
  };
  const u32 a0 = stages + (PINGPONG ? 0 : me * BOX), b0 = stages + A_BYTES;
  if (!PINGPONG && LEAD > 0 && me > 0) meet(8, 256);   // LEAD steps behind the first
  bool told = PINGPONG || LEAD == 0 || me > 0;
  int turn = 0;
  for (int id = blockIdx.x / CL; id < tiles; id += by) {
    const Tile t = tile_of<FORM>(id, rank, p);
    if (is_empty<FORM>(t, p)) continue;
    if (PINGPONG && (turn++ & 1) != me) {
      const int n = slot + t.steps;
      slot = n % STAGES;
      parity ^= n / STAGES & 1;
      continue;
    }
    // Without rows the steps are only let go.
    const bool idle = !PINGPONG && FORM != WEIGHTS && 64 * me >= t.rows;
    if (PINGPONG) meet(8 + me, 256);                    // the other has asked for its products
    if (idle) {
#pragma unroll 1
      for (int k = 0; k < t.steps; k++) {
        bar_wait(full + 8 * slot, parity);
        release(slot);
        next();
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < t.steps; k++) {
        bar_wait(full + 8 * slot, parity);
        if (FENCE && K::GATHER) fence_async();
        const u64 a = matrix(a0 + slot * STAGE_BYTES, K::TA ? BOX : 16), b = matrix(b0 + slot * STAGE_BYTES, K::TB ? BOX : 16);
#pragma unroll
        for (int i = 0; i < MI; i++) hold(d[i]);
        products_fence();
#pragma unroll
        for (int q = 0; q < BK / 16; q++)
#pragma unroll
          for (int i = 0; i < MI; i++)
            Multiply<BN, K::TA, K::TB>::run(d[i], a + i * (BOX >> 4) + q * (K::TA ? 128 : 2), b + q * (K::TB ? 128 : 2),
                                            k > 0 || q > 0);
        products_commit();
        if (k > 0) {
          products_wait<1>();
          release(slot == 0 ? STAGES - 1 : slot - 1);
        }
        if (!told && k + 1 == LEAD) {
          announce(8, 256);
          told = true;
        }
        next();
      }
    }
    if (PINGPONG) announce(8 + (me ^ 1), 256);
    if (!told) {
      announce(8, 256);
      told = true;
    }
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < MI; i++) hold(d[i]);
    if (idle) continue;
    if (t.steps > 0) release(slot == 0 ? STAGES - 1 : slot - 1);
    if (FORM == WEIGHTS && t.steps == 0)
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < BN / 2; j++) d[i][j] = 0.0f;
#pragma unroll
    for (int i = 0; i < MI; i++)
      if (FORM == WEIGHTS || 64 * (PINGPONG ? i : me) < t.rows) store_block<FORM>(d[i], PINGPONG ? i : me, t, m, p, outlet);
  }
  if (!told) announce(8, 256);
  if (outlet.leader) store_wait_all();
}

template <int FORM> DEV void run(const Maps& m, const Args& p) {
  const u32 stages = (shared_address(dynamic_shared()) + 1023) & ~1023u, out = stages + STAGES * STAGE_BYTES;
  const u32 full = out + OUT_BYTES, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      bar_init(full + 8 * s, (Kind<FORM>::GATHER ? 128 : 0) + 1);
      bar_init(empty + 8 * s, 4 * (PINGPONG ? 1 : CONSUMERS) * CL);
    }
    bar_init_fence();
  }
  if (CL > 1) cluster_meet();
  else __syncthreads();
  if (threadIdx.x < 128) {
    registers_down<(Kind<FORM>::GATHER ? 56 : 40)>();
    load<FORM>(m, p, stages, full, empty);
  } else {
    registers_up<(Kind<FORM>::GATHER ? 224 : 232)>();
    if (PINGPONG && threadIdx.x >= 256) announce(8, 256);   // the first may begin
    multiply<FORM>(m, p, stages, full, empty, out);
  }
  __syncwarp();
  // A block's memory stays until the other is through with it.
  if (CL > 1) cluster_meet();
}

#if CL > 1
#define CLUSTER __cluster_dims__(CL, 1, 1)
#else
#define CLUSTER
#endif
#define PRODUCT(NAME, FORM)                                                                                              \
  extern "C" __global__ void CLUSTER __launch_bounds__(384, 1)                                                           \
      NAME(const __grid_constant__ Maps m, const __grid_constant__ Args p) {                                             \
    run<FORM>(m, p);                                                                                                     \
  }
#if BN % 128 == 0
PRODUCT(up, UP)
#endif
PRODUCT(project, PROJECT)
PRODUCT(down, DOWN)
PRODUCT(input, INPUT)
PRODUCT(weights, WEIGHTS)
