//! A report as chapters of text, tables and charts, whatever it is written as.

pub(crate) mod html;
pub(crate) mod markdown;
pub(crate) mod svg;

/// One cell: what is shown, and the number behind it to sort by.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Cell {
    pub(crate) text: String,
    pub(crate) value: Option<f64>,
    /// Shown when pointed at.
    pub(crate) tip: Option<String>,
}

impl Cell {
    pub(crate) fn tip(mut self, tip: Option<String>) -> Cell {
        self.tip = tip;
        self
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Cell {
        Cell { text, value: None, tip: None }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Cell {
        text.to_owned().into()
    }
}

/// A number as `show` writes it.
pub(crate) fn number(value: f64, show: impl FnOnce(f64) -> String) -> Cell {
    Cell { text: show(value), value: Some(value), tip: None }
}

/// [`number`], or a dash.
pub(crate) fn optional(value: Option<f64>, show: impl FnOnce(f64) -> String) -> Cell {
    value.map_or("–".into(), |value| number(value, show))
}

/// A table with a name for its CSV file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tabular {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) note: String,
    pub(crate) header: Vec<String>,
    pub(crate) rows: Vec<Vec<Cell>>,
}

impl Tabular {
    pub(crate) fn new(id: &str, title: &str, header: &[&str]) -> Tabular {
        Tabular {
            id: id.to_owned(),
            title: title.to_owned(),
            note: String::new(),
            header: header.iter().map(|&name| name.to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Tabular {
        self.note = note.into();
        self
    }

    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        debug_assert_eq!(cells.len(), self.header.len(), "{}", self.id);
        self.rows.push(cells);
    }
}

/// A point of a chart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
    /// Shown when pointed at.
    pub(crate) tip: String,
    /// From where to where y may be.
    pub(crate) range: Option<[f64; 2]>,
}

impl Point {
    pub(crate) fn new(x: f64, y: f64, tip: String) -> Point {
        Point { x, y, tip, range: None }
    }
}

/// How the points of a series are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// Large marks, each beside its name.
    Cloud,
    Line,
    Dashed,
    /// A dashed line without marks, through those of others.
    Guide,
}

/// Points of a chart that belong together.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<Point>,
    pub(crate) look: Look,
}

/// What a chart shows.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Plot {
    Axes {
        series: Vec<Series>,
        /// The least height of the y axis: noise should not look like a cliff.
        least: f64,
    },
    /// Names of rows and columns, and values.
    Heat { rows: Vec<String>, columns: Vec<String>, values: Vec<Vec<f64>> },
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Figure {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) note: String,
    pub(crate) x: String,
    pub(crate) y: String,
    pub(crate) plot: Plot,
}

impl Figure {
    /// A chart between two axes, without a note.
    pub(crate) fn new(id: impl Into<String>, title: &str, [x, y]: [&str; 2], series: Vec<Series>) -> Figure {
        Figure {
            id: id.into(),
            title: title.to_owned(),
            note: String::new(),
            x: x.to_owned(),
            y: y.to_owned(),
            plot: Plot::Axes { series, least: 0.0 },
        }
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Figure {
        self.note = note.into();
        self
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Block {
    Text(String),
    Table(Tabular),
    Figure(Figure),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chapter {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) blocks: Vec<Block>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) title: String,
    pub(crate) subtitle: String,
    pub(crate) chapters: Vec<Chapter>,
}
