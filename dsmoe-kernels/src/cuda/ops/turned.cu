// Products of pairs in slots with the weights on the side of 128 rows and up to 256 tokens on the other, for batches of which
// an expert has few: up, project, down and input of products.cu. How many tokens a tile has, in steps of 16, comes from its
// expert, so that tiles of one are of about the same size; the loop over the terms is made for each width. Blocks of a cluster
// have the same rows of the weights and bring half of them each; their tokens are their own.
#define A_BYTES (128 * BK * 2)
#define STAGE_BYTES (A_BYTES + 256 * BK * 2)
static_assert(STAGES * STAGE_BYTES + OUT_BYTES + BAR_BYTES + 1024 <= 232448, "shared memory");

template <int FORM> struct Kind {
  static constexpr bool GATHER = FORM == UP || FORM == PROJECT;
  static constexpr int TA = FORM == DOWN || FORM == INPUT;
  // Rows of the result that a tile has: half of the weights' where those of both projections lie in turns.
  static constexpr int ROWS = FORM == UP ? 64 : 128;
};

struct Tile {
  int slot, rows, group, column, steps;
  bool shared;
};

template <int FORM> DEV int columns_of(const Args& p) {
  return ceil_div(FORM == UP || FORM == PROJECT ? p.wide : p.hidden, Kind<FORM>::ROWS);
}
template <int FORM> DEV Tile tile_of(int id, int rank, const Args& p) {
  Tile t;
  const int columns = columns_of<FORM>(p);
  const Half half = p.halves[id / columns * CL + rank];
  t.slot = half.slot;
  t.rows = half.what & 511;
  t.shared = CL > 1 && (half.what & 512);
  t.group = half.what >> 10;
  t.column = id % columns * Kind<FORM>::ROWS;
  t.steps = FORM == DOWN ? p.wide / BK : FORM == INPUT ? 2 * (p.wide / BK) : ceil_div(p.hidden, BK);
  return t;
}
// The width of a tile's products: one of those that there are loops for.
DEV int width_for(int rows) { return rows <= 64 ? 64 : rows <= 96 ? 96 : rows <= 128 ? 128 : (rows + 15) / 16 * 16; }

// The warpgroup that brings operands.
template <int FORM> DEV void load(const Maps& m, const Args& p, u32 stages, u32 full, u32 empty) {
  using K = Kind<FORM>;
  const int tid = threadIdx.x, rank = CL > 1 ? rank_in_cluster() : 0;
  if (!K::GATHER && tid != 0) return;
  const int tiles = (int)*p.pairs * (2 / CL) * columns_of<FORM>(p), by = gridDim.x / CL, c = tid & 7, r0 = tid >> 3;
  int slot = 0;
  u32 parity = 1;
  for (int id = blockIdx.x / CL; id < tiles; id += by) {
    const Tile t = tile_of<FORM>(id, rank, p);
    if (CL == 1 && t.rows == 0) continue;
    const int row = first_row(t.group, p), wide = width_for(t.rows), boxes = ceil_div(wide, 64);
    u32 at[16];
    if constexpr (K::GATHER)
#pragma unroll
      for (int j = 0; j < 16; j++)
        at[j] = r0 + 16 * j < t.rows ? p.tokens[t.slot + r0 + 16 * j] * (u32)p.hidden + 8 * c : ~0u;
#pragma unroll 1
    for (int k = 0; k < t.steps; k++) {
      const u32 a = stages + slot * STAGE_BYTES, b = a + A_BYTES, bar = full + 8 * slot;
      bar_wait(empty + 8 * slot, parity);
      if (tid == 0) {
        const int half = p.wide / BK, second = FORM == INPUT && k >= half, step = second ? k - half : k;
        bar_expect(bar, A_BYTES + (K::GATHER ? 0 : boxes * BOX));
#pragma unroll
        for (int q = 0; q < 2; q++) {
          // Of a pair that shares, each block brings one half for both.
          if (t.shared && q != rank) continue;
          const u32 to = a + q * BOX;
          if constexpr (FORM == UP) {
            const int y = (row + t.column) / 8 + 4 * q;
            if (t.shared) load4_all(to, m.b, bar, k * BK, 0, 0, y);
            else load4(to, m.b, bar, k * BK, 0, 0, y);
          } else {
            const int x = FORM == PROJECT ? k * BK : t.column + 64 * q;
            const int y = FORM == PROJECT ? row + t.column + 64 * q : row + step * BK;
            if (t.shared) load2_all(to, m.b + second, bar, x, y);
            else load2(to, m.b + second, bar, x, y);
          }
        }
        if constexpr (!K::GATHER)
          for (int q = 0; q < boxes; q++) load2(b + q * BOX, m.a + second, bar, step * BK, t.slot + 64 * q);
      }
      if constexpr (K::GATHER) {
        const u32 to = b + r0 * 128 + ((c ^ (r0 & 7)) << 4);
        const bool terms = k * BK + 8 * c < p.hidden;
#pragma unroll
        for (int j = 0; j < 16; j++)
          if (16 * j < wide) {
            const bool in = at[j] != ~0u && terms;
            copy_async(to + 2048 * j, p.rows[0] + (in ? at[j] + (u32)(k * BK) : 0u), in ? 16 : 0);
          }
        copy_arrive(bar);
      }
      if (++slot == STAGES) { slot = 0; parity ^= 1; }
    }
  }
}

struct Ring {
  u32 stages, full, empty;
  int slot;
  u32 parity;
};

// The sums of a tile of N tokens.
template <int FORM, int N> DEV void sum_steps(float (&d)[128], int steps, Ring& ring, int me, bool& told) {
  using K = Kind<FORM>;
  const int lane = threadIdx.x & 31;
  const auto release = [&](int s) {
    if (CL == 1) {
      if (lane == 0) bar_arrive(ring.empty + 8 * s);
    } else if (lane < CL) {
      bar_arrive_at(ring.empty + 8 * s, lane);
    }
  };
#pragma unroll 1
  for (int k = 0; k < steps; k++) {
    bar_wait(ring.full + 8 * ring.slot, ring.parity);
    if (FENCE && K::GATHER) fence_async();
    const u32 stage = ring.stages + ring.slot * STAGE_BYTES;
    const u64 a = matrix(stage + me * BOX, K::TA ? BOX : 16), b = matrix(stage + A_BYTES, 16);
    hold(d);
    products_fence();
#pragma unroll
    for (int q = 0; q < BK / 16; q++) Multiply<N, K::TA, 0>::run(d, a + q * (K::TA ? 128 : 2), b + 2 * q, k > 0 || q > 0);
    products_commit();
    if (k > 0) {
      products_wait<1>();
      release(ring.slot == 0 ? STAGES - 1 : ring.slot - 1);
    }
    if (!told && k + 1 == LEAD) {
      announce(8, 256);
      told = true;
    }
    if (++ring.slot == STAGES) { ring.slot = 0; ring.parity ^= 1; }
  }
  products_wait<0>();
  hold(d);
  if (steps > 0) release(ring.slot == 0 ? STAGES - 1 : ring.slot - 1);
}

// A box of 64 tokens: `value(j)` packs tokens 8 j + 2 (lane % 4) and the next of this consumer's neuron 8 warp + lane / 4. Rows
// are 64 bytes.
template <typename V> DEV void narrow_box(u32 box, V value) {
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    const int token = 8 * (j + (lane >> 3)) + (lane & 7);
    put4_turned(box + token * 64 + ((warp ^ ((token >> 1) & 3)) << 4), value(j), value(j + 1), value(j + 2), value(j + 3));
  }
}

template <int FORM>
DEV void store_tile(const float (&d)[128], int me, const Tile& t, const Maps& m, const Args& p, Outlet& outlet) {
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  // Rows of 16 slots that have pairs; those of the next tile may follow.
  const auto store = [&](const TensorMap* to, u32 box, int first, int column, int bytes) {
    for (int r = 0; r < 64 && first + r < t.rows; r += 16) store2(to, box + r * bytes, column, t.slot + first + r);
  };
#pragma unroll
  for (int n = 0; n < 256; n += 64) {
    if (n >= t.rows) break;
    if constexpr (FORM == UP) {
      const int column = t.column + 32 * me;
      const bool in = column + 8 * warp < width_of(t.group, p);
      narrow_box(outlet.open(), [&](int j) {
        const int token = n + 8 * j + 2 * (lane & 3), o = n / 2 + 4 * j;
        const float s0 = token < t.rows ? p.coefficients[t.slot + token] : 0.0f;
        const float s1 = token + 1 < t.rows ? p.coefficients[t.slot + token + 1] : 0.0f;
        const u32 a = pack(d[o], d[o + 1]), b = pack(d[o + 2], d[o + 3]);
        return in ? pack(s0 * act(lo_f32(a)) * lo_f32(b), s1 * act(hi_f32(a)) * hi_f32(b)) : 0u;
      });
      outlet.close([&](u32 box) { store(m.out, box, n, column, 64); });
      if (p.flags & 1)
#pragma unroll
        for (int which = 0; which < 2; which++) {
          narrow_box(outlet.open(), [&](int j) { return pack(d[n / 2 + 4 * j + 2 * which], d[n / 2 + 4 * j + 2 * which + 1]); });
          outlet.close([&](u32 box) { store(m.out + 1 + which, box, n, column, 64); });
        }
    } else {
      const u32 box = outlet.open();
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const int token = 8 * (j + (lane >> 4)) + (lane & 7), o = n / 2 + 4 * j;
        put4_turned(box + token * 128 + (((2 * warp + ((lane >> 3) & 1)) ^ (token & 7)) << 4), pack(d[o], d[o + 1]),
                    pack(d[o + 2], d[o + 3]), pack(d[o + 4], d[o + 5]), pack(d[o + 6], d[o + 7]));
      }
      outlet.close([&](u32 from) { store(m.out, from, n, t.column + 64 * me, 128); });
    }
  }
}

// A warpgroup that multiplies.
template <int FORM> DEV void multiply(const Maps& m, const Args& p, u32 stages, u32 full, u32 empty, u32 out) {
  const int me = __shfl_sync(0xffffffffu, (int)(threadIdx.x >> 7), 0) - 1, rank = CL > 1 ? rank_in_cluster() : 0;
  const int tiles = (int)*p.pairs * (2 / CL) * columns_of<FORM>(p), by = gridDim.x / CL;
  Outlet outlet{out + me * RING * BOX, 0, 1 + me, (threadIdx.x & 127) == 0};
  Ring ring{stages, full, empty, 0, 0};
  float d[128];
  if (LEAD > 0 && me > 0) meet(8, 256);
  bool told = LEAD == 0 || me > 0;
  for (int id = blockIdx.x / CL; id < tiles; id += by) {
    const Tile t = tile_of<FORM>(id, rank, p);
    if (CL == 1 && t.rows == 0) continue;
#define WIDTH(N) case N: sum_steps<FORM, N>(d, t.steps, ring, me, told); break;
    switch (width_for(t.rows)) {
      WIDTH(64) WIDTH(96) WIDTH(128) WIDTH(144) WIDTH(160) WIDTH(176) WIDTH(192) WIDTH(208) WIDTH(224) WIDTH(240)
      default: sum_steps<FORM, 256>(d, t.steps, ring, me, told);
    }
    if (!told) {
      announce(8, 256);
      told = true;
    }
    store_tile<FORM>(d, me, t, m, p, outlet);
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
      bar_init(empty + 8 * s, 4 * CONSUMERS * CL);
    }
    bar_init_fence();
  }
  if (CL > 1) cluster_meet();
  else __syncthreads();
  if (threadIdx.x < 128) {
    registers_down<56>();
    load<FORM>(m, p, stages, full, empty);
  } else {
    registers_up<224>();
    multiply<FORM>(m, p, stages, full, empty, out);
  }
  __syncwarp();
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
PRODUCT(up, UP)
PRODUCT(project, PROJECT)
PRODUCT(down, DOWN)
PRODUCT(input, INPUT)
