//! Models of the Hugging Face Hub: a server of this process stands for it.

#[cfg(not(feature = "hub"))]
#[test]
fn a_build_without_the_feature_says_what_to_do() {
    use crate::common::fails;
    fails("inspect no-org/no-model --hub", &["without the feature hub", "`hf download no-org/no-model`"]);
    fails("doctor --hub", &["--hub", "no model"]);
}

#[cfg(feature = "hub")]
mod with_the_feature {
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};
    use std::thread;
    use std::time::{Duration, Instant};

    use serde_json::{Value, json};
    use sha2::{Digest, Sha256};
    use tempfile::TempDir;

    use crate::common::{Run, check_failure, command, finish, json_of, path, shows};

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
    const MODEL: &str = "org/name";

    /// A fault of the server in place of the right answer.
    #[derive(Clone, Debug)]
    enum Fault {
        Status(u16),
        /// The body ends after so many bytes.
        Cut(usize),
        /// One byte of the body is another one.
        Flip,
        Silence,
        /// A header with another value.
        Header(&'static str, &'static str),
        Body(&'static str),
    }

    /// Returns the fault of a request, by its path and its number among the requests of that path.
    type Faults = Box<dyn Fn(&str, usize) -> Option<Fault> + Send>;

    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Request {
        path: String,
        /// The first byte that is asked for.
        from: usize,
        token: Option<String>,
    }

    /// A Hub with one model, whose weights lie on another address.
    struct Hub {
        address: String,
        requests: Arc<Mutex<Vec<Request>>>,
        ended: Arc<AtomicBool>,
        cache: TempDir,
        files: BTreeMap<String, Vec<u8>>,
    }

    fn hash(bytes: &[u8]) -> String {
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    impl Hub {
        fn new(faults: impl Fn(&str, usize) -> Option<Fault> + Send + 'static) -> Hub {
            let names = ["config.json", "model.safetensors", "tokenizer.json"];
            let files = names.map(|name| (name.to_owned(), fs::read(path("dense").join(name)).unwrap()));
            Hub::with(BTreeMap::from(files), Box::new(faults))
        }

        fn with(files: BTreeMap<String, Vec<u8>>, faults: Faults) -> Hub {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            let (requests, ended) = (Arc::<Mutex<Vec<Request>>>::default(), Arc::<AtomicBool>::default());
            let (served, log, end, own) = (files.clone(), requests.clone(), ended.clone(), address.clone());
            thread::spawn(move || {
                for stream in listener.incoming() {
                    if end.load(Ordering::Relaxed) {
                        break;
                    }
                    serve(stream.unwrap(), &own, &served, &log, &faults);
                }
            });
            Hub { address, requests, ended, cache: TempDir::new().unwrap(), files }
        }

        /// Runs a command with this Hub.
        fn run(&self, line: &str, variables: &[(&str, &str)]) -> Run {
            let mut command = command(line);
            for name in [
                "HF_HUB_CACHE",
                "HUGGINGFACE_HUB_CACHE",
                "HF_TOKEN",
                "HUGGING_FACE_HUB_TOKEN",
                "HF_TOKEN_PATH",
            ] {
                command.env_remove(name);
            }
            command.env("HF_ENDPOINT", &self.address).env("HF_HOME", self.cache.path());
            command.env("NO_PROXY", "127.0.0.1").envs(variables.iter().copied());
            finish(command)
        }

        fn inspect(&self) -> Run {
            self.run(&format!("inspect {MODEL} --hub --json"), &[])
        }

        #[track_caller]
        fn fails(&self, variables: &[(&str, &str)], parts: &[&str]) {
            let run = self.run(&format!("inspect {MODEL} --hub --quiet"), variables);
            check_failure(&run, MODEL, parts);
            assert!(!self.folder().join("refs/main").exists(), "a model that is not whole has no reference");
        }

        fn folder(&self) -> PathBuf {
            self.cache.path().join("hub/models--org--name")
        }

        fn snapshot(&self) -> PathBuf {
            self.folder().join("snapshots").join(COMMIT)
        }

        /// The requests for a file's bytes, without those for its first byte alone.
        fn downloads(&self, file: &str) -> Vec<usize> {
            let requests = self.requests.lock().unwrap();
            requests.iter().filter(|r| r.path == file).map(|r| r.from).collect()
        }

        #[track_caller]
        fn has_all(&self) {
            for (name, bytes) in &self.files {
                assert!(fs::read(self.snapshot().join(name)).unwrap() == *bytes, "{name}");
            }
            assert_eq!(fs::read_to_string(self.folder().join("refs/main")).unwrap(), COMMIT);
            assert_eq!(fs::read_dir(self.folder().join("refs")).unwrap().count(), 1);
        }
    }

    impl Drop for Hub {
        fn drop(&mut self) {
            self.ended.store(true, Ordering::Relaxed);
            let _ = TcpStream::connect(self.address.trim_start_matches("http://"));
        }
    }

    /// Answers one request.
    fn serve(
        stream: TcpStream,
        own: &str,
        files: &BTreeMap<String, Vec<u8>>,
        log: &Mutex<Vec<Request>>,
        faults: &Faults,
    ) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
        let Some(first) = lines.next() else { return };
        let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        let header = |name: &str| {
            headers.iter().find_map(|line| {
                let (key, value) = line.split_once(": ")?;
                key.eq_ignore_ascii_case(name).then(|| value.to_owned())
            })
        };
        let range = header("range").and_then(|range| range.strip_prefix("bytes=").map(str::to_owned));
        let (from, is_probe) = range.map_or((0, false), |range| {
            let (from, to) = range.split_once('-').unwrap();
            (from.parse().unwrap(), !to.is_empty())
        });
        let path = first.split(' ').nth(1).unwrap().to_owned();
        let fault = {
            let mut log = log.lock().unwrap();
            let file = path.rsplit('/').next().unwrap().split('?').next().unwrap().to_owned();
            // A probe asks for one byte; `resolve` only redirects what lies elsewhere.
            let is_small = path.contains("/resolve/") && !file.ends_with("safetensors");
            let is_of_bytes = !is_probe && (path.starts_with("/bytes/") || is_small);
            let name = if is_of_bytes { file } else { path.clone() };
            let before = log.iter().filter(|r| r.path == name).count();
            log.push(Request { path: name.clone(), from, token: header("authorization") });
            faults(&name, before)
        };
        answer(stream, &path, own, files, (from, is_probe), fault);
    }

    fn answer(
        mut stream: TcpStream,
        path: &str,
        own: &str,
        files: &BTreeMap<String, Vec<u8>>,
        (from, is_probe): (usize, bool),
        fault: Option<Fault>,
    ) {
        let (mut status, mut headers, mut body) = (200, BTreeMap::new(), Vec::new());
        let name = path.rsplit('/').next().unwrap();
        if path.starts_with("/api/models/org/name/revision/main") {
            body = listing(files).to_string().into_bytes();
        } else if let Some(bytes) = files.get(name) {
            headers.insert("X-Repo-Commit", COMMIT.to_owned());
            headers.insert("ETag", format!("\"{}\"", hash(bytes)));
            if path.contains("/resolve/") && name.ends_with("safetensors") {
                status = 302;
                headers.insert("Location", format!("{own}/bytes/{name}"));
            } else if from >= bytes.len() {
                status = 416;
            } else {
                status = 206;
                let end = if is_probe { from + 1 } else { bytes.len() };
                headers.insert("Content-Range", format!("bytes {from}-{}/{}", end - 1, bytes.len()));
                body = bytes[from..end].to_vec();
            }
        } else {
            status = 404;
        }
        let mut sent = body.len();
        match fault {
            None => {}
            Some(Fault::Status(other)) => (status, body, sent) = (other, Vec::new(), 0),
            Some(Fault::Cut(bytes)) => sent = bytes.min(sent),
            Some(Fault::Flip) => body[0] ^= 1,
            Some(Fault::Silence) => {
                thread::sleep(Duration::from_secs(3));
                return;
            }
            Some(Fault::Header(header, value)) => drop(headers.insert(header, value.to_owned())),
            Some(Fault::Body(text)) => (body, sent) = (text.as_bytes().to_vec(), text.len()),
        }
        let mut head =
            format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n", body.len());
        headers.iter().for_each(|(key, value)| head += &format!("{key}: {value}\r\n"));
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(b"\r\n"));
        let _ = stream.write_all(&body[..sent]);
    }

    fn listing(files: &BTreeMap<String, Vec<u8>>) -> Value {
        let siblings: Vec<Value> = files
            .iter()
            .map(|(name, bytes)| match name.ends_with("safetensors") {
                true => json!({ "rfilename": name, "size": bytes.len(), "lfs": { "sha256": hash(bytes) } }),
                false => json!({ "rfilename": name, "size": bytes.len(), "blobId": hash(bytes) }),
            })
            .chain([json!({ "rfilename": "pytorch_model.bin", "size": 1 })])
            .collect();
        json!({ "sha": COMMIT, "siblings": siblings })
    }

    #[test]
    fn a_model_is_downloaded_once() {
        let hub = Hub::new(|_, _| None);
        let first = hub.inspect();
        assert_eq!(first.code, 0, "{}", first.stderr);
        shows(&first.stderr, &["org/name: 3 files"]);
        let (wanted, found) = (json_of("inspect dense"), first.json());
        assert_eq!(found["parameters"], wanted["parameters"]);
        hub.has_all();
        assert!(!hub.snapshot().join("pytorch_model.bin").exists());

        let before = hub.requests.lock().unwrap().len();
        let again = hub.inspect();
        assert_eq!((again.code, again.stderr.as_str()), (0, ""));
        assert_eq!(hub.requests.lock().unwrap().len(), before + 1, "one question, no download");
        // A file that lost its end is downloaded again.
        let blob = fs::canonicalize(hub.snapshot().join("config.json")).unwrap();
        fs::write(blob, "{").unwrap();
        assert_eq!(hub.inspect().code, 0);
        hub.has_all();

        // The directory serves other commands, and all without a network.
        let line = format!(
            "eval {MODEL} --data text.txt --seq 32 --limit-tokens 200 --against {MODEL} --hub --quiet"
        );
        let run = hub.run(&line, &[]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        let offline = hub.run(&format!("inspect {MODEL} --hub"), &[("HF_HUB_OFFLINE", "1")]);
        assert_eq!((offline.code, offline.stderr.as_str()), (0, ""));
        let unreachable =
            hub.run(&format!("inspect {MODEL} --hub"), &[("HF_ENDPOINT", "http://127.0.0.1:1")]);
        assert_eq!(unreachable.code, 0, "{}", unreachable.stderr);
        shows(&unreachable.stderr, &["note:", "out of reach", "the cache has"]);
    }

    #[test]
    fn without_the_option_it_is_named() {
        let run = Hub::new(|_, _| None).run(&format!("inspect {MODEL}"), &[]);
        assert_eq!((run.code, run.stdout.as_str()), (1, ""));
        shows(&run.stderr, &["note: org/name is not here; --hub downloads it", "`hf download org/name`"]);
    }

    #[test]
    fn a_broken_download_continues_where_it_ended() {
        let hub = Hub::new(|file, before| match (file, before) {
            ("model.safetensors", 0) => Some(Fault::Cut(1000)),
            ("model.safetensors", 1) => Some(Fault::Status(503)),
            ("tokenizer.json", 0) => Some(Fault::Cut(10)),
            _ => None,
        });
        let run = hub.inspect();
        assert_eq!(run.code, 0, "{}", run.stderr);
        hub.has_all();
        assert_eq!(hub.downloads("model.safetensors"), [0, 1000, 1000]);
        assert_eq!(hub.downloads("tokenizer.json"), [0, 10]);
    }

    #[test]
    fn a_part_of_an_earlier_run_is_used() {
        let hub = Hub::new(|_, _| None);
        let (weights, tokenizer) = (&hub.files["model.safetensors"], &hub.files["tokenizer.json"]);
        let blobs = hub.folder().join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(hash(weights)).with_extension("part"), &weights[..2000]).unwrap();
        // Nothing is left to ask for.
        fs::write(blobs.join(hash(tokenizer)).with_extension("part"), vec![0; tokenizer.len()]).unwrap();
        let run = hub.inspect();
        assert_eq!(run.code, 0, "{}", run.stderr);
        hub.has_all();
        assert_eq!(
            (hub.downloads("model.safetensors"), hub.downloads("tokenizer.json")),
            (vec![2000], vec![0])
        );
    }

    #[test]
    fn a_damaged_file_does_not_stay() {
        let hub = Hub::new(|file, _| (file == "model.safetensors").then_some(Fault::Flip));
        hub.fails(&[], &["org/name/model.safetensors", "is not the file that the Hub told of"]);
        assert!(!hub.snapshot().join("model.safetensors").exists());
        let once =
            Hub::new(|file, before| (file == "model.safetensors" && before == 0).then_some(Fault::Flip));
        let run = once.inspect();
        assert_eq!(run.code, 0, "{}", run.stderr);
        once.has_all();
    }

    #[test]
    fn a_file_that_always_ends_early_is_an_error() {
        let hub = Hub::new(|file, _| (file == "config.json").then_some(Fault::Cut(3)));
        hub.fails(&[], &["org/name/config.json"]);
    }

    #[test]
    fn refusals_are_one_line_with_what_helps() {
        const API: &str = "/api/models/org/name/revision/main?blobs=true";
        let of =
            |path: &'static str, status| Hub::new(move |p, _| (p == path).then_some(Fault::Status(status)));
        of(API, 401)
            .fails(&[], &["org/name: the Hub has no such public model (401)", "hf auth login", "HF_TOKEN"]);
        of(API, 404).fails(&[], &["org/name: the Hub has no such file or model (404)"]);
        of(API, 500).fails(&[], &["answered 500; try again later"]);
        of(API, 429).fails(&[], &["too many requests"]);

        const FILE: &str = "/org/name/resolve/0123456789abcdef0123456789abcdef01234567/config.json";
        let gated = of(FILE, 401);
        gated.fails(&[], &["org/name/config.json: the model is gated; accept its terms at", "hf auth login"]);
        assert!(gated.requests.lock().unwrap().iter().all(|request| request.token.is_none()));
        let not_yet = of(FILE, 403);
        not_yet.fails(&[("HF_TOKEN", "secret")], &["is gated", "with the account of your token"]);
        assert!(not_yet.requests.lock().unwrap().iter().all(|r| r.token.as_deref() == Some("Bearer secret")));
        of(FILE, 404).fails(&[], &["org/name/config.json", "(404)"]);
    }

    #[test]
    fn a_server_out_of_reach_silent_or_of_another_kind() {
        const API: &str = "/api/models/org/name/revision/main?blobs=true";
        let hub = Hub::new(|path, _| (path == API).then_some(Fault::Silence));
        let started = Instant::now();
        hub.fails(
            &[("HF_HUB_DOWNLOAD_TIMEOUT", "1")],
            &["nothing came from", "for 1 s", "HF_HUB_DOWNLOAD_TIMEOUT"],
        );
        assert!(started.elapsed() < Duration::from_secs(20));
        hub.fails(
            &[("HF_ENDPOINT", "http://127.0.0.1:1")],
            &["http://127.0.0.1:1 is out of reach", "check the network"],
        );
        hub.fails(&[("HF_ENDPOINT", "nowhere")], &["HF_ENDPOINT is `nowhere`", "https://"]);
        hub.fails(&[("HF_HUB_OFFLINE", "1")], &["not in", "HF_HUB_OFFLINE"]);
        for fault in [
            Fault::Body("<html>hello</html>"),
            Fault::Body(r#"{"sha": "../../../x", "siblings": []}"#),
            Fault::Body(r#"{"sha": "0123456789abcdef", "siblings": [{"rfilename": "a/b.gguf"}]}"#),
        ] {
            let other = Hub::new(move |path, _| (path == API).then_some(fault.clone()));
            other.fails(&[], &[MODEL]);
        }
    }

    #[test]
    fn names_of_a_hostile_server_stay_in_the_cache() {
        for (header, value) in [("ETag", "\"../../../../../outside\""), ("X-Repo-Commit", "../../outside")] {
            let hub =
                Hub::new(move |file, _| file.contains("config.json").then_some(Fault::Header(header, value)));
            hub.fails(&[], &["org/name/config.json", "does not answer as the Hub does"]);
            let all = walk(hub.cache.path());
            assert!(!all.iter().any(|path| path.to_string_lossy().contains("outside")), "{all:?}");
        }
    }

    fn walk(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
        entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
    }

    #[test]
    fn one_file_of_a_model() {
        let bytes = b"GGUF, but not really".to_vec();
        let hub = Hub::with(BTreeMap::from([("x.gguf".to_owned(), bytes)]), Box::new(|_, _| None));
        let run = hub.run(&format!("inspect {MODEL}/x.gguf --hub --quiet"), &[]);
        // The file is there, and is none that can be read.
        check_failure(&run, "x.gguf", &["snapshots", "x.gguf"]);
        hub.has_all();
        let run = hub.run(&format!("inspect {MODEL}/y.gguf --hub --quiet"), &[]);
        check_failure(&run, "y.gguf", &["no file y.gguf", "x.gguf"]);
        let run = hub.run(&format!("inspect {MODEL} --hub --quiet"), &[]);
        check_failure(&run, MODEL, &["no safetensors", "x.gguf"]);
    }
}
