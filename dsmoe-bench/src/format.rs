//! The formatting of numbers and tables.

use std::fmt::Write as _;

/// Formats a count as `1,235,814,400`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}

/// Formats bytes as `13.5 GB`, in powers of ten.
pub(crate) fn bytes(n: u64) -> String {
    scaled(n as f64, &[" B", " kB", " MB", " GB", " TB"])
}

/// Formats a number of parameters or tokens as `735.0 M` or `1.2 B`.
pub(crate) fn amount(n: f64) -> String {
    scaled(n, &["", " k", " M", " B", " T"])
}

/// Formats parameters as `735.0 M activated of 1.2 B`.
pub(crate) fn activated(activated: f64, total: u64) -> String {
    format!("{} activated of {}", amount(activated), amount(total as f64))
}

/// Formats bytes of memory as `13.5 GB in memory`.
pub(crate) fn in_memory(n: u64) -> String {
    format!("{} in memory", bytes(n))
}

/// Formats FLOPs as `1.5 G`.
pub(crate) fn flops(n: f64) -> String {
    scaled(n, &["", " k", " M", " G", " T"])
}

fn scaled(mut n: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // 999.95 would print as 1000.0 of the smaller unit.
    while n >= 999.95 && unit + 1 < units.len() {
        n /= 1000.0;
        unit += 1;
    }
    if unit == 0 && n.fract() == 0.0 { format!("{n}{}", units[0]) } else { format!("{n:.1}{}", units[unit]) }
}

/// Formats a share as `37.5 %`.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Formats a value, or a dash for none.
pub(crate) fn or_dash<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

/// Formats a duration as `48 s`, `3 min 20 s` or `2 h 05 min`.
pub(crate) fn duration(seconds: f64) -> String {
    if seconds < 10.0 {
        return format!("{seconds:.1} s");
    }
    let seconds = seconds.round().min(1e12) as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// Formats lines `name  value` with the values in one column.
pub(crate) fn fields<'a>(fields: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let fields: Vec<_> = fields.into_iter().collect();
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    fields.iter().fold(String::new(), |mut out, (name, value)| {
        let _ = writeln!(out, "{name:width$}  {value}");
        out
    })
}

/// A table with the first column aligned to the left and the others to the right.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<'a>(header: impl IntoIterator<Item = &'a str>) -> Table {
        Table { rows: vec![header.into_iter().map(str::to_owned).collect()] }
    }

    /// Appends a row.
    ///
    /// # Panics
    /// The number of cells differs from that of the header.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        assert_eq!(cells.len(), self.rows[0].len(), "table: cells of a row");
        self.rows.push(cells);
    }

    pub(crate) fn show(&self) -> String {
        let columns = self.rows[0].len();
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for (i, row) in self.rows.iter().enumerate() {
            let mut line = format!("{:<1$}", row[0], widths[0]);
            for (cell, width) in row.iter().zip(&widths).skip(1) {
                let _ = write!(line, "  {cell:>width$}");
            }
            let _ = writeln!(out, "{}", line.trim_end());
            if i == 0 {
                let _ = writeln!(out, "{}", "-".repeat(widths.iter().sum::<usize>() + 2 * (columns - 1)));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 1_235_814_400].map(count), ["0", "999", "1,000", "1,235,814,400"]);
        assert_eq!(
            [12, 999_949, 999_950, 13_476_000_000].map(bytes),
            ["12 B", "999.9 kB", "1.0 MB", "13.5 GB"]
        );
        assert_eq!([735_010_000.0, 1_235_814_400.0].map(amount), ["735.0 M", "1.2 B"]);
        assert_eq!(flops(1_500_000_000.0), "1.5 G");
        assert_eq!(percent(0.375), "37.5 %");
        assert_eq!([0.25, 59.4, 61.0, 7500.0].map(duration), ["0.2 s", "59 s", "1 min 01 s", "2 h 05 min"]);
    }

    #[test]
    fn tables_line_up() {
        let mut table = Table::new(["model", "ppl"]);
        table.row(["dense".to_owned(), "12.5".to_owned()]);
        table.row(["d".to_owned(), "9.25".to_owned()]);
        assert_eq!(table.show(), "model   ppl\n-----------\ndense  12.5\nd      9.25\n");
        assert_eq!(fields([("a", "1".to_owned()), ("bcd", "2".to_owned())]), "a    1\nbcd  2\n");
    }
}
