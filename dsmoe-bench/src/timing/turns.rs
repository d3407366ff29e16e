//! The timing of contestants that take turns.

use std::convert::Infallible;
use std::hint::black_box;
use std::time::Instant;

/// The least length of a sample of a short task.
const SAMPLE_SECONDS: f64 = 0.02;
const MOST_CALLS: f64 = 10_000.0;

/// Something to time.
pub(crate) type Task<'a> = Box<dyn FnMut() + 'a>;

/// Median seconds per call of every task. In each of `rounds` rounds every task has one sample, so that what else
/// the machine does falls on all of them.
pub(crate) fn take_turns(tasks: &mut [Task<'_>], rounds: usize) -> Vec<f64> {
    let calls: Vec<usize> = tasks
        .iter_mut()
        .map(|task| {
            // The first call sizes buffers and fills caches.
            let first = seconds(task, 1);
            let call = if first < SAMPLE_SECONDS { seconds(task, 1) } else { first };
            (SAMPLE_SECONDS / call).clamp(1.0, MOST_CALLS) as usize
        })
        .collect();
    let Ok(times) =
        medians(tasks.len(), rounds, |task| Ok::<_, Infallible>(seconds(&mut tasks[task], calls[task])));
    times
}

/// Samples that there is room for from the start.
pub(crate) const ROOM: usize = 1 << 12;

/// The median of the samples that `sample(i)` gives for each of `tasks` tasks, in turns.
///
/// # Errors
/// The first of a sample.
pub(crate) fn medians<E>(
    tasks: usize,
    rounds: usize,
    mut sample: impl FnMut(usize) -> Result<f64, E>,
) -> Result<Vec<f64>, E> {
    let mut samples = vec![Vec::with_capacity(rounds.min(ROOM)); tasks];
    for _ in 0..rounds {
        for (task, samples) in samples.iter_mut().enumerate() {
            samples.push(sample(task)?);
        }
    }
    Ok(samples.into_iter().map(median).collect())
}

/// Seconds per call.
fn seconds(task: &mut Task<'_>, calls: usize) -> f64 {
    let started = Instant::now();
    for _ in 0..calls {
        black_box(&mut *task)();
    }
    // A clock may stand still for a moment.
    started.elapsed().as_secs_f64().max(1e-9) / calls as f64
}

/// The middle of `samples`, or of the two in the middle the mean.
///
/// # Panics
/// There are none.
fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    let half = samples.len() / 2;
    if samples.len() % 2 == 1 { samples[half] } else { (samples[half - 1] + samples[half]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::time::Duration;

    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 9.0]), 3.0);
    }

    #[test]
    fn tasks_take_turns_and_keep_their_places() {
        let order = RefCell::new(Vec::new());
        let sleep = |id, millis| {
            let order = &order;
            Box::new(move || {
                order.borrow_mut().push(id);
                std::thread::sleep(Duration::from_millis(millis));
            }) as Task<'_>
        };
        let times = take_turns(&mut [sleep(0, 45), sleep(1, 25)], 3);
        assert_eq!(*order.borrow(), [0, 1, 0, 1, 0, 1, 0, 1]);
        assert!(times[0] >= 0.045 && times[1] >= 0.025, "{times:?}");
    }
}
