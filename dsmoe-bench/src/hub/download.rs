//! Downloads of models into the Hub's cache, whose layout the crate hf-hub knows.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dsmoe_core::files::HubName;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

use super::listing::{File, Listing, is_hash};
use super::settings::{Settings, short_text};
use super::watch::{Lost, watched};
use crate::format;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

/// How often the download of a file is tried; each try continues where the last one ended.
const TRIES: u32 = 5;

/// Downloads the files of a model that the cache lacks, and returns the directory, or the file, in the cache. Without a
/// network, what the cache has is used.
pub(super) fn model(name: &HubName, settings: &Settings, ui: &Ui) -> Result<PathBuf> {
    let place = Place::of(name, settings);
    if settings.offline {
        return place.cached(name).with_context(|| {
            format!(
                "{}: not in {}, and HF_HUB_OFFLINE forbids to download it",
                name.id,
                settings.cache.display()
            )
        });
    }
    let asked = name.clone();
    let at = settings.clone();
    let listing = watched(settings.patience, |(): ()| (), move |_| list(&asked, &at));
    let listing = match listing.unwrap_or_else(|lost| Err(Failure::of_lost(lost))) {
        Ok(listing) => listing,
        Err(failure) if failure.is_of_the_network() => {
            let cached = place.cached(name).with_context(|| failure.words(name, settings, None))?;
            ui.note(format_args!(
                "note: {} is out of reach; the cache has {}",
                settings.endpoint,
                cached.display()
            ));
            return Ok(cached);
        }
        Err(failure) => bail!(failure.words(name, settings, None)),
    };
    let needed = listing.needed(name)?;
    let snapshot = place.snapshots().join(&listing.sha);
    let missing: Vec<File> =
        needed.iter().filter(|file| !is_complete(&snapshot.join(&file.name), file)).cloned().collect();
    if !missing.is_empty() {
        fetch(name, settings, &listing.sha, missing, ui)?;
    }
    place.keep(name, &listing.sha)?;
    Ok(place.found(name, &snapshot, needed.first().map(|file| file.name.as_str())))
}

/// Where the cache has a model.
struct Place {
    cache: Cache,
    folder: PathBuf,
}

impl Place {
    fn of(name: &HubName, settings: &Settings) -> Place {
        let folder = settings.cache.join(Repo::model(name.id.clone()).folder_name());
        Place { cache: Cache::new(settings.cache.clone()), folder }
    }

    fn snapshots(&self) -> PathBuf {
        self.folder.join("snapshots")
    }

    /// Returns what the cache has of the revision.
    fn cached(&self, name: &HubName) -> Option<PathBuf> {
        let reference = short_text(&self.folder.join("refs").join(&name.revision));
        let commit = reference.as_deref().map_or(name.revision.as_str(), str::trim);
        let snapshot = self.snapshots().join(commit);
        let file = name.file.as_deref();
        let found = if is_hash(commit) { self.found(name, &snapshot, file) } else { return None };
        found.exists().then_some(found)
    }

    /// Returns the directory of a model, or the path of one file.
    fn found(&self, name: &HubName, snapshot: &Path, first: Option<&str>) -> PathBuf {
        match (&name.file, first) {
            (Some(_), Some(first)) => snapshot.join(first),
            _ => snapshot.to_owned(),
        }
    }

    /// Notes that the revision is this commit, now that all files are there.
    fn keep(&self, name: &HubName, sha: &str) -> Result<()> {
        if name.revision != sha {
            // The crate noted the commit as a name of itself.
            let _ = fs::remove_file(self.folder.join("refs").join(sha));
            let repo = Repo::with_revision(name.id.clone(), RepoType::Model, name.revision.clone());
            let noted = self.cache.repo(repo).create_ref(sha);
            noted.with_context(|| format!("{}: cannot be written", self.folder.join("refs").display()))?;
        }
        Ok(())
    }
}

/// Returns whether the cache has all of a file.
fn is_complete(path: &Path, file: &File) -> bool {
    fs::metadata(path).is_ok_and(|found| file.size.is_none_or(|size| size == found.len()))
}

fn api(settings: &Settings) -> std::result::Result<Api, ApiError> {
    ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
        .with_endpoint(settings.endpoint.clone())
        .with_token(settings.token.clone())
        .with_progress(false)
        .with_user_agent("dsmoe", env!("CARGO_PKG_VERSION"))
        .build()
}

/// Asks the Hub for the files of a model and their sizes.
fn list(name: &HubName, settings: &Settings) -> std::result::Result<Listing, Failure> {
    let repo = Repo::with_revision(name.id.clone(), RepoType::Model, name.revision.clone());
    let request = api(settings)?.repo(repo).info_request().query("blobs", "true");
    let mut response = request.call().map_err(|error| Failure::from(Box::new(error)))?;
    Ok(response.body_mut().read_json().map_err(Box::new)?)
}

/// Downloads files of one commit, with progress.
fn fetch(name: &HubName, settings: &Settings, sha: &str, files: Vec<File>, ui: &Ui) -> Result<()> {
    let (number, total) = (files.len(), files.iter().filter_map(|file| file.size).sum::<u64>());
    let started = Instant::now();
    let mut progress = Progress::new(ui, name.id.clone(), Unit::Bytes, total);
    let (mut complete, mut current) = (0, 0);
    let show = |event: Event| {
        match event {
            Event::At(bytes) => current = bytes,
            Event::Complete(bytes) => (complete, current) = (complete + bytes, 0),
            Event::Alive => {}
        }
        let done: u64 = complete + current;
        progress.set(done, total.max(done), "");
    };
    let (at, repo) =
        (settings.clone(), Repo::with_revision(name.id.clone(), RepoType::Model, sha.to_owned()));
    let sha = sha.to_owned();
    let outcome = watched(settings.patience, show, move |events| {
        let api = api(&at).map_err(|error| (Failure::from(error), None))?;
        let blobs = at.cache.join(repo.folder_name()).join("blobs");
        let source = Source { repo: api.repo(repo), api, sha, blobs, events: events.clone() };
        files
            .into_iter()
            .try_for_each(|file| source.file(&file).map_err(|failure| (failure, Some(file.name))))
    });
    progress.finish();
    match outcome.unwrap_or_else(|lost| Err((Failure::of_lost(lost), None))) {
        Ok(()) => {}
        Err((failure, file)) => bail!(failure.words(name, settings, file.as_deref())),
    }
    let files = if number == 1 { "file" } else { "files" };
    let took = format::duration(started.elapsed().as_secs_f64());
    ui.note(format_args!("{}: {number} {files}, {} in {took}", name.id, format::bytes(total)));
    Ok(())
}

/// An event of a download.
enum Event {
    /// So many bytes of the file at work are there.
    At(u64),
    /// A file of so many bytes is there.
    Complete(u64),
    /// A wait is not silence.
    Alive,
}

/// One commit of a model on the Hub.
struct Source {
    api: Api,
    repo: ApiRepo,
    sha: String,
    blobs: PathBuf,
    events: Sender<Event>,
}

impl Source {
    /// Downloads a file, and continues after faults that pass.
    fn file(&self, file: &File) -> std::result::Result<(), Failure> {
        for attempt in 1.. {
            match self.attempt(file) {
                Ok(bytes) => {
                    self.tell(Event::Complete(bytes));
                    break;
                }
                Err(failure) if failure.may_pass() && attempt < TRIES => self.wait(200 << attempt),
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    fn attempt(&self, file: &File) -> std::result::Result<u64, Failure> {
        let metadata = self.api.metadata(&self.repo.url(&file.name))?;
        // Both become names of files.
        let etag = metadata.etag().trim_start_matches("W/");
        if !is_hash(etag) || metadata.commit_hash() != self.sha {
            return Err(Failure::Odd);
        }
        if let Some(blob) = file.blob() {
            self.remove_useless(blob, metadata.size() as u64);
        }
        self.remove_useless(etag, metadata.size() as u64);
        let path =
            self.repo.download_with_progress(&file.name, Meter { at: 0, events: self.events.clone() })?;
        let size = file.size.unwrap_or(metadata.size() as u64);
        match self.check(&path, size, file.sha256()) {
            Ok(true) => Ok(size),
            outcome => {
                // Nobody may find the file in the cache.
                let blob = fs::canonicalize(&path);
                let _ = fs::remove_file(&path);
                let _ = blob.map(fs::remove_file);
                outcome.map_err(ApiError::from)?;
                Err(Failure::Damaged)
            }
        }
    }

    /// Removes the part of a file that an earlier download left, if there is nothing to continue: a whole file, or more.
    fn remove_useless(&self, blob: &str, size: u64) {
        let part = self.blobs.join(blob).with_extension("part");
        if fs::metadata(&part).is_ok_and(|found| found.len() >= size) {
            let _ = fs::remove_file(part);
        }
    }

    /// Returns whether a file is the one that the Hub told of.
    fn check(&self, path: &Path, size: u64, sha256: Option<&str>) -> std::io::Result<bool> {
        let mut file = fs::File::open(path)?;
        let (mut hash, mut length, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
        if file.metadata()?.len() != size {
            return Ok(false);
        }
        let Some(wanted) = sha256 else { return Ok(true) };
        loop {
            let read = match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(cause) if cause.kind() == ErrorKind::Interrupted => continue,
                Err(cause) => return Err(cause),
            };
            hash.update(&buffer[..read]);
            length += read as u64;
            self.tell(Event::Alive);
        }
        let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(length == size && found.eq_ignore_ascii_case(wanted))
    }

    fn wait(&self, milliseconds: u64) {
        for _ in 0..milliseconds.div_ceil(100) {
            self.tell(Event::Alive);
            sleep(Duration::from_millis(100));
        }
    }

    fn tell(&self, event: Event) {
        // Nobody listens any more after the deadline.
        let _ = self.events.send(event);
    }
}

/// Reports the bytes of the file at work.
struct Meter {
    at: u64,
    events: Sender<Event>,
}

impl hf_hub::api::Progress for Meter {
    fn init(&mut self, _: usize, _: &str) {
        self.at = 0;
    }

    fn update(&mut self, size: usize) {
        self.at += size as u64;
        let _ = self.events.send(Event::At(self.at));
    }

    fn finish(&mut self) {}
}

/// Why there is no file.
#[derive(Debug)]
enum Failure {
    Api(ApiError),
    /// The file is not the one that the Hub told of.
    Damaged,
    /// The answer is not that of a Hub.
    Odd,
    Lost(Lost),
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Failure {
        Failure::Api(error)
    }
}

impl From<Box<ureq::Error>> for Failure {
    fn from(error: Box<ureq::Error>) -> Failure {
        Failure::Api(ApiError::RequestError(error))
    }
}

impl Failure {
    fn of_lost(lost: Lost) -> Failure {
        Failure::Lost(lost)
    }

    fn request(&self) -> Option<&ureq::Error> {
        match self {
            Failure::Api(ApiError::RequestError(error)) => Some(error),
            _ => None,
        }
    }

    fn status(&self) -> Option<u16> {
        match self.request() {
            Some(ureq::Error::StatusCode(status)) => Some(*status),
            _ => None,
        }
    }

    /// Returns whether the Hub could not be asked.
    fn is_of_the_network(&self) -> bool {
        match (self.status(), self.request()) {
            (Some(status), _) => status >= 500,
            (None, Some(ureq::Error::Json(_) | ureq::Error::BadUri(_) | ureq::Error::Http(_))) => false,
            (None, other) => other.is_some() || matches!(self, Failure::Lost(Lost::Silent)),
        }
    }

    /// Returns whether the same request may succeed later.
    fn may_pass(&self) -> bool {
        const OF_THE_DISK: [ErrorKind; 6] = [
            ErrorKind::StorageFull,
            ErrorKind::QuotaExceeded,
            ErrorKind::FileTooLarge,
            ErrorKind::PermissionDenied,
            ErrorKind::ReadOnlyFilesystem,
            ErrorKind::NotFound,
        ];
        match self {
            Failure::Api(ApiError::IoError(cause)) => !OF_THE_DISK.contains(&cause.kind()),
            Failure::Damaged => true,
            _ => self.is_of_the_network() || matches!(self.status(), Some(408 | 416 | 429)),
        }
    }

    /// Says what went wrong and what helps.
    fn words(&self, name: &HubName, settings: &Settings, file: Option<&str>) -> String {
        let (id, endpoint) = (&name.id, &settings.endpoint);
        let what = file.map_or_else(|| id.clone(), |file| format!("{id}/{file}"));
        let login = match settings.token {
            Some(_) => "with the account of your token",
            None => "and log in by `hf auth login`, or set HF_TOKEN",
        };
        match (self, self.status()) {
            (_, Some(401)) if file.is_none() => format!(
                "{what}: the Hub has no such public model (401); check the name, or if it is private log in by `hf auth login` \
                 or set HF_TOKEN"
            ),
            (_, Some(401 | 403)) => {
                format!("{what}: the model is gated; accept its terms at {endpoint}/{id} {login}")
            }
            (_, Some(404)) if file.is_none() && name.revision != "main" => {
                format!("{what}: the Hub has no such model, or not its revision {} (404)", name.revision)
            }
            (_, Some(404)) => format!("{what}: the Hub has no such file or model (404); check the name"),
            (_, Some(429)) => format!("{what}: {endpoint} got too many requests (429); wait some minutes"),
            (_, Some(status)) => format!("{what}: {endpoint} answered {status}; try again later"),
            (Failure::Damaged, _) => format!(
                "{what}: what arrived is not the file that the Hub told of, in {TRIES} tries; check the network or HF_ENDPOINT"
            ),
            (Failure::Odd, _) => {
                format!("{what}: {endpoint} does not answer as the Hub does; check HF_ENDPOINT")
            }
            (Failure::Lost(Lost::Silent), _) => format!(
                "{what}: nothing came from {endpoint} for {} s; run the command again to continue, or set \
                 HF_HUB_DOWNLOAD_TIMEOUT to more seconds",
                settings.patience.as_secs_f64()
            ),
            (Failure::Lost(Lost::Panicked), _) => {
                format!("{what}: the download ended unexpectedly; run it again")
            }
            (Failure::Api(ApiError::LockAcquisition(lock)), _) => {
                format!("{what}: another process downloads it and holds {}; wait for its end", lock.display())
            }
            (Failure::Api(ApiError::RequestError(cause)), _)
                if self.is_of_the_network() && file.is_some() =>
            {
                format!("{what}: {endpoint} is out of reach ({cause}); run the command again to continue")
            }
            (Failure::Api(ApiError::RequestError(cause)), _) if self.is_of_the_network() => format!(
                "{what}: {endpoint} is out of reach ({cause}), and the model is not in {}; check the network, or name a \
                 model directory",
                settings.cache.display()
            ),
            (Failure::Api(ApiError::IoError(cause)), _) => {
                format!("{what}: the download into {} failed: {cause}", settings.cache.display())
            }
            (Failure::Api(cause), _) => {
                format!("{what}: {endpoint} does not answer as the Hub does: {cause}")
            }
        }
    }
}
