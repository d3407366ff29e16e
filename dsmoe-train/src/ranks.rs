//! The processes of a run: their lanes, what must be equal in all of them, and outcomes that they share.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use dsmoe_kernels::comm::{self, CommError, Communicator, What};

use crate::error::{Error, Result};

/// A file by which processes find out whether they see one directory.
pub(crate) const SEEN_FILE: &str = ".seen-by-all.tmp";

/// Parts of the state of a training that every process holds of its own share alone.
///
/// ```
/// use dsmoe_train::Zero;
///
/// assert_eq!(Zero::of(2), Some(Zero::Gradients));
/// assert_eq!(Zero::Parameters.on(1), Zero::Moments); // a single process owns everything
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Zero {
    /// The moments of the optimiser.
    #[default]
    Moments,
    /// Moments and gradients.
    Gradients,
    /// Moments, gradients and parameters.
    Parameters,
}

impl Zero {
    /// Returns the stage of that number, 1 to 3.
    pub fn of(number: u8) -> Option<Zero> {
        [Zero::Moments, Zero::Gradients, Zero::Parameters].into_iter().find(|stage| stage.number() == number)
    }

    /// Returns the number of the stage.
    pub fn number(self) -> u8 {
        self as u8 + 1
    }

    /// Returns the stage that makes a difference on so many processes: a single one owns everything.
    pub fn on(self, processes: usize) -> Zero {
        if processes > 1 { self } else { Zero::Moments }
    }
}

/// Checks that so many processes can share the lanes of a step in a stage.
pub(crate) fn check_lanes(lanes: usize, size: usize, zero: Zero) -> Result<()> {
    let fits = if zero.on(size) > Zero::Moments { fits_strided } else { fits };
    if fits(lanes, size) {
        return Ok(());
    }
    let allowed: Vec<String> =
        (1..=lanes).filter(|&size| fits(lanes, size)).map(|size| size.to_string()).collect();
    let last = allowed.len() - 1;
    let allowed = match &allowed[..last] {
        [] => allowed[last].clone(),
        most => format!("{} or {}", most.join(", "), allowed[last]),
    };
    let allowed = format!("{allowed} processes, or another number of {{lanes}}");
    Err(Error::field("lanes", format!("{lanes} on {size} processes"), allowed))
}

/// Returns the lanes of this process, in the order in which it computes them: neighbours, or with gradients that lie at their
/// owners every `size`-th, since lanes that are computed at the same time are then added up first.
pub(crate) fn own_lanes(lanes: usize, comm: &dyn Communicator, zero: Zero) -> Result<Vec<u64>> {
    check_lanes(lanes, comm.size(), zero)?;
    Ok(lanes_of_rank(lanes, (comm.rank(), comm.size()), zero))
}

/// Returns those of process `rank` of `size`, which fit.
pub(crate) fn lanes_of_rank(lanes: usize, (rank, size): (usize, usize), zero: Zero) -> Vec<u64> {
    let (rank, each) = (rank as u64, (lanes / size) as u64);
    match zero.on(size) > Zero::Moments {
        true => (0..each).map(|turn| turn * size as u64 + rank).collect(),
        false => (rank * each..(rank + 1) * each).collect(),
    }
}

/// Returns whether lanes that processes compute at the same time are whole nodes of the tree.
fn fits_strided(lanes: usize, size: usize) -> bool {
    lanes.is_multiple_of(size) && (size.is_power_of_two() || size == lanes)
}

/// Returns whether processes that each take as many neighbouring lanes have whole nodes of the tree.
fn fits(lanes: usize, size: usize) -> bool {
    size == 1 || lanes.is_multiple_of(size) && (lanes / size).is_power_of_two()
}

/// Shares an outcome that may differ between processes. If all succeeded everyone gets its own value; otherwise the first
/// process that failed gets its error, and the others an error with its message.
pub(crate) fn agree<T>(comm: &dyn Communicator, of: What, outcome: Result<T>) -> Result<T> {
    if comm.size() == 1 {
        return outcome;
    }
    let (told, own) = match outcome {
        Ok(value) => (Ok(value), None),
        Err(error) => (Err(error.to_string()), Some(error)),
    };
    match (comm::agree(comm, of, told), own) {
        (Err(CommError::Reported { other, .. }), Some(error)) if other == comm.rank() => Err(error),
        (outcome, _) => Ok(outcome?),
    }
}

/// Lets process 0 alone do `work`, and shares the outcome.
pub(crate) fn by_first<T>(
    comm: &dyn Communicator,
    of: What,
    work: impl FnOnce() -> Result<T>,
) -> Result<Option<T>> {
    agree(comm, of, if comm.rank() == 0 { work().map(Some) } else { Ok(None) })
}

/// Returns whether all processes go on; each says whether it does.
pub(crate) fn all_go_on(comm: &dyn Communicator, of: What, goes_on: bool) -> Result<bool> {
    if comm.size() == 1 {
        return Ok(goes_on);
    }
    let all = comm::gather(comm, of, &[u8::from(goes_on)])?;
    Ok(all.iter().all(|message| message.first() == Some(&1)))
}

/// Returns the message of process 0.
pub(crate) fn from_first(comm: &dyn Communicator, of: What, message: &str) -> Result<String> {
    let message = if comm.rank() == 0 { message } else { "" };
    let first = comm::gather(comm, of, message.as_bytes())?.swap_remove(0);
    Ok(String::from_utf8_lossy(&first).into_owned())
}

/// Checks that these values, by name, are equal in all processes.
///
/// # Errors
/// They are not; the error names the ranks that have each value.
pub fn check_alike(comm: &dyn Communicator, values: &BTreeMap<String, String>) -> Result<()> {
    let of = What::of("settings");
    let message = serde_json::to_vec(values).expect("strings are JSON");
    let all = comm::gather(comm, of, &message)?;
    let all: Vec<BTreeMap<String, String>> =
        all.iter().map(|message| serde_json::from_slice(message).unwrap_or_default()).collect();
    let differs = |name: &&String| all.iter().any(|values| values.get(*name) != all[0].get(*name));
    let differing = all.iter().flat_map(BTreeMap::keys).find(differs);
    let outcome = differing.map_or(Ok(()), |name| {
        Err(Error::RanksDiffer {
            name: name.clone(),
            table: table(all.iter().map(|values| values.get(name))),
        })
    });
    agree(comm, of, outcome)
}

/// Returns which ranks have which value: "a on ranks 0 and 2; b on rank 1".
fn table<'a>(values: impl Iterator<Item = Option<&'a String>>) -> String {
    let mut ranks: Vec<(&str, Vec<String>)> = Vec::new();
    for (rank, value) in values.enumerate() {
        let value = value.map_or("nothing", |value| value);
        match ranks.iter_mut().find(|(other, _)| *other == value) {
            Some((_, ranks)) => ranks.push(rank.to_string()),
            None => ranks.push((value, vec![rank.to_string()])),
        }
    }
    let row = |(value, ranks): &(&str, Vec<String>)| match &ranks[..] {
        [one] => format!("{value} on rank {one}"),
        [first @ .., last] => format!("{value} on ranks {} and {last}", first.join(", ")),
        [] => String::new(),
    };
    ranks.iter().map(row).collect::<Vec<_>>().join("; ")
}

/// Checks that all processes see the directory `dir` of process 0.
pub(crate) fn check_shared(comm: &dyn Communicator, dir: &Path) -> Result<()> {
    if comm.size() == 1 {
        return Ok(());
    }
    let of = What::of("the run directory");
    let path = dir.join(SEEN_FILE);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let mark = from_first(comm, of, &format!("{} {now}", std::process::id()))?;
    by_first(comm, of, || fs::write(&path, &mark).map_err(Error::io(&path)))?;
    let seen = match fs::read_to_string(&path) {
        Ok(text) if text == mark => Ok(()),
        _ => Err(Error::NotShared(dir.to_path_buf())),
    };
    let seen = agree(comm, of, seen);
    let removed = by_first(comm, of, || fs::remove_file(&path).map_err(Error::io(&path)));
    seen.and(removed.map(drop))
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::comm::Alone;
    use dsmoe_kernels::comm::threads::on_threads;

    use super::*;

    #[test]
    fn lanes_are_divided_into_nodes_of_the_tree() {
        let own = |lanes, size, zero| on_threads(size, |comm| own_lanes(lanes, comm, zero).unwrap());
        for zero in [Zero::Moments, Zero::Gradients, Zero::Parameters] {
            assert_eq!(own_lanes(12, &Alone, zero).unwrap(), (0..12).collect::<Vec<_>>());
            assert_eq!(Zero::of(zero.number()), Some(zero));
        }
        assert_eq!(own(12, 3, Zero::Moments), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]);
        assert_eq!(own(8, 2, Zero::Gradients), [[0, 2, 4, 6], [1, 3, 5, 7]]);
        assert_eq!(own(3, 3, Zero::Parameters), [[0], [1], [2]]);
        let refused = |lanes, size, zero| {
            on_threads(size, |comm| own_lanes(lanes, comm, zero).unwrap_err().to_string()).remove(0)
        };
        let wanted = "lanes is 12 on 4 processes; use 1, 3, 6 or 12 processes, or another number of lanes";
        assert_eq!(refused(12, 4, Zero::Moments), wanted);
        let wanted = "lanes is 12 on 3 processes; use 1, 2, 4 or 12 processes, or another number of lanes";
        assert_eq!(refused(12, 3, Zero::Gradients), wanted);
        assert!(refused(1, 2, Zero::Moments).starts_with("lanes is 1 on 2 processes; use 1 processes"));
    }

    #[test]
    fn the_first_error_is_everyones() {
        let of = What::of("work");
        let told = on_threads(3, |comm| {
            let own = if comm.rank() > 0 { Err(Error::field("seq", comm.rank(), "0")) } else { Ok(()) };
            agree(comm, of, own).unwrap_err().to_string()
        });
        assert_eq!(told, ["rank 1: seq is 1; use 0", "seq is 1; use 0", "rank 1: seq is 1; use 0"]);
        assert!(matches!(
            agree(&Alone, of, Err::<(), _>(Error::field("a", 1, "2"))),
            Err(Error::Field { .. })
        ));
        let values = on_threads(3, |comm| (from_first(comm, of, "text"), by_first(comm, of, || Ok(3))));
        let found: Vec<_> = values.into_iter().map(|(text, value)| (text.unwrap(), value.unwrap())).collect();
        let text = || "text".to_owned();
        assert_eq!(found, [(text(), Some(3)), (text(), None), (text(), None)]);
    }

    #[test]
    fn all_go_on_unless_one_does_not() {
        let of = What::of("work");
        for (stops, wanted) in [(None, true), (Some(0), false), (Some(2), false)] {
            let told = on_threads(3, |comm| {
                all_go_on(comm, of, stops.is_none_or(|rank| rank != comm.rank())).unwrap()
            });
            assert_eq!(told, [wanted; 3], "{stops:?}");
        }
        assert_eq!([true, false].map(|goes_on| all_go_on(&Alone, of, goes_on).unwrap()), [true, false]);
    }

    #[test]
    fn differences_are_told_with_their_ranks() {
        let told = on_threads(4, |comm| {
            let tier = if comm.rank() == 2 { "avx2" } else { "avx512" };
            let mut values = BTreeMap::from([("lr".to_owned(), "0.1".to_owned())]);
            check_alike(comm, &values).unwrap();
            values.insert("tier".to_owned(), tier.to_owned());
            check_alike(comm, &values).unwrap_err().to_string()
        });
        let part = "the processes differ in tier: avx512 on ranks 0, 1 and 3; avx2 on rank 2;";
        assert!(told.iter().all(|message| message.contains(part)), "{told:?}");
    }

    #[test]
    fn a_directory_that_some_do_not_see_is_refused() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        on_threads(2, |comm| check_shared(comm, dir.path()).unwrap());
        let told = on_threads(2, |comm| {
            let dir = if comm.rank() == 0 { dir.path() } else { other.path() };
            check_shared(comm, dir).unwrap_err().to_string()
        });
        assert!(told[0].starts_with("rank 1: ") && told[1].contains("is not the directory"), "{told:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
