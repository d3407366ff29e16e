//! The functions of NCCL's library, found when a program runs.

use std::error::Error;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use cudarc::driver::sys::CUstream;
use libloading::Library;

/// The file. Its name has the version of the interface; a library without one is a developer's link.
const FILE: &str = "libnccl.so.2";

/// The data type of single bytes: what moves is not looked at.
const BYTES: c_int = 1;

/// The oldest version that starts without waiting, 2.14.
const OLDEST: c_int = 21400;

/// Codes of calls.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;

/// The name of a group of processes, which rank 0 makes and all others get.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// The settings of a communicator as of version 2.14: later fields have their defaults then.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

impl Config {
    /// Calls return at once.
    const NO_WAITING: Config =
        Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: OLDEST as u32, blocking: 0 };
}

/// A communicator of the library.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comm(*mut c_void);

// SAFETY: the library's functions may be called from any thread, one at a time; `Nccl` sees to that.
unsafe impl Send for Comm {}

macro_rules! table {
    ($($name:ident: $symbol:literal ($($argument:ty),*) -> $result:ty;)*) => {
        struct Table { $($name: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl Table {
            fn load(library: &Library) -> Result<Table, String> {
                $(
                    // SAFETY: the function has this signature in all versions 2 of the interface.
                    let $name = unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol)
                    };
                    let $name = *$name.map_err(|_| {
                        format!("it lacks {}", String::from_utf8_lossy($symbol))
                    })?;
                )*
                Ok(Table { $($name),* })
            }
        }
    };
}

type Raw = *mut c_void;

table! {
    get_version: b"ncclGetVersion" (*mut c_int) -> c_int;
    get_unique_id: b"ncclGetUniqueId" (*mut UniqueId) -> c_int;
    get_error_string: b"ncclGetErrorString" (c_int) -> *const c_char;
    init: b"ncclCommInitRankConfig" (*mut Raw, c_int, UniqueId, c_int, *mut Config) -> c_int;
    get_async_error: b"ncclCommGetAsyncError" (Raw, *mut c_int) -> c_int;
    finalize: b"ncclCommFinalize" (Raw) -> c_int;
    destroy: b"ncclCommDestroy" (Raw) -> c_int;
    group_start: b"ncclGroupStart" () -> c_int;
    group_end: b"ncclGroupEnd" () -> c_int;
    send: b"ncclSend" (u64, usize, c_int, c_int, Raw, CUstream) -> c_int;
    recv: b"ncclRecv" (u64, usize, c_int, c_int, Raw, CUstream) -> c_int;
    broadcast: b"ncclBroadcast" (u64, u64, usize, c_int, c_int, Raw, CUstream) -> c_int;
    all_gather: b"ncclAllGather" (u64, u64, usize, c_int, Raw, CUstream) -> c_int;
}

/// NCCL's library. It stays open: its threads may run as long as the program does.
pub(super) struct Api {
    table: Table,
    version: c_int,
    _library: ManuallyDrop<Library>,
}

/// Bytes in a device's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) ptr: u64,
    pub(super) bytes: usize,
}

/// Where calls are queued.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queue {
    pub(super) comm: Comm,
    pub(super) stream: CUstream,
}

/// The outcome of a call that returns at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    GoesOn,
}

fn progress(code: c_int) -> Result<Progress, c_int> {
    match code {
        SUCCESS => Ok(Progress::Done),
        IN_PROGRESS => Ok(Progress::GoesOn),
        code => Err(code),
    }
}

impl Api {
    /// Opens the library of the folder `DSMOE_CUDA_LIB_DIR`, of the wheel beside it, or of the system.
    pub(super) fn open() -> Result<(Api, String), String> {
        let folder = std::env::var_os("DSMOE_CUDA_LIB_DIR").map(PathBuf::from);
        Api::open_first(&candidates(folder.as_deref()))
    }

    fn open_first(paths: &[PathBuf]) -> Result<(Api, String), String> {
        let mut problems = Vec::new();
        for path in paths {
            match Api::load(path) {
                Ok(api) => return Ok((api, path.display().to_string())),
                Err(problem) if problem.contains("No such file") => {}
                Err(problem) => problems.push(format!("{} cannot be used: {problem}", path.display())),
            }
        }
        let problem = if problems.is_empty() { format!("{FILE} is not found") } else { problems.join("; ") };
        Err(format!(
            "{problem}; pip install nvidia-nccl-cu13 and set DSMOE_CUDA_LIB_DIR to its lib folder, or install NCCL 2.14 or newer"
        ))
    }

    fn load(path: &Path) -> Result<Api, String> {
        // SAFETY: opening the library runs its initialisers, which do not depend on this program.
        let library = unsafe { Library::new(path) };
        let library =
            library.map_err(|error| error.source().map_or(error.to_string(), |source| source.to_string()))?;
        let library = ManuallyDrop::new(library);
        let table = Table::load(&library)?;
        let mut version = 0;
        // SAFETY: the place lives until the call returns.
        let code = unsafe { (table.get_version)(&mut version) };
        if code != SUCCESS || version < OLDEST {
            return Err(format!("its version is {}, and 2.14 is needed", dotted(version)));
        }
        Ok(Api { table, version, _library: library })
    }

    pub(super) fn version(&self) -> String {
        dotted(self.version)
    }

    /// Makes a name for a group of processes.
    pub(super) fn unique_id(&self) -> Result<UniqueId, c_int> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the place lives until the call returns.
        match unsafe { (self.table.get_unique_id)(&mut id) } {
            SUCCESS => Ok(id),
            code => Err(code),
        }
    }

    /// The text of a code.
    pub(super) fn problem(&self, code: c_int) -> String {
        // SAFETY: the function takes any code.
        let text = unsafe { (self.table.get_error_string)(code) };
        if text.is_null() {
            return format!("code {code}");
        }
        // SAFETY: the text is a constant of the library.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// Starts to join the group `id`, on the device that this thread uses.
    pub(super) fn init(&self, id: UniqueId, rank: c_int, size: c_int) -> Result<(Comm, Progress), c_int> {
        let (mut comm, mut config) = (std::ptr::null_mut(), Config::NO_WAITING);
        // SAFETY: both places live until the call returns, which has copied the settings then.
        let code = unsafe { (self.table.init)(&mut comm, size, id, rank, &mut config) };
        Ok((Comm(comm), progress(code)?))
    }

    /// Asks how the calls of a communicator go on.
    pub(super) fn progress(&self, Comm(comm): Comm) -> Result<Progress, c_int> {
        let mut code = SUCCESS;
        // SAFETY: the communicator was made by this library and is not destroyed; the place lives until the call returns.
        progress(unsafe { (self.table.get_async_error)(comm, &mut code) })?;
        progress(code)
    }

    /// Starts to end a communicator in order.
    pub(super) fn finalize(&self, Comm(comm): Comm) -> Result<Progress, c_int> {
        // SAFETY: the communicator was made by this library and is not destroyed.
        progress(unsafe { (self.table.finalize)(comm) })
    }

    /// Frees a communicator that has ended.
    ///
    /// # Safety
    /// It is not used again.
    pub(super) unsafe fn destroy(&self, Comm(comm): Comm) {
        // SAFETY: the caller's promise.
        unsafe { (self.table.destroy)(comm) };
    }

    /// Queues the calls of `queue` as one.
    pub(super) fn group(&self, queue: impl FnOnce() -> Result<(), c_int>) -> Result<Progress, c_int> {
        // SAFETY: the function takes nothing.
        progress(unsafe { (self.table.group_start)() })?;
        let queued = queue();
        // SAFETY: the group was started above.
        let ended = progress(unsafe { (self.table.group_end)() });
        queued.and(ended)
    }

    /// Queues the sending of bytes to rank `to`.
    ///
    /// # Safety
    /// The bytes are memory of the communicator's device, which nobody changes before the queue has sent them.
    pub(super) unsafe fn send(&self, queue: Queue, from: Place, to: c_int) -> Result<(), c_int> {
        let Queue { comm, stream } = queue;
        // SAFETY: the caller's promise.
        let code = unsafe { (self.table.send)(from.ptr, from.bytes, BYTES, to, comm.0, stream) };
        progress(code).map(|_| ())
    }

    /// Queues the receiving of bytes from rank `from`.
    ///
    /// # Safety
    /// The bytes are memory of the communicator's device, which nobody uses before the queue has set them.
    pub(super) unsafe fn recv(&self, queue: Queue, to: Place, from: c_int) -> Result<(), c_int> {
        let Queue { comm, stream } = queue;
        // SAFETY: the caller's promise.
        let code = unsafe { (self.table.recv)(to.ptr, to.bytes, BYTES, from, comm.0, stream) };
        progress(code).map(|_| ())
    }

    /// Queues the sending of the bytes `from` of rank `root` to the bytes `to` of all; `from` counts there alone.
    ///
    /// # Safety
    /// Those of [`Api::send`] and [`Api::recv`].
    pub(super) unsafe fn broadcast(
        &self,
        queue: Queue,
        from: Place,
        to: Place,
        root: c_int,
    ) -> Result<(), c_int> {
        let Queue { comm, stream } = queue;
        // SAFETY: the caller's promise.
        let code = unsafe { (self.table.broadcast)(from.ptr, to.ptr, to.bytes, BYTES, root, comm.0, stream) };
        progress(code).map(|_| ())
    }

    /// Queues the sending of `from` to all, whose `to` has as many bytes of each.
    ///
    /// # Safety
    /// Those of [`Api::send`] and [`Api::recv`].
    pub(super) unsafe fn all_gather(&self, queue: Queue, from: Place, to: Place) -> Result<Progress, c_int> {
        let Queue { comm, stream } = queue;
        // SAFETY: the caller's promise.
        progress(unsafe { (self.table.all_gather)(from.ptr, to.ptr, from.bytes, BYTES, comm.0, stream) })
    }
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NCCL {}", self.version())
    }
}

/// The paths to try, in order. `DSMOE_CUDA_LIB_DIR` may be the folder of another of NVIDIA's wheels,
/// `nvidia/cu13/lib`: NCCL's then is `nvidia/nccl/lib`.
fn candidates(folder: Option<&Path>) -> Vec<PathBuf> {
    let of_wheel = |folder: &Path| Some(folder.parent()?.parent()?.join("nccl/lib").join(FILE));
    let own = folder.map(|folder| folder.join(FILE));
    own.into_iter().chain(folder.and_then(of_wheel)).chain([PathBuf::from(FILE)]).collect()
}

/// Writes a version such as 23203 as 2.32.3. Before 2.9 they were four digits.
fn dotted(version: c_int) -> String {
    let unit = if version < 10000 { 1000 } else { 10000 };
    format!("{}.{}.{}", version / unit, version % unit / 100, version % 100)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::{Api, Progress, candidates, dotted};
    use crate::testing::skipped;

    /// Builds the shared library `path` of the C code `text`.
    fn library(path: &Path, text: &str) {
        let source = path.with_extension("c");
        std::fs::write(&source, text).unwrap();
        let compiler = std::env::var_os("CC").unwrap_or("cc".into());
        let built = Command::new(compiler).args(["-shared", "-fPIC", "-o"]).args([path, &source]).status();
        assert!(built.expect("a C compiler, which a build needs too").success(), "{text}");
    }

    /// A library that has the functions but those that `lacks` names, and version `version`.
    fn made(dir: &Path, lacks: &str, version: i32) -> PathBuf {
        let names = "ncclGetUniqueId ncclCommInitRankConfig ncclCommGetAsyncError ncclCommFinalize ncclCommDestroy ncclGroupStart \
                     ncclGroupEnd ncclSend ncclRecv ncclBroadcast ncclAllGather";
        let mut text = format!("int ncclGetVersion(int* v) {{ *v = {version}; return 0; }}\n");
        text += "const char* ncclGetErrorString(int code) { return code == 3 ? \"three\" : 0; }\n";
        for name in names.split_whitespace().filter(|name| *name != lacks) {
            text += &format!("int {name}() {{ return 7; }}\n");
        }
        let path = dir.join(format!("libnccl-{lacks}-{version}.so"));
        library(&path, &text);
        path
    }

    #[test]
    fn a_missing_library_symbol_or_version_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let error = |path: PathBuf| Api::open_first(&[path]).unwrap_err();
        let help = "; pip install nvidia-nccl-cu13 and set DSMOE_CUDA_LIB_DIR to its lib folder, or install NCCL 2.14 or newer";
        assert_eq!(error("/nowhere/libnccl.so.2".into()), format!("libnccl.so.2 is not found{help}"));
        let lacking = made(dir.path(), "ncclSend", 22800);
        let want = format!("{} cannot be used: it lacks ncclSend{help}", lacking.display());
        assert_eq!(error(lacking), want);
        let old = error(made(dir.path(), "", 2804));
        assert!(old.contains("its version is 2.8.4, and 2.14 is needed"), "{old}");
        let text = dir.path().join("text.so");
        std::fs::write(&text, "no library").unwrap();
        let text = error(text);
        assert!(text.contains("text.so cannot be used") && text.ends_with(help), "{text}");
    }

    #[test]
    fn codes_are_progress_or_problems() {
        let dir = tempfile::tempdir().unwrap();
        let (api, _) = Api::open_first(&[made(dir.path(), "", 23203)]).unwrap();
        assert_eq!((api.version().as_str(), api.problem(3).as_str()), ("2.32.3", "three"));
        assert_eq!(api.problem(4), "code 4");
        assert_eq!(api.unique_id().unwrap_err(), 7);
        assert_eq!(api.group(|| Ok(())), Ok(Progress::GoesOn));
        assert_eq!(api.group(|| Err(5)), Err(5));
    }

    #[test]
    fn the_library_of_the_wheel_loads_without_a_driver() {
        let name = "the_library_of_the_wheel_loads_without_a_driver";
        let Ok((api, path)) = Api::open() else {
            skipped(name, "no NCCL; set DSMOE_CUDA_LIB_DIR");
            return;
        };
        let [one, other] = [(), ()].map(|()| api.unique_id());
        let version = api.version();
        assert!(version.starts_with("2.") && api.problem(3) != "code 3", "{path}: {version}");
        // Without a network interface there is no name.
        if let (Ok(one), Ok(other)) = (one, other) {
            assert_ne!(one.0, other.0, "{path}");
        }
    }

    #[test]
    fn the_wheel_beside_that_of_cuda_is_searched() {
        let found = candidates(Some(Path::new("/v/nvidia/cu13/lib")));
        let want = ["/v/nvidia/cu13/lib/libnccl.so.2", "/v/nvidia/nccl/lib/libnccl.so.2", "libnccl.so.2"];
        assert_eq!(found, want.map(PathBuf::from));
        assert_eq!(candidates(None), [PathBuf::from("libnccl.so.2")]);
        assert_eq!((dotted(2708), dotted(21400)), ("2.7.8".to_owned(), "2.14.0".to_owned()));
    }
}
