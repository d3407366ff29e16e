//! A device's context with its one stream, and the memory that both own.

use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaGraph, CudaStream, result, sys};
use cudarc::nvrtc::Ptx;

use super::error::{CudaError, Result, driver};

/// The size in bytes of an empty buffer: the driver has no allocation of no bytes.
const SMALLEST: usize = 16;

/// A context and the stream in which all work is queued.
pub(super) struct Stream {
    capability: (u32, u32),
    // Fields are dropped in this order: the context outlives its stream.
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

impl Stream {
    pub(super) fn open(ordinal: usize) -> Result<Stream> {
        let opening = driver("opening the device");
        let context = CudaContext::new(ordinal).map_err(&opening)?;
        // SAFETY: all memory is used in one stream only, whose order is the order of the calls.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(&opening)?;
        let (major, minor) = context.compute_capability().map_err(&opening)?;
        let opened = Stream { capability: (major as u32, minor as u32), stream, context };
        opened.keep_freed_memory()?;
        Ok(opened)
    }

    pub(super) fn name(&self) -> Result<String> {
        self.context.name().map_err(driver("opening the device"))
    }

    pub(super) fn attribute(&self, which: Attribute) -> Result<u32> {
        let value = self.context.attribute(which).map_err(driver("opening the device"))?;
        Ok(value.max(0) as u32)
    }

    pub(super) fn capability(&self) -> (u32, u32) {
        self.capability
    }

    /// Keeps freed memory with this process, for its next allocation.
    fn keep_freed_memory(&self) -> Result<()> {
        let pool = self.pool()?;
        let mut threshold = u64::MAX;
        let which = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is a u64, which lives until the call returns.
        unsafe { result::mem_pool::set_attribute(pool, which, (&raw mut threshold).cast()) }
            .map_err(driver("setting up the memory pool"))
    }

    /// The pool that allocations come from.
    fn pool(&self) -> Result<sys::CUmemoryPool> {
        self.bind()?;
        // SAFETY: the device is that of a context that is open.
        unsafe { result::device::get_mem_pool(self.context.cu_device()) }
            .map_err(driver("asking for the memory pool"))
    }

    /// Bytes of memory that are free, and bytes in all. Waits for the queue, which may free some.
    pub(super) fn memory(&self) -> Result<(usize, usize)> {
        self.synchronize()?;
        let pool = self.pool()?;
        let asking = driver("asking for free memory");
        let (free, total) = self.context.mem_get_info().map_err(&asking)?;
        let of_pool = |which| {
            let mut bytes = 0u64;
            // SAFETY: the attribute is a u64, which lives until the call returns.
            unsafe { result::mem_pool::get_attribute(pool, which, (&raw mut bytes).cast()) }
                .map(|()| bytes as usize)
                .map_err(&asking)
        };
        // Freed memory still belongs to the pool, for the next allocation.
        let reserved = of_pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = of_pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok((free + reserved.saturating_sub(used), total))
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        let stream = self.bind()?;
        // SAFETY: the stream is open as long as `self`.
        unsafe { result::stream::synchronize(stream) }.map_err(driver("waiting for the device"))
    }

    /// Returns true when everything queued has run.
    pub(super) fn is_idle(&self) -> Result<bool> {
        let stream = self.bind()?;
        // SAFETY: the stream is open as long as `self`.
        match unsafe { sys::cuStreamQuery(stream) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => code.result().map(|()| true).map_err(driver("asking the stream")),
        }
    }

    /// Makes this thread use the device. Returns the stream.
    pub(super) fn bind(&self) -> Result<sys::CUstream> {
        self.context.bind_to_thread().map_err(driver("using the device"))?;
        Ok(self.stream.cu_stream())
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        let stream = self.bind()?;
        // SAFETY: the stream is open; a buffer is written before it is read.
        match unsafe { result::malloc_async(stream, bytes.max(SMALLEST)) } {
            Ok(ptr) => Ok(ptr),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = self.memory()?;
                Err(CudaError::OutOfMemory { wanted: bytes, free, total })
            }
            Err(error) => Err(driver("allocating memory")(error)),
        }
    }

    pub(super) fn free(&self, ptr: u64) {
        let Ok(stream) = self.bind() else { return };
        // SAFETY: `ptr` came from `allocate`, and its owner is being dropped; work queued before still finds it. A failure
        // has nowhere to be reported, and the device is unusable then.
        let _ = unsafe { result::free_async(ptr, stream) };
    }

    /// Loads the kernel `entry` from machine code.
    pub(super) fn load(&self, image: Vec<u8>, entry: &str) -> Result<(CudaFunction, Arc<CudaStream>)> {
        self.bind()?;
        let module = self.context.load_module(Ptx::from_binary(image)).map_err(driver("loading a kernel"))?;
        let function = module.load_function(entry).map_err(driver("finding a kernel"))?;
        Ok((function, self.stream.clone()))
    }

    /// Records the work that `queue` queues instead of running it.
    pub(super) fn record<E: From<CudaError>>(
        &self,
        queue: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<CudaGraph, E> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(driver("starting to record a graph"))?;
        let queued = queue();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream.end_capture(flags).map_err(driver("recording a graph"));
        queued?;
        Ok(graph?.ok_or(CudaError::Size("a graph of nothing was recorded".to_owned()))?)
    }
}
