//! Runs that train a part of the model: all else keeps its bits, through checkpoints, to the directory that is written.

use dsmoe_core::Model;

use crate::common::{Bed, weights};

/// The tensors of a model.
fn names(model: &Model) -> Vec<String> {
    model.layout().entries().iter().map(|entry| entry.spec.name.clone()).collect()
}

/// The tensors that the run `name` changed.
fn moved(bed: &Bed, name: &str) -> Vec<String> {
    let [before, after] = [bed.source.clone(), bed.path(name)].map(|dir| Model::load(&dir).unwrap());
    let entries = before.layout().entries().iter();
    let has_moved = entries.filter(|entry| {
        let [old, new] = [&before, &after].map(|model| &model.params()[entry.range.clone()]);
        old.iter().zip(new).any(|(old, new)| old.to_bits() != new.to_bits())
    });
    has_moved.map(|entry| entry.spec.name.clone()).collect()
}

#[test]
fn layers_that_are_not_trained_keep_their_bits_through_a_run() {
    for (experts, gates) in [(false, "sparsity=1"), (true, "active_target=0.5")] {
        let bed = Bed::new(experts);
        let more = [gates, "train_layers=[1]", "weight_decay=0.1", "save_every=7"];
        bed.whole("whole", &more);
        let of_layer: Vec<String> = names(&Model::load(&bed.source).unwrap())
            .into_iter()
            .filter(|name| name.starts_with("model.layers.1."))
            .collect();
        assert!(of_layer.len() >= 9);
        assert_eq!(moved(&bed, "whole"), of_layer, "experts: {experts}");
        bed.part("parts", 9, &more);
        bed.rest("parts", &more);
        assert_eq!(weights(&bed.path("parts")), weights(&bed.path("whole")), "experts: {experts}");
    }
}

#[test]
fn parts_that_are_not_trained_keep_their_bits_through_a_run() {
    let bed = Bed::new(true);
    let is_router = |name: &str| name.contains(".mlp.router.");
    let is_expert = |name: &str| name.contains(".mlp.") && !is_router(name);
    let all = names(&Model::load(&bed.source).unwrap());
    for (i, (parts, is_trained)) in [
        ("['ffn']", &is_expert as &dyn Fn(&str) -> bool),
        ("['routers']", &is_router),
        ("['ffn', 'attention', 'norms', 'embedding']", &|name: &str| !is_router(name)),
    ]
    .into_iter()
    .enumerate()
    {
        let (out, setting) = (format!("out-{i}"), format!("train_parts={parts}"));
        bed.whole(&out, &["active_target=0.5", "weight_decay=0.1", &setting]);
        let wanted: Vec<String> = all.iter().filter(|name| is_trained(name)).cloned().collect();
        assert!(!wanted.is_empty() && wanted.len() < all.len());
        assert_eq!(moved(&bed, &out), wanted, "{parts}");
    }
}
