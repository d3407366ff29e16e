//! Cuts elementwise and row-wise ops for threads, by shape alone.

use rayon::iter::plumbing::{Producer, ProducerCallback};
use rayon::prelude::*;

/// Values of one block. Under Miri a small problem has several blocks, so that threads share it.
pub(crate) const BLOCK: usize = if cfg!(miri) { 1 << 6 } else { 1 << 14 };

/// Returns the rows of a block for rows of `width` values.
pub(crate) fn block_rows(width: usize) -> usize {
    (BLOCK / width.max(1)).max(1)
}

/// Runs `work` on every item, in parallel unless there is one item at most.
pub(crate) fn each<I: IndexedParallelIterator>(items: I, work: impl Fn(I::Item) + Send + Sync) {
    each_when(items.len() > 1, items, work);
}

/// Runs `work` on every item, on the calling thread unless `parallel`: waking workers costs more than a small op.
pub(crate) fn each_when<I>(parallel: bool, items: I, work: impl Fn(I::Item) + Send + Sync)
where
    I: IndexedParallelIterator,
{
    if parallel {
        items.for_each(work);
    } else {
        items.with_producer(Serial(work));
    }
}

/// Runs the closure on the calling thread.
struct Serial<F>(F);

impl<T, F: Fn(T)> ProducerCallback<T> for Serial<F> {
    type Output = ();
    fn callback<P: Producer<Item = T>>(self, producer: P) {
        producer.into_iter().for_each(self.0);
    }
}
