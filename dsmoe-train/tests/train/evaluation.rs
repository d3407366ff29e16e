//! Evaluation against windows scored one by one.

use crate::common::*;
use dsmoe_core::Inference;
use dsmoe_core::model::{Batch, Workspace};
use dsmoe_train::eval::evaluate_detailed;
use dsmoe_train::{EvalOptions, evaluate};

/// Mean loss over `windows` of (start, end, first scored), each in a forward pass of its own.
fn by_hand(model: &Inference, ids: &[u32], windows: &[(usize, usize, usize)]) -> (f64, usize) {
    let (mut sum, mut count) = (0.0, 0);
    for &(start, end, first) in windows {
        let len = end - start - 1;
        let mut losses = vec![0.0; len];
        let batch = Batch { inputs: &ids[start..end - 1], targets: &ids[start + 1..end], seq: len };
        model.score(&mut losses, batch, None, &mut Workspace::default()).unwrap();
        let scored = &losses[first - start - 1..];
        sum += scored.iter().map(|&x| f64::from(x)).sum::<f64>();
        count += scored.len();
    }
    (sum / count as f64, count)
}

#[test]
fn windows_are_those_of_the_protocol() {
    let model = Bed::new(true).inference();
    let ids = &text(1).ids[..100];
    let windows: Vec<_> = (0..100).step_by(16).map(|at| (at, (at + 16).min(100), at + 1)).collect();
    let (nll, predicted) = by_hand(&model, ids, &windows);
    for batch_tokens in [1, 40, 1024] {
        let mut heard = Vec::new();
        let options = EvalOptions { batch_tokens, ..EvalOptions::new(16) };
        let report = evaluate(&model, ids, options, &mut |done, of| heard.push((done, of))).unwrap();
        assert_eq!((report.tokens, report.predicted), (100, predicted));
        assert!((report.nll - nll).abs() < 1e-6, "{} {nll}", report.nll);
        assert_eq!(report.ppl, report.nll.exp());
        assert_eq!(heard.last(), Some(&(7, 7)));
        let by_layer = report.active_ratio_per_layer.unwrap();
        assert!((by_layer.iter().sum::<f64>() / 2.0 - report.active_ratio.unwrap()).abs() < 1e-12);
        assert!(report.params_activated < report.params_total as f64 && report.flops_per_token > 0.0);
    }

    let strided = [(0, 16, 1), (8, 24, 16), (16, 30, 24)];
    let (nll, predicted) = by_hand(&model, &ids[..30], &strided);
    let options = EvalOptions { stride: 8, ..EvalOptions::new(16) };
    let report = evaluate(&model, &ids[..30], options, &mut |_, _| {}).unwrap();
    assert_eq!((report.predicted, predicted), (29, 29));
    assert!((report.nll - nll).abs() < 1e-6, "{} {nll}", report.nll);
}

#[test]
fn details_add_up_to_the_report() {
    for (experts, stride) in [(true, 16), (true, 8), (false, 16)] {
        let model = Bed::new(experts).inference();
        let ids = &text(1).ids[..90];
        let options = EvalOptions { stride, ..EvalOptions::new(16) };
        let (report, detail) = evaluate_detailed(&model, ids, options, &mut |_, _| {}).unwrap();
        let plain = evaluate(&model, ids, options, &mut |_, _| {}).unwrap();
        assert_eq!((report.nll, report.active_ratio), (plain.nll, plain.active_ratio));
        assert_eq!(detail.windows.iter().map(|window| window.predicted).sum::<usize>(), report.predicted);
        let sum: f64 = detail.windows.iter().map(|window| window.nll_sum).sum();
        assert!((sum / report.predicted as f64 - report.nll).abs() < 1e-9);
        let (first, rest) = detail.losses.split_at(detail.windows[0].predicted);
        assert_eq!(first.iter().map(|&loss| f64::from(loss)).sum::<f64>(), detail.windows[0].nll_sum);
        assert_eq!(first.len() + rest.len(), report.predicted);
        assert_eq!(detail.active.len(), if experts { report.predicted } else { 0 });
        if stride == 16
            && let Some(ratio) = report.active_ratio
        {
            let of = (report.predicted * 2 * model.config().num_experts().unwrap()) as f64;
            let active: u32 = detail.active.iter().sum();
            assert!((f64::from(active) / of - ratio).abs() < 1e-12);
        }
    }
}

#[test]
fn a_dense_model_reports_no_shares() {
    let model = Bed::new(false).inference();
    let report = evaluate(&model, &text(1).ids, EvalOptions::new(32), &mut |_, _| {}).unwrap();
    let json = serde_json::to_value(&report).unwrap();
    for key in ["active_ratio", "active_ratio_per_layer", "zero_active_share"] {
        assert!(json[key].is_null(), "{key}");
    }
    assert_eq!(report.params_activated, report.params_total as f64);
}

#[test]
fn what_cannot_be_evaluated_is_said() {
    let model = Bed::new(false).inference();
    let long = text(1).ids;
    for (ids, seq, part) in [
        (&[1][..], 8, "1 tokens"),
        (&[1, 2, 3], 1, "seq is 1"),
        (&[1, 2, 999, 4], 8, "999"),
        (&long, 80, "max_position_embeddings"),
    ] {
        let options = EvalOptions::new(seq);
        let error = evaluate(&model, ids, options, &mut |_, _| {}).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
