//! The decoder of every family in f64 loops, from its formulas: the loss of a batch as a function of the parameters.

use std::collections::HashMap;
use std::f64::consts::PI;

use dsmoe_core::Model;
use dsmoe_core::config::{Activation, Architecture, Config, MoeConfig, Norms, QkNorm};
use dsmoe_kernels::testing::f64s;

/// A model's parameters in f64, by name; matrices `[outputs, inputs]`, but down `[neurons, hidden]` as in the arena.
pub(crate) struct Reference<'a> {
    config: &'a Config,
    params: HashMap<String, Vec<f64>>,
}

type Rows = Vec<Vec<f64>>;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl<'a> Reference<'a> {
    pub(crate) fn new(model: &'a Model) -> Reference<'a> {
        let entries = model.layout().entries().iter();
        let params = entries.map(|it| (it.spec.name.clone(), f64s(&model.params()[it.range.clone()])));
        Reference { config: model.config(), params: params.collect() }
    }

    /// One parameter, for a difference.
    pub(crate) fn value(&mut self, name: &str, i: usize) -> &mut f64 {
        &mut self.params.get_mut(name).expect("a parameter")[i]
    }

    fn rms(&self, x: &[f64], weight: &[f64]) -> Vec<f64> {
        let mean = dot(x, x) / x.len() as f64;
        let rstd = 1.0 / (mean + self.config.rms_norm_eps).sqrt();
        let offset = f64::from(self.config.architecture.norm_offset);
        x.iter().zip(weight).map(|(x, w)| x * rstd * (w + offset)).collect()
    }

    /// The norm of that name, where the model has it.
    fn normed(&self, x: &Rows, name: &str) -> Rows {
        match self.params.get(name) {
            Some(weight) => x.iter().map(|x| self.rms(x, weight)).collect(),
            None => x.clone(),
        }
    }

    fn linear(&self, x: &Rows, name: &str) -> Rows {
        let w = &self.params[&format!("{name}.weight")];
        let bias = self.params.get(&format!("{name}.bias"));
        let row = |x: &Vec<f64>| -> Vec<f64> {
            let mut y: Vec<f64> = w.chunks_exact(x.len()).map(|w| dot(x, w)).collect();
            if let Some(bias) = bias {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
            y
        };
        x.iter().map(row).collect()
    }

    /// Norms of heads and rotation, in place.
    fn heads(&self, x: &mut Rows, layer: usize, which: &str) {
        let Config { head_dim, architecture, .. } = self.config;
        let (positions, name) = (x.len(), format!("model.layers.{layer}.self_attn.{which}_norm.weight"));
        for (p, x) in x.iter_mut().enumerate() {
            match architecture.qk_norm {
                QkNorm::None => {}
                QkNorm::Whole => *x = self.rms(x, &self.params[&name]),
                QkNorm::Head => {
                    *x = x.chunks(*head_dim).flat_map(|head| self.rms(head, &self.params[&name])).collect();
                }
            }
            let Some(rope) = architecture.layers[layer].rope.map(|i| &architecture.ropes[i]) else {
                continue;
            };
            let (frequencies, factor) = (rope.frequencies(positions), rope.factor());
            for head in x.chunks_mut(*head_dim) {
                for (i, f) in frequencies.iter().enumerate() {
                    let (sin, cos) = (p as f64 * f).sin_cos();
                    let (a, b) = (head[i], head[i + frequencies.len()]);
                    head[i] = factor * (a * cos - b * sin);
                    head[i + frequencies.len()] = factor * (b * cos + a * sin);
                }
            }
        }
    }

    /// The attention of one sequence.
    fn attention(&self, x: &Rows, layer: usize) -> Rows {
        let Config { head_dim, architecture, .. } = self.config;
        let &Architecture { attn_scale, attn_cap, .. } = architecture;
        let shape = self.config.layer(layer);
        let project = |which: &str| self.linear(x, &format!("model.layers.{layer}.self_attn.{which}_proj"));
        let [mut q, mut k, v] = ["q", "k", "v"].map(project);
        self.heads(&mut q, layer, "q");
        self.heads(&mut k, layer, "k");
        let group = shape.num_heads / shape.num_kv_heads;
        let window = architecture.layers[layer].window.unwrap_or(usize::MAX);
        let out = |p: usize| -> Vec<f64> {
            let head = |h: usize| -> Vec<f64> {
                let part = |x: &Vec<f64>, h: usize| x[h * head_dim..][..*head_dim].to_vec();
                let query = part(&q[p], h);
                let seen: Vec<usize> = (0..=p).filter(|key| p - key < window).collect();
                let score = |&key: &usize| {
                    let s = f64::from(attn_scale) * dot(&query, &part(&k[key], h / group));
                    attn_cap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
                };
                let weights: Vec<f64> = seen.iter().map(score).map(f64::exp).collect();
                let total: f64 = weights.iter().sum();
                let mut out = vec![0.0; *head_dim];
                for (key, weight) in seen.iter().zip(weights) {
                    let value = part(&v[*key], h / group);
                    out.iter_mut().zip(value).for_each(|(out, v)| *out += weight / total * v);
                }
                out
            };
            (0..shape.num_heads).flat_map(head).collect()
        };
        let a: Rows = (0..x.len()).map(out).collect();
        self.linear(&a, &format!("model.layers.{layer}.self_attn.o_proj"))
    }

    fn act(&self, a: f64) -> f64 {
        match self.config.architecture.activation {
            Activation::Silu => a / (1.0 + (-a).exp()),
            Activation::GeluTanh => {
                0.5 * a * (1.0 + ((2.0 / PI).sqrt() * (a + 0.044_715 * a * a * a)).tanh())
            }
        }
    }

    /// The FFN, dense or of gated experts without the straight-through rule.
    fn ffn(&self, x: &Rows, layer: usize) -> Rows {
        let name = |suffix: &str| format!("model.layers.{layer}.mlp.{suffix}");
        let (gate, up) = (self.linear(x, &name("gate_proj")), self.linear(x, &name("up_proj")));
        let down = &self.params[&name("down_proj.weight")];
        let low =
            self.params.contains_key(&name("router.a.weight")).then(|| self.linear(x, &name("router.a")));
        let logits = |moe: &MoeConfig| match &low {
            None => self.linear(x, &name("router")),
            Some(low) => {
                let bias = &self.params[&name("router.bias")];
                let mut z = self.linear(low, &name("router.b"));
                z.iter_mut().for_each(|z| z.iter_mut().zip(bias).for_each(|(z, b)| *z += b));
                assert_eq!(z[0].len(), moe.router.num_experts - moe.core(layer));
                z
            }
        };
        let gates = self.config.moe.as_ref().map(|moe| (moe, logits(moe)));
        let row = |t: usize| -> Vec<f64> {
            let mut y = vec![0.0; self.config.hidden];
            for (j, down) in down.chunks_exact(y.len()).enumerate() {
                let coefficient = gates.as_ref().map_or(1.0, |(moe, logits)| {
                    let width = gate[t].len() / moe.router.num_experts;
                    let Some(routed) = (j / width).checked_sub(moe.core(layer)) else { return 1.0 };
                    let logit = logits[t][routed];
                    let gate = 1.0 / (1.0 + (-logit).exp());
                    let is_open = match moe.threshold_logit(layer) {
                        Some(bar) => logit > f64::from(bar),
                        None => gate > f64::from(moe.router.threshold),
                    };
                    if is_open { gate } else { 0.0 }
                });
                let neuron = coefficient * self.act(gate[t][j]) * up[t][j];
                y.iter_mut().zip(down).for_each(|(y, w)| *y += neuron * w);
            }
            for bias in ["down_proj.bias", "output_bias"] {
                let bias = self.params.get(&name(bias)).into_iter().flatten();
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
            if let (Some(correction), Some(low)) = (self.params.get(&name("correction.weight")), &low) {
                for (low, row) in low[t].iter().zip(correction.chunks_exact(y.len())) {
                    y.iter_mut().zip(row).for_each(|(y, c)| *y += low * c);
                }
            }
            y
        };
        (0..x.len()).map(row).collect()
    }

    /// The logits of one sequence.
    pub(crate) fn logits(&self, ids: &[u32]) -> Rows {
        let (config, architecture) = (self.config, &self.config.architecture);
        let embedding = &self.params["model.embed_tokens.weight"];
        let embed = |&id: &u32| -> Vec<f64> {
            let row = &embedding[id as usize * config.hidden..][..config.hidden];
            row.iter().map(|x| f64::from(architecture.embed_scale) * x).collect()
        };
        let mut x: Rows = ids.iter().map(embed).collect();
        let join = |x: &mut Rows, y: Rows| {
            for (x, y) in x.iter_mut().zip(y) {
                x.iter_mut().zip(y).for_each(|(x, y)| *x += f64::from(architecture.residual_scale) * y);
            }
        };
        for layer in 0..config.num_layers {
            let norm = |name: &str| format!("model.layers.{layer}.{name}_layernorm.weight");
            let [before, after, before_ffn, after_ffn] = match architecture.norms {
                Norms::Pre => ["input", "", "post_attention", ""],
                Norms::Post => ["", "post_attention", "", "post_feedforward"],
                Norms::Both => ["input", "post_attention", "pre_feedforward", "post_feedforward"],
            }
            .map(norm);
            let y = self.attention(&self.normed(&x, &before), layer);
            join(&mut x, self.normed(&y, &after));
            let y = self.ffn(&self.normed(&x, &before_ffn), layer);
            join(&mut x, self.normed(&y, &after_ffn));
        }
        let head = if config.tie_word_embeddings { embedding } else { &self.params["lm_head.weight"] };
        let logit = |x: &Vec<f64>, w: &[f64]| {
            let z = f64::from(architecture.logit_scale) * dot(x, w);
            architecture.final_cap.map_or(z, |cap| f64::from(cap) * (z / f64::from(cap)).tanh())
        };
        let states = self.normed(&x, "model.norm.weight");
        states.iter().map(|x| head.chunks_exact(config.hidden).map(|w| logit(x, w)).collect()).collect()
    }

    /// The sum of the token losses of sequences of `seq` tokens.
    pub(crate) fn loss(&self, inputs: &[u32], targets: &[u32], seq: usize) -> f64 {
        let mut loss = 0.0;
        for (inputs, targets) in inputs.chunks(seq).zip(targets.chunks(seq)) {
            for (z, &target) in self.logits(inputs).iter().zip(targets) {
                let largest = z.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = z.iter().map(|z| (z - largest).exp()).sum();
                loss += sum.ln() + largest - z[target as usize];
            }
        }
        loss
    }
}
