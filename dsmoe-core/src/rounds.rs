//! The work on sequences, divided among processes.
//!
//! Sequences are taken in rounds of one per process, and the result of each is sent to all in the order of sequences. So a sum
//! over sequences is made by everyone in the order of a single process, whatever the number of processes.

use std::sync::Arc;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::{Communicator, What};

use crate::error::Result;

/// Bytes that are sent at a time, at most.
const PIECE: usize = 256 << 20;

/// Sets `values` to those of rank `from`.
pub(crate) fn broadcast(comm: &dyn Communicator, of: What, from: usize, values: &mut [f32]) -> Result<()> {
    let mut pieces = bytemuck::cast_slice_mut(values).chunks_mut(PIECE);
    Ok(pieces.try_for_each(|piece| comm.broadcast(of, from, piece))?)
}

/// The rounds of a group of processes.
#[derive(Debug)]
pub(crate) struct Rounds {
    comm: Arc<dyn Communicator>,
    mine: Buf,
    theirs: Buf,
}

/// Sets its last argument to the result of a sequence, given the states of all.
type Work<'a> = dyn FnMut(&[f32], usize, &mut [f32]) + 'a;
/// Receives the result of a sequence, and may change the states of all.
type See<'a> = dyn FnMut(&mut [f32], usize, &[f32]) + 'a;

impl Rounds {
    pub(crate) fn new(comm: &Arc<dyn Communicator>) -> Rounds {
        Rounds { comm: Arc::clone(comm), mine: Buf::default(), theirs: Buf::default() }
    }

    pub(crate) fn comm(&self) -> &Arc<dyn Communicator> {
        &self.comm
    }

    /// Returns whether there is no other process.
    pub(crate) fn is_alone(&self) -> bool {
        self.comm.size() == 1
    }

    /// Does `work` for each of `sequences` in one process, and shows its `len` values to `see` in all, in their order.
    pub(crate) fn each(
        &mut self,
        (sequences, len): (&[usize], usize),
        of: What,
        states: &mut [f32],
        work: &mut Work<'_>,
        see: &mut See<'_>,
    ) -> Result<()> {
        let Rounds { comm, mine, theirs } = self;
        mine.resize(len);
        theirs.resize(len);
        for round in sequences.chunks(comm.size()) {
            if let Some(&own) = round.get(comm.rank()) {
                work(states, own, mine);
            }
            for (rank, &sequence) in round.iter().enumerate() {
                let values = if rank == comm.rank() { &mut *mine } else { &mut *theirs };
                broadcast(&**comm, of, rank, values)?;
                see(states, sequence, values);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::comm::threads::members;

    use super::*;

    #[test]
    fn everyone_sees_all_results_in_order_and_each_is_made_once() {
        for size in [1, 2, 3, 5] {
            let sequences = [4, 1, 6, 2];
            let run = |comm: Arc<dyn Communicator>| {
                let (mut made, mut seen, mut states) = (0, Vec::new(), vec![0.0; 7]);
                let mut work = |_: &[f32], sequence: usize, values: &mut [f32]| {
                    made += 1;
                    values.copy_from_slice(&[sequence as f32, 0.5]);
                };
                let mut see = |states: &mut [f32], sequence: usize, values: &[f32]| {
                    states[sequence] = values[0];
                    seen.push((sequence, values.to_vec()));
                };
                let mut rounds = Rounds::new(&comm);
                rounds.each((&sequences, 2), What::of("values"), &mut states, &mut work, &mut see).unwrap();
                assert_eq!(seen, sequences.map(|sequence| (sequence, vec![sequence as f32, 0.5])));
                assert_eq!(states, [0.0, 1.0, 2.0, 0.0, 4.0, 0.0, 6.0]);
                made
            };
            let members = members(size, std::time::Duration::from_secs(60));
            let made: usize = std::thread::scope(|scope| {
                let threads: Vec<_> =
                    members.into_iter().map(|member| scope.spawn(|| run(Arc::new(member)))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            assert_eq!(made, sequences.len(), "{size}");
        }
    }
}
