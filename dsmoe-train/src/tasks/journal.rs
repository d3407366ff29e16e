//! Responses on disk, so that a run that was stopped goes on where it was.
//!
//! One JSON object a line: first what made the responses, then each response under its request's hash, and what was run
//! for them. A line that a kill cut short is dropped. Responses do not depend on what ran beside them, so a resumed
//! run gives what an uninterrupted one gives.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use dsmoe_datasets::tasks::{Request, Response, sha256};
use dsmoe_router::RoutingStats;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::checkpoint::hex;
use crate::error::{Error, Result};
use crate::files;

/// Version of the file's format and of how responses are made.
const VERSION: u32 = 1;

/// What a model ran for its responses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ran {
    /// Tokens.
    pub tokens: u64,
    /// Their routing; none without routers.
    pub routing: Option<RoutingStats>,
}

impl Ran {
    /// Adds what `other` ran.
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
        let file = OpenOptions::new().read(true).append(true).create(true).open(path);
        let file = file.map_err(Error::io(path))?;
        // Some network file systems have no locks.
        if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
            return Err(Error::Busy { path: path.to_path_buf() });
        }
        let header = Header { dsmoe_responses: VERSION, made_by: made_by.to_owned() };
        let ran = Ran { tokens: 0, routing: routing.cloned() };
        let mut journal = Journal { path: path.to_path_buf(), file, known: HashMap::new(), ran };
        let whole = journal.read(&header)?;
        journal.file.set_len(whole).map_err(Error::io(path))?;
        if whole == 0 {
            journal.write(&[header])?;
        }
        Ok(journal)
    }

    /// Reads the lines; the length of those that are whole.
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
                    return Err(Error::OtherResponses { path: self.path.clone() });
                }
            } else {
                match serde_json::from_slice(&bytes).map_err(|_| bad(line))? {
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

    /// The response to `request`, if it is known.
    pub fn get(&self, request: &Request) -> Option<&Response> {
        self.known.get(&key(request))
    }

    /// What was run for all that is kept.
    pub fn ran(&self) -> &Ran {
        &self.ran
    }

    /// Keeps responses and what was run for them, on disk too.
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
            lines.push(Line::Response { request, response: response.clone() });
        }
        if ran.tokens > 0 {
            self.ran.add(&ran);
            lines.push(Line::Ran { ran });
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

    /// Removes the file: what it was for is done.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(self) -> Result<()> {
        fs::remove_file(&self.path).map_err(Error::io(&self.path))
    }
}

/// A request by its content.
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

/// SHA-256 of the files that make a model's responses: configuration, weights and tokenizer in `dir`.
///
/// # Errors
/// A file cannot be read.
pub fn model_sha256(dir: &Path) -> Result<String> {
    let counts = |name: &String| {
        ["config.json", "tokenizer.json", "tokenizer_config.json"].contains(&&name[..])
            || name.ends_with(".safetensors")
    };
    let names: Vec<String> = files::names(dir)?.into_iter().filter(counts).collect();
    let hash = |name: &String| -> Result<String> {
        let path = dir.join(name);
        let mut file = File::open(&path).map_err(Error::io(&path))?;
        let mut hasher = Sha256::new();
        let mut piece = vec![0; 1 << 20];
        loop {
            match file.read(&mut piece).map_err(Error::io(&path))? {
                0 => break,
                read => hasher.update(&piece[..read]),
            }
        }
        Ok(format!("{name} {}\n", hex(&hasher.finalize())))
    };
    let hashes: Vec<String> = names.par_iter().map(hash).collect::<Result<_>>()?;
    Ok(sha256(&hashes.concat()))
}
