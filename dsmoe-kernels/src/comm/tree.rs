//! Sums of arrays in one order: along the binary tree over their numbers.
//!
//! ```text
//! level h adds neighbours that are 2^h apart, left + right; an odd one out passes up
//! sum of 7: ((0 + 1) + (2 + 3)) + ((4 + 5) + 6)
//! ```
//!
//! The sum of 2^k neighbours from a multiple of 2^k on is one node of the tree. Whoever makes nodes and adds them along the
//! same tree gets the same bits, however the leaves are divided.

use crate::add;
use crate::buf::Buf;

/// Adds arrays that come one after the other. Holds log2(leaves) arrays beside the one that is passed, and one at least.
#[derive(Debug, Default)]
pub struct Tree {
    /// Nodes without a right neighbour yet, with their heights, which fall.
    waiting: Vec<(u32, Buf)>,
    /// Memory for later leaves.
    free: Vec<Buf>,
}

impl Tree {
    /// Creates a tree without leaves.
    pub fn new() -> Tree {
        Tree::default()
    }

    /// Adds the next leaf. Takes its memory and leaves an array of the same length with unspecified contents.
    ///
    /// # Panics
    /// Its length differs from that of the leaves before.
    pub fn push(&mut self, leaf: &mut Buf) {
        let mut height = 0;
        while let Some((_, mut left)) = self.waiting.pop_if(|(other, _)| *other == height) {
            add::Add { y: &mut left, x: leaf, scale: 1.0 }.run();
            self.free.push(std::mem::replace(leaf, left));
            height += 1;
        }
        let mut room = self.free.pop().unwrap_or_default();
        room.resize(leaf.len());
        self.waiting.push((height, std::mem::replace(leaf, room)));
    }

    /// Sets `sum` to the sum of the leaves, whose memory it takes, and starts anew. The memory of `sum` is reused.
    ///
    /// # Panics
    /// There is no leaf.
    pub fn finish(&mut self, sum: &mut Buf) {
        let (_, mut right) = self.waiting.pop().expect("Tree::finish: there is no leaf");
        // Leaves are missing on the right where their number is no power of two.
        while let Some((_, mut left)) = self.waiting.pop() {
            add::Add { y: &mut left, x: &right, scale: 1.0 }.run();
            self.free.push(std::mem::replace(&mut right, left));
        }
        self.free.push(std::mem::replace(sum, right));
    }

    /// Returns the number of arrays of memory that the tree holds.
    pub fn arrays(&self) -> usize {
        self.waiting.len() + self.free.len()
    }
}

/// Sets the first `len` values of `parts`, which holds arrays of `len` values one after the other, to their sum along the
/// tree. The others are unspecified then.
///
/// # Panics
/// `parts` is not a whole number of arrays.
pub fn sum_parts(parts: &mut [f32], len: usize) {
    let count = parts.len().checked_div(len).unwrap_or(0);
    assert_eq!(parts.len(), count * len, "sum_parts: arrays of {len} values");
    let mut gap = 1;
    while gap < count {
        for left in (0..count - gap).step_by(2 * gap) {
            let (low, high) = parts.split_at_mut((left + gap) * len);
            add::Add { y: &mut low[left * len..][..len], x: &high[..len], scale: 1.0 }.run();
        }
        gap *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::{Tree, sum_parts};
    use crate::buf::Buf;
    use crate::testing::{normals, sized};

    const LEN: usize = 37;

    fn leaf(number: usize) -> Vec<f32> {
        let scale = f32::powi(2.0, (number * 7 % 13) as i32);
        normals(LEN, number as u64).iter().map(|x| x * scale).collect()
    }

    /// The definition, level by level.
    fn by_levels(mut nodes: Vec<Vec<f32>>) -> Vec<f32> {
        while nodes.len() > 1 {
            let add = |pair: &[Vec<f32>]| match pair {
                [left, right] => left.iter().zip(right).map(|(left, right)| left + right).collect(),
                odd => odd[0].clone(),
            };
            nodes = nodes.chunks(2).map(add).collect();
        }
        nodes.remove(0)
    }

    fn by_tree(tree: &mut Tree, leaves: &[Vec<f32>]) -> Vec<f32> {
        let mut buf = Buf::zeros(LEN);
        for leaf in leaves {
            buf.copy_from_slice(leaf);
            tree.push(&mut buf);
            assert_eq!(buf.len(), LEN);
        }
        tree.finish(&mut buf);
        buf.to_vec()
    }

    #[test]
    fn sums_follow_the_definition_for_every_number_of_leaves() {
        let mut tree = Tree::new();
        for count in 1..=sized(40, 9) {
            let leaves: Vec<Vec<f32>> = (0..count).map(leaf).collect();
            let want = by_levels(leaves.clone());
            assert_eq!(by_tree(&mut tree, &leaves), want, "{count} leaves one after the other");
            let mut parts = leaves.concat();
            sum_parts(&mut parts, LEN);
            assert_eq!(parts[..LEN], want, "{count} leaves side by side");
        }
    }

    #[test]
    fn order_matters_for_these_leaves() {
        let mut leaves: Vec<Vec<f32>> = (0..8).map(leaf).collect();
        let want = by_levels(leaves.clone());
        leaves.swap(1, 2);
        assert_ne!(by_levels(leaves), want);
    }

    #[test]
    fn any_division_into_nodes_gives_the_same_bits() {
        let all: &[(usize, &[usize])] = &[(8, &[1, 2, 4, 8]), (12, &[1, 2, 4, 12]), (40, &[1, 2, 4, 8, 40])];
        for &(count, sizes) in sized(all, &all[..2]) {
            let leaves: Vec<Vec<f32>> = (0..count).map(leaf).collect();
            let want = by_levels(leaves.clone());
            for &size in sizes {
                let node = |leaves: &[Vec<f32>]| by_tree(&mut Tree::new(), leaves);
                let mut nodes: Vec<f32> = leaves.chunks(size).flat_map(node).collect();
                sum_parts(&mut nodes, LEN);
                assert_eq!(nodes[..LEN], want, "{count} leaves in nodes of {size}");
            }
        }
    }

    #[test]
    fn memory_grows_with_the_logarithm_of_the_leaves_and_is_kept() {
        for (count, arrays) in [(1, 1), (2, 1), (4, 2), (8, 3), (64, 6)] {
            let mut tree = Tree::new();
            let mut buf = Buf::zeros(LEN);
            for _ in 0..3 {
                let mut most = 0;
                for _ in 0..count {
                    tree.push(&mut buf);
                    most = most.max(tree.arrays());
                }
                tree.finish(&mut buf);
                assert!(most <= arrays, "{count} leaves take {most} arrays");
                assert!(tree.arrays() <= arrays, "{count} leaves leave {} arrays", tree.arrays());
            }
        }
    }

    #[test]
    fn parts_without_values_are_no_sum() {
        sum_parts(&mut [], 0);
        sum_parts(&mut [], 3);
    }

    #[test]
    #[should_panic(expected = "sum_parts: arrays of 3 values")]
    fn parts_of_other_lengths_are_refused() {
        sum_parts(&mut [0.0; 7], 3);
    }
}
