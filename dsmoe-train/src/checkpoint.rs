//! Checkpoints of a run: weights, moments and the state of the run, written as a whole or not at all.
//!
//! ```text
//! checkpoints/step-00000020/config.json, model.safetensors   the model in f32, a model directory of its own
//!                           masks.safetensors                the masks of a pruned model
//!                           optimizer.safetensors            NAME.m and NAME.v of every tensor, as in memory
//!                           state.json                       step, controller, identities, fixed settings
//!                           checksums.json                   sizes and hashes of these files
//! checkpoints/.step-00000020.tmp/                            the same while it is written
//! checkpoints/.step-00000020.old/                            an earlier one of that step while it is replaced
//! ```
//! Several processes write the files of a single one, byte for byte: the first process the model and the state, the last one the
//! moments, which their owners share piece by piece.

use std::borrow::Cow;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dsmoe_core::checkpoint::{Checkpoint, Dtype, FileSum, MANIFEST_FILE, Manifest, Sums, TensorInfo, Writer};
use dsmoe_core::files::write_synced;
use dsmoe_core::params::{Entry, Layout};
use dsmoe_core::shard::Shards;
use dsmoe_core::{Masks, Model};
use dsmoe_datasets::TokenSource;
use dsmoe_datasets::files::{hex, json_values};
use dsmoe_datasets::tokens::identity;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::{Communicator, What, gather};
use dsmoe_router::{BudgetController, ThresholdController};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::config::{Hold, TrainConfig};
use crate::error::{Error, Result};
use crate::files;
use crate::optim::AdamW;
use crate::ranks::{agree, by_first};
use crate::teacher::TeacherId;

/// Version of `state.json` and of the header of `metrics.jsonl`.
pub(crate) const FORMAT_VERSION: u32 = 1;
const STATE_FILE: &str = "state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// The end of the name of a checkpoint that is being replaced.
const OLD: &str = ".old";
/// The largest file of a state, in bytes.
const LARGEST_STATE: u64 = 64 << 20;
/// Most keys and values of a state.
const MOST_VALUES: usize = 1 << 21;
/// Values of each tensor that the identity of a model covers.
const IDENTITY_VALUES: usize = 1024;
/// Values of the moments that are shared at once.
const SHARED_AT_ONCE: usize = 1 << 22;
/// Not of a step: what writes files may take longer.
const CHECKPOINT: What = What::of("a checkpoint");

/// Settings that a resumed run may change. With any other change the weights would not be those of one run. The hash of
/// the tokens covers the settings by which text is read.
const FREE: [&str; 10] = [
    "steps",
    "tokens",
    "save_every",
    "keep",
    "log_every",
    "eval_every",
    "threads",
    "doc_separator",
    "text_column",
    "bos",
];

/// The state of a run: `state.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    pub(crate) format_version: u32,
    /// Steps done.
    pub(crate) step: u64,
    /// Tokens predicted.
    pub(crate) tokens: u64,
    /// Next sample in the shuffled order of the windows.
    pub(crate) data_cursor: u64,
    /// Weight of the sparsity loss in the next step.
    pub(crate) sparsity_weight: f32,
    pub(crate) controller: Option<BudgetController>,
    /// Controller of the thresholds, where they hold the share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) thresholds: Option<ThresholdController>,
    /// The work behind the last step that a stop prevented; none if all of it was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) left: Option<Left>,
    /// Hash of the model the run started from.
    pub(crate) model_sha256: String,
    /// Hash of all token ids.
    pub(crate) data_sha256: String,
    /// The teacher, if the run has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) teacher: Option<TeacherId>,
    /// The resolved configuration.
    pub(crate) config: TrainConfig,
}

/// What follows a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Left {
    /// The thresholds of all budgets are fitted, then the held-out text is evaluated.
    Thresholds,
    /// The held-out text is evaluated.
    Evaluation,
}

impl State {
    /// Checks that the values are such as a run can have.
    fn check_values(&self) -> Result<()> {
        if !self.sparsity_weight.is_finite() {
            return Err(Error::field("sparsity_weight", self.sparsity_weight, "a finite number"));
        }
        self.controller.iter().try_for_each(BudgetController::check)?;
        self.thresholds.iter().try_for_each(ThresholdController::check)?;
        let is_hash = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let teacher = self.teacher.as_ref().map(|teacher| ("teacher", &teacher.sha256));
        let hashes = [("model_sha256", &self.model_sha256), ("data_sha256", &self.data_sha256)];
        match hashes.into_iter().chain(teacher).find(|(_, text)| !is_hash(text)) {
            Some((field, text)) => Err(Error::field(field, text, "64 hexadecimal digits")),
            None => Ok(()),
        }
    }

    /// Checks that the thresholds of the state in the checkpoint `path` are those of so many layers.
    pub(crate) fn check_layers(&self, path: &Path, layers: usize) -> Result<()> {
        let knots = self.thresholds.iter().flat_map(ThresholdController::knots);
        match knots.into_iter().all(|knot| knot.bars.len() == layers) {
            true => Ok(()),
            false => Err(Error::checkpoint(&path.join(STATE_FILE), "it is not of a model of as many layers")),
        }
    }

    /// Checks that a run of `self` may continue as the run of `now`: same model, data and fixed settings.
    pub(crate) fn check(&self, path: &Path, now: &State) -> Result<()> {
        let same = |field: &str, saved: String, now: String, help: &'static str| match saved == now {
            true => Ok(()),
            false => {
                let path = path.join(STATE_FILE);
                Err(Error::ResumeMismatch { path, field: field.to_owned(), saved, now, help: help.into() })
            }
        };
        let short = |sha: &str| sha.chars().take(12).collect::<String>();
        let help = "give the model this run started from, or another {out}";
        same("the starting model", short(&self.model_sha256), short(&now.model_sha256), help)?;
        let help = "give the data this run started with, or another {out}";
        same("the text", short(&self.data_sha256), short(&now.data_sha256), help)?;
        let teacher = |state: &State| {
            state.teacher.as_ref().map_or_else(|| "none".to_owned(), |teacher| short(&teacher.sha256))
        };
        let help = "give the teacher this run started with, or another {out}";
        same("the teacher", teacher(self), teacher(now), help)?;
        let fields = |state: &State| match serde_json::to_value(&state.config) {
            Ok(Value::Object(fields)) => fields,
            _ => Map::new(),
        };
        let (saved, wanted) = (fields(self), fields(now));
        for (field, wanted) in wanted.iter().filter(|(field, _)| !FREE.contains(&&field[..])) {
            let saved = saved.get(field).unwrap_or(&Value::Null).to_string();
            same(field, saved, wanted.to_string(), "use the old value, or another {out}")?;
        }
        Ok(())
    }
}

/// Computes a hash that identifies a model: names, shapes and the first values of every tensor.
pub(crate) fn model_identity(model: &Model) -> String {
    let mut hasher = Sha256::new();
    for entry in model.layout().entries() {
        add_identity(&mut hasher, entry, &model.params()[entry.range.clone()]);
    }
    hex(&hasher.finalize())
}

fn add_identity(hasher: &mut Sha256, entry: &Entry, values: &[f32]) {
    hasher.update(entry.spec.name.as_bytes());
    hasher.update([0]);
    for &size in &entry.spec.shape {
        hasher.update((size as u64).to_le_bytes());
    }
    for value in &values[..values.len().min(IDENTITY_VALUES)] {
        hasher.update(value.to_le_bytes());
    }
}

/// Reads what `optimizer` owns of the parameters of `model`, an outline, from the directory `dir`: one tensor at a time is in
/// memory. Returns the model's identity.
pub(crate) fn read_owned(model: &Model, dir: &Path, optimizer: &mut AdamW) -> Result<String> {
    let mut hasher = Sha256::new();
    read_tensors(model, dir, optimizer, |entry, values| add_identity(&mut hasher, entry, values))?;
    Ok(hex(&hasher.finalize()))
}

/// Sets the parameters that `optimizer` owns to those in `dir`, and calls `each` with every tensor.
fn read_tensors(
    model: &Model,
    dir: &Path,
    optimizer: &mut AdamW,
    mut each: impl FnMut(&Entry, &[f32]),
) -> Result<()> {
    let mut params = Buf::zeros(optimizer.m.len());
    let mut tensor = Buf::default();
    model.read_params(dir, |entry, read| {
        tensor.resize(entry.range.len());
        read(&mut tensor)?;
        each(entry, &tensor);
        for (owned, place) in optimizer.places(entry.range.clone()) {
            let first = owned.start - entry.range.start;
            params[place].copy_from_slice(&tensor[first..first + owned.len()]);
        }
        Ok(())
    })?;
    optimizer.params = Arc::new(params);
    Ok(())
}

/// Computes a hash of all token ids; for several sources, of their names, weights and ids.
pub(crate) fn data_identity(sources: &[TokenSource]) -> Result<String> {
    if let [source] = sources {
        return Ok(identity(&source.tokens)?);
    }
    let mut hasher = Sha256::new();
    for source in sources {
        let line = format!("{} {} {}\n", source.name, source.weight, identity(&source.tokens)?);
        hasher.update(line);
    }
    Ok(hex(&hasher.finalize()))
}

/// Returns the checkpoint of step `step` in `dir`.
pub(crate) fn path_of(dir: &Path, step: u64) -> PathBuf {
    dir.join(dir_name(step))
}

fn dir_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Returns the place of the checkpoint of step `step` in `dir` while another one of that step replaces it.
fn old_of(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!(".{}{OLD}", dir_name(step)))
}

/// Lists the checkpoints in `dir`, newest first, complete or not. One whose replacement was cut short, so that nothing has its
/// place, is among them.
pub(crate) fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let parse = |name: &str| -> Option<u64> {
        let whole = name.strip_prefix('.').and_then(|name| name.strip_suffix(OLD)).unwrap_or(name);
        let step = whole.strip_prefix("step-")?.parse().ok()?;
        (dir_name(step) == whole).then_some(step)
    };
    // Backwards: of one step the checkpoint comes before the one that it replaces, whose name begins with a dot.
    let names = files::names(dir)?.into_iter().rev();
    let mut found: Vec<(u64, PathBuf)> =
        names.filter_map(|name| parse(&name).map(|step| (step, dir.join(name)))).collect();
    found.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    found.dedup_by_key(|(step, _)| *step);
    Ok(found)
}

/// Gives the checkpoints in `dir` whose replacement was cut short their places again.
pub(crate) fn put_back(dir: &Path) -> Result<()> {
    for (step, path) in list(dir)? {
        let place = path_of(dir, step);
        if path != place {
            fs::rename(&path, &place).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

/// Gives the complete checkpoint `temporary` its place in `dir`. Of one that has the place there is always a whole: the old one
/// is moved away, not removed, before the new one comes.
fn replace(dir: &Path, temporary: &Path, step: u64) -> Result<()> {
    let (path, old) = (path_of(dir, step), old_of(dir, step));
    files::remove_dir(&old)?;
    if let Err(cause) = fs::rename(&path, &old)
        && cause.kind() != std::io::ErrorKind::NotFound
    {
        return Err(Error::io(&path)(cause));
    }
    // The error that matters is the first one; what cannot be put back here is put back by the next resume.
    let moved = fs::rename(temporary, &path).inspect_err(|_| drop(fs::rename(&old, &path)));
    moved.map_err(Error::io(&path))?;
    files::sync_dir(dir)?;
    files::remove_dir(&old)
}

/// Writes the checkpoint of `state.step` to `dir`. Then removes all but the newest ones to keep, those of later steps (of a
/// run that was resumed before them), and the rest of an interrupted write. If one process fails all do, and nothing is left.
pub(crate) fn save(
    dir: &Path,
    state: &State,
    model: &Model,
    optimizer: &AdamW,
    comm: &dyn Communicator,
) -> Result<PathBuf> {
    let of = CHECKPOINT;
    let temporary = dir.join(format!(".{}.tmp", dir_name(state.step)));
    let written = write_together(&temporary, model, optimizer, comm);
    let finished = written.and_then(|sums| by_first(comm, of, || finish(dir, &temporary, state, &sums)));
    if finished.is_err() && comm.rank() == 0 {
        // Frees the disk; the error that matters is the first one.
        drop(files::remove_dir(&temporary));
    }
    finished?;
    Ok(path_of(dir, state.step))
}

/// Writes the model and the moments into the new directory `temporary`. Returns their sums in process 0.
pub(crate) fn write_together(
    temporary: &Path,
    model: &Model,
    optimizer: &AdamW,
    comm: &dyn Communicator,
) -> Result<Sums> {
    let of = CHECKPOINT;
    by_first(comm, of, || {
        files::remove_dir(temporary)?;
        fs::create_dir_all(temporary).map_err(Error::io(temporary))
    })?;
    let moments = write_moments(&temporary.join(OPTIMIZER_FILE), model.layout(), optimizer, (comm, of))?;
    let weights = save_model(temporary, model, optimizer, comm)?;
    let (moments, weights) = agree(comm, of, moments.and_then(|moments| Ok((moments, weights?))))?;
    let own = moments.get(OPTIMIZER_FILE).map(|sum| sum.to_bytes().to_vec()).unwrap_or_default();
    let all = gather(comm, of, &own)?;
    if let Some(sum) = all.last().and_then(|sum| FileSum::from_bytes(sum)) {
        weights.set(OPTIMIZER_FILE, sum);
    }
    Ok(weights)
}

/// Writes the model into `dir` in process 0, which gets what it does not own tensor by tensor. Returns that process's outcome
/// inside the result of the communication, with the sums of the weights.
pub(crate) fn save_model(
    dir: &Path,
    model: &Model,
    optimizer: &AdamW,
    comm: &dyn Communicator,
) -> Result<Result<Sums>> {
    if !model.is_outline() {
        let saved = if comm.rank() == 0 { model.save(dir, Dtype::F32) } else { Ok(Sums::default()) };
        return Ok(saved.map_err(Error::from));
    }
    let entries = model.layout().entries();
    let (shards, mut collected) = (Shards::new(model.layout(), comm.size()), 0);
    let saved = match comm.rank() {
        0 => model.save_from(dir, Dtype::F32, |entry| {
            collected += 1;
            Ok(Cow::Owned(collect(entry, optimizer, &shards, comm)?))
        }),
        _ => Ok(Sums::default()),
    };
    // All in the other processes, and what is left after an error in the first.
    for entry in &entries[collected..] {
        collect(entry, optimizer, &shards, comm)?;
    }
    Ok(saved.map_err(Error::from))
}

/// Returns a tensor in process 0, from the parts of its owners; nothing in the others.
fn collect(
    entry: &Entry,
    optimizer: &AdamW,
    shards: &Shards,
    comm: &dyn Communicator,
) -> dsmoe_core::Result<Vec<f32>> {
    let (size, first) = (comm.size(), comm.rank() == 0);
    let mut values = vec![0.0; if first { entry.range.len() } else { 0 }];
    for start in entry.range.clone().step_by(SHARED_AT_ONCE) {
        let part = start..entry.range.end.min(start + SHARED_AT_ONCE);
        // A tensor lies in one unit, of which a process has one piece.
        let own = optimizer.places(part.clone()).next().map_or(0..0, |(_, place)| place);
        let mut sent = vec![0; size];
        sent[0] = size_of::<f32>() * own.len();
        let received = if first { lens_of(&part, shards) } else { vec![0; size] };
        let at = start - entry.range.start;
        let recv = if first { &mut values[at..at + part.len()] } else { &mut [] };
        let (send, recv) = (bytemuck::cast_slice(&optimizer.params[own]), bytemuck::cast_slice_mut(recv));
        comm.all_to_all(CHECKPOINT, send, &sent, recv, &received)?;
    }
    Ok(values)
}

/// Returns the bytes of `part` that every process owns.
fn lens_of(part: &Range<usize>, shards: &Shards) -> Vec<usize> {
    let within = |owned: Range<usize>| owned.end.min(part.end).saturating_sub(owned.start.max(part.start));
    let owned = |rank| size_of::<f32>() * shards.owned(rank).into_iter().map(within).sum::<usize>();
    (0..shards.size()).map(owned).collect()
}

/// Writes the moments of all tensors, which their owners share, in the last process. Returns that process's outcome inside the
/// result of the communication: a process that cannot write receives the rest all the same.
fn write_moments(
    path: &Path,
    layout: &Layout,
    optimizer: &AdamW,
    (comm, of): (&dyn Communicator, What),
) -> Result<Result<Sums>> {
    let (size, writes) = (comm.size(), comm.rank() + 1 == comm.size());
    let shards = Shards::new(layout, size);
    let mut writer = writes.then(|| Writer::create_file(path, moment_infos(layout)));
    let mut received = Buf::default();
    for entry in layout.entries() {
        for (moment, values) in [("m", &optimizer.m), ("v", &optimizer.v)] {
            each(&mut writer, |writer| writer.begin(&format!("{}.{moment}", entry.spec.name)));
            for start in entry.range.clone().step_by(SHARED_AT_ONCE) {
                let part = start..entry.range.end.min(start + SHARED_AT_ONCE);
                receive(&part, (optimizer, values), &shards, (comm, of), &mut received)?;
                each(&mut writer, |writer| writer.write_f32_chunk(&received));
            }
        }
    }
    Ok(match writer {
        Some(writer) => writer.and_then(finished).map_err(Error::from),
        None => Ok(Sums::default()),
    })
}

fn finished(writer: Writer) -> dsmoe_core::Result<Sums> {
    let sums = writer.sums();
    writer.finish().map(|()| sums)
}

/// Describes the moments of all tensors.
fn moment_infos(layout: &Layout) -> Vec<TensorInfo> {
    let info = |entry: &Entry, moment: &str| {
        let name = format!("{}.{moment}", entry.spec.name);
        TensorInfo { name, dtype: Dtype::F32, shape: entry.spec.shape.clone() }
    };
    layout.entries().iter().flat_map(|entry| ["m", "v"].map(|moment| info(entry, moment))).collect()
}

/// Calls `work` with the writer that there is, unless it failed before.
fn each(
    writer: &mut Option<dsmoe_core::Result<Writer>>,
    work: impl FnOnce(&mut Writer) -> dsmoe_core::Result<()>,
) {
    if let Some(Ok(open)) = writer
        && let Err(error) = work(open)
    {
        *writer = Some(Err(error));
    }
}

/// Sets `received` to the part `part` of `moments`, an array of the moments, of which every process has what it owns.
fn receive(
    part: &Range<usize>,
    (optimizer, moments): (&AdamW, &[f32]),
    shards: &Shards,
    (comm, of): (&dyn Communicator, What),
    received: &mut Buf,
) -> Result<()> {
    // A tensor lies in one unit, of which a process has one piece.
    let own = optimizer.places(part.clone()).next().map_or(0..0, |(_, place)| place);
    let lens = lens_of(part, shards);
    received.resize(part.len());
    let (send, recv) = (bytemuck::cast_slice(&moments[own]), bytemuck::cast_slice_mut(received));
    Ok(comm.all_gather(of, send, recv, &lens)?)
}

/// Writes the state and the manifest into the complete directory `temporary`, gives it its name in `dir`, and removes what is
/// not to be kept.
fn finish(dir: &Path, temporary: &Path, state: &State, sums: &Sums) -> Result<()> {
    let text = serde_json::to_string_pretty(state).expect("numbers and strings are JSON");
    let file = temporary.join(STATE_FILE);
    write_synced(&file, text.as_bytes()).map_err(Error::io(&file))?;
    Manifest::write(temporary, sums)?;
    files::sync_dir(temporary)?;
    replace(dir, temporary, state.step)?;
    tidy(dir, state.step, state.config.keep)
}

/// Removes the checkpoints in `dir` but the `keep` newest ones up to `step`, and what killed processes left of others. An old one
/// that a process did not get to remove, or not whole, goes too.
pub(crate) fn tidy(dir: &Path, step: u64, keep: usize) -> Result<()> {
    let mut kept = 0;
    for (at, old) in list(dir)? {
        kept += usize::from(at <= step);
        if at > step || kept > keep {
            files::retire_dir(&old)?;
        }
    }
    for name in files::names(dir)? {
        if name.starts_with(".step-") && (name.ends_with(".tmp") || name.ends_with(OLD)) {
            files::remove_dir(&dir.join(name))?;
        }
    }
    Ok(())
}

/// Checks that the files of the checkpoint `path` are what was written: the first process hashes all but the moments, the last
/// one those, and all return the first error. Returns whether there is a manifest, which older checkpoints do not have.
pub(crate) fn check_files(path: &Path, comm: &dyn Communicator) -> Result<bool> {
    let (first, last) = (comm.rank() == 0, comm.rank() + 1 == comm.size());
    let wanted = |name: &str| if name == OPTIMIZER_FILE { last } else { first };
    let checked = || -> Result<bool> {
        if path.exists() && !path.is_dir() {
            return Err(Error::checkpoint(path, "it is no folder"));
        }
        let Some(manifest) = Manifest::read(path)? else { return Ok(false) };
        match manifest.damaged(path, wanted)? {
            Some(file) => Err(damaged(&file)),
            None => Ok(true),
        }
    };
    agree(comm, CHECKPOINT, checked())
}

fn damaged(file: &Path) -> Error {
    Error::checkpoint(file, format!("it is not what was written, by {MANIFEST_FILE} beside it"))
}

/// Reads the state of the run in the checkpoint `path`.
pub(crate) fn read_state(path: &Path) -> Result<State> {
    let file = path.join(STATE_FILE);
    let bytes = files::read_own(&file, LARGEST_STATE)?;
    let not_text = |_| Error::checkpoint(&file, "it is not UTF-8");
    let text = String::from_utf8(bytes).map_err(not_text)?;
    if let Some(manifest) = Manifest::read(path)?
        && !manifest.holds(STATE_FILE, text.as_bytes())
    {
        return Err(damaged(&file));
    }
    let bad = |message: String| Error::checkpoint(&file, message);
    let values = json_values(text.as_bytes());
    if values > MOST_VALUES {
        return Err(bad(format!("it has {values} values, more than {MOST_VALUES}")));
    }
    let json: Value = serde_json::from_str(&text).map_err(|cause| bad(cause.to_string()))?;
    let version = json.get("format_version").and_then(Value::as_u64);
    if version != Some(FORMAT_VERSION.into()) {
        return Err(bad(format!("format_version is {version:?}, this program reads {FORMAT_VERSION}")));
    }
    let mut state: State = serde_json::from_value(json).map_err(|cause| bad(cause.to_string()))?;
    if state.controller.is_some() {
        // Runs of before there was a choice.
        state.config.hold.get_or_insert(Hold::Loss);
    }
    // Runs of before there were several.
    state.config.lanes.get_or_insert(1);
    let config = state.config.clone().resolve()?;
    let samples = config.batch as u64 * config.micro_batches();
    let counts = (state.step.checked_mul(config.tokens_per_step()), state.step.checked_mul(samples));
    if counts != (Some(state.tokens), Some(state.data_cursor)) {
        return Err(bad(format!("step {}, tokens {} and data_cursor disagree", state.step, state.tokens)));
    }
    state.check_values().map_err(|problem| bad(problem.to_string()))?;
    Ok(state)
}

/// Reads the weights of the checkpoint `path`, which must be those of a model laid out as `layout` and masked by `masks`, and
/// the moments that this process owns. Of an `outline` the weights that it owns are read, tensor by tensor.
pub(crate) fn load(
    path: &Path,
    layout: &Layout,
    masks: Option<&Masks>,
    outline: bool,
    comm: &dyn Communicator,
) -> Result<(Model, AdamW)> {
    let model = if outline { Model::load_outline(path)? } else { Model::load(path)? };
    if model.layout().entries() != layout.entries() {
        return Err(Error::checkpoint(path, "its tensors are not those of the starting model"));
    }
    if model.masks() != masks {
        return Err(Error::checkpoint(path, "its masks are not those of the starting model"));
    }
    let mut optimizer = AdamW::of(&Shards::new(layout, comm.size()), comm.rank());
    if outline {
        read_tensors(&model, path, &mut optimizer, |_, _| {})?;
    }
    read_moments(path, layout, &mut optimizer)?;
    Ok((model, optimizer))
}

/// Reads the moments that `optimizer` owns from the checkpoint `path`.
pub(crate) fn read_moments(path: &Path, layout: &Layout, optimizer: &mut AdamW) -> Result<()> {
    let moments = Checkpoint::open_file(&path.join(OPTIMIZER_FILE))?;
    for entry in layout.entries() {
        let (name, shape) = (&entry.spec.name, &entry.spec.shape);
        let places: Vec<_> = optimizer.places(entry.range.clone()).collect();
        for (moment, values) in [("m", &mut optimizer.m), ("v", &mut optimizer.v)] {
            let name = format!("{name}.{moment}");
            moments.check_shape(&name, shape)?;
            for (owned, place) in &places {
                let first = owned.start - entry.range.start;
                moments.read_f32_at(&name, first, &mut values[place.clone()])?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::edited_copies;
    use dsmoe_router::Knot;
    use proptest::prelude::*;

    use super::*;

    fn state() -> State {
        let config = TrainConfig { steps: Some(9), active_target: Some(0.5), ..TrainConfig::default() };
        let config = TrainConfig { hold: Some(Hold::Loss), ..config };
        let mut controller = BudgetController::new(0.5, 3).unwrap();
        controller.update(0.9);
        State {
            format_version: FORMAT_VERSION,
            step: 2,
            tokens: 2 * 32 * 1024,
            data_cursor: 64,
            sparsity_weight: controller.update(0.87),
            controller: Some(controller),
            thresholds: Some(
                ThresholdController::new(vec![Knot { active: 0.5, bars: vec![0.1, -1.7] }], 9).unwrap(),
            ),
            left: Some(Left::Evaluation),
            model_sha256: "ab".repeat(32),
            data_sha256: "cd".repeat(32),
            teacher: Some(TeacherId { path: "dense".into(), sha256: "ef".repeat(32) }),
            config: config.resolve().unwrap(),
        }
    }

    fn written(text: &str) -> Result<State> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(STATE_FILE), text).unwrap();
        read_state(dir.path())
    }

    #[test]
    fn a_state_comes_back_to_the_bit() {
        let state = state();
        let text = serde_json::to_string_pretty(&state).unwrap();
        let read = written(&text).unwrap();
        assert_eq!((&read.controller, &read.thresholds), (&state.controller, &state.thresholds));
        assert_eq!(read.sparsity_weight.to_bits(), state.sparsity_weight.to_bits());
        assert_eq!((&read.config, &read.teacher), (&state.config, &state.teacher));
        assert_eq!(read.left, Some(Left::Evaluation));
        // Older states do not have it, nor have those of a step of which all was done.
        let whole = written(&text.replacen("\"left\": \"evaluation\",", "", 1)).unwrap();
        assert!(whole.left.is_none() && !serde_json::to_string(&whole).unwrap().contains("\"left\""));
        for (from, to, wanted) in [
            ("\"format_version\": 1", "\"format_version\": 2", "format_version"),
            ("\"step\": 2", "\"step\": 3", "disagree"),
            ("\"seq\": 1024", "\"seq\": 0", "seq is 0"),
            ("\"tokens\"", "\"token\"", "unknown field `token`"),
            ("\"evaluation\"", "\"nothing\"", "unknown variant `nothing`"),
        ] {
            let message = written(&text.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(message.contains(wanted) && message.lines().count() == 1, "{message}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_state_that_is_no_regular_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.path().join(STATE_FILE)).unwrap();
        let message = read_state(dir.path()).unwrap_err().to_string();
        assert!(message.contains("state.json: it is not a regular file"), "{message}");
    }

    #[test]
    fn values_that_no_run_has_are_refused() {
        for (at, value, wanted) in [
            ("/controller/weight", 9e9, "weight is 9000000000"),
            ("/controller/gain", 1e30, "gain is 1"),
            ("/controller/state/filtered", -0.5, "filtered is -0.5"),
            ("/controller/state/side", 2.0, "side is 2"),
            ("/thresholds/knots/0/active", 1.5, "budgets"),
            ("/thresholds/knots/0/bars/1", -1e300, "bars is -1000"),
            ("/sparsity_weight", 1e99, "sparsity_weight is inf"),
        ] {
            let mut json = serde_json::to_value(state()).unwrap();
            *json.pointer_mut(at).unwrap() = value.into();
            let message = written(&json.to_string()).unwrap_err().to_string();
            assert!(message.contains(wanted) && message.lines().count() == 1, "{at}: {message}");
        }
        let message = written(&format!("[{}0]", "0,".repeat(MOST_VALUES))).unwrap_err().to_string();
        assert!(message.contains("it has 2097153 values, more than 2097152"), "{message}");
        let mut json = serde_json::to_value(state()).unwrap();
        json["data_sha256"] = "xyz".into();
        let message = written(&json.to_string()).unwrap_err().to_string();
        assert!(message.contains("data_sha256 is xyz; use 64 hexadecimal digits"), "{message}");
    }

    #[test]
    fn only_whole_names_are_checkpoints() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["step-00000010", "step-123456789", ".step-00000011.tmp", "step-12", "step-x", "other"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let steps: Vec<u64> = list(dir.path()).unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [123_456_789, 10]);
        assert!(list(&dir.path().join("none")).unwrap().is_empty());
    }

    #[test]
    fn a_checkpoint_whose_replacement_was_cut_short_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let write = |name: &str, content: &str| {
            std::fs::create_dir_all(dir.join(name)).unwrap();
            std::fs::write(dir.join(name).join("config.json"), content).unwrap();
        };
        let content = |name: &str| std::fs::read_to_string(dir.join(name).join("config.json")).unwrap();
        // The process was killed between the two renames.
        write(".step-00000004.old", "old");
        write(".step-00000004.tmp", "new");
        write("step-00000002", "before");
        let listed = [(4, old_of(dir, 4)), (2, path_of(dir, 2))];
        assert_eq!(list(dir).unwrap(), listed);
        put_back(dir).unwrap();
        assert_eq!(content("step-00000004"), "old");
        // It was killed behind them.
        write(".step-00000004.old", "older");
        assert_eq!(list(dir).unwrap(), [(4, path_of(dir, 4)), (2, path_of(dir, 2))]);
        put_back(dir).unwrap();
        replace(dir, &dir.join(".step-00000004.tmp"), 4).unwrap();
        assert_eq!(content("step-00000004"), "new");
        assert_eq!(files::names(dir).unwrap(), ["step-00000002", "step-00000004"]);
        // Where there is no new one the old one stays.
        replace(dir, &dir.join(".step-00000004.tmp"), 4).unwrap_err();
        assert_eq!(content("step-00000004"), "new");
        write(".step-00000002.old", "older");
        tidy(dir, 4, 2).unwrap();
        assert_eq!(files::names(dir).unwrap(), ["step-00000002", "step-00000004"]);
    }

    #[test]
    fn only_the_newest_checkpoints_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["step-00000002", "step-00000004", "step-00000006", ".step-00000004.tmp", "other"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("config.json"), "{}").unwrap();
        }
        tidy(dir.path(), 4, 1).unwrap();
        assert_eq!(files::names(dir.path()).unwrap(), ["other", "step-00000004"]);
        tidy(&dir.path().join("none"), 4, 1).unwrap();
    }

    #[test]
    fn edited_copies_are_read_or_refused() {
        let text = serde_json::to_string_pretty(&state()).unwrap();
        edited_copies("state", text.as_bytes(), 300, |bytes| {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(STATE_FILE), bytes).unwrap();
            match read_state(dir.path()) {
                // Whatever is accepted can be counted on.
                Ok(state) => assert_eq!(state.tokens, state.step * state.config.tokens_per_step()),
                Err(error) => assert_eq!(error.to_string().lines().count(), 1, "{error}"),
            }
        });
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(at in 0usize..2000, byte: u8, cut in 0usize..3000) {
            let mut bytes = serde_json::to_string(&state()).unwrap().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(cut);
            // Whatever is accepted can be counted on.
            if let Ok(state) = written(&String::from_utf8_lossy(&bytes)) {
                prop_assert_eq!(state.tokens, state.step * state.config.tokens_per_step());
            }
        }
    }
}
