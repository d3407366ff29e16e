//! The machine that a program runs on.

use std::fs;

use dsmoe_kernels::Isa;
use serde::{Deserialize, Serialize};

/// The hardware, the system and the kernel tier that numbers were measured on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Machine {
    pub(crate) cpu: Option<String>,
    pub(crate) arch: String,
    pub(crate) cores: usize,
    pub(crate) threads: usize,
    /// The caches of the first core, such as `L1d 32K`.
    pub(crate) caches: Vec<String>,
    /// The tier of the kernels.
    pub(crate) isa: String,
    /// Operating system and release.
    pub(crate) system: String,
}

impl Machine {
    /// Describes this machine.
    pub(crate) fn this() -> Machine {
        let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let cache = |index: usize| {
            let field = |name| read(&format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}"));
            let kind = match field("type")?.as_str() {
                "Data" => "d",
                "Instruction" => "i",
                _ => "",
            };
            Some(format!("L{}{kind} {}", field("level")?, field("size")?))
        };
        Machine {
            cpu: cpu_model(),
            arch: std::env::consts::ARCH.to_owned(),
            cores: std::thread::available_parallelism().map_or(1, |cores| cores.get()),
            threads: rayon::current_num_threads(),
            caches: (0..8).map_while(cache).collect(),
            isa: Isa::current().name().to_owned(),
            system: format!(
                "{} {}",
                std::env::consts::OS,
                read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".to_owned())
            ),
        }
    }

    /// Reports whether times of the two machines are comparable.
    pub(crate) fn same_hardware(&self, other: &Machine) -> bool {
        let key = |m: &Machine| (m.cpu.clone(), m.arch.clone(), m.cores, m.caches.clone());
        key(self) == key(other)
    }
}

/// Returns the name of the CPU, where the system tells it.
pub(crate) fn cpu_model() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    name_in(&info)
}

/// Returns the name in the text of `/proc/cpuinfo`; on Arm, which has none, the codes of implementer and part.
fn name_in(info: &str) -> Option<String> {
    let field = |name| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim())
    };
    let codes = || Some(format!("Arm {} {}", field("CPU implementer")?, field("CPU part")?));
    field("model name").map(str::to_owned).or_else(codes)
}

#[cfg(test)]
mod tests {
    use super::name_in;

    #[test]
    fn cpus_with_and_without_a_name() {
        let arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd40\n";
        assert_eq!(name_in(arm).as_deref(), Some("Arm 0x41 0xd40"));
        assert_eq!(name_in("vendor_id : X\nmodel name\t: A B\n").as_deref(), Some("A B"));
        assert_eq!(name_in("processor : 0\n"), None);
    }
}
