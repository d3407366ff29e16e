//! Layers of different shapes: a model without some heads and neurons is the model in which these do nothing.

use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::LayerShape;
use dsmoe_core::init::preset;
use dsmoe_core::model::{After, Batch, Cache, Inference, Segment, TrainWorkspace, Workspace};
use dsmoe_core::params::Entry;
use dsmoe_core::{Config, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::testing::refused;

use super::{
    HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCAB, config, config_json, fill, read, tokens,
};
use crate::{logits, step_args};

const GROUP: usize = HEADS / KV_HEADS;

/// Per layer the key-value heads and the neurons that stay.
fn kept() -> [(Vec<usize>, Vec<usize>); LAYERS] {
    let all = (0..INTERMEDIATE).collect::<Vec<_>>();
    [
        (vec![1], vec![0, 3, 4, 9, 17]),
        (vec![0, 1], all.clone()),
        (vec![0], all.into_iter().filter(|j| j % 3 != 1).collect()),
    ]
}

fn shapes() -> Vec<LayerShape> {
    let shape = |(kv, neurons): &(Vec<usize>, Vec<usize>)| LayerShape {
        num_heads: kv.len() * GROUP,
        num_kv_heads: kv.len(),
        intermediate: neurons.len(),
    };
    kept().iter().map(shape).collect()
}

/// Rows and columns in memory of the whole tensor that its part in the small model consists of.
fn part(entry: &Entry) -> (Vec<usize>, Vec<usize>) {
    let (shape, name) = (&entry.spec.shape, entry.spec.name.as_str());
    let all = |n: usize| (0..n).collect::<Vec<_>>();
    let (rows, cols) = if shape.len() == 2 { (shape[0], shape[1]) } else { (1, shape[0]) };
    let Some(layer) = entry.layer else { return (all(rows), all(cols)) };
    let (kv, neurons) = &kept()[layer];
    let heads: Vec<usize> = kv.iter().flat_map(|g| g * GROUP..(g + 1) * GROUP).collect();
    let values = |heads: &[usize]| heads.iter().flat_map(|h| h * HEAD_DIM..(h + 1) * HEAD_DIM).collect();
    match () {
        _ if name.contains("q_proj") => (values(&heads), all(cols)),
        _ if name.contains("k_proj") || name.contains("v_proj") => (values(kv), all(cols)),
        _ if name.contains("o_proj") => (all(rows), values(&heads)),
        _ if name.contains(".mlp.") => (neurons.clone(), all(cols)),
        _ => (all(rows), all(cols)),
    }
}

/// Values of the small model's tensors out of an arena of the whole one's.
fn cut(whole: &Model, arena: &[f32], small: &Model) -> Buf {
    let mut out = Buf::zeros(small.layout().len());
    for entry in whole.layout().entries() {
        let width = *entry.spec.shape.last().unwrap();
        let (rows, cols) = part(entry);
        let values = rows.iter().flat_map(|r| cols.iter().map(move |c| (r, c)));
        let to = &mut out[small.layout().get(&entry.spec.name).unwrap().range.clone()];
        assert_eq!(to.len(), rows.len() * cols.len(), "{}", entry.spec.name);
        for (to, (r, c)) in to.iter_mut().zip(values) {
            *to = arena[entry.range.start + r * width + c];
        }
    }
    out
}

/// The small model, and the whole one with what is missing there silenced: its columns of o_proj and down_proj are 0.
fn pair() -> (Model, Model) {
    let mut whole = Model::new(config());
    fill(&mut whole, 3);
    for entry in whole.layout().clone().entries() {
        let name = &entry.spec.name;
        if name.contains("o_proj") || name.contains("down_proj") {
            let width = entry.spec.shape[1];
            let (rows, cols) = part(entry);
            for (i, p) in whole.params_mut()[entry.range.clone()].iter_mut().enumerate() {
                *p = if rows.contains(&(i / width)) && cols.contains(&(i % width)) { *p } else { 0.0 };
            }
        }
    }
    let mut config = config();
    config.set_layers(shapes());
    let mut small = Model::new(config);
    let params = cut(&whole, whole.params(), &small);
    small.params_mut().copy_from_slice(&params);
    (small, whole)
}

fn close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() < 2e-5 * largest, "{what} {i}: {got} for {want}");
    }
}

#[test]
fn missing_heads_and_neurons_are_silent_ones() {
    let (small, whole) = pair();
    for precision in [Precision::F32, Precision::Bf16] {
        let (small, whole) = (Inference::new(&small, precision), Inference::new(&whole, precision));
        let ids = tokens(13, 1);
        let (got, want) = (logits(&small, [&ids[..]]), logits(&whole, [&ids[..]]));
        if precision == Precision::Bf16 {
            // Sums are rounded in another order, here and there to the next bf16.
            let far = got.iter().zip(&want).filter(|(a, b)| (*a - *b).abs() > 0.05).count();
            assert!(far == 0, "{far} logits differ");
            continue;
        }
        close("logits", &got, &want);
        // Token by token, with a cache of its own and beside another sequence.
        let mut workspace = Workspace::default();
        let (mut one, mut each) = (Cache::new(&small, 4), Cache::new(&small, 4));
        let mut other = Cache::new(&small, 4);
        for (i, &id) in ids.iter().enumerate() {
            let row = &want[i * VOCAB..(i + 1) * VOCAB];
            close("decode", small.decode(&[id], &mut one, None, &mut workspace).unwrap(), row);
            let mut caches = [&mut other, &mut each];
            let rows = small.decode_each(&[5, id], &mut caches, None, &mut workspace).unwrap();
            close("decode_each", &rows[VOCAB..], row);
        }
        // As segments: the second continues the first.
        let segments = [
            Segment { tokens: 5, after: After::Nothing },
            Segment { tokens: 8, after: After::Segment(0) },
            Segment { tokens: 3, after: After::Nothing },
        ];
        let all = [&ids[..], &tokens(3, 2)].concat();
        let targets: Vec<(usize, u32)> = (0..all.len()).map(|i| (i, (i % VOCAB) as u32)).collect();
        let mut likelihoods = |model: &Inference| -> Vec<f32> {
            let found = model.likelihoods(&all, &segments, &targets, None, &mut workspace).unwrap();
            found.iter().map(|likelihood| likelihood.log_probability).collect()
        };
        let (got, want) = (likelihoods(&small), likelihoods(&whole));
        close("likelihoods", &got, &want);
    }
}

#[test]
fn gradients_are_those_of_the_model_with_silent_parts() {
    let (small, whole) = pair();
    let (inputs, targets) = (tokens(2 * 9, 3), tokens(2 * 9, 4));
    let step = |model: &Model| {
        let mut grads = Buf::zeros(model.layout().len());
        let mut workspace = TrainWorkspace::new(model, inputs.len(), Precision::F32);
        let (batch, args) = (Batch { inputs: &inputs, targets: &targets, seq: 9 }, step_args(10));
        // Twice: nothing of the first pass may show in the second.
        model.train_step(&mut grads, batch, &args, &mut workspace).unwrap();
        grads.clear();
        let output = model.train_step(&mut grads, batch, &args, &mut workspace).unwrap();
        (output.loss_sum, grads)
    };
    let ((loss, got), (want_loss, want)) = (step(&small), step(&whole));
    assert!((loss - want_loss).abs() < 1e-4, "{loss} for {want_loss}");
    let want = cut(&whole, &want, &small);
    for entry in small.layout().entries() {
        close(&entry.spec.name, &got[entry.range.clone()], &want[entry.range.clone()]);
    }
}

#[test]
fn a_directory_keeps_the_shapes() {
    let (small, _) = pair();
    let dir = tempfile::tempdir().unwrap();
    small.save(dir.path(), Dtype::F32).unwrap();
    let text = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
    assert!(text.contains("\"model_type\": \"dsmoe\"") && text.contains("layer_shapes"), "{text}");
    let back = Model::load(dir.path()).unwrap();
    assert_eq!(back.config().layers().collect::<Vec<_>>(), shapes());
    assert_eq!(back.config().to_json(), text);
    assert_eq!(back.params(), small.params());
    let (loaded, ids) = (Inference::load(dir.path(), Precision::F32).unwrap(), tokens(9, 5));
    assert_eq!(logits(&loaded, [&ids[..]]), logits(&Inference::new(&small, Precision::F32), [&ids[..]]));
}

#[test]
fn even_layers_are_a_plain_llama() {
    let mut config = read(&config_json(false)).unwrap();
    assert_eq!(config.head_dim, HIDDEN / HEADS);
    let shape = LayerShape { num_heads: 2, num_kv_heads: 1, intermediate: 7 };
    config.set_layers(vec![shape; LAYERS]);
    let text = config.to_json();
    for part in [
        "\"model_type\": \"llama\"",
        "\"LlamaForCausalLM\"",
        "\"num_attention_heads\": 2",
        "\"num_key_value_heads\": 1",
        "\"intermediate_size\": 7",
        "\"head_dim\": 4",
    ] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    assert!(!text.contains("layer_shapes"), "{text}");
    let back = read(&text).unwrap();
    assert!(back.is_even() && back.layers().all(|layer| layer == shape));
    let mut config = read(&config_json(false)).unwrap();
    config.set_hidden(10);
    let back = read(&config.to_json()).unwrap();
    assert_eq!((back.hidden, back.head_dim, back.num_heads), (10, 4, HEADS));
}

#[test]
fn wrong_shapes_are_refused() {
    let mut uneven = config();
    uneven.set_layers(shapes());
    let text = uneven.to_json();
    let last = text.rfind("\"num_key_value_heads\": 1").unwrap();
    let with_last = |to: &str| format!("{}{to}{}", &text[..last], &text[last + 24..]);
    let heads = "layer_shapes[2].num_key_value_heads is";
    for (wrong, parts) in [
        (with_last("\"num_key_value_heads\": 3"), [heads, " 3", "does not divide num_attention_heads 2"]),
        (with_last("\"num_key_value_heads\": 0"), [heads, " 0", "use an"]),
        (with_last("\"kv\": 1"), ["layer_shapes is wrong", "unknown field `kv`", "for each layer"]),
        (
            text.replace("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4"),
            ["layer_shapes has 3 entries", "num_hidden_layers", "is 4"],
        ),
        (
            text.replacen("\"intermediate_size\": 20", "\"intermediate_size\": 21", 1),
            ["intermediate_size is 21", "largest of layer_shapes", "is 20"],
        ),
        (
            text.replace("\"model_type\": \"dsmoe\"", "\"model_type\": \"llama\""),
            ["layer_shapes is present", "but model_type", "is not dsmoe"],
        ),
    ] {
        refused(read(&wrong), &parts);
    }
    for value in ["3", "[1, 2, 3]", "{}"] {
        let wrong = format!("{}, \"layer_shapes\": {value}}}", config_json(true).trim_end_matches('}'));
        refused(read(&wrong.replace("\"llama\"", "\"dsmoe\"")), &["layer_shapes is wrong"]);
    }
}

fn pruned(name: &str, layers: std::ops::RangeInclusive<usize>, shape: LayerShape) -> Config {
    let mut config = preset(name).unwrap();
    let layer = |(i, whole)| if layers.contains(&i) { shape } else { whole };
    config.set_layers(config.layers().enumerate().map(layer).collect());
    config
}

/// The rows of the paper's table 1 that pruning blocks reproduces.
#[test]
fn counts_of_block_pruning() {
    let count = |config: &Config| {
        let counts = Accounting::of(config);
        assert_eq!(counts.activated(0.0), counts.total as f64);
        counts.total
    };
    let shape = |heads: usize, kv_heads: usize, intermediate: usize| LayerShape {
        num_heads: heads,
        num_kv_heads: kv_heads,
        intermediate,
    };
    assert_eq!(count(&pruned("llama-2-7b", 4..=29, shape(15, 15, 5160))), 3_943_108_608);
    // Either of two ways for the 1B model: 10 layers with 2 key-value heads, or 15 with 4.
    assert_eq!(count(&pruned("llama-3.2-1b", 3..=12, shape(8, 2, 1319))), 734_894_080);
    assert_eq!(count(&pruned("llama-3.2-1b", 1..=15, shape(16, 4, 3610))), 734_894_080);
    for (name, hidden, total) in [("llama-2-7b", 2401, 3_949_935_521), ("llama-3.2-1b", 1215, 733_161_375)] {
        let mut narrow = preset(name).unwrap();
        narrow.set_hidden(hidden);
        assert_eq!(count(&narrow), total, "{name}");
    }
}
