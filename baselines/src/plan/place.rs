//! Requests with deadlines: each runs on the processor, or on a server that those who use it share, at one of the model's budgets.
//!
//! ```text
//! time at home      prompt / prefill(b) + wanted / decode(b)
//! on the server     start + t(b) / a,  shares a add up to 1 at most
//! cost              sum over requests of weight (time / deadline + mu q(b)) + 10 where the deadline is missed
//! ```
//! For given budgets of the requests on the server the best shares minimise `sum u_i / a_i`, `u_i = weight t / deadline`, above the
//! floors that the deadlines set: from `a ~ sqrt(u)`, those below their floor are set to it and the others share what is left, until none
//! is. The problem is convex and separable, so that this is exact. Floors that do not fit hold for none.

use serde::{Deserialize, Serialize};

/// The cost of a missed deadline.
const MISSED: f64 = 10.0;
/// Most combinations of options that are tried for the optimum.
const MOST_COMBINATIONS: u64 = 1 << 24;

/// A request that waits.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Tokens of its prompt.
    pub prompt: f64,
    /// Tokens that it wants.
    pub wanted: f64,
    /// Seconds until it is to be done.
    pub deadline: f64,
    /// Its weight.
    pub weight: f64,
    /// The increase of its loss at every budget, nats.
    pub extra: Vec<f64>,
}

/// Speeds at every budget, tokens a second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Speeds {
    /// The speed of reading a prompt.
    pub prefill: Vec<f64>,
    /// The speed of generating text.
    pub decode: Vec<f64>,
}

/// A server, and the seconds until it starts.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// Its speeds when a request has it alone.
    pub speeds: Speeds,
    /// Seconds before it begins with a request.
    pub start: f64,
}

/// Where a request runs and at which budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spot {
    /// On the processor.
    Processor(usize),
    /// On the server.
    Server(usize),
}

/// Where every request runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Placement {
    /// The spots.
    pub spots: Vec<Spot>,
    /// Shares of the server.
    pub shares: Vec<f64>,
    /// Seconds that each takes.
    pub times: Vec<f64>,
    /// The cost.
    pub cost: f64,
}

/// Devices and the price of a loss.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    /// The processor: each request has a core of its own.
    pub processor: Speeds,
    /// The server, if there is one.
    pub server: Option<Server>,
    /// Factor of the extra loss.
    pub mu: f64,
}

/// Returns the shares above `floors` that minimise `sum u / a` and add up to 1; none if the floors do not fit.
pub fn shares_above(u: &[f64], floors: &[f64]) -> Option<Vec<f64>> {
    if floors.iter().sum::<f64>() > 1.0 {
        return None;
    }
    let mut is_floored = vec![false; u.len()];
    loop {
        let free = |i: &usize| !is_floored[*i];
        let left = 1.0 - (0..u.len()).filter(|i| is_floored[*i]).map(|i| floors[i]).sum::<f64>();
        let roots: f64 = (0..u.len()).filter(free).map(|i| u[i].sqrt()).sum();
        let share = |i: usize| if is_floored[i] { floors[i] } else { left * u[i].sqrt() / roots };
        let shares: Vec<f64> = (0..u.len()).map(share).collect();
        let below: Vec<usize> = (0..u.len()).filter(free).filter(|&i| shares[i] < floors[i]).collect();
        if below.is_empty() {
            return Some(shares);
        }
        below.into_iter().for_each(|i| is_floored[i] = true);
    }
}

impl Speeds {
    /// Returns the seconds of a request at a budget.
    fn seconds(&self, request: &Request, budget: usize) -> f64 {
        request.prompt / self.prefill[budget] + request.wanted / self.decode[budget]
    }
}

impl Scene {
    fn budgets(&self) -> usize {
        self.processor.prefill.len()
    }

    fn cost_of(&self, request: &Request, time: f64, budget: usize) -> f64 {
        let missed = if time > request.deadline * (1.0 + 1e-9) { MISSED } else { 0.0 };
        request.weight * (time / request.deadline + self.mu * request.extra[budget]) + missed
    }

    /// Returns the best spot on the processor.
    fn at_home(&self, request: &Request) -> Spot {
        let cost = |budget: &usize| self.cost_of(request, self.processor.seconds(request, *budget), *budget);
        let best = (0..self.budgets()).min_by(|a, b| cost(a).total_cmp(&cost(b)));
        Spot::Processor(best.unwrap_or(0))
    }

    /// Returns what given spots come to, with the best shares.
    ///
    /// # Panics
    /// A spot is on a server that is not there, or at a budget that is not there.
    pub fn placed(&self, requests: &[Request], spots: &[Spot]) -> Placement {
        let on_server = |i: &usize| matches!(spots[*i], Spot::Server(_));
        let there: Vec<usize> = (0..spots.len()).filter(on_server).collect();
        let mut placement = Placement {
            spots: spots.to_vec(),
            shares: vec![0.0; spots.len()],
            times: vec![0.0; spots.len()],
            cost: 0.0,
        };
        let start = self.server.as_ref().map_or(0.0, |server| server.start);
        let alone = |i: usize| match (spots[i], &self.server) {
            (Spot::Processor(budget), _) => self.processor.seconds(&requests[i], budget),
            (Spot::Server(budget), Some(server)) => server.speeds.seconds(&requests[i], budget),
            (Spot::Server(_), None) => panic!("place: there is no server"),
        };
        let u: Vec<f64> =
            there.iter().map(|&i| requests[i].weight * alone(i) / requests[i].deadline).collect();
        // A deadline before the start asks for more than all of it.
        let floor = |&i: &usize| {
            let left = requests[i].deadline - start;
            if left > 0.0 { alone(i) / left } else { f64::INFINITY }
        };
        let floors: Vec<f64> = there.iter().map(floor).collect();
        let found = shares_above(&u, &floors).or_else(|| shares_above(&u, &vec![0.0; u.len()]));
        for (&i, share) in there.iter().zip(found.unwrap_or_default()) {
            placement.shares[i] = share;
        }
        for (i, request) in requests.iter().enumerate() {
            let (time, budget) = match spots[i] {
                Spot::Processor(budget) => (alone(i), budget),
                Spot::Server(budget) => (start + alone(i) / placement.shares[i], budget),
            };
            placement.times[i] = time;
            placement.cost += self.cost_of(request, time, budget);
        }
        placement
    }

    /// Returns the options of a request: its best spot on the processor, and the server at every budget.
    fn options(&self, request: &Request) -> Vec<Spot> {
        let server = self.server.iter().flat_map(|_| (0..self.budgets()).map(Spot::Server));
        std::iter::once(self.at_home(request)).chain(server).collect()
    }

    /// Returns the optimum over all combinations of options; none where there are more than 2^24.
    pub fn optimum(&self, requests: &[Request]) -> Option<Placement> {
        let options: Vec<Vec<Spot>> = requests.iter().map(|request| self.options(request)).collect();
        let count = options.iter().try_fold(1u64, |all, options| all.checked_mul(options.len() as u64))?;
        if count > MOST_COMBINATIONS {
            return None;
        }
        let mut spots: Vec<Spot> = options.iter().map(|options| options[0]).collect();
        let mut best: Option<Placement> = None;
        for mut number in 0..count {
            for (spot, options) in spots.iter_mut().zip(&options) {
                *spot = options[(number % options.len() as u64) as usize];
                number /= options.len() as u64;
            }
            let placed = self.placed(requests, &spots);
            if best.as_ref().is_none_or(|best| placed.cost < best.cost) {
                best = Some(placed);
            }
        }
        best
    }

    /// Returns all requests on the processor, each at its best budget.
    pub fn all_at_home(&self, requests: &[Request]) -> Placement {
        let spots: Vec<Spot> = requests.iter().map(|request| self.at_home(request)).collect();
        self.placed(requests, &spots)
    }

    /// Returns all requests on the server at the largest budget, where there is one.
    pub fn all_on_server(&self, requests: &[Request]) -> Option<Placement> {
        self.server.as_ref()?;
        Some(self.placed(requests, &vec![Spot::Server(self.budgets() - 1); requests.len()]))
    }

    /// Returns the best placement at one budget for all requests.
    pub fn one_budget(&self, requests: &[Request]) -> Option<Placement> {
        let at = |budget: usize| {
            let one = Scene {
                processor: self.processor.at(budget),
                server: self
                    .server
                    .as_ref()
                    .map(|server| Server { speeds: server.speeds.at(budget), start: server.start }),
                mu: self.mu,
            };
            let extra = |request: &Request| vec![request.extra[budget]];
            let requests: Vec<Request> =
                requests.iter().map(|request| Request { extra: extra(request), ..request.clone() }).collect();
            let mut placed = one.optimum(&requests)?;
            for spot in &mut placed.spots {
                *spot = match spot {
                    Spot::Processor(_) => Spot::Processor(budget),
                    Spot::Server(_) => Spot::Server(budget),
                };
            }
            Some(placed)
        };
        let placed = (0..self.budgets()).map(at).collect::<Option<Vec<_>>>()?;
        placed.into_iter().min_by(|a, b| a.cost.total_cmp(&b.cost))
    }

    /// Returns what the best single changes lead to, from all requests on the processor: it is fast, and need not be the optimum.
    pub fn descend(&self, requests: &[Request]) -> Placement {
        let mut now = self.all_at_home(requests);
        let options: Vec<Vec<Spot>> = requests.iter().map(|request| self.options(request)).collect();
        loop {
            let mut best: Option<Placement> = None;
            for (i, options) in options.iter().enumerate() {
                for &option in options.iter().filter(|option| **option != now.spots[i]) {
                    let mut spots = now.spots.clone();
                    spots[i] = option;
                    let placed = self.placed(requests, &spots);
                    if placed.cost < best.as_ref().map_or(now.cost, |best| best.cost) {
                        best = Some(placed);
                    }
                }
            }
            match best {
                Some(better) => now = better,
                None => return now,
            }
        }
    }

    /// Returns the requests that take longest against their deadlines on the server, as many as is best, at the largest budget.
    pub fn by_urgency(&self, requests: &[Request]) -> Placement {
        let home = self.all_at_home(requests);
        if self.server.is_none() {
            return home;
        }
        let largest = self.budgets() - 1;
        let urgency = |i: usize| {
            let request = &requests[i];
            request.weight * self.processor.seconds(request, largest) / request.deadline
        };
        let mut order: Vec<usize> = (0..requests.len()).collect();
        order.sort_by(|&a, &b| urgency(b).total_cmp(&urgency(a)).then(a.cmp(&b)));
        let (mut spots, mut best) = (home.spots.clone(), home);
        for i in order {
            spots[i] = Spot::Server(largest);
            let placed = self.placed(requests, &spots);
            if placed.cost < best.cost {
                best = placed;
            }
        }
        best
    }
}

impl Speeds {
    fn at(&self, budget: usize) -> Speeds {
        Speeds { prefill: vec![self.prefill[budget]], decode: vec![self.decode[budget]] }
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::rng::Rng;

    use super::*;

    /// Minimises `sum u / a` above floors by gradient steps that are projected to the simplex above them.
    fn projected(u: &[f64], floors: &[f64]) -> Vec<f64> {
        let project = |point: &[f64]| -> Vec<f64> {
            // max(point - t, floor) adds up to 1 for one t.
            let sum = |t: f64| point.iter().zip(floors).map(|(p, f)| (p - t).max(*f)).sum::<f64>();
            let (mut low, mut high) = (-10.0, 10.0);
            for _ in 0..200 {
                let middle = 0.5 * (low + high);
                if sum(middle) > 1.0 { low = middle } else { high = middle }
            }
            point.iter().zip(floors).map(|(p, f)| (p - high).max(*f)).collect()
        };
        let cost = |a: &[f64]| u.iter().zip(a).map(|(u, a)| u / a).sum::<f64>();
        let mut at = project(&vec![1.0 / u.len() as f64; u.len()]);
        let mut step = 1e-3;
        for _ in 0..20_000 {
            let moved: Vec<f64> = at.iter().zip(u).map(|(a, u)| a + step * u / (a * a)).collect();
            let next = project(&moved);
            if cost(&next) < cost(&at) {
                at = next;
                step *= 1.5;
            } else {
                step *= 0.5;
                if step < 1e-16 {
                    break;
                }
            }
        }
        at
    }

    #[test]
    fn shares_above_floors_are_those_of_a_projected_gradient() {
        let mut rng = Rng::new(4, 0);
        let mut floored = 0;
        for _ in 0..200 {
            let count = 2 + rng.below(4) as usize;
            let mut draw = || f64::from(rng.uniform());
            let u: Vec<f64> = (0..count).map(|_| 0.05 + draw()).collect();
            let raw: Vec<f64> = (0..count).map(|_| 0.02 + draw()).collect();
            let scale = 0.9 * draw() / raw.iter().sum::<f64>();
            let floors: Vec<f64> = raw.iter().map(|floor| floor * scale).collect();
            let got = shares_above(&u, &floors).unwrap();
            let want = projected(&u, &floors);
            assert!((got.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            let cost = |a: &[f64]| u.iter().zip(a).map(|(u, a)| u / a).sum::<f64>();
            assert!(cost(&got) <= cost(&want) * (1.0 + 1e-9), "{got:?} {want:?}");
            for ((got, want), floor) in got.iter().zip(&want).zip(&floors) {
                assert!(*got >= floor - 1e-12 && (got - want).abs() < 1e-3, "{got} {want}");
                floored += usize::from((got - floor).abs() < 1e-12);
            }
        }
        assert!(floored > 20, "{floored} floors were reached");
        let thirds = shares_above(&[4.0, 1.0, 9.0], &[0.0; 3]).unwrap();
        for (share, want) in thirds.iter().zip([1.0 / 3.0, 1.0 / 6.0, 0.5]) {
            assert!((share - want).abs() < 1e-12);
        }
        assert_eq!(shares_above(&[1.0, 1.0], &[0.6, 0.6]), None);
    }

    fn scene(rng: &mut Rng, budgets: usize) -> Scene {
        let speeds = |base: f64| Speeds {
            prefill: (0..budgets).map(|j| 20.0 * base / (1.0 + j as f64)).collect(),
            decode: (0..budgets).map(|j| base / (1.0 + j as f64)).collect(),
        };
        let start = 0.05 * f64::from(rng.uniform());
        Scene { processor: speeds(50.0), server: Some(Server { speeds: speeds(400.0), start }), mu: 1.0 }
    }

    fn requests(rng: &mut Rng, count: usize, budgets: usize) -> Vec<Request> {
        let mut draw = |low: f64, high: f64| low + (high - low) * f64::from(rng.uniform());
        let request = |_| {
            let steepness = draw(0.0, 0.5);
            Request {
                prompt: draw(10.0, 500.0),
                wanted: draw(5.0, 100.0),
                deadline: draw(0.2, 3.0),
                weight: draw(0.5, 2.0),
                extra: (0..budgets).map(|j| steepness * (budgets - 1 - j) as f64).collect(),
            }
        };
        (0..count).map(request).collect()
    }

    #[test]
    fn the_optimum_is_that_of_a_grid_and_no_other_placement_costs_less() {
        let mut rng = Rng::new(6, 0);
        for _ in 0..40 {
            let (scene, requests) = (scene(&mut rng, 2), requests(&mut rng, 2, 2));
            let best = scene.optimum(&requests).unwrap();
            let mut least = f64::INFINITY;
            let server = scene.server.as_ref().unwrap();
            let spots = [Spot::Processor(0), Spot::Processor(1), Spot::Server(0), Spot::Server(1)];
            for a in spots {
                for b in spots {
                    for i in 1..100 {
                        let share = f64::from(i) / 100.0;
                        let both = matches!((a, b), (Spot::Server(_), Spot::Server(_)));
                        let cost = |request: &Request, spot: Spot, share: f64| match spot {
                            Spot::Processor(j) => {
                                scene.cost_of(request, scene.processor.seconds(request, j), j)
                            }
                            Spot::Server(j) => {
                                let share = if both { share } else { 1.0 };
                                let time = server.start + server.speeds.seconds(request, j) / share;
                                scene.cost_of(request, time, j)
                            }
                        };
                        let cost = cost(&requests[0], a, share) + cost(&requests[1], b, 1.0 - share);
                        // Where floors do not fit the definition has other shares.
                        let fits = cost < MISSED;
                        least = if fits { least.min(cost) } else { least };
                    }
                }
            }
            if least.is_finite() {
                assert!(best.cost <= least + 1e-9, "{} and {least}", best.cost);
            }
        }
        let (mut better, mut worse) = (0, 0);
        for _ in 0..25 {
            let (scene, requests) = (scene(&mut rng, 3), requests(&mut rng, 4, 3));
            let best = scene.optimum(&requests).unwrap();
            let descended = scene.descend(&requests);
            let others = [
                scene.all_at_home(&requests),
                scene.all_on_server(&requests).unwrap(),
                scene.one_budget(&requests).unwrap(),
                scene.by_urgency(&requests),
                descended.clone(),
            ];
            for other in &others {
                assert!(best.cost <= other.cost + 1e-9, "{best:?} {other:?}");
                assert!((scene.placed(&requests, &other.spots).cost - other.cost).abs() < 1e-9);
            }
            assert!(descended.cost <= others[0].cost);
            better += usize::from(best.cost < others[0].cost - 1e-6);
            worse += usize::from(best.cost < descended.cost - 1e-6);
            let used: f64 = best.shares.iter().sum();
            assert!(used.abs() < 1e-12 || (used - 1.0).abs() < 1e-9);
        }
        assert!(better > 10, "the server is of no use");
        assert!(worse < 25);
        assert_eq!(scene(&mut rng, 4).optimum(&requests(&mut rng, 20, 4)), None);
    }

    #[test]
    fn without_a_server_every_request_takes_its_best_budget() {
        let mut rng = Rng::new(2, 0);
        let scene = Scene { server: None, ..scene(&mut rng, 3) };
        let requests = requests(&mut rng, 5, 3);
        let best = scene.optimum(&requests).unwrap();
        assert_eq!(best, scene.all_at_home(&requests));
        assert_eq!(scene.all_on_server(&requests), None);
        assert_eq!(best, scene.descend(&requests));
        assert_eq!(best, scene.by_urgency(&requests));
    }
}
