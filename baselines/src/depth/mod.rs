//! Depth pruning: whole layers are removed, those whose absence changes the model least.
//!
//! ```text
//! angle  arccos(cos(x before the layers, x after them)) / pi, mean over tokens; x the residual stream of the dense model
//! kl     mean over tokens of KL(dense model's distribution of the next token | that without the layers)
//! independent: the layers of the smallest scores of their own     consecutive: the block of the smallest score
//! greedy: one layer after the other, each time the one without which what is left is nearest to the dense model
//! ```
//! (Angle: Gromov et al., ICLR 2025, arXiv 2403.17887, for blocks; Men et al., ACL Findings 2025, arXiv 2403.03853, ranks
//! single layers by the cosine. Greedy removal by the output: Song et al., ICML 2024, arXiv 2402.09025.)

mod score;
#[cfg(test)]
mod tests;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::calibrate::check_text;
use dsmoe_core::checkpoint::{
    Dtype, OutputDir, TensorInfo, check_llama_tensors, copy_companions, open_model, tensor_names,
};
use dsmoe_core::masks::{MASKS_FILE, Masks};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::{Entry, SettingValues, Settings as _, settings, wrong};

/// The method `depth`.
pub(crate) static DEPTH: Entry<Settings> = Entry {
    name: "depth",
    summary: "depth pruning: layers without which the output changes least are removed; budgets in steps of a layer",
    ..Entry::new(configure)
};

settings! {
    /// Settings of depth pruning.
    pub(crate) struct Settings {
        /// Score of layers: kl (change of the final distribution) or angle (turn of the residual stream).
        pub score: Score = Score::Kl,
        /// Choice of layers: greedy (one by one; kl only), independent (each by its own score) or consecutive (one block).
        pub choice: Choice = Choice::Greedy,
        /// Layers that stay, e.g. as many as take the time of another model; by default those that the budget pays for.
        pub layers: Option<usize> = None,
        /// Calibration tokens that scores are taken on, at the most; at least 2.
        pub tokens: usize = 2048,
    }
}

/// The score of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Score {
    /// The divergence of the final distribution.
    Kl,
    /// The angle between the residual stream before and after.
    Angle,
}

/// The choice of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Choice {
    /// One layer after the other, given those that are gone.
    Greedy,
    /// The layers of the smallest scores of their own.
    Independent,
    /// The block of neighbours of the smallest score.
    Consecutive,
}

fn configure(settings: Settings) -> Result<Box<dyn Configured>> {
    if settings.tokens < 2 {
        return Err(wrong::<Settings>("tokens", settings.tokens));
    }
    if settings.score == Score::Angle && settings.choice == Choice::Greedy {
        let help = "use independent or consecutive, or the score kl";
        return Err(Error::setting("choice", "cannot be greedy with the score angle", help));
    }
    Ok(Box::new(Depth(settings)))
}

/// Depth pruning with its settings.
struct Depth(Settings);

impl Depth {
    /// Returns the number of layers that stay.
    fn count(&self, config: &Config, budget: Budget) -> Result<usize> {
        let layers = config.num_layers;
        if !config.is_dense() {
            let help = "use a dense model, such as the one that this was made from";
            return Err(Error::model("has experts or thresholds", help));
        }
        if let Some(count) = self.0.layers {
            return match (1..=layers).contains(&count) {
                true => Ok(count),
                false => Err(Error::setting("layers", format!("is {count}"), format!("use 1 to {layers}"))),
            };
        }
        let dense = Accounting::of(config).total as f64;
        let of_one = self.params_of_a_layer(config);
        let target = budget.params(dense as u64);
        let count = layers as f64 - (dense - target) / of_one;
        if count < 0.5 || target > dense * 1.01 {
            let least = dense - of_one * (layers - 1) as f64;
            let problem = format!("is that of {count:.2} of {layers} layers");
            return Err(Error::out_of_reach(budget, problem, [least, dense], dense as u64));
        }
        Ok((count.round() as usize).clamp(1, layers))
    }

    /// Returns the parameters of a layer, mean over layers.
    fn params_of_a_layer(&self, config: &Config) -> f64 {
        let counts = Accounting::of(config);
        let outside = counts.embedding + config.hidden as u64;
        (counts.total - outside) as f64 / config.num_layers as f64
    }

    /// Plans the model of the layers `kept`.
    fn planned(&self, config: &Config, kept: &[usize]) -> Result<(Config, Plan)> {
        let pruned = config.with_layers(kept).ok_or_else(|| {
            let problem =
                "gives layers windows or rotations by their number, and a removal would change those";
            Error::model(problem, "use flap or llm-pruner-block")
        })?;
        let reached_by = format!("{} of {} layers", kept.len(), config.num_layers);
        let plan = Plan::dense(Accounting::of(&pruned).total as f64, reached_by);
        Ok((pruned, plan))
    }
}

impl Configured for Depth {
    fn needs_calibration(&self) -> bool {
        true
    }

    fn resolved(&self) -> SettingValues {
        self.0.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        let count = self.count(config, budget)?;
        let dense = Accounting::of(config).total as f64;
        let params = dense - self.params_of_a_layer(config) * (config.num_layers - count) as f64;
        Ok(Plan::dense(params, format!("{count} of {} layers", config.num_layers)))
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        let count = self.count(&config, job.budget)?;
        check_text(job.calibration, 1, "scores of layers")?;
        if Masks::load(job.model)?.is_some() {
            let help = "use the dense model it was made from";
            return Err(Error::model(format!("has {MASKS_FILE}"), help));
        }
        let seq = job.calibration[0].len();
        let sequences = (self.0.tokens / seq).clamp(1, job.calibration.len());
        let text = &job.calibration[..sequences];
        let choose = score::Choose { choice: self.0.choice, count, layers: config.num_layers };
        let (removed, measured) = match self.0.score {
            Score::Kl => choose.by_kl(job.model, text, progress)?,
            Score::Angle => choose.by_angle(job, text, progress)?,
        };
        let kept: Vec<usize> = (0..config.num_layers).filter(|i| !removed.contains(i)).collect();
        let (pruned, plan) = self.planned(&config, &kept)?;
        write(job, &config, &pruned, &kept, progress)?;
        let list = kept.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let settings = vec![("layers that stay".to_owned(), list)];
        Ok(Made { plan: Plan { settings, ..plan }, measured })
    }
}

/// Writes the layers `kept` of the dense model of `config` as the model of `pruned`.
fn write(
    job: &Job<'_>,
    config: &Config,
    pruned: &Config,
    kept: &[usize],
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let checkpoint = open_model(job.model, config)?;
    let stored = check_llama_tensors(config, &checkpoint)?;
    let output = OutputDir::create_on(job.comm, job.model, job.out, job.force)?;
    let pairs: Vec<(TensorInfo, String)> = tensor_names(pruned)
        .map(|(name, shape)| {
            let source = source_name(&name, kept);
            let source = stored.stored_name(&source).to_owned();
            let dtype = checkpoint.tensor(&source).map_or(Dtype::F32, |view| view.dtype);
            let name = stored.stored_name(&name).to_owned();
            (TensorInfo { name, dtype, shape }, source)
        })
        .collect();
    let infos = pairs.iter().map(|(info, _)| info.clone()).collect();
    let mut writer = output.model_writer(pruned, infos)?;
    for (done, (info, source)) in (0..).zip(&pairs) {
        progress(Progress { stage: "writing", done, total: pairs.len() as u64 });
        writer.write(&info.name, &checkpoint.bytes(source)?)?;
    }
    writer.finish()?;
    output.commit_with(|dir| {
        copy_companions(job.model, dir)?;
        pruned.save(dir)
    })?;
    Ok(())
}

/// Returns the name that the tensor `name` of the pruned model has in the dense one.
fn source_name(name: &str, kept: &[usize]) -> String {
    const PREFIX: &str = "model.layers.";
    let layer = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('.'));
    match layer.and_then(|(number, rest)| Some((kept.get(number.parse::<usize>().ok()?)?, rest))) {
        Some((layer, rest)) => format!("{PREFIX}{layer}.{rest}"),
        None => name.to_owned(),
    }
}
