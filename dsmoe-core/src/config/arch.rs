//! The switches in which decoders of different families differ.

use dsmoe_kernels::Activation;

use super::rope::Rope;

/// RMSNorm of queries and keys, before they are rotated.
///
/// ```
/// use dsmoe_core::config::QkNorm;
/// use dsmoe_core::init::preset;
///
/// let mut config = preset("tiny")?;
/// assert_eq!(config.qk_norm_widths(0), None);
/// config.architecture.qk_norm = QkNorm::Head;
/// assert_eq!(config.qk_norm_widths(0), Some([32, 32])); // one weight for all heads
/// config.architecture.qk_norm = QkNorm::Whole;
/// assert_eq!(config.qk_norm_widths(0), Some([128, 64])); // 4 query heads, 2 key heads
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    #[default]
    None,
    /// Over each head, with one weight `[head_dim]` for all heads.
    Head,
    /// Over all heads of a token together.
    Whole,
}

/// Places of the norms of a layer.
///
/// ```
/// use dsmoe_core::config::{Architecture, Norms, Rope};
///
/// let llama = Architecture::llama(64, 2, Rope::plain(10_000.0, 64));
/// let like_olmo = Architecture { norms: Norms::Post, ..llama.clone() };
/// assert!(llama.norms_before() && !llama.norms_after());
/// assert!(!like_olmo.norms_before() && like_olmo.norms_after());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Norms {
    /// Before attention and before the FFN.
    #[default]
    Pre,
    /// After attention and after the FFN, before each joins the residual stream.
    Post,
    /// Both before and after.
    Both,
}

/// Attention of one layer.
///
/// ```
/// use dsmoe_core::config::{Architecture, LayerAttention, Rope};
///
/// // Every second layer sees 512 tokens alone.
/// let mut architecture = Architecture::llama(64, 4, Rope::plain(10_000.0, 64));
/// for layer in architecture.layers.iter_mut().step_by(2) {
///     *layer = LayerAttention { window: Some(512), ..*layer };
/// }
/// assert_eq!(architecture.differences(), ["a window of 512 in 2 layers"]);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerAttention {
    /// A query sees itself and the keys before it, this many together; none for all of them.
    pub window: Option<usize>,
    /// Index of the layer's rotation in [`Architecture::ropes`]; none for a layer without one.
    pub rope: Option<usize>,
}

/// The switches in which decoders of different families differ; [`Architecture::llama`] has all of them as in LLaMA.
///
/// ```text
/// x = embed_scale E[ids]
/// per layer:
///   h = Pre, Both: rms(x);  Post: x
///   q, k, v = h W^T + b;  q, k normed by qk_norm, rotated by the layer's rope
///   s = attn_scale <q, k>;  s = attn_cap tanh(s / attn_cap);  within the layer's window
///   a = softmax(s) v W_o^T + b_o;  Post, Both: a = rms(a);  x += residual_scale a
///   h = Pre, Both: rms(x);  Post: x
///   f = ffn(h) + b_output;  Post, Both: f = rms(f);  x += residual_scale f
/// z = logit_scale rms(x) W_head^T;  z = final_cap tanh(z / final_cap)
/// rms(x) = x / sqrt(mean(x^2) + eps) (weight + norm_offset)
/// ```
///
/// ```
/// use dsmoe_core::config::{Architecture, LayerAttention, Norms, QkNorm, Rope};
///
/// let rope = Rope::plain(10_000.0, 64);
/// let mut like_gemma =
///     Architecture { qk_norm: QkNorm::Head, norms: Norms::Both, ..Architecture::llama(64, 2, rope) };
/// like_gemma.layers[0] = LayerAttention { window: Some(512), rope: Some(0) };
/// assert!(like_gemma.norms_before() && like_gemma.norms_after());
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// True if the projections of queries, keys and values have biases.
    pub qkv_bias: bool,
    /// True if attention's output projection has a bias.
    pub o_bias: bool,
    /// True if the projections of the FFN have biases.
    pub mlp_bias: bool,
    /// True if the FFN adds `mlp.output_bias` to every token: in pruned models, the mean of what was removed. No family
    /// has it, and none with [`Architecture::mlp_bias`] gets it.
    pub output_bias: bool,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Places of a layer's norms.
    pub norms: Norms,
    /// Added to the weights of all norms.
    pub norm_offset: f32,
    /// Activation of the FFN's gate.
    pub activation: Activation,
    /// Factor of the attention scores.
    pub attn_scale: f32,
    /// Soft cap of the attention scores.
    pub attn_cap: Option<f32>,
    /// Soft cap of the logits.
    pub final_cap: Option<f32>,
    /// Factor of the embedding.
    pub embed_scale: f32,
    /// Factor of what attention and FFN add to the residual stream.
    pub residual_scale: f32,
    /// Factor of the logits.
    pub logit_scale: f32,
    /// The rotations that layers use.
    pub ropes: Vec<Rope>,
    /// Attention of every layer.
    pub layers: Vec<LayerAttention>,
}

impl Architecture {
    /// Returns LLaMA's switches for heads of `head_dim` values and `num_layers` layers that are all rotated by `rope`.
    pub fn llama(head_dim: usize, num_layers: usize, rope: Rope) -> Architecture {
        Architecture {
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            output_bias: false,
            qk_norm: QkNorm::None,
            norms: Norms::Pre,
            norm_offset: 0.0,
            activation: Activation::Silu,
            attn_scale: 1.0 / (head_dim as f32).sqrt(),
            attn_cap: None,
            final_cap: None,
            embed_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            ropes: vec![rope],
            layers: vec![LayerAttention { window: None, rope: Some(0) }; num_layers],
        }
    }

    /// Returns whether norms stand before attention and FFN.
    pub fn norms_before(&self) -> bool {
        self.norms != Norms::Post
    }

    /// Returns whether norms stand after attention and FFN; the scale of what the FFN gives is then lost.
    pub fn norms_after(&self) -> bool {
        self.norms != Norms::Pre
    }

    /// Returns whether the factor of the embedding is the root of the width `hidden`, and so another in a narrower model.
    pub fn scales_by_width(&self, hidden: usize) -> bool {
        self.embed_scale != 1.0 && self.embed_scale == (hidden as f64).sqrt() as f32
    }

    /// Returns the switches that are not LLaMA's, in words.
    pub fn differences(&self) -> Vec<String> {
        let mut all = Vec::new();
        let mut add = |differs: bool, text: String| {
            if differs {
                all.push(text);
            }
        };
        add(self.qkv_bias, "bias on q, k, v".to_owned());
        add(self.o_bias, "bias on o".to_owned());
        add(self.mlp_bias, "biases in the FFN".to_owned());
        add(self.output_bias, "a bias of the FFN's output".to_owned());
        match self.qk_norm {
            QkNorm::None => {}
            QkNorm::Head => add(true, "norm of q and k by head".to_owned()),
            QkNorm::Whole => add(true, "norm of q and k over all heads".to_owned()),
        }
        match self.norms {
            Norms::Pre => {}
            Norms::Post => add(true, "norms after attention and FFN".to_owned()),
            Norms::Both => add(true, "norms before and after attention and FFN".to_owned()),
        }
        add(self.norm_offset != 0.0, format!("norm weights + {}", self.norm_offset));
        add(self.activation == Activation::GeluTanh, "gelu_tanh".to_owned());
        add(self.attn_cap.is_some(), format!("attention scores capped at {}", self.attn_cap.unwrap_or(0.0)));
        add(self.final_cap.is_some(), format!("logits capped at {}", self.final_cap.unwrap_or(0.0)));
        add(self.embed_scale != 1.0, format!("embedding times {}", self.embed_scale));
        add(self.residual_scale != 1.0, format!("residual branches times {}", self.residual_scale));
        add(self.logit_scale != 1.0, format!("logits times {}", self.logit_scale));
        let count = |f: fn(&LayerAttention) -> bool| self.layers.iter().filter(|layer| f(layer)).count();
        let (windows, bare) = (count(|layer| layer.window.is_some()), count(|layer| layer.rope.is_none()));
        let widest = self.layers.iter().filter_map(|layer| layer.window).max();
        add(windows > 0, format!("a window of {} in {windows} layers", widest.unwrap_or(0)));
        add(bare > 0, format!("no rotation in {bare} layers"));
        all
    }
}
