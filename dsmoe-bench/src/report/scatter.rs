//! Charts of named marks: both axes fit the bulk of the marks, outliers lie at the edge, and names do not overlap.

use std::fmt::Write as _;

use super::svg::{BOTTOM, HEIGHT, LEFT, RIGHT, TOP, escape, label, limits, open, short, ticks};
use super::{Emphasis, Figure, Mark};

/// Marks farther from the best than this many times the distance of three quarters of them are outliers.
const OUTLIER: f64 = 3.0;
/// Fewest marks of which one can be an outlier.
const ENOUGH: usize = 5;
/// Width of a character (bold: of a highlighted one), height of a line of a name, and the radius that names keep from marks.
const CHARACTER: f64 = 7.6;
const BOLD_CHARACTER: f64 = 8.6;
const LINE: f64 = 14.0;
const CLEAR: f64 = 8.0;
/// Width of a chart for a narrow screen.
pub(super) const NARROW: f64 = 400.0;
/// Units of the x axis between two ticks.
const TICK_EVERY: f64 = 90.0;
/// Names farther from their marks than this have a line to them.
const NEAR: f64 = 12.0;

/// A rectangle: left, top, right, bottom.
type Area = [f64; 4];

/// One axis: what is shown of the values, and where it lies on the chart.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    /// Values above this lie at the edge.
    limit: f64,
}

impl Axis {
    /// Fits the values, all that are at most `reference` among them.
    fn fit(values: &[f64], reference: f64, from: f64, to: f64) -> Axis {
        let limit = limit(values).max(1.05 * reference);
        let (low, high) = limits(values.iter().copied().filter(|value| *value <= limit));
        if low > high {
            return Axis { low: 0.0, high: 1.0, from, to, limit };
        }
        let outliers = values.iter().any(|value| *value > limit);
        let margin = if high > low { 0.08 * (high - low) } else { (0.1 * high.abs()).max(0.01) };
        Axis { low: low - margin, high: high + margin * if outliers { 2.0 } else { 1.0 }, from, to, limit }
    }

    fn place(&self, value: f64) -> f64 {
        let value = if value > self.limit { self.high } else { value };
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }
}

/// Returns the largest value that is not an outlier.
fn limit(values: &[f64]) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    if sorted.len() < ENOUGH {
        return f64::INFINITY;
    }
    let (best, most) = (sorted[0], sorted[3 * (sorted.len() - 1) / 4]);
    if most > best { best + OUTLIER * (most - best) } else { f64::INFINITY }
}

/// Draws the marks of a figure on a chart of that width.
pub(super) fn scatter_svg(figure: &Figure, marks: &[Mark], width: f64) -> String {
    let shown: Vec<&Mark> = marks.iter().filter(|mark| mark.x.is_finite() && mark.y.is_finite()).collect();
    let values = |of: fn(&Mark) -> f64| shown.iter().map(|mark| of(mark)).collect::<Vec<f64>>();
    let (right, bottom) = (width - RIGHT, HEIGHT - BOTTOM);
    // What the model that others are compared with costs is never beyond the edge. Its loss may be: trained rows can be far better.
    let references = shown.iter().filter(|mark| mark.emphasis == Emphasis::Reference);
    let reference = references.map(|mark| mark.x).fold(f64::NEG_INFINITY, f64::max);
    let across = Axis::fit(&values(|mark| mark.x), reference, LEFT, right);
    let up = Axis::fit(&values(|mark| mark.y), f64::NEG_INFINITY, bottom, TOP);
    let mut out = open(figure, width, HEIGHT);
    for y in ticks(up.low, up.high, 6.0) {
        let at = up.place(y);
        let _ =
            write!(out, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>");
        label(&mut out, "tick", [LEFT - 8.0, at + 4.0], "end", &short(y));
    }
    for x in ticks(across.low, across.high, ((right - LEFT) / TICK_EVERY).round()) {
        label(&mut out, "tick", [across.place(x), bottom + 18.0], "middle", &short(x));
    }
    let _ =
        write!(out, "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>");
    let (at, anchor) = if width > NARROW { ((LEFT + right) / 2.0, "middle") } else { (right, "end") };
    label(&mut out, "name", [at, HEIGHT - 10.0], anchor, &escape(&figure.x));
    let _ = write!(
        out,
        "<text class=\"name\" transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        (TOP + bottom) / 2.0,
        escape(&figure.y)
    );
    for mark in shown.iter().filter(|mark| mark.emphasis == Emphasis::Reference) {
        let (x, y) = (across.place(mark.x), up.place(mark.y));
        let _ = write!(
            out,
            "<path class=\"axis dash\" fill=\"none\" d=\"M{LEFT} {y:.1}H{right}M{x:.1} {TOP}V{bottom}\"/>"
        );
    }
    let places: Vec<[f64; 2]> = shown.iter().map(|mark| [across.place(mark.x), up.place(mark.y)]).collect();
    let names: Vec<String> = shown.iter().map(|mark| name(mark, &across, &up)).collect();
    let areas = names_without_overlap(&places, &names, &shown, width);
    // Marks lie over all names.
    for (([x, y], mark), (name, area)) in places.iter().zip(&shown).zip(names.iter().zip(&areas)) {
        let near = [x.clamp(area[0], area[2]), y.clamp(area[1], area[3])];
        if distance([*x, *y], *area) > NEAR {
            let [to_x, to_y] = near;
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{to_x:.1}\" y2=\"{to_y:.1}\"/>"
            );
        }
        let class = format!("of {}", looks(mark.emphasis).0);
        label(&mut out, &class, [area[0], area[3] - 3.0], "start", &escape(name));
    }
    for ([x, y], mark) in places.iter().zip(&shown) {
        let ((class, radius), tip) = (looks(mark.emphasis), escape(&mark.tip));
        let _ = write!(
            out,
            "<circle class=\"mark {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" data-tip=\"{tip}\" tabindex=\"0\"><title>{tip}</title></circle>"
        );
    }
    out + "</svg>"
}

/// Returns the class and the radius of a mark.
fn looks(emphasis: Emphasis) -> (&'static str, f64) {
    match emphasis {
        Emphasis::Accent => ("accent", 7.5),
        Emphasis::Reference => ("reference", 5.0),
        Emphasis::Plain => ("plain", 5.0),
    }
}

/// Returns the name of a mark, with its value if it is an outlier.
fn name(mark: &Mark, across: &Axis, up: &Axis) -> String {
    let mut name = mark.name.clone();
    if mark.y > up.limit {
        let _ = write!(name, " {} ↑", short(mark.y));
    }
    if mark.x > across.limit {
        let _ = write!(name, " {} →", short(mark.x));
    }
    name
}

/// Finds a place for every name near its mark: inside the chart, and clear of all marks and of other names.
fn names_without_overlap(places: &[[f64; 2]], names: &[String], marks: &[&Mark], chart: f64) -> Vec<Area> {
    let circle = |&[x, y]: &[f64; 2]| [x - CLEAR, y - CLEAR, x + CLEAR, y + CLEAR];
    let mut taken: Vec<Area> = places.iter().map(circle).collect();
    let mut order: Vec<usize> = (0..places.len()).collect();
    order.sort_by_key(|&at| marks[at].emphasis != Emphasis::Accent);
    let mut areas = vec![[0.0; 4]; places.len()];
    for at in order {
        let character = if marks[at].emphasis == Emphasis::Accent { BOLD_CHARACTER } else { CHARACTER };
        let ([x, y], width) = (places[at], character * names[at].chars().count() as f64);
        let beside = |left: f64, middle: f64| [left, middle - LINE / 2.0, left + width, middle + LINE / 2.0];
        let steps = |count: i32, size: f64| (-count..=count).map(move |step| f64::from(step) * size);
        let tried = steps(60, 6.0).flat_map(|down| {
            let right = steps(40, 9.0).map(move |aside| (x + CLEAR + 1.0 + aside, y + down));
            right.chain([(x - CLEAR - 1.0 - width, y + down)])
        });
        let inside = |area: &Area| {
            area[0] >= LEFT + 2.0
                && area[1] >= 1.0
                && area[2] <= chart - 2.0
                && area[3] <= HEIGHT - BOTTOM - 2.0
        };
        let cost = |area: &Area| {
            distance([x, y], *area) + 0.1 * ((area[1] + area[3]) / 2.0 - y).abs() + 0.02 * (x - area[0]).abs()
        };
        let free = tried
            .map(|(left, middle)| beside(left, middle))
            .filter(|area| inside(area) && taken.iter().all(|other| !overlap(area, other)));
        let best = free.min_by(|a, b| cost(a).total_cmp(&cost(b)));
        // Only a chart with more names than it has room for comes to this.
        areas[at] = best.unwrap_or_else(|| beside(x + CLEAR + 1.0, y));
        taken.push(areas[at]);
    }
    areas
}

fn overlap(a: &Area, b: &Area) -> bool {
    a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]
}

fn distance([x, y]: [f64; 2], area: Area) -> f64 {
    (x - x.clamp(area[0], area[2])).hypot(y - y.clamp(area[1], area[3]))
}

#[cfg(test)]
mod tests {
    use super::super::svg::WIDTH;
    use super::*;

    fn mark(name: &str, x: f64, y: f64) -> Mark {
        Mark { name: name.to_owned(), x, y, tip: "tip".to_owned(), emphasis: Emphasis::Plain }
    }

    #[test]
    fn names_never_overlap() {
        // Sixteen marks on nearly one place, in a corner.
        for (dx, dy) in [(0.0, 0.0), (0.01, 0.002), (1.0, -0.3)] {
            let marks: Vec<Mark> = (0..16)
                .map(|i| {
                    mark(
                        "a-method-of-some-name",
                        100.0 + dx * f64::from(i),
                        5.0 + dy * f64::from(i) + f64::from(i % 2),
                    )
                })
                .collect();
            let shown: Vec<&Mark> = marks.iter().collect();
            let places: Vec<[f64; 2]> =
                (0..16).map(|i| [680.0 + dx * f64::from(i), 20.0 + dy * f64::from(i)]).collect();
            let names: Vec<String> = marks.iter().map(|mark| mark.name.clone()).collect();
            let areas = names_without_overlap(&places, &names, &shown, WIDTH);
            for (at, area) in areas.iter().enumerate() {
                assert!(area[0] > LEFT && area[2] < WIDTH && area[1] > 0.0 && area[3] < HEIGHT, "{area:?}");
                assert!(areas[..at].iter().all(|other| !overlap(area, other)), "{at}: {area:?}");
            }
        }
    }

    #[test]
    fn the_cost_of_the_reference_is_never_an_outlier() {
        let mut marks: Vec<Mark> = (0..5).map(|i| mark("m", 60.0 + f64::from(i), 5.0)).collect();
        marks.push(Mark { emphasis: Emphasis::Reference, ..mark("dense", 100.0, 4.0) });
        marks.push(mark("near it", 101.5, 4.5));
        marks.push(mark("far", 900.0, 4.5));
        let figure = Figure::scatter("f", "F", ["x", "y"], marks.clone());
        let svg = scatter_svg(&figure, &marks, WIDTH);
        assert!(svg.contains(">dense<") && svg.contains(">near it<") && svg.contains(">far 900 →<"), "{svg}");
        // A loss far above those of trained rows lies at the edge.
        marks[5].y = 50.0;
        assert!(scatter_svg(&figure, &marks, WIDTH).contains(">dense 50 ↑<"));
    }

    #[test]
    fn outliers_lie_at_the_edge_with_their_value() {
        let mut marks: Vec<Mark> =
            (0..8).map(|i| mark("m", f64::from(i), 5.0 + 0.1 * f64::from(i))).collect();
        marks.push(mark("far", 3.0, 1500.0));
        let figure = Figure::scatter("f", "F", ["x", "perplexity"], marks.clone());
        let svg = scatter_svg(&figure, &marks, WIDTH);
        assert!(svg.contains(">far 1500 ↑<"), "{svg}");
        // The axis ends near the others.
        assert!(svg.contains(">5.2</text>") && !svg.contains(">1000</text>"), "{svg}");
        let narrow = scatter_svg(&figure, &marks, NARROW);
        assert!(
            narrow.contains("viewBox=\"0 0 400 380\"") && narrow.matches("<circle").count() == 9,
            "{narrow}"
        );
        assert_eq!(limit(&[1.0, 2.0, 3.0]), f64::INFINITY);
        assert_eq!(limit(&[2.0; 9]), f64::INFINITY);
        assert!(limit(&[1.0, 1.1, 1.2, 1.3, 9.0]) < 9.0);
        for marks in [vec![], vec![mark("one", 1.0, f64::NAN), mark("two", 1.0, 1.0)]] {
            let svg = scatter_svg(&figure, &marks, WIDTH);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
