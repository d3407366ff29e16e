//! Costs of a model: parameters stored and used per token, and floating-point operations.
//!
//! ```text
//! attention  = sum over layers of 2 d H hd + 2 d KV hd          ffn = sum over layers of 3 d D, biases of gate and up
//! embedding  = vocab d (twice when untied)                      norms = those of the layers, of heads, and the last
//! total      = attention + ffn + router + embedding + norms + biases (of q, k, v, o and down)
//! activated  = attention + embedding + norms + biases + (ffn - shared - 2 instead) k / n + shared + instead + router, of masked matrices the
//!              kept weights, of those with thresholds the used ones; shared are experts that every token runs beside those that it is routed to,
//!              instead are FFNs of which a token runs one or, in its place, the only expert
//! flops      = 2 (activated matrix weights, head included, embedding excluded) + sum over layers of 4 H hd context
//! ```
//!
//! H, KV and D are a layer's own, and n and k means over layers where layers hold different numbers of experts. Of experts of
//! different widths k counts those of the mean width ([`dsmoe_router::RoutingStats::with_sizes`]). The context of a layer with a window is at most the window. Tensors that only training reads ([`TensorSpec::training_only`]) are not counted.
//!
//! [`TensorSpec::training_only`]: crate::params::TensorSpec::training_only

use crate::config::{Config, Norms};
use crate::ffn;
use crate::kept::LINEARS;
use crate::masks::Masks;

/// Parameter counts of a model.
///
/// ```
/// use dsmoe_core::accounting::Accounting;
/// use dsmoe_core::config::MoeConfig;
/// use dsmoe_core::init::preset;
/// use dsmoe_router::RouterConfig;
///
/// let mut config = preset("tiny")?;
/// config.moe = Some(MoeConfig::new(RouterConfig::new(8)));
/// let counted = Accounting::of(&config);
/// assert!(counted.activated(4.0) < counted.activated(8.0));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accounting {
    /// Decoder layers (L).
    pub num_layers: u64,
    /// Experts per layer (n), mean over layers; 1 for a dense model, whose FFN is always active.
    pub num_experts: f64,
    /// Experts that every token runs, when their number is fixed.
    pub fixed_active: Option<f64>,
    /// Attention of all layers.
    pub attention: u64,
    /// FFNs of all layers, routers excluded.
    pub ffn: u64,
    /// Routers of all layers, biases included; 0 for a dense model.
    pub router: u64,
    /// Embedding, and the output head when it is not the embedding.
    pub embedding: u64,
    /// All norms.
    pub norms: u64,
    /// Biases that every token uses: all but those of gate and up, which belong to experts.
    pub biases: u64,
    /// Everything but FFNs and routers.
    pub non_ffn: u64,
    /// Everything.
    pub total: u64,
    /// Weights of all routers, without biases.
    router_matrices: u64,
    /// Weights of the output head.
    head: u64,
    /// Biases of gate and up, which are in `ffn` and cost no operation that is counted.
    expert_biases: u64,
    /// Width of the query heads of all layers that see all positions.
    query_width: u64,
    /// Width of the query heads of all layers with a window, and the window.
    windowed: (u64, u64),
    /// Weights of experts that every token runs beside those that it is routed to, which are in `ffn`.
    shared: u64,
    /// Weights of FFNs that a token runs where it does not run the expert, which are in `ffn`.
    instead: u64,
    /// Weights of attention and of FFNs that are masked, or that a token skips by thresholds, mean over tokens.
    pruned_attention: u64,
    pruned_ffn: u64,
}

impl Accounting {
    /// Returns the counts of a model of `config`.
    pub fn of(config: &Config) -> Accounting {
        let wide = |n: usize| n as u64;
        let hidden = wide(config.hidden);
        let architecture = &config.architecture;
        let (mut query_width, mut windowed, mut attention) = (0, (0, 0), 0);
        let (mut norms, mut biases, mut expert_biases) = (hidden, 0, 0);
        let (mut ffn, mut shared, mut instead, mut router, mut router_matrices) = (0, 0, 0, 0, 0);
        let layer_norms = if architecture.norms == Norms::Both { 4 } else { 2 };
        for i in 0..config.num_layers {
            let [queries, keys] = config.attention_widths(i).map(wide);
            match architecture.layers[i].window {
                None => query_width += queries,
                Some(window) => windowed = (windowed.0 + queries, wide(window)),
            }
            attention += 2 * hidden * (queries + keys);
            norms += layer_norms * hidden + config.qk_norm_widths(i).map_or(0, |[q, k]| wide(q + k));
            biases += if architecture.qkv_bias { queries + 2 * keys } else { 0 };
            biases += if architecture.o_bias { hidden } else { 0 };
            let has_one = config.layer_experts(i) == Some(1);
            for spec in ffn::of_layer(config, i).tensors() {
                let values = wide(spec.numel());
                match spec.router {
                    _ if spec.training_only => {}
                    false if [ffn::DOWN_BIAS, ffn::OUTPUT_BIAS].contains(&&*spec.name) => biases += values,
                    false => {
                        ffn += values;
                        shared += if spec.name.starts_with(ffn::SHARED_EXPERT) { values } else { 0 };
                        instead += if has_one && spec.name.starts_with(ffn::SMALL_FFN) { values } else { 0 };
                        expert_biases += if spec.shape.len() == 1 { values } else { 0 };
                    }
                    true => {
                        router += values;
                        router_matrices += if spec.shape.len() > 1 { values } else { 0 };
                    }
                }
            }
        }
        let head = wide(config.vocab_size) * hidden;
        let embedding = if config.tie_word_embeddings { head } else { 2 * head };
        let non_ffn = attention + embedding + norms + biases;
        let counts = Accounting {
            num_layers: wide(config.num_layers),
            num_experts: mean_experts(config),
            fixed_active: config.fixed_active(),
            attention,
            ffn,
            router,
            embedding,
            norms,
            biases,
            non_ffn,
            total: non_ffn + ffn + router,
            router_matrices,
            head,
            expert_biases,
            query_width,
            windowed,
            shared,
            instead,
            pruned_attention: 0,
            pruned_ffn: 0,
        };
        match &config.thresholds {
            None => counts,
            Some(layers) => {
                let used: Vec<_> = layers.iter().map(|layer| layer.used).collect();
                counts.with_used(config, &used)
            }
        }
    }

    /// Returns the counts with shares of the weights of every layer's linears used by a token: q, k, v, o, gate, up and down.
    ///
    /// # Panics
    /// There are not as many layers.
    pub fn with_used(self, config: &Config, used: &[[f64; LINEARS]]) -> Accounting {
        assert_eq!(used.len(), config.num_layers, "accounting: layers of shares");
        let mut skipped = [0.0; 2];
        for (layer, used) in used.iter().enumerate() {
            for (i, (weights, used)) in config.linear_weights(layer).into_iter().zip(used).enumerate() {
                skipped[usize::from(i > 3)] += weights as f64 * (1.0 - used);
            }
        }
        let [pruned_attention, pruned_ffn] = skipped.map(|weights| weights.round() as u64);
        Accounting { pruned_attention, pruned_ffn, ..self }
    }

    /// Returns the counts with linears masked: pruned weights are stored, but neither activated nor multiplied.
    pub fn with_masks(self, masks: &Masks) -> Accounting {
        let pruned = |part: &str| {
            masks.iter().filter(|(name, _)| name.contains(part)).map(|(_, mask)| mask.pruned()).sum()
        };
        Accounting { pruned_attention: pruned(".self_attn."), pruned_ffn: pruned(".mlp."), ..self }
    }

    /// Returns the parameters used for a token when `mean_active_experts` of each layer's experts are active, mean
    /// over tokens and layers. Where the number of active experts is fixed, or there are none, the argument does not
    /// matter.
    pub fn activated(&self, mean_active_experts: f64) -> f64 {
        let ffn = self.active(mean_active_experts, self.ffn - self.pruned_ffn);
        (self.non_ffn + self.router - self.pruned_attention) as f64 + ffn
    }

    /// Returns the floating-point operations of the forward pass of one token that attends to `context` positions. The
    /// first argument is that of [`Accounting::activated`].
    pub fn flops_per_token(&self, mean_active_experts: f64, context: f64) -> f64 {
        let (width, window) = self.windowed;
        let seen = context.min(window as f64);
        self.matrix_flops(mean_active_experts) + self.attention_flops(context, width as f64 * seen)
    }

    /// Returns the floating-point operations of the forward pass of a token, mean over a sequence of `seq` tokens.
    pub fn mean_flops_per_token(&self, mean_active_experts: f64, seq: usize) -> f64 {
        let (width, window) = self.windowed;
        let (len, window) = (seq as f64, window as f64);
        let seen = if len <= window { len / 2.0 } else { window - window * (window - 1.0) / (2.0 * len) };
        self.matrix_flops(mean_active_experts) + self.attention_flops(len / 2.0, width as f64 * seen)
    }

    fn matrix_flops(&self, mean_active_experts: f64) -> f64 {
        let matrices = self.attention - self.pruned_attention + self.router_matrices + self.head;
        let ffn = self.active(mean_active_experts, self.ffn - self.pruned_ffn - self.expert_biases);
        2.0 * (matrices as f64 + ffn)
    }

    /// Returns the operations of attention over `context` positions; `windowed` is the sum of width times positions
    /// over the layers with a window.
    fn attention_flops(&self, context: f64, windowed: f64) -> f64 {
        4.0 * (self.query_width as f64 * context + windowed)
    }

    /// Returns the share of `values` of the FFNs that is active.
    fn active(&self, mean_active_experts: f64, values: u64) -> f64 {
        let active = match self.fixed_active {
            Some(active) => active,
            None if self.router == 0 => self.num_experts,
            None => mean_active_experts,
        };
        let always = self.shared + self.instead;
        always as f64 + (values - always - self.instead) as f64 * active / self.num_experts
    }
}

fn mean_experts(config: &Config) -> f64 {
    let experts = (0..config.num_layers).map(|layer| config.layer_experts(layer).unwrap_or(1));
    experts.sum::<usize>() as f64 / config.num_layers as f64
}
