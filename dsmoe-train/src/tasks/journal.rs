//! Keeps responses on disk, so that an interrupted run can resume.
//!
//! The file has one JSON object per line: first a header that identifies the model, then each response under the hash
//! of its request, and counts of what was run, both with a hash of their own. A line that a kill cut short is dropped. Responses do not depend on
//! what ran beside them, so a resumed run gives the same results as an uninterrupted one.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use dsmoe_core::gguf::{self, Container};
use dsmoe_datasets::files::{open_regular, sha256_of};
use dsmoe_datasets::tasks::{Request, Response, sha256};
use dsmoe_router::RoutingStats;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{self, Hashed};

/// Version of the file's format and of how responses are made.
const VERSION: u32 = 2;

/// The work of a model for its responses.
///
/// ```
/// use dsmoe_router::RoutingStats;
/// use dsmoe_train::tasks::Ran;
///
/// // One token of a layer of two experts, which runs both, and one that runs the first.
/// let ran = |load: [u64; 2], histogram: [u64; 3]| {
///     let mut routing = RoutingStats::new(1, 2);
///     routing.add_counts(0, &load, &histogram);
///     Ran { tokens: 1, routing: Some(routing) }
/// };
/// let mut all = Ran::default();
/// all.add(&ran([1, 1], [0, 0, 1]));
/// all.add(&ran([1, 0], [0, 1, 0]));
/// assert_eq!((all.tokens, all.routing.unwrap().active_ratio()), (2, 0.75));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ran {
    /// Tokens.
    pub tokens: u64,
    /// Their routing; none without routers.
    pub routing: Option<RoutingStats>,
}

impl Ran {
    /// Adds the work of `other`.
    ///
    /// # Panics
    /// It is of a model with other layers or experts.
    pub fn add(&mut self, other: &Ran) {
        self.tokens = self.tokens.saturating_add(other.tokens);
        match (&mut self.routing, &other.routing) {
            (Some(routing), Some(other)) => routing.merge(other),
            (routing @ None, Some(other)) => *routing = Some(other.clone()),
            (_, None) => {}
        }
    }
}

/// The responses to requests of one model; held by one process at a time.
///
/// ```
/// use dsmoe_datasets::tasks::{Request, Response};
/// use dsmoe_train::Error;
/// use dsmoe_train::tasks::{Journal, Ran};
///
/// let work = tempfile::tempdir()?;
/// let path = work.path().join("answers.jsonl");
/// let (request, response) = (Request::Rolling { text: "A text.".into() }, Response::Rolling { sum: -12.5 });
/// let mut journal = Journal::open(&path, "the model's hash", None)?;
/// journal.put([(&request, &response)], Ran { tokens: 3, routing: None })?;
/// drop(journal);
/// // Another process finds the response; another model's is refused.
/// assert_eq!(Journal::open(&path, "the model's hash", None)?.get(&request), Some(&response));
/// assert!(matches!(Journal::open(&path, "another hash", None), Err(Error::OtherResponses(_))));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    known: HashMap<String, Response>,
    ran: Ran,
}

#[derive(Serialize, Deserialize, PartialEq)]
struct Header {
    dsmoe_responses: u32,
    made_by: String,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Response { request: String, response: Response },
    Ran { ran: Ran },
}

impl Journal {
    /// Opens the journal at `path`, or starts it. `made_by` identifies the model and all that its responses depend
    /// on; `routing` is an empty one of the model.
    ///
    /// # Errors
    /// The file cannot be read or written, is in use, is no journal, or is one of something else.
    pub fn open(path: &Path, made_by: &str, routing: Option<&RoutingStats>) -> Result<Journal> {
        // A pipe would block, and a device need not end.
        if path.exists() {
            open_regular(path).map_err(Error::io(path))?;
        }
        // Not to append: Windows does not let such a file be cut.
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(Error::io(path))?;
        // Some network file systems have no locks.
        if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
            return Err(Error::Busy(path.to_path_buf()));
        }
        let header = Header { dsmoe_responses: VERSION, made_by: made_by.to_owned() };
        let ran = Ran { tokens: 0, routing: routing.cloned() };
        let mut journal = Journal { path: path.to_path_buf(), file, known: HashMap::new(), ran };
        let whole = journal.read(&header)?;
        journal.file.set_len(whole).map_err(Error::io(path))?;
        journal.file.seek(SeekFrom::Start(whole)).map_err(Error::io(path))?;
        if whole == 0 {
            journal.write(&[header])?;
        }
        Ok(journal)
    }

    /// Reads the lines and returns the length of those that are complete.
    fn read(&mut self, wanted: &Header) -> Result<u64> {
        let bad = |line: usize| Error::BadResponses { path: self.path.clone(), line };
        let mut reader = BufReader::new(&self.file);
        let mut whole = 0;
        let mut bytes = Vec::new();
        for line in 1.. {
            bytes.clear();
            let read = reader.read_until(b'\n', &mut bytes).map_err(Error::io(&self.path))?;
            if bytes.last() != Some(&b'\n') {
                break;
            }
            if line == 1 {
                let found: Header = serde_json::from_slice(&bytes).map_err(|_| bad(line))?;
                if found != *wanted {
                    return Err(Error::OtherResponses(self.path.clone()));
                }
            } else {
                let hashed: Hashed<Line> = serde_json::from_slice(&bytes).map_err(|_| bad(line))?;
                match hashed.checked().ok_or_else(|| bad(line))? {
                    Line::Response { request, response } => {
                        self.known.insert(request, response);
                    }
                    Line::Ran { ran } => {
                        let fits = match (&ran.routing, &self.ran.routing) {
                            (Some(routing), Some(empty)) => routing.is_like(empty),
                            (routing, empty) => routing.is_none() && empty.is_none(),
                        };
                        if !fits {
                            return Err(bad(line));
                        }
                        self.ran.add(&ran);
                    }
                }
            }
            whole += read as u64;
        }
        Ok(whole)
    }

    /// Returns the response to `request`, if it is known.
    pub fn get(&self, request: &Request) -> Option<&Response> {
        self.known.get(&key(request))
    }

    /// Returns the work for all responses that are kept.
    pub fn ran(&self) -> &Ran {
        &self.ran
    }

    /// Keeps responses and the work for them, on disk too.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put<'a>(
        &mut self,
        responses: impl IntoIterator<Item = (&'a Request, &'a Response)>,
        ran: Ran,
    ) -> Result<()> {
        let mut lines = Vec::new();
        for (request, response) in responses {
            let request = key(request);
            self.known.insert(request.clone(), response.clone());
            lines.push(Hashed::of(Line::Response { request, response: response.clone() }));
        }
        if ran.tokens > 0 {
            self.ran.add(&ran);
            lines.push(Hashed::of(Line::Ran { ran }));
        }
        self.write(&lines)
    }

    fn write(&mut self, lines: &[impl Serialize]) -> Result<()> {
        let mut bytes = Vec::new();
        for line in lines {
            bytes.extend(serde_json::to_vec(line).unwrap_or_default());
            bytes.push(b'\n');
        }
        self.file.write_all(&bytes).map_err(Error::io(&self.path))
    }

    /// Removes the file once all responses are used.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(self) -> Result<()> {
        fs::remove_file(&self.path).map_err(Error::io(&self.path))
    }
}

/// Computes the key of a request from its content.
fn key(request: &Request) -> String {
    let text = match request {
        Request::LogLikelihood { context, continuation } => {
            format!("likelihood {} {context}{continuation}", context.len())
        }
        Request::Rolling { text } => format!("rolling {text}"),
        Request::Generate { context, until, max_tokens } => {
            format!("generate {max_tokens} {until:?} {context}")
        }
    };
    sha256(&text)[..32].to_owned()
}

/// Computes the SHA-256 of the files that decide a model's responses: configuration, weights and tokenizer in `dir`,
/// or the GGUF file that it names or holds.
///
/// # Errors
/// A file cannot be read.
pub fn model_sha256(dir: &Path) -> Result<String> {
    let counts = |name: &String| {
        ["config.json", "tokenizer.json", "tokenizer_config.json"].contains(&&name[..])
            || name.ends_with(".safetensors")
    };
    let paths: Vec<PathBuf> = match gguf::file_of(dir)? {
        Some(file) => Container::open(&file)?.files,
        None => files::names(dir)?.iter().filter(|name| counts(name)).map(|name| dir.join(name)).collect(),
    };
    let hash = |path: &PathBuf| -> Result<String> {
        let name = path.file_name().unwrap_or_default().display();
        Ok(format!("{name} {}\n", sha256_of(path, &mut |_| {}).map_err(Error::io(path))?))
    };
    let hashes: Vec<String> = paths.par_iter().map(hash).collect::<Result<_>>()?;
    Ok(sha256(&hashes.concat()))
}
