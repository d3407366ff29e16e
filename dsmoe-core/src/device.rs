//! Devices that run models.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A processor that computes: this machine's cores, or a GPU.
///
/// ```
/// use dsmoe_core::Device;
///
/// let device: Device = "cpu".parse()?;
/// assert!(!device.is_gpu());
/// match "cuda:1".parse::<Device>() {
///     Ok(second_gpu) => assert!(second_gpu.is_gpu()),
///     Err(error) => assert!(error.to_string().contains("without CUDA")), // not built for GPUs
/// }
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Device {
    /// The cores of this machine.
    #[default]
    Cpu,
    /// The CUDA device of that number.
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

impl Device {
    /// Returns whether it is a GPU.
    pub fn is_gpu(self) -> bool {
        self != Device::Cpu
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(s: &str) -> Result<Device> {
        if s == "cpu" {
            return Ok(Device::Cpu);
        }
        let number = match s.strip_prefix("cuda") {
            Some("") => Some(0),
            Some(rest) => rest.strip_prefix(':').and_then(|digits| digits.parse().ok()),
            None => None,
        };
        match number {
            Some(ordinal) => Device::cuda(ordinal),
            None => Err(Error::argument(format!("unknown device `{s}`"), "use cpu, cuda or cuda:1")),
        }
    }
}

#[cfg(feature = "cuda")]
impl Device {
    fn cuda(ordinal: usize) -> Result<Device> {
        Ok(Device::Cuda(ordinal))
    }
}

#[cfg(not(feature = "cuda"))]
impl Device {
    fn cuda(ordinal: usize) -> Result<Device> {
        Err(Error::argument(
            format!("cuda:{ordinal}: this program was built without CUDA"),
            "build it with the feature `cuda`, or use cpu",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_shown() {
        assert_eq!("cpu".parse::<Device>().unwrap(), Device::Cpu);
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda0", "cuda:-1"] {
            let error = wrong.parse::<Device>().unwrap_err().to_string();
            assert!(error.contains("use cpu, cuda or cuda:1"), "{error}");
        }
        assert!(!Device::Cpu.is_gpu());
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_is_named_by_its_number() {
        assert_eq!("cuda".parse::<Device>().unwrap(), Device::Cuda(0));
        assert_eq!("cuda:3".parse::<Device>().unwrap().to_string(), "cuda:3");
        assert!(Device::Cuda(0).is_gpu());
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_cuda_a_gpu_is_refused() {
        let error = "cuda:0".parse::<Device>().unwrap_err().to_string();
        assert!(error.contains("the feature `cuda`"), "{error}");
    }
}
