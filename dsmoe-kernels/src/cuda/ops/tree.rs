//! Sums along one binary tree; see [`crate::comm::tree`].

use super::{Arg, Grid, Matrix, Result, Source};

pub(super) static SOURCE: Source = Source { name: "tree", text: include_str!("tree.cu") };

/// Parts that a kernel adds at once: 8 neighbours are a node of the tree.
const GROUP: usize = 8;
/// Threads of a block, and values of a thread.
const BLOCK: usize = 256;
const VALUES: usize = 4;

/// Sets `out` to the sum of the rows of `parts` along the tree over their numbers. It has the bits of
/// [`sum_parts`](crate::comm::tree::sum_parts).
#[derive(Debug)]
pub struct SumParts<'a> {
    /// One row of `parts`.
    pub out: &'a mut Matrix<f32>,
    /// One row per part. More than 8 rows are overwritten.
    pub parts: &'a mut Matrix<f32>,
}

impl SumParts<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// There is no part, or `out` is no row.
    pub fn run(self) -> Result<()> {
        let SumParts { out, parts } = self;
        let (mut count, len) = (parts.rows(), parts.cols());
        assert!(count > 0 && out.len() == len, "cuda tree: {} values of {count} rows of {len}", out.len());
        let blocks = len.div_ceil(BLOCK * VALUES);
        let mut gap = len;
        while count > GROUP {
            let groups = count.div_ceil(GROUP);
            let gaps = [gap * GROUP, gap].map(|gap| Arg::I64(gap as i64));
            let args = [parts.arg(), gaps[0], parts.arg(), gaps[1], Arg::I64(len as i64), count.into()];
            let grid = Grid::plane(blocks, groups, BLOCK as u32);
            // SAFETY: group g reads its rows of `parts`, which are `gap` apart, and sets the first of them. A thread reads
            // values of its own columns before it sets them.
            unsafe { SOURCE.launch(parts.gpu(), "comm_tree", &[], grid, &args) }?;
            (count, gap) = (groups, gap * GROUP);
        }
        let args =
            [out.arg(), Arg::I64(0), parts.arg(), Arg::I64(gap as i64), Arg::I64(len as i64), count.into()];
        // SAFETY: one group reads `count` rows that are `gap` apart, and sets `out`, whose length was checked above.
        unsafe { SOURCE.launch(parts.gpu(), "comm_tree", &[], Grid::plane(blocks, 1, BLOCK as u32), &args) }
    }
}
