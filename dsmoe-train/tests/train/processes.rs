//! Processes that share a run: the bytes that it leaves do not tell their number. Here they are threads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use dsmoe_core::checkpoint::{Dtype, tensor_names};
use dsmoe_core::config::MoeConfig;
use dsmoe_core::init::LlamaSizes;
use dsmoe_core::{Masks, Model};
use dsmoe_kernels::comm::threads::{Member, members};
use dsmoe_kernels::comm::{Communicator, Place, Result as CommResult, What};
use dsmoe_kernels::rng::Rng;
use dsmoe_router::RouterConfig;
use dsmoe_train::{Observer, Outcome, Result, RunOptions, StepRecord, TrainConfig, Trainer, Zero};
use serde_json::Value;

use crate::common::{metrics, settings, text};

const DEADLINE: Duration = Duration::from_secs(120);

/// A model directory of 2 layers whose embedding and layers are of several blocks each, so that every process owns some.
fn wide(parent: &Path, kind: &str) -> PathBuf {
    let [hidden, intermediate, layers, heads, kv_heads, positions] = [64, 1024, 2, 4, 2, 64];
    let (vocab, bos_eos) = (4500, [1, 2]);
    let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos };
    let mut config = sizes.config().unwrap();
    if kind == "dsmoe" {
        config.moe = Some(MoeConfig { router_bias: true, ..MoeConfig::new(RouterConfig::new(4)) });
    }
    let mut model = Model::new(config);
    for entry in model.layout().entries().to_vec() {
        let values = &mut model.params_mut()[entry.range.clone()];
        match entry.spec.shape.len() {
            1 => values.fill(1.0),
            _ => Rng::new(5, entry.range.start as u64).fill_normal(values, 0.05),
        }
    }
    if kind == "masked" {
        let mut masks = Masks::new();
        let linears = tensor_names(model.config()).filter(|(name, _)| name.ends_with("_proj.weight"));
        for (name, shape) in linears {
            masks.insert(name, shape[0], shape[1], |row, col| (3 * row + col) % 5 < 2);
        }
        model.set_masks(masks).unwrap();
    }
    let dir = parent.join(kind);
    std::fs::create_dir(&dir).unwrap();
    model.save(&dir, Dtype::F32).unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{\"made\": \"up\"}").unwrap();
    dir
}

/// The settings of all runs here: every process has a thread of its own, since threads that wait for each other may not share
/// a pool.
fn shared(more: &[&str]) -> TrainConfig {
    settings(&[&["steps=5", "batch=1", "accumulate=1", "threads=1", "save_every=2"], more].concat())
}

/// A run that `size` processes share; each goes on by `steps` steps, or to the end.
struct Shared<'a> {
    source: &'a Path,
    out: &'a Path,
    size: usize,
    steps: Option<u64>,
    resume: bool,
    zero: Zero,
}

impl Shared<'_> {
    fn options(&self, comm: Arc<dyn Communicator>) -> RunOptions {
        let (stop_after, resume, zero) = (self.steps, self.resume, self.zero);
        RunOptions { stop_after, resume, zero, comm, ..RunOptions::new(self.source, self.out) }
    }

    /// Loads what a process has of the model.
    fn model(&self) -> Result<Model> {
        let outline = self.zero.on(self.size) == Zero::Parameters;
        let load = if outline { Model::load_outline } else { Model::load };
        Ok(load(self.source)?)
    }

    /// Runs it, process `rank` with the communicator and the settings that `of` returns, and returns all outcomes.
    fn run_with(
        &self,
        of: impl Fn(Member) -> (Arc<dyn Communicator>, TrainConfig) + Sync,
    ) -> Vec<Result<Outcome>> {
        std::thread::scope(|scope| {
            let start = |member: Member| {
                let of = &of;
                scope.spawn(move || {
                    let (comm, config) = of(member);
                    let options = self.options(comm);
                    let mut trainer = Trainer::new(self.model()?, &text(1), config, options)?;
                    trainer.run(&mut (), &AtomicBool::new(false))
                })
            };
            let threads: Vec<_> = members(self.size, DEADLINE).into_iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// Runs it until all processes stop after `step`. Process `asked` has the observer that `own` makes, which may raise the flag of
    /// that process.
    fn stop_at(
        &self,
        step: u64,
        more: &[&str],
        asked: usize,
        own: impl Fn(&AtomicBool) -> Box<dyn Observer + '_> + Sync,
    ) {
        std::thread::scope(|scope| {
            for member in members(self.size, DEADLINE) {
                scope.spawn(|| {
                    let is_asked = member.rank() == asked;
                    let (model, options) = (self.model().unwrap(), self.options(Arc::new(member)));
                    let mut trainer = Trainer::new(model, &text(1), shared(more), options).unwrap();
                    let flag = AtomicBool::new(false);
                    let (mut own, mut ignore) = (own(&flag), ());
                    let observer: &mut dyn Observer = if is_asked { &mut *own } else { &mut ignore };
                    assert_eq!(trainer.run(observer, &flag).unwrap(), Outcome::Interrupted { step });
                });
            }
        });
    }

    fn run(&self, more: &[&str]) {
        for outcome in self.run_with(|member| (Arc::new(member), shared(more))) {
            match (outcome.unwrap(), self.steps) {
                (Outcome::Finished, None) | (Outcome::Interrupted { .. }, Some(_)) => {}
                (outcome, _) => panic!("{outcome:?}"),
            }
        }
    }
}

/// Runs to the end on `size` processes.
fn whole(source: &Path, out: &Path, size: usize, more: &[&str]) {
    in_stage(Zero::Moments, (source, out), size, more);
}

/// Does so where every process holds `zero` of its share alone.
fn in_stage(zero: Zero, (source, out): (&Path, &Path), size: usize, more: &[&str]) {
    Shared { source, out, size, steps: None, resume: false, zero }.run(more);
}

/// All files below `dir` but the history, whose times differ.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                folders.push(path);
            } else if name != "metrics.jsonl" && !name.starts_with("events.") {
                found.insert(path.strip_prefix(dir).unwrap().to_path_buf(), std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// The metrics without times.
fn history(out: &Path) -> Vec<Value> {
    let mut lines = metrics(out);
    for line in lines.iter_mut().filter_map(Value::as_object_mut) {
        let times = [
            "tokens_per_s",
            "wall_s",
            "rss_bytes",
            "eval_seconds",
            "eval_tokens_per_s",
            "eval_flops_per_token",
        ];
        times.iter().for_each(|time| drop(line.remove(*time)));
    }
    lines
}

#[track_caller]
pub(crate) fn assert_same(one: &Path, other: &Path) {
    let (one_files, other_files) = (files(one), files(other));
    let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&one_files), names(&other_files));
    for (name, bytes) in &one_files {
        assert!(other_files[name] == *bytes, "{} of {}", name.display(), other.display());
    }
    assert_eq!(history(one), history(other), "{}", other.display());
}

#[test]
fn any_number_of_processes_leaves_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, more) in [
        ("dense", &["sparsity=1", "lanes=4"][..]),
        ("dsmoe", &["lanes=4", "accumulate=3", "dtype=bf16", "clip=0.5"]),
        (
            "masked",
            &["sparsity=1", "lanes=4", "accumulate=3", "clip=0.5", "valid_fraction=0.5", "eval_every=2"],
        ),
    ] {
        let source = wide(dir.path(), kind);
        let out = |size: usize| dir.path().join(format!("{kind} {size}"));
        whole(&source, &out(1), 1, more);
        let checkpoints = files(&out(1)).into_keys().filter(|path| path.starts_with("checkpoints"));
        assert!(checkpoints.count() >= 8);
        for size in [2, 4] {
            whole(&source, &out(size), size, more);
            assert_same(&out(1), &out(size));
        }
    }
    let source = dir.path().join("dsmoe");
    let out = |name: &str| dir.path().join(name);
    // In the other stages lanes that are computed together have to be a node of the tree.
    for zero in [Zero::Gradients, Zero::Parameters] {
        let (source, out) = (&source, &out("refused"));
        let run = Shared { source, out, size: 3, steps: None, resume: false, zero };
        for outcome in run.run_with(|member| (Arc::new(member), shared(&["lanes=12"]))) {
            let told = outcome.unwrap_err().to_string();
            assert!(told.contains("lanes is 12 on 3 processes; use 1, 2, 4 or 12 processes"), "{told}");
        }
    }
    whole(&source, &out("12 on 1"), 1, &["lanes=12", "dtype=bf16"]);
    whole(&source, &out("12 on 3"), 3, &["lanes=12", "dtype=bf16"]);
    assert_same(&out("12 on 1"), &out("12 on 3"));
}

#[test]
fn any_stage_leaves_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, more) in [
        ("dense", &["sparsity=1", "lanes=4"][..]),
        ("dsmoe", &["lanes=8", "accumulate=3", "dtype=bf16", "clip=0.5"]),
        ("masked", &["sparsity=1", "lanes=12", "clip=0.5"]),
    ] {
        let more = &[&["valid_fraction=0.3", "steps=4", "eval_every=2"], more].concat();
        let source = wide(dir.path(), kind);
        let alone = dir.path().join(format!("{kind} alone"));
        whole(&source, &alone, 1, more);
        for zero in [Zero::Gradients, Zero::Parameters] {
            for size in [2, 4] {
                let out = dir.path().join(format!("{kind} {zero:?} {size}"));
                in_stage(zero, (&source, &out), size, more);
                assert_same(&alone, &out);
            }
        }
    }
}

#[test]
fn thresholds_that_hold_the_share_do_not_know_the_number_of_processes() {
    let dir = tempfile::tempdir().unwrap();
    let source = &wide(dir.path(), "dsmoe");
    for (name, more) in [
        ("one", &["active_target=0.4", "hold=threshold", "lanes=4", "accumulate=2"][..]),
        ("range", &["active_range=[0.75, 1.0]", "separability=0.1", "lanes=4", "dtype=bf16"]),
    ] {
        let more = &[&["steps=6", "lr=1e-2", "valid_fraction=0.3", "eval_every=3"], more].concat();
        let alone = &dir.path().join(format!("{name} alone"));
        whole(source, alone, 1, more);
        let moved: Vec<f64> =
            metrics(alone).iter().filter_map(|line| line["threshold_logit"].as_f64()).collect();
        assert!(moved.windows(2).any(|pair| pair[0] != pair[1]), "{moved:?}");
        for (size, zero) in
            [(2, Zero::Moments), (4, Zero::Moments), (2, Zero::Gradients), (4, Zero::Parameters)]
        {
            let out = &dir.path().join(format!("{name} {size} {zero:?}"));
            in_stage(zero, (source, out), size, more);
            assert_same(alone, out);
        }
        // Parts of the run on other numbers of processes leave the same bytes.
        let parts = &dir.path().join(format!("{name} parts"));
        for (size, steps, zero) in
            [(4, Some(1), Zero::Parameters), (1, Some(2), Zero::Moments), (2, None, Zero::Gradients)]
        {
            Shared { source, out: parts, size, steps, resume: parts.exists(), zero }.run(more);
        }
        assert_eq!(
            std::fs::read(parts.join("config.json")).unwrap(),
            std::fs::read(alone.join("config.json")).unwrap()
        );
        for file in ["model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"] {
            assert!(
                std::fs::read(parts.join(file)).unwrap() == std::fs::read(alone.join(file)).unwrap(),
                "{name}: {file}"
            );
        }
    }
}

/// What an estimator of the routers' gradient draws belongs to a micro-batch, wherever it is computed.
#[test]
fn estimates_do_not_know_the_number_of_processes() {
    let dir = tempfile::tempdir().unwrap();
    let source = &wide(dir.path(), "dsmoe");
    // Some gates are shut.
    let path = source.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["dsmoe"]["threshold"] = 0.7.into();
    std::fs::write(&path, config.to_string()).unwrap();
    for (i, rule) in ["every:3", "sample:0.25"].into_iter().enumerate() {
        let rule = format!("router_gradient={rule}");
        let more = ["steps=4", "lr=1e-2", "lanes=4", "accumulate=2", &rule];
        let alone = &dir.path().join(format!("{i} alone"));
        whole(source, alone, 1, &more);
        for (size, zero) in [(2, Zero::Moments), (4, Zero::Gradients), (2, Zero::Parameters)] {
            let out = &dir.path().join(format!("{i} {size} {zero:?}"));
            in_stage(zero, (source, out), size, &more);
            assert_same(alone, out);
        }
        let parts = &dir.path().join(format!("{i} parts"));
        for (size, steps) in [(4, Some(1)), (1, Some(2)), (2, None)] {
            let (out, resume, zero) = (parts, parts.exists(), Zero::Moments);
            Shared { source, out, size, steps, resume, zero }.run(&more);
        }
        let model = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap();
        assert!(model(parts) == model(alone), "{rule}");
    }
}

#[test]
fn a_run_resumes_in_any_stage() {
    let dir = tempfile::tempdir().unwrap();
    let source = &wide(dir.path(), "dsmoe");
    let (out, all) = (&dir.path().join("parts"), dir.path().join("all"));
    let more = ["lanes=4", "steps=7"];
    for (size, steps, zero) in [
        (4, Some(2), Zero::Parameters),
        (2, Some(1), Zero::Gradients),
        (1, Some(1), Zero::Moments),
        (2, Some(1), Zero::Parameters),
        (4, None, Zero::Parameters),
    ] {
        let resume = out.exists();
        Shared { source, out, size, steps, resume, zero }.run(&more);
    }
    whole(source, &all, 1, &more);
    for name in ["model.safetensors", "checkpoints/step-00000007/optimizer.safetensors"] {
        assert!(std::fs::read(out.join(name)).unwrap() == std::fs::read(all.join(name)).unwrap(), "{name}");
    }
    assert_eq!(history(out), history(&all));
}

#[test]
fn all_processes_of_any_stage_stop_where_a_value_is_not_finite() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::load(&wide(dir.path(), "dense")).unwrap();
    let first = |model: &Model, name: &str| model.layout().get(name).unwrap().range.start;
    for (name, place) in [
        // Sums overflow in the forward pass.
        ("model.layers.1.self_attn.v_proj.weight", "layer 1 attention"),
        // Logits overflow: the table of embeddings is the head, too.
        ("model.embed_tokens.weight", "head"),
    ] {
        let start = first(&model, name);
        let values = model.params()[start..start + 64 * 32].to_vec();
        model.params_mut()[start..start + 64 * 32].fill(3e38);
        let source = dir.path().join(place);
        std::fs::create_dir(&source).unwrap();
        model.save(&source, Dtype::F32).unwrap();
        model.params_mut()[start..start + 64 * 32].copy_from_slice(&values);
        let told = [Zero::Moments, Zero::Gradients, Zero::Parameters].map(|zero| {
            let out = dir.path().join(format!("{place} {zero:?}"));
            let run = Shared { source: &source, out: &out, size: 2, steps: None, resume: false, zero };
            let more = ["sparsity=1", "lanes=4", "valid_fraction=0"];
            let outcomes = run.run_with(|member| (Arc::new(member), shared(&more)));
            outcomes.into_iter().map(|outcome| outcome.unwrap_err().to_string()).collect::<Vec<_>>()
        });
        assert!(told[0][0].contains(place) && told[0][0].contains("no checkpoint was saved yet"), "{told:?}");
        assert!(told[0] == told[1] && told[0] == told[2], "{told:?}");
    }
}

#[test]
fn a_stage_and_its_model_belong_together() {
    let dir = tempfile::tempdir().unwrap();
    let source = wide(dir.path(), "dense");
    let out = dir.path().join("out");
    let mut options = RunOptions::new(&source, &out);
    let outline = || Model::load_outline(&source).unwrap();
    let told =
        |model, options| Trainer::new(model, &text(1), shared(&["sparsity=1"]), options).err().unwrap();
    let wanted = "zero is below 3 for a model without parameters; use Model::load_outline for 3";
    assert!(told(outline(), options.clone()).to_string().starts_with(wanted));
    options.zero = Zero::Parameters;
    // A single process owns everything.
    assert!(told(outline(), options).to_string().starts_with(wanted));
    assert!(!out.exists());
}

#[test]
fn a_run_resumes_on_any_number_of_processes() {
    let dir = tempfile::tempdir().unwrap();
    let source = wide(dir.path(), "dsmoe");
    let (out, all) = (dir.path().join("parts"), dir.path().join("all"));
    let more = ["lanes=4", "steps=7"];
    for (size, steps) in [(4, Some(2)), (2, Some(1)), (1, Some(3)), (4, None)] {
        let (resume, zero) = (size != 4 || steps.is_none(), Zero::Moments);
        Shared { source: &source, out: &out, size, steps, resume, zero }.run(&more);
    }
    whole(&source, &all, 2, &more);
    for name in ["model.safetensors", "checkpoints/step-00000007/optimizer.safetensors"] {
        assert!(std::fs::read(out.join(name)).unwrap() == std::fs::read(all.join(name)).unwrap(), "{name}");
    }
    assert_eq!(history(&out), history(&all));
}

/// A member that meddles with the file system: once it has agreed on the start of a checkpoint after `step`, there is a
/// directory where it is to write the moments.
#[derive(Debug)]
struct Meddler {
    member: Member,
    checkpoints: PathBuf,
    step: u64,
    met: AtomicU64,
}

impl Communicator for Meddler {
    fn rank(&self) -> usize {
        self.member.rank()
    }

    fn size(&self) -> usize {
        self.member.size()
    }

    fn place(&self) -> Place {
        self.member.place()
    }

    fn all_to_all(
        &self,
        of: What,
        send: &[u8],
        sent: &[usize],
        recv: &mut [u8],
        received: &[usize],
    ) -> CommResult<()> {
        self.member.all_to_all(of, send, sent, recv, received)
    }

    fn all_gather(&self, of: What, send: &[u8], recv: &mut [u8], lens: &[usize]) -> CommResult<()> {
        let result = self.member.all_gather(of, send, recv, lens);
        let path = self.checkpoints.join(format!(".step-{:08}.tmp", self.step));
        if of.what == "a checkpoint" && path.is_dir() && self.met.swap(1, Ordering::Relaxed) == 0 {
            std::fs::create_dir(path.join("optimizer.safetensors")).unwrap();
        }
        result
    }

    fn broadcast(&self, of: What, from: usize, bytes: &mut [u8]) -> CommResult<()> {
        self.member.broadcast(of, from, bytes)
    }

    fn barrier(&self, of: What) -> CommResult<()> {
        self.member.barrier(of)
    }

    fn abort(&self, status: i32) -> ! {
        self.member.abort(status)
    }
}

#[test]
fn a_process_that_cannot_write_stops_all_and_leaves_no_half_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let source = wide(dir.path(), "dsmoe");
    let (out, whole_run) = (dir.path().join("out"), dir.path().join("whole"));
    let run = Shared { source: &source, out: &out, size: 4, steps: None, resume: false, zero: Zero::Moments };
    let outcomes = run.run_with(|member| {
        let comm: Arc<dyn Communicator> = match member.rank() {
            3 => Arc::new(Meddler {
                member,
                checkpoints: out.join("checkpoints"),
                step: 4,
                met: AtomicU64::new(0),
            }),
            _ => Arc::new(member),
        };
        (comm, shared(&["lanes=4"]))
    });
    let told: Vec<String> = outcomes.into_iter().map(|outcome| outcome.unwrap_err().to_string()).collect();
    assert!(told[3].contains("optimizer.safetensors"), "{told:?}");
    assert!(told[..3].iter().all(|message| *message == format!("rank 3: {}", told[3])), "{told:?}");
    let names = |dir: &Path| {
        let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(names(&out.join("checkpoints")), ["step-00000002"]);

    Shared { resume: true, size: 2, ..run }.run(&["lanes=4"]);
    whole(&source, &whole_run, 1, &["lanes=4"]);
    assert_eq!(files(&out), files(&whole_run));
}

#[test]
fn processes_must_agree_and_fit() {
    let dir = tempfile::tempdir().unwrap();
    let source = wide(dir.path(), "dense");
    let out = dir.path().join("out");
    let run =
        |size| Shared { source: &source, out: &out, size, steps: None, resume: false, zero: Zero::Moments };
    let told = |outcomes: Vec<Result<Outcome>>| -> Vec<String> {
        outcomes.into_iter().map(|outcome| outcome.unwrap_err().to_string()).collect()
    };
    let alike = |more: &'static [&str], size| {
        told(run(size).run_with(|member| (Arc::new(member), shared(&[&["sparsity=1"], more].concat()))))
    };
    let wanted = "lanes is 4 on 3 processes; use 1, 2 or 4 processes, or another number of lanes";
    assert_eq!(alike(&["lanes=4"], 3)[0], wanted);
    assert!(!out.join("run.toml").exists());
    let of_lr = told(run(2).run_with(|member| {
        let lr = if member.rank() == 1 { "lr=0.1" } else { "lr=0.2" };
        (Arc::new(member), shared(&["sparsity=1", "lanes=2", lr]))
    }));
    assert!(of_lr[0].contains("the processes differ in lr: 0.2 on rank 0; 0.1 on rank 1"), "{of_lr:?}");
    assert_eq!(of_lr[1], format!("rank 0: {}", of_lr[0]));
    // A fault that one process alone finds.
    let of_seq = told(run(2).run_with(|member| {
        let seq = if member.rank() == 1 { "seq=100" } else { "seq=16" };
        (Arc::new(member), shared(&["sparsity=1", "lanes=2", seq]))
    }));
    assert!(of_seq[0].starts_with("rank 1: seq is 100") && of_seq[1].starts_with("seq is 100"), "{of_seq:?}");
    assert!(!out.exists());
}

/// Asks for a stop after step 3 by the file.
struct StopByFile(PathBuf);

impl Observer for StopByFile {
    fn step(&mut self, record: &StepRecord) {
        if record.step == 3 {
            std::fs::write(&self.0, "").unwrap();
        }
    }
}

#[test]
fn all_stop_after_the_same_step_and_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let source = wide(dir.path(), "dense");
    let more = ["sparsity=1", "lanes=2"];
    let all = dir.path().join("all");
    whole(&source, &all, 1, &more);
    for (size, step) in [(1, 3), (2, 4)] {
        let out = dir.path().join(format!("out {size}"));
        let run =
            Shared { source: &source, out: &out, size, steps: None, resume: false, zero: Zero::Moments };
        run.stop_at(step, &more, 0, |_| Box::new(StopByFile(out.join("stop"))));
        assert!(!out.join("stop").exists());
        Shared { resume: true, ..run }.run(&more);
        let model = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap();
        assert!(model(&out) == model(&all));
    }
}

/// Raises its flag when an evaluation of held-out text begins.
struct StopInEvaluation<'s>(&'s AtomicBool);

impl Observer for StopInEvaluation<'_> {
    fn evaluating(&mut self, _: usize, _: usize) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn all_stop_in_an_evaluation_if_one_is_to_and_make_it_up() {
    let dir = tempfile::tempdir().unwrap();
    let source = wide(dir.path(), "dense");
    let more = ["sparsity=1", "lanes=2", "eval_every=4", "valid_fraction=0.5"];
    let all = dir.path().join("all");
    whole(&source, &all, 1, &more);
    for zero in [Zero::Moments, Zero::Parameters] {
        let out = dir.path().join(format!("out {zero:?}"));
        let run = Shared { source: &source, out: &out, size: 2, steps: None, resume: false, zero };
        run.stop_at(4, &more, 1, |flag| Box::new(StopInEvaluation(flag)));
        let state = std::fs::read_to_string(out.join("checkpoints/step-00000004/state.json")).unwrap();
        assert!(state.contains("\"left\": \"evaluation\""), "{state}");
        Shared { resume: true, ..run }.run(&more);
        let model = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap();
        assert!(model(&out) == model(&all), "{zero:?}");
        let evals = |out: &Path| -> Vec<Value> {
            let lines = metrics(out);
            lines.iter().map(|line| line["eval_nll"].clone()).filter(|nll| !nll.is_null()).collect()
        };
        assert_eq!(evals(&out), evals(&all), "{zero:?}");
        // The checkpoint of the stop became that of a run that nobody stopped, and a finished run has nothing to do.
        assert_same(&out, &all);
        let before = std::fs::read(out.join("metrics.jsonl")).unwrap();
        Shared { resume: true, ..run }.run(&more);
        assert!(std::fs::read(out.join("metrics.jsonl")).unwrap() == before, "{zero:?}: it evaluates again");
        assert_same(&out, &all);
    }
}

#[test]
fn the_others_learn_of_a_process_that_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let source = wide(dir.path(), "dense");
    let out = dir.path().join("out");
    /// Gives up after its first step.
    struct GiveUp;
    impl Observer for GiveUp {
        fn step(&mut self, _: &StepRecord) {
            panic!("gives up, as this test wants");
        }
    }
    let run = Shared { source: &source, out: &out, size: 2, steps: None, resume: false, zero: Zero::Moments };
    let told = std::thread::scope(|scope| {
        let start = |member: Member| {
            let run = &run;
            scope.spawn(move || {
                let gives_up = member.rank() == 1;
                let options = run.options(Arc::new(member));
                let config = shared(&["sparsity=1", "lanes=2"]);
                let mut trainer = Trainer::new(Model::load(run.source)?, &text(1), config, options)?;
                let (mut give_up, mut ignore) = (GiveUp, ());
                let observer: &mut dyn Observer = if gives_up { &mut give_up } else { &mut ignore };
                trainer.run(observer, &AtomicBool::new(false))
            })
        };
        let threads: Vec<_> = members(2, DEADLINE).into_iter().map(start).collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect::<Vec<_>>()
    });
    assert!(told[1].is_err());
    let error = told[0].as_ref().unwrap().as_ref().unwrap_err().to_string();
    assert!(error.starts_with("rank 0: step 2, ") && error.contains("rank 1 has left"), "{error}");
}
