//! The divergence of a layer that is changed alone is that of the models' logits.

use std::path::Path;

use dsmoe_core::calibrate::{Down, FfnTap, LayerStream};
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::Config;
use dsmoe_core::divergence::{Alone, Change};
use dsmoe_core::model::{Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::{assert_close_f64, f64s};
use serde_json::json;

const SEQ: usize = 12;
const VOCAB: usize = 75;

/// KL(p | q), mean over tokens, in f64.
fn divergence(p: &[f64], q: &[f64]) -> f64 {
    let total = |z: &[f64]| z.iter().map(|z| z.exp()).sum::<f64>();
    let tokens = p.chunks(VOCAB).zip(q.chunks(VOCAB));
    let of_token = |(p, q): (&[f64], &[f64])| {
        let terms = p.iter().zip(q).map(|(a, b)| {
            let (of_p, of_q) = (a.exp() / total(p), b.exp() / total(q));
            of_p * (of_p / of_q).ln()
        });
        terms.sum::<f64>()
    };
    tokens.map(of_token).sum::<f64>() / (p.len() / VOCAB) as f64
}

fn logits(dir: &Path, text: &[Vec<u32>]) -> Vec<f64> {
    let model = Inference::load(dir, Precision::F32).unwrap();
    f64s(&text.iter().flat_map(|ids| crate::logits(&model, [&ids[..]])).collect::<Vec<f32>>())
}

/// A model in which the FFN of a layer is silent, or half as loud.
fn changed(dir: &Path, out: &Path, layer: usize, factor: f32) {
    let mut model = Model::load(dir).unwrap();
    let name = format!("model.layers.{layer}.mlp.down_proj.weight");
    let range = model.layout().get(&name).unwrap().range.clone();
    model.params_mut()[range].iter_mut().for_each(|w| *w *= factor);
    std::fs::create_dir_all(out).unwrap();
    model.save(out, Dtype::F32).unwrap();
}

#[test]
fn it_is_that_of_the_models_logits() {
    let keys = [
        json!({}),
        json!({"model_type": "gemma2", "query_pre_attn_scalar": 4, "sliding_window": 8, "final_logit_softcapping": 2.0}),
        json!({"model_type": "granite", "logits_scaling": 0.5, "tie_word_embeddings": false}),
    ];
    for keys in keys {
        let mut json = json!({"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 88,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true});
        json.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let mut model = Model::new(Config::from_json(Path::new("config.json"), &json.to_string()).unwrap());
        let values = dsmoe_kernels::testing::normals(model.params().len(), 5);
        model.params_mut().iter_mut().zip(values).for_each(|(p, x)| *p = 0.3 * x);
        let work = tempfile::tempdir().unwrap();
        let [dir, out] = ["dense", "changed"].map(|name| work.path().join(name));
        std::fs::create_dir_all(&dir).unwrap();
        model.save(&dir, Dtype::F32).unwrap();
        let ids = crate::ids(3 * SEQ, 0, VOCAB as u32);
        let text: Vec<Vec<u32>> = ids.chunks(SEQ).map(<[u32]>::to_vec).collect();

        let mut copies = Alone::open(&dir, &text, 1000, Precision::F32).unwrap();
        let stream = LayerStream::open(&dir, &[]).unwrap();
        let factors = [[1.0f32, 0.0], [0.5, 0.0], [0.0, 0.5]];
        let (mut want, whole) = (Vec::new(), logits(&dir, &text));
        for (layer, factors) in factors.into_iter().enumerate() {
            let weights = stream.layer(layer).unwrap();
            let change = |factor: f32| -> Box<Change<'static>> {
                let down = Down::of(Precision::F32, &weights);
                Box::new(move |y: &mut [f32], tap: FfnTap<'_>| {
                    let neurons: Vec<f32> = tap.neurons.iter().map(|h| factor * h).collect();
                    down.forward(y, &neurons);
                })
            };
            copies.layer(&weights, &mut factors.map(change)).unwrap();
            for factor in factors {
                changed(&dir, &out, layer, factor);
                want.push(divergence(&whole, &logits(&out, &text)));
            }
        }
        let got = copies.divergences().unwrap();
        assert!(want[1] > 1e-3, "{keys}: {want:?}");
        assert_close_f64(&keys.to_string(), &got, &want, 1e-4);
        assert!(got[0].abs() < 1e-6);
    }
}

/// A few sequences stand for all, and no more tokens than asked for are passed.
#[test]
fn little_text_serves() {
    let work = tempfile::tempdir().unwrap();
    let dir = crate::dense(work.path(), &[("vocab_size", VOCAB), ("num_hidden_layers", 1)], Dtype::F32, true);
    let text: Vec<Vec<u32>> = (0..9).map(|i| vec![i, 3, 5, 7]).collect();
    let of = |text: &[Vec<u32>], tokens| {
        let mut copies = Alone::open(&dir, text, tokens, Precision::F32).unwrap();
        let weights = LayerStream::open(&dir, &[]).unwrap().layer(0).unwrap();
        copies.layer(&weights, &mut [Box::new(|y: &mut [f32], _: FfnTap<'_>| y.fill(0.0))]).unwrap();
        copies.divergences().unwrap()
    };
    let every_third: Vec<Vec<u32>> = text.iter().step_by(3).cloned().collect();
    assert_eq!(of(&text, 12), of(&every_third, 1000));
    assert_eq!(of(&text, 1), of(&text[..1], 1000));
}
