//! Scores and choices against the formulas.

use std::path::Path;

use dsmoe_core::calibrate::{Input, Linear};
use dsmoe_core::init::preset;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::testing::{assert_close, assert_close_f64, normals, refused};

use super::flap::{Metric, Moments, Structure, bias_of, kept};
use super::*;

const TOKENS: usize = 30;
const NEURONS: usize = 70;
const OUTPUTS: usize = 5;

fn down() -> Linear {
    let mut weight = Buf::zeros(OUTPUTS * NEURONS);
    weight.copy_from_slice(&normals(OUTPUTS * NEURONS, 2));
    let name = "model.layers.0.mlp.down_proj.weight".to_owned();
    Linear { name, outputs: OUTPUTS, inputs: NEURONS, input: Input::Neurons, weight, bias: None }
}

/// Values of neurons whose means and deviations differ.
fn values() -> Vec<f32> {
    let noise = normals(TOKENS * NEURONS, 1);
    let value = |(at, x): (usize, &f32)| (at % NEURONS) as f32 / 10.0 - 3.0 + x * (at % 7) as f32;
    noise.iter().enumerate().map(value).collect()
}

#[test]
fn flaps_scores_and_bias_are_those_of_the_formulas() {
    let (h, down) = (values(), down());
    let mut moments = Moments::new(NEURONS);
    h.chunks(10 * NEURONS).for_each(|h| moments.add(h));
    let of = |j: usize| -> Vec<f64> { h.iter().skip(j).step_by(NEURONS).map(|&h| h.into()).collect() };
    let mean = |j: usize| of(j).iter().sum::<f64>() / TOKENS as f64;
    let variance =
        |j: usize| of(j).iter().map(|h| (h - mean(j)).powi(2)).sum::<f64>() / (TOKENS as f64 - 1.0);
    let column = |j: usize| down.weight.iter().skip(j).step_by(NEURONS).map(|&w| f64::from(w));
    let wifv = |j: usize| variance(j) * column(j).map(|w| w * w).sum::<f64>();
    let wifn = |j: usize| {
        let norm = of(j).iter().map(|h| h * h).sum::<f64>().sqrt();
        column(j).map(|w| w.abs() * norm).sum::<f64>() / OUTPUTS as f64
    };
    let check = |metric, want: &dyn Fn(usize) -> f64| {
        let want: Vec<f64> = (0..NEURONS).map(want).collect();
        assert_close_f64(&format!("{metric:?}"), &moments.scores(metric, &down), &want, 1e-9);
    };
    check(Metric::Ifv, &variance);
    check(Metric::Wifv, &wifv);
    check(Metric::Wifn, &wifn);
    assert_close_f64("means", &moments.means(), &(0..NEURONS).map(mean).collect::<Vec<_>>(), 1e-9);

    let stay: Vec<usize> = (0..NEURONS).filter(|j| j % 3 != 1).collect();
    let removed = (0..NEURONS).filter(|j| j % 3 == 1);
    let mut want = vec![0.0; OUTPUTS];
    for j in removed {
        want.iter_mut().zip(column(j)).for_each(|(b, w)| *b += w * mean(j));
    }
    assert_close("bias", &bias_of(&down, &moments.means(), &stay), &want, 1e-6);
}

#[test]
fn scores_of_layers_compete_when_standardised() {
    // Layer 1 is layer 0 a thousand times larger: standardised they are alike. Layer 2 has one large score.
    let scores = [vec![1.0, 4.0, 2.0, 3.0], vec![1000.0, 4000.0, 2000.0, 3000.0], vec![9.0, 1.0, 1.0, 1.0]];
    assert_eq!(kept(&scores, Structure::Adaptive, &[], 5), [vec![1, 3], vec![1, 3], vec![0]]);
    assert_eq!(kept(&scores, Structure::Adaptive, &[], 4), [vec![1, 3], vec![1], vec![0]]);
    assert_eq!(
        kept(&scores, Structure::Adaptive, &[], 12),
        [vec![0, 1, 2, 3], vec![0, 1, 2, 3], vec![0, 1, 2, 3]]
    );
    assert_eq!(kept(&scores, Structure::Uniform, &[2, 1, 3], 6), [vec![1, 3], vec![1], vec![0, 1, 2]]);
    // A layer of equal scores keeps one neuron.
    let flat = [vec![1.0; 3], vec![1.0, 2.0, 3.0]];
    assert_eq!(kept(&flat, Structure::Adaptive, &[], 2), [vec![0], vec![2]]);
}

#[test]
fn budgets_are_met_to_a_neuron() {
    let config = preset("tiny").unwrap();
    let (dense, of_one) = (Accounting::of(&config).total as f64, 3.0 * config.hidden as f64);
    for bias in [false, true] {
        for share in [0.7, 0.8, 0.9, 1.0] {
            let total = neurons_left(&config, Budget::Share(share), bias).unwrap();
            let widths = even_widths(&config, total);
            let pruned = with_widths(&config, &widths, bias);
            assert_eq!(pruned.architecture.output_bias, bias);
            let biases = if bias { (config.hidden * config.num_layers) as f64 } else { 0.0 };
            let params = dense - of_one * (config.intermediate * config.num_layers - total) as f64 + biases;
            assert!(share == 1.0 || (params - share * dense).abs() <= of_one / 2.0, "{share}: {params}");
            let even = Accounting::of(&pruned).total as f64;
            assert!((even - params).abs() <= of_one * config.num_layers as f64 / 2.0, "{even} {params}");
        }
    }
    refused(neurons_left(&config, Budget::Params(1e3), false), &["budget 1000", "out of reach"]);
    refused(
        neurons_left(&config, Budget::Params(2.0 * dense), false),
        &["the least reachable is", "the most"],
    );
}

#[test]
fn a_bias_of_the_output_goes_where_the_family_has_none() {
    let json = preset("tiny").unwrap().to_json();
    for (mlp_bias, of_output) in [(false, true), (true, false)] {
        let json = json.replace("\"mlp_bias\": false", &format!("\"mlp_bias\": {mlp_bias}"));
        let config = Config::from_json(Path::new("config.json"), &json).unwrap();
        assert_eq!(config.architecture.mlp_bias, mlp_bias);
        let pruned = with_widths(&config, &vec![8; config.num_layers], true);
        assert_eq!(pruned.architecture.output_bias, of_output);
        assert_eq!(pruned.to_json().contains("\"output_bias\": true"), of_output);
        let again = Config::from_json(Path::new("config.json"), &pruned.to_json()).unwrap();
        assert_eq!(again.architecture, pruned.architecture);
        assert_eq!(again.model_type(), if of_output { "dsmoe" } else { "llama" });
    }
}
