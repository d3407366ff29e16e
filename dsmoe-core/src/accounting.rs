//! Costs of a model: parameters stored and used per token, and floating-point operations.
//!
//! ```text
//! attention  = sum over layers of 2 d H hd + 2 d KV hd          ffn = sum over layers of 3 d D
//! embedding  = vocab d (twice when untied)                      norms = (2 L + 1) d
//! total      = attention + ffn + router + embedding + norms
//! activated  = attention + embedding + norms + ffn k / n + router, of masked matrices the kept weights
//! flops      = 2 (activated matrix weights, head included, embedding excluded) + sum over layers of 4 H hd context
//! ```
//!
//! H, KV and D are a layer's own. Tensors that only training reads ([`TensorSpec::training_only`]) are not counted.
//!
//! [`TensorSpec::training_only`]: crate::params::TensorSpec::training_only

use crate::config::Config;
use crate::ffn;
use crate::masks::Masks;

/// Parameter counts of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accounting {
    /// Decoder layers (L).
    pub num_layers: u64,
    /// Experts per layer (n); 1 for a dense model, whose FFN is always active.
    pub num_experts: u64,
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
    /// Everything but FFNs and routers.
    pub non_ffn: u64,
    /// Everything.
    pub total: u64,
    /// Weights of all routers, without biases.
    router_matrices: u64,
    /// Weights of the output head.
    head: u64,
    /// Width of the query heads of all layers.
    query_width: u64,
    /// Masked weights of attention and of FFNs.
    pruned_attention: u64,
    pruned_ffn: u64,
}

impl Accounting {
    /// Returns the counts of a model of `config`.
    pub fn of(config: &Config) -> Accounting {
        let wide = |n: usize| n as u64;
        let (hidden, num_layers) = (wide(config.hidden), wide(config.num_layers));
        let (mut query_width, mut attention) = (0, 0);
        let (mut ffn, mut router, mut router_matrices) = (0, 0, 0);
        for (i, shape) in config.layers().enumerate() {
            let (queries, keys) =
                [shape.num_heads, shape.num_kv_heads].map(|heads| wide(heads * config.head_dim)).into();
            query_width += queries;
            attention += 2 * hidden * (queries + keys);
            for spec in ffn::of_layer(config, i).tensors() {
                match spec.router {
                    _ if spec.training_only => {}
                    false => ffn += wide(spec.numel()),
                    true => {
                        router += wide(spec.numel());
                        router_matrices += if spec.shape.len() > 1 { wide(spec.numel()) } else { 0 };
                    }
                }
            }
        }
        let head = wide(config.vocab_size) * hidden;
        let embedding = if config.tie_word_embeddings { head } else { 2 * head };
        let norms = (2 * num_layers + 1) * hidden;
        let non_ffn = attention + embedding + norms;
        Accounting {
            num_layers,
            num_experts: wide(config.num_experts().unwrap_or(1)),
            fixed_active: config.fixed_active(),
            attention,
            ffn,
            router,
            embedding,
            norms,
            non_ffn,
            total: non_ffn + ffn + router,
            router_matrices,
            head,
            query_width,
            pruned_attention: 0,
            pruned_ffn: 0,
        }
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
        (self.non_ffn + self.router - self.pruned_attention) as f64 + self.active_ffn(mean_active_experts)
    }

    /// Returns the floating-point operations of the forward pass of one token that attends to `context` positions
    /// (half the sequence length for the mean of a causal sequence). The first argument is that of
    /// [`Accounting::activated`].
    pub fn flops_per_token(&self, mean_active_experts: f64, context: f64) -> f64 {
        let matrices = self.attention - self.pruned_attention + self.router_matrices + self.head;
        let attention = 4.0 * self.query_width as f64 * context;
        2.0 * (matrices as f64 + self.active_ffn(mean_active_experts)) + attention
    }

    fn active_ffn(&self, mean_active_experts: f64) -> f64 {
        let active = match self.fixed_active {
            Some(active) => active,
            None if self.router == 0 => self.num_experts as f64,
            None => mean_active_experts,
        };
        (self.ffn - self.pruned_ffn) as f64 * active / self.num_experts as f64
    }
}
