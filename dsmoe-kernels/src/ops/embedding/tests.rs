use super::{Backward, Forward, reference};
use crate::testing::{
    assert_close, assert_close_f64, assert_same_on_threads, f64s, finite_differences, normals, sized,
};

#[test]
fn the_reference_gradient_is_the_derivative() {
    let ids = [2, 0, 2];
    let (table, dout) = (f64s(&normals(12, 1)), f64s(&normals(9, 2)));
    let loss = |table: &[f64]| -> f64 {
        reference::forward(table, &ids, 3, 1.5).iter().zip(&dout).map(|(y, dy)| y * dy).sum()
    };
    let want = finite_differences(&table, 1e-3, loss);
    assert_close_f64("dtable", &reference::backward(&dout, &ids, [4, 3], 1.5), &want, 1e-10);
}

fn ids(tokens: usize, vocab: usize) -> Vec<u32> {
    (0..tokens).map(|t| (t * t * 7 % vocab) as u32).collect()
}

#[test]
fn forward_and_backward_agree_with_the_reference() {
    let shapes = [(0, 3, 4), (1, 1, 1), (7, 5, 33), sized((900, 40, 65), (30, 20, 17))];
    for ((tokens, vocab, hidden), scale) in
        shapes.into_iter().flat_map(|shape| [(shape, 1.0), (shape, 33.94)])
    {
        let ids = ids(tokens, vocab);
        let (table, dout) = (normals(vocab * hidden, 1), normals(tokens * hidden, 2));
        let mut out = vec![f32::NAN; tokens * hidden];
        Forward { out: &mut out, table: &table, ids: &ids, hidden, scale }.run();
        let want = reference::forward(&f64s(&table), &ids, hidden, f64::from(scale));
        assert_eq!(out, want.iter().map(|&x| x as f32).collect::<Vec<_>>());
        let mut dtable = vec![1.0; vocab * hidden];
        Backward { dtable: &mut dtable, dout: &dout, ids: &ids, hidden, scale }.run();
        let want = reference::backward(&f64s(&dout), &ids, [vocab, hidden], f64::from(scale));
        let want: Vec<f64> = want.iter().map(|x| x + 1.0).collect();
        assert_close(&format!("dtable {tokens} {vocab} {hidden}"), &dtable, &want, 2e-6);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let ((tokens, vocab, hidden), scale) = (sized((1000, 90, 65), (40, 20, 17)), 1.0);
    let (ids, dout) = (ids(tokens, vocab), normals(tokens * hidden, 2));
    assert_same_on_threads("embedding", || {
        let (mut dtable, mut out) = (vec![0.0; vocab * hidden], vec![0.0; tokens * hidden]);
        Backward { dtable: &mut dtable, dout: &dout, ids: &ids, hidden, scale }.run();
        Forward { out: &mut out, table: &dtable, ids: &ids, hidden, scale }.run();
        (dtable, out)
    });
}

#[test]
#[should_panic(expected = "embedding::Forward: id 3 of token 1 in a table of 3 rows")]
fn an_id_outside_the_table_is_refused() {
    Forward { out: &mut [0.0; 4], table: &[0.0; 6], ids: &[0, 3], hidden: 2, scale: 1.0 }.run();
}
