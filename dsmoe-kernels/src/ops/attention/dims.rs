//! The sizes of attention, and the checks of lengths against them.

use super::tile::View;

/// The settings that turn products of queries and keys into scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// Multiplies the products.
    pub scale: f32,
    /// A query sees itself and the keys before it, this many in all; none for all keys before it. Not 0.
    pub window: Option<usize>,
    /// The soft cap c of the scaled products, `c tanh(s / c)`, applied before the mask; positive.
    pub cap: Option<f32>,
}

impl Scores {
    /// Returns the plain scores: scaled by `1 / sqrt(head_dim)`, without window and cap.
    pub fn plain(head_dim: usize) -> Scores {
        Scores { scale: 1.0 / (head_dim as f32).sqrt(), window: None, cap: None }
    }
}

/// The sizes, and the making of the scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dims {
    /// Sequences.
    pub batch: usize,
    /// Queries of a sequence: its last positions.
    pub queries: usize,
    /// Keys and values of a sequence, at least as many as queries.
    pub keys: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The settings of the scores.
    pub scores: Scores,
}

impl Dims {
    /// Returns the query heads per head of keys.
    pub(super) fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Returns the row length of q and out.
    pub(super) fn width(self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the row length of k and v.
    pub(super) fn kv_width(self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Returns the end of the keys that query i of a sequence sees: one past its own.
    pub(super) fn visible(self, i: usize) -> usize {
        i + 1 + self.keys - self.queries
    }

    /// Returns the first key that query i of a sequence sees.
    pub(super) fn first_seen(self, i: usize) -> usize {
        self.scores.window.map_or(0, |window| self.visible(i).saturating_sub(window))
    }

    /// Returns the row length of qkv.
    pub fn joined_width(self) -> usize {
        self.width() + 2 * self.kv_width()
    }

    /// Returns the columns at which q, k and v start in a row of qkv.
    pub(super) fn starts(self) -> [usize; 3] {
        [0, self.width(), self.width() + self.kv_width()]
    }

    /// Returns q, k and v of a qkv that is not empty.
    pub(super) fn views(self, qkv: &[f32]) -> [View<'_>; 3] {
        self.starts().map(|start| View { data: &qkv[start..], stride: self.joined_width() })
    }

    pub(super) fn check(self, op: &str, queries: &[usize], keys: &[usize]) {
        assert!(
            self.kv_heads > 0
                && self.heads > 0
                && self.head_dim > 0
                && self.heads.is_multiple_of(self.kv_heads)
                && self.queries <= self.keys
                && queries.iter().all(|&len| len == self.batch * self.queries * self.width())
                && keys.iter().all(|&len| len == self.batch * self.keys * self.kv_width()),
            "{op}: q and its like {queries:?}, k and its like {keys:?} values for {self:?}"
        );
        let Scores { window, cap, .. } = self.scores;
        assert!(
            window != Some(0) && cap.is_none_or(|cap| cap > 0.0),
            "{op}: window and cap have to be positive in {:?}",
            self.scores
        );
    }

    pub(super) fn check_joined(self, op: &str, outs: &[usize], joined: &[usize], lse: usize) {
        let rows = self.batch * self.queries;
        self.check(op, outs, &[]);
        assert!(
            self.queries == self.keys
                && lse == rows * self.heads
                && joined.iter().all(|&len| len == rows * self.joined_width()),
            "{op}: qkv and its like {joined:?}, lse {lse} values for {self:?}"
        );
    }
}
