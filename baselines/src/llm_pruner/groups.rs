//! Dependency groups: what goes with a neuron, a head or a channel when it is removed.
//!
//! ```text
//! neuron j       row j of gate and up, column j of down
//! key/value head its rows of k and v, the rows of q of its query heads and the matching columns of o
//! channel c      column c of embedding, head, q, k, v, gate and up, row c of o and down, entry c of every norm
//! ```
//!
//! (Ma, Fang, Wang 2023, eqs. 1-2, solved for LLaMA.) Rows and columns are those of the checkpoint, `[out, in]`; a norm
//! is one row, and so is a bias. Biases, and norms of whole queries and keys, follow the rows that they belong to and are
//! not scored.

use std::collections::HashMap;
use std::ops::Range;

use dsmoe_core::Config;
use dsmoe_core::checkpoint::norm_names;
use dsmoe_core::config::QkNorm;

/// A dimension of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Axis {
    Rows,
    Columns,
}

/// A tensor that loses rows or columns with every removed group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// Name in the checkpoint.
    pub(crate) tensor: String,
    pub(crate) axis: Axis,
    /// Indices that one group owns.
    pub(crate) width: usize,
}

impl Member {
    fn new(tensor: String, axis: Axis, width: usize) -> Member {
        Member { tensor, axis, width }
    }

    /// The rows or columns of this tensor that belong to `group`.
    pub(crate) fn indices(&self, group: usize) -> Range<usize> {
        group * self.width..(group + 1) * self.width
    }
}

/// Groups that compete with each other, of one structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Groups {
    /// The place of the groups, e.g. `layer 3 heads`.
    pub(crate) place: String,
    /// The number of groups.
    pub(crate) count: usize,
    /// Rows of a group whose members correspond: 1, or the width of a head. A member that owns more indices than
    /// this (q and o, when query heads share keys) has them folded onto these.
    pub(crate) lanes: usize,
    /// In the order of the forward pass.
    pub(crate) members: Vec<Member>,
    /// Vectors that lose their entries with a group and are not scored.
    pub(crate) followers: Vec<Member>,
}

impl Groups {
    /// The FFN neurons of a layer.
    pub(crate) fn neurons(config: &Config, layer: usize) -> Groups {
        let members = [("gate", Axis::Rows), ("up", Axis::Rows), ("down", Axis::Columns)];
        let of = |(name, axis)| Member::new(format!("model.layers.{layer}.mlp.{name}_proj.weight"), axis, 1);
        let (place, members) = (format!("layer {layer} neurons"), members.map(of).to_vec());
        let bias =
            |name: &str| Member::new(format!("model.layers.{layer}.mlp.{name}.bias"), Axis::Columns, 1);
        let biases = config.architecture.mlp_bias.then(|| ["gate_proj", "up_proj"].map(bias));
        let followers = biases.into_iter().flatten().collect();
        Groups { place, count: config.layer(layer).intermediate, lanes: 1, members, followers }
    }

    /// The key and value heads of a layer, each with its query heads.
    pub(crate) fn heads(config: &Config, layer: usize) -> Groups {
        let shape = config.layer(layer);
        let (lanes, queries) = (config.head_dim, shape.num_heads / shape.num_kv_heads * config.head_dim);
        let members = [
            ("q", Axis::Rows, queries),
            ("k", Axis::Rows, lanes),
            ("v", Axis::Rows, lanes),
            ("o", Axis::Columns, queries),
        ];
        let member = |(name, axis, width)| {
            Member::new(format!("model.layers.{layer}.self_attn.{name}_proj.weight"), axis, width)
        };
        let vector = |(name, width): (&str, usize)| {
            Member::new(format!("model.layers.{layer}.self_attn.{name}"), Axis::Columns, width)
        };
        let biases = [("q_proj.bias", queries), ("k_proj.bias", lanes), ("v_proj.bias", lanes)];
        let norms = [("q_norm.weight", queries), ("k_norm.weight", lanes)];
        let biases = config.architecture.qkv_bias.then_some(biases).into_iter().flatten();
        let norms = (config.architecture.qk_norm == QkNorm::Whole).then_some(norms).into_iter().flatten();
        let followers = biases.chain(norms).map(vector).collect();
        let (place, members) = (format!("layer {layer} heads"), members.map(member).to_vec());
        Groups { place, count: shape.num_kv_heads, lanes, members, followers }
    }

    /// The channels of the residual stream. The last member is the output head, which a tied model has in its
    /// embedding.
    pub(crate) fn channels(config: &Config) -> Groups {
        const ATTENTION: [(&str, Axis); 4] = [
            ("self_attn.q_proj", Axis::Columns),
            ("self_attn.k_proj", Axis::Columns),
            ("self_attn.v_proj", Axis::Columns),
            ("self_attn.o_proj", Axis::Rows),
        ];
        const FFN: [(&str, Axis); 3] =
            [("mlp.gate_proj", Axis::Columns), ("mlp.up_proj", Axis::Columns), ("mlp.down_proj", Axis::Rows)];
        let columns = |name: String| Member::new(name, Axis::Columns, 1);
        let embedding = columns("model.embed_tokens.weight".to_owned());
        let (first, last) = match config.tie_word_embeddings {
            true => (None, embedding),
            false => (Some(embedding), columns("lm_head.weight".to_owned())),
        };
        let layers = (0..config.num_layers).flat_map(|i| {
            let matrix = move |(name, axis)| Member::new(format!("model.layers.{i}.{name}.weight"), axis, 1);
            let [before, after, before_ffn, after_ffn] = norm_names(config, i).map(|name| name.map(columns));
            let attention = before.into_iter().chain(ATTENTION.map(matrix)).chain(after);
            attention.chain(before_ffn).chain(FFN.map(matrix)).chain(after_ffn).collect::<Vec<_>>()
        });
        let norm = columns("model.norm.weight".to_owned());
        let members = first.into_iter().chain(layers).chain([norm, last]).collect();
        let o_bias = config.architecture.o_bias.then_some("self_attn.o_proj.bias");
        let down_bias = config.architecture.mlp_bias.then_some("mlp.down_proj.bias");
        let output_bias = config.architecture.output_bias.then_some("mlp.output_bias");
        let biases = (0..config.num_layers).flat_map(|i| {
            let biased = o_bias.into_iter().chain(down_bias).chain(output_bias);
            biased.map(move |name| columns(format!("model.layers.{i}.{name}")))
        });
        Groups {
            place: "channels".to_owned(),
            count: config.hidden,
            lanes: 1,
            members,
            followers: biases.collect(),
        }
    }
}

/// The rows and columns that stay of one tensor, ascending; none where all stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) rows: Option<Vec<usize>>,
    pub(crate) columns: Option<Vec<usize>>,
}

/// The rows and columns that stay of every cut tensor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cuts(HashMap<String, Cut>);

impl Cuts {
    /// Keeps only the groups in `kept` (ascending) of `groups`.
    pub(crate) fn keep(&mut self, groups: &Groups, kept: &[usize]) {
        for member in groups.members.iter().chain(&groups.followers) {
            let indices = kept.iter().flat_map(|&group| member.indices(group)).collect();
            let cut = self.0.entry(member.tensor.clone()).or_default();
            match member.axis {
                Axis::Rows => cut.rows = Some(indices),
                Axis::Columns => cut.columns = Some(indices),
            }
        }
    }

    /// Returns the rows and columns that stay of a tensor.
    pub(crate) fn of(&self, tensor: &str) -> Cut {
        self.0.get(tensor).cloned().unwrap_or_default()
    }
}
