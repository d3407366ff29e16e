//! The paper's problem: users who compute a task themselves or on a server whose processor they share.
//!
//! ```text
//! c = 3000 s                         cycles of a task of s bits
//! r_i = B log2(1 + P h_i^2 / (N_0 + sum_j P h_j^2))
//! local:      alpha c / f + (1 - alpha) kappa f^2 c
//! offloaded:  (alpha + (1 - alpha) P) s / r + u / a,    u = (alpha + (1 - alpha) P_I) c / F
//! ```
//! Shares `a` of the server add up to 1 at most. For a set of offloaded users the best ones are `sqrt(u_i) / sum sqrt(u_j)`, and they
//! cost `(sum sqrt(u_i))^2`, so that the optimum is the best of 2^N sets. Constants are those of the authors' code.

use dsmoe_kernels::rng::Rng;

use super::network::{Ensemble, Fit};

/// Cycles of a bit.
const CYCLES: f64 = 3000.0;
/// Bandwidth, Hz.
const BANDWIDTH: f64 = 1e6;
const KAPPA: f64 = 1e-28;
/// Powers of sending and of waiting, W.
const SENDING: f64 = 0.3;
const IDLE: f64 = 0.1;
const NOISE: f64 = 7.96159e-13;
/// Cycles a second of the server.
const SERVER: f64 = 2.5e9;
/// Shares below this one mean that the user computes by himself.
const LEAST_SHARE: f64 = 0.1;
/// Inputs of a user.
const FEATURES: usize = 6;
/// Most users: the optimum tries all sets of them.
pub const MOST_USERS: usize = 12;
const DRAW_STREAM: u64 = 0x6f66_666c;

/// A user and his task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct User {
    /// Bits to send.
    pub bits: f64,
    /// Cycles a second of his own processor.
    pub speed: f64,
    /// Gain of his channel.
    pub gain: f64,
    /// Weight of time against energy.
    pub alpha: f64,
}

/// The cost of every user's task, at home and on the server.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// The cost of computing on the user's device.
    pub local: Vec<f64>,
    /// The cost of sending the task.
    pub sending: Vec<f64>,
    /// The cost on the server if it serves this user alone.
    pub server: Vec<f64>,
}

/// Shares of the server by user, 0 at home, and what they cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The shares.
    pub shares: Vec<f64>,
    /// The cost.
    pub cost: f64,
}

impl Costs {
    /// Computes the costs of `users`, who send at the same time.
    pub fn of(users: &[User]) -> Costs {
        let power = |user: &User| SENDING * user.gain * user.gain;
        let all: f64 = users.iter().map(power).sum();
        let mut costs = Costs { local: Vec::new(), sending: Vec::new(), server: Vec::new() };
        for user in users {
            let (cycles, beta) = (CYCLES * user.bits, 1.0 - user.alpha);
            let rate = BANDWIDTH * (1.0 + power(user) / (NOISE + all)).log2();
            costs.local.push(user.alpha * cycles / user.speed + beta * KAPPA * user.speed.powi(2) * cycles);
            costs.sending.push((user.alpha + beta * SENDING) * user.bits / rate);
            costs.server.push((user.alpha + beta * IDLE) * cycles / SERVER);
        }
        costs
    }

    /// Returns the best shares of the users of a set: of those whose bit of `set` is 1.
    pub fn shared(&self, set: u32) -> Decision {
        let is_in = |i: usize| set >> i & 1 == 1;
        let users = self.local.len();
        let roots: f64 = (0..users).filter(|&i| is_in(i)).map(|i| self.server[i].sqrt()).sum();
        let share = |i: usize| if is_in(i) { self.server[i].sqrt() / roots } else { 0.0 };
        let alone = |i: usize| if is_in(i) { self.sending[i] } else { self.local[i] };
        let cost = (0..users).map(alone).sum::<f64>() + roots * roots;
        Decision { shares: (0..users).map(share).collect(), cost }
    }

    /// Returns the optimum: the best of all sets, the first one among equals.
    ///
    /// # Panics
    /// There are more than [`MOST_USERS`] users.
    pub fn optimum(&self) -> Decision {
        let users = self.local.len();
        assert!(users <= MOST_USERS, "offload: {users} users");
        let sets = 0..1u32 << users;
        let best = sets.map(|set| (set, self.shared(set).cost)).min_by(|a, b| a.1.total_cmp(&b.1));
        self.shared(best.map_or(0, |(set, _)| set))
    }

    /// Returns what given shares cost. Shares below 0.1 mean home; the others are rescaled to add up to 1.
    pub fn cost(&self, shares: &[f64]) -> f64 {
        let used = |share: f64| if share >= LEAST_SHARE { share } else { 0.0 };
        let all: f64 = shares.iter().copied().map(used).sum();
        let each = shares.iter().enumerate().map(|(i, &share)| match used(share) {
            0.0 => self.local[i],
            share => self.sending[i] + self.server[i] * all / share,
        });
        each.sum()
    }
}

/// Draws `count` sets of `users` users.
pub fn draw(users: usize, count: usize, seed: u64) -> Vec<Vec<User>> {
    let mut rng = Rng::new(seed, DRAW_STREAM);
    let truncated = |rng: &mut Rng, [mean, deviation, low, high]: [f64; 4]| loop {
        let value = mean + deviation * f64::from(rng.normal());
        if (low..=high).contains(&value) {
            return value;
        }
    };
    let mut user = || User {
        bits: truncated(&mut rng, [2.025e5, 1e5, 1e5, 4.05e5]),
        speed: truncated(&mut rng, [1e9, 5e8, 2e8, 1.6e9]),
        // Not 0: a channel has some gain.
        gain: f64::from(rng.uniform()).max(1e-6),
        alpha: f64::from(rng.uniform()),
    };
    (0..count).map(|_| (0..users).map(|_| user()).collect()).collect()
}

/// Returns the inputs of a network, `[samples, 6 users]`, not scaled.
fn features(samples: &[Vec<User>]) -> Vec<f64> {
    let of =
        |user: &User| [user.bits, CYCLES * user.bits, user.speed, user.gain, user.alpha, 1.0 - user.alpha];
    samples.iter().flatten().flat_map(of).collect()
}

/// Returns the loss of one sample's shares `p` against the optimum's `y`, and its gradient.
pub fn loss(p: &[f64], y: &[f64]) -> (f64, Vec<f64>) {
    let count = p.len().max(1) as f64;
    let surplus = p.iter().sum::<f64>() - y.iter().sum::<f64>();
    let (mut loss, mut grad) = (surplus * surplus, Vec::with_capacity(p.len()));
    for (&p, &y) in p.iter().zip(y) {
        let mut slope = 2.0 * (p - y) / count + 2.0 * surplus;
        loss += (p - y).powi(2) / count;
        if y < LEAST_SHARE && p > LEAST_SHARE {
            loss += 0.1 * (p - LEAST_SHARE);
            slope += 0.1;
        }
        grad.push(slope);
    }
    (loss, grad)
}

/// Ways to make one decision of the heads' answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The answer that costs least.
    Cost,
    /// The mean of all answers.
    Mean,
    /// Those who most heads send to the server, with the mean of their shares.
    Vote,
    /// The answer nearest to the optimum: it knows what it is to find, so that it is a bound and no method.
    Oracle,
}

/// Returns the shares that the heads' `answers` come to; `best` are those of the optimum, which the oracle alone reads.
pub fn choose(answers: &[Vec<f64>], costs: &Costs, best: &[f64], choice: Choice) -> Vec<f64> {
    let least = |of: &dyn Fn(&[f64]) -> f64| {
        let ranked = answers.iter().min_by(|a, b| of(a).total_cmp(&of(b)));
        ranked.cloned().unwrap_or_default()
    };
    let heads = answers.len().max(1) as f64;
    let mean = |i: usize| answers.iter().map(|answer| answer[i]).sum::<f64>() / heads;
    match choice {
        Choice::Cost => least(&|answer| costs.cost(answer)),
        Choice::Oracle => least(&|answer| squared_error(answer, best)),
        Choice::Mean => (0..best.len()).map(mean).collect(),
        Choice::Vote => {
            let vote = |i: usize| {
                let votes: Vec<f64> = answers.iter().map(|a| a[i]).filter(|&a| a >= LEAST_SHARE).collect();
                let wins = 2 * votes.len() > answers.len();
                if wins { votes.iter().sum::<f64>() / votes.len() as f64 } else { 0.0 }
            };
            (0..best.len()).map(vote).collect()
        }
    }
}

/// Returns the mean squared error of shares.
pub fn squared_error(shares: &[f64], best: &[f64]) -> f64 {
    let count = best.len().max(1) as f64;
    shares.iter().zip(best).map(|(p, y)| (p - y).powi(2)).sum::<f64>() / count
}

/// The results of a network with a number of heads on test samples whose distribution differs from the training samples'.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Imitation {
    /// Heads of the network.
    pub heads: usize,
    /// How its answers become one.
    pub choice: &'static str,
    /// Share of the users who are sent where the optimum sends them.
    pub accuracy: f64,
    /// Mean squared error of the shares.
    pub squared_error: f64,
    /// Mean cost over the optimum's.
    pub cost: f64,
}

/// The paper's experiment: networks of 1 to `heads` heads learn the half of `samples` whose inputs are smaller, and decide for the
/// others. `show` hears of every pass, and of all; returns nothing where it does not consent.
pub fn imitate(
    users: usize,
    samples: usize,
    heads: usize,
    fit: Fit,
    show: &mut dyn FnMut(usize, usize) -> bool,
) -> Option<Vec<Imitation>> {
    let drawn = draw(users, samples, fit.seed);
    let costs: Vec<Costs> = drawn.iter().map(|users| Costs::of(users)).collect();
    let best: Vec<Decision> = costs.iter().map(Costs::optimum).collect();
    let width = FEATURES * users;
    let x = scaled(&features(&drawn), width);
    let norm = |i: usize| x[i * width..][..width].iter().map(|x| x * x).sum::<f32>();
    let mut order: Vec<usize> = (0..samples).collect();
    order.sort_by(|&a, &b| norm(a).total_cmp(&norm(b)).then(a.cmp(&b)));
    let (learnt, asked) = order.split_at(samples / 2);
    let rows = |rows: &[usize]| -> Vec<f32> {
        rows.iter().flat_map(|&row| &x[row * width..][..width]).copied().collect()
    };
    let of_batch = |y: &[f32], batch: &[usize]| {
        let (mut sum, mut grad) = (0.0, Vec::with_capacity(y.len()));
        for (y, &row) in y.chunks(users).zip(batch) {
            let p: Vec<f64> = y.iter().map(|&y| sigmoid(y)).collect();
            let (loss, slopes) = loss(&p, &best[learnt[row]].shares);
            sum += loss / batch.len() as f64;
            let of_p = slopes.iter().zip(&p).map(|(slope, p)| slope * p * (1.0 - p) / batch.len() as f64);
            grad.extend(of_p.map(|slope| slope as f32));
        }
        (sum, grad)
    };
    let passes: Vec<usize> =
        (1..=heads).map(|heads| fit.epochs * if heads == 1 { 1 } else { heads + 1 }).collect();
    let (all, mut found) = (passes.iter().sum(), Vec::new());
    for count in 1..=heads {
        let before: usize = passes[..count - 1].iter().sum();
        let mut net = Ensemble::new(width, [60, 10 * users], users, count, fit.seed);
        net.fit(&rows(learnt), &of_batch, fit, &mut |done| show(before + done, all))?;
        let outputs = net.forward(&rows(asked));
        let choices = match count {
            1 => &[(Choice::Cost, "one")][..],
            _ => &[
                (Choice::Cost, "cost"),
                (Choice::Mean, "mean"),
                (Choice::Vote, "vote"),
                (Choice::Oracle, "oracle"),
            ],
        };
        for &(choice, name) in choices {
            let mut sums = [0.0; 3];
            for (i, &row) in asked.iter().enumerate() {
                let answer = |y: &Vec<f32>| y[i * users..][..users].iter().map(|&y| sigmoid(y)).collect();
                let answers: Vec<Vec<f64>> = outputs.iter().map(answer).collect();
                let (costs, best) = (&costs[row], &best[row]);
                let shares = choose(&answers, costs, &best.shares, choice);
                let right = shares.iter().zip(&best.shares);
                let right = right.filter(|(p, y)| (**p >= LEAST_SHARE) == (**y > 0.0)).count();
                sums[0] += right as f64 / users as f64;
                sums[1] += squared_error(&shares, &best.shares);
                sums[2] += costs.cost(&shares) / best.cost;
            }
            let [accuracy, squared_error, cost] = sums.map(|sum| sum / asked.len().max(1) as f64);
            found.push(Imitation { heads: count, choice: name, accuracy, squared_error, cost });
        }
    }
    Some(found)
}

/// Scales every column to 0 to 1.
fn scaled(values: &[f64], width: usize) -> Vec<f32> {
    let (mut low, mut high) = (vec![f64::INFINITY; width], vec![f64::NEG_INFINITY; width]);
    for row in values.chunks(width) {
        for ((low, high), &x) in low.iter_mut().zip(&mut high).zip(row) {
            (*low, *high) = (low.min(x), high.max(x));
        }
    }
    let scale = |(i, x): (usize, &f64)| {
        let span = high[i % width] - low[i % width];
        if span > 0.0 { ((x - low[i % width]) / span) as f32 } else { 0.0 }
    };
    values.iter().enumerate().map(scale).collect()
}

fn sigmoid(x: f32) -> f64 {
    1.0 / (1.0 + (-f64::from(x)).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_is_the_one_that_was_worked_by_hand() {
        let (value, grad) = loss(&[0.5, 0.3], &[0.6, 0.0]);
        assert!((value - 0.11).abs() < 1e-12, "{value}");
        for i in 0..2 {
            let mut p = [0.5, 0.3];
            p[i] += 1e-6;
            let slope = (loss(&p, &[0.6, 0.0]).0 - value) / 1e-6;
            assert!((slope - grad[i]).abs() < 1e-4, "{slope} and {}", grad[i]);
        }
    }

    #[test]
    fn shares_go_by_the_roots_of_what_the_server_costs() {
        let costs = Costs { local: vec![9.0; 3], sending: vec![0.0; 3], server: vec![4.0, 1.0, 9.0] };
        let decision = costs.shared(0b111);
        for (share, want) in decision.shares.iter().zip([1.0 / 3.0, 1.0 / 6.0, 0.5]) {
            assert!((share - want).abs() < 1e-12);
        }
        assert!((decision.cost - 36.0).abs() < 1e-12);
        assert!((costs.cost(&decision.shares) - 36.0).abs() < 1e-9);
        // At home each costs 9. The first two on the server cost (2 + 1)^2, the second alone 1, all of them 36.
        let best = costs.optimum();
        for (share, want) in best.shares.iter().zip([2.0 / 3.0, 1.0 / 3.0, 0.0]) {
            assert!((share - want).abs() < 1e-12);
        }
        assert!((best.cost - 18.0).abs() < 1e-12);
    }

    #[test]
    fn no_shares_of_a_grid_cost_less_than_the_optimum() {
        for users in draw(2, 60, 3) {
            let costs = Costs::of(&users);
            let best = costs.optimum();
            let mut least = f64::INFINITY;
            for i in 0..=200 {
                let a = f64::from(i) / 200.0;
                let of = |i: usize, share: f64| {
                    if share > 0.0 { costs.sending[i] + costs.server[i] / share } else { costs.local[i] }
                };
                least = least.min(of(0, a) + of(1, 1.0 - a)).min(of(0, a) + costs.local[1]);
                least = least.min(costs.local[0] + of(1, a));
            }
            assert!(best.cost <= least * (1.0 + 1e-12), "{} and {least}", best.cost);
            // The grid is fine enough to come near.
            assert!(least < 1.02 * best.cost, "{} and {least}", best.cost);
        }
    }

    #[test]
    fn choices_keep_their_order() {
        let costs: Vec<Costs> = draw(3, 50, 5).iter().map(|users| Costs::of(users)).collect();
        let mut rng = Rng::new(9, 0);
        for costs in &costs {
            let best = costs.optimum().shares;
            let answers: Vec<Vec<f64>> =
                (0..4).map(|_| (0..3).map(|_| f64::from(rng.uniform())).collect()).collect();
            let by = |choice| choose(&answers, costs, &best, choice);
            let cost = costs.cost(&by(Choice::Cost));
            assert!(answers.iter().all(|answer| cost <= costs.cost(answer)));
            let error = |choice| squared_error(&by(choice), &best);
            assert!(error(Choice::Oracle) <= error(Choice::Cost));
            let one = &answers[..1];
            // A head that is alone decides, but that a vote leaves out what means home.
            assert_eq!(choose(one, costs, &best, Choice::Cost), one[0]);
            assert_eq!(choose(one, costs, &best, Choice::Mean), one[0]);
            assert_eq!(costs.cost(&choose(one, costs, &best, Choice::Vote)), costs.cost(&one[0]));
        }
    }

    #[test]
    fn a_network_comes_near_the_optimum() {
        let fit = Fit { epochs: 20, ..Fit::default() };
        let found = imitate(2, 6000, 2, fit, &mut |_, _| true).unwrap();
        let [one, rest @ ..] = &found[..] else { panic!("nothing was found") };
        assert_eq!((one.choice, rest.len()), ("one", 4));
        assert!(one.accuracy > 0.8 && one.cost < 1.3, "{one:?}");
        assert!(found.iter().all(|found| found.cost >= 1.0 - 1e-12), "{found:?}");
        assert!(imitate(2, 200, 2, fit, &mut |_, _| false).is_none());
    }
}
