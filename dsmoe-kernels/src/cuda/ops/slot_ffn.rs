//! The passes of an FFN over its active pairs in [`Slots`], by the products of [`super::products`]. The core that every token runs is
//! part of the same products.
//!
//! ```text
//! forward   a | b = x [gate | up]^T,  c = coefficient act(a) b            [slots, wide]
//!           y = sum over a token's slots of c W                           [T, hidden]
//! backward  g = dy W^T,  da, db, c and dcoefficients from a, b and g      [slots, wide]
//!           dgate (+)= da^T x,  dup (+)= db^T x,  dW (+)= c^T dy          [intermediate, hidden]
//!           dx = sum over a token's slots of da gate + db up              [T, hidden]
//! ```
//!
//! With all pairs, a, b and g are dense products `[T, intermediate]` of cuBLASLt, which the gradients of coefficients of inactive
//! pairs are made of; the ops after them read those of active pairs there. Parts of sums are bf16, sums f32 in the order of the
//! groups.
//!
//! Slots are sorted before by [`super::slots::Route`] or [`super::slots::Sort`]. [`super::choice`] says where these passes are
//! faster than others, and chooses the variants.

use std::ops::Range;

use half::bf16;

use super::choice::{Device, Passes, Variants};
use super::products::{self, Operands};
use super::router::Routed;
use super::slots::{Places, Shape, Slots};
use super::{Gpu, Matrix, Result, ffn, linear};
use crate::cuda::View;
use crate::cuda::kernel::Call;
use crate::cuda::tensor_map::{TensorMap, Tiled};
use crate::swiglu::Activation;

impl Passes {
    /// Returns the number of values of each of a and b that the forward pass keeps for the backward pass.
    pub fn kept(self, shape: &Shape) -> usize {
        match self {
            Passes::Inference => 0,
            Passes::Training { all_pairs: false } => shape.slots() * shape.wide(),
            Passes::Training { all_pairs: true } => shape.tokens * shape.intermediate(),
        }
    }

    /// Returns the number of values of the memory that the passes work in. Layers may share it.
    pub fn workspace(self, shape: &Shape) -> usize {
        Layout::of(self, shape).g.end
    }
}

/// Where the values of a pass are in its memory. The backward pass computes c and parts of its own in the place of those of the
/// forward pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) c: Range<usize>,
    pub(super) parts: Range<usize>,
    pub(super) da: Range<usize>,
    pub(super) db: Range<usize>,
    pub(super) g: Range<usize>,
}

impl Layout {
    pub(super) fn of(passes: Passes, shape: &Shape) -> Layout {
        let values = shape.slots() * shape.wide();
        let of_backward = if passes == Passes::Inference { 0 } else { values };
        let mut end = 0;
        // Slots come in groups of 128, so that all of these start at a multiple of 128 bytes, as descriptors need.
        let [c, parts, da, db, g] =
            [values, shape.slots() * shape.hidden, of_backward, of_backward, passes.kept(shape)].map(|len| {
                let start = end;
                end += len;
                start..end
            });
        Layout { c, parts, da, db, g }
    }

    /// Returns the addresses of c, the parts, da, db and g in memory that starts at `base`.
    fn addresses(&self, base: u64) -> [u64; 5] {
        let Layout { c, parts, da, db, g } = self;
        [c, parts, da, db, g].map(|range| base + (range.start * size_of::<bf16>()) as u64)
    }
}

/// An FFN and the pairs of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// The input, `[T, hidden]`.
    pub x: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`, in memory before `up`.
    pub gate: &'a Matrix<bf16>,
    /// `[intermediate, hidden]`
    pub up: &'a Matrix<bf16>,
    /// Transposed, `[intermediate, hidden]`.
    pub down: &'a Matrix<bf16>,
    /// The activation of the gate projection.
    pub activation: Activation,
    /// The active pairs.
    pub slots: &'a Slots,
    /// Their routing.
    pub routed: &'a Routed,
    /// The variants of the products.
    pub variants: &'a Variants,
    /// Coefficients of inactive pairs have gradients: a, b and g are of all pairs. Inference has none.
    pub all_pairs: bool,
}

/// Sets `y` to the output.
#[derive(Debug)]
pub struct Forward<'a> {
    /// `[T, hidden]`; none leaves the parts of the sums in the memory, which [`parts`] returns.
    pub y: Option<&'a mut Matrix<f32>>,
    /// The products a and b for the backward pass, [`Passes::kept`] values each; none in inference.
    pub kept: Option<[&'a mut Matrix<bf16>; 2]>,
    /// Scratch memory of [`Passes::workspace`] values.
    pub workspace: &'a mut Matrix<bf16>,
    /// The FFN and the pairs.
    pub layer: Layer<'a>,
}

/// Sets the gradients of the input and of the coefficients, and adds to those of the weights.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[T, hidden]`
    pub dx: &'a mut Matrix<f32>,
    /// The gradients of the gate, up and down projection, `[intermediate, hidden]` each.
    pub grads: [&'a mut Matrix<f32>; 3],
    /// `[T, n]`
    pub dcoefficients: &'a mut Matrix<f32>,
    /// Scratch memory of [`Passes::workspace`] values.
    pub workspace: &'a mut Matrix<bf16>,
    /// The gradient of the output, `[T, hidden]`.
    pub dy: &'a Matrix<bf16>,
    /// The products a and b that the forward pass kept.
    pub kept: [&'a Matrix<bf16>; 2],
    /// Sets the gradients of the weights instead of adding to them.
    pub set: bool,
    /// The FFN and the pairs.
    pub layer: Layer<'a>,
}

/// Returns the parts of the sums of a forward pass, as many values as `[slots, hidden]`: [`super::products::Sum`] or
/// [`super::rms_norm::ForwardParts`] adds those of a token up.
///
/// # Panics
/// The memory is no vector, or shorter than [`Passes::workspace`].
pub fn parts<'a>(workspace: &'a Matrix<bf16>, passes: Passes, shape: &Shape) -> View<'a, bf16> {
    assert_eq!(workspace.cols(), 1, "cuda slot_ffn::parts: columns of the memory");
    workspace.part(Layout::of(passes, shape).parts)
}

/// A launch of a pass.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Call(Call),
    /// Descriptors are large.
    Product(Box<products::Launch>),
}

impl Step {
    /// Queues the launch.
    ///
    /// # Safety
    /// Its addresses are those of buffers that have the sizes of its shape, and slots and tiles were made for that shape.
    unsafe fn queue(&self, gpu: &Gpu) -> Result<()> {
        match self {
            // SAFETY: the caller's promise.
            Step::Call(call) => unsafe { call.queue(gpu) },
            // SAFETY: the caller's promise.
            Step::Product(launch) => unsafe { launch.queue(gpu) },
        }
    }
}

/// The addresses of what both passes read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inputs {
    pub(crate) x: u64,
    pub(crate) gate: u64,
    pub(crate) up: u64,
    pub(crate) down: u64,
    /// The mask of the active pairs, `[T, n]`.
    pub(crate) mask: u64,
    /// The number of active pairs of every token, `[T]`.
    pub(crate) active: u64,
}

/// The addresses of a forward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForwardTo {
    pub(crate) y: Option<u64>,
    pub(crate) kept: Option<[u64; 2]>,
    pub(crate) workspace: u64,
}

/// The addresses of a backward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BackwardTo {
    pub(crate) dx: u64,
    pub(crate) grads: [u64; 3],
    pub(crate) dcoefficients: u64,
    pub(crate) workspace: u64,
    pub(crate) dy: u64,
    pub(crate) kept: [u64; 2],
    pub(crate) set: bool,
}

/// Makes the launches of passes, for a device of so many multiprocessors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planner<'a> {
    pub(crate) shape: &'a Shape,
    pub(crate) slots: &'a Places,
    pub(crate) inputs: Inputs,
    pub(crate) variants: &'a Variants,
    pub(crate) activation: Activation,
    pub(crate) all_pairs: bool,
    pub(crate) multiprocessors: usize,
}

/// Makes descriptors.
type Encode<'a> = &'a dyn Fn(&Tiled) -> Result<TensorMap>;

impl Planner<'_> {
    /// Returns the launches of the forward pass. With all pairs, those of a and b come before.
    pub(crate) fn forward(&self, to: &ForwardTo, encode: Encode<'_>) -> Result<Vec<Step>> {
        let Inputs { x, gate, up, down, .. } = self.inputs;
        let passes = match to.kept {
            None => Passes::Inference,
            Some(_) => Passes::Training { all_pairs: self.all_pairs },
        };
        let [c, parts, ..] = Layout::of(passes, self.shape).addresses(to.workspace);
        let activated = match to.kept.filter(|_| self.all_pairs) {
            Some([a, b]) => Step::Call(ffn::activate_slots(
                (self.shape, self.slots),
                [c, a, b],
                self.activation,
                self.blocks(),
            )),
            None => self.product(&Operands::Up { c, kept: to.kept, x, gate, up }, encode)?,
        };
        let part = self.product(&Operands::Down { parts, c, down }, encode)?;
        let sum = to.y.map(|y| self.sum(y, parts));
        Ok([activated, part].into_iter().chain(sum).collect())
    }

    /// Returns the launches of the backward pass. With all pairs, that of g comes before.
    pub(crate) fn backward(&self, to: &BackwardTo, encode: Encode<'_>) -> Result<Vec<Step>> {
        let Inputs { x, gate, up, down, mask, .. } = self.inputs;
        let BackwardTo { dx, grads, dcoefficients, workspace, dy, kept: [a, b], set } = *to;
        let passes = Passes::Training { all_pairs: self.all_pairs };
        let [c, parts, da, db, g] = Layout::of(passes, self.shape).addresses(workspace);
        let values = ffn::Values { da, db, c, dcoefficients, g, a, b };
        let how = (self.all_pairs, self.activation);
        let mut steps = Vec::new();
        if !self.all_pairs {
            steps.push(self.product(&Operands::Project { g, dy, down }, encode)?);
        }
        steps.push(Step::Call(ffn::backward_slots((self.shape, self.slots), &values, how, self.blocks())));
        steps.push(Step::Call(ffn::backward_inactive(self.shape, &values, mask, how)));
        let weights = Operands::Weights { grads, values: [da, db, c], x, dy, set };
        steps.push(self.product(&weights, encode)?);
        steps.push(self.product(&Operands::Input { parts, da, db, gate, up }, encode)?);
        steps.push(self.sum(dx, parts));
        Ok(steps)
    }

    fn product(&self, operands: &Operands, encode: Encode<'_>) -> Result<Step> {
        let how = (self.variants.of(operands.form()), self.activation);
        let launch = products::launch((self.shape, self.slots), how, operands, self.multiprocessors, encode)?;
        Ok(Step::Product(Box::new(launch)))
    }

    fn sum(&self, to: u64, parts: u64) -> Step {
        Step::Call(ffn::sum_slots(self.shape, to, parts, self.slots.of_tokens, self.inputs.active))
    }

    /// Returns the blocks of ops between products: as many as fit a multiprocessor at once.
    fn blocks(&self) -> usize {
        8 * self.multiprocessors
    }
}

impl Layer<'_> {
    /// Checks the sizes, and those of rows `[T, hidden]`, of other weights, of a and b, and of the memory to work in.
    fn check(
        &self,
        op: &str,
        passes: Passes,
        [rows, weights, kept]: [&[usize]; 3],
        workspace: usize,
    ) -> Shape {
        let shape = self.slots.shape();
        let of_rows = shape.tokens * shape.hidden;
        let of_weights = shape.intermediate() * shape.hidden;
        let all_rows = rows.iter().chain(&[self.x.len()]).all(|&len| len == of_rows);
        let matrices = [self.gate.len(), self.up.len(), self.down.len()];
        let all_weights = weights.iter().chain(&matrices).all(|&len| len == of_weights);
        let all_kept = kept.iter().all(|&len| len == passes.kept(&shape));
        let (tokens, n) = (self.routed.tokens(), self.routed.num_experts());
        let fit = all_rows && all_weights && all_kept && workspace >= passes.workspace(&shape);
        assert!(
            fit && [tokens, n] == [shape.tokens, shape.num_experts],
            "cuda slot_ffn::{op}: {rows:?} values of rows, {weights:?} of weights, {kept:?} kept, {workspace} to work in, \
             {tokens} tokens of {n} experts for {shape:?}, {passes:?}"
        );
        shape
    }

    /// Queues the launches that `plan` makes for these sizes.
    fn queue(
        &self,
        shape: &Shape,
        plan: impl FnOnce(&Planner<'_>, Encode<'_>) -> Result<Vec<Step>>,
    ) -> Result<()> {
        let Layer { x, gate, up, down, activation, slots, routed, variants, all_pairs } = *self;
        let pairs = routed.places();
        let [of_x, of_gate, of_up, of_down] = [x, gate, up, down].map(|matrix| matrix.ptr());
        let (mask, active) = (pairs.mask, pairs.active);
        let inputs = Inputs { x: of_x, gate: of_gate, up: of_up, down: of_down, mask, active };
        let (gpu, places) = (x.gpu(), &slots.places());
        let device = Device::of(gpu);
        let Variants { up, project, down, input, weights } = variants;
        let taken = [up, project, down, input, weights].iter().all(|variant| device.takes(variant));
        assert!(taken, "cuda slot_ffn: {variants:?} on {gpu:?}");
        let multiprocessors = gpu.multiprocessors() as usize;
        let planner =
            Planner { shape, slots: places, inputs, variants, activation, all_pairs, multiprocessors };
        let steps = plan(&planner, &|tiled| tiled.encode(gpu))?;
        // SAFETY: the callers checked the buffers against the shape of the slots, whose kernels made slots and tiles for it.
        steps.iter().try_for_each(|step| unsafe { step.queue(gpu) })
    }
}

impl Forward<'_> {
    /// Queues the op, or returns the error of the device or of cuBLASLt.
    ///
    /// # Panics
    /// A size does not fit, the gate projection is not before the other in memory, all pairs are asked for and nothing is kept, or
    /// a device does not take a variant.
    pub fn run(self) -> Result<()> {
        let Forward { y, mut kept, workspace, layer } = self;
        let passes = match kept {
            None => Passes::Inference,
            Some(_) => Passes::Training { all_pairs: layer.all_pairs },
        };
        assert!(
            kept.is_some() || !layer.all_pairs,
            "cuda slot_ffn::forward: all pairs without a backward pass"
        );
        let of_kept: Vec<usize> = kept.iter().flatten().map(|matrix| matrix.len()).collect();
        let of_rows: Vec<usize> = y.iter().map(|y| y.len()).collect();
        let shape = layer.check("forward", passes, [&of_rows, &[], &of_kept], workspace.len());
        if let Some(kept) = kept.as_mut().filter(|_| layer.all_pairs) {
            for (product, w) in kept.iter_mut().zip([layer.gate, layer.up]) {
                let mut product = product.shaped_mut(shape.tokens, shape.intermediate());
                linear::Forward { y: &mut *product, x: layer.x, w }.run()?;
            }
        }
        let to = ForwardTo {
            y: y.map(|y| y.ptr()),
            kept: kept.map(|both| both.map(|matrix| matrix.ptr())),
            workspace: workspace.ptr(),
        };
        layer.queue(&shape, |planner, encode| planner.forward(&to, encode))
    }
}

impl Backward<'_> {
    /// Queues the op, or returns the error of the device or of cuBLASLt.
    ///
    /// # Panics
    /// A size does not fit, or a device does not take a variant.
    pub fn run(self) -> Result<()> {
        let Backward { dx, grads, dcoefficients, workspace, dy, kept, set, layer } = self;
        let passes = Passes::Training { all_pairs: layer.all_pairs };
        let lens = [
            &[dx.len(), dy.len()][..],
            &grads.each_ref().map(|grad| grad.len()),
            &kept.map(|matrix| matrix.len()),
        ];
        let shape = layer.check("backward", passes, lens, workspace.len());
        let pairs = shape.tokens * shape.num_experts;
        assert_eq!(dcoefficients.len(), pairs, "cuda slot_ffn::backward: gradients of coefficients");
        if layer.all_pairs {
            let mut values = workspace.shaped_mut(passes.workspace(&shape), 1);
            let mut g = values.part_mut(Layout::of(passes, &shape).g);
            let mut g = g.shaped_mut(shape.tokens, shape.intermediate());
            // The down projection is stored transposed.
            linear::Forward { y: &mut *g, x: dy, w: layer.down }.run()?;
        }
        let to = BackwardTo {
            dx: dx.ptr(),
            grads: grads.map(|grad| grad.ptr()),
            dcoefficients: dcoefficients.ptr(),
            workspace: workspace.ptr(),
            dy: dy.ptr(),
            kept: kept.map(|matrix| matrix.ptr()),
            set,
        };
        layer.queue(&shape, |planner, encode| planner.backward(&to, encode))
    }
}
