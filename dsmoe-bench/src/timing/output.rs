//! The output of the rows of a measurement.

use anyhow::Result;

use super::ceilings::Ceilings;
use super::row::Row;
use crate::ui::Ui;

/// Prints rows at once as JSON lines, or collects them for a table.
pub(crate) struct Output<'a> {
    pub(crate) ui: &'a mut Ui,
    pub(crate) ceilings: Ceilings,
    pub(crate) rows: Vec<Row>,
}

impl Output<'_> {
    /// Adds the rows of one shape.
    pub(crate) fn extend(&mut self, rows: Vec<Row>) -> Result<()> {
        if self.ui.json {
            return rows.iter().try_for_each(|row| self.ui.result(row, |_| String::new()));
        }
        if let Some(row) = rows.first() {
            self.ui.note(format_args!("{} of {} tokens in {}: done", row.work, row.tokens, row.dtype));
        }
        self.rows.extend(rows);
        Ok(())
    }
}
