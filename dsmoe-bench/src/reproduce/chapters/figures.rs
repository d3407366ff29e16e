//! The paper's figures, and further charts.

use super::super::measure::Bin;
use super::super::profile::Role;
use super::super::results::MethodResult;
use super::{View, agreement, amount, flops, measured, optional_fixed, p_value, plain, trim, yes};
use crate::format;
use crate::report::{Block, Figure, Look, Plot, Point, Series, Tabular, fixed, number, optional};

impl View<'_> {
    pub(super) fn figure2(&self) -> Vec<Block> {
        let Some(without) = self.method(Role::WithoutThreshold) else { return Vec::new() };
        let mut table = Tabular::new(
            "figure2",
            "At equal activation",
            "trained | threshold at inference | active experts | perplexity | direction",
        )
        .note(
            "The paper (section 6.2) states that training without a threshold is worse; the text does not state the numbers \
             of its figure 2.",
        );
        let literal = self.method(Role::Paper).or_else(|| self.main());
        for method in self.gated().chain([without]) {
            let is_it = method.name == without.name;
            let threshold = if is_it { method.threshold } else { Some(0.5) };
            table.row(vec![
                method.name.as_str().into(),
                optional_fixed(threshold, 4),
                optional_fixed(method.active_experts(), 2),
                measured(&method.ppl),
                match literal {
                    Some(literal) if is_it => agreement(Some(method.ppl.mean > literal.ppl.mean)),
                    _ => "".into(),
                },
            ]);
        }
        let swept = self.gated().chain([without]).filter(|method| !method.sweep.is_empty());
        let series = swept.map(|method| {
            let points = method.sweep.iter().map(|point| {
                let tip = format!("threshold {}", trim(point.threshold));
                Point::new(method.experts_of(point.active_ratio), point.ppl.mean, tip)
            });
            let look = if method.name == without.name { Look::Dashed } else { Look::Line };
            Series::new(&method.name, look, points)
        });
        let figure = Figure::new(
            "figure2-chart",
            "Perplexity against active experts, by threshold",
            ["active experts", "perplexity"],
            series.collect(),
        );
        let mut sweep = Tabular::new(
            "figure2-sweep",
            &format!("{}: thresholds after training", without.name),
            "threshold | active experts | perplexity",
        );
        for point in &without.sweep {
            sweep.row(vec![
                number(point.threshold, trim),
                fixed(without.experts_of(point.active_ratio), 2),
                measured(&point.ppl),
            ]);
        }
        vec![table.into(), figure.into(), sweep.into()]
    }

    pub(super) fn figure3(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        for method in self.gated() {
            let shapes: Vec<_> =
                self.results.shapes.iter().filter(|shape| shape.method == method.name).collect();
            let Some(first) = shapes.first() else { continue };
            let layers = first.active_experts_per_layer.len();
            let plot = Plot::Heat {
                rows: shapes.iter().map(|shape| shape.domain.clone()).collect(),
                columns: (0..layers).map(|layer| layer.to_string()).collect(),
                values: shapes.iter().map(|shape| shape.active_experts_per_layer.clone()).collect(),
            };
            let (id, title) =
                (format!("figure3-{}", method.name), format!("{}: active experts", method.name));
            let figure = Figure::new(id, &title, ["layer", "text"], Vec::new());
            blocks.push(Block::from(Figure { plot, ..figure }));
            let mut table = Tabular::new(&format!("figure3-{}-layers", method.name), &method.name, "text");
            table.extend((0..layers).map(|layer| format!("layer {layer}")));
            table.extend(["mean", "correlation", "p", "W", "the paper"]);
            for shape in shapes {
                let values = &shape.active_experts_per_layer;
                let mut cells = vec![shape.domain.as_str().into()];
                cells.extend(values.iter().map(|&value| fixed(value, 2)));
                cells.push(fixed(values.iter().sum::<f64>() / layers as f64, 2));
                cells.push(optional(shape.correlation, |x| format!("{x:+.2}")));
                cells.push(optional(shape.p, p_value));
                cells.push(shape.is_w.map_or("too few layers".into(), yes));
                cells.push("W".into());
                table.row(cells);
            }
            table.note = "Correlation: that of the layers with a wave that is high at both ends and in the middle and low \
                          between. p: the share of all orders of these layers that correlate as much. A W has a correlation of \
                          0.5 or more and p below 0.05. The paper states that the pattern is a W and differs between texts; it \
                          does not state the numbers of its figure 3."
                .to_owned();
            blocks.push(table.into());
        }
        blocks
    }

    pub(super) fn speed(&self) -> Vec<Block> {
        let mut table = Tabular::new(
            "speed",
            "Measured",
            "method | perplexity | activated | FLOPs per token | prefill, tokens/s | \
             decode, tokens/s | peak memory | weights | training, tokens/s",
        )
        .note(
            "Each model runs alone in its own process; best of three. Prefill reads held-out text; decoding takes one token \
             at a time. Zeros scattered over a matrix save no time.",
        );
        for method in &self.results.methods {
            let timing = self.timing(method);
            let speed = timing.and_then(|timing| timing.speed.as_ref());
            table.row(vec![
                method.name.as_str().into(),
                measured(&method.ppl),
                amount(method.params_activated.mean),
                flops(method.flops_per_token),
                optional_fixed(speed.map(|s| s.prefill_tokens_per_s), 0),
                optional_fixed(speed.map(|s| s.decode_tokens_per_s), 0),
                optional(speed.and_then(|s| s.peak_bytes).map(|b| b as f64), |x| format::bytes(x as u64)),
                optional(speed.map(|s| s.weight_bytes as f64), |x| format::bytes(x as u64)),
                optional_fixed(timing.and_then(|t| t.train_tokens_per_s), 0),
            ]);
        }
        vec![table.into()]
    }

    pub(super) fn pareto(&self) -> Vec<Block> {
        let methods = &self.results.methods;
        let on_front = |method: &MethodResult| {
            !methods.iter().any(|other| {
                other.flops_per_token <= method.flops_per_token
                    && other.ppl.mean <= method.ppl.mean
                    && (other.flops_per_token < method.flops_per_token || other.ppl.mean < method.ppl.mean)
            })
        };
        let mut table = Tabular::new(
            "pareto",
            "Perplexity and activated FLOPs",
            "method | FLOPs per token | perplexity | on the front",
        )
        .note("FLOPs are nominal: those of activated weights. A row is on the front if no other has both fewer FLOPs and a lower perplexity.");
        let point = |method: &MethodResult| {
            let (flops, ppl) = (method.flops_per_token, method.ppl.mean);
            let tip = format!("{}: {} FLOPs, perplexity {}", method.name, format::flops(flops), plain(ppl));
            Point::new(flops, ppl, tip)
        };
        let cloud = |method: &MethodResult| Series::new(&method.name, Look::Cloud, [point(method)]);
        let mut series: Vec<Series> = methods.iter().map(cloud).collect();
        let mut front: Vec<Point> = methods.iter().filter(|method| on_front(method)).map(point).collect();
        front.sort_by(|a, b| a.x.total_cmp(&b.x));
        if front.len() > 1 {
            series.push(Series::new("front", Look::Guide, front));
        }
        let figure = Figure::new(
            "pareto-chart",
            "Perplexity against activated FLOPs",
            ["FLOPs per token", "perplexity"],
            series,
        );
        for method in methods {
            table.row(vec![
                method.name.as_str().into(),
                flops(method.flops_per_token),
                measured(&method.ppl),
                yes(on_front(method)),
            ]);
        }
        vec![figure.into(), table.into()]
    }

    pub(super) fn difficulty(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        let mut series = Vec::new();
        for method in self.gated() {
            let Some(found) = &method.difficulty else { continue };
            let mut table = Tabular::new(
                &format!("difficulty-{}", method.name),
                &method.name,
                "tokens, easiest first | dense model's loss | loss | active experts",
            )
            .note(format!(
                "Tenths of the held-out tokens by the loss of the dense model before continued training. Correlation of the \
                 active experts of a token with that loss: {}.",
                found.correlation.map_or_else(|| "none, because they do not vary".to_owned(), |r| format!("{r:+.3}")),
            ));
            for (at, bin) in found.bins.iter().enumerate() {
                table.row(vec![
                    number(at as f64, |_| format!("{} to {} %", 10 * at, 10 * (at + 1))),
                    fixed(bin.dense_nll, 3),
                    fixed(bin.nll, 3),
                    fixed(bin.active, 3),
                ]);
            }
            blocks.push(table.into());
            let point = |bin: &Bin| Point::new(bin.dense_nll, bin.active, format!("{} tokens", bin.tokens));
            series.push(Series::new(&method.name, Look::Line, found.bins.iter().map(point)));
        }
        if !series.is_empty() {
            let figure = Figure::new(
                "difficulty-chart",
                "Active experts of a token against its difficulty",
                ["loss of the dense model, nats", "active experts"],
                series,
            );
            blocks.insert(0, figure.into());
        }
        blocks
    }

    pub(super) fn budget(&self) -> Vec<Block> {
        let shares = &self.results.setup.profile.milestones;
        let mut table = Tabular::new("budget", "Perplexity after shares of the tokens", "method").note(
            "0 % is the model before training. Active experts are in brackets where training changes them. A method trained \
             without a threshold has no entries, because its threshold is found after training.",
        );
        table.extend(shares.iter().map(|share| format!("{} %", trim(100.0 * share))));
        for method in self.results.methods.iter().filter(|method| !method.milestones.is_empty()) {
            let gated = method.role.is_some_and(Role::is_gated);
            let mut cells = vec![method.name.as_str().into()];
            for share in shares {
                cells.push(method.milestone(*share).map_or("–".into(), |stone| {
                    let mut cell =
                        measured(&stone.ppl).tip(Some(format!("{} tokens", format::count(stone.tokens))));
                    if let Some(share) = stone.active_ratio.filter(|_| gated) {
                        cell.text += &format!(" ({:.2})", method.experts_of(share));
                    }
                    cell
                }));
            }
            table.row(cells);
        }
        vec![table.into()]
    }
}
