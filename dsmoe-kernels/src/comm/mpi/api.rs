//! The functions of a library of MPI, found when a program runs.

use std::error::Error;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::ptr::null_mut;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::abi::{Abi, Handle, Words};

/// Bytes for the texts of a library: no interface writes more.
const TEXT: usize = 8192;

type In = *const c_void;
type Out = *mut c_void;
type Counts = *const c_int;

/// Declares the functions of the table with the signatures of the standard, in which handles are words.
macro_rules! table {
    ($($name:ident: $symbol:literal ($($argument:ty),*);)*) => {
        struct Table { $($name: unsafe extern "C" fn($($argument),*) -> c_int,)* }

        impl Table {
            fn load(library: &Library) -> Result<Table, String> {
                $(
                    // SAFETY: the function has this signature in every interface, where handles are pointers or `int`s. An
                    // `int` is the lower half of a word, in registers and, on little-endian machines, in memory.
                    let $name = unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> c_int>($symbol)
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

table! {
    init_thread: b"MPI_Init_thread" (Out, Out, c_int, *mut c_int);
    finalize: b"MPI_Finalize" ();
    abort: b"MPI_Abort" (Handle, c_int);
    comm_rank: b"MPI_Comm_rank" (Handle, *mut c_int);
    comm_size: b"MPI_Comm_size" (Handle, *mut c_int);
    comm_set_errhandler: b"MPI_Comm_set_errhandler" (Handle, Handle);
    comm_split_type: b"MPI_Comm_split_type" (Handle, c_int, c_int, Handle, *mut Handle);
    get_library_version: b"MPI_Get_library_version" (*mut c_char, *mut c_int);
    error_string: b"MPI_Error_string" (c_int, *mut c_char, *mut c_int);
    test: b"MPI_Test" (*mut Handle, *mut c_int, usize);
    ibarrier: b"MPI_Ibarrier" (Handle, *mut Handle);
    ibcast: b"MPI_Ibcast" (Out, c_int, Handle, c_int, Handle, *mut Handle);
    iallgatherv: b"MPI_Iallgatherv" (In, c_int, Handle, Out, Counts, Counts, Handle, Handle, *mut Handle);
    ialltoallv: b"MPI_Ialltoallv" (In, Counts, Counts, Handle, Out, Counts, Counts, Handle, Handle, *mut Handle);
}

/// A library of MPI. It stays open, since its threads and exit handlers may run as long as the program does.
pub(super) struct Api {
    table: Table,
    words: Words,
    abi: Abi,
    _library: ManuallyDrop<Library>,
}

/// A communicator of the library that made it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comm(Handle);

/// A non-blocking call that has started and not completed.
#[derive(Debug)]
pub(super) struct Request(Handle);

/// The code of a failed call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Code(c_int);

fn checked(code: c_int) -> Result<(), Code> {
    if code == 0 { Ok(()) } else { Err(Code(code)) }
}

impl Api {
    /// Opens the library `name`, a path or a name that the system looks for.
    pub(super) fn open(name: &str) -> Result<Api, String> {
        // SAFETY: opening a library of MPI runs its initialisers, which do not depend on this program. Open MPI's modules
        // need the symbols of the library to be global.
        let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) };
        // The loader's own text is the source of the error.
        let library =
            library.map_err(|error| error.source().map_or(error.to_string(), |source| source.to_string()))?;
        let library = ManuallyDrop::new(library);
        let table = Table::load(&library)?;
        let address = |symbol: &str| {
            // SAFETY: the type is that of a pointer, whose value alone is used.
            let found = unsafe { library.get::<*const c_void>(symbol.as_bytes()) };
            found.ok().map(|symbol| symbol.into_raw() as usize)
        };
        let abi = abi(
            &library,
            &text(|at, len| {
                // SAFETY: the function may be called at any time; `text` gives room for what it writes.
                unsafe { (table.get_library_version)(at, len) }
            }),
        )?;
        let words = abi.words(address)?;
        Ok(Api { table, words, abi, _library: library })
    }

    pub(super) fn abi(&self) -> Abi {
        self.abi
    }

    /// Returns the first line of the library's own text.
    pub(super) fn version(&self) -> String {
        let text = text(|at, len| {
            // SAFETY: the function may be called at any time; `text` gives room for what it writes.
            unsafe { (self.table.get_library_version)(at, len) }
        });
        text.lines().next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Starts MPI, for calls by one thread at a time. Waits for the other processes.
    pub(super) fn init(&self) -> Result<(), String> {
        let mut provided = 0;
        // SAFETY: null stands for no arguments; `provided` lives until the call returns. `Mpi` starts once per process.
        let code =
            unsafe { (self.table.init_thread)(null_mut(), null_mut(), self.words.serialized, &mut provided) };
        checked(code).map_err(|code| format!("MPI_Init_thread failed: {}", self.problem(code)))?;
        if provided < self.words.serialized {
            return Err(format!("it allows calls from its first thread alone (level {provided})"));
        }
        // SAFETY: MPI has started, and the handles are its own.
        let code = unsafe { (self.table.comm_set_errhandler)(self.words.world, self.words.errors_return) };
        checked(code).map_err(|code| self.problem(code))
    }

    /// Ends MPI. Waits for the other processes.
    pub(super) fn finalize(&self) {
        // SAFETY: MPI has started, and no call is incomplete: a call that fails ends the process.
        unsafe { (self.table.finalize)() };
    }

    /// Ends all processes.
    pub(super) fn abort(&self, status: i32) {
        // SAFETY: MPI has started.
        unsafe { (self.table.abort)(self.words.world, status) };
    }

    /// The text of a failed call.
    pub(super) fn problem(&self, Code(code): Code) -> String {
        let text = text(|at, len| {
            // SAFETY: `text` gives room for what the function writes; a code that is none gives an error.
            unsafe { (self.table.error_string)(code, at, len) }
        });
        let words: Vec<&str> = text.split_whitespace().collect();
        if words.is_empty() { format!("code {code}") } else { words.join(" ") }
    }

    /// All processes.
    pub(super) fn world(&self) -> Comm {
        Comm(self.words.world)
    }

    /// The processes of this machine. Waits for all others.
    pub(super) fn machine(&self) -> Result<Comm, Code> {
        let mut machine = 0;
        let Words { world, shared, info_null, .. } = self.words;
        // SAFETY: MPI has started, the handles are its own, and `machine` lives until the call returns.
        checked(unsafe { (self.table.comm_split_type)(world, shared, 0, info_null, &mut machine) })?;
        Ok(Comm(machine))
    }

    /// Returns this process's number in `comm` and the number of processes.
    pub(super) fn rank_and_size(&self, comm: Comm) -> Result<(usize, usize), Code> {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: MPI has started, the handle is its own, and `rank` lives until the call returns.
        checked(unsafe { (self.table.comm_rank)(comm.0, &mut rank) })?;
        // SAFETY: as above, for `size`.
        checked(unsafe { (self.table.comm_size)(comm.0, &mut size) })?;
        Ok((rank as usize, size as usize))
    }

    /// Returns true when a call has finished.
    pub(super) fn is_done(&self, request: &mut Request) -> Result<bool, Code> {
        let mut done = 0;
        // SAFETY: the request was made by this library and has not finished; `done` lives until the call returns.
        let code = unsafe { (self.table.test)(&mut request.0, &mut done, self.words.status_ignore) };
        checked(code).map(|()| done != 0)
    }

    /// Starts to wait for all.
    pub(super) fn barrier(&self) -> Result<Request, Code> {
        let mut request = 0;
        // SAFETY: MPI has started, and `request` lives until the call returns.
        checked(unsafe { (self.table.ibarrier)(self.words.world, &mut request) })?;
        Ok(Request(request))
    }

    /// Starts to set `bytes` to those of process `from` of `comm`.
    ///
    /// # Safety
    /// Nobody else uses `bytes` until the call has finished.
    pub(super) unsafe fn broadcast(
        &self,
        comm: Comm,
        from: usize,
        bytes: &mut [u8],
    ) -> Result<Request, Code> {
        let mut request = 0;
        let (at, len) = (to(bytes), count(bytes.len()));
        // SAFETY: the bytes are the caller's until the call has finished, by its promise.
        let code =
            unsafe { (self.table.ibcast)(at, len, self.words.byte, count(from), comm.0, &mut request) };
        checked(code).map(|()| Request(request))
    }

    /// Starts to set `recv`, cut by `lens`, to the `send` of all processes.
    ///
    /// # Safety
    /// `send` has the length of this process, and the lengths add up to that of `recv`. Nobody else uses `recv`, and nobody
    /// changes or moves the others, until the call has finished.
    pub(super) unsafe fn all_gather(
        &self,
        send: &[u8],
        recv: &mut [u8],
        lens: &Pieces,
    ) -> Result<Request, Code> {
        let mut request = 0;
        let Words { world, byte, .. } = self.words;
        let (from, len, to) = (from(send), count(send.len()), to(recv));
        let (lens, starts) = (lens.lens.as_ptr(), lens.starts.as_ptr());
        // SAFETY: the pieces lie in `recv`; memory is the caller's until the call has finished. Both by its promise.
        let code =
            unsafe { (self.table.iallgatherv)(from, len, byte, to, lens, starts, byte, world, &mut request) };
        checked(code).map(|()| Request(request))
    }

    /// Starts to send the pieces of `send`, and to set those of `recv`.
    ///
    /// # Safety
    /// The lengths add up to those of their slices. Nobody else uses `recv`, and nobody changes or moves the others, until
    /// the call has finished.
    pub(super) unsafe fn all_to_all(
        &self,
        send: &[u8],
        sent: &Pieces,
        recv: &mut [u8],
        received: &Pieces,
    ) -> Result<Request, Code> {
        let mut request = 0;
        let Words { world, byte, .. } = self.words;
        let (from, to) = (from(send), to(recv));
        let (sent, sent_at) = (sent.lens.as_ptr(), sent.starts.as_ptr());
        let (received, received_at) = (received.lens.as_ptr(), received.starts.as_ptr());
        let call = self.table.ialltoallv;
        // SAFETY: the pieces lie in their slices; memory is the caller's until the call has finished. Both by its promise.
        let code =
            unsafe { call(from, sent, sent_at, byte, to, received, received_at, byte, world, &mut request) };
        checked(code).map(|()| Request(request))
    }
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("abi", &self.abi).finish_non_exhaustive()
    }
}

/// The lengths and starts of pieces that lie one after the other, as MPI counts them.
#[derive(Debug)]
pub(super) struct Pieces {
    lens: Vec<c_int>,
    starts: Vec<c_int>,
}

impl Pieces {
    /// Converts lengths that add up to at most [`MOST`].
    pub(super) fn new(lens: &[usize]) -> Pieces {
        let mut end = 0;
        let starts = lens.iter().map(|&len| {
            let start = end;
            end += len;
            count(start)
        });
        Pieces { starts: starts.collect(), lens: lens.iter().map(|&len| count(len)).collect() }
    }
}

/// The most bytes of one call: counts are C `int`s.
pub(super) const MOST: usize = 1 << 30;

fn count(bytes: usize) -> c_int {
    c_int::try_from(bytes).expect("lengths are checked before")
}

/// The address of bytes to send. That of an empty slice is dangling: it may be 1, which is `MPI_IN_PLACE` in two of the
/// interfaces.
fn from(bytes: &[u8]) -> In {
    static NOTHING: u8 = 0;
    if bytes.is_empty() { (&raw const NOTHING).cast() } else { bytes.as_ptr().cast() }
}

/// The address of bytes to set; see [`from`].
fn to(bytes: &mut [u8]) -> Out {
    if bytes.is_empty() { from(bytes).cast_mut() } else { bytes.as_mut_ptr().cast() }
}

/// Finds out the interface of an open library, whose own text is `version`.
fn abi(library: &Library, version: &str) -> Result<Abi, String> {
    // SAFETY: the function has this signature in the standard.
    let ask = unsafe {
        library.get::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(b"MPI_Abi_get_version")
    };
    if let Ok(ask) = ask {
        let (mut major, mut minor) = (-1, -1);
        // SAFETY: the function may be called at any time; both places live until it returns.
        let code = unsafe { ask(&mut major, &mut minor) };
        match (code, major) {
            (0, 1) => return Ok(Abi::Standard),
            (0, 2..) => return Err(format!("its interface {major}.{minor} is newer than 1")),
            // A library with an interface of its own says -1.
            _ => {}
        }
    }
    // SAFETY: the type is that of a pointer, which is not read.
    if unsafe { library.get::<*const c_void>(b"ompi_mpi_comm_world") }.is_ok() {
        return Ok(Abi::OpenMpi);
    }
    let relatives = ["MPICH", "Intel(R) MPI", "MVAPICH"];
    if relatives.iter().any(|name| version.contains(name)) {
        return Ok(Abi::Mpich);
    }
    Err(format!("its binary interface is unknown ({})", version.lines().next().unwrap_or_default()))
}

/// Returns what `write` writes: it gets room for [`TEXT`] bytes and a place for their number.
fn text(write: impl FnOnce(*mut c_char, *mut c_int) -> c_int) -> String {
    let (mut bytes, mut len) = (vec![0u8; TEXT + 1], 0);
    if write(bytes.as_mut_ptr().cast(), &mut len) != 0 {
        return String::new();
    }
    // The number may count the final zero, or not be set.
    bytes[TEXT] = 0;
    CStr::from_bytes_until_nul(&bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}
