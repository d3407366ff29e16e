//! How the work is cut: active pairs grouped by expert, neurons of an expert in blocks.

use std::ops::Range;

use super::{Dims, Routes};

/// The active pairs, grouped by expert.
#[derive(Clone, Copy)]
pub(super) enum Pairs<'a> {
    Routed(&'a Routes<'a>),
    /// Every token at the only expert, coefficient 1.
    Dense,
}

/// Blocks of neurons a whole FFN is cut into, about.
const NEURON_BLOCKS: usize = 32;
/// Fewest and most neurons of a block: what a matrix product needs to be efficient, what the cache holds.
const BLOCK_NEURONS: (usize, usize) = (64, 512);

/// Active pairs and their cut into tasks: one task is one block of neurons of one expert with all its tokens.
///
/// A *packed* array has a row of `expert_width` values per active pair, stored task after task, each task as
/// `[pairs, neurons]`: what a task computes is contiguous.
#[derive(Clone, Copy)]
pub(super) struct Plan<'a> {
    pub(super) pairs: Pairs<'a>,
    pub(super) dims: Dims,
    block: usize,
}

/// One block of neurons of one expert.
pub(super) struct Task {
    /// Expert-major indices of the expert's pairs.
    pub(super) pairs: Range<usize>,
    /// Rows of the weight matrices.
    pub(super) neurons: Range<usize>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(pairs: Pairs<'a>, dims: Dims) -> Plan<'a> {
        let block = dims.intermediate.div_ceil(NEURON_BLOCKS).next_multiple_of(16);
        Plan::with_block(pairs, dims, block.clamp(BLOCK_NEURONS.0, BLOCK_NEURONS.1))
    }

    /// Blocks of about `block` neurons, as even as multiples of 16 allow.
    pub(super) fn with_block(pairs: Pairs<'a>, dims: Dims, block: usize) -> Plan<'a> {
        let width = dims.expert_width();
        let block = width.div_ceil(width.div_ceil(block)).next_multiple_of(16);
        Plan { pairs, dims, block }
    }

    pub(super) fn blocks_per_expert(&self) -> usize {
        self.dims.expert_width().div_ceil(self.block)
    }

    pub(super) fn tasks(&self) -> usize {
        self.dims.num_experts * self.blocks_per_expert()
    }

    /// Expert-major index of the first pair of `expert`.
    pub(super) fn offset(&self, expert: usize) -> usize {
        match self.pairs {
            Pairs::Routed(routes) => routes.offsets[expert],
            Pairs::Dense => expert * self.dims.tokens,
        }
    }

    pub(super) fn num_pairs(&self) -> usize {
        self.offset(self.dims.num_experts)
    }

    /// Most pairs any expert has.
    pub(super) fn largest_expert(&self) -> usize {
        (0..self.dims.num_experts).map(|i| self.offset(i + 1) - self.offset(i)).max().unwrap_or(0)
    }

    pub(super) fn token(&self, pair: usize) -> usize {
        match self.pairs {
            Pairs::Routed(routes) => routes.tokens[pair] as usize,
            Pairs::Dense => pair,
        }
    }

    pub(super) fn coefficient(&self, pair: usize) -> f32 {
        match self.pairs {
            Pairs::Routed(routes) => routes.coefficients[pair],
            Pairs::Dense => 1.0,
        }
    }

    /// Expert-major indices of the pairs of `token`, experts ascending.
    pub(super) fn slots(&self, token: usize) -> impl Iterator<Item = usize> + use<'a> {
        let (slots, dense) = match self.pairs {
            Pairs::Routed(r) => (&r.slots[r.token_offsets[token]..r.token_offsets[token + 1]], None),
            Pairs::Dense => (&[][..], Some(token)),
        };
        slots.iter().map(|&slot| slot as usize).chain(dense)
    }

    /// The expert of an expert-major pair index.
    pub(super) fn expert(&self, pair: usize) -> usize {
        match self.pairs {
            Pairs::Routed(routes) => routes.offsets.partition_point(|&offset| offset <= pair) - 1,
            Pairs::Dense => 0,
        }
    }

    pub(super) fn task(&self, task: usize) -> Task {
        let (expert, block) = (task / self.blocks_per_expert(), task % self.blocks_per_expert());
        let width = self.dims.expert_width();
        let first = expert * width;
        Task {
            pairs: self.offset(expert)..self.offset(expert + 1),
            neurons: first + block * self.block..first + width.min((block + 1) * self.block),
        }
    }

    /// The tasks of one expert.
    pub(super) fn tasks_of(&self, expert: usize) -> Range<usize> {
        expert * self.blocks_per_expert()..(expert + 1) * self.blocks_per_expert()
    }

    /// Where `task` starts in a packed array; its end is the start of the next.
    pub(super) fn packed_start(&self, task: usize) -> usize {
        let (expert, block) = (task / self.blocks_per_expert(), task % self.blocks_per_expert());
        let first = self.offset(expert) * self.dims.expert_width();
        if block == 0 {
            first
        } else {
            first + block * self.block * (self.offset(expert + 1) - self.offset(expert))
        }
    }

    /// Where the neurons of `task` start in a weight matrix.
    pub(super) fn weights_start(&self, task: usize) -> usize {
        if task == self.tasks() {
            self.dims.intermediate * self.dims.hidden
        } else {
            self.task(task).neurons.start * self.dims.hidden
        }
    }
}

impl Task {
    /// The rows of a weight matrix that belong to the task.
    pub(super) fn weights<'w>(&self, w: &'w [f32], hidden: usize) -> &'w [f32] {
        &w[self.neurons.start * hidden..self.neurons.end * hidden]
    }
}

/// How a `[.., intermediate]` activation is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// `[tokens, intermediate]`, every pair.
    TokenMajor,
    /// A packed array, active pairs alone.
    Packed,
}

impl Layout {
    pub(super) fn of(plan: &Plan<'_>) -> Layout {
        if plan.dims.all_pairs { Layout::TokenMajor } else { Layout::Packed }
    }

    pub(super) fn len(self, plan: &Plan<'_>) -> usize {
        match self {
            Layout::TokenMajor => plan.dims.tokens * plan.dims.intermediate,
            Layout::Packed => plan.num_pairs() * plan.dims.expert_width(),
        }
    }

    /// The neurons of task number `number` in row `pair` of an activation.
    pub(super) fn row(self, plan: &Plan<'_>, number: usize, task: &Task, pair: usize) -> Range<usize> {
        let start = match self {
            Layout::TokenMajor => plan.token(pair) * plan.dims.intermediate + task.neurons.start,
            Layout::Packed => plan.packed_start(number) + (pair - task.pairs.start) * task.neurons.len(),
        };
        start..start + task.neurons.len()
    }
}

/// Runs `f(task, parts)` for every task on the current thread pool, `parts` being `start(task)..start(task + 1)`
/// of each array. The arrays start where the first task does and end where the last one does.
pub(super) fn for_parts<const N: usize>(
    tasks: Range<usize>,
    start: &(impl Fn(usize) -> usize + Sync),
    arrays: [&mut [f32]; N],
    f: &(impl Fn(usize, [&mut [f32]; N]) + Sync),
) {
    if tasks.len() <= 1 {
        if let Some(task) = tasks.last() {
            f(task, arrays);
        }
        return;
    }
    let middle = tasks.start + tasks.len() / 2;
    let len = start(middle) - start(tasks.start);
    let mut right = [(); N].map(|()| <&mut [f32]>::default());
    let mut rights = right.iter_mut();
    let left = arrays.map(|array| {
        let (left, right) = array.split_at_mut(len);
        *rights.next().expect("as many halves as arrays") = right;
        left
    });
    rayon::join(
        || for_parts(tasks.start..middle, start, left, f),
        || for_parts(middle..tasks.end, start, right, f),
    );
}
