//! Reports of text, tables and charts, independent of the format in which they are written.

pub(crate) mod files;
pub(crate) mod html;
pub(crate) mod markdown;
mod scatter;
pub(crate) mod svg;

/// A cell: the text, and the number to sort by.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Cell {
    pub(crate) text: String,
    pub(crate) value: Option<f64>,
    /// Shown when the pointer is over it.
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

/// Makes a cell of a number in the format of `show`.
pub(crate) fn number(value: f64, show: impl FnOnce(f64) -> String) -> Cell {
    Cell { text: show(value), value: Some(value), tip: None }
}

/// Makes a cell of a number, or of a dash if there is none.
pub(crate) fn optional(value: Option<f64>, show: impl FnOnce(f64) -> String) -> Cell {
    value.map_or("–".into(), |value| number(value, show))
}

/// Makes a cell of a number with that many decimals.
pub(crate) fn fixed(value: f64, decimals: usize) -> Cell {
    number(value, |x| format!("{x:.decimals$}"))
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
    /// Makes a table whose columns have the names of `header`, separated by ` | `.
    pub(crate) fn new(id: &str, title: &str, header: &str) -> Tabular {
        let header = header.split(" | ").map(str::to_owned).collect();
        Tabular { id: id.to_owned(), title: title.to_owned(), note: String::new(), header, rows: Vec::new() }
    }

    /// Appends columns.
    pub(crate) fn extend<T: Into<String>>(&mut self, header: impl IntoIterator<Item = T>) {
        self.header.extend(header.into_iter().map(Into::into));
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
    /// Shown when the pointer is over it.
    pub(crate) tip: String,
    /// Interval of y.
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
    /// Large marks with their names.
    Cloud,
    Line,
    Dashed,
    /// A dashed line without marks, through the marks of other series.
    Guide,
}

/// Points of a chart that belong together.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<Point>,
    pub(crate) look: Look,
}

impl Series {
    pub(crate) fn new(name: &str, look: Look, points: impl IntoIterator<Item = Point>) -> Series {
        Series { name: name.to_owned(), points: points.into_iter().collect(), look }
    }
}

/// How a mark stands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Emphasis {
    Plain,
    Accent,
    /// Dashed lines through it divide the chart.
    Reference,
}

/// A named mark of a scatter chart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mark {
    pub(crate) name: String,
    pub(crate) x: f64,
    pub(crate) y: f64,
    /// Shown when the pointer is over it.
    pub(crate) tip: String,
    pub(crate) emphasis: Emphasis,
}

/// The contents of a chart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Plot {
    Axes {
        series: Vec<Series>,
        /// Least range of the y axis, so that noise does not look large.
        least: f64,
    },
    /// Named marks; the axes fit most of them.
    Scatter { marks: Vec<Mark> },
    /// A table of coloured cells.
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
    /// Makes a chart with two axes and without a note.
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

    /// Makes a chart of named marks.
    pub(crate) fn scatter(id: impl Into<String>, title: &str, axes: [&str; 2], marks: Vec<Mark>) -> Figure {
        Figure { plot: Plot::Scatter { marks }, ..Figure::new(id, title, axes, Vec::new()) }
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
    /// Charts of which a page shows one at a time, by a switch with these names.
    Choice(Vec<(String, Figure)>),
}

impl Block {
    /// Lists the charts of the block.
    pub(crate) fn figures(&self) -> Vec<&Figure> {
        match self {
            Block::Text(_) | Block::Table(_) => Vec::new(),
            Block::Figure(figure) => vec![figure],
            Block::Choice(figures) => figures.iter().map(|(_, figure)| figure).collect(),
        }
    }
}

impl From<Tabular> for Block {
    fn from(table: Tabular) -> Block {
        Block::Table(table)
    }
}

impl From<Figure> for Block {
    fn from(figure: Figure) -> Block {
        Block::Figure(figure)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chapter {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) blocks: Vec<Block>,
}

impl Chapter {
    pub(crate) fn new(id: &str, title: &str, blocks: Vec<Block>) -> Chapter {
        Chapter { id: id.to_owned(), title: title.to_owned(), blocks }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) title: String,
    pub(crate) subtitle: String,
    /// Names whose rows are marked in every table.
    pub(crate) accent: Vec<String>,
    pub(crate) chapters: Vec<Chapter>,
}
