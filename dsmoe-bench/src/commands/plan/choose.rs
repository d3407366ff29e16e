//! `dsmoe plan choose`: budget and device of requests that wait.

use std::path::Path;

use anyhow::{Context, Result, bail};
use dsmoe_baselines::plan::Policy;
use dsmoe_baselines::plan::place::{Placement, Request, Spot};
use dsmoe_core::config::Config;
use dsmoe_core::{Device, Inference};
use dsmoe_datasets::Bos;
use dsmoe_train::tasks::model_sha256;
use serde::{Deserialize, Serialize};

use super::placing::scene_of;
use super::profile::Profile;
use super::train::Heads;
use crate::cli::gates::GateArgs;
use crate::cli::plan::{PlanChoose, ServerArgs};
use crate::files;
use crate::format::{self, Table};
use crate::models::{load_inference, tokenizer};
use crate::planning::profiling::features_of;
use crate::ui::Ui;

/// Most requests whose optimum is looked for; more go by descent.
const FEW: usize = 6;

/// A request of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    prompt: String,
    max_tokens: usize,
    deadline: f64,
    #[serde(default = "one")]
    weight: f64,
}

fn one() -> f64 {
    1.0
}

/// The budget chosen for one request.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Chosen {
    pub(crate) device: &'static str,
    /// The budget, a share of the experts.
    pub(crate) active: f64,
    /// Share of the server.
    pub(crate) server_share: f64,
    /// Predicted seconds, and whether they are within the deadline.
    pub(crate) seconds: f64,
    pub(crate) in_time: bool,
    /// Predicted loss over that of the largest budget, nats.
    pub(crate) extra: f64,
}

pub(super) fn run(args: &PlanChoose, ui: &mut Ui) -> Result<()> {
    let asked = asked(args)?;
    let profile = Profile::read(&args.plan)?;
    let heads = Heads::read(&args.plan, &profile)?;
    let scene = scene_of(&args.server, profile.timed(&args.plan)?)?;
    let mut model = model_of(&profile)?;
    model.set_active(profile.shares[0])?;
    let tokenizer = tokenizer(&profile.model, model.config(), ui)?;
    let mut requests = Vec::new();
    for asked in &asked {
        let ids = tokenizer.encode(&asked.prompt, Bos::Auto)?;
        requests.push(request(&profile, &heads, &model, (&ids, asked, args.kappa))?);
    }
    let best = if requests.len() <= FEW { scene.optimum(&requests) } else { None };
    let placed = best.unwrap_or_else(|| scene.descend(&requests));
    let chosen: Vec<Chosen> = (0..requests.len()).map(|i| chosen(&profile, &requests, &placed, i)).collect();
    ui.result(&serde_json::json!({ "requests": chosen, "cost": placed.cost }), |_| show(&chosen))
}

/// Returns what is chosen for the request of `generate`: on the processor alone. `model` is at the smallest budget then.
pub(in crate::commands) fn for_prompt(
    plan: &Path,
    dir: &Path,
    model: &mut Inference,
    ids: &[u32],
    (max_tokens, deadline): (usize, f64),
) -> Result<Chosen> {
    let profile = Profile::read(plan)?;
    let heads = Heads::read(plan, &profile)?;
    if model_sha256(dir)? != profile.model_sha256 {
        bail!("{}: the plan of another model than {}; profile this one", plan.display(), dir.display());
    }
    let server = ServerArgs { server: Vec::new(), mu: 1.0 };
    let scene = scene_of(&server, profile.timed(plan)?)?;
    model.set_active(profile.shares[0])?;
    let asked = Asked { prompt: String::new(), max_tokens, deadline, weight: 1.0 };
    check(&asked, "--deadline")?;
    let requests = [request(&profile, &heads, model, (ids, &asked, 1.0))?];
    Ok(chosen(&profile, &requests, &scene.all_at_home(&requests), 0))
}

fn model_of(profile: &Profile) -> Result<Inference> {
    let dir = &profile.model;
    Config::load(dir)?;
    if model_sha256(dir)? != profile.model_sha256 {
        bail!("{}: it has changed since it was profiled; profile it again", dir.display());
    }
    let dtype =
        profile.dtype.parse().ok().context("the profile's precision is none; profile the model again")?;
    load_inference(dir, dtype, Device::Cpu, GateArgs::default())
}

fn asked(args: &PlanChoose) -> Result<Vec<Asked>> {
    if !(args.kappa >= 0.0 && args.kappa.is_finite()) {
        bail!("--kappa {}: use a number of 0 or more", args.kappa);
    }
    let Some(path) = &args.requests else {
        let prompt = args.prompt.clone().unwrap_or_default();
        let asked = Asked { prompt, max_tokens: args.max_tokens, deadline: args.deadline, weight: 1.0 };
        check(&asked, "--deadline")?;
        return Ok(vec![asked]);
    };
    let text = files::read(path)?;
    let mut all = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("{}: line {}", path.display(), i + 1);
        let asked: Asked = serde_json::from_str(line).with_context(|| {
            format!("{place}: no request; write {{\"prompt\": .., \"max_tokens\": .., \"deadline\": ..}}")
        })?;
        check(&asked, &place)?;
        all.push(asked);
    }
    if all.is_empty() {
        bail!("{}: there is no request; write one JSON object a line", path.display());
    }
    Ok(all)
}

fn check(asked: &Asked, place: &str) -> Result<()> {
    let is_positive = |x: f64| x > 0.0 && x.is_finite();
    if !is_positive(asked.deadline) || !is_positive(asked.weight) || asked.max_tokens == 0 {
        bail!("{place}: deadline and weight have to be above 0, and max_tokens 1 at least");
    }
    Ok(())
}

/// Predicts what the budgets cost a request.
fn request(
    profile: &Profile,
    heads: &Heads,
    model: &Inference,
    (ids, asked, kappa): (&[u32], &Asked, f64),
) -> Result<Request> {
    if ids.len() < 2 {
        bail!("a prompt of {} tokens says too little; give one of 2 at least", ids.len());
    }
    let read = &ids[..ids.len().min(profile.prompt)];
    let predicted = heads.curves.predict(&features_of(model, read)?)?;
    Ok(Request {
        prompt: ids.len() as f64,
        wanted: asked.max_tokens as f64,
        deadline: asked.deadline,
        weight: asked.weight,
        extra: Policy { kappa }.expected(&predicted),
    })
}

fn chosen(profile: &Profile, requests: &[Request], placed: &Placement, i: usize) -> Chosen {
    let (device, budget) = match placed.spots[i] {
        Spot::Processor(budget) => ("processor", budget),
        Spot::Server(budget) => ("server", budget),
    };
    Chosen {
        device,
        active: profile.shares[budget],
        server_share: placed.shares[i],
        seconds: placed.times[i],
        in_time: placed.times[i] <= requests[i].deadline * (1.0 + 1e-9),
        extra: requests[i].extra[budget],
    }
}

fn show(chosen: &[Chosen]) -> String {
    let mut table = Table::new([
        "request",
        "device",
        "budget",
        "share of server",
        "seconds",
        "in time",
        "extra loss, nats",
    ]);
    for (i, one) in chosen.iter().enumerate() {
        table.row([
            (i + 1).to_string(),
            one.device.to_owned(),
            format::percent(one.active),
            format::percent(one.server_share),
            format!("{:.4}", one.seconds),
            if one.in_time { "yes" } else { "no" }.to_owned(),
            format!("{:.4}", one.extra),
        ]);
    }
    table.show()
}
