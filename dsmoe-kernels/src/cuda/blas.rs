//! cuBLASLt. The algorithm of every shape is chosen once.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::detect::libraries;
use super::error::{CudaError, Result};
use super::stream::Stream;

/// Bytes that algorithms may work in, as NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// A product `out [m, n] = a [m, k] b [k, n]` of row-major matrices without gaps. A transposed operand is stored as `[k, m]`
/// or `[n, k]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Gemm {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) a_transposed: bool,
    pub(super) b_transposed: bool,
    /// Adds to the result instead of setting it.
    pub(super) add: bool,
}

impl Gemm {
    /// The lengths of stored rows of `a` and `b`.
    fn strides(&self) -> [usize; 2] {
        [if self.a_transposed { self.m } else { self.k }, if self.b_transposed { self.k } else { self.n }]
    }
}

/// A product, with all that the choice of an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    gemm: Gemm,
    f32_out: bool,
    /// The alignments of the three matrices in bytes.
    alignments: [u32; 3],
}

/// cuBLASLt's description of a product, and its algorithm.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    /// None when cuBLASLt has no algorithm for the product.
    algorithm: Option<sys::cublasLtMatmulAlgo_t>,
}

pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    plans: HashMap<Shape, Plan>,
}

// SAFETY: the handle and the descriptions belong to this value alone, and cuBLASLt may be called from any thread.
unsafe impl Send for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        for plan in self.plans.values() {
            for layout in [plan.a, plan.b, plan.out] {
                // SAFETY: made in `Plan::new`, destroyed here only.
                let _ = unsafe { result::destroy_matrix_layout(layout) };
            }
            // SAFETY: as above.
            let _ = unsafe { result::destroy_matmul_desc(plan.product) };
        }
        // SAFETY: made in `Blas::new`, destroyed here only. The workspace goes with the context.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn refused(gemm: Gemm) -> impl Fn(CublasError) -> CudaError {
    move |error| CudaError::Blas { code: format!("{:?}", error.0), shape: format!("{gemm:?}") }
}

/// Returns the largest power of two up to 256 that divides `value`; 256 for 0.
fn alignment(value: u64) -> u32 {
    1 << value.trailing_zeros().min(8)
}

impl Blas {
    pub(super) fn new(stream: &Stream) -> Result<Blas> {
        if !libraries().cublaslt {
            return Err(CudaError::no_cublaslt());
        }
        let handle = result::create_handle().map_err(|error| CudaError::Blas {
            code: format!("{:?}", error.0),
            shape: "at its start".to_owned(),
        })?;
        let workspace = stream.allocate(WORKSPACE)?;
        Ok(Blas { handle, workspace, plans: HashMap::new() })
    }

    /// Queues `out = a b` or, with [`Gemm::add`], `out += a b`. Returns false when cuBLASLt has no algorithm for it.
    ///
    /// # Safety
    /// The pointers name buffers of the matrices that `gemm` describes, on the device of `stream`.
    pub(super) unsafe fn gemm(
        &mut self,
        stream: &Stream,
        gemm: Gemm,
        f32_out: bool,
        [out, a, b]: [u64; 3],
    ) -> Result<bool> {
        let out_size = if f32_out { 4 } else { 2 };
        let aligned = |ptr: u64, ld: usize, size: u64| alignment(ptr | (ld as u64 * size));
        let [lda, ldb] = gemm.strides();
        let alignments = [aligned(out, gemm.n, out_size), aligned(a, lda, 2), aligned(b, ldb, 2)];
        let shape = Shape { gemm, f32_out, alignments };
        if !self.plans.contains_key(&shape) {
            let plan = Plan::new(self.handle, shape)?;
            self.plans.insert(shape, plan);
        }
        let Some(Plan { product, a: a_of, b: b_of, out: out_of, algorithm: Some(algorithm) }) =
            self.plans.get(&shape)
        else {
            return Ok(false);
        };
        let (alpha, beta) = (1.0f32, if gemm.add { 1.0f32 } else { 0.0 });
        let ptr = |address: u64| address as *mut c_void;
        // SAFETY: the descriptions live in `plans`, the scalars until the call returns. The caller promises the buffers. The
        // workspace belongs to `self`, and the stream orders its uses.
        let queued = unsafe {
            result::matmul(
                self.handle,
                *product,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                // A row-major matrix is its transpose stored by columns, so the second operand comes first.
                ptr(b),
                *b_of,
                ptr(a),
                *a_of,
                ptr(out),
                *out_of,
                ptr(out),
                *out_of,
                algorithm,
                ptr(self.workspace),
                WORKSPACE,
                stream.bind()?.cast(),
            )
        };
        queued.map_err(refused(gemm))?;
        Ok(true)
    }
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, shape: Shape) -> Result<Plan> {
        let Shape { gemm, f32_out, alignments } = shape;
        let ([lda, ldb], failed) = (gemm.strides(), refused(gemm));
        let (half, single) = (sys::cudaDataType_t::CUDA_R_16BF, sys::cudaDataType_t::CUDA_R_32F);
        let product = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, single)
            .map_err(&failed)?;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        for (which, transposed) in [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, gemm.b_transposed),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, gemm.a_transposed),
        ] {
            let value = i32::from(transposed);
            // SAFETY: the attribute is an i32, which lives until the call returns.
            unsafe { result::set_matmul_desc_attribute(product, which, (&raw const value).cast(), 4) }
                .map_err(&failed)?;
        }
        // cuBLASLt stores columns: rows and columns change places.
        let layout = |kind, rows: usize, cols: usize, ld: usize| {
            result::create_matrix_layout(kind, rows as u64, cols as u64, ld as i64).map_err(&failed)
        };
        let Gemm { m, n, k, a_transposed, b_transposed, .. } = gemm;
        let a = if a_transposed { layout(half, m, k, lda)? } else { layout(half, k, m, lda)? };
        let b = if b_transposed { layout(half, k, n, ldb)? } else { layout(half, n, k, ldb)? };
        let out = layout(if f32_out { single } else { half }, n, m, n)?;
        use sys::cublasLtMatmulPreferenceAttributes_t as Wish;
        let wishes = result::create_matmul_pref().map_err(&failed)?;
        let (workspace, room) = (WORKSPACE as u64, Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
        // SAFETY: the attribute is a u64, which lives until the call returns.
        unsafe { result::set_matmul_pref_attribute(wishes, room, (&raw const workspace).cast(), 8) }
            .map_err(&failed)?;
        let [of_out, of_a, of_b] = alignments;
        let aligned = [
            (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, of_b),
            (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, of_a),
            (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, of_out),
            (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, of_out),
        ];
        for (which, bytes) in aligned {
            // SAFETY: the attribute is a u32, which lives until the call returns.
            unsafe { result::set_matmul_pref_attribute(wishes, which, (&raw const bytes).cast(), 4) }
                .map_err(&failed)?;
        }
        // SAFETY: all descriptions were made above.
        let chosen = unsafe { result::get_matmul_algo_heuristic(handle, product, b, a, out, out, wishes) };
        // SAFETY: made above, not used any more.
        let _ = unsafe { result::destroy_matmul_pref(wishes) };
        let algorithm = match chosen {
            Ok(chosen) => Some(chosen.algo),
            Err(error) if error.0 == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED => None,
            Err(error) => return Err(failed(error)),
        };
        Ok(Plan { product, a, b, out, algorithm })
    }
}
