//! Compiled kernels, their arguments and how they are launched.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::{CudaFunction, CudaStream, result, sys};

use super::compile::{Source, cubin};
use super::error::{CudaError, Result, driver};
use super::stream::Stream;

/// Bytes of shared memory that a block has without asking.
const SHARED: u32 = 48 << 10;

/// Kernels that a test compiles: for each set of definitions, every entry must compile without spills and with at most
/// `max_registers` registers.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct KernelSpec {
    pub(crate) source: &'static Source,
    pub(crate) entries: &'static [&'static str],
    pub(crate) defines: &'static [&'static [(&'static str, i64)]],
    pub(crate) max_registers: u32,
}

/// A compiled kernel.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
    entry: &'static str,
    /// The most shared memory that has been asked for.
    shared: Arc<AtomicU32>,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    Ptr(u64),
    I32(i32),
    U32(u32),
    I64(i64),
    F32(f32),
    F64(f64),
}

impl Arg {
    /// A null pointer.
    pub(crate) const NULL: Arg = Arg::Ptr(0);
}

impl From<i32> for Arg {
    fn from(value: i32) -> Arg {
        Arg::I32(value)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Arg {
        Arg::U32(value)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Arg {
        Arg::F32(value)
    }
}

impl From<f64> for Arg {
    fn from(value: f64) -> Arg {
        Arg::F64(value)
    }
}

impl From<bool> for Arg {
    fn from(value: bool) -> Arg {
        Arg::I32(i32::from(value))
    }
}

/// Converts a size to what kernels take.
pub(crate) fn int(op: &str, size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| {
        CudaError::Size(format!("{op}: a size of {size} is more than a kernel takes; use a smaller batch"))
    })
}

/// Converts a number of blocks to what a launch takes.
pub(crate) fn blocks(op: &str, count: usize) -> Result<u32> {
    Ok(int(op, count)? as u32)
}

/// Converts sizes to arguments.
pub(crate) fn sizes<const N: usize>(op: &str, sizes: [usize; N]) -> Result<[Arg; N]> {
    let mut args = [Arg::I32(0); N];
    for (arg, size) in args.iter_mut().zip(sizes) {
        *arg = int(op, size)?.into();
    }
    Ok(args)
}

impl Kernel {
    pub(super) fn load(
        stream: &Stream,
        source: &'static Source,
        entry: &'static str,
        defines: &[(&'static str, i64)],
    ) -> Result<Kernel> {
        let image = cubin(source, defines, stream.capability())?;
        let (function, stream) = stream.load(image, entry)?;
        Ok(Kernel { function, stream, entry, shared: Arc::new(AtomicU32::new(SHARED)) })
    }

    /// Queues a launch of `grid` blocks of `block` threads; nothing for a grid without blocks.
    ///
    /// # Safety
    /// `args` are the kernel's parameters in number, type and order. For these sizes the kernel reads and writes only inside
    /// the buffers that they name, which the caller may read or write.
    pub(crate) unsafe fn launch(&self, grid: [u32; 3], block: u32, shared: u32, args: &[Arg]) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        if shared > self.shared.load(Ordering::Relaxed) {
            let which = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            self.function.set_attribute(which, shared as i32).map_err(driver("asking for shared memory"))?;
            self.shared.fetch_max(shared, Ordering::Relaxed);
        }
        let mut args = args.to_vec();
        let mut pointers: Vec<*mut c_void> = args
            .iter_mut()
            .map(|arg| match arg {
                Arg::Ptr(value) => (&raw mut *value).cast(),
                Arg::I32(value) => (&raw mut *value).cast(),
                Arg::U32(value) => (&raw mut *value).cast(),
                Arg::I64(value) => (&raw mut *value).cast(),
                Arg::F32(value) => (&raw mut *value).cast(),
                Arg::F64(value) => (&raw mut *value).cast(),
            })
            .collect();
        self.stream.context().bind_to_thread().map_err(driver("using the device"))?;
        // SAFETY: the function is loaded and the stream open. The pointers name values that live until the driver returns,
        // which has copied them then. The caller promises the rest.
        let launched = unsafe {
            result::launch_kernel(
                self.function.cu_function(),
                (grid[0], grid[1], grid[2]),
                (block, 1, 1),
                shared,
                self.stream.cu_stream(),
                &mut pointers,
            )
        };
        launched.map_err(|error| CudaError::Driver {
            code: format!("{:?} ({})", error.0, self.entry),
            doing: "starting a kernel",
        })
    }
}
