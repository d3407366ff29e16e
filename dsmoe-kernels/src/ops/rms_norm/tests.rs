use super::{Backward, BackwardHeads, Forward, ForwardHeads, ForwardSum, Heads, Restore, reference};
use crate::isa::Isa;
use crate::testing::{
    assert_close, assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals, sized,
};

const EPS: f32 = 1e-5;

/// The results of a norm and its gradient; `dw` is added to ones.
struct Run {
    y: Vec<f32>,
    rstd: Vec<f32>,
    dx: Vec<f32>,
    dw: Vec<f32>,
}

/// The rows of a norm, with their gradient.
#[derive(Clone, Copy)]
struct Rows<'a> {
    x: &'a [f32],
    w: &'a [f32],
    dy: &'a [f32],
    offset: f32,
}

impl Rows<'_> {
    /// Runs the norm forward and backward on one tier.
    fn run(self, isa: Isa) -> Run {
        let Rows { x, w, offset, .. } = self;
        let tokens = x.len() / w.len();
        let [mut y, mut dx] = [(); 2].map(|()| vec![f32::NAN; x.len()]);
        let (mut rstd, mut dw) = (vec![f32::NAN; tokens], vec![1.0; w.len()]);
        Forward { y: &mut y, rstd: &mut rstd, x, weight: w, offset, eps: EPS }.run_on(isa);
        self.backward(isa, &rstd, [&mut dx, &mut dw], false);
        Run { y, rstd, dx, dw }
    }

    /// Runs the gradient alone: `dx` is set, or with `add` added to, and `dw` is added to.
    fn backward(self, isa: Isa, rstd: &[f32], [dx, dweight]: [&mut [f32]; 2], add: bool) {
        let Rows { x, w, dy, offset } = self;
        Backward { dx, dweight, dy, x, weight: w, offset, rstd, add }.run_on(isa);
    }
}

#[test]
fn the_reference_gradient_is_the_derivative() {
    let (x, w, dy) = (f64s(&normals(10, 1)), f64s(&normals(5, 2)), f64s(&normals(10, 3)));
    let loss = |x: &[f64], w: &[f64]| -> f64 {
        reference::forward(x, w, 0.1).0.iter().zip(&dy).map(|(y, dy)| y * dy).sum()
    };
    let (dx, dw) = reference::backward(&dy, &x, &w, &reference::forward(&x, &w, 0.1).1);
    assert_close_f64("dx", &dx, &finite_differences(&x, 1e-5, |x| loss(x, &w)), 1e-9);
    assert_close_f64("dw", &dw, &finite_differences(&w, 1e-5, |w| loss(&x, w)), 1e-9);
}

#[test]
fn forward_and_backward_agree_with_the_reference_on_every_tier() {
    for offset in [0.0, 1.0] {
        check_against_the_reference(offset);
    }
}

/// Returns the weight of the reference.
fn shifted(w: &[f32], offset: f32) -> Vec<f64> {
    w.iter().map(|&w| f64::from(w) + f64::from(offset)).collect()
}

fn check_against_the_reference(offset: f32) {
    for &(tokens, hidden) in sized::<&[_]>(
        &[(0, 8), (1, 1), (3, 7), (5, 16), (33, 100), (700, 65), (9, 2049)],
        &[(0, 8), (1, 1), (3, 7), (5, 16), (9, 33)],
    ) {
        let (x, w) = (normals(tokens * hidden, 1), normals(hidden, 2));
        let dy = normals(tokens * hidden, 3);
        let whole = shifted(&w, offset);
        let (want_y, want_rstd) = reference::forward(&f64s(&x), &whole, f64::from(EPS));
        let (want_dx, want_dw) = reference::backward(&f64s(&dy), &f64s(&x), &whole, &want_rstd);
        let want_dw: Vec<f64> = want_dw.iter().map(|x| x + 1.0).collect();
        for isa in Isa::available() {
            let name = format!("{} [{tokens}, {hidden}]", isa.name());
            let Run { y, rstd, dx, dw } = Rows { x: &x, w: &w, dy: &dy, offset }.run(isa);
            assert_close(&format!("y {name}"), &y, &want_y, 5e-7);
            assert_close(&format!("rstd {name}"), &rstd, &want_rstd, 5e-7);
            assert_close(&format!("dx {name}"), &dx, &want_dx, 1e-6);
            assert_close(&format!("dw {name}"), &dw, &want_dw, 2e-6);
        }
    }
}

#[test]
fn joined_forms_are_the_sum_of_their_parts() {
    for offset in [0.0, 1.0] {
        check_joined_forms(offset);
    }
}

fn check_joined_forms(offset: f32) {
    let (tokens, hidden) = sized((300, 70), (9, 20));
    let [a, b, dy] = [1, 2, 3].map(|seed| normals(tokens * hidden, seed));
    let w = normals(hidden, 4);
    let x: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
    for isa in Isa::available() {
        let rows = Rows { x: &x, w: &w, dy: &dy, offset };
        let Run { y: want_y, rstd: want_rstd, dx, dw } = rows.run(isa);
        let [mut y, mut sum] = [(); 2].map(|()| vec![f32::NAN; tokens * hidden]);
        let mut rstd = vec![f32::NAN; tokens];
        ForwardSum { y: &mut y, rstd: &mut rstd, x: &mut sum, a: &a, b: &b, weight: &w, offset, eps: EPS }
            .run_on(isa);
        assert_eq!((&y, &rstd, &sum), (&want_y, &want_rstd, &x), "{}", isa.name());
        Restore { y: &mut y, x: &x, weight: &w, offset, rstd: &rstd }.run_on(isa);
        assert_eq!(y, want_y, "{} restored", isa.name());

        let (mut added, mut dw_again) = (a.clone(), vec![1.0; hidden]);
        rows.backward(isa, &rstd, [&mut added, &mut dw_again], true);
        let want: Vec<f32> = a.iter().zip(&dx).map(|(a, dx)| a + dx).collect();
        assert_eq!((added, dw), (want, dw_again), "{}", isa.name());
    }
}

/// Every head of a strided matrix is a row of the plain norm: the bits are the same, and columns of others stay.
#[test]
fn heads_are_rows_of_one_head() {
    let shapes = sized::<&[_]>(
        &[(0, 2, 8, 20, 0), (1, 1, 5, 5, 0), (7, 3, 8, 40, 9), (300, 4, 33, 140, 8), (9, 1, 700, 800, 100)],
        &[(0, 2, 8, 20, 0), (1, 1, 5, 5, 0), (7, 3, 8, 40, 9), (9, 2, 17, 40, 5)],
    );
    for (&(tokens, heads, head_dim, stride, first), offset) in
        shapes.iter().zip([0.0, 1.0].into_iter().cycle())
    {
        let width = heads * head_dim;
        let (matrix, dmatrix) = (normals(tokens * stride, 1), normals(tokens * stride, 2));
        let w = normals(head_dim, 3);
        let cut =
            |x: &[f32]| -> Vec<f32> { x.chunks(stride).flat_map(|x| x[first..][..width].to_vec()).collect() };
        let (x, dy) = (cut(&matrix), cut(&dmatrix));
        for isa in Isa::available() {
            let name = format!("{} {tokens} {heads} {head_dim}", isa.name());
            let Run { y, rstd, dx, dw } = Rows { x: &x, w: &w, dy: &dy, offset }.run(isa);
            let want_dw = f64s(&dw);

            let norm = Heads { heads, stride, offset, eps: EPS };
            let (mut got, mut saved) = (matrix.clone(), vec![f32::NAN; x.len()]);
            let mut got_rstd = vec![f32::NAN; rstd.len()];
            let columns = first.min(got.len())..;
            ForwardHeads {
                x: &mut got[columns.clone()],
                saved: Some(&mut saved),
                rstd: &mut got_rstd,
                weight: &w,
                heads: norm,
            }
            .run_on(isa);
            assert_eq!((cut(&got), &saved, &got_rstd), (y, &x, &rstd), "{name}");
            let mut unsaved = matrix.clone();
            let x = &mut unsaved[columns.clone()];
            ForwardHeads { x, saved: None, rstd: &mut got_rstd, weight: &w, heads: norm }.run_on(isa);
            assert_eq!(unsaved, got, "{name}");

            let (mut got_dx, mut got_dw) = (dmatrix.clone(), vec![1.0; head_dim]);
            BackwardHeads {
                dx: &mut got_dx[columns],
                dweight: &mut got_dw,
                x: &saved,
                rstd: &rstd,
                weight: &w,
                heads: norm,
            }
            .run_on(isa);
            assert_eq!(cut(&got_dx), dx, "{name}");
            assert_close(&format!("dw {name}"), &got_dw, &want_dw, 2e-6);
            for (old, new) in [(&matrix, &got), (&dmatrix, &got_dx)] {
                for (old, new) in old.chunks(stride).zip(new.chunks(stride)) {
                    let others = |x: &[f32]| [&x[..first], &x[first + width..]].concat();
                    assert_eq!(others(old), others(new), "{name}");
                }
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit_of_heads() {
    let (tokens, heads, head_dim, stride) = sized((900, 4, 32, 200), (20, 2, 8, 24));
    let norm = Heads { heads, stride, offset: 1.0, eps: EPS };
    let (matrix, w) = (normals(tokens * stride, 1), normals(head_dim, 2));
    assert_same_on_threads("rms_norm of heads", || {
        let (mut x, mut dx, mut dw) = (matrix.clone(), matrix.clone(), vec![0.0; head_dim]);
        let (mut saved, mut rstd) = (vec![0.0; tokens * heads * head_dim], vec![0.0; tokens * heads]);
        let all = Some(&mut saved[..]);
        ForwardHeads { x: &mut x, saved: all, rstd: &mut rstd, weight: &w, heads: norm }.run();
        BackwardHeads { dx: &mut dx, dweight: &mut dw, x: &saved, rstd: &rstd, weight: &w, heads: norm }
            .run();
        (x, dx, dw)
    });
}

#[test]
#[should_panic(expected = "rms_norm::ForwardHeads: 7 values, rstd 2")]
fn rows_shorter_than_their_heads_are_refused() {
    let heads = Heads { heads: 1, stride: 4, offset: 0.0, eps: EPS };
    ForwardHeads { x: &mut [0.0; 7], saved: None, rstd: &mut [0.0; 2], weight: &[1.0; 4], heads }.run();
}

#[test]
fn a_nan_reaches_its_row_and_no_other() {
    let mut x = normals(3 * 37, 1);
    x[37 + 36] = f32::NAN;
    for isa in Isa::available() {
        let (mut y, mut rstd) = (vec![0.0; 3 * 37], [0.0; 3]);
        Forward { y: &mut y, rstd: &mut rstd, x: &x, weight: &[1.0; 37], offset: 0.0, eps: EPS }.run_on(isa);
        assert!(y[37..74].iter().all(|y| y.is_nan()));
        assert!(y[..37].iter().chain(&y[74..]).all(|y| y.is_finite()));
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let (tokens, hidden) = sized((700, 130), (12, 20));
    let (x, w, dy) = (normals(tokens * hidden, 1), normals(hidden, 2), normals(tokens * hidden, 3));
    assert_same_on_threads("rms_norm", || {
        let rows = Rows { x: &x, w: &w, dy: &dy, offset: 0.0 };
        let Run { mut y, rstd, mut dx, mut dw } = rows.run(Isa::current());
        rows.backward(Isa::current(), &rstd, [&mut dx, &mut dw], true);
        Restore { y: &mut y, x: &x, weight: &w, offset: 0.0, rstd: &rstd }.run();
        [y, dx, rstd, dw]
    });
}
