use super::{Dims, Forward, ForwardBackward, ForwardPacked, IGNORE, LogSoftmaxRow, Scratch, reference};
use crate::buf::Buf;
use crate::isa::Isa;
use crate::matmul::{Mat, Packed, Precision};
use crate::testing::{
    assert_close, assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals,
};

#[test]
fn the_reference_gradient_is_the_derivative() {
    let dims = Dims { tokens: 3, hidden: 2, vocab: 5 };
    let (h, head, targets) = (f64s(&normals(6, 1)), f64s(&normals(10, 2)), [4, IGNORE, 0]);
    let loss =
        |h: &[f64], head: &[f64]| 0.5 * reference::forward(h, head, &targets, dims).iter().sum::<f64>();
    let (dh, dhead) = reference::backward(&h, &head, &targets, 0.5, dims);
    assert_close_f64("dh", &dh, &finite_differences(&h, 1e-5, |h| loss(h, &head)), 1e-9);
    assert_close_f64("dhead", &dhead, &finite_differences(&head, 1e-5, |head| loss(&h, head)), 1e-9);
}

#[test]
fn the_hand_example_comes_out() {
    // logits (ln 1, ln 2, ln 5): probabilities 1/8, 2/8, 5/8.
    let head = [0.0, 2f64.ln(), 5f64.ln()];
    let dims = Dims { tokens: 2, hidden: 1, vocab: 3 };
    let losses = reference::forward(&[1.0, 1.0], &head, &[0, 2], dims);
    assert_close_f64("losses", &losses, &[8f64.ln(), 1.6f64.ln()], 1e-15);
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
    scale: f32,
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
        scale,
        dims,
        scratch,
    }
    .run_on(isa);
    [losses, dh, dhead]
}

#[test]
fn forward_and_backward_agree_with_the_reference_on_every_tier() {
    for (tokens, hidden, vocab) in
        [(0, 3, 5), (1, 1, 1), (5, 3, 2), (9, 20, 33), (40, 16, 515), (1300, 4, 37), (3, 2, 20_000)]
    {
        let dims = Dims { tokens, hidden, vocab };
        let (h, head) = (normals(tokens * hidden, 1), normals(vocab * hidden, 2));
        let targets = targets(dims);
        let want = reference::forward(&f64s(&h), &f64s(&head), &targets, dims);
        let (want_dh, want_dhead) = reference::backward(&f64s(&h), &f64s(&head), &targets, 0.25, dims);
        let want_dhead: Vec<f64> = want_dhead.iter().map(|x| x + 1.0).collect();
        for isa in Isa::available() {
            let name = format!("{} {dims:?}", isa.name());
            let mut losses = vec![f32::NAN; tokens];
            Forward { losses: &mut losses, hidden_states: &h, head: &head, targets: &targets, dims }
                .run_on(isa);
            let [again, dh, dhead] = train(isa, Precision::F32, [&h, &head], &targets, 0.25, dims);
            assert_eq!(losses, again, "{name}");
            assert_close(&format!("losses {name}"), &losses, &want, 5e-7);
            assert_close(&format!("dh {name}"), &dh, &want_dh, 1e-6);
            assert_close(&format!("dhead {name}"), &dhead, &want_dhead, 1e-6);
        }
    }
}

#[test]
fn a_packed_head_gives_the_same_losses() {
    for (tokens, hidden, vocab) in [(0, 3, 5), (1, 1, 1), (9, 20, 33), (1300, 4, 37), (3, 700, 20_000)] {
        let dims = Dims { tokens, hidden, vocab };
        let (h, head) = (normals(tokens * hidden, 1), normals(vocab * hidden, 2));
        let [mut want, mut got] = [(); 2].map(|()| vec![f32::NAN; tokens]);
        Forward { losses: &mut want, hidden_states: &h, head: &head, targets: &targets(dims), dims }.run();
        let packed = Packed::new(Precision::F32, Mat::new(&head, vocab, hidden));
        ForwardPacked {
            losses: &mut got,
            hidden_states: &h,
            head: &packed,
            targets: &targets(dims),
            logits: &mut Buf::default(),
        }
        .run();
        assert_eq!(got, want, "{dims:?}");
    }
}

/// Rounding the operands to bf16 by hand and multiplying in f32 is what the precision means.
#[test]
fn bf16_rounds_the_operands_of_the_products() {
    let dims = Dims { tokens: 50, hidden: 24, vocab: 90 };
    let rounded = |x: Vec<f32>| -> Vec<f32> { x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect() };
    let (h, head) = (normals(50 * 24, 1), normals(90 * 24, 2));
    let targets = targets(dims);
    let want = reference::forward(&f64s(&rounded(h.clone())), &f64s(&rounded(head.clone())), &targets, dims);
    let (want_dh, want_dhead) = reference::backward(&f64s(&h), &f64s(&head), &targets, 1.0, dims);
    for isa in Isa::available() {
        let [losses, dh, mut dhead] = train(isa, Precision::Bf16, [&h, &head], &targets, 1.0, dims);
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
    for n in [1, 2, 16, 47, 5000] {
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
fn threads_do_not_change_a_bit() {
    let dims = Dims { tokens: 600, hidden: 40, vocab: 333 };
    let (h, head, targets) = (normals(600 * 40, 1), normals(333 * 40, 2), targets(dims));
    assert_same_on_threads("cross_entropy", || {
        train(Isa::current(), Precision::F32, [&h, &head], &targets, 0.1, dims)
    });
}

#[test]
#[should_panic(expected = "cross_entropy::Forward: target 5 of token 1 in a vocabulary of 5")]
fn a_target_outside_the_vocabulary_is_refused() {
    let dims = Dims { tokens: 2, hidden: 1, vocab: 5 };
    Forward { losses: &mut [0.0; 2], hidden_states: &[0.0; 2], head: &[0.0; 5], targets: &[0, 5], dims }
        .run();
}
