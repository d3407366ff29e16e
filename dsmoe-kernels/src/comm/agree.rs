//! Messages of unequal lengths, and outcomes that all processes share.

use super::communicator::Communicator;
use super::error::{CommError, Result};
use super::what::What;

/// The most bytes that all messages of one [`gather`] may have.
const MOST: usize = 1 << 30;

/// Returns the `message` of every process, in order of ranks. Messages may have different lengths.
///
/// # Errors
/// Communication fails, or the messages have more than a GiB in all.
pub fn gather(comm: &dyn Communicator, of: What, message: &[u8]) -> Result<Vec<Vec<u8>>> {
    let size = comm.size();
    let mut lens = vec![0; 8 * size];
    comm.all_gather(of, &(message.len() as u64).to_le_bytes(), &mut lens, &vec![8; size])?;
    let (lens, _) = lens.as_chunks::<8>();
    let lens: Vec<usize> = lens.iter().map(|len| u64::from_le_bytes(*len) as usize).collect();
    let bytes = lens.iter().fold(0usize, |sum, &len| sum.saturating_add(len));
    if bytes > MOST {
        return Err(CommError::TooLong { rank: comm.rank(), of, call: "all-gather", bytes, most: MOST });
    }
    let mut all = vec![0; bytes];
    comm.all_gather(of, message, &mut all, &lens)?;
    let mut rest = &all[..];
    Ok(lens.iter().map(|&len| rest.split_off(..len).expect("the lengths add up").to_vec()).collect())
}

/// Shares the outcome of work that can fail on some processes alone, such as the writing of a file. Returns the value if all
/// succeeded; otherwise every process returns the error of the first rank that failed.
///
/// # Errors
/// The work failed somewhere, or communication fails.
pub fn agree<T>(comm: &dyn Communicator, of: What, outcome: std::result::Result<T, String>) -> Result<T> {
    let mut message = vec![u8::from(outcome.is_err())];
    message.extend(outcome.as_ref().err().map_or(&b""[..], |problem| problem.as_bytes()));
    let all = gather(comm, of, &message)?;
    let failed = all.iter().position(|message| message.first() != Some(&0));
    match (failed, outcome) {
        (None, Ok(value)) => Ok(value),
        (failed, outcome) => {
            let other = failed.unwrap_or(comm.rank());
            let theirs = || String::from_utf8_lossy(all[other].get(1..).unwrap_or_default()).into_owned();
            let problem = match outcome {
                Err(problem) if other == comm.rank() => problem,
                _ => theirs(),
            };
            Err(CommError::Reported { other, problem })
        }
    }
}

/// Returns the largest power of two of processes that have neighbouring ranks on one machine, in groups from the first on: what
/// can be added up on machines before it leaves them.
///
/// # Errors
/// Communication fails.
pub fn neighbours(comm: &dyn Communicator) -> Result<usize> {
    let own = (comm.place().machine as u64).to_le_bytes();
    let machines = gather(comm, What::of("machines"), &own)?;
    let groups = (0..usize::BITS).map(|power| 1 << power).take_while(|group| *group <= machines.len());
    let on_one = |group: usize| {
        machines.len().is_multiple_of(group)
            && machines.chunks(group).all(|group| group.iter().all(|other| *other == group[0]))
    };
    Ok(groups.filter(|&group| on_one(group)).last().unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::{agree, gather, neighbours};
    use crate::comm::threads::on_threads;
    use crate::comm::{Communicator, Place, Result, What};

    const OF: What = What::of("outcomes");

    #[test]
    fn messages_of_unequal_lengths_reach_all() {
        for got in on_threads(4, |comm| gather(comm, OF, &vec![comm.rank() as u8; 3 * comm.rank()]).unwrap())
        {
            assert_eq!(got, [vec![], vec![1; 3], vec![2; 6], vec![3; 9]]);
        }
    }

    /// A member on a machine of its own number.
    #[derive(Debug)]
    struct On<'a>(&'a dyn Communicator, usize);

    impl Communicator for On<'_> {
        fn rank(&self) -> usize {
            self.0.rank()
        }
        fn size(&self) -> usize {
            self.0.size()
        }
        fn place(&self) -> Place {
            Place { machine: self.1, ..self.0.place() }
        }
        fn all_to_all(
            &self,
            of: What,
            send: &[u8],
            sent: &[usize],
            recv: &mut [u8],
            received: &[usize],
        ) -> Result<()> {
            self.0.all_to_all(of, send, sent, recv, received)
        }
        fn all_gather(&self, of: What, send: &[u8], recv: &mut [u8], lens: &[usize]) -> Result<()> {
            self.0.all_gather(of, send, recv, lens)
        }
        fn broadcast(&self, of: What, from: usize, bytes: &mut [u8]) -> Result<()> {
            self.0.broadcast(of, from, bytes)
        }
        fn barrier(&self, of: What) -> Result<()> {
            self.0.barrier(of)
        }
        fn abort(&self, status: i32) -> ! {
            self.0.abort(status)
        }
    }

    #[test]
    fn neighbours_are_whole_groups_of_one_machine() {
        for (machines, want) in [
            (&[0][..], 1),
            (&[0, 0, 0, 0], 4),
            (&[0, 0, 1, 1], 2),
            (&[0, 1, 0, 1], 1),
            (&[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1], 2),
            (&[0, 0, 0], 1),
        ] {
            let found =
                on_threads(machines.len(), |comm| neighbours(&On(comm, machines[comm.rank()])).unwrap());
            assert!(found.iter().all(|found| *found == want), "{machines:?}: {found:?}");
        }
    }

    #[test]
    fn outcomes_are_the_same_everywhere() {
        let all_well = on_threads(3, |comm| agree(comm, OF, Ok(comm.rank())).unwrap());
        assert_eq!(all_well, [0, 1, 2]);
        let failed = on_threads(4, |comm| {
            let mine = if comm.rank() < 2 { Ok(()) } else { Err(format!("no space at {}", comm.rank())) };
            agree(comm, OF, mine).unwrap_err().to_string()
        });
        assert_eq!(failed, ["rank 2: no space at 2"; 4]);
    }
}
