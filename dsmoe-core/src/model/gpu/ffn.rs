//! The forward pass of an FFN on a device. The core runs as a dense FFN of its neurons. Products of routed experts run over
//! lists of the active pairs where the kernels take the sizes, else over all pairs. Where the kernels for slots are chosen,
//! products of the core and of routed experts are the same.

use std::ops::Range;

use dsmoe_kernels::Activation;
use dsmoe_kernels::cuda::ops::choice::Variants;
use dsmoe_kernels::cuda::ops::router::{Lists, Routed, Sort};
use dsmoe_kernels::cuda::ops::slots::Slots;
use dsmoe_kernels::cuda::ops::{experts, ffn, linear, slot_ffn};
use dsmoe_kernels::cuda::{Matrix, View, ViewMut};
use half::bf16;

use crate::error::Result;

/// The projections of an FFN, rounded, and their biases.
#[derive(Clone, Copy)]
pub(crate) struct Projections<'a> {
    pub(crate) gate: &'a Matrix<bf16>,
    pub(crate) up: &'a Matrix<bf16>,
    /// Transposed.
    pub(crate) down: &'a Matrix<bf16>,
    /// Of gate, up and down.
    pub(crate) biases: Option<[&'a Matrix<f32>; 3]>,
    /// Added to the output.
    pub(crate) output_bias: Option<&'a Matrix<f32>>,
    pub(crate) activation: Activation,
}

/// The projections of some neurons.
pub(crate) struct Rows<'a> {
    pub(crate) gate: View<'a, bf16>,
    pub(crate) up: View<'a, bf16>,
    pub(crate) down: View<'a, bf16>,
    /// The biases of the gate and up projections.
    biases: Option<[View<'a, f32>; 2]>,
}

/// Values of pairs: of the core `[T, neurons]`, and behind them of the other neurons `[T, neurons]`.
pub(crate) type Blocks<'a> = [ViewMut<'a, bf16>; 2];

/// The forward pass of a routed FFN.
pub(crate) struct Forward<'a> {
    /// The output; set.
    pub(crate) y: &'a mut Matrix<f32>,
    /// `coefficient * act(a) * b`; set.
    pub(crate) c: Blocks<'a>,
    /// The products a and b; set. A pass over lists does not need those of routed experts, which then may have no memory.
    pub(crate) products: [Blocks<'a>; 2],
    /// Scratch memory for the parts of the sums of tokens.
    pub(crate) parts: &'a mut Matrix<bf16>,
    /// The input.
    pub(crate) x: &'a Matrix<bf16>,
    pub(crate) projections: Projections<'a>,
    pub(crate) routed: Option<&'a Routed>,
    /// Set to the active pairs, if products run over them.
    pub(crate) lists: Option<&'a mut Lists>,
    /// Sets the products of inactive pairs too.
    pub(crate) all_pairs: bool,
}

/// The forward pass of a routed FFN whose pairs lie in slots.
pub(crate) struct ForwardSlots<'a> {
    /// The output; set. None leaves the parts of its sums, to which no bias is added.
    pub(crate) y: Option<&'a mut Matrix<f32>>,
    /// The products a and b for the backward pass; set.
    pub(crate) kept: Option<[&'a mut Matrix<bf16>; 2]>,
    pub(crate) workspace: &'a mut Matrix<bf16>,
    /// The active pairs.
    pub(crate) slots: &'a Slots,
    /// The input.
    pub(crate) x: &'a Matrix<bf16>,
    pub(crate) projections: Projections<'a>,
    pub(crate) routed: &'a Routed,
    pub(crate) variants: &'a Variants,
    /// Keeps the products of inactive pairs too.
    pub(crate) all_pairs: bool,
}

impl ForwardSlots<'_> {
    pub(crate) fn run(self) -> Result<()> {
        let ForwardSlots { mut y, kept, workspace, slots, x, projections, routed, variants, all_pairs } =
            self;
        let layer = projections.layer(x, (slots, routed), variants, all_pairs);
        slot_ffn::Forward { y: y.as_deref_mut(), kept, workspace, layer }.run()?;
        match y.zip(projections.output_bias) {
            Some((y, bias)) => Ok(linear::AddBias { y, bias }.run()?),
            None => Ok(()),
        }
    }
}

impl<'a> Projections<'a> {
    /// Returns the FFN as the kernels for slots take it.
    pub(crate) fn layer(
        &self,
        x: &'a Matrix<bf16>,
        (slots, routed): (&'a Slots, &'a Routed),
        variants: &'a Variants,
        all_pairs: bool,
    ) -> slot_ffn::Layer<'a> {
        let Projections { gate, up, down, activation, .. } = *self;
        slot_ffn::Layer { x, gate, up, down, activation, slots, routed, variants, all_pairs }
    }

    /// Returns those of some neurons, of inputs of width `hidden`.
    pub(crate) fn rows(&self, neurons: Range<usize>, hidden: usize) -> Rows<'a> {
        let part = |matrix: &'a Matrix<bf16>| matrix.part(neurons.start * hidden..neurons.end * hidden);
        let Projections { gate, up, down, biases, .. } = *self;
        Rows {
            gate: part(gate),
            up: part(up),
            down: part(down),
            biases: biases.map(|[gate, up, _]| [gate, up].map(|bias| bias.part(neurons.clone()))),
        }
    }
}

impl Rows<'_> {
    /// Sets a, b and c of all tokens, and without `coefficients` for all of them with the factor 1.
    fn activate(
        &self,
        c: &mut Matrix<bf16>,
        [a, b]: [&mut Matrix<bf16>; 2],
        x: &Matrix<bf16>,
        (coefficients, activation): (Option<&Matrix<f32>>, Activation),
    ) -> Result<()> {
        linear::Forward { y: &mut *a, x, w: &self.gate }.run()?;
        linear::Forward { y: &mut *b, x, w: &self.up }.run()?;
        if let Some([of_a, of_b]) = &self.biases {
            linear::AddBias { y: &mut *a, bias: of_a }.run()?;
            linear::AddBias { y: &mut *b, bias: of_b }.run()?;
        }
        Ok(ffn::Activate { c, a, b, coefficients, activation }.run()?)
    }
}

impl Forward<'_> {
    pub(crate) fn run(self) -> Result<()> {
        let Forward { y, c, products, parts, x, projections, routed, lists, all_pairs } = self;
        let Projections { biases, output_bias, activation, .. } = projections;
        let [mut c_core, mut c] = c;
        let [[mut a_core, mut a], [mut b_core, mut b]] = products;
        let (core, hidden) = (c_core.cols(), x.cols());
        let rest = &projections.rows(core..core + c.cols(), hidden);
        let coefficients = routed.map(Routed::coefficients);
        let coefficients = coefficients.as_deref();
        let lists = match (lists, routed) {
            (Some(lists), Some(routed)) => {
                Sort { lists: &mut *lists, routed }.run()?;
                Some(&*lists)
            }
            _ => None,
        };
        match (lists, coefficients) {
            (Some(lists), Some(coefficients)) if !all_pairs => {
                let (Rows { gate, up, .. }, c) = (rest, &mut *c);
                let projections = (!a.is_empty()).then_some([&mut *a, &mut *b]);
                experts::Up { c, projections, x, gate, up, coefficients, lists, activation }.run()?;
            }
            _ => rest.activate(&mut c, [&mut *a, &mut *b], x, (coefficients, activation))?,
        }
        // The down projection is stored transposed: y = c W.
        match lists {
            Some(lists) => experts::Down { y, parts, c: &c, weight: &rest.down, lists }.run()?,
            None => linear::BackwardInput { dx: &mut *y, dy: &c, w: &rest.down, add: false }.run()?,
        }
        if core > 0 {
            let rows = &projections.rows(0..core, hidden);
            rows.activate(&mut c_core, [&mut *a_core, &mut *b_core], x, (None, activation))?;
            linear::BackwardInput { dx: &mut *y, dy: &c_core, w: &rows.down, add: true }.run()?;
        }
        for bias in biases.map(|[_, _, of_down]| of_down).into_iter().chain(output_bias) {
            linear::AddBias { y: &mut *y, bias }.run()?;
        }
        Ok(())
    }
}
