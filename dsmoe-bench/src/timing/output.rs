//! The output of the rows of a measurement.

use anyhow::Result;
use dsmoe_kernels::Precision;

use super::ceilings::Ceilings;
use super::row::Row;
use crate::ui::Ui;

/// Prints rows at once as JSON lines, or collects them for a table.
pub(crate) struct Output<'a> {
    pub(crate) ui: &'a mut Ui,
    pub(crate) ceilings: Ceilings,
    pub(crate) rows: Vec<Row>,
}

impl<'a> Output<'a> {
    /// Adds the rows that `measure` returns for every shape in every precision.
    pub(crate) fn each<S: Copy>(
        &mut self,
        shapes: &[S],
        precisions: &[Precision],
        measure: impl Fn(S, Precision, &mut Output<'a>) -> Result<Vec<Row>>,
    ) -> Result<()> {
        for &shape in shapes {
            for &precision in precisions {
                let rows = measure(shape, precision, self)?;
                self.extend(rows)?;
            }
        }
        Ok(())
    }

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
