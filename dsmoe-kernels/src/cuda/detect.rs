//! Detection of the driver, devices and libraries of CUDA. Nothing here fails or panics if they are missing.

use std::ffi::OsString;
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{result, sys as driver};
use cudarc::{cublaslt, nvrtc};

use super::error::CudaError;

/// The outcome of looking for devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detection {
    /// No driver is installed.
    NoDriver,
    /// The driver finds no device, or cannot use it. Holds the name of its code.
    NoDevice(String),
    /// The driver lacks functions that are needed. Holds the first one.
    Broken(String),
    /// The devices, by their number.
    Devices(Vec<DeviceInfo>),
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Bytes of memory.
    pub memory: usize,
}

/// The libraries of CUDA that are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Libraries {
    /// The driver, libcuda.
    pub driver: bool,
    /// The run-time compiler, libnvrtc.
    pub nvrtc: bool,
    /// Matrix products, libcublasLt.
    pub cublaslt: bool,
}

impl Detection {
    /// Returns why there is no device, and help, in one line; none if there is a device.
    pub fn problem(&self) -> Option<String> {
        match self {
            Detection::NoDriver => {
                Some("no NVIDIA driver is installed; install it, or use the CPU".to_owned())
            }
            Detection::NoDevice(code) if code == "CUDA_ERROR_STUB_LIBRARY" => Some(
                "the driver's library is the toolkit's stub; remove lib64/stubs from LD_LIBRARY_PATH"
                    .to_owned(),
            ),
            Detection::NoDevice(code) => {
                Some(format!("the driver finds no device ({code}); see `nvidia-smi`, or use the CPU"))
            }
            Detection::Broken(what) => Some(format!(
                "the driver cannot be used ({what}); install one of CUDA 13 or newer, or use the CPU"
            )),
            Detection::Devices(_) => None,
        }
    }
}

impl Libraries {
    /// Returns a line with help for each missing library. [`Detection::problem`] reports the driver.
    pub fn problems(&self) -> Vec<String> {
        let each = [(self.nvrtc, CudaError::no_nvrtc()), (self.cublaslt, CudaError::no_cublaslt())];
        each.into_iter().filter(|(found, _)| !found).map(|(_, error)| error.to_string()).collect()
    }
}

/// Looks for the libraries once, first in `DSMOE_CUDA_LIB_DIR` and `DSMOE_NVRTC_DIR`.
pub fn libraries() -> Libraries {
    static FOUND: OnceLock<Libraries> = OnceLock::new();
    *FOUND.get_or_init(|| {
        preload();
        // SAFETY: opening the driver's library runs its initialisers, which do not depend on this program.
        let driver = unsafe { driver::is_culib_present() };
        // SAFETY: as above.
        let nvrtc = unsafe { nvrtc::sys::is_culib_present() };
        // SAFETY: as above.
        let cublaslt = unsafe { cublaslt::sys::is_culib_present() };
        Libraries { driver, nvrtc, cublaslt }
    })
}

/// Looks for devices once.
pub fn detect() -> Detection {
    static FOUND: OnceLock<Detection> = OnceLock::new();
    FOUND.get_or_init(ask).clone()
}

fn ask() -> Detection {
    if !libraries().driver {
        return Detection::NoDriver;
    }
    match guarded(devices) {
        Ok(Ok(devices)) if !devices.is_empty() => Detection::Devices(devices),
        Ok(Ok(_)) => Detection::NoDevice("CUDA_ERROR_NO_DEVICE".to_owned()),
        // The code alone: asking the driver for its text may panic.
        Ok(Err(error)) => Detection::NoDevice(format!("{:?}", error.0)),
        Err(missing) => Detection::Broken(missing),
    }
}

/// Returns the result of `ask`, or the first line of its panic. The bindings panic if a library lacks a symbol, and the panic
/// hook would print that.
pub(super) fn guarded<R>(ask: impl FnOnce() -> R + panic::UnwindSafe) -> Result<R, String> {
    // One thread at a time, so that the restored hook is not the silent one of another thread.
    static HOOK: Mutex<()> = Mutex::new(());
    let _one = HOOK.lock().unwrap_or_else(PoisonError::into_inner);
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let asked = panic::catch_unwind(ask);
    panic::set_hook(hook);
    asked.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default();
        text.lines().next().unwrap_or_default().to_owned()
    })
}

/// Returns the CUDA version of the driver; none if it finds no device.
pub fn driver_version() -> Option<(i32, i32)> {
    let Detection::Devices(_) = detect() else { return None };
    guarded(|| {
        let mut version = 0;
        // SAFETY: the driver is there; the place lives until the call returns.
        let asked = unsafe { driver::cuDriverGetVersion(&mut version) };
        asked.result().ok().map(|()| (version / 1000, version % 1000 / 10))
    })
    .ok()?
}

/// Returns the version of cuBLASLt, such as 130200 for 13.2.0; none if it is not found.
pub fn cublaslt_version() -> Option<usize> {
    if !libraries().cublaslt {
        return None;
    }
    // SAFETY: the library is there, and the function takes nothing.
    guarded(|| unsafe { cublaslt::sys::cublasLtGetVersion() }).ok()
}

fn devices() -> Result<Vec<DeviceInfo>, cudarc::driver::DriverError> {
    result::init()?;
    (0..result::device::get_count()?)
        .map(|ordinal| {
            let device = result::device::get(ordinal)?;
            let attribute = |which| {
                // SAFETY: `device` was given by the driver above.
                unsafe { result::device::get_attribute(device, which) }
            };
            let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            Ok(DeviceInfo {
                name: result::device::get_name(device)?,
                capability: (major as u32, minor as u32),
                // SAFETY: as above.
                memory: unsafe { result::device::total_mem(device) }?,
            })
        })
        .collect()
}

/// Opens the libraries of CUDA in the folders that the environment names, and keeps them open. A later search by name then
/// finds them without any search path.
fn preload() {
    let folders = ["DSMOE_NVRTC_DIR", "DSMOE_CUDA_LIB_DIR"].map(std::env::var_os);
    for folder in folders.into_iter().flatten() {
        // Libraries that others need come first.
        for start in ["libnvrtc-builtins.so", "libnvrtc.so", "libcublasLt.so"] {
            for path in matching(&folder, start) {
                // SAFETY: opening a library of CUDA runs its initialisers, which do not depend on this program.
                if let Ok(library) = unsafe { libloading::Library::new(&path) } {
                    std::mem::forget(library);
                }
            }
        }
    }
}

fn matching(folder: &OsString, start: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(Path::new(folder)) else { return Vec::new() };
    let name_fits = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(start))
    };
    let mut paths: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(name_fits).collect();
    paths.sort();
    paths
}
