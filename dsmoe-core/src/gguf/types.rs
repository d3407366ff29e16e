//! Encodings of GGUF tensors.

use std::fmt;

/// Encoding of a tensor's elements.
///
/// ```
/// use dsmoe_core::gguf::{Layout, TensorType};
///
/// assert_eq!(TensorType::Q8_0.layout(), Some(Layout { elements: 32, bytes: 34 }));
/// assert_eq!(TensorType::from_id(TensorType::Q4_K.id()), TensorType::Q4_K);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(non_camel_case_types, missing_docs, reason = "the names are those of the format")]
pub enum TensorType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
    /// An encoding that is not read, by its number.
    Other(u32),
}

/// Size of the blocks of an encoding.
///
/// ```
/// use dsmoe_core::gguf::{Layout, TensorType};
///
/// let bytes = |kind: TensorType, values: usize| {
///     kind.layout().map(|Layout { elements, bytes }| values.div_ceil(elements) * bytes)
/// };
/// assert_eq!(bytes(TensorType::BF16, 4096), Some(8192));
/// assert_eq!(bytes(TensorType::Q4_K, 4096), Some(2304));
/// assert_eq!(bytes(TensorType::Other(99), 4096), None); // an encoding that is not read
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Elements of a block.
    pub elements: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

/// Encodings that are read: type, number, name, elements and bytes of a block.
const READ: [(TensorType, u32, &str, usize, usize); 16] = [
    (TensorType::F32, 0, "F32", 1, 4),
    (TensorType::F16, 1, "F16", 1, 2),
    (TensorType::BF16, 30, "BF16", 1, 2),
    (TensorType::Q4_0, 2, "Q4_0", 32, 18),
    (TensorType::Q4_1, 3, "Q4_1", 32, 20),
    (TensorType::Q5_0, 6, "Q5_0", 32, 22),
    (TensorType::Q5_1, 7, "Q5_1", 32, 24),
    (TensorType::Q8_0, 8, "Q8_0", 32, 34),
    (TensorType::Q2_K, 10, "Q2_K", 256, 84),
    (TensorType::Q3_K, 11, "Q3_K", 256, 110),
    (TensorType::Q4_K, 12, "Q4_K", 256, 144),
    (TensorType::Q5_K, 13, "Q5_K", 256, 176),
    (TensorType::Q6_K, 14, "Q6_K", 256, 210),
    (TensorType::IQ4_NL, 20, "IQ4_NL", 32, 18),
    (TensorType::IQ4_XS, 23, "IQ4_XS", 256, 136),
    (TensorType::MXFP4, 39, "MXFP4", 32, 17),
];

/// Names of encodings that are not read.
const NOT_READ: [(u32, &str); 17] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

impl TensorType {
    /// Returns the encoding of this number.
    pub fn from_id(id: u32) -> TensorType {
        let known = READ.iter().find(|entry| entry.1 == id);
        known.map_or(TensorType::Other(id), |entry| entry.0)
    }

    /// Returns the number that files hold.
    pub fn id(self) -> u32 {
        match self {
            TensorType::Other(id) => id,
            known => known.entry().map_or(0, |entry| entry.1),
        }
    }

    /// Returns the size of its blocks; none if the encoding is not read.
    pub fn layout(self) -> Option<Layout> {
        self.entry().map(|entry| Layout { elements: entry.3, bytes: entry.4 })
    }

    fn entry(self) -> Option<&'static (TensorType, u32, &'static str, usize, usize)> {
        READ.iter().find(|entry| entry.0 == self)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(entry) = self.entry() {
            return f.write_str(entry.2);
        }
        match NOT_READ.iter().find(|entry| entry.0 == self.id()) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "number {}", self.id()),
        }
    }
}
