//! `dsmoe plan profile`: what every budget costs many requests.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail, ensure};
use dsmoe_baselines::plan::place::Speeds;
use dsmoe_core::config::Config;
use dsmoe_core::{Device, Inference};
use dsmoe_datasets::TokenSource;
use dsmoe_train::tasks::model_sha256;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cli::gates::GateArgs;
use crate::cli::plan::PlanProfile;
use crate::files::{POINTS, PointFolder, lossy, read_part, write_part};
use crate::format::{self, Table};
use crate::interrupts::{CONTINUE, INTERRUPTED, STOP, Stopped, Unpolled, catch_interrupts};
use crate::models::{load_inference, tokenizer};
use crate::planning::profiling::{Profiling, Times};
use crate::planning::requests::{Profiled, Request, cut, hash, spreads};
use crate::reproduce::speed::{decode, prefill};
use crate::texts::{load, open, options, total_bytes};
use crate::ui::{Ui, stderr_line};

const SETTINGS: &str = "plan.json";
const PROFILE: &str = "profile.json";
/// Tokens that are decoded to time decoding.
const DECODED: usize = 32;
/// Fewest tokens of a prompt.
const LEAST_PROMPT: usize = 2;

/// The largest number of budgets, and of sources: a mixture has no more.
const MOST: usize = 1000;

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
        for (what, count) in [("budgets", budgets), ("sources", profile.sources.len())] {
            ensure!(
                count <= MOST,
                "{}: {count} {what} are more than {MOST}; profile the model again",
                path.display()
            );
        }
        let width = profile.requests.first().map_or(0, |request| request.features.len());
        let is_sound = |request: &Profiled| {
            let numbers = request.features.iter().chain(&request.active).chain(&request.losses);
            let finite = numbers.into_iter().all(|x| x.is_finite());
            finite
                && request.features.len() == width
                && request.losses.len() == budgets
                && request.active.len() == budgets
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
    let requests = cut(&sources, args.requests, args.prompt + args.continuation).context("--data")?;
    let settings = settings(args, &shares, &sources, &requests)?;
    let folder = PointFolder { out, resume: args.work.resume, file: SETTINGS, settings: &settings };
    folder.check()?;
    catch_interrupts()?;
    let _unpolled = Unpolled::begin(CONTINUE);
    let mut model = load_inference(&args.model, args.dtype, Device::Cpu, GateArgs::default())?;
    // A command that is refused until here leaves no folder, for which the corrected one would need --resume.
    folder.make()?;
    let profiling = Profiling {
        requests: &requests,
        prompt: args.prompt,
        shares: &shares,
        folder: &out.join(POINTS),
        stop: stopped,
    };
    let ids: Vec<u32> = requests.iter().flat_map(|request| &request.ids).copied().take(512).collect();
    let (rows, points) = profiling.run(&mut model, &|model| times(model, &ids, args.repeats), ui)?;
    let all = |of: fn(&Times) -> Option<f64>| {
        points.iter().map(|point| of(&point.times)).collect::<Option<Vec<f64>>>()
    };
    let speeds = all(|times| times.prefill).zip(all(|times| times.decode));
    let profile = Profile {
        model: args.model.clone(),
        model_sha256: model_sha256(&args.model)?,
        dtype: args.dtype.name().to_owned(),
        prompt: args.prompt,
        continuation: args.continuation,
        active: points.iter().map(|point| point.active).collect(),
        shares,
        sources: sources.iter().map(|source| source.name.clone()).collect(),
        requests: rows,
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

/// Ends a measurement that the user wants to stop; what is done is kept.
fn stopped() -> Result<()> {
    if STOP.load(Ordering::Relaxed) {
        return Err(Stopped.into());
    }
    Ok(())
}

/// Measures the speeds at the budget that `model` is set to, on the ids of requests: the medians of `repeats` measurements.
fn times(model: &Inference, ids: &[u32], repeats: usize) -> Result<Times> {
    let most = &ids[..ids.len().min(model.config().max_position)];
    let mut times: [Vec<f64>; 2] = Default::default();
    for _ in 0..repeats {
        stopped()?;
        times[0].push(prefill(model, most, most.len())?);
        times[1].push(decode(model, most, DECODED.min(most.len() / 2).max(1), 1)?);
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let [prefill, decode] = times.map(median);
    Ok(Times { prefill, decode })
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
    if shares.len() > MOST {
        bail!("--active: {} budgets are more than {MOST}; give fewer", shares.len());
    }
    Ok(shares)
}

fn settings(
    args: &PlanProfile,
    shares: &[f64],
    sources: &[TokenSource],
    requests: &[Request],
) -> Result<Value> {
    Ok(json!({
        "model_sha256": model_sha256(&args.model)?,
        "dtype": args.dtype.name(),
        "shares": shares,
        "prompt": args.prompt,
        "continuation": args.continuation,
        "sources": sources.iter().map(|source| &source.name).collect::<Vec<_>>(),
        "requests": requests.len(),
        "text_sha256": hash(requests),
        "repeats": args.repeats,
    }))
}

fn summary<'a>(profile: &'a Profile, out: &'a Path) -> Summary<'a> {
    Summary {
        model: &profile.model,
        out: Some(out),
        requests: profile.requests.len(),
        shares: &profile.shares,
        active: &profile.active,
        extra: spreads(&profile.requests).iter().map(|spread| [spread.mean, spread.deviation]).collect(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::write_json;

    #[test]
    fn a_profile_of_too_many_budgets_or_sources_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let profile = |budgets: usize, sources: usize| Profile {
            model: PathBuf::from("model"),
            model_sha256: String::new(),
            dtype: "f32".to_owned(),
            prompt: 8,
            continuation: 8,
            shares: (1..=budgets).map(|i| i as f64 / budgets as f64).collect(),
            active: vec![0.5; budgets],
            sources: vec![String::new(); sources],
            requests: vec![Profiled {
                source: 0,
                features: vec![1.0],
                losses: vec![2.0; budgets],
                active: vec![0.5; budgets],
            }],
            speeds: None,
        };
        let read = |profile: &Profile| {
            write_json(&dir.path().join(PROFILE), profile).unwrap();
            Profile::read(dir.path())
        };
        let most = read(&profile(MOST, MOST)).unwrap();
        assert_eq!((most.shares.len(), most.sources.len()), (MOST, MOST));
        for (profile, what) in [(profile(MOST + 1, 1), "budgets"), (profile(2, MOST + 1), "sources")] {
            let error = read(&profile).unwrap_err().to_string();
            let wanted = format!("{PROFILE}: 1001 {what} are more than 1000; profile the model again");
            assert!(error.ends_with(&wanted), "{error}");
        }
    }
}
