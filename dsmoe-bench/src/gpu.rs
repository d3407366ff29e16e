//! The GPUs and CUDA libraries that `dsmoe doctor` reports.

use dsmoe_core::Device;
use serde::Serialize;

#[derive(Debug, Default, Serialize)]
pub(crate) struct Gpus {
    /// Is true when this program was built for GPUs.
    built: bool,
    devices: Vec<GpuInfo>,
    /// The version of CUDA that the driver supports, where it is found.
    driver: Option<String>,
    nvrtc: Option<String>,
    cublaslt: Option<String>,
    /// NCCL, which connects several GPUs; a defect where there are some.
    nccl: Option<String>,
    /// The defects and their fixes, one line each.
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct GpuInfo {
    device: String,
    name: String,
    capability: String,
    memory_bytes: u64,
}

/// Returns the memory of a GPU; none for the processor, and where there is no such GPU.
#[cfg(feature = "cuda")]
pub(crate) fn memory_of(device: Device) -> Option<u64> {
    use dsmoe_kernels::cuda;

    let (Device::Cuda(ordinal), cuda::Detection::Devices(devices)) = (device, cuda::detect()) else {
        return None;
    };
    devices.get(ordinal).map(|device| device.memory as u64)
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn memory_of(_: Device) -> Option<u64> {
    None
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn gpus() -> Gpus {
    let problem = "this program was built without CUDA; build it with the feature `cuda` to use a GPU";
    Gpus { problems: vec![problem.to_owned()], ..Gpus::default() }
}

#[cfg(feature = "cuda")]
pub(crate) fn gpus() -> Gpus {
    use dsmoe_kernels::cuda;

    let found = cuda::detect();
    let mut problems: Vec<String> = found.problem().into_iter().collect();
    problems.extend(cuda::libraries().problems());
    let nccl = cuda::find_nccl();
    let devices = match found {
        cuda::Detection::Devices(devices) => devices,
        _ => Vec::new(),
    };
    if let (2.., Err(problem)) = (devices.len(), &nccl) {
        problems.push(problem.to_string());
    }
    let info = |(ordinal, device): (usize, cuda::DeviceInfo)| GpuInfo {
        device: format!("cuda:{ordinal}"),
        name: device.name,
        capability: format!("{}.{}", device.capability.0, device.capability.1),
        memory_bytes: device.memory as u64,
    };
    let dotted = |(major, minor)| format!("{major}.{minor}");
    Gpus {
        built: true,
        devices: devices.into_iter().enumerate().map(info).collect(),
        driver: cuda::driver_version().map(dotted),
        nvrtc: cuda::nvrtc_version().map(dotted),
        cublaslt: cuda::cublaslt_version().map(|version| version.to_string()),
        nccl: nccl.ok().map(|library| library.version),
        problems,
    }
}

impl Gpus {
    /// Returns named lines.
    pub(crate) fn fields(&self) -> Vec<(&str, String)> {
        let version = |what, version: &Option<String>| Some((what, version.clone()?));
        let mut fields = Vec::new();
        for GpuInfo { device, name, capability, memory_bytes } in &self.devices {
            let memory = crate::format::bytes(*memory_bytes);
            fields.push((device.as_str(), format!("{name}, {memory}, compute capability {capability}")));
        }
        fields.extend(version("CUDA driver", &self.driver));
        fields.extend(version("NVRTC", &self.nvrtc));
        fields.extend(version("cuBLASLt", &self.cublaslt));
        fields.extend(version("NCCL", &self.nccl));
        fields.extend(self.problems.iter().map(|problem| ("GPU", problem.clone())));
        fields
    }
}
