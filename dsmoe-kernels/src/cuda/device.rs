//! A GPU with its one stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaGraph, CudaStream, result, sys};

use super::blas::Blas;
use super::buf::{Element, GpuBuf};
use super::detect::{Detection, detect};
use super::error::{CudaError, Result, driver};
use super::kernel::{Kernel, Source};

/// Bytes of a buffer of no values: the driver has no allocation of nothing.
const SMALLEST: usize = 16;

/// A GPU: its context, one stream that all ops are queued in, compiled kernels and cuBLASLt. Clones are the same.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    ordinal: usize,
    name: String,
    capability: (u32, u32),
    multiprocessors: u32,
    shared_memory: u32,
    // In the order that they are given back in: the context goes last.
    blas: Mutex<Option<Blas>>,
    kernels: Mutex<HashMap<String, Kernel>>,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} ({})", self.0.ordinal, self.0.name)
    }
}

impl Gpu {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// There is no driver or no such device.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        let found = detect();
        let missing = |problem| CudaError::Device { ordinal, problem };
        if let Some(problem) = found.problem() {
            return Err(missing(problem));
        }
        if let Detection::Devices(devices) = &found
            && ordinal >= devices.len()
        {
            let last = devices.len() - 1;
            return Err(missing(format!("the last device is cuda:{last}; see `dsmoe doctor`")));
        }
        let opening = driver("opening the device");
        let context = CudaContext::new(ordinal).map_err(&opening)?;
        // SAFETY: all memory is used in one stream only, whose order is the order of the calls.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(&opening)?;
        let (major, minor) = context.compute_capability().map_err(&opening)?;
        let attribute = |which| context.attribute(which).map(|value| value.max(0) as u32).map_err(&opening);
        let gpu = Gpu(Arc::new(Inner {
            ordinal,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            name: context.name().map_err(&opening)?,
            capability: (major as u32, minor as u32),
            context,
            stream,
            kernels: Mutex::default(),
            blas: Mutex::default(),
        }));
        gpu.keep_freed_memory()?;
        Ok(gpu)
    }

    /// What is freed stays with this process for the next allocation.
    fn keep_freed_memory(&self) -> Result<()> {
        let pool = self.pool()?;
        let mut threshold = u64::MAX;
        let which = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is a u64, which lives until the call returns.
        unsafe { result::mem_pool::set_attribute(pool, which, (&raw mut threshold).cast()) }
            .map_err(driver("setting up the memory pool"))
    }

    /// Where allocations come from.
    fn pool(&self) -> Result<sys::CUmemoryPool> {
        self.bind()?;
        // SAFETY: the device is that of a context that is open.
        unsafe { result::device::get_mem_pool(self.0.context.cu_device()) }
            .map_err(driver("asking for the memory pool"))
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.0.ordinal
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Compute capability, such as (9, 0).
    pub fn capability(&self) -> (u32, u32) {
        self.0.capability
    }

    /// How many blocks run at once, if one fills a multiprocessor.
    pub(crate) fn multiprocessors(&self) -> u32 {
        self.0.multiprocessors
    }

    /// Bytes of shared memory that a block may ask for.
    pub(crate) fn shared_memory(&self) -> u32 {
        self.0.shared_memory
    }

    /// Bytes of memory that are free, and all; waits for all that is queued, which may free some.
    ///
    /// # Errors
    /// The device fails.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.synchronize()?;
        let pool = self.pool()?;
        let asking = driver("asking for free memory");
        let (free, total) = self.0.context.mem_get_info().map_err(&asking)?;
        let of_pool = |which| {
            let mut bytes = 0u64;
            // SAFETY: the attribute is a u64, which lives until the call returns.
            unsafe { result::mem_pool::get_attribute(pool, which, (&raw mut bytes).cast()) }
                .map(|()| bytes as usize)
                .map_err(&asking)
        };
        // What was freed is the pool's still, for the next allocation.
        let reserved = of_pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = of_pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok((free + reserved.saturating_sub(used), total))
    }

    /// A buffer of zeros.
    ///
    /// # Errors
    /// The memory does not suffice.
    pub fn zeros<T: Element>(&self, len: usize) -> Result<GpuBuf<T>> {
        GpuBuf::zeros(self, len)
    }

    /// A buffer of `values`.
    ///
    /// # Errors
    /// The memory does not suffice.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<GpuBuf<T>> {
        let mut buf = GpuBuf::zeros(self, values.len())?;
        buf.upload_from(values)?;
        Ok(buf)
    }

    /// Waits for all that is queued.
    ///
    /// # Errors
    /// Something that was queued has failed.
    pub fn synchronize(&self) -> Result<()> {
        let stream = self.bind()?;
        // SAFETY: the stream is open as long as `self`.
        unsafe { result::stream::synchronize(stream) }.map_err(driver("waiting for the device"))
    }

    /// Records what `queue` queues instead of running it. It must not wait for the device, and what it uses for the
    /// first time must have been used before: kernels are compiled, products chosen.
    /// The buffers that are used must live as long as the graph.
    ///
    /// # Errors
    /// Those of `queue`; the device fails.
    fn record<E: From<CudaError>>(
        &self,
        queue: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.0.stream.begin_capture(mode).map_err(driver("starting to record a graph"))?;
        let queued = queue();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.0.stream.end_capture(flags).map_err(driver("recording a graph"));
        queued?;
        let graph = graph?.ok_or(CudaError::Size("a graph of nothing was recorded".to_owned()))?;
        Ok(Graph { graph, gpu: self.clone() })
    }

    /// The kernel `entry` of `source` with these definitions, compiled when it is first asked for.
    pub(crate) fn kernel(
        &self,
        source: &'static Source,
        entry: &'static str,
        defines: &[(&'static str, i64)],
    ) -> Result<Kernel> {
        let mut key = format!("{}/{entry}", source.name);
        for (name, value) in defines {
            key.push_str(&format!(" {name}={value}"));
        }
        let mut kernels = self.0.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&key) {
            return Ok(kernel.clone());
        }
        self.bind()?;
        let kernel = Kernel::load(self, &self.0.context, source, entry, defines)?;
        kernels.insert(key, kernel.clone());
        Ok(kernel)
    }

    /// Runs `with` on cuBLASLt.
    pub(super) fn blas<R>(&self, with: impl FnOnce(&mut Blas) -> Result<R>) -> Result<R> {
        self.bind()?;
        let mut blas = self.0.blas.lock().unwrap_or_else(PoisonError::into_inner);
        if blas.is_none() {
            *blas = Some(Blas::new(self)?);
        }
        match &mut *blas {
            Some(blas) => with(blas),
            None => Err(CudaError::Size("cuBLASLt was not opened".to_owned())),
        }
    }

    pub(super) fn stream(&self) -> Arc<CudaStream> {
        self.0.stream.clone()
    }

    /// Makes this thread use the device; returns the stream.
    pub(super) fn bind(&self) -> Result<sys::CUstream> {
        self.0.context.bind_to_thread().map_err(driver("using the device"))?;
        Ok(self.0.stream.cu_stream())
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        let stream = self.bind()?;
        // SAFETY: the stream is open; the memory is written before it is read (`GpuBuf::zeros`).
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
        // SAFETY: `ptr` came from `allocate`, and its owner is being dropped. What was queued before still finds it. A
        // device that failed is of no use to anybody: there is no one to tell.
        let _ = unsafe { result::free_async(ptr, stream) };
    }
}

/// Recorded ops, to run again over the same buffers.
struct Graph {
    graph: CudaGraph,
    gpu: Gpu,
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

// SAFETY: a graph may be launched from any thread that uses its device, which `launch` sees to; launching needs `&mut`.
unsafe impl Send for Graph {}
// SAFETY: all that is done with a shared graph is to format it.
unsafe impl Sync for Graph {}

impl Graph {
    fn launch(&mut self) -> Result<()> {
        self.gpu.bind()?;
        self.graph.launch().map_err(driver("running a graph"))
    }
}

/// A graph with what it works on: the ops of [`Recorded::run`] are recorded the second time and replayed after. Ops that
/// cannot be recorded are queued one by one every time.
pub struct Recorded<W> {
    /// What the ops use. They name its buffers, so none of them may be replaced once the ops are recorded.
    pub work: W,
    state: State,
}

#[derive(Debug, Default)]
enum State {
    /// Nothing has run.
    #[default]
    New,
    /// Kernels are compiled and products chosen.
    Ready,
    Recorded(Graph),
    /// The driver refused to record.
    Refused,
}

impl<W> Recorded<W> {
    /// Nothing is recorded yet.
    pub fn new(work: W) -> Recorded<W> {
        Recorded { work, state: State::New }
    }

    /// Runs the ops that `queue` queues over the work: those of the first call, or any since, must be the same.
    ///
    /// # Errors
    /// Those of `queue`; the device fails.
    pub fn run<E: From<CudaError>>(
        &mut self,
        gpu: &Gpu,
        mut queue: impl FnMut(&mut W) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let work = &mut self.work;
        match &mut self.state {
            State::Recorded(graph) => Ok(graph.launch()?),
            State::Refused => queue(work),
            State::New => {
                queue(work)?;
                self.state = State::Ready;
                Ok(())
            }
            State::Ready => match gpu.record(|| queue(work)) {
                Ok(mut graph) => {
                    graph.launch()?;
                    self.state = State::Recorded(graph);
                    Ok(())
                }
                Err(_) => {
                    // If it is the ops that fail, they say so now.
                    self.state = State::Refused;
                    queue(work)
                }
            },
        }
    }

    /// Whether the ops are replayed.
    pub fn is_recorded(&self) -> bool {
        matches!(self.state, State::Recorded(_))
    }

    /// Forgets what was recorded; the work may then change.
    pub fn forget(&mut self) {
        self.state = State::New;
    }
}

impl<W: Default> Default for Recorded<W> {
    fn default() -> Self {
        Recorded::new(W::default())
    }
}

impl<W: std::fmt::Debug> std::fmt::Debug for Recorded<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorded").field("work", &self.work).finish_non_exhaustive()
    }
}
