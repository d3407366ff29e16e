//! `dsmoe plan profile`: what every budget costs many requests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail, ensure};
use dsmoe_baselines::plan::place::Speeds;
use dsmoe_core::config::Config;
use dsmoe_core::model::{Batch, Workspace};
use dsmoe_core::{Device, Inference};
use dsmoe_datasets::TokenSource;
use dsmoe_datasets::tasks::sha256;
use dsmoe_kernels::cross_entropy::IGNORE;
use dsmoe_train::tasks::model_sha256;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cli::gates::GateArgs;
use crate::cli::plan::PlanProfile;
use crate::cli::resumable::NOT_EMPTY;
use crate::files::{done_or, lossy, make_folder, read_json, read_part, write_json, write_part};
use crate::format::{self, Table};
use crate::interrupts::{CONTINUE, INTERRUPTED, STOP, Stopped, Unpolled, catch_interrupts};
use crate::models::{load_inference, tokenizer};
use crate::progress::{Progress, Unit};
use crate::reproduce::speed::{decode, prefill};
use crate::texts::{load, open, options, total_bytes};
use crate::ui::{Ui, stderr_line};

const SETTINGS: &str = "plan.json";
const POINTS: &str = "points";
const PROFILE: &str = "profile.json";
/// Requests of one forward pass.
const TOGETHER: usize = 8;
/// Tokens that are decoded to time decoding.
const DECODED: usize = 32;
/// Fewest tokens of a prompt.
const LEAST_PROMPT: usize = 2;

/// A profile: a row per request, and a column per budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Profile {
    pub(super) model: PathBuf,
    pub(super) model_sha256: String,
    pub(super) dtype: String,
    /// Tokens of a prompt, and of its continuation.
    pub(super) prompt: usize,
    pub(super) continuation: usize,
    /// The budgets, ascending, as shares of the experts, and what the requests opened at each.
    pub(super) shares: Vec<f64>,
    pub(super) active: Vec<f64>,
    pub(super) sources: Vec<String>,
    pub(super) requests: Vec<Profiled>,
    /// Tokens a second at every budget.
    pub(super) speeds: Option<Speeds>,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Profiled {
    /// The number of its source.
    pub(super) source: usize,
    pub(super) features: Vec<f64>,
    /// Mean losses of the continuation at every budget, nats.
    pub(super) losses: Vec<f64>,
}

impl Profiled {
    /// Returns what every budget adds to the loss of the largest.
    pub(super) fn extra(&self) -> Vec<f64> {
        let least = self.losses.last().copied().unwrap_or(0.0);
        self.losses.iter().map(|loss| loss - least).collect()
    }
}

/// The measurements of one budget.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Point {
    active: f64,
    losses: Vec<f64>,
    prefill: Option<f64>,
    decode: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Summary<'a> {
    #[serde(serialize_with = "lossy")]
    model: &'a Path,
    #[serde(serialize_with = "lossy", skip_serializing_if = "Option::is_none")]
    out: Option<&'a Path>,
    requests: usize,
    shares: &'a [f64],
    active: &'a [f64],
    /// Mean and standard deviation over requests of what each budget adds to the loss.
    extra: Vec<[f64; 2]>,
    speeds: Option<&'a Speeds>,
}

impl Profile {
    /// Reads the profile in the folder `plan`, and checks that it fits together.
    pub(super) fn read(plan: &Path) -> Result<Profile> {
        let path = plan.join(PROFILE);
        if !path.is_file() {
            bail!("{}: holds no profile; make one with dsmoe plan profile", plan.display());
        }
        let profile: Profile = read_part(&path)?;
        let budgets = profile.shares.len();
        let width = profile.requests.first().map_or(0, |request| request.features.len());
        let is_sound = |request: &Profiled| {
            let finite = request.features.iter().chain(&request.losses).all(|x| x.is_finite());
            finite
                && request.features.len() == width
                && request.losses.len() == budgets
                && request.source < profile.sources.len()
        };
        let fits = budgets > 1 && profile.active.len() == budgets && width > 0;
        let speeds = |speeds: &Speeds| {
            let all = speeds.prefill.iter().chain(&speeds.decode);
            speeds.prefill.len() == budgets
                && speeds.decode.len() == budgets
                && all.into_iter().all(|x| x.is_finite() && *x > 0.0)
        };
        let timed = profile.speeds.as_ref().is_none_or(speeds);
        ensure!(
            fits && timed && profile.requests.iter().all(is_sound),
            "{}: its rows do not fit together; profile the model again",
            path.display()
        );
        Ok(profile)
    }

    /// Returns the speeds, for what cannot do without.
    pub(super) fn timed(&self, plan: &Path) -> Result<&Speeds> {
        self.speeds.as_ref().with_context(|| {
            format!("{}: it was profiled without times; profile with --repeats above 0", plan.display())
        })
    }
}

pub(super) fn run(args: &PlanProfile, ui: &mut Ui) -> Result<ExitCode> {
    match profile(args, ui) {
        Err(error) if error.is::<Stopped>() => {
            stderr_line(format_args!("dsmoe: {error}"));
            Ok(ExitCode::from(INTERRUPTED))
        }
        done => done.map(|()| ExitCode::SUCCESS),
    }
}

fn profile(args: &PlanProfile, ui: &mut Ui) -> Result<()> {
    let config = Config::load(&args.model)?;
    let shares = shares(args, &config)?;
    if args.prompt < LEAST_PROMPT || args.prompt.saturating_add(args.continuation) > config.max_position {
        bail!(
            "--prompt {} and --continuation {}: use a prompt of {LEAST_PROMPT} tokens at least, and {} in all",
            args.prompt,
            args.continuation,
            config.max_position
        );
    }
    let texts = open(&args.data, &options(&args.data))?;
    args.work.check()?;
    let Some(out) = args.work.out() else {
        let requests = args.requests.saturating_mul(texts.len());
        let plan = json!({
            "model": args.model.display().to_string(), "shares": shares, "sources": texts.len(),
            "data_bytes": total_bytes(&texts), "requests": requests,
            "tokens": requests.saturating_mul(args.prompt * (shares.len() + 1) + args.continuation * shares.len()),
        });
        ui.result(&plan, |plan| {
            let field = |key: &str| plan[key].to_string();
            format::fields(vec![
                ("requests", field("requests")),
                ("budgets", field("shares")),
                ("tokens to score", field("tokens")),
            ])
        })?;
        return Ok(());
    };
    let tokenizer = tokenizer(&args.model, &config, ui)?;
    let sources = load(&texts, &tokenizer, args.bos, args.data.cache.as_deref(), ui)?;
    let cut = cut(args, &sources)?;
    prepare(args, out, &settings(args, &shares, &sources, &cut)?)?;
    catch_interrupts()?;
    let _unpolled = Unpolled::begin(CONTINUE);
    let mut model = load_inference(&args.model, args.dtype, Device::Cpu, GateArgs::default())?;
    let mut points = Vec::new();
    model.set_active(shares[0])?;
    let part = |name: &str| out.join(POINTS).join(format!("{name}.json"));
    let features: Vec<Vec<f64>> =
        done_or(&part("features"), || features_of_all(&model, &cut, args.prompt, ui))?;
    if features.len() != cut.len() {
        bail!("{}: has {} requests of {}; remove it", part("features").display(), features.len(), cut.len());
    }
    for share in &shares {
        model.set_active(*share)?;
        let point: Point = done_or(&part(&share.to_string()), || measure(&model, args, &cut, ui))?;
        if point.losses.len() != cut.len() {
            bail!(
                "{}: has {} requests of {}; remove it",
                out.join(POINTS).display(),
                point.losses.len(),
                cut.len()
            );
        }
        points.push(point);
        stopped()?;
    }
    let rows = cut.iter().zip(features).enumerate();
    let requests = rows.map(|(i, (request, features))| Profiled {
        source: request.source,
        features,
        losses: points.iter().map(|point| point.losses[i]).collect(),
    });
    let all = |of: fn(&Point) -> Option<f64>| points.iter().map(of).collect::<Option<Vec<f64>>>();
    let speeds = all(|point| point.prefill).zip(all(|point| point.decode));
    let profile = Profile {
        model: args.model.clone(),
        model_sha256: model_sha256(&args.model)?,
        dtype: args.dtype.name().to_owned(),
        prompt: args.prompt,
        continuation: args.continuation,
        shares,
        active: points.iter().map(|point| point.active).collect(),
        sources: sources.iter().map(|source| source.name.clone()).collect(),
        requests: requests.collect(),
        speeds: speeds.map(|(prefill, decode)| Speeds { prefill, decode }),
    };
    write_part(&out.join(PROFILE), &profile)?;
    ui.result(&summary(&profile, out), show)?;
    Ok(())
}

/// Reads the profile in a folder.
#[cfg(test)]
pub(crate) fn check_folder(plan: &Path) -> Result<()> {
    Profile::read(plan).map(|profile| drop(summary(&profile, plan)))
}

/// Tokens of a request: prompt and continuation.
struct Request {
    source: usize,
    ids: Vec<u32>,
}

/// Cuts requests out of the sources, spread evenly.
fn cut(args: &PlanProfile, sources: &[TokenSource]) -> Result<Vec<Request>> {
    let len = args.prompt + args.continuation;
    let mut requests = Vec::new();
    for (number, source) in sources.iter().enumerate() {
        let windows = source.tokens.len() / len;
        let count = args.requests.min(windows);
        if count < 2 {
            let (name, tokens) = (&source.name, source.tokens.len());
            bail!("--data: {tokens} tokens of {name} are fewer than two requests of {len}; give more text");
        }
        for i in 0..count {
            let start = i * windows / count * len;
            let mut ids = Vec::with_capacity(len);
            source.tokens.read(start..start + len, &mut ids)?;
            requests.push(Request { source: number, ids });
        }
    }
    Ok(requests)
}

/// Returns the features of a prompt, at the budget that `model` is set to: how often each expert opens by layer, how many open, and
/// mean and deviation of the prompt's own loss.
pub(super) fn features_of(model: &Inference, prompt: &[u32]) -> Result<Vec<f64>> {
    let mut stats = model.new_stats().context("the model has no experts to choose among")?;
    let targets: Vec<u32> = prompt[1..].iter().copied().chain([IGNORE]).collect();
    let (mut losses, mut workspace) = (vec![0.0; prompt.len()], Workspace::default());
    let batch = Batch { inputs: prompt, targets: &targets, seq: prompt.len() };
    model.score(&mut losses, batch, Some(&mut stats), &mut workspace)?;
    let losses = &losses[..prompt.len() - 1];
    let count = losses.len() as f64;
    let mean = losses.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    let square = losses.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
    let counts = stats.counts().map(|count| count as f64 / prompt.len() as f64);
    Ok([mean, square.sqrt()].into_iter().chain(counts).collect())
}

fn features_of_all(model: &Inference, requests: &[Request], prompt: usize, ui: &Ui) -> Result<Vec<Vec<f64>>> {
    Progress::during(ui, "prompts", Unit::Parts, |show| {
        let of = |(i, request): (usize, &Request)| {
            show(i as u64 + 1, requests.len() as u64);
            stopped()?;
            features_of(model, &request.ids[..prompt])
        };
        requests.iter().enumerate().map(of).collect()
    })
}

/// Ends a measurement that the user wants to stop; what is done is kept.
fn stopped() -> Result<()> {
    if STOP.load(Ordering::Relaxed) {
        return Err(Stopped.into());
    }
    Ok(())
}

/// Measures the budget that `model` is set to.
fn measure(model: &Inference, args: &PlanProfile, requests: &[Request], ui: &Ui) -> Result<Point> {
    let mut stats = model.new_stats().context("the model has no experts to choose among")?;
    let mut workspace = Workspace::default();
    let seq = args.prompt + args.continuation - 1;
    let losses = Progress::during(ui, "continuations", Unit::Parts, |show| -> Result<Vec<f64>> {
        let mut all = Vec::new();
        for requests_now in requests.chunks(TOGETHER) {
            stopped()?;
            let of = |range: std::ops::Range<usize>| -> Vec<u32> {
                requests_now.iter().flat_map(|request| &request.ids[range.clone()]).copied().collect()
            };
            let (inputs, targets) = (of(0..seq), of(1..seq + 1));
            let mut losses = vec![0.0; inputs.len()];
            let batch = Batch { inputs: &inputs, targets: &targets, seq };
            model.score(&mut losses, batch, Some(&mut stats), &mut workspace)?;
            let mean = |losses: &[f32]| {
                let behind = &losses[args.prompt - 1..];
                behind.iter().map(|&x| f64::from(x)).sum::<f64>() / behind.len() as f64
            };
            all.extend(losses.chunks(seq).map(mean));
            show(all.len() as u64, requests.len() as u64);
        }
        Ok(all)
    })?;
    let ids: Vec<u32> = requests.iter().flat_map(|request| &request.ids).copied().take(512).collect();
    let most = &ids[..ids.len().min(model.config().max_position)];
    let mut times: [Vec<f64>; 2] = Default::default();
    for _ in 0..args.repeats {
        stopped()?;
        times[0].push(prefill(model, most, most.len())?);
        times[1].push(decode(model, most, DECODED.min(most.len() / 2).max(1), 1)?);
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let [prefill, decode] = times.map(median);
    Ok(Point { active: stats.active_ratio(), losses, prefill, decode })
}

/// Returns the budgets, ascending.
fn shares(args: &PlanProfile, config: &Config) -> Result<Vec<f64>> {
    let budgets = config.moe.as_ref().map_or(&[][..], |moe| &moe.parts.budgets);
    let (Some(first), Some(last)) = (budgets.first(), budgets.last()) else {
        bail!(
            "{}: this model stores no thresholds by budget; give one made by `dsmoe convert` with --calib, or trained with \
             `dsmoe train` --active-target 0.25..1.0",
            args.model.display()
        );
    };
    let mut shares = match args.active[..] {
        [] => budgets.iter().map(|budget| budget.active).collect(),
        _ => args.active.clone(),
    };
    if let Some(wrong) = shares.iter().find(|share| !(first.active..=last.active).contains(share)) {
        bail!("--active {wrong}: the model serves shares from {} to {}", first.active, last.active);
    }
    shares.sort_by(f64::total_cmp);
    shares.dedup();
    if shares.len() < 2 {
        bail!("--active: one budget leaves no choice; give two or more");
    }
    Ok(shares)
}

fn settings(
    args: &PlanProfile,
    shares: &[f64],
    sources: &[TokenSource],
    requests: &[Request],
) -> Result<Value> {
    let ids: String = requests.iter().flat_map(|request| &request.ids).map(|id| format!("{id} ")).collect();
    Ok(json!({
        "model_sha256": model_sha256(&args.model)?,
        "dtype": args.dtype.name(),
        "shares": shares,
        "prompt": args.prompt,
        "continuation": args.continuation,
        "sources": sources.iter().map(|source| &source.name).collect::<Vec<_>>(),
        "requests": requests.len(),
        "text_sha256": sha256(&ids),
        "repeats": args.repeats,
    }))
}

/// Makes the folder, or checks that the points in it are of the same profile.
fn prepare(args: &PlanProfile, out: &Path, settings: &Value) -> Result<()> {
    make_folder(out, args.work.resume, NOT_EMPTY)?;
    let path = out.join(SETTINGS);
    if path.is_file() && read_json::<Value>(&path)? != *settings {
        bail!("{}: its points are of another model, text or setting; choose another --out", path.display());
    }
    fs::create_dir_all(out.join(POINTS))?;
    write_json(&path, settings)
}

fn summary<'a>(profile: &'a Profile, out: &'a Path) -> Summary<'a> {
    let rows = profile.requests.len() as f64;
    let extra: Vec<Vec<f64>> = profile.requests.iter().map(Profiled::extra).collect();
    let of = |j: usize| {
        let mean = extra.iter().map(|row| row[j]).sum::<f64>() / rows;
        [mean, (extra.iter().map(|row| (row[j] - mean).powi(2)).sum::<f64>() / rows).sqrt()]
    };
    Summary {
        model: &profile.model,
        out: Some(out),
        requests: profile.requests.len(),
        shares: &profile.shares,
        active: &profile.active,
        extra: (0..profile.shares.len()).map(of).collect(),
        speeds: profile.speeds.as_ref(),
    }
}

fn show(summary: &Summary<'_>) -> String {
    let head = [
        "budget",
        "active share",
        "over the largest, nats",
        "deviation",
        "prefill, tokens/s",
        "decode, tokens/s",
    ];
    let mut table = Table::new(head);
    for (j, share) in summary.shares.iter().enumerate() {
        let speed = |of: fn(&Speeds) -> &Vec<f64>| {
            format::or_dash(summary.speeds, |speeds| format!("{:.0}", of(speeds)[j]))
        };
        table.row([
            format::percent(*share),
            format::percent(summary.active[j]),
            format!("{:+.4}", summary.extra[j][0]),
            format!("{:.4}", summary.extra[j][1]),
            speed(|speeds| &speeds.prefill),
            speed(|speeds| &speeds.decode),
        ]);
    }
    format!("{} requests\n\n{}", format::count(summary.requests as u64), table.show())
}
