//! Routing in three launches, which sort the active pairs into slots for [`super::products`]: logits, gates and counts; where
//! the pairs of an expert start, and their tiles; the slot of every pair.
//!
//! The active pairs of an expert lie in a row, in the order of the tokens. They start at a multiple of [`ROWS`] slots. The core
//! that every token runs is cut into pieces as wide as an expert, which have all tokens and come before the experts.

use super::router::{Gates, Normed, Routed, start_call};
use super::{Arg, Gpu, Grid, Matrix, Result};
use crate::cuda::GpuBuf;
use crate::cuda::kernel::Call;

/// Rows of a tile, and a divisor of where groups start.
pub const ROWS: usize = 128;
/// Columns that rows of slots are whole groups of.
pub const COLUMNS: usize = 64;
/// Tokens that are counted together.
pub(super) const TOKENS: usize = 8;
/// Tokens from which on warps read a router's weights once for [`TOKENS`] of them.
const MANY: usize = 512;

/// Sizes of an FFN whose active pairs lie in slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Tokens.
    pub tokens: usize,
    /// Width of the input.
    pub hidden: usize,
    /// Neurons of an expert.
    pub width: usize,
    /// Experts that have a gate.
    pub num_experts: usize,
    /// Neurons that every token runs.
    pub core: usize,
}

impl Shape {
    /// Returns the width of a row of slots: that of an expert, and columns of zeros.
    pub fn wide(&self) -> usize {
        self.width.next_multiple_of(COLUMNS)
    }

    /// Returns the number of pieces of the core.
    pub fn pieces(&self) -> usize {
        self.core.div_ceil(self.wide().max(1))
    }

    /// Returns the number of groups: pieces of the core, and experts.
    pub fn groups(&self) -> usize {
        self.pieces() + self.num_experts
    }

    /// Returns the number of neurons in all.
    pub fn intermediate(&self) -> usize {
        self.core + self.num_experts * self.width
    }

    /// Returns the number of slots that any routing fits.
    pub fn slots(&self) -> usize {
        self.groups() * self.tokens.next_multiple_of(ROWS)
    }

    /// Returns the number of tiles that any routing fits.
    pub fn tiles(&self) -> usize {
        (self.groups() * self.tokens.div_ceil(ROWS)).next_multiple_of(2)
    }

    /// Returns the number of groups of [`TOKENS`] tokens.
    fn blocks(&self) -> usize {
        self.tokens.div_ceil(TOKENS)
    }

    /// Returns the numbers of values of a [`Slots`] in the order of its fields, but for those of one value.
    fn lens(&self) -> [usize; 10] {
        [
            self.slots(),
            self.slots(),
            self.tokens * self.groups(),
            self.groups() + 1,
            self.groups(),
            2 * self.tiles(),
            2 * self.tiles(),
            self.num_experts * self.blocks(),
            2 * self.groups(),
            2 * self.blocks(),
        ]
    }

    /// Returns the bytes of a [`Slots`].
    pub fn bytes(&self) -> usize {
        let [lists @ .., partials] = self.lens();
        // Two numbers of pairs of tiles are values of their own.
        4 * (lists.iter().sum::<usize>() + 2) + 8 * partials
    }

    /// Tells whether the kernels take such sizes: rows of weights are whole groups of 8 values, and places fit 32 bits.
    pub fn fits(&self) -> bool {
        let Shape { tokens, hidden, width, num_experts, core } = *self;
        let whole = [hidden, width, core].iter().all(|size| size.is_multiple_of(8));
        let small = tokens * hidden < 1 << 32 && self.slots() < 1 << 31 && self.groups() < 1 << 20;
        whole && small && tokens > 0 && hidden > 0 && width > 0 && num_experts > 0
    }
}

/// The pairs of a routing in slots, and the tiles of their products.
#[derive(Debug)]
pub struct Slots {
    /// Tokens of slots.
    pub tokens: GpuBuf<u32>,
    /// Factors of slots: 1 in the core.
    pub coefficients: GpuBuf<f32>,
    /// The slots of every token in the order of the groups, `[T, groups]`: of each as many as it has groups.
    pub of_tokens: GpuBuf<u32>,
    /// Where groups start, `[groups + 1]`.
    pub starts: GpuBuf<u32>,
    /// The pairs of groups, `[groups]`.
    pub sizes: GpuBuf<u32>,
    /// Tiles of at most [`ROWS`] rows, two values each: the first slot, and rows, whether it shares its group with the one that
    /// it is paired with, and group.
    pub tiles: GpuBuf<u32>,
    /// The number of pairs of tiles.
    pub pairs: GpuBuf<u32>,
    /// Tiles of up to 256 rows, as [`Slots::tiles`].
    pub wide_tiles: GpuBuf<u32>,
    /// The number of pairs of wide tiles.
    pub wide_pairs: GpuBuf<u32>,
    counts: GpuBuf<u32>,
    order: GpuBuf<u32>,
    partials: GpuBuf<f64>,
    shape: Shape,
}

/// Addresses of a [`Slots`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    pub(crate) tokens: u64,
    pub(crate) coefficients: u64,
    pub(crate) of_tokens: u64,
    pub(crate) starts: u64,
    pub(crate) sizes: u64,
    pub(crate) tiles: u64,
    pub(crate) pairs: u64,
    pub(crate) wide_tiles: u64,
    pub(crate) wide_pairs: u64,
    pub(crate) counts: u64,
    pub(crate) order: u64,
    pub(crate) partials: u64,
}

impl Slots {
    /// Allocates room for any routing.
    ///
    /// # Errors
    /// The device's memory does not suffice.
    ///
    /// # Panics
    /// [`Shape::fits`] is false.
    pub fn with_room(gpu: &Gpu, shape: Shape) -> Result<Slots> {
        Slots::for_all(gpu, &[shape])
    }

    /// Allocates room for any routing of each of these sizes; they are the first until [`Slots::resize`].
    ///
    /// # Errors
    /// The device's memory does not suffice.
    ///
    /// # Panics
    /// There are none, or [`Shape::fits`] is false.
    pub fn for_all(gpu: &Gpu, shapes: &[Shape]) -> Result<Slots> {
        assert!(!shapes.is_empty() && shapes.iter().all(Shape::fits), "cuda slots: {shapes:?}");
        let shape = shapes[0];
        let mut lens = shape.lens();
        for other in shapes {
            lens.iter_mut().zip(other.lens()).for_each(|(len, other)| *len = other.max(*len));
        }
        let [tokens, coefficients, of_tokens, starts, sizes, tiles, wide_tiles, counts, order, partials] =
            lens;
        Ok(Slots {
            tokens: gpu.zeros(tokens)?,
            coefficients: gpu.zeros(coefficients)?,
            of_tokens: gpu.zeros(of_tokens)?,
            starts: gpu.zeros(starts)?,
            sizes: gpu.zeros(sizes)?,
            tiles: gpu.zeros(tiles)?,
            pairs: gpu.zeros(1)?,
            wide_tiles: gpu.zeros(wide_tiles)?,
            wide_pairs: gpu.zeros(1)?,
            counts: gpu.zeros(counts)?,
            order: gpu.zeros(order)?,
            partials: gpu.zeros(partials)?,
            shape,
        })
    }

    /// Takes sizes for which there is room: those of a smaller batch, or of another FFN. With other sizes than before, the pairs
    /// are those of no batch until the next [`Route`] or [`Sort`].
    ///
    /// # Panics
    /// There is no room, or [`Shape::fits`] is false.
    pub fn resize(&mut self, shape: Shape) {
        assert!(
            shape.fits() && self.has_room(&shape),
            "cuda slots: no room for {shape:?} in that for {:?}",
            self.shape
        );
        self.shape = shape;
    }

    /// Tells whether there is room for any routing of these sizes.
    pub fn has_room(&self, shape: &Shape) -> bool {
        let Slots { tokens, coefficients, of_tokens, starts, sizes, tiles, wide_tiles, .. } = self;
        let Slots { counts, order, partials, .. } = self;
        let lists = [tokens.len(), coefficients.len(), of_tokens.len(), starts.len(), sizes.len()];
        let others = [tiles.len(), wide_tiles.len(), counts.len(), order.len(), partials.len()];
        lists.iter().chain(&others).zip(shape.lens()).all(|(&room, len)| len <= room)
    }

    /// Returns the sizes.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    pub(crate) fn places(&self) -> Places {
        Places {
            tokens: self.tokens.ptr(),
            coefficients: self.coefficients.ptr(),
            of_tokens: self.of_tokens.ptr(),
            starts: self.starts.ptr(),
            sizes: self.sizes.ptr(),
            tiles: self.tiles.ptr(),
            pairs: self.pairs.ptr(),
            wide_tiles: self.wide_tiles.ptr(),
            wide_pairs: self.wide_pairs.ptr(),
            counts: self.counts.ptr(),
            order: self.order.ptr(),
            partials: self.partials.ptr(),
        }
    }
}

/// Statistics of a routing, which are added to.
#[derive(Debug)]
pub struct Stats<'a> {
    /// The tokens of every expert, and of every number of active experts: `[2 n + 1]`.
    pub counts: &'a mut Matrix<u64>,
    /// The sums of the gates of active and of all experts: `[2]`.
    pub sums: &'a mut Matrix<f64>,
    /// The active experts of every token: `[T]`.
    pub of_tokens: Option<&'a mut Matrix<u32>>,
}

/// Addresses of values of pairs `[T, n]` and tokens `[T]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pairs {
    pub(crate) gates: u64,
    pub(crate) coefficients: u64,
    pub(crate) mask: u64,
    pub(crate) active: u64,
}

/// Addresses of a router's input, weight and bias, as [`Normed`] has them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Router {
    pub(crate) x: u64,
    pub(crate) rstd: u64,
    pub(crate) norm: u64,
    pub(crate) weight: u64,
    pub(crate) bias: u64,
    pub(crate) offset: f32,
}

/// Addresses of statistics: counts, sums and those of tokens. 0 is none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counted {
    pub(crate) counts: u64,
    pub(crate) sums: u64,
    pub(crate) of_tokens: u64,
}

/// The first launch: logits, gates and counts.
pub(crate) fn assign(
    shape: &Shape,
    to: &Places,
    pairs: &Pairs,
    (z, router): (u64, &Router),
    (thresholds, gates): (u64, &Gates),
    counted: &Counted,
) -> Call {
    let Shape { tokens, hidden, num_experts: n, .. } = *shape;
    let partials = if counted.sums == 0 { 0 } else { to.partials };
    let histogram = if counted.counts == 0 { 0 } else { counted.counts + 8 * n as u64 };
    let routed = [pairs.gates, pairs.coefficients, pairs.mask, pairs.active, to.counts, partials];
    let inputs = [z, router.x, router.rstd, router.norm, router.weight, router.bias];
    let flags = [gates.binary, gates.rescale, gates.force_argmax].map(Arg::from);
    let mut args: Vec<Arg> = routed.into_iter().chain(inputs).map(Arg::Ptr).collect();
    args.extend([tokens, n, hidden].map(Arg::Size));
    args.push(Arg::Ptr(thresholds));
    args.extend(flags);
    args.extend([histogram, counted.of_tokens].map(Arg::Ptr));
    let (entry, threads) = if tokens < MANY { ("assign_few", 1024) } else { ("assign_many", 256) };
    start_call(entry, Grid::row(shape.blocks(), threads), args, Some(router.offset))
}

/// The first launch for a mask of the host.
pub(crate) fn tally(shape: &Shape, to: &Places, mask: u64) -> Call {
    let Shape { tokens, num_experts: n, .. } = *shape;
    let args = [Arg::Ptr(to.counts), Arg::Ptr(mask), tokens.into(), n.into(), shape.blocks().into()];
    start_call("tally", Grid::row((n * shape.blocks()).div_ceil(256), 256), args.to_vec(), None)
}

/// The second launch: places of groups, and tiles.
pub(crate) fn arrange(shape: &Shape, to: &Places, counted: &Counted) -> Call {
    let partials = if counted.sums == 0 { 0 } else { to.partials };
    let tiles = [to.tiles, to.pairs, to.wide_tiles, to.wide_pairs];
    let lists = [&[to.counts, to.starts, to.sizes][..], &tiles, &[to.order]].concat();
    let lists: Vec<Arg> = lists.into_iter().map(Arg::Ptr).collect();
    let sizes = [shape.blocks(), shape.num_experts, shape.pieces(), shape.tokens].map(Arg::Size);
    let stats = [partials, counted.counts, counted.sums].map(Arg::Ptr);
    start_call("arrange", Grid::row(1, 1024), [&lists[..], &sizes, &stats].concat(), None)
}

/// The third launch: the slots of pairs.
pub(crate) fn place(shape: &Shape, to: &Places, pairs: &Pairs) -> Call {
    let lists = [to.tokens, to.coefficients, to.of_tokens, to.starts, to.counts].map(Arg::Ptr);
    let routed = [pairs.mask, pairs.coefficients].map(Arg::Ptr);
    let sizes = [shape.blocks(), shape.num_experts, shape.pieces(), shape.tokens].map(Arg::Size);
    start_call(
        "place",
        Grid::row(shape.tokens.div_ceil(128), 128),
        [&lists[..], &routed, &sizes].concat(),
        None,
    )
}

/// A router whose logits are computed.
#[derive(Clone, Copy, Debug)]
pub struct FromRouter<'a> {
    /// The input.
    pub normed: Normed<'a>,
    /// `[n, hidden]`
    pub weight: &'a Matrix<f32>,
    /// `[n]`
    pub bias: Option<&'a Matrix<f32>>,
}

/// Routes tokens by a router's logits, and sorts their pairs into slots.
#[derive(Debug)]
pub struct Route<'a> {
    /// The pairs in slots; their shape is that of the batch.
    pub slots: &'a mut Slots,
    /// The routing.
    pub routed: &'a mut Routed,
    /// Logits, `[T, n]`: set from the router, or given without one.
    pub z: &'a mut Matrix<f32>,
    /// The router.
    pub router: Option<FromRouter<'a>>,
    /// As those of [`super::router::Route`].
    pub thresholds: &'a Matrix<f32>,
    /// The settings.
    pub gates: &'a Gates,
    /// Statistics to add to.
    pub stats: Option<Stats<'a>>,
}

impl Route<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size is not that of the slots.
    pub fn run(self) -> Result<()> {
        let Route { slots, routed, z, router, thresholds, gates, stats } = self;
        let shape = slots.shape;
        let Shape { tokens, hidden, num_experts: n, .. } = shape;
        routed.resize(tokens, n);
        let fits = z.len() == tokens * n && thresholds.len() == 2 && gates.num_experts == n;
        assert!(fits, "cuda slots::route: {} logits, {gates:?} for {shape:?}", z.len());
        let source = router.map_or_else(Router::default, |FromRouter { normed, weight: w, bias }| {
            let Normed { x, rstd, weight, offset } = normed;
            let lens = [x.len(), rstd.len(), weight.len(), w.len(), bias.map_or(n, Matrix::len)];
            assert_eq!(
                lens,
                [tokens * hidden, tokens, hidden, n * hidden, n],
                "cuda slots::route: {shape:?}"
            );
            let bias = bias.map_or(0, Matrix::ptr);
            Router { x: x.ptr(), rstd: rstd.ptr(), norm: weight.ptr(), weight: w.ptr(), bias, offset }
        });
        let counted = stats.map_or_else(Counted::default, |Stats { counts, sums, of_tokens }| {
            let lens =
                [counts.len(), sums.len(), of_tokens.as_ref().map_or(tokens, |all| all.len().min(tokens))];
            assert_eq!(lens, [2 * n + 1, 2, tokens], "cuda slots::route: counts, sums, of_tokens");
            let of_tokens = of_tokens.map_or(0, |all| all.ptr());
            Counted { counts: counts.ptr(), sums: sums.ptr(), of_tokens }
        });
        let (to, pairs) = (slots.places(), routed.places());
        let assign = assign(&shape, &to, &pairs, (z.ptr(), &source), (thresholds.ptr(), gates), &counted);
        let calls = [assign, arrange(&shape, &to, &counted), place(&shape, &to, &pairs)];
        // SAFETY: the buffers have the values that the shape says: those of the slots by `with_room`, the others as checked
        // above. Masks that the first launch makes are 0 or 1, so that counts, slots and tiles fit their room.
        calls.iter().try_for_each(|call| unsafe { call.queue(z.gpu()) })
    }
}

/// Sorts the pairs of a routing into slots that was set before, as by [`Routed::set`].
#[derive(Debug)]
pub struct Sort<'a> {
    /// The pairs in slots; their shape is that of the batch.
    pub slots: &'a mut Slots,
    /// The routing.
    pub routed: &'a Routed,
}

impl Sort<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// The routing has other sizes than the slots.
    pub fn run(self) -> Result<()> {
        let Sort { slots, routed } = self;
        let shape = slots.shape;
        let (tokens, n) = (routed.tokens(), routed.num_experts());
        assert_eq!([tokens, n], [shape.tokens, shape.num_experts], "cuda slots::sort: {shape:?}");
        let (to, pairs) = (slots.places(), routed.places());
        let calls = [
            tally(&shape, &to, pairs.mask),
            arrange(&shape, &to, &Counted::default()),
            place(&shape, &to, &pairs),
        ];
        // SAFETY: as for `Route`; masks of the host are 0 or 1 too.
        calls.iter().try_for_each(|call| unsafe { call.queue(routed.mask.gpu()) })
    }
}
