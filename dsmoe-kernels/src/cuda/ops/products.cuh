// The common parts of the products of pairs in slots: parameters, groups, activations and boxes on their way out.
// `BK` terms are a step.
#define BK 64
#define CONSUMERS 2
#define BOX 8192   // 64 rows of 128 bytes
#define RING 2     // boxes that a consumer stores from
#define OUT_BYTES (CONSUMERS * RING * BOX)
#define BAR_BYTES 256

enum Form { UP, PROJECT, DOWN, INPUT, WEIGHTS };

struct Half {
  int slot;
  u32 what;   // rows | shared << 9 | group << 10
};
struct Args {
  const bf16* rows[2];         // gathered: x or dy; of WEIGHTS x and dy
  const u32* tokens;           // of slots
  const float* coefficients;   // of slots
  const u32* starts;           // [groups + 1]
  const u32* sizes;            // [groups]
  const Half* halves;
  const u32* pairs;
  int hidden, w, wide, pieces, groups, core;
  int flags;                   // 1: UP keeps a and b. 2: WEIGHTS sets
};
struct Maps { TensorMap a[2], b[3], out[6]; };

DEV int ceil_div(int a, int b) { return (a + b - 1) / b; }
// The first row of a group's weights.
DEV int first_row(int group, const Args& p) { return group < p.pieces ? group * p.wide : p.core + (group - p.pieces) * p.w; }
// The neurons of a group.
DEV int width_of(int group, const Args& p) { return group < p.pieces ? min(p.wide, p.core - group * p.wide) : p.w; }

// Stores boxes of a consumer from a ring.
struct Outlet {
  u32 base;
  int next, id;
  bool leader;
  // Returns a box that may be written.
  DEV u32 open() {
    if (leader) store_wait_read<RING - 1>();
    meet(id, 128);
    return base + next * BOX;
  }
  template <typename S> DEV void close(S store) {
    fence_async();
    meet(id, 128);
    if (leader) {
      store(base + next * BOX);
      store_commit();
    }
    next = next + 1 == RING ? 0 : next + 1;
  }
};

// silu, or with GELU the tanh form of GELU.
#if GELU
DEV float act(float a) { return a * (1.0f / (1.0f + expf(-a * (1.5957692f + 0.07135482f * a * a)))); }
#else
DEV float act(float a) { return a * (1.0f / (1.0f + expf(-a))); }
#endif
