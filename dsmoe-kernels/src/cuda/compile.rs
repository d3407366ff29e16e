//! Compilation of kernels by NVRTC, with a folder that caches their machine code.

use std::ffi::{CStr, CString, c_char};
use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

use super::detect::{guarded, libraries};
use super::error::{CudaError, Result};

/// The text that precedes every kernel's own.
const PRELUDE: &str = concat!(include_str!("prelude.cuh"), include_str!("ptx.cuh"));

/// A definition that a kernel is compiled with.
pub(crate) type Define = (&'static str, i64);

/// The text of some kernels.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
}

/// Kernels in machine code.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The machine code.
    pub cubin: Vec<u8>,
    /// The assembler's log, which names the registers and spills of every kernel.
    pub log: String,
}

/// Returns the version of NVRTC, or none without NVRTC. It is asked once.
pub fn nvrtc_version() -> Option<(i32, i32)> {
    static VERSION: OnceLock<Option<(i32, i32)>> = OnceLock::new();
    *VERSION.get_or_init(|| {
        if !libraries().nvrtc {
            return None;
        }
        guarded(|| {
            let (mut major, mut minor) = (0, 0);
            // SAFETY: the library is there; both places live until the call returns.
            let asked = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
            asked.result().ok().map(|()| (major, minor))
        })
        .ok()?
    })
}

/// Compiles `text`, preceded by the code that all kernels share, with `defines` for `arch`, such as `sm_90a`.
///
/// # Errors
/// NVRTC is not found, or refuses the text.
pub fn compile(name: &str, text: &str, defines: &[(&str, i64)], arch: &str) -> Result<Compiled> {
    if nvrtc_version().is_none() {
        return Err(CudaError::no_nvrtc());
    }
    let failed = |log: String| CudaError::Compile { name: name.to_owned(), arch: arch.to_owned(), log };
    let no_text = |_| failed("the text has a zero byte".to_owned());
    let source = CString::new(format!("{PRELUDE}\n#line 1 \"{name}.cu\"\n{text}")).map_err(no_text)?;
    let file = CString::new(format!("{name}.cu")).map_err(no_text)?;
    let mut options = vec![
        format!("--gpu-architecture={arch}"),
        "--std=c++17".to_owned(),
        "--ptxas-options=-v".to_owned(),
        "-default-device".to_owned(),
        // An entry of NVRTC's own cache has no assembler log.
        "--no-cache".to_owned(),
    ];
    options.extend(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
    let program =
        result::create_program(&source, Some(&file)).map_err(|error| failed(format!("{error:?}")))?;
    // SAFETY: the program was made above and is destroyed below.
    let built = unsafe { result::compile_program(program, &options) };
    // SAFETY: as above.
    let log = unsafe { result::get_program_log(program) };
    let log = log.map(text_of).unwrap_or_default();
    let cubin = match built {
        Ok(()) => take_cubin(program),
        Err(_) => None,
    };
    // SAFETY: as above; the program is not used after.
    let _ = unsafe { result::destroy_program(program) };
    match cubin {
        Some(cubin) => Ok(Compiled { cubin, log }),
        None => {
            let line = log.lines().find(|line| line.contains("error")).or_else(|| log.lines().next());
            Err(failed(line.unwrap_or("no machine code was made").trim().to_owned()))
        }
    }
}

fn text_of(log: Vec<c_char>) -> String {
    let bytes: Vec<u8> = log.into_iter().map(|c| c as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

fn take_cubin(program: sys::nvrtcProgram) -> Option<Vec<u8>> {
    let mut len = 0;
    // SAFETY: the program is compiled; `len` lives until the call returns.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut len) }.result().ok()?;
    let mut cubin = vec![0u8; len];
    // SAFETY: `cubin` has room for what NVRTC said.
    unsafe { sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()) }.result().ok()?;
    (len > 0).then_some(cubin)
}

/// Returns the architecture to compile for. On Hopper it includes Hopper's own instructions.
fn arch_of(capability: (u32, u32)) -> String {
    match capability {
        (9, 0) => "sm_90a".to_owned(),
        (major, minor) => format!("sm_{major}{minor}"),
    }
}

/// Returns the machine code of `source`, from the cache if it is there.
pub(super) fn cubin(source: &'static Source, defines: &[Define], capability: (u32, u32)) -> Result<Vec<u8>> {
    let arch = arch_of(capability);
    let path = nvrtc_version().and_then(|version| {
        let mut hash = Sha256::new();
        hash.update(format!("{version:?} {arch} {defines:?}\n{PRELUDE}\n{}", source.text));
        let hash: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Some(cache_dir()?.join(format!("{}-{arch}-{hash}.cubin", source.name)))
    });
    // A damaged file is replaced.
    if let Some(image) = path.as_ref().and_then(|path| fs::read(path).ok()).and_then(unsealed) {
        return Ok(image);
    }
    let compiled = compile(source.name, source.text, defines, &arch)?;
    if let Some(path) = path {
        // A cache that cannot be written costs only time.
        drop(store(&path, &compiled.cubin));
    }
    Ok(compiled.cubin)
}

fn cache_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || Some(set("HOME")?.join(".cache"));
    let user = || set("XDG_CACHE_HOME").or_else(home).or_else(|| set("LOCALAPPDATA"));
    set("DSMOE_CACHE_DIR").or_else(|| Some(user()?.join("dsmoe"))).map(|dir| dir.join("kernels"))
}

/// Takes the code out of a cached file, if the hash behind it matches.
fn unsealed(mut file: Vec<u8>) -> Option<Vec<u8>> {
    let hash = file.split_off(file.len().checked_sub(32)?);
    (Sha256::digest(&file)[..] == hash[..]).then_some(file)
}

fn store(path: &std::path::Path, cubin: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(std::path::Path::new("."));
    fs::create_dir_all(dir)?;
    // Processes that compile the same kernel at once write separate files.
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let sealed = [cubin, &Sha256::digest(cubin)].concat();
    let stored = fs::write(&temporary, sealed).and_then(|()| fs::rename(&temporary, path));
    stored.inspect_err(|_| drop(fs::remove_file(&temporary)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_a_damaged_cache_entry_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernels").join("some-sm_80-0.cubin");
        let code: Vec<u8> = (0..5000u32).map(|i| (i * i) as u8).collect();
        store(&path, &code).unwrap();
        store(&path, &code).unwrap();
        let file = fs::read(&path).unwrap();
        assert_eq!(unsealed(file.clone()).as_deref(), Some(&code[..]));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "temporary files stay");
        for len in [0, 31, 32, 4000, file.len() - 1] {
            assert_eq!(unsealed(file[..len].to_vec()), None, "{len} bytes of {}", file.len());
        }
        for at in [0, 4999, 5000, file.len() - 1] {
            let mut damaged = file.clone();
            damaged[at] ^= 1;
            assert_eq!(unsealed(damaged), None, "byte {at}");
        }
    }

    #[test]
    fn cuda_a_compile_error_names_its_line() {
        let wrong = "extern \"C\" __global__ void k(float* x) {\n  x[0] = nothing;\n}\n";
        match compile("wrong", wrong, &[], "sm_80") {
            Err(CudaError::Compile { log, .. }) => assert!(log.starts_with("wrong.cu(2)"), "{log}"),
            Err(CudaError::Library { .. }) if nvrtc_version().is_none() => {}
            other => panic!("{other:?}"),
        }
    }
}
