//! Products of the active pairs on Hopper, for pairs that lie in [`Slots`]: a warpgroup brings operands and two multiply, blocks
//! of a cluster share weights, and results leave by descriptors. Activations of pairs are `[slots, wide]`: [`Shape::slots`] and
//! [`Shape::wide`] of the slots' shape. Weights are `[intermediate, hidden]`, the core's neurons first.
//!
//! All variants of the kernels give the same bits. None has run on a device yet: [`super::experts`] has the kernels that models use
//! unless [`super::choice::ExpertKernels`] says otherwise.

use half::bf16;

use super::choice::Device;
use super::ffn;
use super::router::Routed;
use super::slots::{COLUMNS, Places, ROWS, Shape, Slots};
use super::{Define, Gpu, Grid, Matrix, Result, Source};
use crate::cuda::tensor_map::{SWIZZLE, TensorMap, Tiled};
use crate::swiglu::Activation;

pub(super) static SOURCE: Source =
    Source { name: "products", text: concat!(include_str!("products.cuh"), include_str!("products.cu")) };
/// The kernels with tokens on the other side.
pub(super) static TURNED: Source =
    Source { name: "turned", text: concat!(include_str!("products.cuh"), include_str!("turned.cu")) };

/// Bytes of shared memory beside the steps: boxes on their way out, barriers, and room to align the start.
const OTHER_BYTES: usize = 2 * 2 * 8192 + 256 + 1024;
/// Threads of a block.
const THREADS: u32 = 384;

/// How the kernels are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    /// Columns of a tile: 128, 192 or 256.
    pub columns: usize,
    /// Blocks that share weights: 1 or 2.
    pub cluster: usize,
    /// Steps that operands are brought ahead.
    pub stages: usize,
    /// Steps between the starts of the two warpgroups that multiply a tile.
    pub lead: usize,
    /// The warpgroups have a tile each, in turns. Tiles have 128 columns then.
    pub ping_pong: bool,
    /// Gathered rows are ordered before products by a fence. Without it they may only be used where runs have shown equal bits.
    pub fence: bool,
    /// Waits end after some seconds instead of hanging.
    pub trap: bool,
    /// Tiles have 128 rows of the weights and up to 256 tokens, for batches of which an expert has few. Slots behind a group's
    /// last pair, in whole groups of 16, are all that is written of them then.
    pub turned: bool,
}

impl Variant {
    /// The variant that is taken without measurements.
    pub const DEFAULT: Variant = Variant {
        columns: 256,
        cluster: 2,
        stages: 4,
        lead: 2,
        ping_pong: false,
        fence: true,
        trap: false,
        turned: false,
    };

    /// The variants that a device is tuned over, by name.
    pub const ALL: [(&'static str, Variant); 8] = [
        ("cooperative", Variant::DEFAULT),
        ("in-phase", Variant { lead: 0, ..Variant::DEFAULT }),
        ("no-fence", Variant { fence: false, ..Variant::DEFAULT }),
        ("no-cluster", Variant { cluster: 1, ..Variant::DEFAULT }),
        ("ping-pong", Variant { columns: 128, stages: 6, ping_pong: true, ..Variant::DEFAULT }),
        ("narrow", Variant { columns: 192, ..Variant::DEFAULT }),
        ("three-stages", Variant { stages: 3, ..Variant::DEFAULT }),
        ("turned", Variant { turned: true, ..Variant::DEFAULT }),
    ];

    /// Tells whether the product can be compiled so.
    pub fn takes(&self, form: Form) -> bool {
        match form {
            Form::Up => self.columns.is_multiple_of(128),
            Form::Weights => !self.turned,
            Form::Project | Form::Down | Form::Input => true,
        }
    }

    pub(super) fn defines(&self, activation: Activation) -> [Define; 8] {
        let Variant { columns, cluster, stages, lead, ping_pong, fence, trap, turned: _ } = *self;
        [
            ("BN", columns as i64),
            ("CL", cluster as i64),
            ("STAGES", stages as i64),
            ("LEAD", lead as i64),
            ("PINGPONG", i64::from(ping_pong)),
            ("FENCE", i64::from(fence)),
            ("TRAP", i64::from(trap)),
            ffn::define(activation),
        ]
    }

    pub(super) fn source(&self) -> &'static Source {
        if self.turned { &TURNED } else { &SOURCE }
    }

    pub(super) fn shared_bytes(&self) -> usize {
        self.stages * (ROWS + self.columns) * SWIZZLE + OTHER_BYTES
    }
}

/// The five products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Both projections and the activation.
    Up,
    /// The gradient of the activation's result.
    Project,
    /// The down projection.
    Down,
    /// The gradient of the input.
    Input,
    /// The gradients of the weights.
    Weights,
}

impl Form {
    /// All of them.
    pub const ALL: [Form; 5] = [Form::Up, Form::Project, Form::Down, Form::Input, Form::Weights];

    /// Returns the name of the kernel.
    pub(super) fn entry(self) -> &'static str {
        match self {
            Form::Up => "up",
            Form::Project => "project",
            Form::Down => "down",
            Form::Input => "input",
            Form::Weights => "weights",
        }
    }
}

/// Addresses of the operands of a product. Names are those of the ops.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operands {
    Up { c: u64, kept: Option<[u64; 2]>, x: u64, gate: u64, up: u64 },
    Project { g: u64, dy: u64, down: u64 },
    Down { parts: u64, c: u64, down: u64 },
    Input { parts: u64, da: u64, db: u64, gate: u64, up: u64 },
    Weights { grads: [u64; 3], values: [u64; 3], x: u64, dy: u64, set: bool },
}

impl Operands {
    pub(super) fn form(&self) -> Form {
        match self {
            Operands::Up { .. } => Form::Up,
            Operands::Project { .. } => Form::Project,
            Operands::Down { .. } => Form::Down,
            Operands::Input { .. } => Form::Input,
            Operands::Weights { .. } => Form::Weights,
        }
    }
}

/// The descriptors as the kernels take them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Maps {
    a: [TensorMap; 2],
    b: [TensorMap; 3],
    out: [TensorMap; 6],
}

#[cfg(test)]
impl Maps {
    /// Returns the descriptors in the order in which the kernels take them.
    pub(super) fn all(&self) -> Vec<TensorMap> {
        [&self.a[..], &self.b, &self.out].concat()
    }
}

/// The other parameters as the kernels take them.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Values {
    rows: [u64; 2],
    tokens: u64,
    coefficients: u64,
    starts: u64,
    sizes: u64,
    tiles: u64,
    pairs: u64,
    hidden: i32,
    width: i32,
    wide: i32,
    pieces: i32,
    groups: i32,
    core: i32,
    flags: i32,
    _end: i32,
}

#[cfg(test)]
impl Values {
    /// Returns the addresses of the rows that are gathered, and of the slots and their tiles.
    pub(super) fn addresses(&self) -> [u64; 8] {
        let Values { rows: [one, other], tokens, coefficients, starts, sizes, tiles, pairs, .. } = *self;
        [one, other, tokens, coefficients, starts, sizes, tiles, pairs]
    }
}

/// A launch of a product.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    pub(crate) source: &'static Source,
    pub(crate) entry: &'static str,
    pub(crate) defines: Vec<Define>,
    pub(crate) grid: Grid,
    pub(crate) maps: Maps,
    pub(crate) values: Values,
}

/// The matrices that descriptors describe: operands of both sides, and results.
struct Described {
    a: Vec<Tiled>,
    b: Vec<Tiled>,
    out: Vec<Tiled>,
    /// Matrices whose rows are gathered.
    rows: [u64; 2],
    flags: i32,
}

fn describe(shape: &Shape, variant: &Variant, operands: &Operands) -> Described {
    let Shape { hidden, width, num_experts: n, core, .. } = *shape;
    let (wide, slots, all) = (shape.wide(), shape.slots(), shape.intermediate());
    let of_slots = |base: u64, rows: usize| Tiled::rows(base, 2, [slots, wide], [COLUMNS, rows]);
    // Results of turned tiles end where those of the next start, at a multiple of 16.
    let (turned, out_rows) = (variant.turned, if variant.turned { 16 } else { 64 });
    let parts = |base: u64| vec![Tiled::rows(base, 2, [slots, hidden], [COLUMNS, out_rows])];
    // Blocks of 64 columns of rows that are terms.
    let terms = |base: u64| Tiled::rows(base, 2, [all, hidden], [COLUMNS, 64]);
    // A cluster's block brings so many rows of the weights; of turned tiles always half of them.
    let shared = if turned { 64 } else { variant.columns / variant.cluster };
    // Both projections lie in turns, so that a warpgroup has results of half as many neurons as it has rows.
    let up_columns = if turned { COLUMNS / 2 } else { COLUMNS };
    let side = if turned { COLUMNS } else { ROWS };
    match *operands {
        // One descriptor reaches from one projection to the other.
        Operands::Up { gate, up, .. } if up <= gate => {
            panic!("cuda products::up: the gate projection at {gate:#x} is not before the other at {up:#x}")
        }
        Operands::Up { c, kept, x, gate, up } => Described {
            a: vec![],
            // Rows of the gate and of the up projection in turns of eight.
            b: vec![Tiled {
                base: gate,
                size: 2,
                sizes: vec![hidden, 8, 2, all / 8],
                strides: vec![2 * hidden, (up - gate) as usize, 16 * hidden],
                tile: vec![COLUMNS, 8, 2, shared / 16],
            }],
            out: [c]
                .into_iter()
                .chain(kept.into_iter().flatten())
                .map(|base| Tiled::rows(base, 2, [slots, wide], [up_columns, out_rows]))
                .collect(),
            rows: [x, x],
            flags: i32::from(kept.is_some()),
        },
        Operands::Project { g, dy, down } => Described {
            a: vec![],
            b: vec![Tiled::rows(down, 2, [all, hidden], [COLUMNS, shared])],
            out: vec![of_slots(g, out_rows)],
            rows: [dy, dy],
            flags: 0,
        },
        Operands::Down { parts: to, c, down } => Described {
            a: vec![of_slots(c, side)],
            b: vec![terms(down)],
            out: parts(to),
            rows: [0; 2],
            flags: 0,
        },
        Operands::Input { parts: to, da, db, gate, up } => Described {
            a: [da, db].map(|base| of_slots(base, side)).to_vec(),
            b: [gate, up].map(terms).to_vec(),
            out: parts(to),
            rows: [0; 2],
            flags: 0,
        },
        Operands::Weights { grads, values, x, dy, set } => {
            // Boxes must not reach into the rows of another expert, so each is a matrix of its own.
            let grad = |first: usize, rows: usize, count: usize| {
                move |base: u64| Tiled {
                    base: base + (4 * first * hidden) as u64,
                    size: 4,
                    sizes: vec![hidden, rows, count],
                    strides: vec![4 * hidden, 4 * rows * hidden],
                    tile: vec![32, 64, 1],
                }
            };
            let of_experts = grads.map(grad(core, width, n));
            let of_core = (core > 0).then(|| grads.map(grad(0, core, 1)));
            Described {
                a: vec![],
                b: values.map(|base| of_slots(base, 64)).to_vec(),
                out: of_experts.into_iter().chain(of_core.into_iter().flatten()).collect(),
                rows: [x, dy],
                flags: if set { 2 } else { 0 },
            }
        }
    }
}

/// Makes the launch of a product by so many blocks at once. `encode` makes descriptors.
pub(crate) fn launch(
    (shape, slots): (&Shape, &Places),
    (variant, activation): (&Variant, Activation),
    operands: &Operands,
    blocks: usize,
    encode: impl Fn(&Tiled) -> Result<TensorMap>,
) -> Result<Launch> {
    let form = operands.form();
    assert!(variant.takes(form) && shape.fits(), "cuda products: {form:?} for {shape:?}, {variant:?}");
    let Described { a, b, out, rows, flags } = describe(shape, variant, operands);
    let mut maps = Maps { a: [TensorMap::NONE; 2], b: [TensorMap::NONE; 3], out: [TensorMap::NONE; 6] };
    for (to, from) in [(&mut maps.a[..], a), (&mut maps.b[..], b), (&mut maps.out[..], out)] {
        for (to, from) in to.iter_mut().zip(from) {
            *to = encode(&from)?;
        }
    }
    let sizes = [shape.hidden, shape.width, shape.wide(), shape.pieces(), shape.groups(), shape.core];
    let [hidden, width, wide, pieces, groups, core] = sizes.map(|size| size as i32);
    let values = Values {
        rows,
        tokens: slots.tokens,
        coefficients: slots.coefficients,
        starts: slots.starts,
        sizes: slots.sizes,
        tiles: if variant.turned { slots.wide_tiles } else { slots.tiles },
        pairs: if variant.turned { slots.wide_pairs } else { slots.pairs },
        hidden,
        width,
        wide,
        pieces,
        groups,
        core,
        flags,
        _end: 0,
    };
    // Only the first of them have an activation; the others are compiled once.
    let activation = if form == Form::Up { activation } else { Activation::Silu };
    let blocks = (blocks / variant.cluster).max(1) * variant.cluster;
    let grid = Grid { shared: variant.shared_bytes() as u32, ..Grid::row(blocks, THREADS) };
    Ok(Launch {
        source: variant.source(),
        entry: form.entry(),
        defines: variant.defines(activation).to_vec(),
        grid,
        maps,
        values,
    })
}

/// Tells whether a device has what these kernels are made of.
pub fn fits(gpu: &Gpu, variant: &Variant) -> bool {
    Device::of(gpu).takes(variant)
}

fn run(slots: &Slots, gpu: &Gpu, how: (&Variant, Activation), operands: &Operands) -> Result<()> {
    let shape = slots.shape();
    assert!(fits(gpu, how.0), "cuda products: {:?} on {gpu:?}", how.0);
    let blocks = gpu.multiprocessors() as usize;
    let launch = launch((&shape, &slots.places()), how, operands, blocks, |tiled| tiled.encode(gpu))?;
    // SAFETY: the callers checked that the operands have the sizes of the shape, which the descriptors have as well; slots, tiles
    // and tokens were made by the kernels of `slots` for this shape.
    unsafe { launch.queue(gpu) }
}

impl Launch {
    /// Queues the launch.
    ///
    /// # Safety
    /// The operands have the sizes of the shape that the launch was made for, and slots, tiles and tokens were made by the
    /// kernels of `slots` for it.
    pub(crate) unsafe fn queue(&self, gpu: &Gpu) -> Result<()> {
        let Launch { source, entry, defines, grid, maps, values } = self;
        // SAFETY: the parameters are those of the kernels in products.cu and turned.cu; the caller promises the rest.
        unsafe { source.launch_structs(gpu, entry, defines, *grid, (maps, values)) }
    }
}

/// Checks the numbers of values: of slots, of rows of tokens, of weights, and of parts.
fn check(op: &str, slots: &Slots, lens: [&[usize]; 4]) {
    let shape = slots.shape();
    let Shape { tokens, hidden, .. } = shape;
    let want = [
        shape.slots() * shape.wide(),
        tokens * hidden,
        shape.intermediate() * hidden,
        shape.slots() * hidden,
    ];
    let fit = lens.iter().zip(want).all(|(lens, want)| lens.iter().all(|&len| len == want));
    assert!(fit, "cuda products::{op}: {lens:?} values of slots, rows, weights and parts for {shape:?}");
}

/// Sets `c` to `coefficient act(x gate^T) (x up^T)`, and `projections` to the two products.
#[derive(Debug)]
pub struct Up<'a> {
    /// `[slots, wide]`
    pub c: &'a mut Matrix<bf16>,
    /// `[slots, wide]` each.
    pub projections: Option<[&'a mut Matrix<bf16>; 2]>,
    /// `[T, hidden]`
    pub x: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`, in memory before `up`, a multiple of 16 bytes apart.
    pub gate: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub up: &'a Matrix<bf16>,
    /// The active pairs.
    pub slots: &'a Slots,
    /// The activation of the gate projection.
    pub activation: Activation,
    /// The variant.
    pub variant: &'a Variant,
}

impl Up<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit, the gate projection is not before the other in memory, or [`fits`] or [`Variant::takes`] is false.
    pub fn run(self) -> Result<()> {
        let Up { c, projections, x, gate, up, slots, activation, variant } = self;
        let mut of_slots = vec![c.len()];
        of_slots.extend(projections.iter().flatten().map(|matrix| matrix.len()));
        check("up", slots, [&of_slots, &[x.len()], &[gate.len(), up.len()], &[]]);
        let kept = projections.map(|both| both.map(|matrix| matrix.ptr()));
        let operands = Operands::Up { c: c.ptr(), kept, x: x.ptr(), gate: gate.ptr(), up: up.ptr() };
        run(slots, x.gpu(), (variant, activation), &operands)
    }
}

/// Sets `g` to `dy down^T`.
#[derive(Debug)]
pub struct Project<'a> {
    /// `[slots, wide]`
    pub g: &'a mut Matrix<bf16>,
    /// `[T, hidden]`
    pub dy: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub down: &'a Matrix<bf16>,
    /// The active pairs.
    pub slots: &'a Slots,
    /// The variant.
    pub variant: &'a Variant,
}

impl Project<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// Panics as [`Up::run`] does.
    pub fn run(self) -> Result<()> {
        let Project { g, dy, down, slots, variant } = self;
        check("project", slots, [&[g.len()], &[dy.len()], &[down.len()], &[]]);
        let operands = Operands::Project { g: g.ptr(), dy: dy.ptr(), down: down.ptr() };
        run(slots, dy.gpu(), (variant, Activation::Silu), &operands)
    }
}

/// Sets `parts` to `c down`, rounded to bf16; [`Sum`] adds those of a token up.
#[derive(Debug)]
pub struct Down<'a> {
    /// `[slots, hidden]`
    pub parts: &'a mut Matrix<bf16>,
    /// `[slots, wide]`
    pub c: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub down: &'a Matrix<bf16>,
    /// The active pairs.
    pub slots: &'a Slots,
    /// The variant.
    pub variant: &'a Variant,
}

impl Down<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// Panics as [`Up::run`] does.
    pub fn run(self) -> Result<()> {
        let Down { parts, c, down, slots, variant } = self;
        check("down", slots, [&[c.len()], &[], &[down.len()], &[parts.len()]]);
        let operands = Operands::Down { parts: parts.ptr(), c: c.ptr(), down: down.ptr() };
        run(slots, c.gpu(), (variant, Activation::Silu), &operands)
    }
}

/// Sets `parts` to `da gate + db up`, rounded to bf16; [`Sum`] adds those of a token up.
#[derive(Debug)]
pub struct BackwardInput<'a> {
    /// `[slots, hidden]`
    pub parts: &'a mut Matrix<bf16>,
    /// `[slots, wide]`
    pub da: &'a Matrix<bf16>,
    /// `[slots, wide]`
    pub db: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub gate: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub up: &'a Matrix<bf16>,
    /// The active pairs.
    pub slots: &'a Slots,
    /// The variant.
    pub variant: &'a Variant,
}

impl BackwardInput<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// Panics as [`Up::run`] does.
    pub fn run(self) -> Result<()> {
        let BackwardInput { parts, da, db, gate, up, slots, variant } = self;
        check("input", slots, [&[da.len(), db.len()], &[], &[gate.len(), up.len()], &[parts.len()]]);
        let [parts, da, db, gate, up] = [parts.ptr(), da.ptr(), db.ptr(), gate.ptr(), up.ptr()];
        run(
            slots,
            slots.tokens.gpu(),
            (variant, Activation::Silu),
            &Operands::Input { parts, da, db, gate, up },
        )
    }
}

/// Adds to the gradients of the three projections, or sets them: `da^T x`, `db^T x` and `c^T dy`.
#[derive(Debug)]
pub struct BackwardWeights<'a> {
    /// The gradients of the gate, up and down projection, `[intermediate, hidden]` each.
    pub grads: [&'a mut Matrix<f32>; 3],
    /// `da`, `db` and `c`, `[slots, wide]` each.
    pub values: [&'a Matrix<bf16>; 3],
    /// `[T, hidden]`
    pub x: &'a Matrix<bf16>,
    /// `[T, hidden]`
    pub dy: &'a Matrix<bf16>,
    /// Sets the gradients instead of adding to them.
    pub set: bool,
    /// The active pairs.
    pub slots: &'a Slots,
    /// The variant.
    pub variant: &'a Variant,
}

impl BackwardWeights<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// Panics as [`Up::run`] does.
    pub fn run(self) -> Result<()> {
        let BackwardWeights { grads, values, x, dy, set, slots, variant } = self;
        let (of_slots, weights) = (values.map(Matrix::len), grads.each_ref().map(|matrix| matrix.len()));
        check("weights", slots, [&of_slots, &[x.len(), dy.len()], &weights, &[]]);
        let (grads, values) = (grads.map(|matrix| matrix.ptr()), values.map(Matrix::ptr));
        let operands = Operands::Weights { grads, values, x: x.ptr(), dy: dy.ptr(), set };
        run(slots, x.gpu(), (variant, Activation::Silu), &operands)
    }
}

/// Sets `y` to the sums of the parts of tokens, in the order of the groups.
#[derive(Debug)]
pub struct Sum<'a> {
    /// `[T, hidden]`
    pub y: &'a mut Matrix<f32>,
    /// `[slots, hidden]`
    pub parts: &'a Matrix<bf16>,
    /// The active pairs.
    pub slots: &'a Slots,
    /// Their routing.
    pub routed: &'a Routed,
}

impl Sum<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Sum { y, parts, slots, routed } = self;
        check("sum", slots, [&[], &[y.len()], &[], &[parts.len()]]);
        let shape = slots.shape();
        assert_eq!(routed.tokens(), shape.tokens, "cuda products::sum: tokens of the routing");
        let call = ffn::sum_slots(&shape, y.ptr(), parts.ptr(), slots.of_tokens.ptr(), routed.active.ptr());
        // SAFETY: a block per token of buffers whose lengths were checked above; rows are groups of 8 values.
        unsafe { call.queue(y.gpu()) }
    }
}
