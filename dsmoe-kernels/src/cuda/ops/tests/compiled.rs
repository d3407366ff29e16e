//! Registers and spills of kernels, from the log of the assembler.

use super::{required, skipped};
use crate::cuda::ops::KERNELS;
use crate::cuda::{compile, nvrtc_version};

/// The log of one kernel.
struct Usage {
    entry: String,
    registers: u32,
    spilled: bool,
}

fn usages(log: &str) -> Vec<Usage> {
    let mut usages = Vec::new();
    let mut entry = String::new();
    let mut spilled = false;
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            entry = rest.split('\'').next().unwrap_or_default().to_owned();
        } else if line.contains("bytes spill stores") {
            spilled = !line.contains(" 0 bytes spill stores, 0 bytes spill loads");
        } else if let Some(rest) = line.split("Used ").nth(1) {
            let registers = rest.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(u32::MAX);
            usages.push(Usage { entry: entry.clone(), registers, spilled });
        }
    }
    usages
}

#[test]
fn cuda_kernels_compile_without_spills() {
    if nvrtc_version().is_none() {
        assert!(!required("nvrtc"), "NVRTC is required and not to be found; set DSMOE_NVRTC_DIR");
        skipped("cuda_kernels_compile_without_spills", "no NVRTC; set DSMOE_NVRTC_DIR");
        return;
    }
    let mut problems = Vec::new();
    for spec in KERNELS {
        for defines in spec.defines {
            for arch in ["sm_80", "sm_90a"] {
                let what = format!("{} {defines:?} {arch}", spec.source.name);
                let compiled = match compile(spec.source.name, spec.source.text, defines, arch) {
                    Ok(compiled) => compiled,
                    Err(error) => {
                        problems.push(error.to_string());
                        continue;
                    }
                };
                let usages = usages(&compiled.log);
                for entry in spec.entries {
                    let Some(usage) = usages.iter().find(|usage| usage.entry == *entry) else {
                        problems.push(format!("{what}: no kernel {entry} in {}", compiled.log));
                        continue;
                    };
                    if usage.spilled || usage.registers > spec.max_registers {
                        problems.push(format!(
                            "{what}: {entry} uses {} registers of {}, spills: {}",
                            usage.registers, spec.max_registers, usage.spilled
                        ));
                    }
                }
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
