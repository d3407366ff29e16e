//! The results of an oracle.

use serde::Serialize;

use super::context::RouteContext;
use super::routes::RouteKind;

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
/// # let options = OracleOptions { exact_up_to: 16, control: false, ..OracleOptions::new(RouteKind::BigSkip, 4) };
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
    /// The routes of the earlier tokens of a window.
    pub context: RouteContext,
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
    /// The best routes within a budget; none without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetReport>,
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
/// # let options = OracleOptions { exact_up_to: 16, control: false, ..OracleOptions::new(RouteKind::BigSkip, 4) };
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
    /// The control, which has a noisy copy of the model for each route. It is none for a single route, or where no noise gives
    /// the mean loss.
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
/// # let options = OracleOptions { exact_up_to: 16, control: true, ..OracleOptions::new(RouteKind::BigSkip, 4) };
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
/// # let options = OracleOptions { exact_up_to: 16, control: false, ..OracleOptions::new(RouteKind::BigSkip, 4) };
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

/// The best routes of tokens within a budget.
///
/// ```
/// use dsmoe_train::oracle::{BudgetReport, run};
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
/// # let ids = [1, 5, 9, 2, 7, 3, 8, 4];
///
/// // Tokens may run one layer of two: each of them, or in the mean.
/// let options = OracleOptions {
///     budget: Some(1.0),
///     control: false,
///     ..OracleOptions::new(RouteKind::BigSkip, 4)
/// };
/// let oracle = Oracle { model: &mut model, source: &load, ids: &ids, options, state: None, made_by: "" };
/// let (report, _) = run(oracle, &mut |_, _, _| {})?;
/// let BudgetReport { each, mean, .. } = report.budget.expect("it was asked for");
/// assert!(mean.oracle <= each.oracle && each.mean_level <= 1.0 && mean.mean_level <= 1.0);
/// assert!(report.any.oracle <= mean.oracle);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BudgetReport {
    /// The largest level.
    pub level: f64,
    /// Every token takes its best route of the levels up to that.
    pub each: AnyReport,
    /// Tokens take routes whose mean level is up to that, where they are worth most: off the optimum by less than the largest
    /// gain of a single token, over the number of tokens.
    pub mean: AnyReport,
}

/// The routes of all tokens within a budget.
///
/// ```
/// use dsmoe_train::oracle::{BudgetRoutes, run};
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
/// # let ids = [1, 5, 9, 2, 7, 3, 8, 4];
///
/// let options = OracleOptions {
///     budget: Some(0.5),
///     control: false,
///     ..OracleOptions::new(RouteKind::BigSkip, 4)
/// };
/// let oracle = Oracle { model: &mut model, source: &load, ids: &ids, options, state: None, made_by: "" };
/// let (_, tokens) = run(oracle, &mut |_, _, _| {})?;
/// let BudgetRoutes { each, mean } = tokens.budget.expect("it was asked for");
/// // Half a layer for each token is none.
/// assert!(each.iter().all(|&route| tokens.routes[route as usize] == "00"));
/// let layers = mean.iter().map(|&route| tokens.routes[route as usize].matches('1').count());
/// assert!(layers.sum::<usize>() as f64 <= 0.5 * mean.len() as f64);
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BudgetRoutes {
    /// The route of every token whose level is up to the budget.
    pub each: Vec<u32>,
    /// The routes whose mean level is.
    pub mean: Vec<u32>,
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
/// # let options = OracleOptions { exact_up_to: 16, control: false, ..OracleOptions::new(RouteKind::BigSkip, 4) };
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
/// # let options = OracleOptions { exact_up_to: 16, control: false, ..OracleOptions::new(RouteKind::BigSkip, 4) };
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
    /// The best routes within a budget; none without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetRoutes>,
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
/// # let options = OracleOptions { exact_up_to: 16, control: false, ..OracleOptions::new(RouteKind::BigSkip, 4) };
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
