//! The parameter counts of the published models and of the paper's rows.

use std::path::Path;

use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_core::init::preset;

fn converted(name: &str, bias: bool) -> Accounting {
    let dense = preset(name).unwrap().to_json();
    let mut map: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&dense).unwrap();
    map.insert("model_type".into(), "dsmoe".into());
    map.insert(
        "dsmoe".into(),
        serde_json::json!({"format_version": 1, "num_experts": 8, "threshold": 0.5, "partition": "contiguous",
            "router_bias": bias, "gate_value": "sigmoid", "rescale": "none", "zero_active": "skip", "ste": true}),
    );
    let text = serde_json::Value::Object(map).to_string();
    Accounting::of(&Config::from_json(Path::new("config.json"), &text).unwrap())
}

/// The count of the paper's table: no routers.
fn without_routers(accounting: &Accounting, mean_active: f64) -> f64 {
    accounting.activated(mean_active) - accounting.router as f64
}

#[test]
fn published_totals() {
    let one = Accounting::of(&preset("llama-3.2-1b").unwrap());
    assert_eq!((one.attention, one.ffn, one.embedding), (16 * 10_485_760, 16 * 50_331_648, 262_668_288));
    assert_eq!((one.total, one.non_ffn, one.router), (1_235_814_400, 430_508_032, 0));
    let seven = Accounting::of(&preset("llama-2-7b").unwrap());
    assert_eq!(
        (seven.attention, seven.ffn, seven.embedding),
        (32 * 67_108_864, 32 * 135_266_304, 262_144_000)
    );
    assert_eq!((seven.total, seven.non_ffn), (6_738_415_616, 2_409_893_888));
    let total = |name| Accounting::of(&preset(name).unwrap()).total;
    assert_eq!(total("llama-3.2-3b"), 3_212_749_824);
    assert_eq!(total("llama-3.1-8b"), 8_030_261_248);
    assert_eq!(total("llama-2-13b"), 13_015_864_320);
}

#[test]
fn experts_and_routers() {
    let (one, seven) = (converted("llama-3.2-1b", false), converted("llama-2-7b", false));
    assert_eq!((one.ffn / 16 / 8, seven.ffn / 32 / 8), (6_291_456, 16_908_288));
    assert_eq!((one.router, seven.router), (262_144, 1_048_576));
    assert_eq!(one.total, 1_235_814_400 + 262_144);
    assert_eq!(one.activated(8.0), one.total as f64);
    assert_eq!(converted("llama-3.2-1b", true).router, 16 * (8 * 2048 + 8));
}

#[test]
fn activated_parameters_of_the_paper() {
    let (one, seven) = (converted("llama-3.2-1b", false), converted("llama-2-7b", false));
    for (experts, million, billion) in [(2.0, 631.8, 3.492), (3.0, 732.5, 4.033), (4.0, 833.2, 4.574)] {
        assert!((without_routers(&one, experts) / 1e6 - million).abs() < 0.06, "{experts}");
        assert!((without_routers(&seven, experts) / 1e9 - billion).abs() < 0.0006, "{experts}");
    }
    assert!((without_routers(&one, 3.0248) / 1e6 - 735.0).abs() < 0.1);
    assert!((one.activated(3.0248) / 1e6 - 735.256).abs() < 0.001);
    assert!((without_routers(&seven, 2.81) / 1e9 - 3.93).abs() < 0.001);
}

#[test]
fn shares_of_the_threshold_table() {
    let (one, seven) = (converted("llama-3.2-1b", false), converted("llama-2-7b", false));
    for (seven_share, seven_experts, one_share, one_experts) in [
        (65.45, 3.70, 64.19, 3.60),
        (62.70, 3.35, 62.32, 3.37),
        (60.43, 3.07, 60.79, 3.19),
        (58.46, 2.83, 59.35, 3.01),
        (56.54, 2.59, 57.87, 2.83),
        (54.77, 2.37, 56.34, 2.64),
        (52.54, 2.09, 54.37, 2.40),
    ] {
        // Two decimals of experts are half a hundredth of one: 0.03 % of the 1B model, 0.04 % of the 7B.
        let share = |model, experts, total| 100.0 * without_routers(model, experts) / total;
        assert!((share(&one, one_experts, 1_235_814_400.0) - one_share).abs() < 0.05, "{one_share}");
        assert!((share(&seven, seven_experts, 6_738_415_616.0) - seven_share).abs() < 0.05, "{seven_share}");
    }
}

#[test]
fn operations_per_token() {
    let dense = Accounting::of(&preset("llama-3.2-1b").unwrap());
    let matrices = 16.0 * (10_485_760.0 + 50_331_648.0) + 128_256.0 * 2048.0;
    let attention = 16.0 * 4.0 * 32.0 * 64.0 * 512.0;
    assert_eq!(dense.flops_per_token(0.0, 512.0), 2.0 * matrices + attention);
    let moe = converted("llama-3.2-1b", true);
    let active = matrices - 16.0 * 50_331_648.0 * 5.0 / 8.0 + 16.0 * 8.0 * 2048.0;
    assert_eq!(moe.flops_per_token(3.0, 512.0), 2.0 * active + attention);
    // An untied head is multiplied too, its embedding only looked up.
    let seven = Accounting::of(&preset("llama-2-7b").unwrap());
    assert_eq!(seven.flops_per_token(0.0, 0.0), 2.0 * (6_738_415_616.0 - 131_072_000.0 - 65.0 * 4096.0));
}

/// Returns the counts of a model of a family: vocabulary, hidden, intermediate, layers, heads, key-value heads and width of
/// a head.
fn of_family(family: &str, sizes: [usize; 7], more: serde_json::Value) -> Accounting {
    let [vocab, hidden, intermediate, layers, heads, kv_heads, head_dim] = sizes;
    let mut json = serde_json::json!({
        "model_type": family, "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    });
    json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Accounting::of(&Config::from_json(Path::new("config.json"), &json.to_string()).unwrap())
}

#[test]
fn published_totals_of_other_families() {
    let tied = serde_json::json!({"tie_word_embeddings": true});
    let own = serde_json::json!({});
    for (family, sizes, more, total) in [
        ("qwen2", [151_936, 896, 4864, 24, 14, 2, 64], &tied, 494_032_768),
        ("qwen3", [151_936, 1024, 3072, 28, 16, 8, 128], &tied, 596_049_920),
        ("mistral", [32_000, 4096, 14_336, 32, 32, 8, 128], &own, 7_241_732_096),
        ("phi3", [32_064, 3072, 8192, 32, 32, 32, 96], &own, 3_821_079_552),
        ("gemma", [256_000, 2048, 16_384, 18, 8, 1, 256], &own, 2_506_172_416),
        ("gemma2", [256_000, 2304, 9216, 26, 8, 4, 256], &own, 2_614_341_888),
        ("gemma3_text", [262_144, 1152, 6912, 26, 4, 1, 256], &own, 999_885_952),
        ("olmo2", [100_352, 4096, 11_008, 32, 32, 32, 128], &own, 7_298_617_344),
        ("smollm3", [128_256, 2048, 11_008, 36, 16, 4, 128], &own, 3_075_098_624),
    ] {
        assert_eq!(of_family(family, sizes, more.clone()).total, total, "{family}");
    }
}

/// Mixtral-8x7B, Qwen1.5-MoE-A2.7B and OLMoE-1B-7B: what they hold, and what a token uses.
#[test]
fn published_totals_of_mixtures() {
    let experts = |key: &str, count: usize, top_k: usize| {
        let mut keys = serde_json::json!({"num_experts_per_tok": top_k});
        keys[key] = count.into();
        keys
    };
    let mut qwen = experts("num_experts", 60, 4);
    qwen["moe_intermediate_size"] = 1408.into();
    qwen["shared_expert_intermediate_size"] = 5632.into();
    for (family, sizes, more, held, activated) in [
        (
            "mixtral",
            [32_000, 4096, 14_336, 32, 32, 8, 128],
            experts("num_local_experts", 8, 2),
            46_702_792_704,
            12_879_925_248.0,
        ),
        ("qwen2_moe", [151_936, 2048, 5632, 24, 16, 16, 128], qwen, 14_315_784_192, 2_689_173_504.0),
        (
            "olmoe",
            [50_304, 2048, 1024, 16, 16, 16, 128],
            experts("num_experts", 64, 8),
            6_919_161_856,
            1_282_017_280.0,
        ),
    ] {
        let counts = of_family(family, sizes, more);
        assert_eq!((counts.total, counts.activated(0.0)), (held, activated), "{family}");
    }
}

#[test]
fn biases_are_parameters_and_no_operations() {
    let sizes = [100, 8, 12, 3, 4, 2, 6];
    let plain = of_family("llama", sizes, serde_json::json!({}));
    let biased = of_family("llama", sizes, serde_json::json!({"attention_bias": true, "mlp_bias": true}));
    // q 24, k and v 12 each, o 8, down 8; gate and up 12 each.
    assert_eq!((biased.biases, biased.ffn - plain.ffn), (3 * (24 + 12 + 12 + 8 + 8), 3 * 24));
    assert_eq!(biased.total, plain.total + biased.biases + 3 * 24);
    assert_eq!(biased.flops_per_token(0.0, 7.0), plain.flops_per_token(0.0, 7.0));
    assert_eq!(biased.activated(0.0) - plain.activated(0.0), (biased.total - plain.total) as f64);
}

#[test]
fn layers_with_a_window_attend_to_no_more() {
    let sizes = [100, 8, 12, 2, 4, 2, 6];
    let window = |more| of_family("gemma2", sizes, more);
    let (wide, narrow) = (
        window(serde_json::json!({"sliding_window": null})),
        window(serde_json::json!({"sliding_window": 4})),
    );
    // One of the two layers has the window; four operations for each of 24 values of a query and position.
    let differ = |context: f64| wide.flops_per_token(0.0, context) - narrow.flops_per_token(0.0, context);
    assert_eq!((differ(3.0), differ(4.0), differ(10.0)), (0.0, 0.0, 4.0 * 24.0 * 6.0));
    // The positions seen by ten tokens: 1, 2, 3, then 4 for each of seven; the mean of a whole one is taken as half.
    let mean = |counts: &Accounting, seq| counts.mean_flops_per_token(0.0, seq);
    assert_eq!(mean(&wide, 10), wide.flops_per_token(0.0, 5.0));
    assert_eq!(mean(&wide, 4) - mean(&narrow, 4), 0.0);
    let seen = 4.0 - 4.0 * 3.0 / (2.0 * 10.0);
    assert!((mean(&wide, 10) - mean(&narrow, 10) - 4.0 * 24.0 * (5.0 - seen)).abs() < 1e-9);
}

/// A core is part of the active share; routers and corrections are counted for every token.
#[test]
fn parts_beside_experts_are_counted() {
    let of = |parts: serde_json::Value| {
        let mut map: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&preset("llama-3.2-1b").unwrap().to_json()).unwrap();
        let mut moe = serde_json::json!({"format_version": 2, "num_experts": 256, "threshold": 0.5,
            "partition": "contiguous", "router_bias": true, "gate_value": "binary", "rescale": "none",
            "zero_active": "skip", "ste": true});
        moe.as_object_mut().unwrap().extend(parts.as_object().unwrap().clone());
        map.insert("model_type".into(), "dsmoe".into());
        map.insert("dsmoe".into(), moe);
        let text = serde_json::Value::Object(map).to_string();
        Accounting::of(&Config::from_json(Path::new("config.json"), &text).unwrap())
    };
    let dense = Accounting::of(&preset("llama-3.2-1b").unwrap());
    let full = of(serde_json::json!({"core": 48}));
    assert_eq!(full.router, 16 * (208 * 2048 + 208));
    let low = of(serde_json::json!({"core": 48, "router_rank": 32, "correction": true}));
    assert_eq!(low.router, 16 * (32 * 2048 + 208 * 32 + 208 + 2048 * 32));
    for counts in [full, low] {
        assert_eq!((counts.ffn, counts.num_experts, counts.fixed_active), (dense.ffn, 256.0, None));
        let want = (dense.non_ffn + counts.router) as f64 + dense.ffn as f64 * 96.0 / 256.0;
        assert_eq!(counts.activated(96.0), want);
        let matrices = (counts.router - 16 * 208) as f64;
        let flops = counts.flops_per_token(96.0, 0.0) - dense.flops_per_token(0.0, 0.0);
        assert_eq!(flops, 2.0 * (matrices - dense.ffn as f64 * 160.0 / 256.0));
    }
}
