//! The report that processes exchange at the end of a step, in one all-gather.

use dsmoe_kernels::comm::{Communicator, What};

use crate::error::Result;

/// Bytes of a number.
const WORD: usize = 8;
/// Longest name of a place, in bytes.
const NAME: usize = 120;
/// Bytes before the records: the flag to stop, the length of the name, and the name.
const HEAD: usize = 2 * WORD + NAME;

/// The losses of a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Record {
    /// Sum of the token losses.
    pub(super) loss: f64,
    /// Sum of the divergences from the teacher.
    pub(super) divergence: f64,
    /// Mean of active gates.
    pub(super) sparsity_loss: f64,
    /// Mean of all gates.
    pub(super) mean_gate: f64,
    /// Squared distance of the mean gate from the share.
    pub(super) share_loss: f64,
    /// Sum over layers of the balance losses, scaled.
    pub(super) balance_loss: f64,
    /// Mean of the separability loss.
    pub(super) separability: f64,
    /// Mean of the entropy of gates.
    pub(super) gate_entropy: f64,
    /// Tokens predicted; 0 for a micro-batch that was not run.
    pub(super) predicted: u64,
}

impl Record {
    const WORDS: usize = 9;

    fn words(&self) -> [u64; Record::WORDS] {
        let &Record { loss, divergence, sparsity_loss, mean_gate, share_loss, balance_loss, .. } = self;
        let &Record { separability, gate_entropy, predicted, .. } = self;
        let gates = [sparsity_loss, mean_gate, share_loss, balance_loss, separability, gate_entropy];
        let [c, d, e, f, g, h] = gates.map(f64::to_bits);
        [loss.to_bits(), divergence.to_bits(), c, d, e, f, g, h, predicted]
    }

    fn from_words(words: &[u64]) -> Record {
        let value = |at: usize| f64::from_bits(words[at]);
        Record {
            loss: value(0),
            divergence: value(1),
            sparsity_loss: value(2),
            mean_gate: value(3),
            share_loss: value(4),
            balance_loss: value(5),
            separability: value(6),
            gate_entropy: value(7),
            predicted: words[8],
        }
    }
}

/// The results of a step in one process.
#[derive(Debug)]
pub(super) struct Own<'a> {
    /// Asks all to stop after this step.
    pub(super) stop: bool,
    /// The place where the last of its micro-batches is not finite.
    pub(super) non_finite: Option<&'a str>,
    /// Its micro-batches, in order.
    pub(super) records: &'a [Record],
    /// So many of them follow each other before those of the next process do; the same in all.
    pub(super) in_turn: usize,
    /// Routing counts, of as many numbers in every process.
    pub(super) counts: &'a [u64],
    /// Squares of its pieces of the gradient.
    pub(super) squares: &'a [f64],
}

/// The results of a step over all processes.
#[derive(Debug, Default)]
pub(super) struct All {
    /// True if any process asks to stop.
    pub(super) stop: bool,
    /// The first place that is not finite, in the order of micro-batches.
    pub(super) non_finite: Option<String>,
    /// All micro-batches, up to the first that is not finite.
    pub(super) records: Vec<Record>,
    /// The sums of routing counts.
    pub(super) counts: Vec<u64>,
    /// The squares of all pieces, process by process.
    pub(super) squares: Vec<f64>,
}

/// The memory of the exchange.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    sent: Vec<u8>,
    received: Vec<u8>,
    lens: Vec<usize>,
    all: All,
}

impl Exchange {
    /// Tells everyone what this process knows, and returns what all know. Every process has as many micro-batches and counts;
    /// `pieces` are the numbers of their squares.
    pub(super) fn share(
        &mut self,
        comm: &dyn Communicator,
        of: What,
        own: &Own<'_>,
        pieces: &[usize],
    ) -> Result<&All> {
        let Exchange { sent, received, lens, all } = self;
        let own_words = Record::WORDS * own.records.len() + own.counts.len();
        lens.clear();
        lens.extend(pieces.iter().map(|squares| HEAD + WORD * (own_words + squares)));
        let name = own.non_finite.map_or(&[][..], str::as_bytes);
        let name = &name[..name.len().min(NAME)];
        sent.clear();
        for word in [u64::from(own.stop), name.len() as u64] {
            sent.extend(word.to_le_bytes());
        }
        sent.extend(name);
        sent.resize(HEAD, 0);
        let records = own.records.iter().flat_map(Record::words);
        let squares = own.squares.iter().map(|square| square.to_bits());
        records
            .chain(own.counts.iter().copied())
            .chain(squares)
            .for_each(|word| sent.extend(word.to_le_bytes()));
        received.resize(lens.iter().sum(), 0);
        comm.all_gather(of, sent, received, lens)?;
        all.read((received, lens), (own.records.len(), own.counts.len()), own.in_turn);
        Ok(all)
    }
}

impl All {
    /// Reads the messages of all processes, of these lengths, each with so many records and counts. `in_turn` records of a
    /// process are followed by those of the next.
    fn read(
        &mut self,
        (mut received, lens): (&[u8], &[usize]),
        (records, counts): (usize, usize),
        in_turn: usize,
    ) {
        *self = All {
            records: std::mem::take(&mut self.records),
            counts: std::mem::take(&mut self.counts),
            squares: std::mem::take(&mut self.squares),
            ..All::default()
        };
        self.records.clear();
        self.squares.clear();
        self.counts.clear();
        self.counts.resize(counts, 0);
        let mut of_processes = Vec::with_capacity(lens.len());
        for &len in lens {
            let (message, rest) = received.split_at(len);
            received = rest;
            let (head, body) = message.split_at(HEAD);
            let words: Vec<u64> = words_of(body);
            let [stop, name_len] = [0, 1].map(|at| words_of(&head[..2 * WORD])[at]);
            self.stop |= stop != 0;
            let (of_records, rest) = words.split_at(Record::WORDS * records);
            let (of_counts, squares) = rest.split_at(counts);
            let of_records = of_records.chunks_exact(Record::WORDS).map(Record::from_words);
            let of_records: Vec<Record> = of_records.filter(|record| record.predicted > 0).collect();
            let name = &head[2 * WORD..][..(name_len as usize).min(NAME)];
            of_processes.push((of_records, String::from_utf8_lossy(name).into_owned()));
            self.counts.iter_mut().zip(of_counts).for_each(|(sum, count)| *sum += count);
            self.squares.extend(squares.iter().map(|&square| f64::from_bits(square)));
        }
        for first in (0..records).step_by(in_turn.max(1)) {
            for (of_process, non_finite) in &of_processes {
                let end = of_process.len().min(first + in_turn);
                self.records.extend(of_process.get(first..end).unwrap_or_default());
                // The last record of such a process is the one that is not finite.
                if !non_finite.is_empty() && of_process.len() <= first + in_turn {
                    self.non_finite = Some(non_finite.clone());
                    return;
                }
            }
        }
    }
}

fn words_of(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::comm::threads::on_threads;

    use super::*;

    fn record(number: usize) -> Record {
        let loss = number as f64 + 0.1;
        Record {
            loss,
            divergence: -loss,
            sparsity_loss: 2.0 * loss,
            mean_gate: 3.0 * loss,
            share_loss: 4.0 * loss,
            balance_loss: 5.0 * loss,
            separability: 6.0 * loss,
            gate_entropy: 7.0 * loss,
            predicted: 32,
        }
    }

    #[test]
    fn everyone_knows_what_all_know_in_order() {
        let known = on_threads(3, |comm| {
            let rank = comm.rank();
            let records = [record(2 * rank), record(2 * rank + 1)];
            let squares = vec![rank as f64; rank];
            let own = Own {
                stop: rank == 2,
                non_finite: None,
                records: &records,
                in_turn: 2,
                counts: &[1, 10 * rank as u64],
                squares: &squares,
            };
            let mut exchange = Exchange::default();
            exchange.share(comm, What::at(1, "results"), &own, &[0, 1, 2]).unwrap();
            exchange.share(comm, What::at(1, "results"), &own, &[0, 1, 2]).unwrap();
            exchange.all
        });
        for all in known {
            assert_eq!(all.records, (0..6).map(record).collect::<Vec<_>>());
            assert_eq!(
                (all.stop, &all.counts[..], &all.squares[..]),
                (true, &[3, 30][..], &[1.0, 2.0, 2.0][..])
            );
            assert_eq!(all.non_finite, None);
        }
    }

    #[test]
    fn nothing_counts_after_the_first_place_that_is_not_finite() {
        let known = on_threads(3, |comm| {
            let rank = comm.rank();
            let mut records = [record(2 * rank), record(2 * rank + 1)];
            if rank == 1 {
                records[1] = Record::default();
            }
            let name = format!("layer {rank}");
            let non_finite = Some(&name[..]).filter(|_| rank > 0);
            let records = &records;
            let own = Own { stop: false, non_finite, records, in_turn: 2, counts: &[], squares: &[] };
            let mut exchange = Exchange::default();
            exchange.share(comm, What::at(1, "results"), &own, &[0; 3]).unwrap();
            exchange.all
        });
        for all in known {
            assert_eq!(all.records, [record(0), record(1), record(2)]);
            assert_eq!((all.stop, all.non_finite.as_deref()), (false, Some("layer 1")));
        }
    }

    /// Processes whose lanes take turns: the order is that of the lanes, and nothing counts after the first that is not finite.
    #[test]
    fn records_of_lanes_that_take_turns_are_in_the_order_of_lanes() {
        for wrong in [None, Some(4)] {
            let known = on_threads(2, |comm| {
                let rank = comm.rank();
                // Two lanes of two micro-batches each: 0 to 3 and 4 to 7 in the first and in the second turn.
                let numbers = [2 * rank, 2 * rank + 1, 4 + 2 * rank, 5 + 2 * rank];
                let done = |number: &usize| wrong.is_none_or(|wrong| *number <= wrong || *number == 6);
                let records = numbers.map(|n| if done(&n) { record(n) } else { Record::default() });
                let non_finite = wrong.filter(|_| rank == 0).map(|_| "layer 3");
                let records = &records;
                let own = Own { stop: false, non_finite, records, in_turn: 2, counts: &[], squares: &[] };
                let mut exchange = Exchange::default();
                exchange.share(comm, What::at(1, "results"), &own, &[0; 2]).unwrap();
                exchange.all
            });
            for all in known {
                let count = wrong.map_or(8, |wrong| wrong + 1);
                assert_eq!(all.records, (0..count).map(record).collect::<Vec<_>>());
                assert_eq!(all.non_finite.as_deref(), wrong.map(|_| "layer 3"));
            }
        }
    }
}
