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
//! budget        the oracle among the levels up to a budget, and that of routes whose mean level is; see `within`
//! ```
//! A model of few routes has all of them measured; of others a search keeps, from the first layer on, the best beginnings of every
//! level, with the layers behind as they are by default. What earlier tokens of a window do is said by the context:
//!
//! ```text
//! same      they take the route that is tried, too: a pass is a text
//! dense     they take the default route: a token sees their keys and values, and its own on the route that is tried
//! greedy    they have taken their own best routes, of all levels; position after position, all routes are tried at each. The best
//!           one is that of the lowest loss, of the lowest level among equals. Routes are those that a search in the context dense finds
//! ```
//! The copies of a control see the same earlier tokens as the routes: in the context greedy those of the model on the routes that its
//! tokens took.

mod context;
mod noise;
mod report;
mod routes;
mod state;
mod tally;
#[cfg(test)]
mod tests;
mod within;

use std::path::Path;

use dsmoe_core::{Inference, Model};
use dsmoe_datasets::eval_windows;
use dsmoe_kernels::Precision;
use serde::Serialize;

pub use context::RouteContext;
pub use report::{
    AnyReport, BudgetReport, BudgetRoutes, ControlReport, LevelReport, LevelRoutes, OracleReport, OwnChoice,
    TokenRoutes,
};
pub use routes::{RouteKind, RouteSpace};

use crate::error::{Error, Result};
use crate::eval::{EvalOptions, evaluate_detailed};
use context::{Contexts, finite};
use noise::{Copies, MOST_PASSES};
use routes::{Digits, keep_best, level, name};
use state::{Control, Greedy, State, Store};
use tally::{Level, least_of_all, mean, mean_of, rank_correlation};
use within::{Choices, Choose};

/// Routes of one run at the most.
pub const MOST_ROUTES: u64 = 1 << 16;
/// The levels of tokens within a budget: of each, and in the mean.
const WAYS: [Choose; 2] = [|choices, budget| choices.each(budget), |choices, budget| choices.mean(budget)];

/// Options of an oracle.
///
/// ```
/// use dsmoe_train::oracle::{OracleOptions, RouteContext, RouteKind, plan};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// // Two layers of each token in the mean, where the earlier tokens of its window run all.
/// let options = OracleOptions {
///     budget: Some(2.0),
///     context: RouteContext::Dense,
///     ..OracleOptions::new(RouteKind::BigSkip, 8)
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
    /// The largest level of tokens within a budget, 0 to the largest of all; fractions count in the mean over tokens.
    pub budget: Option<f64>,
    /// The routes of the earlier tokens of a window.
    pub context: RouteContext,
    /// Measure the control.
    pub control: bool,
    /// Precision of the control's copies, that of the model.
    pub precision: Precision,
    /// Seed of the control's noise.
    pub seed: u64,
}

impl OracleOptions {
    /// Measures all routes of up to 1024, or searches with 64 beginnings, on windows of `seq` tokens in f32, with the control and without
    /// a budget. Earlier tokens take the route that is tried.
    pub fn new(kind: RouteKind, seq: usize) -> OracleOptions {
        OracleOptions {
            kind,
            seq,
            exact_up_to: 1 << 10,
            beam: 64,
            budget: None,
            context: RouteContext::Same,
            control: true,
            precision: Precision::F32,
            seed: 0,
        }
    }
}

/// The work of an oracle.
///
/// ```
/// use dsmoe_train::oracle::{OracleOptions, OraclePlan, plan};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
/// # let kind = dsmoe_train::oracle::RouteKind::BigSkip;
/// # let options = OracleOptions { control: false, ..OracleOptions::new(kind, 8) };
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
/// let options = OracleOptions::new(RouteKind::BigSkip, 4);
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
    let most = (levels - 1) as f64;
    if let Some(budget) = options.budget.filter(|budget| !(0.0..=most).contains(budget)) {
        return Err(Error::field("budget", budget, format!("0 to {most}, the largest level of this model")));
    }
    let each = (options.beam / levels).max(1) as u64;
    let measured = all.unwrap_or(each * levels as u64 * most_options);
    let search = if all.is_some() { 0 } else { measured * (layers as u64 - 1) };
    let control = if options.control { measured + levels as u64 * MOST_PASSES } else { 0 };
    // Passes that earlier tokens take: on the default route, and on their best ones.
    let context = match options.context {
        RouteContext::Same => 0,
        RouteContext::Dense => 1,
        RouteContext::Greedy => 1 + u64::from(all.is_none()),
    };
    Ok(OraclePlan {
        layers,
        all_routes: space.count(MOST_ROUTES),
        exact: all.is_some(),
        levels,
        predicted: windows.iter().map(|window| window.end - window.start - 1).sum(),
        passes: measured + search + control + context,
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
/// # let options = OracleOptions { control: false, ..OracleOptions::new(RouteKind::BigSkip, 4) };
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
    let mut search = Search { model, space, ids, options, contexts: None, store, state };

    search.model.set_routes(&search.space.routes(&[]))?;
    let (default, detail) = search.measure_in_detail()?;
    if options.context != RouteContext::Same {
        let mut contexts = Contexts::new(search.model, ids, options.seq)?;
        // A greedy oracle needs them for its search alone.
        if options.context == RouteContext::Dense || !plan.exact {
            contexts.fill(search.model)?;
        }
        search.contexts = Some(contexts);
    }
    let routes = match plan.exact {
        true => (0..plan.all_routes.unwrap_or(0)).map(|i| search.space.nth(i)).collect(),
        false => search.beams(progress)?,
    };
    match options.context {
        RouteContext::Greedy => search.greedily(&routes, progress)?,
        RouteContext::Same | RouteContext::Dense => search.levels(&routes, progress)?,
    }
    if options.control {
        search.controls(source, &routes, progress)?;
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
    /// The caches of earlier tokens, which tokens attend to; none where all tokens take the same route.
    contexts: Option<Contexts>,
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
    Ok(Detail { losses: finite(detail.losses)?, active: detail.active })
}

impl Search<'_> {
    fn measure_in_detail(&self) -> Result<(f64, Detail)> {
        let detail = measure(self.model, self.ids, self.options.seq)?;
        Ok((mean(&detail.losses), detail))
    }

    fn losses(&mut self, route: &[u16]) -> Result<Vec<f32>> {
        self.model.set_routes(&self.space.routes(route))?;
        match &mut self.contexts {
            None => Ok(measure(self.model, self.ids, self.options.seq)?.losses),
            Some(contexts) => contexts.losses(self.model),
        }
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

    /// Measures all `routes` where the earlier tokens of a window have taken their best ones.
    fn greedily(&mut self, routes: &[Digits], progress: &mut OracleProgress<'_>) -> Result<()> {
        let Search { model, space, contexts: Some(contexts), store, state, .. } = self else { return Ok(()) };
        contexts.clear();
        let (tokens, groups) = (contexts.tokens(), contexts.len());
        if state.greedy.is_none() {
            state.levels = vec![Level::unseen(tokens); space.levels()];
            state.greedy = Some(Greedy { groups: 0, sums: vec![0; routes.len()] });
        }
        let positions: Vec<u64> = (0..groups).map(|group| contexts.shape(group)[1] as u64).collect();
        let all: u64 = positions.iter().sum();
        while let Some(Greedy { groups: done, sums }) = &mut state.greedy
            && (*done as usize) < groups
        {
            let group = *done as usize;
            let [windows, seq] = contexts.shape(group);
            let before: u64 = positions[..group].iter().sum();
            for position in 0..seq {
                progress("routes", before + position as u64, all);
                let mut best = vec![(f32::INFINITY, usize::MAX); windows];
                let mut chosen = vec![0; windows];
                for ((number, route), sum) in (0..).zip(routes).zip(&mut *sums) {
                    model.set_routes(&space.routes(route))?;
                    let losses = contexts.losses_at(model, (group, position))?;
                    let of = level(route);
                    for (window, &loss) in losses.iter().enumerate() {
                        state.levels[of].see(number, contexts.token(group, window, position), loss);
                        *sum = (f64::from_bits(*sum) + f64::from(loss)).to_bits();
                        if (loss, of) < best[window] {
                            (best[window], chosen[window]) = ((loss, of), number);
                        }
                    }
                }
                // No token sees the last one of its window.
                if position + 1 < seq {
                    contexts.take((&mut **model, &*space), routes, (group, position), &chosen)?;
                }
            }
            *done += 1;
            store.keep(state)?;
        }
        if let Some(Greedy { sums, .. }) = state.greedy.as_ref().filter(|_| state.done == 0) {
            for ((number, route), sum) in (0..).zip(routes).zip(sums) {
                state.levels[level(route)].count(number, f64::from_bits(*sum) / tokens as f64);
            }
            state.done = routes.len() as u64;
        }
        Ok(())
    }

    /// Lets the tokens of a greedy oracle that was interrupted behind its routes take their best ones again.
    fn take_again(&mut self, routes: &[Digits]) -> Result<()> {
        let Search { model, space, contexts: Some(contexts), state, .. } = self else { return Ok(()) };
        let best = least_of_all(state.levels.iter());
        for group in 0..contexts.len() {
            let [windows, seq] = contexts.shape(group);
            // A group is full or empty.
            let missing = if contexts.is_full(group) { 0 } else { seq - 1 };
            for position in 0..missing {
                let place = |window: usize| contexts.token(group, window, position);
                let chosen: Vec<u32> = (0..windows).map(|window| best[place(window)].1).collect();
                contexts.take((&mut **model, &*space), routes, (group, position), &chosen)?;
            }
        }
        Ok(())
    }

    /// Measures the control of every level, beside the routes of those numbers.
    fn controls(
        &mut self,
        source: &dyn Fn() -> Result<Model>,
        routes: &[Digits],
        progress: &mut OracleProgress<'_>,
    ) -> Result<()> {
        let levels = self.state.levels.len();
        if self.state.controls.len() == levels {
            return Ok(());
        }
        self.take_again(routes)?;
        let default = self.space.routes(&[]);
        let mut copies = Copies::new(source()?, self.options.precision, self.options.seed, default);
        let (ids, seq, contexts) = (self.ids, self.options.seq, &mut self.contexts);
        let mut measure = |model: &Inference| match contexts {
            None => Ok(measure(model, ids, seq)?.losses),
            Some(contexts) => contexts.losses(model),
        };
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
            context: self.options.context,
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
            budget: self.options.budget.and_then(|budget| {
                let [each, mean] = WAYS.map(|choose| self.within(budget, choose));
                Some(BudgetReport { level: budget, each: each?, mean: mean? })
            }),
            own_choice: self.own_choice(own),
        }
    }

    /// Returns the oracle and the control of the levels that tokens take within a budget.
    fn within(&self, budget: f64, choose: Choose) -> Option<AnyReport> {
        let State { levels, controls, .. } = &self.state;
        let choices = Choices::of(levels.iter().enumerate());
        let chosen = choose(&choices, budget)?;
        let (oracle, mean_level) = (choices.loss(&chosen), choices.mean_level(&chosen));
        let beside = levels.iter().zip(controls).map(|(level, control)| match control.noise {
            Some(_) => &control.copies,
            None => level,
        });
        let control = controls.iter().any(|control| control.noise.is_some()).then(|| {
            let choices = Choices::of(beside.enumerate());
            Some(choices.loss(&choose(&choices, budget)?))
        });
        let control = control.flatten();
        Some(AnyReport { oracle, mean_level, control, beyond: control.map(|control| control - oracle) })
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
            budget: self.options.budget.and_then(|budget| {
                let choices = Choices::of(levels.iter().enumerate());
                let [each, mean] = WAYS.map(|choose| Some(choices.members(&choose(&choices, budget)?)));
                Some(BudgetRoutes { each: each?, mean: mean? })
            }),
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
