//! Kernels: their text, their compiled form, and how they are started.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, result, sys};
use cudarc::nvrtc::Ptx;

use super::buf::{Element, View, ViewMut};
use super::compile::cubin;
use super::device::Gpu;
use super::error::{CudaError, Result, driver};

/// Shared memory that a block has without asking.
const SHARED: u32 = 48 << 10;

/// The text of some kernels.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
}

/// Kernels to be compiled in a test: for each set of definitions, every entry must compile without spills and with no more
/// registers than this.
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
    gpu_stream: Arc<CudaStream>,
    entry: &'static str,
    /// The most shared memory that was asked for.
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

impl<T: Element> From<View<'_, T>> for Arg {
    fn from(view: View<'_, T>) -> Arg {
        Arg::Ptr(view.ptr())
    }
}

impl<T: Element> From<&ViewMut<'_, T>> for Arg {
    fn from(view: &ViewMut<'_, T>) -> Arg {
        Arg::Ptr(view.ptr())
    }
}

impl<T: Element> From<Option<View<'_, T>>> for Arg {
    /// A null pointer for none.
    fn from(view: Option<View<'_, T>>) -> Arg {
        Arg::Ptr(view.map_or(0, |view| view.ptr()))
    }
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

/// A size as kernels take it.
pub(crate) fn int(op: &str, size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| {
        CudaError::Size(format!("{op}: a size of {size} is more than a kernel takes; use a smaller batch"))
    })
}

impl Kernel {
    pub(super) fn load(
        gpu: &Gpu,
        context: &Arc<CudaContext>,
        source: &'static Source,
        entry: &'static str,
        defines: &[(&'static str, i64)],
    ) -> Result<Kernel> {
        let image = cubin(source, defines, gpu.capability())?;
        let module = context.load_module(Ptx::from_binary(image)).map_err(driver("loading a kernel"))?;
        let function = module.load_function(entry).map_err(driver("finding a kernel"))?;
        Ok(Kernel { function, gpu_stream: gpu.stream(), entry, shared: Arc::new(AtomicU32::new(SHARED)) })
    }

    /// Starts `grid` blocks of `block` threads; nothing for a grid without blocks.
    ///
    /// # Safety
    /// `args` are the kernel's parameters in number, type and order, and for these sizes the kernel reads and writes inside
    /// the buffers that they name only, which the caller may read or write.
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
        self.gpu_stream.context().bind_to_thread().map_err(driver("using the device"))?;
        // SAFETY: the function is loaded, the stream open; the pointers name values that live until the driver has copied
        // them, which is when it returns; the rest is promised by the caller.
        let launched = unsafe {
            result::launch_kernel(
                self.function.cu_function(),
                (grid[0], grid[1], grid[2]),
                (block, 1, 1),
                shared,
                self.gpu_stream.cu_stream(),
                &mut pointers,
            )
        };
        launched.map_err(|error| CudaError::Driver {
            code: format!("{:?} ({})", error.0, self.entry),
            doing: "starting a kernel",
        })
    }
}
