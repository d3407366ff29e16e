use super::reference::{self, Problem};
use super::{
    Dims, Distributions, Forward, ForwardBackward, ForwardPacked, IGNORE, LogSoftmaxRow, Logits, MostLikely,
    Scratch, Teacher,
};
use crate::buf::Buf;
use crate::isa::Isa;
use crate::matmul::{Mat, Packed, Precision};
use crate::testing::{
    assert_close, assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals, sized,
};

const PLAIN: Logits = Logits { scale: 1.0, cap: None };
const VARIANTS: [Logits; 4] = [
    PLAIN,
    Logits { scale: 0.125, cap: None },
    Logits { scale: 1.0, cap: Some(2.0) },
    Logits { scale: 3.0, cap: Some(30.0) },
];

#[test]
fn the_reference_gradient_is_the_derivative() {
    let dims = Dims { tokens: 3, hidden: 2, vocab: 5 };
    let (h, head, targets) = (f64s(&normals(6, 1)), f64s(&normals(10, 2)), [4, IGNORE, 0]);
    for logits in VARIANTS {
        let problem = Problem { h: &h, head: &head, targets: &targets, logits, dims };
        let loss = |problem: Problem<'_>| 0.5 * problem.forward().iter().sum::<f64>();
        let (dh, dhead) = problem.backward(0.5);
        let want_dh = finite_differences(&h, 1e-5, |h| loss(Problem { h, ..problem }));
        let want_dhead = finite_differences(&head, 1e-5, |head| loss(Problem { head, ..problem }));
        assert_close_f64("dh", &dh, &want_dh, 1e-9);
        assert_close_f64("dhead", &dhead, &want_dhead, 1e-9);
    }
}

#[test]
fn the_hand_example_comes_out() {
    // logits (ln 1, ln 2, ln 5): probabilities 1/8, 2/8, 5/8.
    let head = [0.0, 2f64.ln(), 5f64.ln()];
    let dims = Dims { tokens: 2, hidden: 1, vocab: 3 };
    let problem = Problem { h: &[1.0, 1.0], head: &head, targets: &[0, 2], logits: PLAIN, dims };
    assert_close_f64("losses", &problem.forward(), &[8f64.ln(), 1.6f64.ln()], 1e-15);
    // Scaled by 2: 1/30, 4/30, 25/30.
    let scaled = Problem { logits: Logits { scale: 2.0, cap: None }, ..problem };
    assert_close_f64("scaled", &scaled.forward(), &[30f64.ln(), 1.2f64.ln()], 1e-15);
    // Capped at 1: the logits are 0, tanh(ln 2) = 3/5 and tanh(ln 5) = 12/13.
    let capped = Problem { logits: Logits { scale: 1.0, cap: Some(1.0) }, ..problem };
    let sum = 1.0 + 0.6f64.exp() + (12.0 / 13.0f64).exp();
    assert_close_f64("capped", &capped.forward(), &[sum.ln(), sum.ln() - 12.0 / 13.0], 1e-15);
}

/// Every seventh target is ignored.
fn targets(dims: Dims) -> Vec<u32> {
    (0..dims.tokens).map(|t| if t % 7 == 3 { IGNORE } else { (t * 31 % dims.vocab) as u32 }).collect()
}

/// Returns the losses, dh, and the gradient that is added to a dhead of ones.
fn train(
    isa: Isa,
    precision: Precision,
    [hidden_states, head]: [&[f32]; 2],
    targets: &[u32],
    (scale, logits): (f32, Logits),
    dims: Dims,
) -> [Vec<f32>; 3] {
    let [mut losses, mut dh] = [targets.len(), hidden_states.len()].map(|len| vec![f32::NAN; len]);
    let (mut dhead, scratch) = (vec![1.0; head.len()], &mut Scratch::new(precision));
    ForwardBackward {
        losses: &mut losses,
        dhidden: &mut dh,
        dhead: &mut dhead,
        hidden_states,
        head,
        targets,
        teacher: None,
        scale,
        logits,
        dims,
        scratch,
    }
    .run_on(isa);
    [losses, dh, dhead]
}

#[test]
fn forward_and_backward_agree_with_the_reference_on_every_tier() {
    for &(tokens, hidden, vocab) in sized::<&[_]>(
        &[(0, 3, 5), (1, 1, 1), (5, 3, 2), (9, 20, 33), (40, 16, 515), (1300, 4, 37), (3, 2, 20_000)],
        &[(0, 3, 5), (1, 1, 1), (4, 2, 17)],
    ) {
        let dims = Dims { tokens, hidden, vocab };
        let (h, head) = (normals(tokens * hidden, 1), normals(vocab * hidden, 2));
        let targets = targets(dims);
        let (wide_h, wide_head) = (f64s(&h), f64s(&head));
        for (isa, logits) in Isa::available().into_iter().flat_map(|isa| VARIANTS.map(|logits| (isa, logits)))
        {
            let problem = Problem { h: &wide_h, head: &wide_head, targets: &targets, logits, dims };
            let want = problem.forward();
            let (want_dh, want_dhead) = problem.backward(0.25);
            let want_dhead: Vec<f64> = want_dhead.iter().map(|x| x + 1.0).collect();
            let name = format!("{} {dims:?} {logits:?}", isa.name());
            let mut losses = vec![f32::NAN; tokens];
            Forward { losses: &mut losses, hidden_states: &h, head: &head, targets: &targets, logits, dims }
                .run_on(isa);
            let [again, dh, dhead] = train(isa, Precision::F32, [&h, &head], &targets, (0.25, logits), dims);
            assert_eq!(losses, again, "{name}");
            assert_close(&format!("losses {name}"), &losses, &want, 5e-7);
            assert_close(&format!("dh {name}"), &dh, &want_dh, 2e-6);
            assert_close(&format!("dhead {name}"), &dhead, &want_dhead, 1e-6);
        }
    }
}

#[test]
fn a_packed_head_gives_the_same_losses() {
    for &(tokens, hidden, vocab) in sized::<&[_]>(
        &[(0, 3, 5), (1, 1, 1), (9, 20, 33), (1300, 4, 37), (3, 700, 20_000)],
        &[(0, 3, 5), (1, 1, 1), (4, 2, 17)],
    ) {
        let dims = Dims { tokens, hidden, vocab };
        let (h, head) = (normals(tokens * hidden, 1), normals(vocab * hidden, 2));
        let packed = Packed::new(Precision::F32, Mat::new(&head, vocab, hidden));
        let (targets, hidden_states) = (&targets(dims), &h);
        for logits in VARIANTS {
            let [mut want, mut got] = [(); 2].map(|()| vec![f32::NAN; tokens]);
            Forward { losses: &mut want, hidden_states, head: &head, targets, logits, dims }.run();
            let space = &mut Buf::default();
            ForwardPacked { losses: &mut got, hidden_states, head: &packed, targets, logits, space }.run();
            assert_eq!(got, want, "{dims:?} {logits:?}");
        }
    }
}

/// Rounding the operands to bf16 by hand and multiplying in f32 is what the precision means.
#[test]
fn bf16_rounds_the_operands_of_the_products() {
    let (tokens, hidden, vocab) = sized((50, 24, 90), (3, 6, 17));
    let dims = Dims { tokens, hidden, vocab };
    let rounded = |x: Vec<f32>| -> Vec<f32> { x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect() };
    let (h, head) = (normals(tokens * hidden, 1), normals(vocab * hidden, 2));
    let targets = targets(dims);
    let [wide_h, wide_head] = [f64s(&h), f64s(&head)];
    let problem = Problem { h: &wide_h, head: &wide_head, targets: &targets, logits: PLAIN, dims };
    let (want_dh, want_dhead) = problem.backward(1.0);
    let [near_h, near_head] = [f64s(&rounded(h.clone())), f64s(&rounded(head.clone()))];
    let want = Problem { h: &near_h, head: &near_head, ..problem }.forward();
    for isa in Isa::available() {
        let [losses, dh, mut dhead] = train(isa, Precision::Bf16, [&h, &head], &targets, (1.0, PLAIN), dims);
        dhead.iter_mut().for_each(|dhead| *dhead -= 1.0);
        assert_close(&format!("losses {}", isa.name()), &losses, &want, 2e-6);
        assert_close(&format!("dh {}", isa.name()), &dh, &want_dh, 3e-2);
        assert_close(&format!("dhead {}", isa.name()), &dhead, &want_dhead, 3e-2);
    }
}

#[test]
fn chunks_keep_the_logits_under_their_limit() {
    for vocab in [1, 50, 2048, 32_000, 128_256, 100_000_000] {
        let rows = Dims { tokens: 10_000, hidden: 1, vocab }.chunk();
        assert!(rows >= 1 && (rows == 1 || rows * vocab * 4 <= super::CHUNK_BYTES), "{vocab}: {rows} rows");
    }
}

#[test]
fn large_logits_do_not_overflow_and_nan_stays() {
    let dims = Dims { tokens: 3, hidden: 1, vocab: 40 };
    let mut head = normals(40, 1);
    (head[7], head[39]) = (1.0, -1.0);
    for isa in Isa::available() {
        let mut losses = [0.0; 3];
        Forward {
            losses: &mut losses,
            hidden_states: &[1e4, f32::NAN, 1e4],
            head: &head,
            targets: &[7, 7, IGNORE],
            logits: PLAIN,
            dims,
        }
        .run_on(isa);
        assert!(losses[0].is_finite() && losses[1].is_nan() && losses[2] == 0.0, "{losses:?}");
        for at in [0, 20, 39] {
            let mut z = vec![0.5; 40];
            z[at] = f32::NAN;
            LogSoftmaxRow { logits: &mut z }.run_on(isa);
            assert!(z.iter().all(|z| z.is_nan()), "{} {at}", isa.name());
        }
    }
}

#[test]
fn log_probabilities_agree_with_the_reference_on_every_tier() {
    for n in [1, 2, 16, 47, sized(5000, 200)] {
        let z: Vec<f32> = normals(n, 1).iter().map(|z| 20.0 * z).collect();
        let want = reference::log_softmax(&f64s(&z));
        for isa in Isa::available() {
            let mut got = z.clone();
            LogSoftmaxRow { logits: &mut got }.run_on(isa);
            assert_close(&format!("{} {n}", isa.name()), &got, &want, 2e-7);
        }
    }
}

#[test]
fn logits_of_their_own_are_those_of_the_losses() {
    for logits in VARIANTS {
        let products: Vec<f32> = normals(sized(20_000, 100), 1).iter().map(|z| 10.0 * z).collect();
        let want: Vec<f64> = products
            .iter()
            .map(|&z| {
                let z = f64::from(z) * f64::from(logits.scale);
                logits.cap.map(f64::from).map_or(z, |cap| cap * (z / cap).tanh())
            })
            .collect();
        for isa in Isa::available() {
            let mut z = products.clone();
            logits.apply_on(isa, &mut z);
            assert_close(&format!("{} {logits:?}", isa.name()), &z, &want, 3e-7);
        }
        let mut z = products.clone();
        logits.apply(&mut z);
        assert_close(&format!("{logits:?}"), &z, &want, 3e-7);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let (tokens, hidden, vocab) = sized((600, 40, 333), (5, 2, 17));
    let dims = Dims { tokens, hidden, vocab };
    let (h, head, targets) = (normals(tokens * hidden, 1), normals(vocab * hidden, 2), targets(dims));
    assert_same_on_threads("cross_entropy", || {
        train(Isa::current(), Precision::F32, [&h, &head], &targets, (0.1, VARIANTS[3]), dims)
    });
}

#[test]
#[should_panic(expected = "cross_entropy::Forward: target 5 of token 1 in a vocabulary of 5")]
fn a_target_outside_the_vocabulary_is_refused() {
    let dims = Dims { tokens: 2, hidden: 1, vocab: 5 };
    Forward {
        losses: &mut [0.0; 2],
        hidden_states: &[0.0; 2],
        head: &[0.0; 5],
        targets: &[0, 5],
        logits: PLAIN,
        dims,
    }
    .run();
}

/// The operands of a distillation: the student's, and a teacher of another width.
struct Distillation {
    h: Vec<f32>,
    head: Vec<f32>,
    targets: Vec<u32>,
    teacher_h: Vec<f32>,
    teacher_head: Vec<f32>,
    logits: Logits,
    weight: f32,
    dims: Dims,
}

/// Multiples of 1/16: products of rows have no rounding error, whose exponential would hide those of the op's own parts.
fn sixteenths(n: usize, seed: u64) -> Vec<f32> {
    normals(n, seed).iter().map(|x| (16.0 * x).round() / 16.0).collect()
}

impl Distillation {
    fn new(dims: Dims, teacher_hidden: usize, logits: Logits, weight: f32) -> Distillation {
        let Dims { tokens, hidden, vocab } = dims;
        Distillation {
            h: sixteenths(tokens * hidden, 1),
            head: sixteenths(vocab * hidden, 2),
            targets: targets(dims),
            teacher_h: sixteenths(tokens * teacher_hidden, 3),
            teacher_head: sixteenths(vocab * teacher_hidden, 4),
            logits,
            weight,
            dims,
        }
    }

    fn width(&self) -> usize {
        self.teacher_head.len() / self.dims.vocab
    }

    fn packed(&self) -> Packed {
        Packed::new(Precision::F32, Mat::new(&self.teacher_head, self.dims.vocab, self.width()))
    }

    /// Returns losses, divergences, dh, and the gradient that is added to a dhead of ones.
    fn run(&self, isa: Isa) -> [Vec<f32>; 4] {
        let (hidden_states, head, logits) = (&self.teacher_h[..], &self.packed(), self.logits);
        self.run_with(isa, Distributions::Model { hidden_states, head, logits })
    }

    /// Returns the teacher's `top` most likely tokens.
    fn most_likely(&self, isa: Isa, top: usize) -> (Vec<u32>, Vec<f32>) {
        let tokens = self.dims.tokens;
        let (mut ids, mut log_p) = (vec![u32::MAX; tokens * top], vec![f32::NAN; tokens * (top + 1)]);
        MostLikely {
            ids: &mut ids,
            log_p: &mut log_p,
            top,
            hidden_states: &self.teacher_h,
            head: &self.packed(),
            logits: self.logits,
            space: &mut Buf::default(),
        }
        .run_on(isa);
        (ids, log_p)
    }

    fn run_with(&self, isa: Isa, distributions: Distributions<'_>) -> [Vec<f32>; 4] {
        let Distillation { h, head, targets, dims, .. } = self;
        let [mut losses, mut divergences] = [(); 2].map(|()| vec![f32::NAN; dims.tokens]);
        let (mut dh, mut dhead) = (vec![f32::NAN; h.len()], vec![1.0; head.len()]);
        ForwardBackward {
            losses: &mut losses,
            dhidden: &mut dh,
            dhead: &mut dhead,
            hidden_states: h,
            head,
            targets,
            teacher: Some(Teacher { divergences: &mut divergences, distributions, weight: self.weight }),
            scale: 0.25,
            logits: self.logits,
            dims: *dims,
            scratch: &mut Scratch::default(),
        }
        .run_on(isa);
        [losses, divergences, dh, dhead]
    }
}

#[test]
fn the_reference_gradient_of_a_distillation_is_the_derivative() {
    let dims = Dims { tokens: 3, hidden: 2, vocab: 5 };
    let (h, head, targets) = (f64s(&normals(6, 1)), f64s(&normals(10, 2)), [4, IGNORE, 0]);
    let teacher_logits = f64s(&normals(15, 3));
    for (logits, weight) in VARIANTS.into_iter().zip([0.0, 0.3, 0.9, 1.0]) {
        let problem = Problem { h: &h, head: &head, targets: &targets, logits, dims };
        let teacher = reference::Teacher { logits: &teacher_logits, weight };
        let loss = |problem: Problem<'_>| 0.5 * problem.distilled(teacher);
        let (dh, dhead) = problem.distilled_backward(0.5, teacher);
        let want_dh = finite_differences(&h, 1e-5, |h| loss(Problem { h, ..problem }));
        let want_dhead = finite_differences(&head, 1e-5, |head| loss(Problem { head, ..problem }));
        assert_close_f64("dh", &dh, &want_dh, 1e-9);
        assert_close_f64("dhead", &dhead, &want_dhead, 1e-9);
    }
    // Probabilities 1/8, 2/8, 5/8 against 4/8, 2/8, 2/8.
    let head = [0.0, 2f64.ln(), 5f64.ln()];
    let dims = Dims { tokens: 1, hidden: 1, vocab: 3 };
    let problem = Problem { h: &[1.0], head: &head, targets: &[0], logits: PLAIN, dims };
    let teacher = reference::Teacher { logits: &[2f64.ln(), 0.0, 0.0], weight: 0.5 };
    let want = 0.5 * 4f64.ln() + 0.25 * 0.4f64.ln();
    assert_close_f64("divergence", &problem.divergences(teacher), &[want], 1e-15);
    assert_close_f64("mixed", &[problem.distilled(teacher)], &[0.5 * (8f64.ln() + want)], 1e-15);
}

#[test]
fn a_distillation_agrees_with_the_reference_on_every_tier() {
    for &(tokens, hidden, vocab) in
        sized::<&[_]>(&[(1, 1, 1), (9, 20, 33), (1030, 4, 37), (3, 70, 20_000)], &[(1, 1, 1), (4, 2, 17)])
    {
        let dims = Dims { tokens, hidden, vocab };
        for (logits, weight) in VARIANTS.into_iter().zip([0.9, 1.0, 0.5, 0.0]) {
            let of = Distillation::new(dims, hidden + 3, logits, weight);
            let (h, head) = (f64s(&of.h), f64s(&of.head));
            let (teacher_h, teacher_head) = (f64s(&of.teacher_h), f64s(&of.teacher_head));
            let problem = Problem { h: &h, head: &head, targets: &of.targets, logits, dims };
            let of_teacher = Dims { hidden: of.width(), ..dims };
            let teacher =
                Problem { h: &teacher_h, head: &teacher_head, dims: of_teacher, ..problem }.logits_alone();
            let teacher = reference::Teacher { logits: &teacher, weight: f64::from(weight) };
            let (want_dh, want_dhead) = problem.distilled_backward(0.25, teacher);
            let want_dhead: Vec<f64> = want_dhead.iter().map(|x| x + 1.0).collect();
            for isa in Isa::available() {
                let [losses, divergences, dh, dhead] = of.run(isa);
                let name = format!("{} {dims:?} {logits:?}", isa.name());
                assert_close(&format!("losses {name}"), &losses, &problem.forward(), 5e-7);
                let want = problem.divergences(teacher);
                assert_close(&format!("divergences {name}"), &divergences, &want, 5e-7);
                // Logits with a scale of 3 and a cap are off by 5e-6 of 30, which every probability has as a relative error.
                assert_close(&format!("dh {name}"), &dh, &want_dh, 1e-6);
                assert_close(&format!("dhead {name}"), &dhead, &want_dhead, 1e-6);
            }
        }
    }
}

#[test]
fn a_teacher_without_weight_changes_no_gradient_and_one_like_the_student_no_loss() {
    let (tokens, hidden, vocab) = sized((40, 12, 50), (3, 3, 9));
    let dims = Dims { tokens, hidden, vocab };
    let silent = Distillation::new(dims, hidden, PLAIN, 0.0);
    for isa in Isa::available() {
        let [losses, _, dh, dhead] = silent.run(isa);
        let plain =
            train(isa, Precision::F32, [&silent.h, &silent.head], &silent.targets, (0.25, PLAIN), dims);
        for (got, want) in [losses, dh, dhead].iter().zip(&plain) {
            assert_close(isa.name(), got, &f64s(want), 1e-6);
        }
        let mut like = Distillation::new(dims, hidden, VARIANTS[3], 1.0);
        (like.teacher_h, like.teacher_head) = (like.h.clone(), like.head.clone());
        let [_, divergences, dh, _] = like.run(isa);
        assert!(divergences.iter().all(|x| x.abs() < 1e-5), "{divergences:?}");
        assert!(dh.iter().all(|x| x.abs() < 1e-6), "{dh:?}");
    }
    let of = Distillation::new(dims, 9, PLAIN, 0.7);
    assert_same_on_threads("distillation", || of.run(Isa::current()));
}

#[test]
#[should_panic(expected = "cross_entropy::Teacher: divergences 2")]
fn a_teacher_of_another_vocabulary_is_refused() {
    let mut of = Distillation::new(Dims { tokens: 2, hidden: 1, vocab: 5 }, 1, PLAIN, 0.5);
    of.teacher_h.truncate(1);
    of.run(Isa::current());
}

#[test]
fn the_reference_gradient_of_the_most_likely_tokens_is_the_derivative() {
    let dims = Dims { tokens: 3, hidden: 2, vocab: 5 };
    let (h, head, targets) = (f64s(&normals(6, 1)), f64s(&normals(10, 2)), [4, IGNORE, 0]);
    let log_p = f64s(&normals(9, 3));
    for (logits, weight) in VARIANTS.into_iter().zip([0.0, 0.3, 0.9, 1.0]) {
        let problem = Problem { h: &h, head: &head, targets: &targets, logits, dims };
        let teacher = reference::TopTeacher { ids: &[4, 1, 0, 2, 3, 2], log_p: &log_p, weight };
        let loss = |problem: Problem<'_>| 0.5 * problem.top_distilled(teacher);
        let (dh, dhead) = problem.top_distilled_backward(0.5, teacher);
        let want_dh = finite_differences(&h, 1e-5, |h| loss(Problem { h, ..problem }));
        let want_dhead = finite_differences(&head, 1e-5, |head| loss(Problem { head, ..problem }));
        assert_close_f64("dh", &dh, &want_dh, 1e-9);
        assert_close_f64("dhead", &dhead, &want_dhead, 1e-9);
    }
    // Probabilities 1/8, 2/8, 5/8 against 4/8 for the first and 4/8 for the others.
    let head = [0.0, 2f64.ln(), 5f64.ln()];
    let dims = Dims { tokens: 1, hidden: 1, vocab: 3 };
    let problem = Problem { h: &[1.0], head: &head, targets: &[0], logits: PLAIN, dims };
    let teacher = reference::TopTeacher { ids: &[0], log_p: &[0.3, 0.3], weight: 1.0 };
    let want = 0.5 * 4f64.ln() + 0.5 * (4.0 / 7.0f64).ln();
    assert_close_f64("divergence", &problem.top_divergences(teacher), &[want], 1e-15);
}

#[test]
fn the_most_likely_tokens_are_those_of_sorted_logits() {
    for &(tokens, hidden, vocab, tops) in sized::<&[_]>(
        &[(1, 1, 1, [1, 1]), (9, 20, 33, [1, 33]), (1030, 4, 37, [5, 36]), (3, 70, 20_000, [64, 300])],
        &[(1, 1, 1, [1, 1]), (4, 2, 17, [1, 17])],
    ) {
        for (logits, top) in VARIANTS.into_iter().flat_map(|logits| tops.map(|top| (logits, top))) {
            let of = Distillation::new(Dims { tokens, hidden, vocab }, hidden, logits, 1.0);
            for isa in Isa::available() {
                let name = format!("{} {tokens} x {vocab} top {top} {logits:?}", isa.name());
                let (ids, log_p) = of.most_likely(isa, top);
                let mut u = vec![0.0; tokens * vocab];
                let input = Mat::new(&of.teacher_h, tokens, hidden);
                crate::matmul::MatmulPacked { c: &mut u, a: input, w: &of.packed() }.run_on(isa);
                logits.apply_on(isa, &mut u);
                for t in 0..tokens {
                    let row = &u[t * vocab..][..vocab];
                    let mut order: Vec<u32> = (0..vocab as u32).collect();
                    order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
                    assert_eq!(ids[t * top..][..top], order[..top], "{name}");
                    let want = reference::log_softmax(&f64s(row));
                    let mut wanted: Vec<f64> = order[..top].iter().map(|&id| want[id as usize]).collect();
                    let others: f64 = order[top..].iter().map(|&id| want[id as usize].exp()).sum();
                    let got = &log_p[t * (top + 1)..][..top + 1];
                    if top == vocab {
                        assert_eq!(got[top], f32::NEG_INFINITY, "{name}");
                        assert_close(&name, &got[..top], &wanted, 4e-7);
                        continue;
                    }
                    wanted.push(others.ln());
                    assert_close(&name, got, &wanted, 4e-7);
                }
            }
        }
    }
    let mut equal = Distillation::new(Dims { tokens: 2, hidden: 1, vocab: 400 }, 1, PLAIN, 1.0);
    equal.teacher_head.fill(0.5);
    let (ids, log_p) = equal.most_likely(Isa::current(), 3);
    assert_eq!(ids, [0, 1, 2, 0, 1, 2]);
    assert_close(
        "equal",
        &log_p[..4],
        &[-(400f64.ln()), -(400f64.ln()), -(400f64.ln()), (397.0 / 400.0f64).ln()],
        1e-6,
    );
    equal.teacher_head[300] = f32::NAN;
    assert!(equal.most_likely(Isa::current(), 3).1.iter().any(|log_p| log_p.is_nan()));
}

#[test]
fn a_distillation_of_the_most_likely_tokens_agrees_with_the_reference_on_every_tier() {
    for &(tokens, hidden, vocab, top) in sized::<&[_]>(
        &[(1, 1, 1, 1), (9, 20, 33, 33), (9, 20, 33, 4), (1030, 4, 37, 5), (3, 70, 20_000, 64)],
        &[(1, 1, 1, 1), (2, 2, 9, 9), (4, 2, 17, 4)],
    ) {
        let dims = Dims { tokens, hidden, vocab };
        for (logits, weight) in VARIANTS.into_iter().zip([0.9, 1.0, 0.5, 0.0]) {
            let of = Distillation::new(dims, hidden + 3, logits, weight);
            let (ids, mut log_p) = of.most_likely(Isa::current(), top);
            // The op norms a row.
            log_p.iter_mut().for_each(|log_p| *log_p += 0.25);
            let (h, head, wide) = (f64s(&of.h), f64s(&of.head), f64s(&log_p));
            let problem = Problem { h: &h, head: &head, targets: &of.targets, logits, dims };
            let teacher = reference::TopTeacher { ids: &ids, log_p: &wide, weight: f64::from(weight) };
            let (want_dh, want_dhead) = problem.top_distilled_backward(0.25, teacher);
            let want_dhead: Vec<f64> = want_dhead.iter().map(|x| x + 1.0).collect();
            for isa in Isa::available() {
                let distributions = Distributions::Top { ids: &ids, log_p: &log_p };
                let [losses, divergences, dh, dhead] = of.run_with(isa, distributions);
                let name = format!("{} {dims:?} top {top} {logits:?}", isa.name());
                assert_close(&format!("losses {name}"), &losses, &problem.forward(), 5e-7);
                let want = problem.top_divergences(teacher);
                assert_close(&format!("divergences {name}"), &divergences, &want, 5e-6);
                assert_close(&format!("dh {name}"), &dh, &want_dh, 1e-5);
                assert_close(&format!("dhead {name}"), &dhead, &want_dhead, 4e-6);
            }
        }
    }
    let (tokens, hidden, vocab) = sized((600, 4, 50), (5, 3, 9));
    let of = Distillation::new(Dims { tokens, hidden, vocab }, 9, VARIANTS[3], 0.7);
    assert_same_on_threads("the most likely tokens", || {
        let (ids, log_p) = of.most_likely(Isa::current(), 7);
        of.run_with(Isa::current(), Distributions::Top { ids: &ids, log_p: &log_p })
    });
}

#[test]
fn all_tokens_give_the_whole_divergence_and_fewer_give_less() {
    let (tokens, hidden, vocab) = sized((40, 12, 50), (3, 3, 9));
    let of = Distillation::new(Dims { tokens, hidden, vocab }, 9, PLAIN, 0.8);
    let [losses, whole, dh, dhead] = of.run(Isa::current());
    let mut last = vec![0.0; tokens];
    for top in [1, sized(5, 2), sized(20, 5), vocab] {
        let (ids, log_p) = of.most_likely(Isa::current(), top);
        let got = of.run_with(Isa::current(), Distributions::Top { ids: &ids, log_p: &log_p });
        assert!(got[1].iter().zip(&last).all(|(more, less)| *more >= less - 1e-5), "{top}");
        last.clone_from(&got[1]);
        if top == vocab {
            for (got, want) in got.iter().zip([&losses, &whole, &dh, &dhead]) {
                assert_close("all", got, &f64s(want), 5e-6);
            }
        }
    }
}

#[test]
#[should_panic(expected = "cross_entropy::Teacher: divergences 2, 4 ids of up to 5, 6 probabilities")]
fn a_likely_token_outside_the_vocabulary_is_refused() {
    let of = Distillation::new(Dims { tokens: 2, hidden: 1, vocab: 5 }, 1, PLAIN, 0.5);
    of.run_with(Isa::current(), Distributions::Top { ids: &[0, 1, 5, 2], log_p: &[-1.0; 6] });
}
