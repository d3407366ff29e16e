//! The forward pass of an FFN on a device. Products run over lists of the active pairs where the kernels take the sizes, else
//! over all pairs.

use dsmoe_kernels::Activation;
use dsmoe_kernels::cuda::Matrix;
use dsmoe_kernels::cuda::ops::router::{Lists, Routed, Sort};
use dsmoe_kernels::cuda::ops::{experts, ffn, linear};
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

/// The forward pass of a routed FFN.
pub(crate) struct Forward<'a> {
    /// The output; set.
    pub(crate) y: &'a mut Matrix<f32>,
    /// `coefficient * act(a) * b`; set.
    pub(crate) c: &'a mut Matrix<bf16>,
    /// The products a and b; set. A pass over lists does not need them.
    pub(crate) products: Option<[&'a mut Matrix<bf16>; 2]>,
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

impl Forward<'_> {
    pub(crate) fn run(self) -> Result<()> {
        let Forward { y, c, products, parts, x, projections, routed, lists, all_pairs } = self;
        let Projections { gate, up, down, biases, output_bias, activation } = projections;
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
                let projections = products;
                experts::Up { c, projections, x, gate, up, coefficients, lists, activation }.run()?;
            }
            _ => {
                let [a, b] = products.expect("memory for the products of all pairs");
                linear::Forward { y: &mut *a, x, w: gate }.run()?;
                linear::Forward { y: &mut *b, x, w: up }.run()?;
                if let Some([of_a, of_b, _]) = biases {
                    linear::AddBias { y: &mut *a, bias: of_a }.run()?;
                    linear::AddBias { y: &mut *b, bias: of_b }.run()?;
                }
                ffn::Activate { c, a, b, coefficients, activation }.run()?;
            }
        }
        // The down projection is stored transposed: y = c W.
        match lists {
            Some(lists) => experts::Down { y, parts, c, weight: down, lists }.run()?,
            None => linear::BackwardInput { dx: &mut *y, dy: c, w: down, add: false }.run()?,
        }
        for bias in biases.map(|[_, _, of_down]| of_down).into_iter().chain(output_bias) {
            linear::AddBias { y: &mut *y, bias }.run()?;
        }
        Ok(())
    }
}
