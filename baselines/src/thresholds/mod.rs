//! Activation sparsity without training: inputs of linears below a threshold are skipped.
//!
//! ```text
//! x_i stays where |x_i| > theta     sites of a layer: attention (q, k, v), heads (o), ffn (gate, up), neurons (down)
//! uniform  theta the quantile of |x| over all calibration tokens, the same share of every site
//! teal     as uniform, with shares by linear: inside a layer the linear whose loss of inputs moves the layer's output least
//!          loses the next ones
//! cats     neurons whose gate |act(g)| is below the quantile are skipped: their rows of up and columns of down
//! search   site by site in the order of the pass, the smallest share with which the loss stays below a tolerance times the
//!          loss before; theta the mean over tokens of the quantile of |x| within a token
//! ```
//! (search: Knunyants et al., AICAS 2025, arXiv 2501.16337, from its code; TEAL: Liu et al., arXiv 2408.14690; CATS: Lee et al.,
//! arXiv 2404.08763.) Two repairs of the released search: where no share passes, the site keeps all inputs, and the share
//! that is reported is the one that tokens used. The budget is reached by the tolerance, or by a factor on all shares. A tolerance
//! that is given decides by itself what a search skips, and has no budget: 1 skips nothing, also where skipping lowers the loss
//! of the text, and an infinite one takes the smallest share of every site.

mod allocate;
mod measure;
mod quantile;
mod search;
mod settings;
#[cfg(test)]
mod tests;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::calibrate::{LayerStream, StateScorer, check_text};
use dsmoe_core::kept::LayerThresholds;

use crate::error::{Error, Result};
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::neurons::{Output, at, check_masks};
use crate::settings::{Entry, SettingValues, Settings as _, wrong};
use allocate::LayerShares;
use measure::{used, weights};
use settings::{Choose, Settings, Tolerance};

/// The method `thresholds`.
pub(crate) static THRESHOLDS: Entry<Settings> = Entry {
    name: "thresholds",
    summary: "inputs of linears below a threshold are skipped (R-LLM, TEAL, CATS); no weight changes; any budget",
    ..Entry::new(configure)
};

fn configure(settings: Settings) -> Result<Box<dyn Configured>> {
    if !(settings.step > 0.0 && settings.step <= 1.0) {
        return Err(wrong::<Settings>("step", settings.step));
    }
    let defaults = Settings::default();
    if settings.choose != Choose::Teal && settings.step != defaults.step {
        return Err(Error::setting("step", "is for teal alone", "leave it out, or use choose=teal"));
    }
    if settings.choose != Choose::Search && settings.candidates != defaults.candidates {
        return Err(Error::setting(
            "candidates",
            "are for search alone",
            "leave it out, or use choose=search",
        ));
    }
    if settings.choose != Choose::Search && settings.tolerance.is_some() {
        return Err(Error::setting("tolerance", "is for search alone", "leave it out, or use choose=search"));
    }
    Ok(Box::new(Thresholds(settings)))
}

/// Thresholds of activations with their settings.
struct Thresholds(Settings);

/// The smallest share of the linears that is asked for.
const LEAST_USED: f64 = 0.05;
/// Difference of a share from the one asked for that is near enough.
const NEAR: f64 = 0.001;
/// Passes over the calibration text that bring the share near to the one asked for.
const PASSES: usize = 6;
/// Searches with different tolerances.
const SEARCHES: usize = 7;
/// The text of [`Plan::reached_by`] where the budget allows all weights.
const NOTHING_SKIPPED: &str = "nothing skipped";
/// Tolerances minus 1 between which that of a search lies.
const TOLERANCES: [f64; 2] = [1e-5, 1.0];

impl Thresholds {
    /// Returns the share of the linears' weights that a token may use.
    fn share(&self, config: &Config, budget: Budget) -> Result<f64> {
        if !config.is_dense() {
            return Err(Error::model("has experts or thresholds", "use a dense model"));
        }
        let (total, linears) =
            (Accounting::of(config).total as f64, weights(config).iter().flatten().sum::<f64>());
        let least = match self.0.choose {
            Choose::Cats => {
                let skipped: f64 = weights(config).iter().map(|weights| weights[5] + weights[6]).sum();
                1.0 - skipped * (1.0 - LEAST_USED) / linears
            }
            _ => LEAST_USED,
        };
        let share = 1.0 - (total - budget.params(total as u64)) / linears;
        if !(least..=1.0 + 1e-9).contains(&share) {
            let problem = match share {
                none if none <= 0.0 => "leaves none of the weights of the linears".to_owned(),
                share => format!("leaves {share:.3} of the weights of the linears"),
            };
            let least = (total - linears * (1.0 - least)).ceil();
            let problem = match self.0.choose {
                Choose::Cats => problem + ", and cats skips none of attention and of gates",
                _ => problem,
            };
            return Err(Error::out_of_reach(budget, problem, [least, total], total as u64));
        }
        if self.0.tolerance.is_some() && share < 1.0 - 1e-9 {
            let problem = "decides what is skipped, so that no budget below 100% can be reached";
            return Err(Error::setting("tolerance", problem, "give the budget 100%, or leave it out"));
        }
        Ok(share.min(1.0))
    }

    /// Reports whether the model with that share of the linears' weights, or with the tolerance that is given, skips no input.
    fn skips_nothing(&self, share: f64) -> bool {
        self.0.tolerance.map_or(share >= 1.0, Tolerance::skips_nothing)
    }

    fn planned(&self, config: &Config, share: f64, reached_by: String) -> Plan {
        let total = Accounting::of(config).total as f64;
        let linears: f64 = weights(config).iter().flatten().sum();
        let activated = total - linears * (1.0 - share);
        let settings =
            vec![("share of the linears' weights that a token uses".to_owned(), format!("{share:.4}"))];
        Plan { total, activated, reached_by, settings, ..Plan::default() }
    }

    /// Returns thresholds that leave about the share, and what they were reached by.
    fn choose(&self, job: &Job<'_>, share: f64, progress: &mut dyn FnMut(Progress)) -> Result<Found> {
        if self.skips_nothing(share) {
            let layers = vec![LayerThresholds::NONE; Config::load(job.model)?.num_layers];
            return Ok(Found { share: 1.0, layers, reached_by: NOTHING_SKIPPED.to_owned() });
        }
        if self.0.choose == Choose::Search {
            return self.search(job, share, progress);
        }
        let shares = allocate::survey(job, &self.0, 1.0 - share, progress)?;
        let most = shares.iter().map(LayerShares::most).fold(f64::MAX, f64::min);
        // Shares of skipped weights hold for inputs without thresholds: those before move the inputs of later sites.
        let (mut low, mut high) = ((0.0, 1.0), (most, 0.0));
        let mut factor = allocate::factor(&shares, 1.0 - share).min(most);
        let mut best: Option<Found> = None;
        let count = shares.len();
        for pass in 0..PASSES {
            let mut show =
                |done: usize| at(progress, "measuring shares", pass * count + done, PASSES * count);
            let mut layers: Vec<LayerThresholds> =
                shares.iter().map(|of_layer| of_layer.thresholds(factor)).collect();
            let found = used(job, &mut layers, pass, &mut show)?;
            let reached_by = format!("{} shares times {factor:.4}", self.name());
            if best.as_ref().is_none_or(|best| (found - share).abs() < (best.share - share).abs()) {
                best = Some(Found { share: found, layers, reached_by });
            }
            if (found - share).abs() < NEAR {
                break;
            }
            *(if found > share { &mut low } else { &mut high }) = (factor, found);
            factor = low.0 + (high.0 - low.0) * ((low.1 - share) / (low.1 - high.1)).clamp(0.05, 0.95);
        }
        at(progress, "measuring shares", PASSES * count, PASSES * count);
        Ok(best.expect("a pass was made"))
    }

    fn search(&self, job: &Job<'_>, share: f64, progress: &mut dyn FnMut(Progress)) -> Result<Found> {
        let mut scorer = StateScorer::new(&LayerStream::open(job.model, &[])?)?;
        let candidates = search::candidates(self.0.candidates);
        let [mut low, mut high] = TOLERANCES.map(f64::ln);
        let mut best: Option<Found> = None;
        let rounds = if self.0.tolerance.is_some() { 1 } else { SEARCHES };
        for round in 0..rounds {
            let tolerance = self.0.tolerance.unwrap_or_else(|| Tolerance(1.0 + (0.5 * (low + high)).exp()));
            let mut show = |done, all| {
                let (done, all) = ((round * all + done) as u64, (rounds * all) as u64);
                progress(Progress { stage: "searching", done, total: all });
            };
            let mut layers = search::search(&mut scorer, job, &candidates, (tolerance.0, round), &mut show)?;
            let sites = layers.len() * search::SITES;
            let found = used(job, &mut layers, round, &mut |_| show(sites, sites))?;
            if best.as_ref().is_none_or(|best| (found - share).abs() < (best.share - share).abs()) {
                let reached_by = format!("search with tolerance {tolerance}");
                best = Some(Found { share: found, layers, reached_by });
            }
            if (found - share).abs() < NEAR {
                break;
            }
            *(if found > share { &mut low } else { &mut high }) = 0.5 * (low + high);
        }
        Ok(best.expect("a search was made"))
    }

    fn name(&self) -> String {
        self.0.values()["choose"].as_str().unwrap_or_default().to_owned()
    }
}

/// Thresholds and the share of the linears' weights that calibration tokens used with them.
struct Found {
    share: f64,
    layers: Vec<LayerThresholds>,
    reached_by: String,
}

impl Configured for Thresholds {
    fn needs_calibration(&self) -> bool {
        true
    }

    fn continues(&self) -> bool {
        true
    }

    fn resolved(&self) -> SettingValues {
        self.0.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        let share = self.share(config, budget)?;
        let found_by = match self.0.tolerance {
            Some(tolerance) if tolerance.skips_nothing() => {
                return Ok(self.planned(config, share, NOTHING_SKIPPED.to_owned()));
            }
            Some(tolerance) => format!("search with tolerance {tolerance}"),
            None => self.name(),
        };
        Ok(self.planned(config, share, format!("{found_by}, to be found on calibration text")))
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        let share = self.share(&config, job.budget)?;
        check_text(job.calibration, 1, "thresholds")?;
        check_masks(job)?;
        let found = self.choose(job, share, progress)?;
        let thresholds: Vec<LayerThresholds> = found.layers;
        let mut pruned = config.clone();
        pruned.thresholds = Some(thresholds.clone());
        let stream = LayerStream::open(job.model, &[])?;
        Output::create(job, &stream, &pruned)?.finish(&stream)?;
        let names = ["attention", "heads", "ffn", "neurons"];
        let groups = [0..3, 3..4, 4..6, 6..7];
        let all = weights(&config);
        let measured = names.iter().zip(groups).map(|(name, group)| {
            let (mut sum, mut whole) = (0.0, 0.0);
            for (thresholds, weights) in thresholds.iter().zip(&all) {
                for i in group.clone() {
                    sum += thresholds.used[i] * weights[i];
                    whole += weights[i];
                }
            }
            (format!("used share of {name}"), sum / whole)
        });
        Ok(Made { plan: self.planned(&config, found.share, found.reached_by), measured: measured.collect() })
    }
}
