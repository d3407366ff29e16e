//! The rows of a measurement: one per implementation and shape.

use dsmoe_core::Device;
use dsmoe_kernels::Precision;
use serde::Serialize;

use super::ceilings::{Ceilings, Cost};
use crate::format::{self, Table};

/// One measurement. Fields that do not apply are null.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Row {
    /// The work that is measured.
    pub(crate) work: &'static str,
    /// The implementation, or the part of the work.
    #[serde(rename = "impl")]
    pub(crate) implementation: &'static str,
    /// The estimator of the routers' gradient, if one is timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) router_gradient: Option<String>,
    pub(crate) tokens: usize,
    pub(crate) hidden: usize,
    pub(crate) intermediate: Option<usize>,
    pub(crate) experts: Option<usize>,
    /// Share of active pairs asked for; 1 for a dense FFN.
    pub(crate) active: Option<f64>,
    pub(crate) dtype: &'static str,
    /// The GPU, if one computed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) device: Option<String>,
    pub(crate) seconds: f64,
    /// Seconds of the dense FFN or model on the same work.
    pub(crate) dense_seconds: Option<f64>,
    /// The least time by the machine's limits over the time taken.
    pub(crate) peak_share: Option<f64>,
    /// `seconds / dense_seconds`.
    pub(crate) ratio_to_dense: Option<f64>,
    /// The share of the dense one's work that is left: of the bytes that one token reads, or of the arithmetic of several.
    pub(crate) work_share: Option<f64>,
    /// `ratio_to_dense / work_share`: 1 where all of the saved work is saved time.
    pub(crate) ratio_to_work: Option<f64>,
    /// Share of pairs that were active; in a model with thresholds, of the weights of its linears that were used.
    pub(crate) active_measured: Option<f64>,
    /// The active share above which the dense one is faster; 1 if it never is.
    pub(crate) break_even: Option<f64>,
    pub(crate) routing: Option<&'static str>,
    pub(crate) gflops: Option<f64>,
    pub(crate) gb_per_s: Option<f64>,
    pub(crate) tokens_per_s: Option<f64>,
    /// The limits behind `peak_share`: the rate of arithmetic in the precision, and of reading as many bytes.
    pub(crate) peak_gflops: Option<f64>,
    pub(crate) peak_gb_per_s: Option<f64>,
    /// The peak of the memory that the work took.
    pub(crate) peak_memory_bytes: Option<u64>,
    pub(crate) layers: Option<usize>,
    pub(crate) heads: Option<usize>,
    pub(crate) kv_heads: Option<usize>,
    pub(crate) vocab: Option<usize>,
    pub(crate) seq: Option<usize>,
    pub(crate) batch: Option<usize>,
    /// Hash of the bits of the results, equal for every number of threads.
    pub(crate) bits: Option<String>,
    pub(crate) threads: usize,
    pub(crate) isa: &'static str,
    pub(crate) cpu: Option<String>,
}

impl Row {
    /// Makes a row about `tokens` rows of `hidden` values.
    pub(crate) fn new(
        work: &'static str,
        implementation: &'static str,
        tokens: usize,
        hidden: usize,
        precision: Precision,
    ) -> Row {
        Row { work, implementation, tokens, hidden, dtype: precision.name(), ..Row::default() }
    }

    /// Adds the time and the numbers derived from it.
    pub(crate) fn measured(
        &mut self,
        seconds: f64,
        cost: Cost,
        precision: Precision,
        ceilings: &mut Ceilings,
    ) {
        self.seconds = seconds;
        self.threads = ceilings.threads;
        self.isa = ceilings.isa;
        self.cpu.clone_from(&ceilings.cpu);
        let Some(bound) = ceilings.bound(cost, precision) else { return };
        self.peak_share = Some(bound / seconds);
        if cost.flops > 0.0 {
            self.gflops = Some(cost.flops / seconds / 1e9);
            self.peak_gflops = Some(ceilings.flops(precision) / 1e9);
        }
        if cost.bytes > 0.0 {
            self.gb_per_s = Some(cost.bytes / seconds / 1e9);
            self.peak_gb_per_s = Some(ceilings.bandwidth(cost.bytes) / 1e9);
        }
    }

    /// Does as [`Row::measured`] on any device; the limits of a GPU are unknown.
    pub(crate) fn measured_on(
        &mut self,
        device: Device,
        seconds: f64,
        cost: Cost,
        precision: Precision,
        ceilings: &mut Ceilings,
    ) {
        if !device.is_gpu() {
            return self.measured(seconds, cost, precision, ceilings);
        }
        self.seconds = seconds;
        self.device = Some(device.to_string());
        self.gflops = Some(cost.flops / seconds / 1e9);
        self.gb_per_s = Some(cost.bytes / seconds / 1e9);
    }

    /// Compares with the dense one on the same work, of which a share is left.
    pub(crate) fn against_dense(&mut self, dense_seconds: f64, work_share: f64) {
        let ratio = self.seconds / dense_seconds;
        self.dense_seconds = Some(dense_seconds);
        self.ratio_to_dense = Some(ratio);
        self.work_share = Some(work_share);
        self.ratio_to_work = (work_share > 0.0).then_some(ratio / work_share);
    }
}

/// Adds the break-even to every row with experts, from the rows that differ in the active share alone.
pub(crate) fn find_break_evens(rows: &mut [Row]) {
    let found: Vec<Option<f64>> = rows
        .iter()
        .map(|row| {
            let dense = row.dense_seconds?;
            let same =
                |other: &&Row| other.experts == row.experts && other.implementation == row.implementation;
            let points = rows.iter().filter(same).filter_map(|row| Some((row.active_measured?, row.seconds)));
            break_even(points.collect(), dense)
        })
        .collect();
    for (row, found) in rows.iter_mut().zip(found) {
        row.break_even = found;
    }
}

/// Returns the share, at most 1, at which the line through (share, seconds) passes `dense` seconds, between the points
/// or along the nearest two. None with fewer than two shares.
fn break_even(mut points: Vec<(f64, f64)>, dense: f64) -> Option<f64> {
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points.dedup_by_key(|point| point.0);
    let after = points.iter().position(|point| point.1 > dense).unwrap_or(points.len());
    let second = after.clamp(1, points.len().max(2) - 1);
    let (&(low, fast), &(high, slow)) = (points.get(second - 1)?, points.get(second)?);
    if slow <= fast {
        // More work in less time: noise, and no line to follow.
        return (after == points.len()).then_some(1.0);
    }
    Some((low + (dense - fast) / (slow - fast) * (high - low)).clamp(0.0, 1.0))
}

/// Returns the FNV-1a hash of the bits of all values.
pub(crate) fn bits(parts: &[&[f32]]) -> Option<String> {
    let hash = parts.iter().flat_map(|part| part.iter()).fold(0xcbf2_9ce4_8422_2325, |hash: u64, x| {
        (hash ^ u64::from(x.to_bits())).wrapping_mul(0x0000_0100_0000_01b3)
    });
    Some(format!("{hash:016x}"))
}

/// Formats all rows as a table.
pub(crate) fn show(rows: &[Row]) -> String {
    let mut table = Table::new([
        "work", "tokens", "hidden", "width", "experts", "active", "dtype", "time", "of dense", "of work",
        "of peak", "GFLOP/s", "GB/s", "tokens/s", "memory",
    ]);
    let number = |n: Option<usize>| format::or_dash(n, |n| n.to_string());
    for row in rows {
        table.row([
            match &row.router_gradient {
                None => format!("{} {}", row.work, row.implementation),
                Some(rule) => format!("{} {} {rule}", row.work, row.implementation),
            },
            row.tokens.to_string(),
            row.hidden.to_string(),
            number(row.intermediate),
            number(row.experts),
            format::or_dash(row.active_measured, format::percent),
            row.dtype.to_owned(),
            time(row.seconds),
            format::or_dash(row.ratio_to_dense, |ratio| format!("{ratio:.3}")),
            format::or_dash(row.ratio_to_work, |ratio| format!("{ratio:.3}")),
            format::or_dash(row.peak_share, format::percent),
            format::or_dash(row.gflops, |rate| format!("{rate:.1}")),
            format::or_dash(row.gb_per_s, |rate| format!("{rate:.1}")),
            format::or_dash(row.tokens_per_s, |rate| format!("{rate:.0}")),
            format::or_dash(row.peak_memory_bytes, format::bytes),
        ]);
    }
    let mut out = table.show();
    let mut last = String::new();
    for row in rows.iter().filter(|row| row.routing.is_some()) {
        let Row { work, tokens, hidden, dtype, .. } = row;
        let (width, experts) = (row.intermediate.unwrap_or(0), row.experts.unwrap_or(1));
        let shape = format!("{work} of {tokens} tokens, {hidden} to {width}, {experts} experts, {dtype}");
        if last != shape {
            let verdict = match row.break_even {
                // One share, or times that do not grow with it.
                None => "no break-even in these times".to_owned(),
                Some(1.0) => "never slower than dense".to_owned(),
                Some(share) => format!("dense wins above {} active", format::percent(share)),
            };
            out += &format!("{shape}: {verdict}\n");
            last = shape;
        }
    }
    out
}

/// Formats a time as `12.3 us`, `4.56 ms` or `1.234 s`.
pub(crate) fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-6 => format!("{:.1} ns", 1e9 * s),
        s if s < 1e-3 => format!("{:.1} us", 1e6 * s),
        s if s < 1.0 => format!("{:.2} ms", 1e3 * s),
        s => format!("{s:.3} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_break_even_is_where_the_lines_cross() {
        let line = |shares: &[f64]| shares.iter().map(|&s| (s, 1.0 + 10.0 * s)).collect::<Vec<_>>();
        let close = |got: Option<f64>, want: f64| (got.unwrap() - want).abs() < 1e-12;
        assert!(close(break_even(line(&[0.125, 0.5, 1.0]), 9.0), 0.8), "between two points");
        assert!(close(break_even(line(&[0.5, 0.125]), 9.0), 0.8), "past the last");
        assert!(close(break_even(line(&[0.5, 0.75]), 2.0), 0.1), "before the first");
        assert_eq!(break_even(line(&[0.125, 1.0]), 11.5), Some(1.0));
        assert_eq!(break_even(line(&[0.125]), 9.0), None);
        assert_eq!(break_even(Vec::new(), 9.0), None);
        assert_eq!(break_even(vec![(0.1, 2.0), (0.2, 1.0)], 3.0), Some(1.0));
    }

    #[test]
    fn break_evens_belong_to_their_experts() {
        let row = |experts, active: f64, seconds: f64| Row {
            experts: Some(experts),
            active_measured: Some(active),
            seconds,
            dense_seconds: Some(1.0),
            implementation: if experts == 1 { "dense" } else { "dsmoe" },
            ..Row::default()
        };
        let mut rows =
            [row(1, 1.0, 1.0), row(8, 0.5, 0.6), row(8, 1.0, 1.2), row(16, 0.5, 0.5), row(16, 1.0, 1.5)];
        find_break_evens(&mut rows);
        let found: Vec<Option<f64>> =
            rows.iter().map(|row| row.break_even.map(|share| (1000.0 * share).round() / 1000.0)).collect();
        assert_eq!(found, [None, Some(0.833), Some(0.833), Some(0.75), Some(0.75)]);
    }

    #[test]
    fn hashes_tell_bits_and_order() {
        let [a, b, c] = [[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]].map(|x: [f32; 2]| bits(&[&x]));
        assert!(a == c && a != b);
        assert_ne!(bits(&[&[0.0]]), bits(&[&[-0.0]]));
        assert_eq!(bits(&[&[1.0], &[2.0]]), a);
    }

    #[test]
    fn times_read_well() {
        assert_eq!([2e-8, 1.5e-5, 0.0123, 2.5].map(time), ["20.0 ns", "15.0 us", "12.30 ms", "2.500 s"]);
    }
}
