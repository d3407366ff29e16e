//! Models whose layers differ, and models with masks.

use std::fs;

use dsmoe_core::checkpoint::{Dtype, copy_companions, tensor_names};
use dsmoe_core::config::LayerShape;
use dsmoe_core::init::{InitOptions, init_beside};
use dsmoe_core::{Config, Masks, Model};
use serde_json::json;

use crate::common::{agrees, json_of, number, path, shows, succeeds, weights};

#[test]
fn uneven_layers_from_inspect_to_train() {
    let dense = path("dense");
    let mut config = Config::load(&dense).unwrap();
    let narrow = LayerShape { num_heads: 2, num_kv_heads: 1, intermediate: 24 };
    config.set_layers(vec![config.layer(0), narrow]);
    init_beside(&dense, &config, &path("uneven"), &InitOptions::default(), &mut |_| {}).unwrap();
    let seen = json_of("inspect uneven");
    // Half of attention, 3 x 32 x 24 of the FFN.
    let layer =
        json!({ "num_heads": 2, "num_kv_heads": 1, "intermediate": 24, "attention": 1536, "ffn": 2304 });
    agrees(&seen["layers"][1], &layer);
    let params = 2 * 320 * 32 + 3072 + 6144 + 1536 + 2304 + 2 * 64 + 32;
    agrees(&seen, &json!({ "params_total": params, "model_type": "dsmoe", "masks": null }));
    shows(&succeeds("inspect uneven"), &["intermediate 24 to 64", "2 to 4 heads", "kv heads", "neurons"]);
    assert!(!succeeds("inspect dense").contains("neurons"));

    succeeds("train uneven --data text.txt --out uneven-trained --steps 2 --batch 2 --seq 16");
    assert_eq!(json_of("inspect uneven-trained")["layers"][1]["intermediate"], 24);
    shows(&succeeds("eval uneven-trained --data text.txt --seq 32 --limit-tokens 500"), &["perplexity"]);
    succeeds("convert uneven-trained --experts 4 --partition random --out uneven-experts");
    succeeds("export uneven-experts --as dense --out uneven-back");
    assert_eq!(weights("uneven-back"), weights("uneven-trained"));
}

#[test]
fn masks_count_what_is_kept() {
    let (dense, pruned) = (path("dense"), path("pruned"));
    let mut model = Model::load(&dense).unwrap();
    let mut masks = Masks::new();
    for (name, shape) in tensor_names(model.config()).filter(|(name, _)| name.contains("layers.1.mlp")) {
        masks.insert(name, shape[0], shape[1], |row, col| (row + col) % 4 == 0);
    }
    model.set_masks(masks).unwrap();
    fs::create_dir(&pruned).unwrap();
    model.save(&pruned, Dtype::F32).unwrap();
    copy_companions(&dense, &pruned).unwrap();

    let (whole, seen) = (json_of("inspect dense"), json_of("inspect pruned"));
    let gone = 6144.0 * 3.0 / 4.0;
    assert_eq!(seen["params_total"], whole["params_total"]);
    for (key, fewer) in [("params_activated", gone), ("flops_per_token", 2.0 * gone)] {
        assert_eq!(number(&whole[key]) - number(&seen[key]), fewer, "{key}");
    }
    agrees(&seen["masks"], &json!({ "linears": 3, "kept": 1536 }));
    assert_eq!((&seen["layers"][0]["pruned"], &seen["layers"][1]["pruned"]), (&0.into(), &4608.into()));
    shows(&succeeds("inspect pruned"), &["1,536 of 6,144 weights of 3 linears kept (25"]);

    let eval = json_of("eval pruned --data text.txt --limit-tokens 500");
    assert_eq!(number(&eval["params_activated"]), number(&seen["params_activated"]));
    succeeds("train pruned --data text.txt --out pruned-trained --steps 2 --batch 2 --seq 16");
    assert_eq!(json_of("inspect pruned-trained")["masks"], seen["masks"]);
}
