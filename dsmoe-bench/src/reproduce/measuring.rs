//! The measuring of a trained model, each part a stage.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use dsmoe_core::Inference;
use serde_json::json;

use super::cache::{Interrupted, Key};
use super::inputs::{Base, Inputs};
use super::measure::{self, TextResult};
use super::outputs::Part;
use super::records::{FORMAT_VERSION, Machine, Run, Speed};
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
    let Subject { dir, key, id, late, experts } = *subject;
    let wanted = |part: Part| parts.contains(&part).then(|| costs.part(part, late.is_some()));

    let text_key = Key::of("text-of", &json!([key, windows, late]));
    let stage = Stage { name: "measure", of: id, key: &text_key, cost: costs.text() };
    let found: TextResult = work.stage(stage, |_| {
        let mut model = inputs.load(dir)?;
        let threshold = late
            .map(|active| measure::find_threshold(&mut model, held_out, seq, measures.sweep_windows, active))
            .transpose()?;
        let (found, _) = measure::text(&model, held_out, seq, windows)?;
        Ok(TextResult { threshold, ..found })
    })?;
    let threshold = found.threshold;
    let mut model = Lazy { inputs, dir, threshold, loaded: None };

    let tasks = wanted(Part::Tasks).map(|cost| {
        let place = options.task_data.as_ref().map(|dir| dir.display().to_string());
        let world = profile.world.as_ref().map(|world| world.seed);
        let names: Vec<_> = inputs.tasks.iter().map(|task| (task.name(), task.documents().len())).collect();
        let key = Key::of("tasks", &json!([key, threshold, world, place, measures.items, names]));
        work.stage(Stage { name: "tasks", of: id, key: &key, cost }, |_| {
            let model = model.get()?;
            Progress::during(&ui, "tasks", Unit::Parts, |show| {
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
        let key = Key::of("sweep", &json!([key, thresholds, windows, text.key]));
        work.stage(Stage { name: "sweep", of: id, key: &key, cost }, |_| {
            measure::sweep(&mut inputs.load(dir)?, held_out, seq, windows, &thresholds)
        })
    });
    let difficulty = wanted(Part::Difficulty).map(|cost| {
        let key = Key::of("difficulty", &json!([key, base.key, windows, text.key]));
        work.stage(Stage { name: "difficulty", of: id, key: &key, cost }, |_| {
            let (_, tokens) = measure::text(model.get()?, held_out, seq, windows)?;
            if base.losses.is_none() {
                let (_, tokens) = measure::text(&inputs.load(&base.dir)?, held_out, seq, windows)?;
                base.losses = Some(tokens.losses);
            }
            let dense = base.losses.as_deref().unwrap_or_default();
            Ok(measure::difficulty(dense, &tokens, experts.unwrap_or(profile.experts)))
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
    dir: &'a Path,
    threshold: Option<f32>,
    loaded: Option<Inference>,
}

impl Lazy<'_> {
    fn get(&mut self) -> Result<&Inference> {
        if self.loaded.is_none() {
            let mut model = self.inputs.load(self.dir)?;
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
    let Inputs { profile, options, text, costs, .. } = inputs;
    let Subject { dir, key, id, late, .. } = *subject;
    let (prefill, decode) = (profile.measure.prefill, profile.measure.decode);
    let (threads, device) = (rayon::current_num_threads(), options.device);
    let settings = json!([key, threshold, prefill, decode, threads, Machine::here(device)]);
    let key = Key::of("speed", &settings);
    let cost = costs.part(Part::Speed, late.is_some());
    work.stage(Stage { name: "speed", of: id, key: &key, cost }, |stage| {
        let program = std::env::current_exe().context("cannot find this program")?;
        // Held-out text, because the active experts depend on it.
        let ids: Vec<u32> = text.held_out.iter().flat_map(|part| &part.ids).copied().take(prefill).collect();
        let file = stage.join("ids.json");
        write_json(&file, &ids)?;
        let mut command = Command::new(program);
        command.args(["reproduce", "speed", "--json", "--quiet"]).arg(dir).arg("--ids").arg(&file);
        command.args(["--decode", &decode.to_string(), "--threads", &threads.to_string()]);
        command.args(["--device", &device.to_string()]);
        if let Some(threshold) = threshold {
            command.args(["--threshold", &threshold.to_string()]);
        }
        let output = command.output().context("cannot start this program")?;
        if STOP.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout).context("its answer cannot be read")
    })
}
