//! Tiny models of every family against transformers: logits, greedy text, and the passes against each other.

#[cfg(feature = "cuda")]
mod cuda;
mod gradients;
mod layers;
mod mapped;
mod moe;
mod recut;
mod reference;
mod small;
mod surgery;

use std::path::{Path, PathBuf};

use dsmoe_core::config::Config;
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::model::{
    After, Batch, Cache, Inference, Model, Segment, StepArgs, TrainWorkspace, Workspace,
};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::cross_entropy::IGNORE;
use dsmoe_kernels::testing::shared;
use serde_json::Value;

/// The largest difference of a logit; logits have a standard deviation of 2.
const TOLERANCE: f32 = 2e-4;

/// A model of the zoo with what transformers computed for it.
struct Case {
    name: String,
    dir: PathBuf,
    golden: Value,
    tensors: Vec<u8>,
    /// Removed with the case.
    _work: tempfile::TempDir,
}

impl Case {
    fn tensor(&self, name: &str) -> Vec<u8> {
        let golden = safetensors::SafeTensors::deserialize(&self.tensors).expect("safetensors");
        golden.tensor(name).expect("a golden tensor").data().to_vec()
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        let bytes = self.tensor(name);
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        let bytes = self.tensor(name);
        bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
    }

    fn rows(&self) -> Vec<Vec<u32>> {
        self.ids("input_ids").chunks_exact(64).map(<[u32]>::to_vec).collect()
    }

    fn list(&self, path: &str) -> Option<Vec<u32>> {
        let list = self.golden.pointer(path)?.as_array()?;
        Some(list.iter().map(|id| id.as_u64().expect("an id") as u32).collect())
    }

    fn model(&self) -> dsmoe_core::Result<Inference> {
        Inference::load(&self.dir, Precision::F32)
    }

    /// Whether the frequencies depend on the number of positions, so that a cache is not a full pass.
    fn depends_on_length(&self, config: &Config) -> bool {
        config.architecture.ropes.iter().any(|rope| rope.frequencies(1) != rope.frequencies(64))
    }
}

/// Reads a file that may be a link, or a link that became its target's name when it was copied.
fn read_linked(path: &Path) -> Vec<u8> {
    let bytes = std::fs::read(path).expect("a golden file");
    match std::str::from_utf8(&bytes) {
        Ok(target) if target.starts_with("../") => {
            std::fs::read(path.with_file_name(target.trim())).expect("the target of a link")
        }
        _ => bytes,
    }
}

fn cases(test: &str) -> Vec<Case> {
    let Some(shared) = shared(test, "golden/zoo") else { return Vec::new() };
    let zoo = shared.join("golden/zoo");
    let index: serde_json::Map<String, Value> =
        serde_json::from_slice(&std::fs::read(zoo.join("index.json")).expect("index")).expect("JSON");
    let case = |name: &String| {
        let work = tempfile::tempdir().expect("a directory");
        let read = |file: &str| read_linked(&zoo.join(name).join(file));
        for file in ["config.json", "model.safetensors"] {
            std::fs::write(work.path().join(file), read(file)).expect("a copy");
        }
        Case {
            name: name.clone(),
            golden: serde_json::from_slice(&read("golden.json")).expect("JSON"),
            tensors: read("golden.safetensors"),
            dir: work.path().to_path_buf(),
            _work: work,
        }
    };
    index.keys().map(case).collect()
}

/// Runs `check` for every case and fails with the complaints of all.
fn each(test: &str, mut check: impl FnMut(&Case) -> dsmoe_core::Result<Vec<String>>) {
    let mut failures = Vec::new();
    for case in cases(test) {
        let complaints = check(&case).unwrap_or_else(|error| vec![error.to_string()]);
        failures.extend(complaints.into_iter().map(|complaint| format!("{}: {complaint}", case.name)));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn worst(got: &[f32], want: impl Iterator<Item = f32>) -> f32 {
    got.iter().zip(want).fold(0.0, |worst, (got, want)| worst.max((got - want).abs()))
}

#[test]
fn logits_are_those_of_transformers_however_the_text_is_fed() {
    each("zoo logits", |case| {
        let model = case.model()?;
        let (columns, vocab) = (case.ids("columns"), model.config().vocab_size);
        let (want, last) = (case.f32s("logits"), case.f32s("logits_last"));
        let mut complaints = Vec::new();
        let pieces: &[usize] =
            if case.depends_on_length(model.config()) { &[64] } else { &[64, 1, 3, 7, 40] };
        for &piece in pieces {
            let mut workspace = Workspace::default();
            for (row, ids) in case.rows().iter().enumerate() {
                let mut cache = Cache::new(&model, ids.len());
                let mut found = Vec::new();
                for ids in ids.chunks(piece) {
                    found.extend_from_slice(model.logits(
                        ids,
                        ids.len(),
                        &mut cache,
                        None,
                        &mut workspace,
                    )?);
                }
                let picked: Vec<f32> = found
                    .chunks_exact(vocab)
                    .flat_map(|row| columns.iter().map(|&column| row[column as usize]))
                    .collect();
                let of_row = want.iter().copied().skip(row * picked.len());
                let of_last = last.iter().copied().skip(row * vocab);
                let differs = worst(&picked, of_row).max(worst(&found[found.len() - vocab..], of_last));
                // A NaN is no small difference either.
                if differs.is_nan() || differs >= TOLERANCE || found.iter().any(|z| !z.is_finite()) {
                    complaints.push(format!("row {row}, {piece} tokens at a time: {differs}"));
                }
            }
        }
        Ok(complaints)
    });
}

#[test]
fn greedy_text_is_that_of_transformers_with_and_without_cache() {
    each("zoo greedy", |case| {
        let model = case.model()?;
        let prompt = case.list("/greedy/prompt_ids").expect("a prompt");
        let cached = case.list("/greedy/new_ids").expect("a text");
        let whole = case.list("/greedy/new_ids_without_cache").unwrap_or_else(|| cached.clone());
        let mut complaints = Vec::new();
        for (kv_cache, prefill_chunk, want) in [(true, 0, &cached), (true, 3, &cached), (false, 0, &whole)] {
            let max_tokens = want.len();
            let options = GenerateOptions { max_tokens, kv_cache, prefill_chunk, ..Default::default() };
            let got = generate(&model, &prompt, &options, |_| true)?.tokens;
            if got != *want {
                complaints.push(format!("cache {kv_cache}, chunk {prefill_chunk}: {got:?}, not {want:?}"));
            }
        }
        Ok(complaints)
    });
}

/// The losses of two rows by scoring, by likelihoods of segments and by a step of training are one.
#[test]
fn all_passes_agree() {
    each("zoo passes", |case| {
        let model = case.model()?;
        let rows = case.rows();
        let inputs: Vec<u32> = rows.iter().flat_map(|ids| ids[..63].to_vec()).collect();
        let targets: Vec<u32> = rows.iter().flat_map(|ids| ids[1..].to_vec()).collect();
        let batch = Batch { inputs: &inputs, targets: &targets, seq: 63 };
        let (mut losses, mut workspace) = (vec![0.0; 126], Workspace::default());
        model.score(&mut losses, batch, None, &mut workspace)?;
        let mut complaints = Vec::new();

        // The last token of a row is read here, so that rotations that depend on the length are of the same text.
        let all = rows.concat();
        let asked: Vec<(usize, u32)> = (0..128).filter(|i| i % 64 != 63).map(|i| (i, all[i + 1])).collect();
        let segment = |tokens, after| Segment { tokens, after };
        let alone = vec![segment(64, After::Nothing), segment(64, After::Nothing)];
        // The first tokens of the first row are the context of the others.
        let shared =
            vec![segment(40, After::Nothing), segment(24, After::Segment(0)), segment(64, After::Nothing)];
        for segments in [alone, shared] {
            let found = model.likelihoods(&all, &segments, &asked, None, &mut workspace)?;
            let probabilities: Vec<f32> = found.iter().map(|it| -it.log_probability).collect();
            // Only a rotation that depends on the length makes the first tokens of a text others than those of a part.
            let first = if case.depends_on_length(model.config()) { 40 } else { 0 };
            let differs = worst(&losses[first..], probabilities[first..].iter().copied());
            if differs.is_nan() || differs >= 2e-5 {
                complaints.push(format!("likelihoods of {segments:?} differ by {differs}"));
            }
        }

        let trained = Model::load(&case.dir)?;
        let mut grads = Buf::zeros(trained.params().len());
        let next = |(i, _): (usize, &u32)| if i % 64 == 63 { IGNORE } else { all[i + 1] };
        let targets: Vec<u32> = all.iter().enumerate().map(next).collect();
        let batch = Batch { inputs: &all, targets: &targets, seq: 64 };
        let mut workspace = TrainWorkspace::new(&trained, all.len(), Precision::F32);
        let step = trained.train_step(&mut grads, batch, &StepArgs::default(), &mut workspace)?;
        let want: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
        let differs = (step.loss_sum - want).abs() / 126.0;
        if differs.is_nan() || differs >= 2e-6 || grads.iter().any(|g| !g.is_finite()) {
            complaints.push(format!("the loss of training differs by {differs}"));
        }
        Ok(complaints)
    });
}

/// A written config.json describes the same model, in the spellings of transformers 4 and 5.
#[test]
fn config_is_read_as_it_was_written() {
    each("zoo config", |case| {
        let config = Config::load(&case.dir)?;
        let (text, mut complaints) = (config.to_json(), Vec::new());
        let again = Config::from_json(Path::new("config.json"), &text)?;
        let of = |config: &Config| {
            let Config { head_dim, max_position, rms_norm_eps, tie_word_embeddings, .. } = *config;
            (config.architecture.clone(), [head_dim, max_position], rms_norm_eps, tie_word_embeddings)
        };
        if of(&config) != of(&again) || text != again.to_json() || !again.notices().is_empty() {
            complaints.push(format!("is read as another, {:?}: {text}", again.notices()));
        }
        for spelling in [["rope_parameters"].as_slice(), &["rope_scaling", "rope_theta"]] {
            let mut json: serde_json::Map<String, Value> = serde_json::from_str(&text).expect("JSON");
            for key in spelling {
                json.remove(*key);
            }
            let text = Value::Object(json).to_string();
            let again = Config::from_json(Path::new("config.json"), &text)?;
            // Transformers 4 has no place for the scaling of layers with a window.
            let lossy = config.architecture.ropes.len() > 1 && spelling.len() == 1;
            if !lossy && of(&config) != of(&again) {
                complaints.push(format!("is another without {spelling:?}: {text}"));
            }
        }
        Ok(complaints)
    });
}
