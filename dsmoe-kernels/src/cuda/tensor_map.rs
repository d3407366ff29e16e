//! Descriptors of matrices for the copies of Hopper.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::device::Gpu;
use super::error::{CudaError, Result, driver};

/// The bytes of a swizzled row of a box; a box of half as many columns is swizzled over half of them.
pub(crate) const SWIZZLE: usize = 128;

/// A descriptor as a kernel takes it.
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorMap(pub(crate) [u64; 16]);

impl TensorMap {
    /// A descriptor that no copy uses.
    pub(crate) const NONE: TensorMap = TensorMap([0; 16]);
}

/// A matrix of up to four dimensions in a device's memory, the fastest first, and the box of it that a copy takes. Rows of a
/// box are [`SWIZZLE`] bytes or half of them; they lie swizzled in shared memory. Elements outside the matrix are read as 0 and not written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tiled {
    pub(crate) base: u64,
    /// Bytes of an element: 2 of bf16 or 4 of f32.
    pub(crate) size: usize,
    pub(crate) sizes: Vec<usize>,
    /// Bytes from an element to the next one, of all dimensions but the first.
    pub(crate) strides: Vec<usize>,
    pub(crate) tile: Vec<usize>,
}

impl Tiled {
    /// Makes the descriptor of rows of `cols` elements without gaps.
    pub(crate) fn rows(base: u64, size: usize, [rows, cols]: [usize; 2], tile: [usize; 2]) -> Tiled {
        Tiled { base, size, sizes: vec![cols, rows], strides: vec![cols * size], tile: tile.to_vec() }
    }

    /// Returns the bytes of a row of the box.
    pub(crate) fn row_bytes(&self) -> usize {
        self.tile.first().map_or(0, |side| side * self.size)
    }

    /// Tells what the driver would refuse, if anything.
    fn problem(&self) -> Option<&'static str> {
        let Tiled { base, sizes, strides, tile, .. } = self;
        let rank = sizes.len();
        let problems = [
            (!(2..=5).contains(&rank) || tile.len() != rank || strides.len() + 1 != rank, "the rank"),
            (!base.is_multiple_of(16), "the address"),
            (sizes.iter().any(|&size| size == 0 || size > 1 << 32), "a size"),
            (
                strides.iter().any(|&stride| stride == 0 || !stride.is_multiple_of(16) || stride >= 1 << 40),
                "a stride",
            ),
            (tile.iter().any(|&side| side == 0 || side > 256), "a side of the box"),
            (![SWIZZLE, SWIZZLE / 2].contains(&self.row_bytes()), "the row of the box"),
        ];
        problems.into_iter().find_map(|(wrong, what)| wrong.then_some(what))
    }

    /// Checks the sizes.
    ///
    /// # Errors
    /// The driver would refuse them.
    pub(crate) fn check(&self) -> Result<()> {
        self.problem().map_or(Ok(()), |what| {
            let problem = format!(
                "a descriptor of {:?} at {:#x} has {what} that copies do not take",
                self.sizes, self.base
            );
            Err(CudaError::Size(format!("{problem}; use widths that are multiples of 8")))
        })
    }

    /// Encodes the descriptor.
    ///
    /// # Errors
    /// The sizes are none that copies take, or the driver refuses them.
    pub(crate) fn encode(&self, gpu: &Gpu) -> Result<TensorMap> {
        self.check()?;
        gpu.stream().bind()?;
        let wide = |values: &[usize]| values.iter().map(|&value| value as u64).collect::<Vec<u64>>();
        let (sizes, strides) = (wide(&self.sizes), wide(&self.strides));
        let tile: Vec<u32> = self.tile.iter().map(|&side| side as u32).collect();
        let ones = vec![1u32; tile.len()];
        let kind = match self.size {
            4 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let swizzle = match self.row_bytes() {
            SWIZZLE => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        };
        let mut map = TensorMap::NONE;
        // SAFETY: the map has the size and alignment of the driver's, which only computes it from the values; these live until
        // the call returns, and there are as many of them as the rank says.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                kind,
                sizes.len() as u32,
                self.base as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                ones.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        encoded.result().map_err(driver("describing a matrix for copies"))?;
        Ok(map)
    }
}

const _: () = assert!(
    size_of::<TensorMap>() == size_of::<sys::CUtensorMap>()
        && align_of::<TensorMap>() == align_of::<sys::CUtensorMap>()
);
