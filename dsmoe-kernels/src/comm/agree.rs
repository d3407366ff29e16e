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

#[cfg(test)]
mod tests {
    use super::{agree, gather};
    use crate::comm::What;
    use crate::comm::threads::on_threads;

    const OF: What = What::of("outcomes");

    #[test]
    fn messages_of_unequal_lengths_reach_all() {
        for got in on_threads(4, |comm| gather(comm, OF, &vec![comm.rank() as u8; 3 * comm.rank()]).unwrap())
        {
            assert_eq!(got, [vec![], vec![1; 3], vec![2; 6], vec![3; 9]]);
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
