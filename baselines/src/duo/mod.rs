//! Duo-LLM (Alizadeh et al., arXiv 2410.10846): every layer has a big and a small FFN, and every token takes one of them. The
//! FFNs are trained with random routes, so that every route works; then a router learns which tokens need the big one and, with
//! `skip=true`, which need neither.
//!
//! ```text
//! duo          big = the dense FFN, small = its neurons of the largest importance; random routes
//! dsmoe train  both FFNs learn under random routes
//! duo-router   the same weights, routed by a router
//! dsmoe train  the router learns; the share of big tokens is held
//! budget       activated = rest + small + share (big - small)
//!              skip=true   rest + share (big + small);  a token adds big, small or nothing
//! ```
//! The weight of the mean P is adjusted until the share holds, as for DSMoE; `hold = "squared"` trains with the paper's loss in its
//! place, `hold_weight (mean P - budget)^2`, whose mean is over the tokens and layers of a micro-batch. With `skip=true` what is
//! held is the share of the neurons of both FFNs that a token uses, so that a skipped token is cheaper than one through the small
//! FFN: P is then sum over big and small of P neurons / (neurons of both). The temperature of the router stays unless
//! `router_temperature` moves it over the steps of a run. Random routes do not skip.

mod ffn;
mod spec;

use std::path::Path;
use std::sync::Arc;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::calibrate::check_text;
use dsmoe_core::checkpoint::{Checkpoint, Dtype, TensorInfo, open_model};
use dsmoe_core::config::CONFIG_FILE;
use dsmoe_core::ffn::SMALL_FFN;
use dsmoe_kernels::rng::Rng;

pub use ffn::DuoFfn;
pub(crate) use spec::READER;
pub use spec::{DuoSpec, Stage};

use crate::error::{Error, Result};
use crate::experts::importance;
use crate::method::{Budget, Configured, Job, Made, Plan, Progress, Source};
use crate::rewrite::{Additions, rewrite};
use crate::settings::{Entry, SettingValues, Settings as _, settings, wrong};
use crate::topk::open_dense;
use spec::{has_biases, spec_of};

/// Standard deviation of a router's first weights.
const ROUTER_STD: f32 = 0.02;
const LARGEST_RATIO: usize = 1 << 16;

/// The method `duo`.
pub(crate) static DUO: Entry<Settings> = Entry {
    name: "duo",
    summary: "Duo-LLM: a small FFN beside the dense one, random routes in training; budgets from all small to all big",
    ..Entry::new(|settings| match settings.check() {
        Some(error) => Err(error),
        None => Ok(Box::new(Duo(settings))),
    })
};

/// The method `duo-router`.
pub(crate) static DUO_ROUTER: Entry<RouterSettings> = Entry {
    name: "duo-router",
    summary: "Duo-LLM: a model of `duo`, routed by a router that training teaches; budgets from all small (with skip=true all skipped) to all big",
    source: Source::Experts,
    ..Entry::new(|settings| match (1e-3..=1e3).contains(&settings.temperature) {
        true => Ok(Box::new(DuoRouter(settings))),
        false => Err(wrong::<RouterSettings>("temperature", settings.temperature)),
    })
};

settings! {
    /// Settings of Duo-LLM.
    pub(crate) struct Settings {
        /// Neurons of the big FFN for each of the small one, 1 to 65536.
        pub ratio: usize = 16,
        /// First weights of the small FFN: important (the neurons of the dense one whose removal changes the loss of the
        /// calibration text most, to first order) or random.
        pub start: Start = Start::Important,
        /// Probability of the big FFN in training with random routes, 0 to 1.
        pub probability: f64 = 0.5,
    }
}

settings! {
    /// Settings of the router of Duo-LLM.
    pub(crate) struct RouterSettings {
        /// Number that divides the router's logits in training, 0.001 to 1000.
        pub temperature: f64 = 0.5,
        /// Let the router skip both FFNs for a token: true or false.
        pub skip: bool = false,
    }
}

/// The first weights of small FFNs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Start {
    /// The most important neurons of the big one.
    Important,
    /// Normal values.
    Random,
}

impl Settings {
    fn check(&self) -> Option<Error> {
        if !(1..=LARGEST_RATIO).contains(&self.ratio) {
            return Some(wrong::<Settings>("ratio", self.ratio));
        }
        (!(0.0..=1.0).contains(&self.probability)).then(|| wrong::<Settings>("probability", self.probability))
    }
}

/// Duo-LLM with its settings.
struct Duo(Settings);

/// The second stage of Duo-LLM with its settings.
struct DuoRouter(RouterSettings);

fn with_spec(config: &Config, spec: DuoSpec) -> Config {
    let mut config = config.clone();
    config.ffn = Some(Arc::new(spec));
    config
}

/// Returns the share of a model whose tokens all take the big FFN: of tokens or, where they may skip, of the neurons of both FFNs.
fn all_big(config: &Config, spec: DuoSpec) -> f64 {
    if !spec.skip {
        return 1.0;
    }
    let big: usize = config.layers().map(|shape| shape.intermediate).sum();
    big as f64 / (big + config.num_layers * spec.small) as f64
}

/// Returns `spec` with the share that reaches `budget`, a part of `source` parameters, and the plan of the model.
fn choose(config: &Config, spec: DuoSpec, budget: Budget, source: u64) -> Result<(DuoSpec, Plan)> {
    let counts = Accounting::of(&with_spec(config, spec));
    let activated = |share: f64| counts.activated(share * spec.experts() as f64);
    let largest = all_big(config, spec);
    let [least, most] = [0.0, largest].map(activated);
    let asked = budget.params(source);
    let share = (asked - least) / (most - least);
    // A budget of the dense model's own size leaves out the router.
    let slack = 1e-2;
    if !(-slack..=1.0 + slack).contains(&share) {
        let cheapest = if spec.skip { "below all skipped" } else { "below all small" };
        let side = if share < 0.0 { cheapest } else { "above all big" };
        return Err(Error::out_of_reach(budget, format!("is {side}"), [least, most], source));
    }
    let share = share.clamp(0.0, 1.0) * largest;
    let spec = DuoSpec { share, ..spec };
    let used = if spec.skip { "of the neurons of both FFNs" } else { "of tokens through the big FFN" };
    let plan = Plan {
        total: counts.total as f64,
        activated: activated(share),
        reached_by: format!("{:.1}% {used}", 100.0 * share),
        settings: vec![("small neurons".to_owned(), spec.small.to_string())],
        active_target: (spec.stage == Stage::Router).then_some(share),
        ..Plan::default()
    };
    Ok((spec, plan))
}

impl Duo {
    fn choose(&self, config: &Config, budget: Budget) -> Result<(DuoSpec, Plan)> {
        if has_biases(config) {
            return Err(Error::model("the FFNs have biases", "use a model whose FFNs have none"));
        }
        let narrowest = config.layers().map(|shape| shape.intermediate).min().unwrap_or(0);
        let small = narrowest / self.0.ratio;
        if small == 0 {
            let problem = format!("is {}, and layers have {narrowest} neurons", self.0.ratio);
            return Err(Error::setting("ratio", problem, "use a smaller one"));
        }
        let (stage, probability) = (Stage::Random, self.0.probability);
        let spec = DuoSpec { small, stage, probability, share: 1.0, temperature: 1.0, skip: false };
        choose(config, spec, budget, Accounting::of(config).total)
    }

    /// Returns the neurons of the big FFN that start the small one, of every layer.
    fn neurons(
        &self,
        job: &Job<'_>,
        small: usize,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Vec<u32>>> {
        check_text(job.calibration, 1, "the importance of neurons")?;
        let (text, labels) = (job.calibration, vec![0; job.calibration.len()]);
        let layers = importance::importances(job.model, text, &labels, 1, job.partial, progress)?;
        let best = |values: &Vec<f64>| {
            let mut order: Vec<u32> = (0..values.len() as u32).collect();
            order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]).then(a.cmp(&b)));
            order.truncate(small);
            order.sort_unstable();
            order
        };
        Ok(layers.iter().map(|groups| best(&groups[0])).collect())
    }
}

impl Configured for Duo {
    fn needs_calibration(&self) -> bool {
        self.0.start == Start::Important
    }

    fn continues(&self) -> bool {
        self.0.start == Start::Important
    }

    fn resolved(&self) -> SettingValues {
        self.0.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        Ok(self.choose(config, budget)?.1)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let (config, checkpoint) = open_dense(job.model)?;
        let (spec, plan) = self.choose(&config, job.budget)?;
        let neurons = match self.0.start {
            Start::Important => Some(self.neurons(job, spec.small, progress)?),
            Start::Random => None,
        };
        let written = with_spec(&config, spec);
        let source =
            Small { config: &config, checkpoint: &checkpoint, neurons, small: spec.small, seed: job.seed };
        let infos: Vec<TensorInfo> = (0..config.num_layers).flat_map(|layer| source.infos(layer)).collect();
        let values = |_: usize, name: &str| source.values(name);
        let additions = Additions { infos, values: &values, order: &|_| None, files: &|_| Ok(()) };
        rewrite(job, &written, &checkpoint, &additions, progress)?;
        Ok(Made { plan, measured: Vec::new() })
    }
}

impl Configured for DuoRouter {
    fn resolved(&self) -> SettingValues {
        self.0.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        Ok(self.choose(Path::new(""), config, budget)?.1)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        let (spec, plan) = self.choose(job.model, &config, job.budget)?;
        let checkpoint = open_model(job.model, &config)?;
        let (hidden, ways) = (config.hidden, spec.ways());
        let source = Routers { hidden, ways, checkpoint: &checkpoint, seed: job.seed };
        let infos = source.changed(config.num_layers);
        let values = |number: usize, name: &str| source.values(number, name);
        let additions = Additions { infos, values: &values, order: &|_| None, files: &|_| Ok(()) };
        rewrite(job, &with_spec(&config, spec), &checkpoint, &additions, progress)?;
        Ok(Made { plan, measured: Vec::new() })
    }
}

impl DuoRouter {
    fn choose(&self, dir: &Path, config: &Config, budget: Budget) -> Result<(DuoSpec, Plan)> {
        let Some(spec) = config.ffn.as_deref().and_then(spec_of) else {
            let help = "use a model that the method duo made";
            return Err(
                dsmoe_core::Error::field(&dir.join(CONFIG_FILE), "ffn.type", "is not duo", help).into()
            );
        };
        let RouterSettings { temperature, skip } = self.0;
        let spec = DuoSpec { stage: Stage::Router, temperature, skip, ..spec };
        choose(config, spec, budget, Accounting::of(config).total)
    }
}

/// The routers of a source whose rows are not those of `ways`.
struct Routers<'a> {
    hidden: usize,
    ways: usize,
    checkpoint: &'a Checkpoint,
    seed: u64,
}

impl Routers<'_> {
    /// Returns the tensors that replace the source's, of every layer; none if those have as many rows.
    fn changed(&self, layers: usize) -> Vec<TensorInfo> {
        let shape = vec![self.ways, self.hidden];
        let info = |layer: usize| {
            let name = format!("model.layers.{layer}.mlp.router.weight");
            TensorInfo { name, dtype: Dtype::F32, shape: shape.clone() }
        };
        let is_like = |info: &TensorInfo| self.rows(&info.name) == Some(self.ways);
        (0..layers).map(info).filter(|info| !is_like(info)).collect()
    }

    /// Returns the rows of a router of the source.
    fn rows(&self, name: &str) -> Option<usize> {
        self.checkpoint.tensor(name).and_then(|view| view.shape.first().copied())
    }

    /// Returns the rows of the source, and a random one for a way that it lacks; `number` is that of the replaced tensor.
    fn values(&self, number: usize, name: &str) -> Result<Vec<f32>> {
        let mut router = vec![0.0; self.rows(name).unwrap_or(0) * self.hidden];
        self.checkpoint.read_f32(name, &mut router)?;
        let kept = router.len();
        router.resize(self.ways * self.hidden, 0.0);
        if let Some(new) = router.get_mut(kept..) {
            let mut rng = Rng::new(self.seed, u64::from_be_bytes(*b"duo skip") ^ number as u64);
            rng.fill_normal(new, ROUTER_STD);
        }
        Ok(router)
    }
}

/// The small FFNs and the routers, before training.
struct Small<'a> {
    config: &'a Config,
    checkpoint: &'a Checkpoint,
    /// The neurons of the big FFNs that they start from; none for random values.
    neurons: Option<Vec<Vec<u32>>>,
    small: usize,
    seed: u64,
}

const PROJECTIONS: [&str; 3] = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"];

impl Small<'_> {
    fn infos(&self, layer: usize) -> Vec<TensorInfo> {
        let prefix = format!("model.layers.{layer}.mlp.");
        let mut infos: Vec<TensorInfo> = Vec::new();
        for name in PROJECTIONS {
            let of_big = self.checkpoint.tensor(&format!("{prefix}{name}"));
            let dtype = of_big.map(|view| view.dtype).filter(|dtype| dtype.is_float()).unwrap_or(Dtype::F32);
            let (hidden, small) = (self.config.hidden, self.small);
            let shape = if name.starts_with("down") { vec![hidden, small] } else { vec![small, hidden] };
            infos.push(TensorInfo { name: format!("{prefix}{SMALL_FFN}{name}"), dtype, shape });
        }
        let shape = vec![2, self.config.hidden];
        infos.push(TensorInfo { name: format!("{prefix}router.weight"), dtype: Dtype::F32, shape });
        infos
    }

    /// Returns the values of a new tensor.
    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let (hidden, small) = (self.config.hidden, self.small);
        let layer: usize = name.split('.').nth(2).and_then(|part| part.parse().ok()).unwrap_or(0);
        let part = PROJECTIONS.iter().position(|part| name.ends_with(part));
        let mut rng = Rng::new(
            self.seed,
            u64::from_be_bytes(*b"duosmall") ^ ((layer as u64) << 8) ^ part.map_or(3, |p| p as u64),
        );
        let Some(part) = part else {
            let mut router = vec![0.0; 2 * hidden];
            rng.fill_normal(&mut router, ROUTER_STD);
            return Ok(router);
        };
        let Some(neurons) = self.neurons.as_ref().map(|layers| &layers[layer]) else {
            let mut values = vec![0.0; small * hidden];
            rng.fill_normal(&mut values, self.config.initializer_range as f32);
            return Ok(values);
        };
        let width = self.config.layer(layer).intermediate;
        let mut whole = vec![0.0; width * hidden];
        self.checkpoint.read_f32(&name.replace(SMALL_FFN, ""), &mut whole)?;
        let columns = |row: &[f32]| neurons.iter().map(|&j| row[j as usize]).collect::<Vec<f32>>();
        Ok(match PROJECTIONS[part].starts_with("down") {
            true => whole.chunks_exact(width).flat_map(columns).collect(),
            false => neurons.iter().flat_map(|&j| &whole[j as usize * hidden..][..hidden]).copied().collect(),
        })
    }
}
