//! Compiled kernels, their arguments and how they are launched.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::{CudaFunction, CudaStream, result, sys};

use super::compile::{Define, Source, cubin};
use super::device::Gpu;
use super::error::{CudaError, Result, driver};
use super::stream::Stream;

/// Bytes of shared memory that a block has without asking.
const SHARED: u32 = 48 << 10;

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
    /// A size, which a kernel takes as an i32.
    Size(usize),
    I32(i32),
    I64(i64),
    F32(f32),
    F64(f64),
}

impl Arg {
    /// A null pointer.
    pub(crate) const NULL: Arg = Arg::Ptr(0);
}

impl From<usize> for Arg {
    fn from(value: usize) -> Arg {
        Arg::Size(value)
    }
}

impl From<bool> for Arg {
    fn from(value: bool) -> Arg {
        Arg::I32(i32::from(value))
    }
}

/// The blocks of a launch, the threads of each, and the bytes of shared memory that each asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) blocks: [usize; 3],
    pub(crate) threads: u32,
    pub(crate) shared: u32,
}

impl Grid {
    /// Makes a row of blocks without shared memory.
    pub(crate) fn row(blocks: usize, threads: u32) -> Grid {
        Grid::plane(blocks, 1, threads)
    }

    /// Makes a plane of blocks without shared memory.
    pub(crate) fn plane(x: usize, y: usize, threads: u32) -> Grid {
        Grid { blocks: [x, y, 1], threads, shared: 0 }
    }
}

/// A launch that can be queued, or looked at.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) source: &'static Source,
    pub(crate) entry: &'static str,
    pub(crate) defines: Vec<Define>,
    pub(crate) grid: Grid,
    pub(crate) args: Vec<Arg>,
}

impl Call {
    /// Queues the launch.
    ///
    /// # Safety
    /// The caller promises the same as for [`Source::launch`].
    pub(crate) unsafe fn queue(&self, gpu: &Gpu) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.source.launch(gpu, self.entry, &self.defines, self.grid, &self.args) }
    }
}

impl Source {
    /// Queues a launch of the kernel `entry` with these definitions; nothing for a grid without blocks.
    ///
    /// # Safety
    /// `args` are the kernel's parameters in number, type and order. For these sizes the kernel reads and writes only inside
    /// the buffers that they name, which the caller may read or write.
    pub(crate) unsafe fn launch(
        &'static self,
        gpu: &Gpu,
        entry: &'static str,
        defines: &[Define],
        grid: Grid,
        args: &[Arg],
    ) -> Result<()> {
        let kernel = gpu.kernel(self, entry, defines)?;
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(grid, args) }
    }

    /// Queues a launch of the kernel `entry` whose two parameters are structs.
    ///
    /// # Safety
    /// The caller promises the same as for [`Source::launch`]. `one` and `other` are the kernel's parameters.
    pub(crate) unsafe fn launch_structs<A: Clone, B: Clone>(
        &'static self,
        gpu: &Gpu,
        entry: &'static str,
        defines: &[Define],
        grid: Grid,
        (one, other): (&A, &B),
    ) -> Result<()> {
        let kernel = gpu.kernel(self, entry, defines)?;
        let (mut one, mut other) = (one.clone(), other.clone());
        let mut pointers = [(&raw mut one).cast(), (&raw mut other).cast()];
        // SAFETY: the caller's promise; both live until the driver has copied them.
        unsafe { kernel.start(grid, &mut pointers) }
    }
}

impl Kernel {
    pub(super) fn load(
        stream: &Stream,
        source: &'static Source,
        entry: &'static str,
        defines: &[Define],
    ) -> Result<Kernel> {
        let image = cubin(source, defines, stream.capability())?;
        let (function, stream) = stream.load(image, entry)?;
        Ok(Kernel { function, stream, entry, shared: Arc::new(AtomicU32::new(SHARED)) })
    }

    /// Converts a size to what kernels take.
    fn int(&self, size: usize) -> Result<i32> {
        i32::try_from(size).map_err(|_| {
            let entry = self.entry;
            CudaError::Size(format!(
                "{entry}: a size of {size} is more than a kernel takes; use a smaller batch"
            ))
        })
    }

    /// Queues a launch.
    ///
    /// # Safety
    /// The caller promises the same as for [`Source::launch`].
    unsafe fn launch(&self, grid: Grid, args: &[Arg]) -> Result<()> {
        let mut args = args.to_vec();
        for arg in &mut args {
            if let Arg::Size(size) = *arg {
                *arg = Arg::I32(self.int(size)?);
            }
        }
        let mut pointers: Vec<*mut c_void> = args
            .iter_mut()
            .map(|arg| match arg {
                Arg::Ptr(value) => (&raw mut *value).cast(),
                Arg::Size(value) => (&raw mut *value).cast(),
                Arg::I32(value) => (&raw mut *value).cast(),
                Arg::I64(value) => (&raw mut *value).cast(),
                Arg::F32(value) => (&raw mut *value).cast(),
                Arg::F64(value) => (&raw mut *value).cast(),
            })
            .collect();
        // SAFETY: the caller's promise; the pointers name `args`.
        unsafe { self.start(grid, &mut pointers) }
    }

    /// Queues a launch with parameters at `pointers`.
    ///
    /// # Safety
    /// The caller promises the same as for [`Source::launch`], and that the pointers name values of the parameters' types.
    unsafe fn start(&self, grid: Grid, pointers: &mut [*mut c_void]) -> Result<()> {
        let Grid { blocks: [x, y, z], threads, shared } = grid;
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let blocks = (self.int(x)? as u32, self.int(y)? as u32, self.int(z)? as u32);
        if shared > self.shared.load(Ordering::Relaxed) {
            let which = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            self.function.set_attribute(which, shared as i32).map_err(driver("asking for shared memory"))?;
            self.shared.fetch_max(shared, Ordering::Relaxed);
        }
        self.stream.context().bind_to_thread().map_err(driver("using the device"))?;
        // SAFETY: the function is loaded and the stream open. The pointers name values that live until the driver returns,
        // which has copied them then. The caller promises the rest.
        let launched = unsafe {
            result::launch_kernel(
                self.function.cu_function(),
                blocks,
                (threads, 1, 1),
                shared,
                self.stream.cu_stream(),
                pointers,
            )
        };
        launched.map_err(|error| CudaError::Driver {
            code: format!("{:?} ({})", error.0, self.entry),
            doing: "starting a kernel",
        })
    }
}
