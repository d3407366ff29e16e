//! AdamW over the parameter arena, with the decay and the learning rate each tensor asks for, and clipping by the
//! global gradient norm.

use std::ops::Range;
use std::sync::Arc;

use dsmoe_core::params::{Entry, Layout, TensorSpec};
use dsmoe_core::shard::{BLOCK, Shards};
use dsmoe_kernels::adamw;
use dsmoe_kernels::buf::Buf;
use rayon::prelude::*;

use crate::config::{Part, TrainConfig, Trained};

/// Keeps clipping of a zero gradient finite.
const CLIP_EPS: f64 = 1e-6;

/// Euclidean norms of a gradient.
///
/// ```
/// use dsmoe_core::params::{Layout, TensorSpec};
/// use dsmoe_train::optim::{GradNorms, clip_scale, grad_norms};
///
/// let weight = TensorSpec::matrix("up_proj.weight", 1, 16);
/// let layout = Layout::of(vec![weight, TensorSpec::router("router.weight", vec![1, 16])]);
/// let GradNorms { all, router } = grad_norms(&layout, &[[3.0; 16], [0.0; 16]].concat());
/// assert_eq!((all, router), (12.0, 0.0));
/// // The gradient is clipped to a norm of 1.
/// assert!((all * f64::from(clip_scale(all, 1.0)) - 1.0).abs() < 1e-6);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradNorms {
    /// The norm over all tensors.
    pub all: f64,
    /// The norm over the routers.
    pub router: f64,
}

/// Computes the norms of `grads`, laid out as `layout`. Squares are summed by pieces of at most 65,536 values, and
/// the pieces in order.
pub fn grad_norms(layout: &Layout, grads: &[f32]) -> GradNorms {
    let mut squares = Squares::new(layout, &Shards::new(layout, 1), 0);
    squares.compute(grads);
    squares.norms(squares.sums())
}

/// The sums of squares that the norms of a gradient are made of: one per piece, which is what a block of
/// [`Shards`] has of routers or of other tensors. A piece is summed in f64 by its owner, and everyone adds the pieces in the
/// order of the arena.
#[derive(Debug)]
pub(crate) struct Squares {
    /// The owner of every piece, and whether it belongs to routers, in the order of the arena.
    pieces: Vec<(usize, bool)>,
    /// The pieces of this process: their places in the arena, and among all that it owns.
    own: Vec<[Range<usize>; 2]>,
    /// Values that it owns.
    owned: usize,
    /// Their sums.
    sums: Vec<f64>,
    /// Pieces of each process.
    counts: Vec<usize>,
}

impl Squares {
    /// Cuts a gradient for process `rank`.
    pub(crate) fn new(layout: &Layout, shards: &Shards, rank: usize) -> Squares {
        let same_kind = |a: &Entry, b: &Entry| a.spec.router == b.spec.router;
        let runs = layout.entries().chunk_by(same_kind);
        let runs: Vec<(Range<usize>, bool)> =
            runs.map(|run| (run[0].range.start..run[run.len() - 1].range.end, run[0].spec.router)).collect();
        let (counts, owned) = (vec![0; shards.size()], 0);
        let mut squares = Squares { pieces: Vec::new(), own: Vec::new(), owned, sums: Vec::new(), counts };
        let mut first = 0;
        for unit in 0..shards.units().len() {
            for owner in 0..shards.size() {
                let owned = shards.piece(unit, owner);
                let before = squares.owned;
                squares.owned += if owner == rank { owned.len() } else { 0 };
                for start in owned.clone().step_by(BLOCK) {
                    let block = start..owned.end.min(start + BLOCK);
                    while runs.get(first).is_some_and(|(run, _)| run.end <= block.start) {
                        first += 1;
                    }
                    let in_block = runs[first..].iter().take_while(|(run, _)| run.start < block.end);
                    for (run, router) in in_block {
                        squares.pieces.push((owner, *router));
                        squares.counts[owner] += 1;
                        if owner == rank {
                            let piece = run.start.max(block.start)..run.end.min(block.end);
                            let place = before + piece.start - owned.start;
                            squares.own.push([piece.clone(), place..place + piece.len()]);
                        }
                    }
                }
            }
        }
        squares.sums = vec![0.0; squares.own.len()];
        squares
    }

    /// Returns the number of pieces of every process.
    pub(crate) fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// Computes the sums of this process's pieces of `grads`: an arena, or what it owns of one.
    pub(crate) fn compute(&mut self, grads: &[f32]) {
        let apart = usize::from(grads.len() == self.owned);
        let pieces = self.sums.par_iter_mut().zip(&self.own);
        pieces.for_each(|(sum, piece)| *sum = adamw::sum_of_squares(&grads[piece[apart].clone()]));
    }

    /// Returns the sums of this process's pieces.
    pub(crate) fn sums(&self) -> &[f64] {
        &self.sums
    }

    /// Returns the norms, from the sums of all processes, one process after the other.
    pub(crate) fn norms(&self, sums: &[f64]) -> GradNorms {
        let starts = self.counts.iter().scan(0, |end, count| {
            *end += count;
            Some(*end - count)
        });
        let mut next: Vec<usize> = starts.collect();
        let (mut all, mut router) = (0.0, 0.0);
        for &(owner, is_router) in &self.pieces {
            let squares = sums[next[owner]];
            next[owner] += 1;
            all += squares;
            if is_router {
                router += squares;
            }
        }
        GradNorms { all: all.sqrt(), router: router.sqrt() }
    }
}

/// Returns whether a tensor stays as it is.
fn is_frozen(trained: &Trained, entry: &Entry) -> bool {
    let is_out = |layers: &Vec<usize>| entry.layer.is_none_or(|layer| !layers.contains(&layer));
    trained.layers.as_ref().is_some_and(is_out)
        || trained.parts.as_ref().is_some_and(|parts| !parts.contains(&part_of(entry)))
}

/// Returns the part that a tensor belongs to.
fn part_of(entry: &Entry) -> Part {
    let name = &entry.spec.name;
    match entry.layer {
        _ if entry.spec.router => Part::Routers,
        None if entry.spec.shape.len() > 1 => Part::Embedding,
        Some(_) if name.contains(".mlp.") => Part::Ffn,
        Some(_) if name.contains(".self_attn.") && !name.contains("norm") => Part::Attention,
        _ => Part::Norms,
    }
}

/// Joins neighbours in the layout that are updated alike, without those that stay as they are: the first of them, and their
/// range. The padding between them is zero in every arena.
fn runs<'l>(
    layout: &'l Layout,
    trained: &'l Trained,
) -> impl Iterator<Item = (&'l TensorSpec, Range<usize>)> {
    let kind = move |entry: &Entry| (entry.spec.decay, entry.spec.router, is_frozen(trained, entry));
    let runs = layout.entries().chunk_by(move |a, b| kind(a) == kind(b));
    let runs = runs.filter(move |run| !is_frozen(trained, &run[0]));
    runs.map(|run| (&run[0].spec, run[0].range.start..run[run.len() - 1].range.end))
}

/// Returns the factor that scales a gradient of norm `norm` to a norm of at most `clip`; 1 when `clip` is 0.
pub fn clip_scale(norm: f64, clip: f64) -> f32 {
    if clip > 0.0 && norm > clip { (clip / (norm + CLIP_EPS)) as f32 } else { 1.0 }
}

/// Finds the tensor with a NaN or infinity in `values` that lies nearest to the loss. A backward pass spreads such
/// values to all tensors before it, so the layout is searched from its end.
pub fn last_non_finite<'l>(layout: &'l Layout, values: &[f32]) -> Option<&'l Entry> {
    layout.entries().iter().rev().find(|entry| values[entry.range.clone()].iter().any(|x| !x.is_finite()))
}

/// The settings of one update of the parameters.
///
/// ```
/// use dsmoe_train::TrainConfig;
/// use dsmoe_train::optim::Update;
///
/// let config = TrainConfig { router_lr_scale: 2.0, ..TrainConfig::default() };
/// let update = Update { config: &config, lr: 1e-3, scale: 1.0, step: 1 };
/// let (weights, routers) = (update.hyper(true, false), update.hyper(false, true));
/// assert_eq!((weights.lr, weights.weight_decay), (1e-3, 0.1));
/// assert_eq!((routers.lr, routers.weight_decay), (2e-3, 0.0));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// The settings of the run.
    pub config: &'a TrainConfig,
    /// The learning rate of the step.
    pub lr: f64,
    /// The factor that multiplies the gradients first, of [`clip_scale`].
    pub scale: f32,
    /// The step, counted from 1.
    pub step: u64,
}

impl Update<'_> {
    /// Returns the constants for tensors that decay or not, and that belong to a router or not. Norms and routers do
    /// not decay. Routers use [`TrainConfig::router_lr_scale`] times the learning rate.
    pub fn hyper(&self, decay: bool, router: bool) -> adamw::Hyper {
        let Update { config, lr, step, .. } = *self;
        adamw::Hyper {
            lr: if router { lr * config.router_lr_scale } else { lr },
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            weight_decay: if decay { config.weight_decay } else { 0.0 },
            step,
        }
    }
}

/// The optimiser's state: the first and second moments of all parameters, or of those that a process owns.
///
/// ```
/// use dsmoe_core::Model;
/// use dsmoe_core::init::preset;
/// use dsmoe_train::TrainConfig;
/// use dsmoe_train::optim::{AdamW, GradNorms, Update, clip_scale, grad_norms};
///
/// let mut model = Model::new(preset("tiny")?);
/// let layout = model.layout().clone();
/// let grads = vec![1e-3; layout.len()];
/// let GradNorms { all, .. } = grad_norms(&layout, &grads);
/// let (config, scale) = (TrainConfig::default(), clip_scale(all, 1.0));
/// let mut optimizer = AdamW::new(&layout);
/// let before = model.params()[0];
/// let update = Update { config: &config, lr: 1e-3, scale, step: 1 };
/// optimizer.step(Some(model.params_mut()), &grads, &layout, &update);
/// assert!(model.params()[0] < before);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Debug)]
pub struct AdamW {
    /// First moments, laid out as the parameters, without those of other owners.
    pub m: Buf,
    /// Second moments, likewise.
    pub v: Buf,
    /// The parameters that are owned, likewise, where the model is without them; empty else.
    pub params: Arc<Buf>,
    /// Their places in the arena, in order.
    owned: Vec<Range<usize>>,
    trained: Trained,
}

impl AdamW {
    /// Moments of zero, of all parameters.
    pub fn new(layout: &Layout) -> AdamW {
        AdamW::of(&Shards::new(layout, 1), 0)
    }

    /// Moments of zero, of the parameters that process `rank` owns.
    pub fn of(shards: &Shards, rank: usize) -> AdamW {
        let owned = shards.owned(rank);
        let len = owned.iter().map(|range| range.len()).sum();
        AdamW {
            m: Buf::zeros(len),
            v: Buf::zeros(len),
            params: Arc::new(Buf::zeros(0)),
            owned,
            trained: Trained::default(),
        }
    }

    /// Trains these parameters and nothing else from now on.
    pub fn train_only(&mut self, trained: Trained) {
        self.trained = trained;
    }

    /// Returns whether some tensors stay as they are.
    #[cfg(feature = "cuda")]
    pub(crate) fn freezes(&self) -> bool {
        self.trained != Trained::default()
    }

    /// Sets the gradients of tensors that stay as they are to 0, so that they are in no norm.
    pub(crate) fn drop_frozen(&self, grads: &mut [f32], layout: &Layout) {
        for entry in layout.entries().iter().filter(|entry| is_frozen(&self.trained, entry)) {
            grads[entry.range.clone()].fill(0.0);
        }
    }

    /// Returns the places in the moments of the parameters in `range` that are owned: the parameters, and the moments.
    pub fn places(&self, range: Range<usize>) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + '_ {
        places(&self.owned, range)
    }

    /// Finds the tensor with a NaN or infinity in [`AdamW::params`] that lies nearest to the loss.
    pub fn last_non_finite<'l>(&self, layout: &'l Layout) -> Option<&'l Entry> {
        let is_wrong = |place: Range<usize>| self.params[place].iter().any(|x| !x.is_finite());
        let mut entries = layout.entries().iter().rev();
        entries.find(|entry| self.places(entry.range.clone()).any(|(_, place)| is_wrong(place)))
    }

    /// Takes one step with the parameters that are owned. Parameters and gradients are each an arena, or what is owned of it,
    /// one after the other; without `params` they are [`AdamW::params`].
    ///
    /// # Panics
    /// `params` or `grads` is neither as long as the layout nor as what is owned, or the moments are of another layout.
    pub fn step(&mut self, params: Option<&mut [f32]>, grads: &[f32], layout: &Layout, update: &Update<'_>) {
        let AdamW { m, v, params: own, owned, trained } = self;
        let params = match params {
            Some(params) => params,
            // Nobody else holds them between evaluations.
            None => &mut **Arc::make_mut(own),
        };
        for values in [&*params, grads] {
            let fits = [layout.len(), m.len()].contains(&values.len());
            assert!(fits, "adamw: {} values for the layout", values.len());
        }
        let [params_apart, grads_apart] = [params.len(), grads.len()].map(|len| len == m.len());
        for (spec, range) in runs(layout, trained) {
            let hyper = update.hyper(spec.decay, spec.router);
            for (range, place) in places(owned, range) {
                let at = |apart| if apart { place.clone() } else { range.clone() };
                let (m, v) = (&mut m[place.clone()], &mut v[place.clone()]);
                let (param, grad) = (&mut params[at(params_apart)], &grads[at(grads_apart)]);
                adamw::Step { param, m, v, grad, grad_scale: update.scale, hyper: &hyper }.run();
            }
        }
    }
}

/// Returns the parts of `range` that are in `owned`, and their places when all that is owned lies one after the other.
fn places(
    owned: &[Range<usize>],
    range: Range<usize>,
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + '_ {
    let mut end = 0;
    owned.iter().filter_map(move |owned| {
        end += owned.len();
        let (first, last) = (owned.start.max(range.start), owned.end.min(range.end));
        // The owned part of it lies `owned.end - first` values before the end of this part.
        (first < last).then(|| (first..last, end - (owned.end - first)..end - (owned.end - last)))
    })
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::rng::Rng;

    use super::*;

    #[test]
    fn norms_do_not_depend_on_the_owners() {
        let matrix = |name: &str, rows| TensorSpec::matrix(name, rows, 40_000);
        let router = TensorSpec::router("router", vec![3, 40_000]);
        let tensors = vec![matrix("a", 5), TensorSpec::norm("norm", 7), router, matrix("b", 3)];
        let layout = &Layout::of(tensors);
        let mut grads = vec![0.0; layout.len()];
        for entry in layout.entries() {
            Rng::new(3, entry.range.start as u64).fill_normal(&mut grads[entry.range.clone()], 0.1);
        }
        let want = grad_norms(layout, &grads);
        for size in [2, 3, 5] {
            let shards = Shards::new(layout, size);
            let mut all: Vec<Squares> = (0..size).map(|rank| Squares::new(layout, &shards, rank)).collect();
            all.iter_mut().for_each(|squares| squares.compute(&grads));
            let sums: Vec<f64> = all.iter().flat_map(|squares| squares.sums()).copied().collect();
            assert_eq!(all[0].norms(&sums), want, "{size}");
            for (rank, squares) in all.iter_mut().enumerate() {
                let sums = squares.sums().to_vec();
                let own: Vec<f32> =
                    shards.owned(rank).into_iter().flat_map(|range| grads[range].to_vec()).collect();
                squares.compute(&own);
                assert_eq!(squares.sums(), sums);
            }
        }
        let by_entry = |router: bool| -> f64 {
            let entries = layout.entries().iter().filter(|entry| entry.spec.router || !router);
            let squares =
                entries.flat_map(|entry| &grads[entry.range.clone()]).map(|&x| f64::from(x).powi(2));
            squares.sum::<f64>().sqrt()
        };
        for (got, want) in [(want.all, by_entry(false)), (want.router, by_entry(true))] {
            assert!((got / want - 1.0).abs() < 1e-12, "{got} is not {want}");
        }
    }

    #[test]
    fn frozen_layers_keep_their_bits_and_are_in_no_norm() {
        let model = dsmoe_core::Model::new(dsmoe_core::init::preset("tiny").unwrap());
        let layout = model.layout();
        let config = TrainConfig::default();
        let update = Update { config: &config, lr: 0.1, scale: 1.0, step: 1 };
        let mut grads = vec![0.0; layout.len()];
        Rng::new(1, 0).fill_normal(&mut grads, 1.0);
        let (mut all, mut some) = (AdamW::new(layout), AdamW::new(layout));
        some.train_only(Trained { layers: Some(vec![1]), parts: None });
        let (mut with_all, mut with_some) = (vec![1.0; layout.len()], vec![1.0; layout.len()]);
        all.step(Some(&mut with_all), &grads, layout, &update);
        some.step(Some(&mut with_some), &grads, layout, &update);
        some.drop_frozen(&mut grads, layout);
        for entry in layout.entries() {
            let range = entry.range.clone();
            let of = |params: &[f32]| params[range.clone()].to_vec();
            let name = &entry.spec.name;
            let is_trained = name.starts_with("model.layers.1.");
            assert_eq!(of(&with_some) == of(&with_all), is_trained, "{name}");
            assert_eq!(of(&with_some).iter().all(|&x| x == 1.0), !is_trained, "{name}");
            assert_eq!(grads[range].iter().all(|&x| x == 0.0), !is_trained, "{name}");
        }
    }

    #[test]
    fn frozen_parts_keep_their_bits() {
        use dsmoe_core::{Model, config::MoeConfig, init::preset};
        let mut config = preset("tiny").unwrap();
        config.moe = Some(MoeConfig::new(dsmoe_router::RouterConfig::new(8)));
        let model = Model::new(config);
        let layout = model.layout();
        let config = TrainConfig { weight_decay: 0.5, ..TrainConfig::default() };
        let update = Update { config: &config, lr: 0.1, scale: 1.0, step: 1 };
        let mut grads = vec![0.0; layout.len()];
        Rng::new(1, 0).fill_normal(&mut grads, 1.0);
        for (part, inside) in [
            (Part::Ffn, &["gate_proj", "up_proj", "down_proj"][..]),
            (Part::Routers, &["router"]),
            (Part::Attention, &["q_proj", "k_proj", "v_proj", "o_proj"]),
            (Part::Norms, &["norm"]),
            (Part::Embedding, &["embed_tokens", "lm_head"]),
        ] {
            let mut optimizer = AdamW::new(layout);
            optimizer.train_only(Trained { layers: None, parts: Some(vec![part]) });
            let mut params = vec![1.0; layout.len()];
            optimizer.step(Some(&mut params), &grads, layout, &update);
            let mut moved = 0;
            for entry in layout.entries() {
                let (name, values) = (&entry.spec.name, &params[entry.range.clone()]);
                let is_trained = inside.iter().any(|part| name.contains(part));
                assert_eq!(values.iter().any(|&x| x != 1.0), is_trained, "{part:?} {name}");
                moved += usize::from(is_trained);
            }
            assert!(moved > 0, "{part:?}");
        }
    }

    #[test]
    fn owners_take_the_step_of_one_process() {
        let layout = &Layout::of(vec![TensorSpec::matrix("a", 5, 40_000), TensorSpec::norm("b", 70_000)]);
        let config = TrainConfig::default();
        let update = Update { config: &config, lr: 0.1, scale: 0.5, step: 1 };
        let mut grads = vec![0.0; layout.len()];
        Rng::new(1, 0).fill_normal(&mut grads, 1.0);
        let mut want = vec![1.0; layout.len()];
        let mut whole = AdamW::new(layout);
        whole.step(Some(&mut want), &grads, layout, &update);
        let mut got = vec![1.0; layout.len()];
        for rank in 0..3 {
            let mut part = AdamW::of(&Shards::new(layout, 3), rank);
            let own_grads: Vec<f32> =
                part.places(0..layout.len()).flat_map(|(range, _)| grads[range].to_vec()).collect();
            let mut apart = AdamW::of(&Shards::new(layout, 3), rank);
            let mut ones = Buf::zeros(own_grads.len());
            ones.fill(1.0);
            apart.params = Arc::new(ones);
            apart.step(None, &own_grads, layout, &update);
            part.step(Some(&mut got), &grads, layout, &update);
            for (range, place) in part.places(0..layout.len()) {
                assert_eq!(part.m[place.clone()], whole.m[range.clone()]);
                assert_eq!((&part.m[..], &apart.params[place]), (&apart.m[..], &want[range]));
            }
        }
        assert_eq!(got, want);
    }
}
