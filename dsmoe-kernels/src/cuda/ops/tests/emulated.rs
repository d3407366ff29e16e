//! Runs kernels on the processor: their text is compiled as C++ with a model of a device (`emulator`), and the launches are
//! those that the ops make.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cuda::kernel::{Arg, Call, Grid};
use crate::cuda::ops::products::Launch;
use crate::cuda::ops::{Define, Source};
use crate::cuda::tensor_map::{TensorMap, Tiled};
use crate::testing::{required, skipped};

const MACHINE: &str = include_str!("emulator/machine.h");
const PTX: &str = include_str!("emulator/ptx.h");
const PRELUDE: &str = include_str!("../../prelude.cuh");

/// Where buffers lie, apart from each other so that none is reached from another.
const FIRST: u64 = 0x2000_0000_0000;
const APART: u64 = 1 << 32;

/// Memory of the model of a device, and the launches that wait to run.
pub(super) struct Emulator {
    buffers: Vec<(u64, Vec<u8>)>,
}

/// A buffer of an [`Emulator`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffer(usize, pub(super) u64);

impl Emulator {
    pub(super) fn new() -> Emulator {
        Emulator { buffers: Vec::new() }
    }

    /// Adds a buffer that ends where memory ends.
    pub(super) fn upload<T: bytemuck::Pod>(&mut self, values: &[T]) -> Buffer {
        let bytes = bytemuck::cast_slice::<T, u8>(values).to_vec();
        let start = FIRST + self.buffers.len() as u64 * APART;
        let at =
            start + (bytes.len() as u64).next_multiple_of(4096) - (bytes.len() as u64).next_multiple_of(16);
        self.buffers.push((at, bytes));
        Buffer(self.buffers.len() - 1, at)
    }

    pub(super) fn download<T: bytemuck::Pod>(&self, buffer: Buffer) -> Vec<T> {
        bytemuck::pod_collect_to_vec(&self.buffers[buffer.0].1)
    }

    /// Sets the values of a buffer from a byte on.
    pub(super) fn write<T: bytemuck::Pod>(&mut self, buffer: Buffer, at: usize, values: &[T]) {
        let bytes = bytemuck::cast_slice::<T, u8>(values);
        self.buffers[buffer.0].1[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Fills a buffer with what is no number and no place.
    pub(super) fn poison(&mut self, buffer: Buffer) {
        self.buffers[buffer.0].1.fill(0xff);
    }

    /// Runs calls of one program. The seed decides the order in which threads and copies go on.
    pub(super) fn run(&mut self, program: &Program, seed: u64, calls: &[Step<'_>]) {
        let mut input = Vec::new();
        input.extend(seed.to_le_bytes());
        input.extend((self.buffers.len() as u64).to_le_bytes());
        for (at, bytes) in &self.buffers {
            input.extend(at.to_le_bytes());
            input.extend((bytes.len() as u64).to_le_bytes());
            input.extend(bytes);
        }
        input.extend((calls.len() as u64).to_le_bytes());
        for call in calls {
            let (entry, grid, cluster, args) = call.parts();
            let Grid { blocks: [x, y, z], threads, shared } = grid;
            input.extend((entry.len() as u64).to_le_bytes());
            input.extend(entry.as_bytes());
            for value in [x, y, z, threads as usize, cluster, shared as usize, args.len()] {
                input.extend((value as u64).to_le_bytes());
            }
            input.extend(args);
        }
        let files = ["in", "out"].map(|name| program.dir.path().join(format!("{name}-{seed}")));
        std::fs::write(&files[0], input).unwrap();
        let output = Command::new(&program.path).args(&files).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "seed {seed}: {} {error}", output.status);
        let mut bytes = &std::fs::read(&files[1]).unwrap()[..];
        for (_, buffer) in &mut self.buffers {
            let (mine, rest) = bytes.split_at(buffer.len());
            buffer.copy_from_slice(mine);
            bytes = rest;
        }
        assert!(bytes.is_empty(), "more bytes than buffers have");
    }
}

/// A launch, of either kind.
pub(super) enum Step<'a> {
    Call(&'a Call),
    Launch(&'a Launch),
}

impl Step<'_> {
    /// Returns the kernel, its grid, the blocks of a cluster, and its parameters in whole groups of 8 bytes.
    fn parts(&self) -> (&'static str, Grid, usize, Vec<u8>) {
        match self {
            Step::Call(Call { entry, grid, args, .. }) => {
                let args = args.iter().flat_map(|arg| match *arg {
                    Arg::Ptr(value) => value.to_le_bytes(),
                    Arg::Size(value) => (value as u64).to_le_bytes(),
                    Arg::I32(value) => i64::from(value).to_le_bytes(),
                    Arg::I64(value) => value.to_le_bytes(),
                    Arg::F32(value) => u64::from(value.to_bits()).to_le_bytes(),
                    Arg::F64(value) => value.to_bits().to_le_bytes(),
                });
                (entry, *grid, 1, args.collect())
            }
            Step::Launch(Launch { entry, grid, defines, maps, values, .. }) => {
                let cluster = defines.iter().find(|(name, _)| *name == "CL").map_or(1, |(_, blocks)| *blocks);
                let maps = maps.all().into_iter().flat_map(|map| map.0);
                let bytes: Vec<u8> = maps.flat_map(u64::to_le_bytes).collect();
                (entry, *grid, cluster as usize, [&bytes[..], bytemuck::bytes_of(values)].concat())
            }
        }
    }
}

/// A descriptor as the model of a device has it: base, rank, bytes of an element, swizzle, sizes, box, strides.
pub(super) fn encode(tiled: &Tiled) -> crate::cuda::Result<TensorMap> {
    tiled.check()?;
    let Tiled { base, size, sizes, strides, tile } = tiled;
    let mut words =
        vec![*base as u32, (*base >> 32) as u32, sizes.len() as u32, *size as u32, tiled.row_bytes() as u32];
    for values in [sizes, tile] {
        words.extend((0..5).map(|i| values.get(i).map_or(0, |&value| value as u32)));
    }
    // To whole groups of 8 bytes.
    words.push(0);
    words.extend((0..5).flat_map(|i| {
        let stride = strides.get(i).map_or(0, |&stride| stride as u64);
        [stride as u32, (stride >> 32) as u32]
    }));
    let mut map = TensorMap::NONE;
    for (i, word) in words.into_iter().enumerate() {
        map.0[i / 2] |= u64::from(word) << (32 * (i % 2));
    }
    Ok(map)
}

/// A source compiled for the model of a device.
pub(super) struct Program {
    path: PathBuf,
    dir: tempfile::TempDir,
}

impl Program {
    /// Compiles the kernels of a source, or notes that the test is skipped.
    ///
    /// # Panics
    /// They do not compile; there is no compiler, and `DSMOE_REQUIRE` asks for one.
    pub(super) fn new(test: &str, source: &Source, entries: &str, defines: &[Define]) -> Option<Program> {
        let compiler = ["g++", "clang++"].into_iter().find(|name| Command::new(name).output().is_ok());
        if compiler.is_none() || !cfg!(all(target_os = "linux", target_pointer_width = "64")) {
            assert!(!required("c++"), "a C++ compiler is required and not to be found; install g++");
            skipped(test, "no C++ compiler for Linux");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let entries = entries.split(' ').fold(String::new(), |mut all, entry| {
            write!(all, "KERNEL({entry}), ").unwrap();
            all
        });
        let main =
            format!("int main(int n, char** args) {{ return emulator::main(n, args, {{{entries}}}); }}\n");
        let defines = defines.iter().fold(String::new(), |mut all, (name, value)| {
            writeln!(all, "#define {name} {value}").unwrap();
            all
        });
        let text = [
            MACHINE,
            &defines,
            PRELUDE,
            PTX,
            &format!("#line 1 \"{}.cu\"\n", source.name),
            source.text,
            &main,
        ]
        .join("\n");
        let (file, path) = (dir.path().join("kernel.cpp"), dir.path().join("kernel"));
        std::fs::write(&file, text).unwrap();
        compile(compiler?, &file, &path);
        Some(Program { path, dir })
    }
}

fn compile(compiler: &str, file: &Path, to: &Path) {
    let options =
        ["-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-ffp-contract=off", "-o"];
    let output = Command::new(compiler).args(options).arg(to).arg(file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
