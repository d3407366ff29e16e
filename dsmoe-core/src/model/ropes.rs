//! The rotations of a model's layers.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use dsmoe_kernels::rope;

use crate::config::{Config, Rope, RopeScaling};

/// The rotations that the layers of a model use. Some depend on the number of positions of a pass.
#[derive(Debug)]
pub(crate) struct Ropes {
    tables: Vec<Tables>,
    /// Index of the rotation of every layer.
    of_layers: Vec<Option<usize>>,
    head_dim: usize,
}

/// Tables of one rotation.
#[derive(Debug)]
enum Tables {
    /// One table for all passes.
    One(rope::Table),
    /// A table for passes of up to `up_to` positions, and one for longer ones.
    Two { short: rope::Table, up_to: usize, long: rope::Table },
    /// A table for passes of up to `up_to` positions, and one for every greater number. The last one is kept.
    Growing { short: rope::Table, up_to: usize, rope: Rope, last: Mutex<Option<(usize, Arc<rope::Table>)>> },
}

/// A table, borrowed or shared.
pub(crate) enum TableRef<'a> {
    Borrowed(&'a rope::Table),
    Shared(Arc<rope::Table>),
}

impl Deref for TableRef<'_> {
    type Target = rope::Table;

    fn deref(&self) -> &rope::Table {
        match self {
            TableRef::Borrowed(table) => table,
            TableRef::Shared(table) => table,
        }
    }
}

/// Rows to rotate: the first columns of each are heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    /// Length of a row.
    pub(crate) stride: usize,
    /// Heads in a row.
    pub(crate) heads: usize,
    /// Rows of a sequence.
    pub(crate) seq: usize,
    /// Position of a sequence's first row.
    pub(crate) start: usize,
    /// Positions of the pass, which rotations may depend on.
    pub(crate) positions: usize,
}

impl Ropes {
    pub(crate) fn new(config: &Config) -> Ropes {
        let architecture = &config.architecture;
        let tables = architecture.ropes.iter().map(|rope| Tables::new(rope, config.max_position)).collect();
        let of_layers = architecture.layers.iter().map(|layer| layer.rope).collect();
        Ropes { tables, of_layers, head_dim: config.head_dim }
    }

    /// Returns the table of a layer in a pass over that many positions; none where the layer is not rotated.
    pub(crate) fn table(&self, layer: usize, positions: usize) -> Option<TableRef<'_>> {
        self.of_layers[layer].map(|rope| self.tables[rope].of(positions))
    }

    /// Returns the table of rotation `i` in a pass over that many positions.
    #[cfg(feature = "cuda")]
    pub(crate) fn nth(&self, i: usize, positions: usize) -> TableRef<'_> {
        self.tables[i].of(positions)
    }

    /// Rotates queries or keys of a layer in place.
    pub(crate) fn forward(&self, layer: usize, x: &mut [f32], turn: Turn) {
        if let Some(table) = self.table(layer, turn.positions) {
            rope::Forward { x, stride: turn.stride, args: self.args(&table, turn) }.run();
        }
    }

    /// Rotates their gradient back.
    pub(crate) fn backward(&self, layer: usize, dx: &mut [f32], turn: Turn) {
        if let Some(table) = self.table(layer, turn.positions) {
            rope::Backward { dx, stride: turn.stride, args: self.args(&table, turn) }.run();
        }
    }

    fn args<'a>(&self, table: &'a rope::Table, turn: Turn) -> rope::Args<'a> {
        let Turn { heads, seq, start, .. } = turn;
        rope::Args { table, seq, start, heads, head_dim: self.head_dim }
    }

    /// Computes now what the first `positions` positions need, for calls that must not allocate.
    pub(crate) fn prepare(&self, positions: usize) {
        for tables in &self.tables {
            tables.of(positions.min(1)).prepare(positions);
            tables.of(positions).prepare(positions);
        }
    }
}

impl Tables {
    fn new(rope: &Rope, max_position: usize) -> Tables {
        let table = |positions| rope::Table::new(rope.frequencies(positions), rope.factor(), max_position);
        match rope.scaling {
            RopeScaling::LongRope { original_max_position: up_to, .. } => {
                Tables::Two { short: table(up_to), up_to, long: table(up_to + 1) }
            }
            RopeScaling::Dynamic { max_position: up_to, .. } => {
                Tables::Growing { short: table(up_to), up_to, rope: rope.clone(), last: Mutex::new(None) }
            }
            _ => Tables::One(table(max_position)),
        }
    }

    fn of(&self, positions: usize) -> TableRef<'_> {
        match self {
            Tables::One(table) => TableRef::Borrowed(table),
            Tables::Two { short, up_to, long } => {
                TableRef::Borrowed(if positions > *up_to { long } else { short })
            }
            Tables::Growing { short, up_to, .. } if positions <= *up_to => TableRef::Borrowed(short),
            Tables::Growing { rope, last, .. } => {
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                match &*last {
                    Some((of, table)) if *of == positions => TableRef::Shared(Arc::clone(table)),
                    _ => {
                        let frequencies = rope.frequencies(positions);
                        let table = Arc::new(rope::Table::new(frequencies, rope.factor(), positions));
                        *last = Some((positions, Arc::clone(&table)));
                        TableRef::Shared(table)
                    }
                }
            }
        }
    }
}
