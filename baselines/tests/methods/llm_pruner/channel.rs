//! Channel-wise pruning.

use dsmoe_core::Config;
use dsmoe_core::checkpoint::{Checkpoint, Dtype, check_llama_tensors};

use super::super::common::{Run, count, loaded, logits, saved, tensors, tokens, values};
use super::model;

#[test]
fn one_set_of_channels_leaves_every_tensor() {
    let calibration = tokens(3, 17);
    for (tied, dtype, set) in [
        (true, Dtype::F32, &["importance=taylor-first"][..]),
        (false, Dtype::BF16, &["importance=taylor-second"]),
        (false, Dtype::F32, &["importance=vector", "reduce=prod"]),
        (true, Dtype::F16, &["importance=magnitude-l1", "reduce=last"]),
    ] {
        let work = tempfile::tempdir().unwrap();
        let source = saved(&model(tied), work.path(), dtype);
        let out = work.path().join("pruned");
        let made = Run::new("llm-pruner-channel", set, 0.6, &calibration).run(&source, &out).unwrap();
        let (dense, config) = (Config::load(&source).unwrap(), Config::load(&out).unwrap());
        check_llama_tensors(&config, &Checkpoint::open(&out).unwrap()).unwrap();
        assert_eq!(config.head_dim, dense.head_dim);
        assert_eq!(made.plan.total, count(&out));
        let channel = count(&source) / dense.hidden as f64;
        assert!((count(&out) - 0.6 * count(&source)).abs() <= channel / 2.0);

        let (before, after) = (tensors(&source), tensors(&out));
        assert!(before.keys().eq(after.keys()));
        assert_eq!(after.contains_key("lm_head.weight"), !tied);
        // The final norm's entries differ from one another, also in 16 bits, when whole columns of the embedding do.
        let column = |dir, c: usize, width: usize| {
            values(dir, "model.embed_tokens.weight").chunks(width).map(|row| row[c]).collect::<Vec<_>>()
        };
        let kept: Vec<usize> = (0..config.hidden)
            .map(|c| {
                let wanted = column(out.as_path(), c, config.hidden);
                (0..dense.hidden).find(|&c| column(source.as_path(), c, dense.hidden) == wanted).unwrap()
            })
            .collect();
        assert!(kept.is_sorted_by(|a, b| a < b), "{kept:?}");
        for (name, (dtype, shape, _)) in &before {
            let (values, cols) = (values(&source, name), *shape.last().unwrap());
            let want: Vec<f32> = if name.contains("o_proj") || name.contains("down_proj") {
                kept.iter().flat_map(|&row| values[row * cols..][..cols].to_vec()).collect()
            } else {
                values.chunks(cols).flat_map(|row| kept.iter().map(|&c| row[c]).collect::<Vec<_>>()).collect()
            };
            assert_eq!(super::super::common::values(&out, name), want, "{name}");
            assert_eq!(after[name].0, *dtype);
        }
        assert!(logits(&loaded(&out), &[1, 2, 3]).iter().all(|x| x.is_finite()));
    }
}
