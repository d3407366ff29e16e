//! Models whose layers differ, and models with masks.

use std::fs;

use dsmoe_core::checkpoint::{Dtype, copy_companions, tensor_names};
use dsmoe_core::config::LayerShape;
use dsmoe_core::init::{InitOptions, init_beside};
use dsmoe_core::{Config, Masks, Model};

use crate::common::{at, fixture, json_of, succeeds};

#[test]
fn uneven_layers_from_inspect_to_train() {
    let fixture = fixture();
    let uneven = fixture.out("uneven");
    let mut config = Config::load(&fixture.dense).unwrap();
    let narrow = LayerShape { num_heads: 2, num_kv_heads: 1, intermediate: 24 };
    config.set_layers(vec![config.layer(0), narrow]);
    init_beside(&fixture.dense, &config, &uneven, &InitOptions::default(), &mut |_| {}).unwrap();
    let seen = json_of(&["inspect", at(&uneven)]);
    let layer = &seen["layers"][1];
    assert_eq!(
        (&layer["num_heads"], &layer["num_kv_heads"], &layer["intermediate"]),
        (&2.into(), &1.into(), &24.into())
    );
    // Half of attention, 3 x 32 x 24 of the FFN.
    assert_eq!((&layer["attention"], &layer["ffn"]), (&1536.into(), &2304.into()));
    assert_eq!(seen["params_total"], 2 * 320 * 32 + 3072 + 6144 + 1536 + 2304 + 2 * 64 + 32);
    assert_eq!((&seen["model_type"], seen["masks"].is_null()), (&"dsmoe".into(), true));
    let human = succeeds(&["inspect", at(&uneven)]);
    assert!(human.contains("intermediate 24 to 64") && human.contains("2 to 4 heads"), "{human}");
    assert!(human.contains("kv heads") && human.contains("neurons"), "{human}");
    assert!(!succeeds(&["inspect", at(&fixture.dense)]).contains("neurons"));

    let out = fixture.out("uneven-trained");
    let common =
        ["--data", at(&fixture.text), "--out", at(&out), "--steps", "2", "--batch", "2", "--seq", "16"];
    json_of(&[&["train", at(&uneven)], &common[..]].concat());
    assert_eq!(json_of(&["inspect", at(&out)])["layers"][1]["intermediate"], 24);
    let eval = ["eval", at(&out), "--data", at(&fixture.text), "--seq", "32", "--limit-tokens", "500"];
    assert!(succeeds(&eval).contains("perplexity"));
    let experts = fixture.out("uneven-experts");
    succeeds(&["convert", at(&out), "--experts", "4", "--partition", "random", "--out", at(&experts)]);
    let back = fixture.out("uneven-back");
    succeeds(&["export", at(&experts), "--as", "dense", "--out", at(&back)]);
    let weights = |dir: &std::path::Path| fs::read(dir.join("model.safetensors")).unwrap();
    assert_eq!(weights(&back), weights(&out));
}

#[test]
fn masks_count_what_is_kept() {
    let fixture = fixture();
    let pruned = fixture.out("pruned");
    let mut model = Model::load(&fixture.dense).unwrap();
    let mut masks = Masks::new();
    for (name, shape) in tensor_names(model.config()).filter(|(name, _)| name.contains("layers.1.mlp")) {
        masks.insert(name, shape[0], shape[1], |row, col| (row + col) % 4 == 0);
    }
    model.set_masks(masks).unwrap();
    fs::create_dir(&pruned).unwrap();
    model.save(&pruned, Dtype::F32).unwrap();
    copy_companions(&fixture.dense, &pruned).unwrap();

    let (dense, seen) = (json_of(&["inspect", at(&fixture.dense)]), json_of(&["inspect", at(&pruned)]));
    let gone = 6144.0 * 3.0 / 4.0;
    assert_eq!(seen["params_total"], dense["params_total"]);
    let number = |value: &serde_json::Value, key: &str| value[key].as_f64().unwrap();
    assert_eq!(number(&dense, "params_activated") - number(&seen, "params_activated"), gone);
    assert_eq!(number(&dense, "flops_per_token") - number(&seen, "flops_per_token"), 2.0 * gone);
    assert_eq!((&seen["masks"]["linears"], &seen["masks"]["kept"]), (&3.into(), &1536.into()));
    assert_eq!((&seen["layers"][0]["pruned"], &seen["layers"][1]["pruned"]), (&0.into(), &4608.into()));
    let human = succeeds(&["inspect", at(&pruned)]);
    assert!(human.contains("1,536 of 6,144 weights of 3 linears kept (25"), "{human}");

    let eval = json_of(&["eval", at(&pruned), "--data", at(&fixture.text), "--limit-tokens", "500"]);
    assert_eq!(number(&eval, "params_activated"), number(&seen, "params_activated"));
    let out = fixture.out("pruned-trained");
    let common =
        ["--data", at(&fixture.text), "--out", at(&out), "--steps", "2", "--batch", "2", "--seq", "16"];
    json_of(&[&["train", at(&pruned)], &common[..]].concat());
    assert_eq!(json_of(&["inspect", at(&out)])["masks"], seen["masks"]);
}
