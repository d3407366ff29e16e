//! One training step: its arguments and its results, on any device.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod units;
mod workspace;

use dsmoe_kernels::cross_entropy;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::{Fade, Pull, RouterGradientAt, ShareLoss, SparsityOver};
pub use units::{Grads, Units, Whole};
pub use workspace::TrainWorkspace;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::ffn::GateTraining;
use crate::model::inference::{Inference, Workspace};
use crate::model::tensors::{Batch, in_pool, logits_of};

/// Weights of the losses of one micro-batch.
///
/// ```
/// use dsmoe_core::model::StepArgs;
/// use dsmoe_router::SparsityOver;
///
/// // A step of 4 micro-batches of 1024 tokens, under a sparsity loss of weight 0.5 over all gates.
/// let (micro_batches, tokens) = (4, 1024);
/// let args = StepArgs {
///     loss_scale: 1.0 / (micro_batches * tokens) as f32,
///     sparsity_weight: 0.5 / micro_batches as f32,
///     sparsity_over: SparsityOver::All,
///     balance_scale: 1.0 / micro_batches as f32,
///     ..StepArgs::default()
/// };
/// assert_eq!((args.sparsity_weight, args.separability_weight), (0.125, 0.0));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepArgs {
    /// Factor of each token's loss: one over the predicted tokens of the whole optimiser step.
    pub loss_scale: f32,
    /// Weight of the sparsity loss (a mean over layers, tokens and experts) in this micro-batch: the weight of the
    /// optimiser step divided by its micro-batches.
    pub sparsity_weight: f32,
    /// Gates that the sparsity loss acts on.
    pub sparsity_over: SparsityOver,
    /// A loss on the distance of the mean gate of this micro-batch from a share, for gates whose mean is the share that runs. Its
    /// weight is that of the optimiser step divided by its micro-batches. It needs [`SparsityOver::All`]; a GPU has none.
    pub share: Option<ShareLoss>,
    /// Weight of the separability loss (a mean over layers, tokens and gates) in this micro-batch, as that of the
    /// sparsity loss.
    pub separability_weight: f32,
    /// Weight of the entropy of gates (a mean over layers and tokens, of sigmoid gates over gates too) in this micro-batch, as
    /// that of the sparsity loss.
    pub entropy_weight: f32,
    /// Experts of a token that fade out, where tokens run a fixed number.
    pub fade: Fade,
    /// The inactive pairs of tokens and experts whose part of the routers' gradient is computed; on a GPU all of them.
    pub router_gradient: RouterGradientAt,
    /// The number that divides the logits of routers that have one; none for their own.
    pub temperature: Option<f32>,
    /// Factor of balance losses: one over the micro-batches of the optimiser step.
    pub balance_scale: f32,
    /// Seed of the noise of this micro-batch.
    pub seed: u64,
}

/// Losses and checks of a micro-batch.
///
/// ```
/// use dsmoe_core::model::{Batch, StepArgs, StepOutput, TrainWorkspace};
/// # let model = dsmoe_core::Model::new(dsmoe_core::init::preset("tiny")?);
/// # let mut grads = vec![0.0; model.params().len()];
/// # let mut workspace = TrainWorkspace::new(&model, 4, dsmoe_kernels::Precision::F32);
/// # let args = StepArgs::default();
///
/// let batch = Batch { inputs: &[1, 5, 9, 2], targets: &[5, 9, 2, 7], seq: 4 };
/// let output: StepOutput = model.train_step(&mut grads, batch, &args, &mut workspace)?;
/// match &output.non_finite {
///     None => println!("loss {:.3}", output.loss_sum / output.predicted as f64),
///     Some(place) => println!("{place} is not finite: the step must not be applied"),
/// }
/// assert!(output.went_back);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// Sum of the token losses, nats.
    pub loss_sum: f64,
    /// Sum over tokens of the divergence from the teacher's distribution, nats; 0 without a teacher.
    pub divergence_sum: f64,
    /// Tokens predicted.
    pub predicted: usize,
    /// Mean of active gates over layers, tokens and experts (eq. 17-19).
    pub sparsity_loss: f64,
    /// Mean of all gates over layers, tokens and experts.
    pub mean_gate: f64,
    /// The squared distance of the mean gate from the share, without its weight; 0 unless there is a loss on it.
    pub share_loss: f64,
    /// Sum over layers of the balance losses, scaled and weighted.
    pub balance_loss: f64,
    /// Mean of the separability loss over layers, tokens and gates; 0 unless it has a weight.
    pub separability: f64,
    /// Mean of the entropy of gates over layers, tokens and, of sigmoids, gates; 0 unless it has a weight.
    pub gate_entropy: f64,
    /// The gradient of all gates as a whole, by the weight of the sparsity loss; 0 where the device does not report it.
    pub pull: Pull,
    /// The first place with a NaN or infinity in the forward pass, e.g. `layer 3 ffn`, when the loss has one.
    pub non_finite: Option<String>,
    /// True if there was a backward pass: the losses are finite, those of processes that go on together included.
    pub went_back: bool,
}

/// The sum of the tokens' losses, without a sparsity loss.
impl Default for StepArgs {
    fn default() -> StepArgs {
        StepArgs {
            loss_scale: 1.0,
            sparsity_weight: 0.0,
            sparsity_over: SparsityOver::Active,
            share: None,
            separability_weight: 0.0,
            entropy_weight: 0.0,
            fade: Fade::NONE,
            router_gradient: RouterGradientAt::FULL,
            temperature: None,
            balance_scale: 1.0,
            seed: 0,
        }
    }
}

impl StepArgs {
    /// Settings of the gate of layer `i` of `layers`, which has a seed of its own.
    pub(crate) fn gate_training(&self, i: usize, layers: usize) -> GateTraining {
        GateTraining {
            seed: Rng::new(self.seed, i as u64).next_u64(),
            balance_scale: self.balance_scale,
            separability: self.separability_weight / layers as f32,
            entropy: self.entropy_weight / layers as f32,
            fade: self.fade,
            inactive: self.router_gradient.of_layer(i),
            temperature: self.temperature,
        }
    }
}

/// A model on the host whose distributions of the next token another model learns.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::model::{Batch, StepArgs, Teacher, Teaching, TopRows, TrainWorkspace, Whole};
/// use dsmoe_core::{Inference, Model};
/// use dsmoe_kernels::Precision;
///
/// let student = Model::new(preset("tiny")?);
/// let mut teacher = Teacher::new(Inference::new(&student, Precision::F32), 1.0, student.config())?;
/// let mut rows = TopRows::default();
/// teacher.most_likely(&[1, 5, 9, 2], 4, 8, &mut rows)?;
/// assert_eq!(rows.ids.len(), 4 * 8);
///
/// let mut grads = vec![0.0; student.params().len()];
/// let mut workspace = TrainWorkspace::new(&student, 4, Precision::F32);
/// let batch = Batch { inputs: &[1, 5, 9, 2], targets: &[5, 9, 2, 7], seq: 4 };
/// let mut units = Whole { params: student.params(), grads: &mut grads };
/// let teaching = Teaching::Of(&mut teacher);
/// let found = student.step_on(&mut units, (batch, teaching), &StepArgs::default(), &mut workspace)?;
/// // A model agrees with itself.
/// assert!(found.divergence_sum.abs() < 1e-3);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Teacher {
    model: Inference,
    weight: f32,
    workspace: Workspace,
}

impl Teacher {
    /// Makes `model` the teacher of models of `student`. `weight` is that of the divergence; the text's loss has the
    /// rest.
    ///
    /// # Errors
    /// The vocabularies differ, `weight` is outside 0 to 1, or the teacher is on a GPU.
    pub fn new(model: Inference, weight: f32, student: &Config) -> Result<Teacher> {
        model.on_host()?;
        let [of_teacher, of_student] = [model.config(), student].map(|config| config.vocab_size);
        if of_teacher != of_student {
            return Err(Error::argument(
                format!("a teacher of {of_teacher} tokens for a model of {of_student}"),
                "use a teacher with the model's own vocabulary",
            ));
        }
        if !(0.0..=1.0).contains(&weight) {
            return Err(Error::argument(format!("a teacher's weight of {weight}"), "use 0 to 1"));
        }
        Ok(Teacher { model, weight, workspace: Workspace::default() })
    }

    /// Returns the teacher.
    pub fn model(&self) -> &Inference {
        &self.model
    }

    /// Returns the weight of the divergence.
    pub fn weight(&self) -> f32 {
        self.weight
    }

    /// Sets `rows` to the `top` most likely tokens after every one of `inputs`, sequences of `seq` tokens.
    ///
    /// # Errors
    /// A token id outside the vocabulary, sequences longer than the teacher's positions, or a `top` that is 0 or larger than
    /// the vocabulary.
    pub fn most_likely(&mut self, inputs: &[u32], seq: usize, top: usize, rows: &mut TopRows) -> Result<()> {
        let batch = Batch { inputs, targets: inputs, seq };
        batch.check(self.model.config())?;
        let vocab = self.model.config().vocab_size;
        if !(1..=vocab).contains(&top) {
            return Err(Error::argument(
                format!("the {top} most likely tokens of {vocab}"),
                "use 1 to all of them",
            ));
        }
        let Teacher { model, workspace, .. } = self;
        let model = model.on_host()?;
        model.last_hidden(inputs, seq, workspace);
        let TopRows { ids, log_p } = rows;
        ids.resize(inputs.len() * top, 0);
        log_p.resize(inputs.len() * (top + 1), 0.0);
        let Workspace { h, logits: space, .. } = workspace;
        let (hidden_states, head, logits) = (&h[..], &model.head, logits_of(&model.config));
        let op = cross_entropy::MostLikely { ids, log_p, top, hidden_states, head, logits, space };
        in_pool(|| op.run());
        Ok(())
    }
}

/// The most likely next tokens of a teacher, for every token of a batch.
///
/// ```
/// use dsmoe_core::model::{Teacher, TopRows};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let student = preset("tiny")?;
/// # let teacher = Inference::new(&Model::new(student.clone()), dsmoe_kernels::Precision::F32);
///
/// let mut teacher = Teacher::new(teacher, 0.9, &student)?;
/// let mut rows = TopRows::default();
/// teacher.most_likely(&[1, 5, 9], 3, 4, &mut rows)?;
/// // The probabilities of the 4 most likely tokens and of all others add up to 1.
/// for log_p in rows.log_p.chunks_exact(4 + 1) {
///     assert!((log_p.iter().map(|p| p.exp()).sum::<f32>() - 1.0).abs() < 1e-3);
/// }
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopRows {
    /// `[tokens, top]`, the most likely first.
    pub ids: Vec<u32>,
    /// `[tokens, top + 1]`: the logarithms of their probabilities, then that of all other tokens together.
    pub log_p: Vec<f32>,
}

/// The targets of a micro-batch beside its text.
///
/// ```
/// use dsmoe_core::model::{Batch, StepArgs, Teacher, Teaching, TopRows, TrainWorkspace, Whole};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let student = Model::new(preset("tiny")?);
/// # let teacher = Inference::new(&student, dsmoe_kernels::Precision::F32);
/// # let mut teacher = Teacher::new(teacher, 0.9, student.config())?;
/// # let mut grads = vec![0.0; student.params().len()];
/// # let mut workspace = TrainWorkspace::new(&student, 2, dsmoe_kernels::Precision::F32);
///
/// let batch = Batch { inputs: &[1, 5], targets: &[5, 9], seq: 2 };
/// let mut divergence = |teaching: Teaching<'_>| {
///     let units = &mut Whole { params: student.params(), grads: &mut grads };
///     let step = student.step_on(units, (batch, teaching), &StepArgs::default(), &mut workspace);
///     step.map(|step| step.divergence_sum)
/// };
/// // The text alone; a teacher beside it; or what was kept of the teacher, with the weight of its divergence.
/// assert_eq!(divergence(Teaching::None)?, 0.0);
/// assert!(divergence(Teaching::Of(&mut teacher))?.abs() < 1e-3);
/// let mut rows = TopRows::default();
/// teacher.most_likely(batch.inputs, 2, 8, &mut rows)?;
/// assert!(divergence(Teaching::Rows(&rows, 0.9))?.abs() < 1e-3);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug)]
pub enum Teaching<'a> {
    /// Nothing.
    None,
    /// The distributions of a teacher: [`Model::distill_step`](crate::Model::distill_step).
    Of(&'a mut Teacher),
    /// The most likely tokens of a teacher, and the weight of the divergence:
    /// [`Model::distill_step_from`](crate::Model::distill_step_from).
    Rows(&'a TopRows, f32),
}
