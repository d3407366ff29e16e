//! Detection on machines without a driver or with a faulty one, by fake libraries.
//!
//! A process looks once, so every case runs in a process of its own: this program again, with `DSMOE_TEST_SAYS` set.
#![cfg(feature = "cuda")]

use std::fs;
use std::path::Path;
use std::process::Command;

use dsmoe_kernels::cuda::{Gpu, cublaslt_version, detect, driver_version, libraries, nvrtc_version};
use dsmoe_kernels::testing::skipped;

const SAYS: &str = "DSMOE_TEST_SAYS";

#[test]
#[ignore = "run by the other tests of this file, in processes of their own"]
#[expect(clippy::print_stdout, reason = "its output is what the tests read")]
fn says() {
    let found = detect();
    println!("\n{SAYS} {found:?}");
    println!("{SAYS} problem: {:?}", found.problem());
    if let Err(error) = Gpu::open(7) {
        println!("{SAYS} open: {error}");
    }
    println!("{SAYS} versions: {:?} {:?} {:?}", driver_version(), nvrtc_version(), cublaslt_version());
    println!("{SAYS} {:?} {:?}", libraries(), libraries().problems());
    assert_eq!(found, detect(), "asked again");
}

/// Returns the output of [`says`] with the folder `libraries` searched first.
fn said(libraries: &Path, environment: &[(&str, &Path)]) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "says", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env_remove("DSMOE_NVRTC_DIR").env_remove("DSMOE_CUDA_LIB_DIR").env("LD_LIBRARY_PATH", libraries);
    command.envs(environment.iter().copied());
    let output = command.output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stdout.lines().filter_map(|line| line.strip_prefix(SAYS)).collect::<Vec<_>>().join("\n")
}

/// Builds `text` as the shared library `path`, which calls itself `name`.
fn library(path: &Path, name: &str, text: &str) {
    let source = path.with_file_name("library.c");
    fs::write(&source, text).unwrap();
    let built = Command::new(std::env::var_os("CC").unwrap_or("cc".into()))
        .args(["-shared", "-fPIC", &format!("-Wl,-soname,{name}"), "-o"])
        .args([path, &source])
        .status()
        .expect("a C compiler, which a build needs too");
    assert!(built.success(), "{text}");
}

/// Checks what is reported with the library `text` as the driver, by both names that are looked for.
#[track_caller]
fn driver_is_reported(text: &str, parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("libcuda.so.1");
    library(&path, "libcuda.so.1", text);
    fs::copy(&path, dir.path().join("libcuda.so")).unwrap();
    has(&said(dir.path(), &[]), parts);
}

#[track_caller]
fn has(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "no {part:?} in:\n{said}");
    }
}

#[test]
fn cuda_without_a_driver_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let said = said(dir.path(), &[]);
    if said.contains("driver: true") {
        skipped("cuda_without_a_driver_is_reported", "this machine has one");
        return;
    }
    has(&said, &["NoDriver", "open: cuda:7: no NVIDIA driver is installed; install it", "versions: None"]);
}

#[test]
fn cuda_with_a_faulty_driver_is_reported() {
    let unusable = "open: cuda:7: the driver cannot be used";
    driver_is_reported(
        "int something(void) { return 0; }",
        &["Broken(\"Missing symbol cuInit", unusable, "CUDA 13 or newer"],
    );
    driver_is_reported(
        "int cuInit(unsigned flags) { return 0; }
         int cuDeviceGetCount(int* n) { *n = 1; return 0; }
         int cuDeviceGet(int* device, int i) { *device = i; return 0; }",
        &["Broken(\"Missing symbol cuDevice", unusable],
    );
}

#[test]
fn cuda_without_a_device_is_reported() {
    let none = "NoDevice(\"CUDA_ERROR_NO_DEVICE\")";
    for (text, parts) in [
        (
            "int cuInit(unsigned flags) { return 100; }",
            [none, "open: cuda:7: the driver finds no device", "nvidia-smi"],
        ),
        (
            "int cuInit(unsigned flags) { return 0; } int cuDeviceGetCount(int* n) { *n = 0; return 0; }",
            [none, "open: cuda:7: the driver finds no device", "nvidia-smi"],
        ),
        (
            "int cuInit(unsigned flags) { return 34; }",
            ["NoDevice(\"CUDA_ERROR_STUB_LIBRARY\")", "open: cuda:7: the driver's library is", "lib64/stubs"],
        ),
    ] {
        driver_is_reported(text, &parts);
    }
}

#[test]
fn cuda_devices_are_listed_by_name() {
    driver_is_reported(
        "int cuInit(unsigned flags) { return 0; }
         int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
         int cuDeviceGetCount(int* n) { *n = 2; return 0; }
         int cuDeviceGet(int* device, int i) { *device = i; return 0; }
         int cuDeviceGetAttribute(int* value, int which, int device) { *value = which == 75 ? 9 : device; return 0; }
         int cuDeviceGetName(char* name, int room, int device) {
           const char of[] = \"Device A\";
           for (int i = 0; i < sizeof of; i++) name[i] = of[i];
           name[7] += device;
           return 0;
         }
         int cuDeviceTotalMem_v2(unsigned long* bytes, int device) { *bytes = 5000000000ul; return 0; }",
        &[
            "name: \"Device A\", capability: (9, 0), memory: 5000000000",
            "name: \"Device B\", capability: (9, 1)",
            "problem: None",
            "open: cuda:7: the last device is cuda:1; see `dsmoe doctor`",
            "versions: Some((12, 4))",
        ],
    );
}

#[test]
fn cuda_libraries_are_found_in_the_folders_of_the_environment() {
    let (empty, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let before = said(empty.path(), &[]);
    if before.contains("cublaslt: true") || before.contains("nvrtc: true") {
        skipped("cuda_libraries_are_found_in_the_folders_of_the_environment", "they are found without");
        return;
    }
    has(&before, &["pip install nvidia-cuda-nvrtc", "pip install nvidia-cublas"]);
    for (name, text) in [
        ("libcublasLt", "unsigned long cublasLtGetVersion(void) { return 130205; }"),
        ("libnvrtc", "int nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 5; return 0; }"),
    ] {
        let name = format!("{name}.so.13");
        library(&dir.path().join(&name), &name, text);
    }
    let all = said(empty.path(), &[("DSMOE_CUDA_LIB_DIR", dir.path())]);
    has(&all, &["nvrtc: true, cublaslt: true } []", "Some((13, 5)) Some(130205)"]);
    let none = said(empty.path(), &[("DSMOE_CUDA_LIB_DIR", Path::new("/nowhere"))]);
    has(&none, &["nvrtc: false, cublaslt: false"]);
}
