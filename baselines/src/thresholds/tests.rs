use super::quantile::{Magnitudes, quantile};

fn sorted(values: &[f32]) -> Vec<f32> {
    let mut magnitudes: Vec<f32> = values.iter().map(|x| x.abs()).collect();
    magnitudes.sort_by(f32::total_cmp);
    magnitudes
}

/// Worked by hand: half of (3, 1, 0.5, 2) is above 1.5; of a second token above 0.25; the mean of both is 0.875, and the
/// quantile of all values together 0.75.
#[test]
fn quantiles_by_hand() {
    let (first, second) = ([3.0, -1.0, 0.5, 2.0], [0.1, 4.0, -0.2, 0.3]);
    let [a, b] = [&first, &second].map(|token| quantile(&sorted(token), 0.5));
    assert!((a - 1.5).abs() < 1e-12 && (b - 0.25).abs() < 1e-7, "{a}, {b}");
    assert!(((a + b) / 2.0 - 0.875).abs() < 1e-7);
    let mut all = Magnitudes::new(2, 4);
    all.add(&first, 4);
    all.add(&second, 4);
    let table = all.table();
    assert!((table.threshold(0.5) - 0.75).abs() < 1e-6, "{}", table.threshold(0.5));
    assert_eq!(table.threshold(0.0), 0.0);
    assert!(quantile(&[], 0.5) == 0.0 && quantile(&[2.0], 0.3) == 2.0);
}
