//! The measuring of a trained model, each part a stage.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use dsmoe_core::Inference;
use dsmoe_core::ffn::RouterBound;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::cache::{Interrupted, Key};
use super::inputs::{Base, Inputs};
use super::measure::{self, TextResult};
use super::outputs::Part;
use super::records::{BASE, FORMAT_VERSION, GridPoint, GridSpeeds, Machine, Run, Speed};
use super::work::{Stage, Work};
use crate::files::write_json;
use crate::interrupts::STOP;
use crate::progress::{Progress, Unit};

/// A model to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) key: &'a Key,
    pub(crate) id: &'a str,
    /// The share of active experts that a threshold has to reach after training, for a model trained without one.
    pub(crate) late: Option<f64>,
    /// Experts of a layer.
    pub(crate) experts: Option<usize>,
    /// The share of the experts that an elastic model runs.
    pub(crate) serves: Option<f64>,
    /// The router that stands in for the model's.
    pub(crate) bound: Option<RouterBound>,
}

impl Subject<'_> {
    /// Loads the model with the gates that are measured.
    fn load(&self, inputs: Inputs<'_>) -> Result<Inference> {
        let mut model = inputs.load(self.dir)?;
        if let Some(active) = self.serves {
            model.set_active(active)?;
        }
        if let Some(bound) = self.bound {
            model.set_router_bound(bound)?;
        }
        Ok(model)
    }

    /// Describes the gates that are measured, for keys.
    fn gates(&self) -> Value {
        json!([self.late, self.serves, self.bound.map(|bound| bound.to_string())])
    }
}

/// Measures a model. Parts that are not wanted are absent from the result.
pub(crate) fn measure(
    inputs: Inputs<'_>,
    work: &mut Work<'_>,
    subject: &Subject<'_>,
    base: &mut Base,
    parts: &[Part],
) -> Result<Run> {
    let Inputs { profile, options, text, costs, ui, .. } = inputs;
    let (measures, windows, held_out, seq) =
        (&profile.measure, inputs.windows(), &text.held_out[..], costs.seq);
    let Subject { key, id, late, experts, .. } = *subject;
    let how = json!([subject.gates(), inputs.precision().name(), text.key]);
    let wanted = |part: Part| parts.contains(&part).then(|| costs.part(part, late.is_some()));

    let agreement = measures.agreement_windows;
    let text_key = Key::of("text-of", &json!([key, windows, how, agreement]));
    let stage = Stage { name: "measure", of: id, key: &text_key, cost: costs.text() };
    let found: TextResult = work.stage(stage, |_| {
        let mut model = subject.load(inputs)?;
        let threshold = late
            .map(|active| measure::find_threshold(&mut model, held_out, seq, measures.sweep_windows, active))
            .transpose()?;
        let (mut found, _) = measure::text(&model, held_out, seq, windows)?;
        if agreement > 0 && id != BASE {
            let dense = inputs.load(&base.dir)?;
            let all = measure::agreements(&model, &dense, held_out, seq, agreement)?;
            found.domains.iter_mut().zip(all).for_each(|(domain, one)| domain.agreement = Some(one));
        }
        Ok(TextResult { threshold, ..found })
    })?;
    let threshold = found.threshold;
    let mut model = Lazy { inputs, subject: *subject, threshold, loaded: None };

    let tasks = wanted(Part::Tasks).map(|cost| {
        let place = options.task_data.as_ref().map(|dir| dir.display().to_string());
        let world = profile.world.as_ref().map(|world| world.seed);
        let names: Vec<_> = inputs.tasks.iter().map(|task| (task.name(), task.documents().len())).collect();
        let key = Key::of("tasks", &json!([key, threshold, how, world, place, measures.items, names]));
        work.stage(Stage { name: "tasks", of: id, key: &key, cost }, |_| {
            let model = model.get()?;
            Progress::during(ui, "tasks", Unit::Parts, |show| {
                measure::tasks(model, &text.tokenizer, inputs.tasks, &mut |done, all| {
                    show(done as u64, all as u64)
                })
            })
        })
    });
    let sweep = wanted(Part::Sweep).map(|cost| {
        let thresholds = match late {
            Some(_) => measures.late_thresholds(),
            None => measures.thresholds.clone(),
        };
        // The few rows of the table are measured on all windows, the many points of the figure on some.
        let windows = if late.is_some() { measures.sweep_windows } else { windows };
        let key = Key::of("sweep", &json!([key, thresholds, windows, how]));
        work.stage(Stage { name: "sweep", of: id, key: &key, cost }, |_| {
            measure::sweep(&mut subject.load(inputs)?, held_out, seq, windows, &thresholds)
        })
    });
    let difficulty = wanted(Part::Difficulty).map(|cost| {
        let key = Key::of("difficulty", &json!([key, base.key, windows, how]));
        work.stage(Stage { name: "difficulty", of: id, key: &key, cost }, |_| {
            let (_, tokens) = measure::text(model.get()?, held_out, seq, windows)?;
            if base.losses.is_none() {
                let (_, tokens) = measure::text(&inputs.load(&base.dir)?, held_out, seq, windows)?;
                base.losses = Some(tokens.losses);
            }
            let dense = base.losses.as_deref().unwrap_or_default();
            Ok(measure::difficulty(dense, &tokens, experts.unwrap_or_else(|| profile.default_experts())))
        })
    });
    Ok(Run {
        format_version: FORMAT_VERSION,
        method: id.to_owned(),
        role: None,
        seed: 0,
        key: key.text().to_owned(),
        machine: Machine::here(options.device),
        made: None,
        trained: None,
        text: found,
        tasks: tasks.transpose()?,
        sweep: sweep.transpose()?,
        difficulty: difficulty.transpose()?,
    })
}

/// A model that is loaded when it is first needed.
struct Lazy<'a> {
    inputs: Inputs<'a>,
    subject: Subject<'a>,
    threshold: Option<f32>,
    loaded: Option<Inference>,
}

impl Lazy<'_> {
    fn get(&mut self) -> Result<&Inference> {
        if self.loaded.is_none() {
            let mut model = self.subject.load(self.inputs)?;
            if let Some(threshold) = self.threshold {
                model.set_threshold(threshold)?;
            }
            self.loaded = Some(model);
        }
        self.loaded.as_ref().context("no model is loaded")
    }
}

/// Measures the speed and memory of a model in a process of its own, so that the memory is the model's.
pub(crate) fn measure_speed(
    inputs: Inputs<'_>,
    work: &mut Work<'_>,
    subject: &Subject<'_>,
    threshold: Option<f32>,
) -> Result<Speed> {
    let Inputs { profile, options, costs, .. } = inputs;
    let Subject { dir, key, id, late, .. } = *subject;
    let (prefill, decode) = (profile.measure.prefill, profile.measure.decode);
    let (threads, device) = (rayon::current_num_threads(), options.device);
    let how = json!([subject.gates(), inputs.precision().name()]);
    let settings = json!([key, threshold, prefill, decode, threads, how, Machine::here(device)]);
    let key = Key::of("speed", &settings);
    let cost = costs.part(Part::Speed, late.is_some());
    work.stage(Stage { name: "speed", of: id, key: &key, cost }, |stage| {
        let file = held_out_ids(inputs, stage)?;
        let process = Timed { inputs, dir, ids: &file, serves: subject.serves, threads };
        let threshold = threshold.map(|threshold| threshold.to_string());
        process.run(&threshold.map_or(Vec::new(), |threshold| vec!["--threshold".to_owned(), threshold]))
    })
}

/// Measures the speed of a model beside that of the dense one, each in several processes, which take turns.
pub(crate) fn measure_grid(
    inputs: Inputs<'_>,
    work: &mut Work<'_>,
    subject: &Subject<'_>,
    base: &Base,
) -> Result<Vec<GridPoint>> {
    let Inputs { profile, options, costs, .. } = inputs;
    let Some(grid) = &profile.measure.speed else { return Ok(Vec::new()) };
    let how = json!([subject.gates(), inputs.precision().name(), grid, profile.measure.prefill]);
    let settings = json!([subject.key, base.key, how, profile.measure.decode, Machine::here(options.device)]);
    let key = Key::of("grid", &settings);
    let stage = Stage { name: "grid", of: subject.id, key: &key, cost: costs.part(Part::Speed, false) };
    let (base_dir, batches) = (base.dir.clone(), grid.batches.iter().map(usize::to_string));
    let batches = ["--batches".to_owned(), batches.collect::<Vec<_>>().join(",")];
    work.stage(stage, |stage| {
        let file = held_out_ids(inputs, stage)?;
        let mut points = Vec::new();
        for &threads in &grid.threads {
            let of = |dir, serves| Timed { inputs, dir, ids: &file, serves, threads };
            let pair = [of(subject.dir, subject.serves), of(&base_dir, None)];
            let mut found: [Vec<GridSpeeds>; 2] = Default::default();
            for _ in 0..grid.processes {
                for (process, found) in pair.iter().zip(&mut found) {
                    found.push(process.run(&batches)?);
                }
            }
            points.extend(GridPoint::of(threads, &grid.batches, &found));
        }
        Ok(points)
    })
}

/// Writes the held-out text that is read, because the active experts depend on it.
fn held_out_ids(inputs: Inputs<'_>, stage: &Path) -> Result<PathBuf> {
    let all = inputs.text.held_out.iter().flat_map(|part| &part.ids).copied();
    let ids: Vec<u32> = all.take(inputs.profile.measure.prefill).collect();
    let file = stage.join("ids.json");
    write_json(&file, &ids)?;
    Ok(file)
}

/// A model that is timed in a process of its own.
struct Timed<'a> {
    inputs: Inputs<'a>,
    dir: &'a Path,
    ids: &'a Path,
    serves: Option<f64>,
    threads: usize,
}

impl Timed<'_> {
    /// Runs the process with further arguments and reads its answer.
    fn run<T: DeserializeOwned>(&self, more: &[String]) -> Result<T> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut command = Command::new(program);
        command.args(["reproduce", "speed", "--json", "--quiet"]).arg(self.dir).arg("--ids").arg(self.ids);
        command.args(["--decode", &self.inputs.profile.measure.decode.to_string()]);
        command.args(["--threads", &self.threads.to_string()]);
        command.args(["--dtype", self.inputs.precision().name()]);
        command.args(["--device", &self.inputs.options.device.to_string()]);
        if let Some(active) = self.serves {
            command.args(["--active", &active.to_string()]);
        }
        let output = command.args(more).output().context("cannot start this program")?;
        if STOP.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout).context("its answer cannot be read")
    }
}
