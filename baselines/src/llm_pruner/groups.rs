//! Dependency groups: what goes with a neuron, a head or a channel when it is removed.
//!
//! ```text
//! neuron j       row j of gate and up, column j of down
//! key/value head its rows of k and v, the rows of q of its query heads and the matching columns of o
//! channel c      column c of embedding, head, q, k, v, gate and up, row c of o and down, entry c of every norm
//! ```
//!
//! (Ma, Fang, Wang 2023, eqs. 1-2, solved for LLaMA.) Rows and columns are those of the checkpoint, `[out, in]`; a norm
//! is one row.

use std::collections::HashMap;
use std::ops::Range;

use dsmoe_core::Config;

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
}

impl Groups {
    /// The FFN neurons of a layer.
    pub(crate) fn neurons(config: &Config, layer: usize) -> Groups {
        let members = [("gate", Axis::Rows), ("up", Axis::Rows), ("down", Axis::Columns)];
        let member =
            |(name, axis)| Member::new(format!("model.layers.{layer}.mlp.{name}_proj.weight"), axis, 1);
        Groups {
            place: format!("layer {layer} neurons"),
            count: config.layer(layer).intermediate,
            lanes: 1,
            members: members.map(member).to_vec(),
        }
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
        Groups {
            place: format!("layer {layer} heads"),
            count: shape.num_kv_heads,
            lanes,
            members: members.map(member).to_vec(),
        }
    }

    /// The channels of the residual stream. The last member is the output head, which a tied model has in its
    /// embedding.
    pub(crate) fn channels(config: &Config) -> Groups {
        const LAYER: [(&str, Axis); 9] = [
            ("input_layernorm", Axis::Columns),
            ("self_attn.q_proj", Axis::Columns),
            ("self_attn.k_proj", Axis::Columns),
            ("self_attn.v_proj", Axis::Columns),
            ("self_attn.o_proj", Axis::Rows),
            ("post_attention_layernorm", Axis::Columns),
            ("mlp.gate_proj", Axis::Columns),
            ("mlp.up_proj", Axis::Columns),
            ("mlp.down_proj", Axis::Rows),
        ];
        let columns = |name: &str| Member::new(name.to_owned(), Axis::Columns, 1);
        let embedding = columns("model.embed_tokens.weight");
        let (first, last) = match config.tie_word_embeddings {
            true => (None, embedding),
            false => (Some(embedding), columns("lm_head.weight")),
        };
        let layers = (0..config.num_layers).flat_map(|i| {
            LAYER.map(|(name, axis)| Member::new(format!("model.layers.{i}.{name}.weight"), axis, 1))
        });
        let members = first.into_iter().chain(layers).chain([columns("model.norm.weight"), last]).collect();
        Groups { place: "channels".to_owned(), count: config.hidden, lanes: 1, members }
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
        for member in &groups.members {
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
