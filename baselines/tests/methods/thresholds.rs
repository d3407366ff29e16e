//! Thresholds of activations, from a dense directory to the model that skips inputs.

use std::path::{Path, PathBuf};

use dsmoe_baselines::Progress;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::gguf::{GgufType, export_gguf};
use dsmoe_core::kept::LayerThresholds;
use dsmoe_core::model::{Batch, Cache, Workspace};
use dsmoe_core::{Config, Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::{assert_close, f64s, refused};
use serde_json::json;

use super::common::{Run, VOCAB, configured, loaded, logits, made, tensors, tiny, tokens};

const METHOD: &str = "thresholds";

fn dense(dir: &Path) -> PathBuf {
    let changes = json!({"vocab_size": VOCAB, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
        "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "initializer_range": 0.3});
    made(&tiny(&changes), dir, Dtype::F32)
}

/// Logits of the last token, which is decoded behind the others.
fn decoded(model: &Inference, ids: &[u32]) -> Vec<f32> {
    let (mut cache, mut workspace) = (Cache::new(model, ids.len()), Workspace::default());
    let mut last = Vec::new();
    for &id in ids {
        last = model.decode(&[id], &mut cache, None, &mut workspace).unwrap().to_vec();
    }
    last
}

/// Share of the linears' weights that `model` uses on a text.
fn used(model: &Inference, text: &[Vec<u32>]) -> f64 {
    let mut workspace = Workspace::default();
    for ids in text {
        let mut losses = vec![0.0; ids.len()];
        // The targets do not matter.
        let batch = Batch { inputs: ids, targets: ids, seq: ids.len() };
        model.score(&mut losses, batch, None, &mut workspace).unwrap();
    }
    let config = model.config();
    let shares = config.used_shares(&workspace.take_used()).unwrap();
    let accounting = Accounting::of(config).with_used(config, &shares);
    let weights: usize = (0..config.num_layers).flat_map(|layer| config.linear_weights(layer)).sum();
    1.0 - (accounting.total as f64 - accounting.activated(0.0)) / weights as f64
}

#[test]
fn every_choice_reaches_the_budget_and_skips_in_scoring_and_decoding() {
    let work = tempfile::tempdir().unwrap();
    let source = dense(work.path());
    let text = tokens(6, 48);
    for (choose, share) in [("uniform", 0.6), ("teal", 0.6), ("cats", 0.8), ("search", 0.6)] {
        let set = [format!("choose={choose}")];
        let set = [&set[0][..]];
        let out = work.path().join(choose);
        let made = Run::new(METHOD, &set, share, &text).run(&source, &out).unwrap();
        let config = Config::load(&out).unwrap();
        let counts = Accounting::of(&config);
        assert_eq!(counts.total as f64, made.plan.total, "{choose}");
        assert!((counts.activated(0.0) - made.plan.activated).abs() < 1.5, "{choose}");
        // Search goes in steps of a tenth of a site.
        let near = if choose == "search" { 0.08 } else { 0.01 };
        assert!(
            (made.plan.activated / counts.total as f64 - share).abs() < near,
            "{choose}: {:?}",
            made.plan
        );
        assert_eq!(tensors(&out), tensors(&source), "{choose}: weights");
        let planned = configured(METHOD, &set).unwrap();
        let planned =
            planned.plan(&Config::load(&source).unwrap(), Run::new(METHOD, &set, share, &text).budget);
        assert!((planned.unwrap().activated - share * counts.total as f64).abs() < 1.0, "{choose}");

        let model = loaded(&out);
        let measured = used(&model, &text);
        let stated = 1.0
            - (counts.total as f64 - counts.activated(0.0))
                / (0..3).flat_map(|i| config.linear_weights(i)).sum::<usize>() as f64;
        assert!((measured - stated).abs() < 2e-3, "{choose}: {measured} {stated}");
        for precision in [Precision::F32, Precision::Bf16] {
            let model = Inference::load(&out, precision).unwrap();
            let whole = logits(&model, &text[0]);
            let last = &whole[whole.len() - VOCAB as usize..];
            let tolerance = if precision == Precision::F32 { 1e-5 } else { 3e-2 };
            assert_close(choose, &decoded(&model, &text[0]), &f64s(last), tolerance);
            assert!(model.bytes() > 0);
        }
        let without = logits(&loaded(&source), &text[0]);
        let with = logits(&model, &text[0]);
        assert!(without.iter().zip(&with).any(|(a, b)| (a - b).abs() > 1e-3), "{choose} skips something");
    }
}

/// Larger tolerances skip more, in one search, and the budget is that of all parameters.
#[test]
fn a_tolerance_decides_what_a_search_skips() {
    let work = tempfile::tempdir().unwrap();
    let source = dense(work.path());
    let text = tokens(4, 32);
    let mut shares = Vec::new();
    for tolerance in ["1.00001", "1.5"] {
        let set = format!("tolerance={tolerance}");
        let set = ["choose=search", &set[..]];
        let run = Run::new(METHOD, &set, 1.0, &text);
        let (out, mut sites) = (work.path().join(tolerance), 0);
        let mut watch = |progress: Progress| {
            if progress.stage == "searching" {
                // One search of three layers.
                assert_eq!(progress.total, 12);
                sites = progress.done;
            }
        };
        let made = run.watched(&source, &out, &mut watch).unwrap();
        assert_eq!(sites, 12);
        assert!(made.plan.reached_by.contains(tolerance), "{:?}", made.plan);
        let config = Config::load(&source).unwrap();
        let planned = configured(METHOD, &set).unwrap().plan(&config, run.budget).unwrap();
        assert_eq!(planned.activated, planned.total);
        assert!(planned.reached_by.contains(tolerance), "{planned:?}");
        shares.push(made.plan.activated / made.plan.total);
        let less = Run::new(METHOD, &set, 0.8, &text);
        less.fails(&source, &work.path().join("less"), &["tolerance", "no budget below 100%"]);
    }
    assert!(shares[1] < shares[0] && shares[0] <= 1.0, "{shares:?}");
}

#[test]
fn a_tolerance_of_1_skips_nothing_and_an_infinite_one_keeps_the_least_of_every_site() {
    let work = tempfile::tempdir().unwrap();
    let source = dense(work.path());
    let text = tokens(4, 32);
    let run = |tolerance: &str| {
        let set = format!("tolerance={tolerance}");
        let set = ["choose=search", &set[..]];
        let (run, out) = (Run::new(METHOD, &set, 1.0, &text), work.path().join(tolerance));
        let made = run.run(&source, &out).unwrap();
        let method = configured(METHOD, &set).unwrap();
        let planned = method.plan(&Config::load(&source).unwrap(), run.budget).unwrap();
        // A record of the settings gives the method again.
        let resolved = method.resolved();
        assert_eq!(
            dsmoe_baselines::method(METHOD).unwrap().configure(&resolved).unwrap().resolved(),
            resolved
        );
        (out, made, planned)
    };
    let (out, made, planned) = run("1");
    assert_eq!((made.plan.activated, &made.plan.reached_by[..]), (made.plan.total, "nothing skipped"));
    assert_eq!(planned.reached_by, made.plan.reached_by);
    assert_eq!(logits(&loaded(&out), &text[0]), logits(&loaded(&source), &text[0]));
    assert_eq!(decoded(&loaded(&out), &text[1]), decoded(&loaded(&source), &text[1]));

    let (out, made, planned) = run("infinite");
    assert!(planned.reached_by.contains("tolerance infinite"), "{planned:?}");
    assert!(made.plan.reached_by.contains("tolerance infinite"), "{made:?}");
    // The least share is 0.1 in the mean of the tokens' quantiles, and about that of the tokens.
    assert_eq!(made.measured.len(), 4);
    assert!(made.measured.iter().all(|(_, share)| (0.01..0.3).contains(share)), "{made:?}");
    // No loss of this model is so many times another: such a bound passes everything, too.
    let (large, ..) = run("1000000000");
    let config = |dir: &Path| std::fs::read_to_string(dir.join("config.json")).unwrap();
    assert_eq!(config(&out), config(&large));
}

#[test]
fn the_whole_budget_skips_nothing() {
    let work = tempfile::tempdir().unwrap();
    let (source, out) = (dense(work.path()), work.path().join("all"));
    let text = tokens(2, 24);
    Run::new(METHOD, &[], 1.0, &text).run(&source, &out).unwrap();
    assert_eq!(logits(&loaded(&out), &text[0]), logits(&loaded(&source), &text[0]));
    assert_eq!(decoded(&loaded(&out), &text[1]), decoded(&loaded(&source), &text[1]));
}

/// A decoder in f64 that sets inputs to 0 as the definition says.
struct Reference<'a> {
    model: &'a Model,
    thresholds: &'a [LayerThresholds],
}

impl Reference<'_> {
    fn tensor(&self, name: &str) -> Vec<f64> {
        f64s(&self.model.params()[self.model.layout().get(name).unwrap().range.clone()])
    }

    fn masked(x: &[f64], threshold: f32) -> Vec<f64> {
        x.iter().map(|&x| if x.abs() > f64::from(threshold) { x } else { 0.0 }).collect()
    }

    fn linear(&self, layer: usize, kind: usize, x: &[f64]) -> Vec<f64> {
        let names = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up"];
        let w = self.tensor(&format!("model.layers.{layer}.{}_proj.weight", names[kind]));
        let x = Self::masked(x, self.thresholds[layer].inputs[kind]);
        w.chunks(x.len()).map(|w| w.iter().zip(&x).map(|(w, x)| w * x).sum()).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = (mean + self.model.config().rms_norm_eps).sqrt().recip();
        self.tensor(name).iter().zip(x).map(|(w, x)| w * x * scale).collect()
    }

    fn turned(&self, x: &mut [f64], position: usize) {
        let (width, theta) = (self.model.config().head_dim, self.model.config().architecture.ropes[0].theta);
        for head in x.chunks_mut(width) {
            for i in 0..width / 2 {
                let angle = position as f64 * theta.powf(-2.0 * i as f64 / width as f64);
                let (a, b) = (head[i], head[i + width / 2]);
                head[i] = a * angle.cos() - b * angle.sin();
                head[i + width / 2] = b * angle.cos() + a * angle.sin();
            }
        }
    }

    fn ffn(&self, layer: usize, x: &[f64]) -> Vec<f64> {
        let silu = |a: f64| a / (1.0 + (-a).exp());
        let gates: Vec<f64> = self.linear(layer, 4, x).into_iter().map(silu).collect();
        let gates = Self::masked(&gates, self.thresholds[layer].gate);
        let up = self.linear(layer, 5, x);
        let h: Vec<f64> = gates.iter().zip(up).map(|(gate, up)| gate * up).collect();
        let h = Self::masked(&h, self.thresholds[layer].inputs[6]);
        // Down is transposed in memory.
        let down = self.tensor(&format!("model.layers.{layer}.mlp.down_proj.weight"));
        let mut y = vec![0.0; x.len()];
        for (h, row) in h.iter().zip(down.chunks(x.len())) {
            y.iter_mut().zip(row).for_each(|(y, w)| *y += h * w);
        }
        y
    }

    fn attention(&self, layer: usize, xs: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let config = self.model.config();
        let (width, group) = (config.head_dim, config.num_heads / config.num_kv_heads);
        let of = |kind: usize| -> Vec<Vec<f64>> {
            let turn = |(t, x): (usize, &Vec<f64>)| {
                let mut y = self.linear(layer, kind, x);
                if kind < 2 {
                    self.turned(&mut y, t);
                }
                y
            };
            xs.iter().enumerate().map(turn).collect()
        };
        let (q, k, v) = (of(0), of(1), of(2));
        let token = |t: usize| {
            let mut out = vec![0.0; q[t].len()];
            for (head, out) in out.chunks_mut(width).enumerate() {
                let (own, shared) = (head * width, head / group * width);
                let score = |s: usize| -> f64 {
                    (0..width).map(|i| q[t][own + i] * k[s][shared + i]).sum::<f64>() / (width as f64).sqrt()
                };
                let scores: Vec<f64> = (0..=t).map(|s| score(s).exp()).collect();
                let total: f64 = scores.iter().sum();
                for (s, score) in scores.iter().enumerate() {
                    (0..width).for_each(|i| out[i] += score / total * v[s][shared + i]);
                }
            }
            self.linear(layer, 3, &out)
        };
        (0..xs.len()).map(token).collect()
    }

    fn logits(&self, ids: &[u32]) -> Vec<f64> {
        let hidden = self.model.config().hidden;
        let table = self.tensor("model.embed_tokens.weight");
        let mut xs: Vec<Vec<f64>> =
            ids.iter().map(|&id| table[id as usize * hidden..][..hidden].to_vec()).collect();
        let add = |xs: &mut [Vec<f64>], ys: Vec<Vec<f64>>| {
            xs.iter_mut().zip(ys).for_each(|(x, y)| x.iter_mut().zip(y).for_each(|(x, y)| *x += y));
        };
        for layer in 0..self.thresholds.len() {
            let name = format!("model.layers.{layer}.input_layernorm.weight");
            let normed: Vec<Vec<f64>> = xs.iter().map(|x| self.norm(&name, x)).collect();
            add(&mut xs, self.attention(layer, &normed));
            let name = format!("model.layers.{layer}.post_attention_layernorm.weight");
            let ys = xs.iter().map(|x| self.ffn(layer, &self.norm(&name, x))).collect();
            add(&mut xs, ys);
        }
        let head = match self.model.config().tie_word_embeddings {
            true => table,
            false => self.tensor("lm_head.weight"),
        };
        let row = |x: &Vec<f64>| {
            let x = self.norm("model.norm.weight", x);
            head.chunks(hidden).map(|w| w.iter().zip(&x).map(|(w, x)| w * x).sum()).collect::<Vec<f64>>()
        };
        xs.iter().flat_map(row).collect()
    }
}

#[test]
fn a_model_with_thresholds_is_the_masked_model() {
    let work = tempfile::tempdir().unwrap();
    let model = Model::load(&dense(work.path())).unwrap();
    let ids = &tokens(1, 9)[0];
    let by_inputs = LayerThresholds { inputs: [0.3, 0.5, 0.7, 0.1, 0.4, 0.6, 0.2], ..LayerThresholds::NONE };
    let by_gates = LayerThresholds { gate: 0.15, ..LayerThresholds::NONE };
    let both = LayerThresholds { gate: 0.1, inputs: [0.2, 0.2, 0.2, 0.0, 0.3, 0.0, 0.1], ..by_gates };
    let thresholds = vec![by_inputs, by_gates, both];
    let want = Reference { model: &model, thresholds: &thresholds }.logits(ids);
    let plain = Reference { model: &model, thresholds: &[LayerThresholds::NONE; 3] }.logits(ids);
    assert!(want.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 0.1), "the thresholds matter");
    assert_close("without", &logits(&Inference::new(&model, Precision::F32), ids), &plain, 2e-5);
    let with = Inference::with_thresholds(&model, thresholds, Precision::F32);
    assert_close("scored", &logits(&with, ids), &want, 2e-5);
    assert_close("decoded", &decoded(&with, ids), &want[want.len() - VOCAB as usize..], 2e-5);
}

#[test]
fn what_cannot_be_done_is_refused_in_one_line() {
    let work = tempfile::tempdir().unwrap();
    let (source, out) = (dense(work.path()), work.path().join("kept"));
    let text = tokens(2, 24);
    let run = Run::new(METHOD, &["choose=uniform"], 0.6, &text);
    run.run(&source, &out).unwrap();
    let other = work.path().join("other");
    // Search of thresholds of a model that has some, training, other forms.
    run.fails(&out, &other, &["has experts or thresholds", "use a dense model"]);
    Run::new("wanda", &[], 0.6, &text).fails(&out, &other, &["thresholds"]);
    refused(Model::load(&out), &["activation_thresholds", "train the dense model"]);
    for form in [ExportAs::Dense, ExportAs::Transformers] {
        let exported = export(&out, &other, &ExportOptions::new(form), &mut |_| {});
        refused(exported, &["activation_thresholds", "native"]);
    }
    let file = work.path().join("model.gguf");
    refused(export_gguf(&out, &file, Some(GgufType::Q8_0), false, &mut |_| {}), &["activation_thresholds"]);
    assert!(!other.exists() && !file.exists());
    export(&out, &other, &ExportOptions::new(ExportAs::Native), &mut |_| {}).unwrap();
    assert_eq!(logits(&loaded(&other), &text[0]), logits(&loaded(&out), &text[0]));

    Run::new(METHOD, &[], 0.01, &text).fails(
        &source,
        &work.path().join("x"),
        &["budget", "leaves none", "the least reachable is"],
    );
    Run::new(METHOD, &[], 2.0, &text).fails(
        &source,
        &work.path().join("x"),
        &["budget", "the most 44880 (100.0%)"],
    );
    let cats = Run::new(METHOD, &["choose=cats"], 0.4, &text);
    cats.fails(&source, &work.path().join("x"), &["cats skips none of attention"]);
    Run::new(METHOD, &[], 0.6, &[]).fails(&source, &work.path().join("x"), &["0 sequences are too few"]);
    for (set, words) in [
        ("step=0", "step: cannot be 0"),
        ("choose=best", "choose: cannot be"),
        ("candidates=exp", "are for search alone"),
        ("tolerance=1.01", "is for search alone"),
        ("tolerance=1", "is for search alone"),
        ("tolerance=0.999", "tolerance: cannot be 0.999; Loss after a site"),
        ("tolerance=-infinite", "tolerance: cannot be"),
        ("tolerance=low", "tolerance: cannot be"),
    ] {
        let error = configured(METHOD, &[set]).err().expect(set).to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn malformed_thresholds_are_refused() {
    let work = tempfile::tempdir().unwrap();
    let (source, out) = (dense(work.path()), work.path().join("kept"));
    Run::new(METHOD, &["choose=uniform"], 0.6, &tokens(2, 24)).run(&source, &out).unwrap();
    let text = std::fs::read_to_string(out.join("config.json")).unwrap();
    let good: serde_json::Value = serde_json::from_str(&text).unwrap();
    let wrong = |change: &dyn Fn(&mut serde_json::Value), words: &[&str]| {
        let mut json = good.clone();
        change(&mut json);
        refused(Config::from_json(Path::new("config.json"), &json.to_string()), words);
    };
    let key = "activation_thresholds";
    wrong(&|json| json[key] = json!([]), &["has 0 entries and num_hidden_layers is 3"]);
    wrong(&|json| json[key] = json!(3), &["activation_thresholds", "give one object"]);
    wrong(
        &|json| json[key][1]["inputs"][2] = json!(-0.5),
        &["activation_thresholds[1].inputs", "at least 0"],
    );
    wrong(&|json| json[key][1]["inputs"] = json!([1.0]), &["activation_thresholds"]);
    wrong(&|json| json[key][2]["used"][0] = json!(1.5), &["activation_thresholds[2].used", "0 to 1"]);
    wrong(&|json| json[key][0]["gate"] = json!(0.5), &["activation_thresholds[0].gate", "beside"]);
    wrong(&|json| json["model_type"] = json!("llama"), &["is present but model_type is not dsmoe"]);
    wrong(
        &|json| json["dsmoe"] = json!({"format_version": 1, "num_experts": 7, "threshold": 0.5}),
        &["config.json"],
    );
}
