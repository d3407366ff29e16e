//! A GPU with its stream, its compiled kernels and cuBLASLt.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::blas::Blas;
use super::compile::{Define, Source};
use super::detect::{Detection, detect};
use super::error::{CudaError, Result};
use super::expert_kernels::ExpertKernels;
use super::kernel::Kernel;
use super::stream::Stream;

/// A GPU: its context, one stream that all ops are queued in, compiled kernels and cuBLASLt. A clone is the same GPU.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    ordinal: usize,
    name: String,
    multiprocessors: u32,
    shared_memory: u32,
    expert_kernels: ExpertKernels,
    // Fields are dropped in this order: the stream and its context outlive their users.
    blas: Mutex<Option<Blas>>,
    kernels: Mutex<HashMap<String, Kernel>>,
    stream: Stream,
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
    /// There is no driver or no such device, or [`ExpertKernels::VARIABLE`] names no kernels.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        let expert_kernels = ExpertKernels::from_env()?;
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
        let stream = Stream::open(ordinal)?;
        Ok(Gpu(Arc::new(Inner {
            ordinal,
            expert_kernels,
            multiprocessors: stream.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_memory: stream
                .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            name: stream.name()?,
            kernels: Mutex::default(),
            blas: Mutex::default(),
            stream,
        })))
    }

    /// The number of the device.
    pub fn ordinal(&self) -> usize {
        self.0.ordinal
    }

    /// The name of the device.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Compute capability, such as (9, 0).
    pub fn capability(&self) -> (u32, u32) {
        self.stream().capability()
    }

    /// The number of blocks that run at once when each fills a multiprocessor.
    pub(crate) fn multiprocessors(&self) -> u32 {
        self.0.multiprocessors
    }

    /// Bytes of shared memory that a block may ask for.
    pub(crate) fn shared_memory(&self) -> u32 {
        self.0.shared_memory
    }

    /// The kernels of experts that models take on this device: those that [`ExpertKernels::VARIABLE`] named when it was opened.
    pub fn expert_kernels(&self) -> ExpertKernels {
        self.0.expert_kernels
    }

    /// Returns the bytes of memory that are free, and the bytes in all. It waits for the queue, which may free some.
    ///
    /// # Errors
    /// The device fails.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.stream().memory()
    }

    /// Waits until everything queued has run.
    ///
    /// # Errors
    /// An op that was queued failed.
    pub fn synchronize(&self) -> Result<()> {
        self.stream().synchronize()
    }

    /// Returns the kernel `entry` of `source` with these definitions. It is compiled when it is first asked for.
    pub(crate) fn kernel(
        &self,
        source: &'static Source,
        entry: &'static str,
        defines: &[Define],
    ) -> Result<Kernel> {
        let mut key = format!("{}/{entry}", source.name);
        for (name, value) in defines {
            key.push_str(&format!(" {name}={value}"));
        }
        let mut kernels = self.0.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&key) {
            return Ok(kernel.clone());
        }
        let kernel = Kernel::load(self.stream(), source, entry, defines)?;
        kernels.insert(key, kernel.clone());
        Ok(kernel)
    }

    /// Runs `with` on cuBLASLt.
    pub(super) fn blas<R>(&self, with: impl FnOnce(&mut Blas, &Stream) -> Result<R>) -> Result<R> {
        let stream = self.stream();
        stream.bind()?;
        let mut blas = self.0.blas.lock().unwrap_or_else(PoisonError::into_inner);
        let blas = match &mut *blas {
            Some(blas) => blas,
            none => none.insert(Blas::new(stream)?),
        };
        with(blas, stream)
    }

    pub(super) fn stream(&self) -> &Stream {
        &self.0.stream
    }
}
