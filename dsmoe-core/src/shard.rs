//! The shares of a model's arena that processes own.
//!
//! ```text
//! unit     the embedding, a layer, or the final norm with the head
//! block    65,536 values, counted from the start of a unit
//! piece    what one process owns of one unit: whole blocks
//! ```
//! The reduced gradient of a value and its moments lie where the value is owned. Blocks do not depend on the number of
//! processes, so sums over blocks do not either.

use std::ops::Range;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::tree::sum_parts;
use dsmoe_kernels::comm::{Communicator, Result, What};

use crate::params::{Entry, Layout};

/// Values of a block.
pub const BLOCK: usize = 1 << 16;
/// Values that a process sends in one call at the most: small calls overlap with each other and with additions.
const BUCKET: usize = 1 << 20;

/// The division of an arena among processes.
///
/// ```
/// use dsmoe_core::params::{Layout, TensorSpec};
/// use dsmoe_core::shard::{BLOCK, Shards, Staging};
///
/// let layout = Layout::of(vec![TensorSpec::matrix("model.embed_tokens.weight", 3, BLOCK)]);
/// let shards = Shards::new(&layout, 2);
/// // Whole blocks: two for one process and one for the other.
/// let owned = [0, 1].map(|rank| shards.owned(rank).iter().map(ExactSizeIterator::len).sum::<usize>());
/// assert_eq!(owned.iter().sum::<usize>(), 3 * BLOCK);
/// assert!(Staging::bytes(layout.len() as u64) > 0);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shards {
    units: Vec<Range<usize>>,
    size: usize,
    bucket: usize,
    /// So many processes with neighbouring ranks add up first.
    neighbours: usize,
}

/// Memory of what is sent and received.
///
/// ```
/// use dsmoe_core::params::{Layout, TensorSpec};
/// use dsmoe_core::shard::{Shards, Staging};
/// use dsmoe_kernels::comm::{Alone, What};
///
/// let layout = Layout::of(vec![TensorSpec::matrix("up_proj.weight", 4, 16)]);
/// let shards = Shards::new(&layout, 1);
/// let (mut grads, mut sum, mut staging) = (vec![0.5; 64], vec![0.0; 64], Staging::default());
/// // The memory grows with the first unit and serves all others.
/// let of = (&Alone as _, What::of("gradients"));
/// shards.reduce(of, 0, &mut grads, Some(&mut sum), &mut staging)?;
/// assert_eq!(sum, [0.5; 64]); // a single process owns everything
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Staging {
    send: Buf,
    recv: Buf,
}

impl Staging {
    /// Returns the bytes that the exchange of an arena of `len` values takes at the most.
    pub fn bytes(len: u64) -> u64 {
        2 * size_of::<f32>() as u64 * len.min(BUCKET as u64)
    }
}

impl Shards {
    /// Divides an arena among `size` processes.
    ///
    /// # Panics
    /// `size` is 0.
    pub fn new(layout: &Layout, size: usize) -> Shards {
        assert!(size > 0, "shards: processes");
        let groups = layout.entries().chunk_by(|a: &Entry, b: &Entry| a.layer == b.layer);
        let mut units: Vec<Range<usize>> = groups.map(|unit| unit[0].range.start..0).collect();
        let mut end = layout.len();
        for unit in units.iter_mut().rev() {
            unit.end = end;
            end = unit.start;
        }
        Shards { units, size, bucket: BUCKET, neighbours: 1 }
    }

    /// Makes sums in two stages: first of `neighbours` processes with neighbouring ranks, as of one machine, then of such
    /// groups. The bits are those of one stage, and each process sends to others than its neighbours what one of them would.
    ///
    /// # Panics
    /// The number is no power of two or does not divide that of the processes: groups would be no nodes of the tree.
    pub fn in_two_stages(self, neighbours: usize) -> Shards {
        let fits = neighbours.is_power_of_two() && self.size.is_multiple_of(neighbours);
        assert!(fits, "shards: groups of {neighbours} of {} processes", self.size);
        Shards { neighbours, ..self }
    }

    /// Returns the ranges of the units, in arena order.
    pub fn units(&self) -> &[Range<usize>] {
        &self.units
    }

    /// Returns the number of processes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Returns what process `rank` owns of unit `unit`.
    ///
    /// # Panics
    /// There is no such unit or process.
    pub fn piece(&self, unit: usize, rank: usize) -> Range<usize> {
        assert!(rank < self.size, "shards: rank {rank} of {}", self.size);
        let Range { start, end } = self.units[unit];
        let blocks = (end - start).div_ceil(BLOCK);
        let cut = |rank: usize| (start + blocks * rank / self.size * BLOCK).min(end);
        cut(rank)..cut(rank + 1)
    }

    /// Returns all that process `rank` owns, in arena order; neighbours are one range.
    ///
    /// # Panics
    /// There is no such process.
    pub fn owned(&self, rank: usize) -> Vec<Range<usize>> {
        let mut owned: Vec<Range<usize>> = Vec::new();
        for piece in
            (0..self.units.len()).map(|unit| self.piece(unit, rank)).filter(|piece| !piece.is_empty())
        {
            match owned.last_mut() {
                Some(last) if last.end == piece.start => last.end = piece.end,
                _ => owned.push(piece),
            }
        }
        owned
    }

    /// Returns the place of a piece of process `rank` among all that it owns, when these lie one after the other.
    ///
    /// # Panics
    /// There is no such unit or process.
    pub fn place(&self, unit: usize, rank: usize) -> Range<usize> {
        let start = (0..unit).map(|unit| self.piece(unit, rank).len()).sum();
        start..start + self.piece(unit, rank).len()
    }

    /// Adds the gradients `grads` of unit `unit` of all processes along the tree over their ranks. Sets `own` to the sum of
    /// the own piece, or without it that piece of `grads`; the rest of the unit is left as it was.
    ///
    /// # Errors
    /// Communication fails.
    ///
    /// # Panics
    /// `comm` has another number of processes, or the slices have not the lengths of the unit and the own piece.
    pub fn reduce(
        &self,
        (comm, of): (&dyn Communicator, What),
        unit: usize,
        grads: &mut [f32],
        mut own: Option<&mut [f32]>,
        staging: &mut Staging,
    ) -> Result<()> {
        let piece = self.check(comm, unit, grads, own.as_deref());
        if let (1, Some(own)) = (self.size, &mut own) {
            own.copy_from_slice(grads);
        }
        let stages = self.stages(comm.rank());
        self.buckets(comm, unit, |cut, part| {
            for (number, stage) in stages.iter().enumerate() {
                // The earlier sums lie in the order of their owners.
                let owners = stage.iter().flat_map(|(_, owners)| owners);
                let Staging { send, recv } = &mut *staging;
                send.resize(owners.clone().map(|&owner| cut[owner].len()).sum());
                let mut filled = 0;
                for &owner in owners {
                    let to = &mut send[filled..filled + cut[owner].len()];
                    match number {
                        0 => to.copy_from_slice(&grads[cut[owner].clone()]),
                        _ => to.copy_from_slice(&recv[filled..filled + cut[owner].len()]),
                    }
                    filled += cut[owner].len();
                }
                let len = |owners: &[usize]| owners.iter().map(|&owner| cut[owner].len()).sum::<usize>();
                let own = stage.iter().find(|(rank, _)| *rank == comm.rank());
                let own = own.map_or(0, |(_, owners)| len(owners));
                let [mut sent, mut received] = [(); 2].map(|()| vec![0; self.size]);
                for (rank, owners) in stage {
                    (sent[*rank], received[*rank]) = (size_of::<f32>() * len(owners), size_of::<f32>() * own);
                }
                recv.resize(own * stage.len());
                let (from, to) = (bytemuck::cast_slice(send), bytemuck::cast_slice_mut(recv));
                comm.all_to_all(of.unit(unit), from, &sent, to, &received)?;
                sum_parts(recv, own);
            }
            let to = match &mut own {
                Some(own) => &mut own[part.start - piece.start..part.end - piece.start],
                None => &mut grads[part.clone()],
            };
            to.copy_from_slice(&staging.recv[..part.len()]);
            Ok(())
        })
    }

    /// Returns the stages of a sum in process `rank`: the processes that take part, this one among them, in order of ranks, and
    /// for each the owners that it gets this process's sums for, in order too.
    fn stages(&self, rank: usize) -> Vec<Vec<(usize, Vec<usize>)>> {
        let each = |ranks: Vec<usize>| ranks.into_iter().map(|rank| (rank, vec![rank])).collect();
        if self.neighbours == 1 || self.neighbours == self.size {
            return vec![each((0..self.size).collect())];
        }
        // The processes of the same place in all groups.
        let alike = |place: usize| (place..self.size).step_by(self.neighbours).collect::<Vec<_>>();
        let first = rank - rank % self.neighbours;
        let group = first..first + self.neighbours;
        let in_group = group.map(|other| (other, alike(other - first))).collect();
        vec![in_group, each(alike(rank - first))]
    }

    /// Sets `values` to unit `unit`, all pieces of which come from their owners: `own`, or without it the own piece of
    /// `values`.
    ///
    /// # Errors
    /// Communication fails.
    ///
    /// # Panics
    /// Those of [`Shards::reduce`].
    pub fn gather(
        &self,
        (comm, of): (&dyn Communicator, What),
        unit: usize,
        values: &mut [f32],
        own: Option<&[f32]>,
        staging: &mut Staging,
    ) -> Result<()> {
        let piece = self.check(comm, unit, values, own);
        if let (1, Some(own)) = (self.size, own) {
            values.copy_from_slice(own);
        }
        let Staging { send, recv } = staging;
        self.buckets(comm, unit, |cut, part| {
            send.resize(part.len());
            send.copy_from_slice(match own {
                Some(own) => &own[part.start - piece.start..part.end - piece.start],
                None => &values[part.clone()],
            });
            recv.resize(cut.iter().map(|piece| piece.len()).sum());
            let lens: Vec<usize> = cut.iter().map(|piece| size_of::<f32>() * piece.len()).collect();
            let (from, to) = (bytemuck::cast_slice(send), bytemuck::cast_slice_mut(recv));
            comm.all_gather(of.unit(unit), from, to, &lens)?;
            let mut taken = 0;
            for piece in cut {
                values[piece.clone()].copy_from_slice(&recv[taken..taken + piece.len()]);
                taken += piece.len();
            }
            Ok(())
        })
    }

    /// Returns the own piece of a unit, counted from the unit's start.
    fn check(
        &self,
        comm: &dyn Communicator,
        unit: usize,
        values: &[f32],
        own: Option<&[f32]>,
    ) -> Range<usize> {
        assert_eq!(comm.size(), self.size, "shards: processes");
        let start = self.units[unit].start;
        let piece = self.piece(unit, comm.rank());
        let fits = values.len() == self.units[unit].len() && own.is_none_or(|own| own.len() == piece.len());
        assert!(fits, "shards: {} values of unit {unit}, whose piece is {piece:?}", values.len());
        piece.start - start..piece.end - start
    }

    /// Calls `work` with as much of every piece of unit `unit` as moves in one call, and with this process's part of it, until
    /// all is moved. Places are counted from the unit's start. A single process moves nothing.
    fn buckets(
        &self,
        comm: &dyn Communicator,
        unit: usize,
        mut work: impl FnMut(&[Range<usize>], &Range<usize>) -> Result<()>,
    ) -> Result<()> {
        if self.size == 1 {
            return Ok(());
        }
        let start = self.units[unit].start;
        let piece = |rank| {
            let piece = self.piece(unit, rank);
            piece.start - start..piece.end - start
        };
        let pieces: Vec<Range<usize>> = (0..self.size).map(piece).collect();
        let longest = pieces.iter().map(|piece| piece.len()).max().unwrap_or(0);
        let at_once = (self.bucket / self.size).max(1);
        for first in (0..longest).step_by(at_once) {
            let part = |piece: &Range<usize>| {
                let at = |offset: usize| piece.start + offset.min(piece.len());
                at(first)..at(first + at_once)
            };
            let cut: Vec<Range<usize>> = pieces.iter().map(part).collect();
            work(&cut, &cut[comm.rank()])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::comm::threads::on_threads;
    use dsmoe_kernels::testing::normals;
    use proptest::prelude::*;

    use super::*;
    use crate::params::TensorSpec;

    const OF: What = What::of("values");

    /// Layers of these numbers of values between an embedding and a head.
    fn layout(layers: &[usize]) -> Layout {
        let mut layout = Layout::default();
        layout.push(TensorSpec::matrix("embedding", 3, 50_000), None);
        for (i, &len) in layers.iter().enumerate() {
            layout.push(TensorSpec::matrix(format!("{i}.w"), 1, len), Some(i));
            layout.push(TensorSpec::norm(format!("{i}.norm"), 5), Some(i));
        }
        layout.push(TensorSpec::norm("norm", 7), None);
        layout
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_value_has_one_owner_and_pieces_are_whole_blocks(
            layers in prop::collection::vec(1usize..400_000, 0..5), size in 1usize..9,
        ) {
            let layout = layout(&layers);
            let shards = Shards::new(&layout, size);
            let mut end = 0;
            for (number, unit) in shards.units().iter().enumerate() {
                prop_assert_eq!(unit.start, end);
                for rank in 0..size {
                    let piece = shards.piece(number, rank);
                    prop_assert_eq!(piece.start, end);
                    prop_assert!((piece.start - unit.start).is_multiple_of(BLOCK) || piece.is_empty());
                    end = piece.end;
                }
                prop_assert_eq!(unit.end, end);
            }
            prop_assert_eq!(end, layout.len());
            let owned: usize = (0..size).flat_map(|rank| shards.owned(rank)).map(|range| range.len()).sum();
            prop_assert_eq!(owned, layout.len());
            prop_assert_eq!(Shards::new(&layout, 1).owned(0), vec![0..layout.len()]);
        }
    }

    #[test]
    fn a_layer_is_a_unit() {
        let shards = Shards::new(&layout(&[20, 30]), 2);
        assert_eq!(shards.units(), [0..150_000, 150_000..150_048, 150_048..150_096, 150_096..150_112]);
        assert_eq!([shards.piece(0, 0), shards.piece(0, 1)], [0..65_536, 65_536..150_000]);
        assert_eq!([shards.owned(0), shards.owned(1)].concat(), [0..65_536, 65_536..150_112]);
    }

    /// In one bucket and in many, in place and apart: the own piece is the sum along the tree, and everyone gathers the same.
    #[test]
    fn reduced_and_gathered_is_the_sum_along_the_tree() {
        let layout = layout(&[200_000, 70_000]);
        let leaf = |rank: usize| normals(layout.len(), rank as u64 + 1);
        let one_stage = [(1, BUCKET, 1), (2, BUCKET, 1), (3, 50_000, 1), (4, BUCKET, 1), (4, 10_001, 1)];
        let two_stages =
            [(4, BUCKET, 2), (4, 10_001, 2), (4, BUCKET, 4), (6, BUCKET, 2), (8, 30_000, 4), (8, 30_000, 2)];
        for (size, bucket, neighbours) in one_stage.into_iter().chain(two_stages) {
            let mut want: Vec<f32> = (0..size).flat_map(leaf).collect();
            sum_parts(&mut want, layout.len());
            want.truncate(layout.len());
            for apart in [false, true] {
                let results = on_threads(size, |comm| {
                    let shards = Shards { bucket, ..Shards::new(&layout, size).in_two_stages(neighbours) };
                    let (mut values, mut staging) = (leaf(comm.rank()), Staging::default());
                    let mut own = vec![0.0; shards.owned(comm.rank()).iter().map(|range| range.len()).sum()];
                    for (number, unit) in shards.units().iter().enumerate() {
                        let place = shards.place(number, comm.rank());
                        let own = apart.then_some(&mut own[place]);
                        let unit = &mut values[unit.clone()];
                        shards.reduce((comm, OF), number, unit, own, &mut staging).unwrap();
                    }
                    let owned = shards.owned(comm.rank()).into_iter().flat_map(|range| want[range].to_vec());
                    match apart {
                        true => assert_eq!(own, owned.collect::<Vec<_>>()),
                        false => shards.owned(comm.rank()).into_iter().for_each(|range| {
                            assert_eq!(values[range.clone()], want[range]);
                        }),
                    }
                    for (number, unit) in shards.units().iter().enumerate() {
                        let own = apart.then(|| &own[shards.place(number, comm.rank())]);
                        let unit = &mut values[unit.clone()];
                        shards.gather((comm, OF), number, unit, own, &mut staging).unwrap();
                    }
                    values
                });
                let case = format!("{size} processes in groups of {neighbours}, buckets of {bucket}");
                assert!(results.iter().all(|values| values == &want), "{case}");
            }
        }
    }
}
