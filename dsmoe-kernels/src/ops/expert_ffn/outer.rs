//! The gradients of the experts' weights: sums of outer products over the tokens of an expert.
//!
//! ```text
//! dWg_i += da_i^T x,   dWu_i += db_i^T x,   dWd_i += (coefficient c_i)^T dy        over the tokens of expert i
//! ```
//! x and dy are stored once for all experts, in strips of 32 columns. An expert picks the rows of its tokens out of a strip
//! while the strip is in a near cache, and adds to its rows of the gradient.

use std::ops::Range;

use super::packed::{NEURONS, tile_depth};
use super::plan::Plan;
use crate::buf::{Buf, SharedRows};
use crate::isa::Isa;
use crate::matmul::picked::{most_rows, with_rows};
use crate::matmul::{PANEL, Precision, for_tasks, storage, tasks_for, tiles};
use crate::simd::{Product, ProductKernel};

/// Most neurons whose sums are in registers at a time.
const ROWS: usize = 8;
/// Steps of a sum before it is added to the gradient: longer sums have larger rounding errors.
const DEPTH: usize = 256;

/// The memory of [`Gradients`], but for the neurons'.
#[derive(Debug, Default)]
pub(super) struct Words {
    strips: [Buf; 2],
    steps: Vec<usize>,
}

/// Adds to the gradients of gate, up and down, `[num_experts * width, hidden]`.
pub(super) struct Gradients<'a> {
    /// Of gate, up and down.
    pub(super) grads: [&'a mut [f32]; 3],
    /// da, db and scaled activations: rows of `width` values, one for each pair.
    pub(super) neurons: [&'a [f32]; 3],
    pub(super) x: &'a [f32],
    pub(super) dy: &'a [f32],
}

impl Gradients<'_> {
    /// Adds to the gradients. The neurons are stored in buffers that serve others before and after: those of one of the three
    /// matrices in the first, those of two in the second.
    pub(super) fn add(self, plan: &Plan<'_>, memory: &mut Words, [one, two]: [&mut Buf; 2]) {
        let Gradients { grads, neurons, x, dy } = self;
        let (isa, dims) = (plan.isa, plan.dims);
        let (hidden, width) = (dims.hidden, dims.expert_width());
        let Words { strips, steps } = memory;
        let depth = if storage(isa, plan.precision) == Precision::Bf16 { 2 } else { 1 };
        steps.clear();
        steps.push(0);
        for expert in 0..dims.num_experts {
            steps.push(steps[expert] + plan.pairs_of(expert).len().div_ceil(depth));
        }
        let [strips_of_x, strips_of_dy] = strips;
        set_strips(strips_of_x, x, plan);
        set_strips(strips_of_dy, dy, plan);
        let row = tile_depth(width);
        let len = steps[dims.num_experts] * row;
        one.resize(len);
        two.resize(2 * len);
        let (second, third) = two.split_at_mut(len);
        let mut words = [&mut one[..], second, third];
        for (words, values) in words.iter_mut().zip(neurons) {
            let (out, experts) = (SharedRows::new(words, row), dims.num_experts);
            let tasks = tasks_for(values.len() * NEURONS).min(experts);
            for_tasks(tasks, |task| {
                let experts = task * experts / tasks..(task + 1) * experts / tasks;
                isa.run_product(SetSteps { out, values, experts, steps, plan });
            });
        }
        let panels = hidden.div_ceil(PANEL);
        let grads = grads.map(|grads| SharedRows::new(grads, hidden));
        let words = words.each_ref().map(|words| &words[..]);
        let tasks = if tasks_for(3 * plan.num_pairs() * width * hidden) > 1 { panels } else { 1 };
        for_tasks(tasks, |task| {
            for panel in task * panels / tasks..(task + 1) * panels / tasks {
                let strips = [&*strips_of_x, strips_of_x, strips_of_dy];
                for ((grad, neurons), strips) in grads.into_iter().zip(words).zip(strips) {
                    let len = strips.len() / panels;
                    let strip = &strips[panel * len..][..len];
                    isa.run_product(AddPanel { grad, neurons, strip, panel, steps, plan });
                }
            }
        });
    }
}

/// Returns the words of a row of a strip.
fn strip_row(isa: Isa, precision: Precision) -> usize {
    if storage(isa, precision) == Precision::Bf16 { PANEL / 2 } else { PANEL }
}

/// Sets `strips` to the columns of `x`, rounded: a strip of all tokens after the other, the last one with columns of zeros.
fn set_strips(strips: &mut Buf, x: &[f32], plan: &Plan<'_>) {
    let (tokens, hidden) = (plan.dims.tokens, plan.dims.hidden);
    let (panels, row) = (hidden.div_ceil(PANEL), strip_row(plan.isa, plan.precision));
    strips.resize(panels * tokens * row);
    let (out, tasks) = (SharedRows::new(strips, row), tasks_for(tokens * hidden).min(tokens));
    for_tasks(tasks, |task| {
        let rows = task * tokens / tasks..(task + 1) * tokens / tasks;
        plan.isa.run_product(SetStrips { out, x, rows, plan });
    });
}

struct SetStrips<'a> {
    out: SharedRows<'a>,
    x: &'a [f32],
    rows: Range<usize>,
    plan: &'a Plan<'a>,
}

impl ProductKernel for SetStrips<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let SetStrips { out, x, rows, plan } = self;
        let Plan { dims, precision, .. } = *plan;
        let pairs = S::DOTS && precision == Precision::Bf16;
        for token in rows {
            for (panel, x) in x[token * dims.hidden..][..dims.hidden].chunks(PANEL).enumerate() {
                // SAFETY: tasks have different tokens.
                let out =
                    unsafe { out.row(panel * dims.tokens + token, 0, if pairs { PANEL / 2 } else { PANEL }) };
                for first in (0..PANEL).step_by(S::LANES) {
                    let values = s.load_tail(&x[first.min(x.len())..]);
                    if pairs {
                        s.store_bf16(bytemuck::cast_slice_mut(&mut out[first / 2..]), values);
                    } else {
                        let rounded = precision == Precision::Bf16;
                        s.store(&mut out[first..], if rounded { s.round_bf16(values) } else { values });
                    }
                }
            }
        }
    }
}

/// Stores the neurons of some experts' pairs step by step: a value, or those of two tokens as a pair.
struct SetSteps<'a> {
    out: SharedRows<'a>,
    values: &'a [f32],
    experts: Range<usize>,
    steps: &'a [usize],
    plan: &'a Plan<'a>,
}

impl ProductKernel for SetSteps<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let SetSteps { out, values, experts, steps, plan } = self;
        let (precision, width) = (plan.precision, plan.dims.expert_width());
        let pairs = S::DOTS && precision == Precision::Bf16;
        for expert in experts {
            let of_expert = plan.pairs_of(expert);
            let values = &values[of_expert.start * width..of_expert.end * width];
            for (step, rows) in (steps[expert]..).zip(values.chunks(if pairs { 2 * width } else { width })) {
                // SAFETY: tasks have different experts.
                let out = unsafe { out.row(step, 0, tile_depth(width)) };
                let (first, second) = rows.split_at(width);
                for (i, out) in out.chunks_exact_mut(S::LANES).enumerate() {
                    let at = i * S::LANES;
                    let value = s.load_tail(&first[at.min(width)..]);
                    if pairs {
                        let odd = s.load_tail(&second[at.min(second.len())..]);
                        s.store_pairs(bytemuck::cast_slice_mut(out), value, odd);
                    } else {
                        let rounded = precision == Precision::Bf16;
                        s.store(out, if rounded { s.round_bf16(value) } else { value });
                    }
                }
            }
        }
    }
}

/// Adds the outer products of all experts to a panel of columns of one gradient.
struct AddPanel<'a> {
    grad: SharedRows<'a>,
    neurons: &'a [f32],
    strip: &'a [f32],
    panel: usize,
    steps: &'a [usize],
    plan: &'a Plan<'a>,
}

impl ProductKernel for AddPanel<'_> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        match self.plan.precision {
            Precision::Bf16 if const { S::DOTS } => self.add::<S, TwoTokens>(s),
            _ => self.add::<S, OneToken>(s),
        }
    }
}

impl AddPanel<'_> {
    #[inline(always)]
    fn add<S: Product, M: Step>(&self, s: S) {
        let AddPanel { grad, neurons, strip, panel, steps, plan } = *self;
        let dims = plan.dims;
        let (width, first) = (dims.expert_width(), panel * PANEL);
        let (row, columns) = (tile_depth(width), PANEL.min(dims.hidden - first));
        for expert in 0..dims.num_experts {
            let pairs = plan.pairs_of(expert);
            let Some(tokens) = plan.tokens(pairs) else { continue };
            let neurons = &neurons[steps[expert] * row..steps[expert + 1] * row];
            for (neurons, tokens) in neurons.chunks(DEPTH * row).zip(tokens.chunks(DEPTH * M::TOKENS)) {
                for tile in tiles(width, ROWS.min(most_rows::<S>())) {
                    let mut sums = [[0.0; PANEL]; ROWS];
                    with_rows!(tile.len(), S, R => s.isolated(Outer::<M, R> {
                        sums: &mut sums,
                        neurons: &neurons[tile.start..],
                        row,
                        tokens,
                        strip,
                        step: std::marker::PhantomData,
                    }));
                    for (neuron, sums) in tile.zip(&sums) {
                        // SAFETY: tasks have different panels.
                        let grad = unsafe { grad.row(expert * width + neuron, first, columns) };
                        for (grad, sums) in grad.chunks_mut(S::LANES).zip(sums.chunks_exact(S::LANES)) {
                            s.store_tail(grad, s.add(s.load_tail(grad), s.load(sums)));
                        }
                    }
                }
            }
        }
    }
}

/// The product of one step.
trait Step: Copy + Send + Sync {
    /// Tokens of a step.
    const TOKENS: usize;
    /// Returns columns `first..` of the rows of a step, two registers.
    fn columns<S: Product>(s: S, strip: &[f32], tokens: &[u32], first: usize) -> [S::V; 2];
    /// Returns `acc` plus the product of a neuron with columns.
    fn add<S: Product>(s: S, acc: S::V, neuron: f32, columns: S::V) -> S::V;
}

#[derive(Clone, Copy)]
struct OneToken;

#[derive(Clone, Copy)]
struct TwoTokens;

#[inline(always)]
fn row_of(strip: &[f32], token: u32, len: usize) -> &[f32] {
    &strip[token as usize * len..][..len]
}

impl Step for OneToken {
    const TOKENS: usize = 1;
    #[inline(always)]
    fn columns<S: Product>(s: S, strip: &[f32], tokens: &[u32], first: usize) -> [S::V; 2] {
        let row = &row_of(strip, tokens[0], PANEL)[first..];
        [s.load(row), s.load(&row[S::LANES..])]
    }
    #[inline(always)]
    fn add<S: Product>(s: S, acc: S::V, neuron: f32, columns: S::V) -> S::V {
        s.fma(s.splat(neuron), columns, acc)
    }
}

impl Step for TwoTokens {
    const TOKENS: usize = 2;
    #[inline(always)]
    fn columns<S: Product>(s: S, strip: &[f32], tokens: &[u32], first: usize) -> [S::V; 2] {
        // Where there is no second token, the neurons' second values are 0.
        let even = row_of(strip, tokens[0], PANEL / 2);
        let odd = if tokens.len() > 1 { row_of(strip, tokens[1], PANEL / 2) } else { even };
        s.pairs_of_rows(&even[first / 2..], &odd[first / 2..])
    }
    #[inline(always)]
    fn add<S: Product>(s: S, acc: S::V, neuron: f32, columns: S::V) -> S::V {
        s.dot_pairs(acc, neuron.to_bits(), columns)
    }
}

/// Sets the first R rows of `sums` to the outer products of R neurons with the rows of some tokens.
struct Outer<'a, M, const R: usize> {
    sums: &'a mut [[f32; PANEL]],
    /// Rows of `row` words, of which the first R are used.
    neurons: &'a [f32],
    row: usize,
    tokens: &'a [u32],
    strip: &'a [f32],
    step: std::marker::PhantomData<M>,
}

impl<M: Step, const R: usize> ProductKernel for Outer<'_, M, R> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let Outer { sums, neurons, row, tokens, strip, .. } = self;
        for first in (0..PANEL).step_by(2 * S::LANES) {
            let mut acc = [[s.splat(0.0); 2]; R];
            for (neurons, tokens) in neurons.chunks(row).zip(tokens.chunks(M::TOKENS)) {
                let columns = M::columns(s, strip, tokens, first);
                let neurons = &neurons[..R];
                for r in 0..R {
                    for v in 0..2 {
                        acc[r][v] = M::add(s, acc[r][v], neurons[r], columns[v]);
                    }
                }
            }
            for (sums, acc) in sums.iter_mut().zip(acc) {
                for v in 0..2 {
                    s.store(&mut sums[first + v * S::LANES..], acc[v]);
                }
            }
        }
    }
}
