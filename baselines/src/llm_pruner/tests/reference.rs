//! LLaMA's loss in f64 loops, its gradients by differences, and importances by their definitions.

use std::collections::HashMap;

use dsmoe_core::params::Stored;
use dsmoe_core::{Config, Model};

use super::super::importance::{Importance, Reduce};

/// A stored tensor, `[rows, cols]`.
#[derive(Clone)]
pub(super) struct Tensor {
    pub(super) cols: usize,
    pub(super) values: Vec<f64>,
}

pub(super) type Tensors = HashMap<String, Tensor>;

/// `values` of the model's arena by checkpoint name, in checkpoint orientation.
pub(super) fn tensors(model: &Model, values: &[f32]) -> Tensors {
    let tensor = |entry: &dsmoe_core::params::Entry| {
        let shape = entry.spec.stored_shape();
        let (rows, cols) = if shape.len() == 1 { (1, shape[0]) } else { (shape[0], shape[1]) };
        let memory = &values[entry.range.clone()];
        let at = |i: usize| match entry.spec.stored {
            Stored::AsIs => memory[i],
            Stored::Transposed => memory[(i % cols) * rows + i / cols],
        };
        let values = (0..rows * cols).map(|i| f64::from(at(i))).collect();
        (entry.spec.name.clone(), Tensor { cols, values })
    };
    model.layout().entries().iter().map(tensor).collect()
}

/// x W^T of one token.
fn linear(x: &[f64], w: &Tensor) -> Vec<f64> {
    w.values.chunks(w.cols).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn norm(x: &[f64], w: &Tensor, eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(&w.values).map(|(x, w)| x / (mean + eps).sqrt() * w).collect()
}

fn rotate(head: &mut [f64], position: usize, theta: f64) {
    let half = head.len() / 2;
    for i in 0..half {
        let angle = position as f64 * theta.powf(-(i as f64) / half as f64);
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * angle.cos() - b * angle.sin();
        head[i + half] = b * angle.cos() + a * angle.sin();
    }
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// Mean negative log-likelihood of every token after the first.
pub(super) fn loss(config: &Config, p: &Tensors, ids: &[u32]) -> f64 {
    let (hd, eps) = (config.head_dim, config.rms_norm_eps);
    let embedding = &p["model.embed_tokens.weight"];
    let mut xs: Vec<Vec<f64>> = ids[..ids.len() - 1]
        .iter()
        .map(|&id| embedding.values[id as usize * embedding.cols..][..embedding.cols].to_vec())
        .collect();
    for i in 0..config.num_layers {
        let w = |name: &str| &p[&format!("model.layers.{i}.{name}.weight")];
        let project = |name: &str, turn: bool| -> Vec<Vec<f64>> {
            let one = |(t, x): (usize, &Vec<f64>)| {
                let mut out = linear(&norm(x, w("input_layernorm"), eps), w(name));
                if turn {
                    out.chunks_mut(hd).for_each(|head| rotate(head, t, config.architecture.ropes[0].theta));
                }
                out
            };
            xs.iter().enumerate().map(one).collect()
        };
        let [q, k, v] = [("q", true), ("k", true), ("v", false)]
            .map(|(name, turn)| project(&format!("self_attn.{name}_proj"), turn));
        let sharing = config.num_heads / config.num_kv_heads;
        for t in 0..xs.len() {
            let mut out = Vec::new();
            for head in 0..config.num_heads {
                let kv = head / sharing * hd;
                let query = &q[t][head * hd..][..hd];
                let score = |s: usize| -> f64 {
                    query.iter().zip(&k[s][kv..][..hd]).map(|(q, k)| q * k).sum::<f64>() / (hd as f64).sqrt()
                };
                let weights: Vec<f64> = (0..=t).map(|s| score(s).exp()).collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..hd).map(|c| (0..=t).map(|s| weights[s] / total * v[s][kv + c]).sum::<f64>()));
            }
            add(&mut xs[t], &linear(&out, w("self_attn.o_proj")));
            let h = norm(&xs[t], w("post_attention_layernorm"), eps);
            let (a, u) = (linear(&h, w("mlp.gate_proj")), linear(&h, w("mlp.up_proj")));
            let c: Vec<f64> = a.iter().zip(&u).map(|(a, u)| a / (1.0 + (-a).exp()) * u).collect();
            add(&mut xs[t], &linear(&c, w("mlp.down_proj")));
        }
    }
    let head = p.get("lm_head.weight").unwrap_or(embedding);
    let nll = |(x, &target): (&Vec<f64>, &u32)| {
        let logits = linear(&norm(x, &p["model.norm.weight"], eps), head);
        logits.iter().map(|z| z.exp()).sum::<f64>().ln() - logits[target as usize]
    };
    xs.iter().zip(&ids[1..]).map(nll).sum::<f64>() / xs.len() as f64
}

/// Central differences of [`loss`] by every weight.
pub(super) fn gradients(config: &Config, p: &Tensors, ids: &[u32]) -> Tensors {
    const H: f64 = 1e-5;
    let mut point = p.clone();
    let mut grads = p.clone();
    for (name, grad) in &mut grads {
        for (i, g) in grad.values.iter_mut().enumerate() {
            let mut at = |h: f64| {
                point.get_mut(name).unwrap().values[i] = p[name].values[i] + h;
                loss(config, &point, ids)
            };
            *g = (at(H) - at(-H)) / (2.0 * H);
            at(0.0);
        }
    }
    grads
}

/// A member's importance: of the entries listed, by its definition.
pub(super) fn member(importance: Importance, w: &Tensor, grads: &[&Tensor], entries: &[usize]) -> f64 {
    let count = grads.len() as f64;
    let s = |&i: &usize| {
        let w = w.values[i];
        let g = grads.iter().map(|g| g.values[i]).sum::<f64>() / count;
        let f = grads.iter().map(|g| g.values[i] * g.values[i]).sum::<f64>() / count;
        match importance {
            Importance::TaylorFirst | Importance::Vector => w * g,
            Importance::TaylorSecond => w * f * w,
            Importance::TaylorMix => w * g - 0.5 * w * f * w,
            Importance::MagnitudeL1 => w,
            Importance::MagnitudeL2 => w * w,
            Importance::Random => unreachable!("no salience"),
        }
    };
    match importance {
        Importance::Vector => entries.iter().map(s).sum::<f64>().abs(),
        _ => entries.iter().map(|i| s(i).abs()).sum(),
    }
}

/// A row or a column of a stored tensor.
#[derive(Clone, Copy)]
pub(super) enum Line {
    Row(usize),
    Column(usize),
}

/// The importance of the coupled lines of a group: for each row of a head, per member, the lines that belong to it.
pub(super) fn group(
    importance: Importance,
    reduce: Reduce,
    p: &Tensors,
    grads: &[Tensors],
    lanes: &[Vec<(String, Vec<Line>)>],
) -> f64 {
    let lane = |members: &Vec<(String, Vec<Line>)>| {
        let values = members.iter().map(|(name, lines)| {
            let w = &p[name];
            let grads: Vec<&Tensor> = grads.iter().map(|grads| &grads[name]).collect();
            let one = |line: &Line| {
                let rows = w.values.len() / w.cols;
                let entries: Vec<usize> = match *line {
                    Line::Row(row) => (row * w.cols..(row + 1) * w.cols).collect(),
                    Line::Column(column) => (0..rows).map(|row| row * w.cols + column).collect(),
                };
                member(importance, w, &grads, &entries)
            };
            lines.iter().map(one).sum::<f64>()
        });
        let values: Vec<f64> = values.collect();
        match reduce {
            Reduce::Sum => values.iter().sum(),
            Reduce::Max => values.iter().copied().fold(f64::MIN, f64::max),
            Reduce::Mean => values.iter().sum::<f64>() / values.len() as f64,
            Reduce::Prod => values.iter().product(),
            Reduce::Last => values[values.len() - 1],
        }
    };
    lanes.iter().map(lane).sum()
}
