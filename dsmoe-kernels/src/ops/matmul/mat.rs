//! The operands of matrix products: strided views and their precision.

/// The precision to which a matrix product rounds its operands. Sums are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32: no rounding.
    #[default]
    F32,
    /// bf16, ties to even.
    Bf16,
}

impl Precision {
    /// Returns `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// Returns the bytes of a stored value.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }
}

impl std::str::FromStr for Precision {
    type Err = String;
    fn from_str(name: &str) -> Result<Precision, String> {
        [Precision::F32, Precision::Bf16]
            .into_iter()
            .find(|precision| precision.name() == name)
            .ok_or_else(|| format!("unknown precision `{name}`; use f32 or bf16"))
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A borrowed matrix with arbitrary strides.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    pub(super) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Views `data` as a row-major `[rows, cols]` matrix.
    ///
    /// # Panics
    /// `data` does not hold `rows * cols` values.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Mat<'a> {
        assert_eq!(data.len(), rows * cols, "matmul: {} values for a [{rows}, {cols}] matrix", data.len());
        Mat { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Views rows of length `cols` that start every `row_stride` values.
    ///
    /// # Panics
    /// The last row ends past `data`.
    pub fn with_stride(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Mat<'a> {
        assert!(
            rows == 0 || (row_stride >= cols && (rows - 1) * row_stride + cols <= data.len()),
            "matmul: {} values for [{rows}, {cols}] rows every {row_stride}",
            data.len()
        );
        Mat { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// Returns the transpose; no data moves.
    pub fn t(self) -> Mat<'a> {
        let Mat { data, rows, cols, row_stride, col_stride } = self;
        Mat { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }

    pub(crate) fn at(&self, row: usize, col: usize) -> f32 {
        self.data[row * self.row_stride + col * self.col_stride]
    }
}
