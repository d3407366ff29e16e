//! Training steps with a teacher.

use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::model::{Batch, Inference, Model, Teacher, TopRows, TrainWorkspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::cross_entropy::IGNORE;

use super::{dense, ids, step_args, train, write_dense};

const SIZES: [(&str, usize); 1] = [("vocab_size", 61)];
const TOKENS: usize = 24;

/// A model, and another one of a different width with the same vocabulary.
fn models(dir: &std::path::Path) -> (Model, std::path::PathBuf) {
    let student = dense(dir, &SIZES, Dtype::F32, false);
    let teacher = dir.join("teacher");
    let sizes = [SIZES[0], ("hidden_size", 48), ("intermediate_size", 72)];
    write_dense(&teacher, &sizes, Dtype::F32, true, 0.3);
    (Model::load(&student).unwrap(), teacher)
}

fn teacher(dir: &std::path::Path, weight: f32, student: &Model) -> Teacher {
    Teacher::new(Inference::load(dir, Precision::F32).unwrap(), weight, student.config()).unwrap()
}

#[test]
fn the_gradient_is_that_of_the_mixed_loss() {
    let dir = tempfile::tempdir().unwrap();
    let (mut model, of_teacher) = models(dir.path());
    let (inputs, mut targets) = (ids(TOKENS, 1, 61), ids(TOKENS, 2, 61));
    targets[5] = IGNORE;
    let batch = Batch { inputs: &inputs, targets: &targets, seq: 8 };
    let args = step_args(TOKENS - 1);
    let mut workspace = TrainWorkspace::new(&model, TOKENS, Precision::F32);
    for weight in [0.3, 0.9, 1.0] {
        let mut teacher = teacher(&of_teacher, weight, &model);
        let mut step = |model: &Model, grads: &mut [f32]| {
            let output = model.distill_step(grads, batch, &args, &mut teacher, &mut workspace).unwrap();
            let w = f64::from(weight);
            f64::from(args.loss_scale) * ((1.0 - w) * output.loss_sum + w * output.divergence_sum)
        };
        let mut grads = vec![0.0; model.layout().len()];
        step(&model, &mut grads);
        let norm = grads.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 0.1, "{norm}");
        let start = model.params().to_vec();
        let mut spare = vec![0.0; grads.len()];
        let mut at = |distance: f64| {
            for ((p, &p0), &g) in model.params_mut().iter_mut().zip(&start).zip(&grads) {
                *p = (f64::from(p0) + distance * f64::from(g) / norm) as f32;
            }
            step(&model, &mut spare)
        };
        let slope = (at(2e-3) - at(-2e-3)) / 4e-3;
        assert!((slope - norm).abs() < 5e-3 * norm, "weight {weight}: {slope} for {norm}");
        model.params_mut().copy_from_slice(&start);
    }
}

#[test]
fn a_teacher_without_weight_only_measures() {
    let dir = tempfile::tempdir().unwrap();
    let (model, of_teacher) = models(dir.path());
    let (inputs, targets) = (ids(TOKENS, 1, 61), ids(TOKENS, 2, 61));
    let batch = Batch { inputs: &inputs, targets: &targets, seq: 8 };
    let args = step_args(TOKENS);
    let (plain, want, mut workspace) = train(&model, batch, &args, Precision::F32);
    let mut grads = vec![0.0; want.len()];
    let mut teacher = teacher(&of_teacher, 0.0, &model);
    let output = model.distill_step(&mut grads, batch, &args, &mut teacher, &mut workspace).unwrap();
    assert!((output.loss_sum - plain.loss_sum).abs() < 1e-4);
    assert!(output.divergence_sum > 1.0 && plain.divergence_sum == 0.0, "{output:?}");
    let largest = want.iter().fold(0f32, |most, g| most.max(g.abs()));
    let off = grads.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(off < 1e-5 * largest, "{off} of {largest}");
    // A student of its own has nothing to learn.
    let own = Inference::new(&model, Precision::F32);
    let mut own = Teacher::new(own, 1.0, model.config()).unwrap();
    grads.fill(0.0);
    let output = model.distill_step(&mut grads, batch, &args, &mut own, &mut workspace).unwrap();
    assert!(output.divergence_sum.abs() < 1e-4, "{output:?}");
    assert!(grads.iter().all(|g| g.abs() < 1e-5 * largest));
}

#[test]
fn teachers_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (model, of_teacher) = models(dir.path());
    let load = |dir: &std::path::Path| Inference::load(dir, Precision::Bf16).unwrap();
    let other = dir.path().join("other");
    write_dense(&other, &[("vocab_size", 60)], Dtype::F32, true, 0.1);
    let error = |teacher, weight| Teacher::new(teacher, weight, model.config()).unwrap_err().to_string();
    assert!(error(load(&other), 0.5).contains("60 tokens for a model of 61"));
    assert!(error(load(&of_teacher), 1.5).contains("use 0 to 1"));
}

#[test]
fn the_most_likely_tokens_teach_what_the_whole_teacher_does() {
    let dir = tempfile::tempdir().unwrap();
    let (model, of_teacher) = models(dir.path());
    let (inputs, targets) = (ids(TOKENS, 1, 61), ids(TOKENS, 2, 61));
    let batch = Batch { inputs: &inputs, targets: &targets, seq: 8 };
    let args = step_args(TOKENS);
    let mut teacher = teacher(&of_teacher, 0.8, &model);
    let mut workspace = TrainWorkspace::new(&model, TOKENS, Precision::F32);
    let mut want = vec![0.0; model.layout().len()];
    let whole = model.distill_step(&mut want, batch, &args, &mut teacher, &mut workspace).unwrap();
    let mut rows = TopRows::default();
    let mut last = 0.0;
    for top in [1, 8, 61] {
        teacher.most_likely(&inputs, 8, top, &mut rows).unwrap();
        let mut grads = vec![0.0; want.len()];
        let output = model.distill_step_from(&mut grads, batch, &args, (&rows, 0.8), &mut workspace).unwrap();
        // Two kernels of the same loss.
        assert!((output.loss_sum - whole.loss_sum).abs() < 1e-7 * whole.loss_sum, "{output:?} {whole:?}");
        assert!(output.divergence_sum > last && output.divergence_sum < whole.divergence_sum + 1e-3, "{top}");
        last = output.divergence_sum;
        if top == 61 {
            let largest = want.iter().fold(0f32, |most, g| most.max(g.abs()));
            let off = grads.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!((last - whole.divergence_sum).abs() < 1e-3 && off < 1e-5 * largest, "{off} of {largest}");
        }
    }
    // The rows of a sequence do not depend on the others of its batch.
    let mut alone = TopRows::default();
    teacher.most_likely(&inputs, 8, 5, &mut rows).unwrap();
    teacher.most_likely(&inputs[8..16], 8, 5, &mut alone).unwrap();
    assert_eq!((&alone.ids[..], &alone.log_p[..]), (&rows.ids[40..80], &rows.log_p[48..96]));
    assert!(
        teacher.most_likely(&inputs, 8, 62, &mut rows).unwrap_err().to_string().contains("62 most likely")
    );
}
