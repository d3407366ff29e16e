//! What a model costs: parameters held and used per token, and floating-point operations.
//!
//! ```text
//! attn_layer = 2 d H hd + 2 d KV hd      ffn_layer = 3 d D      expert = ffn_layer / n
//! embedding  = vocab d (twice when untied)                      norms  = (2 L + 1) d
//! total      = L (attn_layer + ffn_layer + router) + embedding + norms
//! activated  = non_ffn + L ffn_layer k / n + L router           non_ffn = total without FFNs and routers
//! flops      = 2 (activated matrix weights, head included, embedding excluded) + L 4 H hd context
//! ```

use crate::config::Config;

/// Parameter counts of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accounting {
    /// Decoder layers (L).
    pub num_layers: u64,
    /// Experts per layer (n); 1 for a dense model, whose FFN is always active.
    pub num_experts: u64,
    /// Attention of one layer.
    pub attn_layer: u64,
    /// FFN of one layer, router excluded.
    pub ffn_layer: u64,
    /// One expert.
    pub expert: u64,
    /// Router of one layer, bias included; 0 for a dense model.
    pub router: u64,
    /// Embedding, and the output head when it is not the embedding.
    pub embedding: u64,
    /// All norms.
    pub norms: u64,
    /// Everything but FFNs and routers.
    pub non_ffn: u64,
    /// Everything.
    pub total: u64,
    /// Weights of the router of one layer, without bias.
    router_matrix: u64,
    /// Weights of the output head.
    head: u64,
    /// Width of all query heads of a layer.
    query_width: u64,
}

impl Accounting {
    /// The counts of a model of `config`.
    pub fn of(config: &Config) -> Accounting {
        let wide = |n: usize| n as u64;
        let (hidden, num_layers) = (wide(config.hidden), wide(config.num_layers));
        let query_width = wide(config.num_heads) * wide(config.head_dim);
        let kv_width = wide(config.num_kv_heads) * wide(config.head_dim);
        let attn_layer = 2 * hidden * query_width + 2 * hidden * kv_width;
        let ffn_layer = 3 * hidden * wide(config.intermediate);
        let head = wide(config.vocab_size) * hidden;
        let embedding = if config.tie_word_embeddings { head } else { 2 * head };
        let norms = (2 * num_layers + 1) * hidden;
        let experts = config.moe.as_ref().map_or(0, |moe| wide(moe.router.num_experts));
        let bias = config.moe.as_ref().is_some_and(|moe| moe.router_bias);
        let router_matrix = experts * hidden;
        let router = router_matrix + if bias { experts } else { 0 };
        let num_experts = experts.max(1);
        let non_ffn = num_layers * attn_layer + embedding + norms;
        Accounting {
            num_layers,
            num_experts,
            attn_layer,
            ffn_layer,
            expert: ffn_layer / num_experts,
            router,
            embedding,
            norms,
            non_ffn,
            total: non_ffn + num_layers * (ffn_layer + router),
            router_matrix,
            head,
            query_width,
        }
    }

    /// Parameters used for a token when `mean_active_experts` of each layer's experts are active, mean over tokens
    /// and layers. For a dense model, [`Accounting::total`] whatever the argument is.
    pub fn activated(&self, mean_active_experts: f64) -> f64 {
        let routers = self.num_layers * self.router;
        self.non_ffn as f64 + self.active_ffn(mean_active_experts) + routers as f64
    }

    /// Floating-point operations of the forward pass of one token that attends to `context` positions (half the
    /// sequence length for the mean of a causal sequence). For a dense model the first argument does not matter.
    pub fn flops_per_token(&self, mean_active_experts: f64, context: f64) -> f64 {
        let matrices = self.num_layers * (self.attn_layer + self.router_matrix) + self.head;
        let attention = 4.0 * (self.num_layers * self.query_width) as f64 * context;
        2.0 * (matrices as f64 + self.active_ffn(mean_active_experts)) + attention
    }

    fn active_ffn(&self, mean_active_experts: f64) -> f64 {
        let share = if self.router == 0 { 1.0 } else { mean_active_experts / self.num_experts as f64 };
        (self.num_layers * self.ffn_layer) as f64 * share
    }
}
