//! FLAP and the static core, from a dense directory to the pruned model.

use dsmoe_core::accounting::Accounting;
use dsmoe_core::calibrate::{Input, LayerStream};
use dsmoe_core::checkpoint::{Checkpoint, Dtype, check_llama_tensors};
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::gguf::{GgufType, export_gguf};
use dsmoe_core::{Config, Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::{assert_close, f64s, refused};
use serde_json::json;

use super::common::{Run, VOCAB, count, loaded, logits, made, mean_loss, tiny, tokens, values};

const SIZES: [(&str, usize); 3] = [("hidden_size", 48), ("intermediate_size", 56), ("num_hidden_layers", 3)];

fn dense(dir: &std::path::Path, mlp_bias: bool) -> std::path::PathBuf {
    let mut changes = json!({"vocab_size": VOCAB, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 8, "initializer_range": 0.3, "mlp_bias": mlp_bias});
    for (key, value) in SIZES {
        changes[key] = json!(value);
    }
    made(&tiny(&changes), dir, Dtype::F32)
}

fn name(layer: usize, tensor: &str) -> String {
    format!("model.layers.{layer}.mlp.{tensor}")
}

/// The neurons of the dense model in `source` whose gate rows the pruned one has.
fn kept(source: &std::path::Path, pruned: &std::path::Path, layer: usize) -> Vec<usize> {
    let [all, left] = [source, pruned].map(|dir| values(dir, &name(layer, "gate_proj.weight")));
    let hidden = SIZES[0].1;
    let place = |row: &[f32]| all.chunks(hidden).position(|whole| whole == row).expect("a row of the source");
    left.chunks(hidden).map(place).collect()
}

/// Values of the neurons `[tokens, neurons]` of a layer and the norms of the residual stream, where all layers before it
/// are those of `dir`.
fn neurons(dir: &std::path::Path, layer: usize, text: &[Vec<u32>]) -> (Vec<f64>, Vec<f64>) {
    let mut stream = LayerStream::open(dir, text).unwrap();
    for i in 0..layer {
        let weights = stream.layer(i).unwrap();
        stream.advance(&weights).unwrap();
    }
    let weights = stream.layer(layer).unwrap();
    let (mut h, mut norms) = (Vec::new(), Vec::new());
    stream
        .forward(&weights, &mut |tap| {
            if tap.input == Input::Neurons {
                h.extend(f64s(tap.x));
                let rows = tap.residual.chunks(SIZES[0].1);
                norms.extend(rows.map(|row| f64s(row).iter().map(|x| x * x).sum::<f64>().sqrt()));
            }
        })
        .unwrap();
    (h, norms)
}

/// The dense model with the down columns of removed neurons 0 and the pruned model's biases: it computes the same.
fn silenced(source: &std::path::Path, pruned: &std::path::Path) -> Model {
    let small = Config::load(pruned).unwrap();
    let whole = Model::load(source).unwrap();
    let mut config = whole.config().clone();
    config.architecture.output_bias = small.architecture.output_bias;
    let (hidden, num_layers) = (config.hidden, config.num_layers);
    let mut model = Model::new(config);
    for entry in model.layout().clone().entries() {
        if let Some(from) = whole.layout().get(&entry.spec.name) {
            model.params_mut()[entry.range.clone()].copy_from_slice(&whole.params()[from.range.clone()]);
        }
    }
    let layout = model.layout().clone();
    for layer in 0..num_layers {
        let range = layout.get(&name(layer, "down_proj.weight")).unwrap().range.clone();
        let (kept, down) = (kept(source, pruned, layer), values(pruned, &name(layer, "down_proj.weight")));
        let rows = &mut model.params_mut()[range];
        rows.fill(0.0);
        for (at, &neuron) in kept.iter().enumerate() {
            for c in 0..hidden {
                rows[neuron * hidden + c] = down[c * kept.len() + at];
            }
        }
        for bias in ["output_bias", "down_proj.bias"] {
            if let Some(entry) = layout.get(&name(layer, bias)) {
                model.params_mut()[entry.range.clone()].copy_from_slice(&values(pruned, &name(layer, bias)));
            }
        }
    }
    model
}

#[test]
fn removal_is_zeroing_and_a_bias() {
    let text = tokens(6, 19);
    for (method, set, mlp_bias) in [
        ("flap", &[][..], false),
        ("flap", &["structure=uniform", "metric=ifv"], true),
        ("flap", &["metric=wifn", "bias=false"], false),
        ("static-core", &[], false),
        ("static-core", &["importance=magnitude", "relative=true"], true),
        ("static-core", &["compensate=false", "importance=rms", "first=0"], false),
        ("static-core", &["intercept=false", "widths=uniform"], false),
    ] {
        let work = tempfile::tempdir().unwrap();
        let (source, out) = (dense(work.path(), mlp_bias), work.path().join("pruned"));
        let made = Run::new(method, set, 0.75, &text).run(&source, &out).unwrap();
        let config = Config::load(&out).unwrap();
        check_llama_tensors(&config, &Checkpoint::open(&out).unwrap()).unwrap();
        assert_eq!((made.plan.total, made.plan.activated), (count(&out), count(&out)), "{method} {set:?}");
        assert_eq!(Accounting::of(&config).total as f64, count(&out));
        let share = count(&out) / count(&source);
        assert!((share - 0.75).abs() < 0.01, "{method} {set:?}: {share}");
        let ids = &tokens(1, 20)[0];
        let want = logits(&Inference::new(&silenced(&source, &out), Precision::F32), ids);
        assert_close(&format!("{method} {set:?}"), &logits(&loaded(&out), ids), &f64s(&want), 2e-5);
        let text = generate(
            &loaded(&out),
            &ids[..4],
            &GenerateOptions { max_tokens: 3, ..GenerateOptions::default() },
            |_| true,
        );
        assert!(text.is_ok(), "{method}");
    }
}

/// The bias of FLAP, from the values of neurons in the dense model.
#[test]
fn flaps_bias_is_the_mean_of_what_goes() {
    let text = tokens(5, 17);
    let work = tempfile::tempdir().unwrap();
    let (source, out) = (dense(work.path(), false), work.path().join("pruned"));
    let set = ["first=false", "structure=uniform"];
    Run::new("flap", &set, 0.8, &text).run(&source, &out).unwrap();
    let (hidden, width) = (SIZES[0].1, SIZES[1].1);
    for layer in 0..SIZES[2].1 {
        let (h, _) = neurons(&source, layer, &text);
        // Without the first position of each text.
        let h: Vec<f64> = h.chunks(17 * width).flat_map(|of_text| &of_text[width..]).copied().collect();
        let tokens = h.len() / width;
        let down = values(&source, &name(layer, "down_proj.weight"));
        let stays = kept(&source, &out, layer);
        let gone: Vec<usize> = (0..width).filter(|j| !stays.contains(j)).collect();
        let mean = |j: usize| h.iter().skip(j).step_by(width).sum::<f64>() / tokens as f64;
        let want = |c: usize| gone.iter().map(|&j| f64::from(down[c * width + j]) * mean(j)).sum();
        let want: Vec<f64> = (0..hidden).map(want).collect();
        assert_close("bias", &values(&out, &name(layer, "output_bias")), &want, 1e-5);
        let variance = |j: usize| h.iter().skip(j).step_by(width).map(|h| (h - mean(j)).powi(2)).sum::<f64>();
        let score =
            |j: usize| variance(j) * (0..hidden).map(|c| f64::from(down[c * width + j]).powi(2)).sum::<f64>();
        let least = stays.iter().map(|&j| score(j)).fold(f64::INFINITY, f64::min);
        assert!(gone.iter().all(|&j| score(j) <= least * (1.0 + 1e-6)), "layer {layer}");
    }
}

/// Solves `a x = b` for `b` `[n, columns]` by elimination.
fn eliminate(mut a: Vec<f64>, mut b: Vec<f64>, n: usize) -> Vec<f64> {
    let columns = b.len() / n;
    for k in 0..n {
        for i in (0..n).filter(|&i| i != k) {
            let factor = a[i * n + k] / a[k * n + k];
            (0..n).for_each(|j| a[i * n + j] -= factor * a[k * n + j]);
            (0..columns).for_each(|j| b[i * columns + j] -= factor * b[k * columns + j]);
        }
    }
    (0..n * columns).map(|at| b[at] / a[at / columns * n + at / columns]).collect()
}

/// The static core's weights are the ridge solution in f64, on the stream of the pruned layers before.
#[test]
fn the_static_core_is_the_least_squares_fit_on_its_own_stream() {
    let (text, ridge) = (tokens(12, 23), 0.02);
    let work = tempfile::tempdir().unwrap();
    let (source, out) = (dense(work.path(), false), work.path().join("pruned"));
    let set = ["ridge=0.02", "first=5", "importance=magnitude", "relative=true", "widths=uniform"];
    Run::new("static-core", &set, 0.8, &text).run(&source, &out).unwrap();
    let (hidden, width, seq) = (SIZES[0].1, SIZES[1].1, 23);
    // Layer 1 reads the pruned layer 0: a dense directory whose layer 0 computes what the pruned one does.
    let silent = silenced(&source, &out);
    for layer in 0..2 {
        let (h, norms) = match layer {
            0 => neurons(&source, 0, &text),
            _ => of_model(&silent, layer, &text, work.path()),
        };
        let down = f64s(&values(&source, &name(layer, "down_proj.weight")));
        let column = |j: usize| (0..hidden).map(|c| down[c * width + j].powi(2)).sum::<f64>().sqrt();
        let tokens: Vec<usize> = (0..h.len() / width).collect();
        let rest: Vec<usize> = tokens.iter().copied().filter(|t| t % seq > 0).collect();
        let importance = |j: usize| rest.iter().map(|t| h[t * width + j].abs()).sum::<f64>() * column(j);
        let first = |j: usize| {
            let at_first = tokens.iter().filter(|&t| t % seq == 0);
            at_first.map(|t| h[t * width + j].abs()).fold(0.0, f64::max) * column(j)
        };
        let stays = kept(&source, &out, layer);
        let mut of_first: Vec<usize> = (0..width).collect();
        of_first.sort_by(|&a, &b| first(b).total_cmp(&first(a)));
        assert!(of_first[..5].iter().all(|j| stays.contains(j)), "layer {layer}: first positions");
        let least = stays.iter().filter(|j| !of_first[..5].contains(j)).map(|&j| importance(j));
        let least = least.fold(f64::INFINITY, f64::min);
        let gone: Vec<usize> = (0..width).filter(|j| !stays.contains(j)).collect();
        assert!(gone.iter().all(|&j| importance(j) <= least * (1.0 + 1e-5)), "layer {layer}: importance");

        let n = stays.len() + 1;
        let value = |t: usize, i: usize| stays.get(i).map_or(1.0, |&j| h[t * width + j]);
        let weight = |t: usize| norms[t].powi(-2);
        let total: f64 = rest.iter().map(|&t| weight(t)).sum();
        let mean = |i: usize| rest.iter().map(|&t| weight(t) * value(t, i)).sum::<f64>() / total;
        let spread =
            |i: usize| rest.iter().map(|&t| weight(t) * (value(t, i) - mean(i)).powi(2)).sum::<f64>();
        let lambda = ridge * (0..n - 1).map(spread).sum::<f64>() / (n - 1) as f64;
        let entry = |at: usize| {
            let (i, j) = (at / n, at % n);
            let sum: f64 = rest.iter().map(|&t| weight(t) * value(t, i) * value(t, j)).sum();
            sum + if i == j && i < n - 1 { lambda } else { 0.0 }
        };
        let residual = |t: usize, c: usize| -> f64 {
            gone.iter().map(|&j| h[t * width + j] * down[c * width + j]).sum()
        };
        let right = |at: usize| -> f64 {
            rest.iter().map(|&t| weight(t) * value(t, at / hidden) * residual(t, at % hidden)).sum()
        };
        let solved = eliminate((0..n * n).map(entry).collect(), (0..n * hidden).map(right).collect(), n);
        let want: Vec<f64> = (0..hidden * (n - 1))
            .map(|at| {
                let (c, i) = (at / (n - 1), at % (n - 1));
                down[c * width + stays[i]] + solved[i * hidden + c]
            })
            .collect();
        assert_close("down", &values(&out, &name(layer, "down_proj.weight")), &want, 2e-3);
        let bias = &solved[(n - 1) * hidden..];
        assert_close("bias", &values(&out, &name(layer, "output_bias")), bias, 2e-3);
    }
}

/// Returns what [`neurons`] returns for a model in memory whose FFNs have output biases. The model is written and read back.
fn of_model(model: &Model, layer: usize, text: &[Vec<u32>], work: &std::path::Path) -> (Vec<f64>, Vec<f64>) {
    let dir = work.join("silent");
    if !dir.exists() {
        std::fs::create_dir_all(&dir).unwrap();
        model.save(&dir, Dtype::F32).unwrap();
    }
    neurons(&dir, layer, text)
}

#[test]
fn compensation_helps_and_bf16_is_kept() {
    let work = tempfile::tempdir().unwrap();
    let changes = json!({"vocab_size": VOCAB, "initializer_range": 0.2, "num_hidden_layers": 2});
    let source = made(&tiny(&changes), work.path(), Dtype::BF16);
    let text = tokens(40, 33);
    let losses = ["compensate=true", "compensate=false"].map(|set| {
        let out = work.path().join(set);
        let set = [set, "widths=uniform"];
        let made = Run::new("static-core", &set, 0.7, &text).run(&source, &out).unwrap();
        assert_eq!(made.measured, [0, 1].map(|i| (format!("layer {i} neurons"), made.measured[0].1)));
        let set = set[0];
        let checkpoint = Checkpoint::open(&out).unwrap();
        let dtype = |tensor: &str| checkpoint.tensor(&name(1, tensor)).map(|view| view.dtype);
        assert_eq!(dtype("down_proj.weight"), Some(Dtype::BF16));
        assert_eq!(dtype("output_bias"), (set == "compensate=true").then_some(Dtype::BF16));
        difference(&source, &out, &text)
    });
    assert!(losses[0] < 0.9 * losses[1], "{losses:?}");
}

/// The mean squared difference of logits.
fn difference(a: &std::path::Path, b: &std::path::Path, text: &[Vec<u32>]) -> f64 {
    assert!(mean_loss(b, text).is_finite());
    let [a, b] = [a, b].map(loaded);
    let of = |ids: &Vec<u32>| {
        let pairs = logits(&a, ids).into_iter().zip(logits(&b, ids));
        pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
    };
    text.iter().map(of).sum()
}

#[test]
fn bad_input_is_named() {
    let work = tempfile::tempdir().unwrap();
    let (source, out) = (dense(work.path(), false), work.path().join("out"));
    let text = tokens(2, 9);
    for method in ["flap", "static-core"] {
        Run::new(method, &[], 0.75, &[]).fails(&source, &out, &["0 sequences are too few"]);
        Run::new(method, &[], 0.01, &text).fails(&source, &out, &["budget 0.01", "reach"]);
    }
    Run::new("static-core", &["ridge=0"], 0.75, &text).fails(
        &source,
        &out,
        &["ridge: cannot be 0", "above 0"],
    );
    Run::new("flap", &["metric=none"], 0.75, &text).fails(&source, &out, &["metric: cannot be"]);

    Run::new("flap", &[], 0.75, &text).run(&source, &out).unwrap();
    let gguf = export_gguf(&out, &work.path().join("x.gguf"), Some(GgufType::Q8_0), false, &mut |_| {});
    refused(gguf, &["layer_shapes"]);
    let uniform = work.path().join("uniform");
    Run::new("flap", &["structure=uniform"], 0.75, &text).run(&source, &uniform).unwrap();
    let gguf = export_gguf(&uniform, &work.path().join("x.gguf"), Some(GgufType::Q8_0), false, &mut |_| {});
    refused(gguf, &["output_bias", "llama.cpp"]);
    // Pruned again, the biases add up in one.
    let twice = work.path().join("twice");
    Run::new("static-core", &[], 0.9, &text).run(&out, &twice).unwrap();
    assert!(Config::load(&twice).unwrap().architecture.output_bias);
    assert!(mean_loss(&twice, &text).is_finite());
}

/// A layer whose neurons do nothing gives its own to the others, and the model is nearer to the dense one.
#[test]
fn widths_follow_the_change_of_the_output() {
    let work = tempfile::tempdir().unwrap();
    let source = dense(work.path(), false);
    let mut model = Model::load(&source).unwrap();
    let range = model.layout().get(&name(1, "down_proj.weight")).unwrap().range.clone();
    model.params_mut()[range].iter_mut().for_each(|w| *w *= 1e-3);
    let quiet = work.path().join("quiet");
    std::fs::create_dir_all(&quiet).unwrap();
    model.save(&quiet, Dtype::F32).unwrap();
    let text = tokens(24, 30);
    let differences = ["widths=divergence", "widths=uniform"].map(|set| {
        let out = work.path().join(set);
        Run::new("static-core", &[set, "first=4"], 0.7, &text).run(&quiet, &out).unwrap();
        let widths: Vec<usize> =
            Config::load(&out).unwrap().layers().map(|shape| shape.intermediate).collect();
        match set {
            "widths=uniform" => assert!(widths.iter().all(|&width| width == widths[0]), "{widths:?}"),
            _ => assert!(widths[1] <= widths[2] && 2 * widths[1] < widths[0], "{widths:?}"),
        }
        difference(&quiet, &out, &text)
    });
    assert!(differences[0] < differences[1], "{differences:?}");
}
