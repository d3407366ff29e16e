//! The budgets of a DSMoE model whose layers get other experts.
//!
//! Thresholds stay, since those of a layer are of each gate by itself: a gate that is left opens for the tokens that it opened for.
//! The share of active experts that a budget stands for is of the experts that are left. Where it was not measured, gates that
//! go count as open as often as those that stay:
//!
//! ```text
//! f  = (a n - c) / (n - c)            the share of gates that are open: n experts, of which a are active, a core of c
//! a' = (c + f (n' - c)) / n'          n' experts, with the same core
//! ```
//! n, n' and c are means over layers. An expert that the gates of m experts share is open unless all of them are shut, as if these
//! opened independently: for a share of 1 - (1 - f)^m, and f is its mean over the experts that are left.

use crate::config::MoeConfig;

/// The experts that are left.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    /// Experts of every layer, the core included.
    pub(super) counts: &'a [usize],
    /// The number of old experts by whose gates each new one opens, for all that have gates.
    pub(super) merged: &'a [usize],
}

/// Replaces the shares of the budgets of `moe`, and the one in use, by those of a model of the experts that are left, `measured` or
/// not.
pub(super) fn of_other_experts(moe: &mut MoeConfig, left: Left<'_>, measured: Option<&[f64]>) {
    let Left { counts, merged } = left;
    let held: Vec<usize> = (0..counts.len()).map(|layer| moe.experts(layer)).collect();
    let Some(in_use) = moe.budget().filter(|_| counts != held) else { return };
    let [n, left] = [&held[..], counts].map(mean);
    let before: Vec<f64> = moe.parts.budgets.iter().map(|budget| budget.active).collect();
    let own = before.iter().position(|&active| active == in_use);
    let core = mean(&moe.parts.core);
    let even: Vec<f64> = before.iter().map(|&active| as_often(active, core, [n, left], merged)).collect();
    let measured = measured.map(|shares| (shares.to_vec(), distinct(shares, own)));
    // The gates of the budget in use are those of the source.
    let keeps_own = |kept: &[usize]| own.map_or(!kept.is_empty(), |own| kept.contains(&own));
    let (shares, kept) = match measured {
        Some((shares, kept)) if keeps_own(&kept) => (shares, kept),
        _ => {
            let kept = (0..even.len()).collect();
            (even, kept)
        }
    };
    let active = at(&before, &shares, in_use);
    let budgets = &mut moe.parts.budgets;
    budgets.iter_mut().zip(&shares).for_each(|(budget, &share)| budget.active = share);
    *budgets = kept.iter().map(|&i| budgets[i].clone()).collect();
    let (least, most) = (budgets[0].active, budgets[budgets.len() - 1].active);
    moe.active_target = Some(active.clamp(least, most));
}

fn mean(counts: &[usize]) -> f64 {
    counts.iter().sum::<usize>() as f64 / counts.len().max(1) as f64
}

/// Returns the share `active` after a change from n to n' experts, if gates that go are open as often as those that stay.
fn as_often(active: f64, core: f64, [n, left]: [f64; 2], merged: &[usize]) -> f64 {
    let open = (active * n - core) / (n - core);
    let of_expert = |&gates: &usize| match gates {
        1 => open,
        gates => 1.0 - (1.0 - open).powi(gates as i32),
    };
    let open = match merged.iter().all(|&gates| gates == 1) {
        true => open,
        false => merged.iter().map(of_expert).sum::<f64>() / merged.len() as f64,
    };
    ((core + open * (left - core)) / left).min(1.0)
}

/// Returns the places of the budgets that a file can hold: shares above 0, each above the one before. Of budgets with one share
/// the budget `own` stays, or the last one, whose thresholds are the lowest.
fn distinct(shares: &[f64], own: Option<usize>) -> Vec<usize> {
    let mut kept: Vec<usize> = Vec::new();
    for (i, &share) in shares.iter().enumerate().rev() {
        match kept.last().map(|&last| shares[last]) {
            _ if !(share > 0.0 && share <= 1.0) => {}
            Some(above) if share > above || (share == above && own != Some(i)) => {}
            Some(above) if share == above => {
                kept.pop();
                kept.push(i);
            }
            _ => kept.push(i),
        }
    }
    kept.reverse();
    kept
}

/// Returns what the share `active` becomes: shares between two stored ones lie between those that they become.
fn at(before: &[f64], shares: &[f64], active: f64) -> f64 {
    let above = before.iter().position(|&share| share >= active).unwrap_or(before.len() - 1);
    let low = above.saturating_sub(1);
    if before[above] == active || low == above {
        return shares[above];
    }
    let part = (active - before[low]) / (before[above] - before[low]);
    shares[low] + part * (shares[above] - shares[low])
}

#[cfg(test)]
mod tests {
    use dsmoe_router::RouterConfig;

    use super::*;
    use crate::config::{Budget, MoeParts};

    /// Eight experts with a core of two, at budgets of 4, 6 and 8 experts.
    fn moe(in_use: f64) -> MoeConfig {
        let budget = |(active, threshold)| Budget { active, thresholds: vec![threshold; 3] };
        let budgets = [(0.5, 1.0), (0.75, 0.0), (1.0, -9.0)].map(budget).to_vec();
        let parts = MoeParts { core: vec![2; 3], budgets, ..MoeParts::default() };
        MoeConfig { parts, active_target: Some(in_use), ..MoeConfig::new(RouterConfig::new(8)) }
    }

    /// So many experts of every layer, each by its own gate.
    fn left(counts: &[usize]) -> Left<'_> {
        Left { counts, merged: &[] }
    }

    fn shares(moe: &MoeConfig) -> Vec<f64> {
        moe.parts.budgets.iter().map(|budget| budget.active).collect()
    }

    #[test]
    fn gates_that_go_count_as_open_as_often_as_those_that_stay() {
        // Of six gates 2, 4 and 6 are open; of three that are 1, 2 and 3, beside the core of two.
        for (in_use, want) in [(0.5, 0.6), (0.625, 0.7), (1.0, 1.0)] {
            let mut moe = moe(in_use);
            of_other_experts(&mut moe, left(&[5; 3]), None);
            let found = shares(&moe);
            assert!(found.iter().zip([0.6, 0.8, 1.0]).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
            assert!((moe.active_target.unwrap() - want).abs() < 1e-12, "{moe:?}");
            // The thresholds of the budget in use stay.
            assert_eq!(moe.parts.budgets[0].thresholds, [1.0; 3]);
        }
        let mut same = moe(0.625);
        of_other_experts(&mut same, left(&[8; 3]), Some(&[0.1, 0.2, 0.3]));
        assert_eq!(same, moe(0.625));
        let mut coreless = moe(0.5);
        coreless.parts.core.clear();
        of_other_experts(&mut coreless, left(&[2; 3]), None);
        assert_eq!(shares(&coreless), [0.5, 0.75, 1.0]);
        // Of 18 gates beside a core of 6 a third is open; of 7 that are left in layers of 3, 4 and 6 experts, a third too.
        let mut uneven = moe(0.5);
        of_other_experts(&mut uneven, left(&[3, 4, 6]), None);
        let found = shares(&uneven);
        let want = [(6.0 + 7.0 / 3.0) / 13.0, (6.0 + 14.0 / 3.0) / 13.0, 1.0];
        assert!(found.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
        // Of four experts beside the core of two, two are shared by two gates each.
        let mut shared = moe(0.5);
        let merged = [2, 2, 1, 1].repeat(3);
        of_other_experts(&mut shared, Left { counts: &[6; 3], merged: &merged }, None);
        let pair = 1.0 - (2.0f64 / 3.0).powi(2);
        let of = |pair: f64, one: f64| (2.0 + 2.0 * pair + 2.0 * one) / 6.0;
        assert!((shares(&shared)[0] - of(pair, 1.0 / 3.0)).abs() < 1e-12, "{shared:?}");
        assert!((shares(&shared)[2] - 1.0).abs() < 1e-12, "{shared:?}");
        // Fewer in one layer alone are other experts, too.
        let mut one = moe(0.5);
        of_other_experts(&mut one, left(&[8, 8, 7]), None);
        assert!(shares(&one)[0] > 0.5, "{one:?}");
    }

    #[test]
    fn measured_shares_are_stored_where_a_file_can_hold_them() {
        for (in_use, measured, want, active) in [
            (0.5, [0.4, 0.7, 1.0], vec![(0.4, 1.0), (0.7, 0.0), (1.0, -9.0)], 0.4),
            (0.625, [0.4, 0.7, 1.0], vec![(0.4, 1.0), (0.7, 0.0), (1.0, -9.0)], 0.55),
            // Budgets that became one: the one in use stays, or the one that opens most.
            (0.5, [0.7, 0.7, 1.0], vec![(0.7, 1.0), (1.0, -9.0)], 0.7),
            (0.75, [0.4, 1.0, 1.0], vec![(0.4, 1.0), (1.0, 0.0)], 1.0),
            (1.0, [0.7, 0.7, 1.0], vec![(0.7, 0.0), (1.0, -9.0)], 1.0),
            (0.75, [0.0, 0.7, 1.0], vec![(0.7, 0.0), (1.0, -9.0)], 0.7),
            (0.75, [0.8, 0.7, 1.0], vec![(0.7, 0.0), (1.0, -9.0)], 0.7),
        ] {
            let mut moe = moe(in_use);
            of_other_experts(&mut moe, left(&[5; 3]), Some(&measured));
            let found: Vec<(f64, f32)> =
                moe.parts.budgets.iter().map(|budget| (budget.active, budget.thresholds[0])).collect();
            assert_eq!(found, want, "{measured:?}");
            assert!((moe.active_target.unwrap() - active).abs() < 1e-12, "{measured:?}: {moe:?}");
        }
        // Where the budget in use opens nothing, shares are not those that were measured.
        let mut nothing = moe(0.5);
        of_other_experts(&mut nothing, left(&[5; 3]), Some(&[0.0, 0.7, 1.0]));
        assert_eq!(nothing.parts.budgets.len(), 3);
    }
}
