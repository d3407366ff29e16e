//! Forward over packed weights, for any number of tokens.

use super::combine::{self, Blocks};
use super::dims::{Dims, is_empty};
use super::kernel::{Gate, Tiles};
use super::open;
use super::packed::{NEURONS, PackedExperts, PackedWeights, tile_depth};
use super::plan::{Pairs, Plan, check_pairs};
use super::scratch::Scratch;
use crate::isa::Isa;
use crate::linear::add_bias;
use crate::matmul::{Block, Left, Mat, Precision, Source, for_tasks, tasks_for};

/// Sets y to the sum of the active experts' outputs of x. x and c are rounded to the weights' precision.
#[derive(Debug)]
pub struct ForwardPacked<'a> {
    /// `[tokens, hidden]`, set.
    pub y: &'a mut [f32],
    /// `[tokens, hidden]`
    pub x: &'a [f32],
    /// The weights.
    pub weights: &'a PackedWeights,
    /// The active pairs.
    pub pairs: Pairs<'a>,
    /// The sizes.
    pub dims: Dims,
    /// Work space.
    pub scratch: &'a mut Scratch,
}

run_on_current_tier!(ForwardPacked);

impl ForwardPacked<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`, or the weights are of another shape.
    pub fn run_on(self, isa: Isa) {
        let ForwardPacked { y, x, weights, pairs, dims, scratch } = self;
        let packed = Dims {
            tokens: dims.tokens,
            all_pairs: dims.all_pairs,
            activation: dims.activation,
            ..weights.dims()
        };
        assert!(
            x.len() == dims.tokens * dims.hidden && y.len() == x.len() && packed == dims,
            "expert_ffn::ForwardPacked: input {}, output {} values, weights of {packed:?} for {dims:?}",
            x.len(),
            y.len()
        );
        check_pairs("ForwardPacked", pairs, dims);
        if is_empty(dims) {
            y.fill(0.0);
        } else {
            let plan = Plan { pairs, dims, isa, precision: weights.precision(), accumulate: false };
            match pairs {
                Pairs::Dense => dense(y, x, &weights.parts()[0], &plan, &mut scratch.blocks),
                Pairs::Routed(_) => open::forward(y, x, weights, &plan, &mut scratch.words),
            }
        }
        add_bias("expert_ffn::ForwardPacked", isa, y, weights.down_bias(), dims.hidden);
    }
}

/// Sets y; see [`ForwardPacked`].
///
/// First computes `c = act(a) * b`, in the tiles that the second product reads: a task is a block of tokens and some of the
/// neurons. Then runs the combine.
fn dense(y: &mut [f32], x: &[f32], experts: &PackedExperts, plan: &Plan<'_>, blocks: &mut Blocks) {
    let (tokens, hidden) = (plan.dims.tokens, plan.dims.hidden);
    let depth = tile_depth(plan.dims.expert_width());
    let work = plan.num_pairs() * plan.dims.expert_width() * hidden;
    let rounded = plan.precision == Precision::Bf16;
    let Blocks { tiles, cut } = &mut *blocks;
    tiles.resize(plan.num_pairs() * depth);
    cut.set(plan, depth / NEURONS, hidden, tasks_for(2 * work));
    // SAFETY: the cut's tasks differ in blocks or in panels, which are neurons.
    let out = unsafe { Tiles::new(tiles, depth, plan.precision) };
    for_tasks(cut.len(), |number| {
        let task = cut.task(number, plan);
        let start = plan.offset(task.expert);
        let listed = plan.tokens(plan.pairs_of(task.expert));
        let rows = task.pairs.start - start..task.pairs.end - start;
        let gate = Gate {
            tiles: out,
            first: task.pairs.start,
            first_row: rows.start,
            coefficient: |row| plan.coefficient(start + row),
            activation: plan.dims.activation,
            biases: experts.gate_up_biases(task.expert),
        };
        Block {
            left: Left::Source(Source::picked_rows(Mat::new(x, tokens, hidden), listed), rounded),
            ks: 0..hidden,
            panels: experts.gate_up(task.expert),
            panel_ks: 0..hidden,
            range: task.panels,
            sink: &gate,
            rows,
        }
        .run(plan.isa);
    });
    combine::packed(y, experts, plan, depth, blocks);
}
