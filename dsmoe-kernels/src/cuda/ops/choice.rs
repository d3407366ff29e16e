//! The choice of kernels for the products of an FFN's active pairs: those of [`super::slots`] and [`super::products`], those of
//! [`super::experts`], or dense products of all pairs.
//!
//! [`choose`] is a function of the device, the sizes and the configured share of active pairs. It never sees a measured share or
//! a clock, so that two runs take the same kernels and have the same bits. [`ExpertKernels::Auto`] compares times that a model
//! of a device predicts, in microseconds. A product of pairs in slots runs in rounds of a tile per multiprocessor:
//!
//! ```text
//! rounds  = ceil(tiles / multiprocessors)
//! compute = rounds (steps s + 0.45)             steps of 64 terms; s = 0.76 for a tile of 128 x 256, and by its area for others
//! product = max(compute, bytes / 2.9e6) + 6     bytes of the weights or their gradients; the launch with its first and last tile
//! ```
//!
//! The tiles of an expert are those of its expected rows, the share of the tokens, and half a tile more, as its last one is half
//! full in the mean. A dense product takes
//! `tokens neurons terms / (128 256 64 multiprocessors)` steps of 0.70, and no less than its bytes. An op between products takes
//! its bytes / 2.9e6 + 6, and sorting the pairs 5.5 + 0.00055 per token.
//!
//! Steps of 0.70 are the best rate of cuBLASLt that was measured on an H100, 788 TFLOP/s; with them, times of dense products and
//! of a dense FFN are within 10 % of those measured. Steps of 0.76, or 730 TFLOP/s, are a prediction: no kernel for slots has
//! run on a device yet. Other devices of Hopper have other clocks and other memory. A comparison needs the ratio of both times
//! alone.

use super::Gpu;
use super::products::{Form, Variant};
use super::slots::{ROWS, Shape};
pub use crate::cuda::expert_kernels::ExpertKernels;

/// The microseconds of a step of 64 terms of a tile of 128 x 256.
const STEP: f64 = 0.76;
/// The same of dense products.
const DENSE_STEP: f64 = 0.70;
/// The values of such a tile.
const TILE: f64 = 128.0 * 256.0;
/// The terms of a step.
const TERMS: usize = 64;
/// The most tokens of a turned tile.
const MOST_TOKENS: usize = 256;
/// The microseconds at the end of a tile that the products of the next one do not hide.
const TILE_END: f64 = 0.45;
/// The microseconds of a launch with its first and its last tile.
const LAUNCH: f64 = 6.0;
/// The bytes that memory delivers in a microsecond.
const BYTES: f64 = 2.9e6;
/// The microseconds of sorting pairs, and of each token.
const SORT: [f64; 2] = [5.5, 0.000_55];

/// The properties of a device that the choice depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Compute capability, such as (9, 0).
    pub capability: (u32, u32),
    /// Blocks that run at once when each fills a multiprocessor.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block may ask for.
    pub shared_memory: u32,
}

impl Device {
    /// Returns the properties of a device.
    pub fn of(gpu: &Gpu) -> Device {
        Device {
            capability: gpu.capability(),
            multiprocessors: gpu.multiprocessors(),
            shared_memory: gpu.shared_memory(),
        }
    }

    /// Tells whether the device has what a variant of the products of pairs in slots is made of: the instructions of Hopper,
    /// and its shared memory.
    pub fn takes(&self, variant: &Variant) -> bool {
        self.capability == (9, 0) && self.shared_memory as usize >= variant.shared_bytes()
    }
}

/// The passes of an FFN that are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passes {
    /// The forward pass, which keeps nothing.
    Inference,
    /// Both passes.
    Training {
        /// Inactive pairs take part in the gradients of coefficients, so that the three products a, b and g are dense.
        all_pairs: bool,
    },
}

/// The variants of the five products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variants {
    /// That of both projections and the activation.
    pub up: Variant,
    /// That of the gradient of the activation's result.
    pub project: Variant,
    /// That of the down projection.
    pub down: Variant,
    /// That of the gradient of the input.
    pub input: Variant,
    /// That of the gradients of the weights.
    pub weights: Variant,
}

impl Variants {
    /// The variants that the products may have: tiles of 128 rows of the pairs, and of up to 256 of them on the other side. The
    /// model does not distinguish the others from the first.
    pub const CANDIDATES: [Variant; 2] = [Variant::DEFAULT, Variant { turned: true, ..Variant::DEFAULT }];

    /// Returns the variant of a product.
    pub fn of(&self, form: Form) -> &Variant {
        match form {
            Form::Up => &self.up,
            Form::Project => &self.project,
            Form::Down => &self.down,
            Form::Input => &self.input,
            Form::Weights => &self.weights,
        }
    }

    /// Returns those that the model predicts to be fastest on a device, at a share of active pairs.
    pub(super) fn fastest(device: &Device, shape: &Shape, share: f64) -> Variants {
        let of = |form: Form| {
            let taken = Variants::CANDIDATES.into_iter().filter(|variant| variant.takes(form));
            let timed = taken.map(|variant| (product(device, shape, share, (form, &variant)), variant));
            // Of two that take as long it is the first.
            timed
                .reduce(|one, other| if other.0 < one.0 { other } else { one })
                .map_or(Variant::DEFAULT, |(_, variant)| variant)
        };
        let [up, project, down, input, weights] = Form::ALL.map(of);
        Variants { up, project, down, input, weights }
    }
}

/// The kernels of an FFN's products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Dense products of all pairs; coefficients of inactive ones are 0.
    Dense,
    /// The kernels of [`super::experts`], where they take the sizes.
    Lists,
    /// The kernels of [`super::products`] in these variants.
    Slots(Variants),
}

/// Chooses the kernels of an FFN of this shape. `share` is the configured share of active pairs among those of experts that have a
/// gate. Numbers of tokens up to the same power of two have the same choice.
///
/// # Panics
/// The share is not between 0 and 1.
pub fn choose(kernels: ExpertKernels, device: &Device, shape: &Shape, passes: Passes, share: f64) -> Choice {
    assert!((0.0..=1.0).contains(&share), "cuda choice: a share of {share}");
    let taken = shape.fits() && Variants::CANDIDATES.iter().all(|variant| device.takes(variant));
    if kernels == ExpertKernels::Lists || !taken {
        return Choice::Lists;
    }
    let shape = Shape { tokens: shape.tokens.next_power_of_two(), ..*shape };
    let variants = Variants::fastest(device, &shape, share);
    let [dense, slots] = times(device, &shape, passes, share, &variants);
    match kernels {
        ExpertKernels::Auto if dense < slots => Choice::Dense,
        _ => Choice::Slots(variants),
    }
}

/// Returns the microseconds of the passes with dense products and with those of pairs in slots.
pub(super) fn times(
    device: &Device,
    shape: &Shape,
    passes: Passes,
    share: f64,
    variants: &Variants,
) -> [f64; 2] {
    let Shape { tokens, hidden, num_experts: n, .. } = *shape;
    let (all, wide) = (tokens * shape.intermediate(), shape.wide());
    let rows: usize = rows(shape, share).iter().map(|(groups, rows)| groups * rows).sum();
    let one = dense_product(device, shape);
    // Values of pairs are bf16, those of tokens f32.
    let of_all = |count: usize| between(2 * count * all);
    let of_slots = |count: usize| between(2 * count * rows * wide);
    let sum = between(2 * rows * hidden + 4 * tokens * hidden);
    let in_slots = |form: Form| product(device, shape, share, (form, variants.of(form)));
    let all_pairs = passes == Passes::Training { all_pairs: true };
    let mut dense = 3.0 * one + of_all(3);
    let activated = if all_pairs { 2.0 * one + of_slots(3) } else { in_slots(Form::Up) };
    let mut slots = SORT[0] + SORT[1] * tokens as f64 + activated + in_slots(Form::Down) + sum;
    if passes != Passes::Inference {
        // cuBLASLt does not hide that it reads and writes the gradients that it adds to.
        dense += 6.0 * one + of_all(6) + memory(weight_bytes(shape, Form::Weights));
        let projected =
            if all_pairs { one + of_all(3) } else { in_slots(Form::Project) + between(5 * tokens * n) };
        slots += projected + of_slots(6) + in_slots(Form::Weights) + in_slots(Form::Input) + sum;
    }
    [dense, slots]
}

/// Returns the numbers of groups with their expected rows: pieces of the core, and experts.
fn rows(shape: &Shape, share: f64) -> [(usize, usize); 2] {
    let expected = (share * shape.tokens as f64).ceil() as usize;
    [(shape.pieces(), shape.tokens), (shape.num_experts, expected.min(shape.tokens))]
}

/// Returns the microseconds of a product of pairs in slots.
pub(super) fn product(device: &Device, shape: &Shape, share: f64, (form, variant): (Form, &Variant)) -> f64 {
    let Shape { hidden, .. } = *shape;
    let wide = shape.wide();
    let steps = match form {
        Form::Up | Form::Project => hidden.div_ceil(TERMS),
        Form::Down => wide.div_ceil(TERMS),
        Form::Input => 2 * wide.div_ceil(TERMS),
        // By the rows of a group.
        Form::Weights => 0,
    };
    // Neurons of both projections lie in turns.
    let per_tile = if variant.turned { ROWS } else { variant.columns };
    let columns = match form {
        Form::Up => wide.div_ceil(per_tile / 2),
        Form::Project | Form::Weights => wide.div_ceil(per_tile),
        Form::Down | Form::Input => hidden.div_ceil(per_tile),
    };
    // Tiles, steps of one, and its area.
    let of_group = |rows: usize| match (form, variant.turned) {
        (Form::Weights, _) => {
            let tiles = 3 * hidden.div_ceil(ROWS * variant.cluster) * variant.cluster * columns;
            (tiles as f64, rows.div_ceil(TERMS), (ROWS * variant.columns) as f64)
        }
        (_, false) => {
            let tiles = tiles(rows, ROWS, shape.tokens);
            (tiles * columns as f64, steps, (ROWS * variant.columns) as f64)
        }
        (_, true) => {
            let tiles = tiles(rows, MOST_TOKENS, shape.tokens);
            // Tokens of a tile are whole groups of 16; half of one is empty in the mean.
            let tokens = (rows as f64 / tiles.max(1.0) + 8.0).clamp(64.0, MOST_TOKENS as f64);
            (tiles * columns as f64, steps, ROWS as f64 * tokens)
        }
    };
    let groups = rows(shape, share).map(|(groups, rows)| (groups as f64, of_group(rows)));
    let tiles: f64 = groups.iter().map(|(groups, (tiles, ..))| groups * tiles).sum();
    let work = groups.iter().map(|&(groups, (tiles, steps, area))| {
        groups * tiles * (steps as f64 * STEP * area / TILE + TILE_END)
    });
    let rounds = (tiles / f64::from(device.multiprocessors.max(1))).ceil();
    // Each round takes as long as a tile does in the mean.
    let compute = if tiles == 0.0 { 0.0 } else { rounds * work.sum::<f64>() / tiles };
    compute.max(memory(weight_bytes(shape, form))) + LAUNCH
}

/// Returns the mean number of tiles of so many rows that a group with `rows` expected pairs has: its last tile is half full in
/// the mean, unless all tokens are in the group.
fn tiles(rows: usize, of_tile: usize, tokens: usize) -> f64 {
    let most = tokens.div_ceil(of_tile) as f64;
    if rows == 0 { 0.0 } else { (rows as f64 / of_tile as f64 + 0.5).min(most) }
}

/// Returns the bytes of the weights that a product reads, or of the gradients that it adds to.
pub(super) fn weight_bytes(shape: &Shape, form: Form) -> usize {
    let weights = shape.intermediate() * shape.hidden;
    match form {
        Form::Up | Form::Input => 4 * weights,
        Form::Project | Form::Down => 2 * weights,
        Form::Weights => 3 * 8 * weights,
    }
}

/// Returns the microseconds of one dense product.
pub(super) fn dense_product(device: &Device, shape: &Shape) -> f64 {
    let sizes = [shape.tokens, shape.intermediate(), shape.hidden].map(|size| size as f64);
    let at_once = TILE * TERMS as f64 * f64::from(device.multiprocessors.max(1));
    let compute = sizes.iter().product::<f64>() / at_once * DENSE_STEP;
    compute.max(memory(weight_bytes(shape, Form::Down))) + LAUNCH
}

/// Returns the microseconds that memory takes for so many bytes.
pub(super) fn memory(bytes: usize) -> f64 {
    bytes as f64 / BYTES
}

/// Returns the microseconds of an op between products that reads and writes so many bytes.
fn between(bytes: usize) -> f64 {
    memory(bytes) + LAUNCH
}
