//! `dsmoe eval --tasks`: scores benchmarks as lm-evaluation-harness does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use dsmoe_core::Inference;
use dsmoe_core::config::{Config, MoeConfig};
use dsmoe_datasets::tasks::{Loaded, Options, Request, Task, TaskFiles, tasks};
use dsmoe_datasets::world::{ITEMS, Probe, World};
use dsmoe_datasets::{Bos, Tokenizer};
use dsmoe_kernels::Isa;
use dsmoe_kernels::comm::Communicator;
use dsmoe_train::tasks::{Journal, Responder, model_sha256};

use super::results::{LeftOut, TaskResult, TaskResults};
use crate::cli::eval::{Eval, TaskFile};
use crate::format;
use crate::interrupts::{INTERRUPTED, catch_interrupts_for, stop_of};
use crate::models::{load_inference, show_config_notices, tokenizer};
use crate::processes::check_alike;
use crate::progress::{Progress, Unit};
use crate::ui::{Ui, stderr_line};

/// The exit status of a result that is not what it should be.
const OUT_OF_TOLERANCE: u8 = 3;
/// The name of all benchmarks with files.
pub(crate) const ALL: &str = "all";
/// The name of the probes of the embedded world.
const WORLD: &str = "world";

pub(super) fn run(args: &Eval, comm: &dyn Communicator, ui: &mut Ui) -> Result<ExitCode> {
    let started = Instant::now();
    // Wrong files are reported before the weights are read.
    let config = Config::load(&args.model)?;
    show_config_notices(&config, ui);
    let tokenizer = tokenizer(&args.model, &config, ui)?;
    let bos = args.bos.unwrap_or(args.profile.bos());
    // So is a BOS rule that the tokenizer cannot follow.
    tokenizer.encode("", bos)?;
    let (loaded, left_out) = load(args, ui)?;
    check_alike(comm, args, &args.model, &[])?;
    // The first process writes.
    let out = args.out.as_ref().filter(|_| comm.rank() == 0);
    let folder = out.map(|out| out.join(model_name(&args.model)));
    if let Some(folder) = &folder {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let mut model = load_inference(&args.model, args.precision(), args.device, args.gates)?;
    if let Some(bound) = args.router {
        model.set_router_bound(bound)?;
    }
    let runner =
        Runner { args, comm, model: &model, tokenizer: &tokenizer, bos, hash: model_sha256(&args.model)? };
    if args.out.is_some() {
        // Until here a signal ends the process at once: a large model takes long to load, and nothing is to be kept yet.
        catch_interrupts_for(ui, comm.rank() == 0)?;
    }

    let mut done = Vec::new();
    let mut journals = Vec::new();
    for loaded in loaded {
        let mut journal = folder.as_ref().map(|folder| runner.journal(folder, loaded.name())).transpose()?;
        let Some(result) = runner.measure(loaded, journal.as_mut(), ui)? else {
            ui.note("dsmoe: stopped; the same command continues from here");
            return Ok(ExitCode::from(INTERRUPTED));
        };
        remarks(&result).into_iter().for_each(|line| ui.note(line));
        done.push(result);
        journals.extend(journal);
    }

    let mut results = TaskResults {
        args,
        name: model_name(&args.model),
        bos,
        model: &model,
        tokenizer: &tokenizer,
        model_sha256: runner.hash,
        seconds: started.elapsed().as_secs_f64(),
        tasks: done,
        left_out,
        files: Vec::new(),
    };
    if let Some(folder) = &folder {
        results.write(folder)?;
        // The samples hold the answers now.
        for journal in journals {
            journal.remove()?;
        }
    }
    ui.result(&results.json()?, |_| results.show())?;
    match args.strict && !results.is_complete() {
        true => {
            stderr_line(format_args!(
                "exit status {OUT_OF_TOLERANCE}: not all benchmarks were scored whole (--strict)"
            ));
            Ok(ExitCode::from(OUT_OF_TOLERANCE))
        }
        false => Ok(ExitCode::SUCCESS),
    }
}

/// Loads the benchmarks asked for, from files or from the embedded world.
fn load(args: &Eval, ui: &Ui) -> Result<(Vec<Loaded>, Vec<LeftOut>)> {
    if let Some(folder) = &args.task_data
        && !folder.is_dir()
    {
        bail!(
            "{}: no such folder; give --task-data a folder that has one for each benchmark (hellaswag, piqa, ...)",
            folder.display()
        );
    }
    let source = TaskFiles {
        folder: args.task_data.clone(),
        files: named_files(&args.task_file)?,
        shot_files: named_files(&args.shots_file)?,
    };
    let options = Options {
        profile: args.profile,
        limit: args.limit,
        max_new_tokens: args.max_new_tokens,
        shots: args.shots,
    };
    let mut tasks: Vec<&'static Task> = Vec::new();
    let mut loaded: Vec<Loaded> = Vec::new();
    let mut left_out = Vec::new();
    for (at, name) in args.tasks.iter().enumerate() {
        if name == ALL {
            tasks.extend(all(args, &source, &mut left_out)?);
        } else if name == WORLD {
            let world = World::new(args.world_seed);
            // A second mention changes nothing.
            for probe in Probe::ALL.into_iter().filter(|_| !args.tasks[..at].contains(name)) {
                let (name, profile) = (probe.name(), args.profile);
                match probe.task().is_in(profile) {
                    true => loaded.push(world.load(probe, ITEMS, &options)?),
                    false => left_out.push(LeftOut {
                        task: name,
                        reason: format!("{profile} cannot run it"),
                        is_same: false,
                    }),
                }
            }
        } else {
            tasks.push(Task::named(name)?);
        }
    }
    for task in tasks {
        if loaded.iter().any(|other| other.name() == task.name) {
            continue;
        }
        if source.folder.is_none() && !source.files.contains_key(task.name) && !task.has_files() {
            bail!("task {0}: no files; give --task-data FOLDER or --task-file {0}=FILE", task.name);
        }
        loaded.push(Loaded::load(task, &source, &options)?);
    }
    for LeftOut { task, reason, .. } in &left_out {
        ui.note(format_args!("{task}: left out, {reason}"));
    }
    Ok((loaded, left_out))
}

/// Returns the benchmarks with files.
fn all(args: &Eval, source: &TaskFiles, left_out: &mut Vec<LeftOut>) -> Result<Vec<&'static Task>> {
    let mut found = Vec::new();
    let mut taken: Vec<(&str, Vec<PathBuf>)> = Vec::new();
    for task in tasks() {
        let Some(files) = source.files_of(task)? else {
            left_out.push(LeftOut {
                task: task.name,
                reason: "there are no files of it".to_owned(),
                is_same: false,
            });
            continue;
        };
        if let Some((other, _)) = taken.iter().find(|(_, others)| *others == files) {
            left_out.push(LeftOut {
                task: task.name,
                reason: format!("its files are those of {other}"),
                is_same: true,
            });
        } else if !task.is_in(args.profile) {
            left_out.push(LeftOut {
                task: task.name,
                reason: format!("{} cannot run it", args.profile),
                is_same: false,
            });
        } else {
            found.push(task);
            taken.push((task.name, files));
        }
    }
    if found.is_empty() {
        bail!("--tasks {ALL}: no files of any benchmark; give --task-data the folder that has their folders");
    }
    Ok(found)
}

fn named_files(files: &[TaskFile]) -> Result<BTreeMap<String, Vec<PathBuf>>> {
    let mut all: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for TaskFile { task, path } in files {
        all.entry(Task::named(task)?.name.to_owned()).or_default().push(path.clone());
    }
    Ok(all)
}

/// Returns remarks about the results of a benchmark.
fn remarks(TaskResult { loaded, scored, .. }: &TaskResult) -> Vec<String> {
    let mut remarks = Vec::new();
    let origin = loaded.origin();
    if origin.shot_split == Some(origin.split) {
        remarks.push(format!(
            "{}: no training file; its examples are other documents of its {} split",
            loaded.name(),
            origin.split
        ));
    }
    if let Some((id, reason)) = scored.unscored.first() {
        remarks.push(format!(
            "{}: {} of {} documents could not be scored and count in no metric; document {id}: {reason}",
            loaded.name(),
            format::count(scored.unscored.len() as u64),
            format::count(loaded.documents().len() as u64),
        ));
    }
    remarks
}

/// Returns the last part of the path, fit for a file name.
fn model_name(model: &Path) -> String {
    let whole = model.canonicalize().unwrap_or_else(|_| model.to_path_buf());
    let name = whole.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.chars().map(|c| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect()
}

struct Runner<'a> {
    args: &'a Eval,
    comm: &'a dyn Communicator,
    model: &'a Inference,
    tokenizer: &'a Tokenizer,
    bos: Bos,
    hash: String,
}

impl Runner<'_> {
    /// Opens the journal of a benchmark's answers.
    fn journal(&self, folder: &Path, task: &str) -> Result<Journal> {
        let moe = self.model.config().moe.as_ref();
        let mut made_by = serde_json::json!({
            "model": self.hash,
            "dtype": self.args.precision().name(),
            "threshold": moe.and_then(MoeConfig::threshold),
            "bos": self.bos,
            "profile": self.args.profile,
            // Another tier may answer with other last bits.
            "isa": Isa::current().name(),
        });
        if let Some(budget) = moe.and_then(MoeConfig::budget) {
            made_by["budget"] = budget.into();
        }
        if self.args.device.is_gpu() {
            // So may a GPU.
            made_by["device"] = "gpu".into();
        }
        let path = folder.join(format!("answers_{task}.jsonl"));
        Ok(Journal::open(&path, &made_by.to_string(), self.model.new_stats().as_ref())?)
    }

    /// Scores a benchmark; none if it was interrupted.
    fn measure(&self, loaded: Loaded, journal: Option<&mut Journal>, ui: &Ui) -> Result<Option<TaskResult>> {
        let started = Instant::now();
        let documents: Vec<&[Request]> = loaded.documents().iter().map(|d| &d.requests[..]).collect();
        let responder = Responder::new(self.model, self.tokenizer, self.bos, self.args.profile)
            .stop_at(stop_of(ui))
            .on(self.comm);
        let answers = Progress::during(ui, loaded.name(), Unit::Documents, |show| {
            responder.answer(&documents, journal, &mut |done, total| show(done as u64, total as u64))
        })?;
        Ok(answers.map(|answers| TaskResult {
            scored: loaded.score(&answers.documents),
            loaded,
            ran: answers.ran,
            seconds: started.elapsed().as_secs_f64(),
        }))
    }
}
