//! The oracle: for every token the best of many routes through the layers, found with the token's loss at hand. It bounds what
//! a router could gain (Alizadeh et al., Duo-LLM).
//!
//! ```text
//! loss_r[t]     loss of token t where all layers take route r, for all tokens of the text
//! level b       the routes whose options add up to b: with two options, b layers compute more
//! mean          mean over the routes of a level and over tokens: a router that knows nothing
//! best          the route of a level of the lowest mean: one for all tokens
//! oracle        mean over t of min over r of loss_r[t]
//! control       the same minimum over as many noisy copies of the model, of the same mean loss; see `noise`
//! beyond        control - oracle: what the choice of computation gives that any choice among as many would not
//! ```
//! Earlier tokens of a sequence take the route that is tried, too. A model of few routes has all of them measured; of others a
//! search keeps, from the first layer on, the best beginnings of every level, with the layers behind as they are by default.

mod noise;
mod routes;
mod state;
mod tally;
#[cfg(test)]
mod tests;

use std::path::Path;

use dsmoe_core::{Inference, Model};
use dsmoe_datasets::eval_windows;
use dsmoe_kernels::Precision;
use serde::Serialize;

pub use routes::{RouteKind, RouteSpace};

use crate::error::{Error, Result};
use crate::eval::{EvalOptions, evaluate_detailed};
use noise::{Copies, MOST_PASSES};
use routes::{Digits, keep_best, level, name};
use state::{Control, State, Store};
use tally::{Level, least_of_all, mean, mean_of, rank_correlation};

/// Routes of one run at the most.
pub const MOST_ROUTES: u64 = 1 << 16;

/// Options of an oracle.
///
/// ```
/// use dsmoe_kernels::Precision;
/// use dsmoe_train::oracle::{OracleOptions, RouteKind, plan};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), Precision::F32);
///
/// let options = OracleOptions {
///     kind: RouteKind::BigSkip,
///     seq: 8,
///     exact_up_to: 1 << 10,
///     beam: 64,
///     control: false,
///     precision: Precision::F32,
///     seed: 0,
/// };
/// assert!(plan(&model, 64, &options)?.exact);
/// assert!(plan(&model, 64, &OracleOptions { beam: 0, ..options }).is_err());
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OracleOptions {
    /// The options of every layer.
    pub kind: RouteKind,
    /// Tokens of a window of text.
    pub seq: usize,
    /// All routes are measured where there are no more than that; at most [`MOST_ROUTES`].
    pub exact_up_to: u64,
    /// Beginnings of routes that a search keeps in all, shared among levels.
    pub beam: usize,
    /// Measure the control.
    pub control: bool,
    /// Precision of the control's copies, that of the model.
    pub precision: Precision,
    /// Seed of the control's noise.
    pub seed: u64,
}

/// The work of an oracle.
///
/// ```
/// use dsmoe_train::oracle::{OracleOptions, OraclePlan, plan};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # use dsmoe_kernels::Precision;
/// # let model = Inference::new(&Model::new(preset("tiny")?), Precision::F32);
/// # let kind = dsmoe_train::oracle::RouteKind::BigSkip;
/// # let (control, precision) = (false, Precision::F32);
/// # let options = OracleOptions { kind, seq: 8, exact_up_to: 16, beam: 64, control, precision, seed: 0 };
///
/// let all: OraclePlan = plan(&model, 64, &options)?;
/// let search = plan(&model, 64, &OracleOptions { exact_up_to: 8, beam: 5, ..options })?;
/// assert_eq!((all.exact, all.passes, all.predicted), (true, 16, 56));
/// assert!(!search.exact && search.all_routes == Some(16));
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OraclePlan {
    /// Decoder layers.
    pub layers: usize,
    /// Routes of the model; none above [`MOST_ROUTES`].
    pub all_routes: Option<u64>,
    /// True if all of them are measured.
    pub exact: bool,
    /// Levels.
    pub levels: usize,
    /// Tokens predicted in one pass.
    pub predicted: usize,
    /// Passes over the text at the most, those of the control included.
    pub passes: u64,
}

/// The results of an oracle. Losses are means over tokens in nats.
///
/// ```
/// use dsmoe_train::oracle::{OracleReport, run};
/// # use dsmoe_core::{Inference, Model, config::MoeConfig, init::LlamaSizes};
/// # use dsmoe_kernels::{Precision, rng::Rng};
/// # use dsmoe_train::oracle::{Oracle, OracleOptions, RouteKind};
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [32, 16, 32, 2, 2, 1, 16];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # let load = || {
/// #     let mut config = sizes.config()?;
/// #     config.moe = Some(MoeConfig::new(dsmoe_router::RouterConfig::new(4)));
/// #     let mut model = Model::new(config);
/// #     Rng::new(3, 0).fill_normal(model.params_mut(), 0.3);
/// #     Ok(model)
/// # };
/// # let mut model = Inference::new(&load()?, Precision::F32);
/// # let (kind, precision) = (RouteKind::BigSkip, Precision::F32);
/// # let options = OracleOptions { kind, seq: 4, exact_up_to: 16, beam: 8, control: false, precision, seed: 0 };
/// # let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// # let oracle = Oracle { model: &mut model, source: &load, ids: &ids, options, state: None, made_by: "" };
///
/// let (report, _): (OracleReport, _) = run(oracle, &mut |_, _, _| {})?;
/// assert_eq!((report.measured, report.levels.len()), (4, 3));
/// // The last level runs both layers: it is the model by itself.
/// assert!((report.levels[2].best - report.default).abs() < 1e-9);
/// assert!(report.any.oracle <= report.default);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OracleReport {
    /// The options of every layer.
    pub routes: RouteKind,
    /// Tokens of a window.
    pub seq: usize,
    /// The rule for earlier tokens of a window: they take the route that is tried.
    pub context: &'static str,
    /// Decoder layers.
    pub layers: usize,
    /// True if all routes were measured.
    pub exact: bool,
    /// Routes that were measured.
    pub measured: u64,
    /// Tokens predicted.
    pub predicted: usize,
    /// Loss of the model by itself.
    pub default: f64,
    /// Results by level, ascending in what is computed.
    pub levels: Vec<LevelReport>,
    /// The best of all routes that were measured.
    pub any: AnyReport,
    /// The rule of the model's own choice of experts; none without a router.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub own_choice: Option<OwnChoice>,
}

/// The results of one level.
///
/// ```
/// use dsmoe_train::oracle::{LevelReport, run};
/// # use dsmoe_core::{Inference, Model, config::MoeConfig, init::LlamaSizes};
/// # use dsmoe_kernels::{Precision, rng::Rng};
/// # use dsmoe_train::oracle::{Oracle, OracleOptions, RouteKind};
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [32, 16, 32, 2, 2, 1, 16];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # let load = || {
/// #     let mut config = sizes.config()?;
/// #     config.moe = Some(MoeConfig::new(dsmoe_router::RouterConfig::new(4)));
/// #     let mut model = Model::new(config);
/// #     Rng::new(3, 0).fill_normal(model.params_mut(), 0.3);
/// #     Ok(model)
/// # };
/// # let mut model = Inference::new(&load()?, Precision::F32);
/// # let (kind, precision) = (RouteKind::BigSkip, Precision::F32);
/// # let options = OracleOptions { kind, seq: 4, exact_up_to: 16, beam: 8, control: false, precision, seed: 0 };
/// # let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// # let oracle = Oracle { model: &mut model, source: &load, ids: &ids, options, state: None, made_by: "" };
///
/// let (report, _) = run(oracle, &mut |_, _, _| {})?;
/// for LevelReport { level, best_route, best, oracle, mean, .. } in &report.levels {
///     println!("{level} of 2 layers: route {best_route} has loss {best:.3}, the oracle {oracle:.3}");
///     assert!(oracle <= best && *best <= mean + 1e-9);
/// }
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LevelReport {
    /// The sum of the options of all layers.
    pub level: usize,
    /// Its routes that were measured.
    pub routes: u64,
    /// Mean loss over routes.
    pub mean: f64,
    /// The route of the lowest loss.
    pub best_route: String,
    /// Its loss.
    pub best: f64,
    /// Loss where every token takes its best route.
    pub oracle: f64,
    /// As many noisy copies of the model; none for a single route, or where no noise gives the mean loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<ControlReport>,
    /// The control's oracle less that of the routes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beyond: Option<f64>,
}

/// The noisy copies beside a level.
///
/// ```
/// use dsmoe_train::oracle::{ControlReport, run};
/// # use dsmoe_core::{Inference, Model, config::MoeConfig, init::LlamaSizes};
/// # use dsmoe_kernels::{Precision, rng::Rng};
/// # use dsmoe_train::oracle::{Oracle, OracleOptions, RouteKind};
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [32, 16, 32, 2, 2, 1, 16];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # let load = || {
/// #     let mut config = sizes.config()?;
/// #     config.moe = Some(MoeConfig::new(dsmoe_router::RouterConfig::new(4)));
/// #     let mut model = Model::new(config);
/// #     Rng::new(3, 0).fill_normal(model.params_mut(), 0.3);
/// #     Ok(model)
/// # };
/// # let mut model = Inference::new(&load()?, Precision::F32);
/// # let (kind, precision) = (RouteKind::BigSkip, Precision::F32);
/// # let options = OracleOptions { kind, seq: 4, exact_up_to: 16, beam: 8, control: true, precision, seed: 0 };
/// # let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// # let oracle = Oracle { model: &mut model, source: &load, ids: &ids, options, state: None, made_by: "" };
///
/// let (report, _) = run(oracle, &mut |_, _, _| {})?;
/// // A single route has no control, and no noise may give the mean loss of a level.
/// let controls = report.levels.iter().filter_map(|level| level.control);
/// for ControlReport { noise, mean, oracle } in controls {
///     println!("copies with {:.1} % of noise: mean {mean:.3}, the best of each token {oracle:.3}", 100.0 * noise);
///     assert!(oracle <= mean);
/// }
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ControlReport {
    /// Standard deviation of the noise, relative to each weight.
    pub noise: f64,
    /// Mean loss over copies.
    pub mean: f64,
    /// Loss where every token takes its best copy.
    pub oracle: f64,
}

/// The best of all routes.
///
/// ```
/// use dsmoe_train::oracle::{AnyReport, run};
/// # use dsmoe_core::{Inference, Model, config::MoeConfig, init::LlamaSizes};
/// # use dsmoe_kernels::{Precision, rng::Rng};
/// # use dsmoe_train::oracle::{Oracle, OracleOptions, RouteKind};
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [32, 16, 32, 2, 2, 1, 16];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # let load = || {
/// #     let mut config = sizes.config()?;
/// #     config.moe = Some(MoeConfig::new(dsmoe_router::RouterConfig::new(4)));
/// #     let mut model = Model::new(config);
/// #     Rng::new(3, 0).fill_normal(model.params_mut(), 0.3);
/// #     Ok(model)
/// # };
/// # let mut model = Inference::new(&load()?, Precision::F32);
/// # let (kind, precision) = (RouteKind::BigSkip, Precision::F32);
/// # let options = OracleOptions { kind, seq: 4, exact_up_to: 16, beam: 8, control: false, precision, seed: 0 };
/// # let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// # let oracle = Oracle { model: &mut model, source: &load, ids: &ids, options, state: None, made_by: "" };
///
/// let (report, _) = run(oracle, &mut |_, _, _| {})?;
/// let AnyReport { oracle, mean_level, control, .. } = report.any;
/// println!("loss {oracle:.3} where tokens run {mean_level:.2} layers on average");
/// assert!(report.levels.iter().all(|level| oracle <= level.oracle + 1e-9));
/// assert_eq!(control, None); // it was not asked for
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AnyReport {
    /// Loss where every token takes its best route.
    pub oracle: f64,
    /// Mean level of these routes.
    pub mean_level: f64,
    /// The best copy of the controls of all levels; where a level has none, its routes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<f64>,
    /// The control less the oracle.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beyond: Option<f64>,
}

/// Rank correlations over tokens of the experts that the model's router opens.
///
/// ```
/// use dsmoe_train::oracle::{OwnChoice, run};
/// # use dsmoe_core::{Inference, Model, config::MoeConfig, init::LlamaSizes};
/// # use dsmoe_kernels::{Precision, rng::Rng};
/// # use dsmoe_train::oracle::{Oracle, OracleOptions, RouteKind};
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [32, 16, 32, 2, 2, 1, 16];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # let load = || {
/// #     let mut config = sizes.config()?;
/// #     config.moe = Some(MoeConfig::new(dsmoe_router::RouterConfig::new(4)));
/// #     let mut model = Model::new(config);
/// #     Rng::new(3, 0).fill_normal(model.params_mut(), 0.3);
/// #     Ok(model)
/// # };
/// # let mut model = Inference::new(&load()?, Precision::F32);
/// # let (kind, precision) = (RouteKind::BigSkip, Precision::F32);
/// # let options = OracleOptions { kind, seq: 4, exact_up_to: 16, beam: 8, control: false, precision, seed: 0 };
/// # let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// # let oracle = Oracle { model: &mut model, source: &load, ids: &ids, options, state: None, made_by: "" };
///
/// let (report, _) = run(oracle, &mut |_, _, _| {})?;
/// // Does the router open more experts for the tokens that gain by computation?
/// let OwnChoice { with_gain, .. } = report.own_choice.expect("a model of experts");
/// assert!(with_gain.is_none_or(|correlation| correlation.abs() < 1.001));
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OwnChoice {
    /// With the token's loss.
    pub with_loss: Option<f64>,
    /// With the loss that computation takes away: that of the least route less the model's own.
    pub with_gain: Option<f64>,
}

/// The routes of all tokens.
///
/// ```
/// use dsmoe_train::oracle::{TokenRoutes, run};
/// # use dsmoe_core::{Inference, Model, config::MoeConfig, init::LlamaSizes};
/// # use dsmoe_kernels::{Precision, rng::Rng};
/// # use dsmoe_train::oracle::{Oracle, OracleOptions, RouteKind};
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [32, 16, 32, 2, 2, 1, 16];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # let load = || {
/// #     let mut config = sizes.config()?;
/// #     config.moe = Some(MoeConfig::new(dsmoe_router::RouterConfig::new(4)));
/// #     let mut model = Model::new(config);
/// #     Rng::new(3, 0).fill_normal(model.params_mut(), 0.3);
/// #     Ok(model)
/// # };
/// # let mut model = Inference::new(&load()?, Precision::F32);
/// # let (kind, precision) = (RouteKind::BigSkip, Precision::F32);
/// # let options = OracleOptions { kind, seq: 4, exact_up_to: 16, beam: 8, control: false, precision, seed: 0 };
/// # let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// # let oracle = Oracle { model: &mut model, source: &load, ids: &ids, options, state: None, made_by: "" };
///
/// let (report, tokens): (_, TokenRoutes) = run(oracle, &mut |_, _, _| {})?;
/// for (best, loss) in tokens.best.iter().zip(&tokens.loss) {
///     println!("route {} with loss {loss:.3}", tokens.routes[*best as usize]);
/// }
/// let mean = tokens.loss.iter().map(|&loss| f64::from(loss)).sum::<f64>() / tokens.loss.len() as f64;
/// assert!((mean - report.any.oracle).abs() < 1e-6);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenRoutes {
    /// The routes that are named below.
    pub routes: Vec<String>,
    /// Loss of every predicted token in the model by itself.
    pub default: Vec<f32>,
    /// The best route of every token.
    pub best: Vec<u32>,
    /// The loss of that route.
    pub loss: Vec<f32>,
    /// The best route of every token within each level that was measured.
    pub by_level: Vec<LevelRoutes>,
}

/// The best routes of a level.
///
/// ```
/// use dsmoe_train::oracle::{LevelRoutes, run};
/// # use dsmoe_core::{Inference, Model, config::MoeConfig, init::LlamaSizes};
/// # use dsmoe_kernels::{Precision, rng::Rng};
/// # use dsmoe_train::oracle::{Oracle, OracleOptions, RouteKind};
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [32, 16, 32, 2, 2, 1, 16];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # let load = || {
/// #     let mut config = sizes.config()?;
/// #     config.moe = Some(MoeConfig::new(dsmoe_router::RouterConfig::new(4)));
/// #     let mut model = Model::new(config);
/// #     Rng::new(3, 0).fill_normal(model.params_mut(), 0.3);
/// #     Ok(model)
/// # };
/// # let mut model = Inference::new(&load()?, Precision::F32);
/// # let (kind, precision) = (RouteKind::BigSkip, Precision::F32);
/// # let options = OracleOptions { kind, seq: 4, exact_up_to: 16, beam: 8, control: false, precision, seed: 0 };
/// # let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// # let oracle = Oracle { model: &mut model, source: &load, ids: &ids, options, state: None, made_by: "" };
///
/// let (_, tokens) = run(oracle, &mut |_, _, _| {})?;
/// // Where one layer of two runs, is it the same one for all tokens?
/// let LevelRoutes { best, .. } = tokens.by_level.iter().find(|routes| routes.level == 1).unwrap();
/// let names: Vec<&String> = best.iter().map(|&route| &tokens.routes[route as usize]).collect();
/// println!("{}", names.windows(2).all(|pair| pair[0] == pair[1]));
/// assert_eq!(names.len(), tokens.default.len());
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LevelRoutes {
    /// The level.
    pub level: usize,
    /// The best route of every token.
    pub best: Vec<u32>,
}

/// A model, a text and what is asked of them.
///
/// ```
/// use dsmoe_core::config::MoeConfig;
/// use dsmoe_core::init::preset;
/// use dsmoe_core::{Inference, Model};
/// use dsmoe_kernels::Precision;
/// use dsmoe_kernels::rng::Rng;
/// use dsmoe_router::RouterConfig;
/// use dsmoe_train::oracle::{
///     AnyReport, ControlReport, LevelReport, LevelRoutes, Oracle, OracleOptions, OraclePlan, OracleProgress,
///     OracleReport, OwnChoice, RouteKind, RouteSpace, TokenRoutes, plan, run,
/// };
///
/// // How well would a model of four experts a layer do that skips the right FFNs for each token?
/// let load = || {
///     let mut config = preset("tiny")?;
///     config.moe = Some(MoeConfig::new(RouterConfig::new(4)));
///     let mut model = Model::new(config);
///     Rng::new(3, 0).fill_normal(model.params_mut(), 0.3);
///     Ok(model)
/// };
/// let mut model = Inference::new(&load()?, Precision::F32);
/// let options = OracleOptions {
///     kind: RouteKind::BigSkip,
///     seq: 4,
///     exact_up_to: 1 << 10,
///     beam: 8,
///     control: true,
///     precision: Precision::F32,
///     seed: 0,
/// };
/// let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// let OraclePlan { all_routes, exact, .. } = plan(&model, ids.len(), &options)?;
/// let space = RouteSpace::of(RouteKind::BigSkip, &model)?;
/// assert_eq!((all_routes, exact), (space.count(1 << 10), true));
///
/// let oracle = Oracle { model: &mut model, source: &load, ids: &ids, options, state: None, made_by: "" };
/// let progress: &mut OracleProgress<'_> = &mut |_, _, _| {};
/// let (report, tokens): (OracleReport, TokenRoutes) = run(oracle, progress)?;
/// let AnyReport { oracle: best, .. } = report.any;
/// assert!(best <= report.default);
/// let LevelReport { level, control, beyond, .. } = &report.levels[1];
/// let LevelRoutes { best, .. } = tokens.by_level.iter().find(|routes| routes.level == *level).unwrap();
/// assert_eq!(best.len(), report.predicted);
/// // The control is there only if some noise gives the mean loss of the level.
/// if let (Some(ControlReport { noise, mean, oracle }), Some(beyond)) = (control, beyond) {
///     assert!(*noise > 0.0 && oracle <= mean && *beyond == oracle - report.levels[1].oracle);
/// }
/// // Are tokens with larger losses the ones for which the router opens more experts?
/// let Some(OwnChoice { with_loss, .. }) = report.own_choice else { panic!("the model has a router") };
/// assert!(with_loss.is_none_or(|correlation| correlation.abs() < 1.001));
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
pub struct Oracle<'a> {
    /// The model.
    pub model: &'a mut Inference,
    /// Loads the weights again, for the control.
    pub source: &'a dyn Fn() -> Result<Model>,
    /// The text.
    pub ids: &'a [u32],
    /// Options.
    pub options: OracleOptions,
    /// The file that holds the state until the work is done.
    pub state: Option<&'a Path>,
    /// Identifies the model and the text in that file.
    pub made_by: &'a str,
}

impl std::fmt::Debug for Oracle<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Oracle").field("options", &self.options).finish_non_exhaustive()
    }
}

/// Plans the work.
///
/// # Errors
/// An option is out of range, the text has no window of two tokens, or the model has no such routes.
pub fn plan(model: &Inference, tokens: usize, options: &OracleOptions) -> Result<OraclePlan> {
    if !(1..=MOST_ROUTES).contains(&options.exact_up_to) {
        return Err(Error::field("exact", options.exact_up_to, format!("1 to {MOST_ROUTES}")));
    }
    if !(1..=1 << 12).contains(&options.beam) {
        return Err(Error::field("beam", options.beam, "1 to 4096"));
    }
    if options.seq > model.config().max_position {
        let allowed = format!("at most the model's max_position_embeddings {}", model.config().max_position);
        return Err(Error::field("seq", options.seq, allowed));
    }
    let space = RouteSpace::of(options.kind, model)?;
    let windows = eval_windows(tokens, options.seq, options.seq)?;
    let all = space.count(options.exact_up_to);
    let (layers, levels) = (space.layers(), space.levels());
    let most_options = (levels - 1).div_ceil(layers.max(1)) as u64 + 1;
    let each = (options.beam / levels).max(1) as u64;
    let measured = all.unwrap_or(each * levels as u64 * most_options);
    let search = if all.is_some() { 0 } else { measured * (layers as u64 - 1) };
    let control = if options.control { measured + levels as u64 * MOST_PASSES } else { 0 };
    Ok(OraclePlan {
        layers,
        all_routes: space.count(MOST_ROUTES),
        exact: all.is_some(),
        levels,
        predicted: windows.iter().map(|window| window.end - window.start - 1).sum(),
        passes: measured + search + control,
    })
}

/// The numbers of parts that are done and of all, of the stage of that name.
///
/// ```
/// use dsmoe_train::oracle::{OracleProgress, run};
/// # use dsmoe_core::{Inference, Model, config::MoeConfig, init::LlamaSizes};
/// # use dsmoe_kernels::{Precision, rng::Rng};
/// # use dsmoe_train::oracle::{Oracle, OracleOptions, RouteKind};
/// # let [vocab, hidden, intermediate, layers, heads, kv_heads, positions] = [32, 16, 32, 2, 2, 1, 16];
/// # let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos: [1, 2] };
/// # let load = || {
/// #     let mut config = sizes.config()?;
/// #     config.moe = Some(MoeConfig::new(dsmoe_router::RouterConfig::new(4)));
/// #     let mut model = Model::new(config);
/// #     Rng::new(3, 0).fill_normal(model.params_mut(), 0.3);
/// #     Ok(model)
/// # };
/// # let mut model = Inference::new(&load()?, Precision::F32);
/// # let (kind, precision) = (RouteKind::BigSkip, Precision::F32);
/// # let options = OracleOptions { kind, seq: 4, exact_up_to: 16, beam: 8, control: false, precision, seed: 0 };
/// # let ids = [1, 5, 9, 2, 7, 3, 8, 4];
/// # let oracle = Oracle { model: &mut model, source: &load, ids: &ids, options, state: None, made_by: "" };
///
/// let mut stages = Vec::new();
/// let progress: &mut OracleProgress<'_> = &mut |stage, done, all| {
///     assert!(done <= all);
///     stages.push(stage);
/// };
/// run(oracle, progress)?;
/// println!("{stages:?}");
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
pub type OracleProgress<'p> = dyn FnMut(&'static str, u64, u64) + 'p;

/// Measures routes and their control. An interrupted run with the same file of its state goes on and gives the same result.
///
/// # Errors
/// Those of [`plan`]; a loss that is not finite; a file that cannot be read or written.
pub fn run(oracle: Oracle<'_>, progress: &mut OracleProgress<'_>) -> Result<(OracleReport, TokenRoutes)> {
    let Oracle { model, source, ids, options, state, made_by } = oracle;
    let plan = plan(model, ids.len(), &options)?;
    let space = RouteSpace::of(options.kind, model)?;
    let (store, state) = Store::open(state, made_by)?;
    let mut search = Search { model, space, ids, options, store, state };

    search.model.set_routes(&search.space.routes(&[]))?;
    let (default, detail) = search.measure_in_detail()?;
    let routes = match plan.exact {
        true => (0..plan.all_routes.unwrap_or(0)).map(|i| search.space.nth(i)).collect(),
        false => search.beams(progress)?,
    };
    search.levels(&routes, progress)?;
    if options.control {
        search.controls(source, progress)?;
    }
    let report = search.report(plan, default, &routes, &detail);
    let tokens = search.tokens(&routes, detail.losses);
    search.store.remove()?;
    Ok((report, tokens))
}

/// The work on its way.
struct Search<'a> {
    model: &'a mut Inference,
    space: RouteSpace,
    ids: &'a [u32],
    options: OracleOptions,
    store: Store,
    state: State,
}

/// The losses of all tokens, and the experts that they run.
struct Detail {
    losses: Vec<f32>,
    active: Vec<u32>,
}

fn measure(model: &Inference, ids: &[u32], seq: usize) -> Result<Detail> {
    let (_, detail) = evaluate_detailed(model, ids, EvalOptions::new(seq), &mut |_, _| {})?;
    match detail.losses.iter().all(|loss| loss.is_finite()) {
        true => Ok(Detail { losses: detail.losses, active: detail.active }),
        false => Err(Error::field("a loss", "not finite", "a model that does not overflow on this text")),
    }
}

impl Search<'_> {
    fn measure_in_detail(&self) -> Result<(f64, Detail)> {
        let detail = measure(self.model, self.ids, self.options.seq)?;
        Ok((mean(&detail.losses), detail))
    }

    fn losses(&mut self, route: &[u16]) -> Result<Vec<f32>> {
        self.model.set_routes(&self.space.routes(route))?;
        Ok(measure(self.model, self.ids, self.options.seq)?.losses)
    }

    /// Searches for good routes, layer by layer; the last layer's options are all taken.
    fn beams(&mut self, progress: &mut OracleProgress<'_>) -> Result<Vec<Digits>> {
        let layers = self.space.layers();
        let each = (self.options.beam / self.space.levels()).max(1);
        while let Some(layer) = self.state.beams.first().map(Vec::len).filter(|&layer| layer + 1 < layers) {
            let candidates = self.space.extended(&self.state.beams);
            let mut found = Vec::with_capacity(candidates.len());
            let all = candidates.len() as u64;
            for (i, candidate) in (0..).zip(candidates) {
                progress("searching", layer as u64 * all + i, (layers as u64 - 1) * all);
                let loss = mean(&self.losses(&candidate)?);
                found.push((candidate, loss));
            }
            self.state.beams = keep_best(found, each);
            self.store.keep(&self.state)?;
        }
        Ok(self.space.extended(&self.state.beams))
    }

    /// Measures all `routes`.
    fn levels(&mut self, routes: &[Digits], progress: &mut OracleProgress<'_>) -> Result<()> {
        self.state.levels.resize(self.space.levels(), Level::default());
        let done = self.state.done as usize;
        for (i, route) in routes.iter().enumerate().skip(done) {
            progress("routes", i as u64, routes.len() as u64);
            let losses = self.losses(route)?;
            self.state.levels[level(route)].add(i as u32, &losses);
            self.state.done = i as u64 + 1;
            self.store.keep(&self.state)?;
        }
        Ok(())
    }

    /// Measures the control of every level.
    fn controls(
        &mut self,
        source: &dyn Fn() -> Result<Model>,
        progress: &mut OracleProgress<'_>,
    ) -> Result<()> {
        let levels = self.state.levels.len();
        if self.state.controls.len() == levels {
            return Ok(());
        }
        let default = self.space.routes(&[]);
        let mut copies = Copies::new(source()?, self.options.precision, self.options.seed, default);
        let (ids, seq) = (self.ids, self.options.seq);
        let mut measure = |model: &Inference| Ok(measure(model, ids, seq)?.losses);
        for of in self.state.controls.len()..levels {
            progress("control", of as u64, levels as u64);
            let level = &self.state.levels[of];
            let members = u32::try_from(level.members).unwrap_or(u32::MAX);
            let mut control = Control::default();
            if members > 1
                && let Some(noise) = copies.matched(level.mean(), members, &mut measure)?
            {
                control.noise = Some(noise.to_bits());
                for copy in 0..members {
                    control.copies.add(copy, &copies.losses(noise, copy, &mut measure)?);
                }
            }
            self.state.controls.push(control);
            self.store.keep(&self.state)?;
        }
        Ok(())
    }

    fn report(&self, plan: OraclePlan, default: f64, routes: &[Digits], own: &Detail) -> OracleReport {
        let State { levels, controls, .. } = &self.state;
        let measured = levels.iter().enumerate().filter(|(_, level)| level.members > 0);
        let reports = measured.map(|(i, level)| level_report(i, level, controls.get(i), routes));
        let best = least_of_all(levels.iter());
        let mean_level = best.iter().map(|&(_, route)| level_of(routes, route) as f64).sum::<f64>();
        let oracle = mean_of(best.iter().map(|&(loss, _)| loss));
        let beside = levels.iter().zip(controls).map(|(level, control)| match control.noise {
            Some(_) => &control.copies,
            None => level,
        });
        let control = (!controls.is_empty() && controls.iter().any(|control| control.noise.is_some()))
            .then(|| mean_of(least_of_all(beside).iter().map(|&(loss, _)| loss)));
        OracleReport {
            routes: self.options.kind,
            seq: self.options.seq,
            context: "same",
            layers: plan.layers,
            exact: plan.exact,
            measured: routes.len() as u64,
            predicted: plan.predicted,
            default,
            levels: reports.collect(),
            any: AnyReport {
                oracle,
                mean_level: mean_level / best.len().max(1) as f64,
                control,
                beyond: control.map(|control| control - oracle),
            },
            own_choice: self.own_choice(own),
        }
    }

    fn own_choice(&self, own: &Detail) -> Option<OwnChoice> {
        let least = self.state.levels.iter().find(|level| level.members > 0)?;
        let as_f64 = |values: &[f32]| values.iter().copied().map(f64::from).collect::<Vec<f64>>();
        let (active, loss) =
            (own.active.iter().map(|&n| f64::from(n)).collect::<Vec<_>>(), as_f64(&own.losses));
        let gain: Vec<f64> = least.least().zip(&loss).map(|(least, loss)| f64::from(least) - loss).collect();
        (!active.is_empty()).then(|| OwnChoice {
            with_loss: rank_correlation(&active, &loss),
            with_gain: rank_correlation(&active, &gain),
        })
    }

    fn tokens(&self, routes: &[Digits], default: Vec<f32>) -> TokenRoutes {
        let levels = &self.state.levels;
        let best = least_of_all(levels.iter());
        let measured = levels.iter().enumerate().filter(|(_, level)| level.members > 0);
        TokenRoutes {
            routes: routes.iter().map(|route| name(route)).collect(),
            default,
            best: best.iter().map(|&(_, route)| route).collect(),
            loss: best.iter().map(|&(loss, _)| loss).collect(),
            by_level: measured.map(|(level, of)| LevelRoutes { level, best: of.which().to_vec() }).collect(),
        }
    }
}

fn level_of(routes: &[Digits], route: u32) -> usize {
    routes.get(route as usize).map_or(0, |route| level(route))
}

fn level_report(level: usize, of: &Level, control: Option<&Control>, routes: &[Digits]) -> LevelReport {
    let (best, loss) = of.best().unwrap_or_default();
    let control = control.and_then(|control| {
        let noise = f64::from_bits(control.noise?);
        Some(ControlReport { noise, mean: control.copies.mean(), oracle: control.copies.oracle() })
    });
    let oracle = of.oracle();
    LevelReport {
        level,
        routes: of.members,
        mean: of.mean(),
        best_route: routes.get(best as usize).map(|route| name(route)).unwrap_or_default(),
        best: loss,
        oracle,
        beyond: control.map(|control| control.oracle - oracle),
        control,
    }
}
