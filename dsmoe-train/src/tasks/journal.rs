//! Responses on disk, so that a run that was stopped goes on where it was.
//!
//! One JSON object a line: first what made the responses, then each response under its request's hash. A line that a
//! kill cut short is dropped. Responses do not depend on what ran beside them, so a resumed run gives what an
//! uninterrupted one gives.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use dsmoe_datasets::tasks::{Request, Response, sha256};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Version of the file's format and of how responses are made.
const VERSION: u32 = 1;

/// The responses to requests of one model.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    known: HashMap<String, Response>,
}

#[derive(Serialize, Deserialize, PartialEq)]
struct Header {
    dsmoe_responses: u32,
    made_by: String,
}

#[derive(Serialize, Deserialize)]
struct Line {
    request: String,
    response: Response,
}

impl Journal {
    /// Opens the journal at `path`, or starts it. `made_by` identifies the model and all that its responses depend
    /// on.
    ///
    /// # Errors
    /// The file cannot be read or written, is no journal, or is one of something else.
    pub fn open(path: &Path, made_by: &str) -> Result<Journal> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path);
        let file = file.map_err(Error::io(path))?;
        let header = Header { dsmoe_responses: VERSION, made_by: made_by.to_owned() };
        let mut journal = Journal { path: path.to_path_buf(), file, known: HashMap::new() };
        let (found, whole) = journal.read()?;
        journal.file.set_len(whole).map_err(Error::io(path))?;
        match found {
            None => journal.write(&header)?,
            Some(found) if found == header => {}
            Some(_) => {
                return Err(Error::OtherResponses { path: path.to_path_buf() });
            }
        }
        Ok(journal)
    }

    /// Reads the lines; the header, and the length of the lines that are whole.
    fn read(&mut self) -> Result<(Option<Header>, u64)> {
        let bad = |line: usize| Error::BadResponses { path: self.path.clone(), line };
        let mut reader = BufReader::new(&self.file);
        let (mut header, mut whole) = (None, 0);
        let mut bytes = Vec::new();
        for line in 1.. {
            bytes.clear();
            let read = reader.read_until(b'\n', &mut bytes).map_err(Error::io(&self.path))?;
            if bytes.last() != Some(&b'\n') {
                break;
            }
            if line == 1 {
                header = Some(serde_json::from_slice(&bytes).map_err(|_| bad(line))?);
            } else {
                let Line { request, response } = serde_json::from_slice(&bytes).map_err(|_| bad(line))?;
                self.known.insert(request, response);
            }
            whole += read as u64;
        }
        Ok((header, whole))
    }

    /// The response to `request`, if it is known.
    pub fn get(&self, request: &Request) -> Option<&Response> {
        self.known.get(&key(request))
    }

    /// Keeps responses, on disk too.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put<'a>(
        &mut self,
        responses: impl IntoIterator<Item = (&'a Request, &'a Response)>,
    ) -> Result<()> {
        let mut lines = Vec::new();
        for (request, response) in responses {
            let line = Line { request: key(request), response: response.clone() };
            lines.extend(serde_json::to_vec(&line).unwrap_or_default());
            lines.push(b'\n');
            self.known.insert(line.request, line.response);
        }
        self.file.write_all(&lines).map_err(Error::io(&self.path))
    }

    fn write(&mut self, header: &Header) -> Result<()> {
        let mut line = serde_json::to_vec(header).unwrap_or_default();
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::io(&self.path))
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
