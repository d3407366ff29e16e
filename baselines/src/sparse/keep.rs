//! Which weights of a matrix are kept, one bit each.

/// Bits of a `[rows, cols]` matrix, row by row: bit c % 8 of byte c / 8 of a row is 1 when the weight is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `[rows, cols.div_ceil(8)]`.
    pub bits: Vec<u8>,
}

impl Keep {
    /// Nothing is kept.
    pub fn none(rows: usize, cols: usize) -> Keep {
        Keep { rows, cols, bits: vec![0; rows * cols.div_ceil(8)] }
    }

    /// Bytes of a row.
    pub fn stride(&self) -> usize {
        self.cols.div_ceil(8)
    }

    /// Whether a weight is kept.
    ///
    /// # Panics
    /// There is no such row or column.
    pub fn has(&self, row: usize, col: usize) -> bool {
        self.bits[row * self.stride() + col / 8] >> (col % 8) & 1 == 1
    }

    /// Weights that are kept.
    pub fn kept(&self) -> u64 {
        self.bits.iter().map(|byte| u64::from(byte.count_ones())).sum()
    }
}
