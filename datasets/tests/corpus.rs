//! Reading documents from files of every kind, whole and broken.

#[expect(dead_code, reason = "other tests use the rest")]
#[path = "common/made.rs"]
mod made;

use dsmoe_datasets::{Corpus, CorpusOptions, Error, Result, Skipped};
use made::{Column, bzip2, gzip};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn zstd(content: &[u8]) -> Vec<u8> {
    compress_to_vec(content, CompressionLevel::Fastest)
}

/// Two lines of JSON, `one` and `two é`, by liblzma.
const XZ: &str = "fd377a585a000004e6d6b4460200210116000000742fe5a3e0002200215d003d888a86948813e0f38724b7683609cc4c77525eaa8176be\
                  bf4a6ac062fecce00000000000a62479cd34e3100700013d23e78c09e81fb6f37d010000000004595a";

/// The same with a dictionary of 512 MiB.
const XZ_LARGE: &str = "fd377a585a000004e6d6b44602002101220000008240acdce0002200215d003d888a86948813e0f38724b7683609cc4c77525eaa8176\
                        bebf4a6ac062fecce00000000000a62479cd34e3100700013d23e78c09e81fb6f37d010000000004595a";

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks(2)
        .map(|two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap())
        .collect()
}

fn file(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    path
}

fn documents_with(paths: &[PathBuf], options: CorpusOptions) -> Result<Vec<String>> {
    Corpus::open(paths, options)?.documents().map(|document| Ok(document?.text)).collect()
}

/// The documents of some columns of a file.
fn columns(path: &Path, text_column: &str) -> Result<Vec<String>> {
    let options = CorpusOptions { text_column: text_column.into(), ..CorpusOptions::default() };
    documents_with(&[path.to_path_buf()], options)
}

/// The documents of a file between separators.
fn separated(paths: &[PathBuf], separator: &str) -> Result<Vec<String>> {
    let options = CorpusOptions { doc_separator: Some(separator.into()), ..CorpusOptions::default() };
    documents_with(paths, options)
}

fn documents(path: &Path) -> Result<Vec<String>> {
    documents_with(&[path.to_path_buf()], CorpusOptions::default())
}

/// The documents of a single file of this name and content.
fn read(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<String>> {
    let dir = TempDir::new().unwrap();
    documents(&file(dir.path(), name, content))
}

/// The message of the error that a file gives, after the part that names the file.
fn message(name: &str, content: impl AsRef<[u8]>) -> String {
    let text = read(name, content).expect_err("must not read").to_string();
    assert!(!text.contains('\n'), "{text}");
    text.split_once(&format!("{name}: ")).expect("names the file").1.to_string()
}

#[test]
fn text_is_one_document_or_split() {
    assert_eq!(read("a.txt", " one\n\ntwo \n").unwrap(), ["one\n\ntwo"]);
    let dir = TempDir::new().unwrap();
    let path = file(dir.path(), "a.txt", "one\n<sep>\n\n<sep> two<sep>");
    assert_eq!(separated(&[path], "<sep>").unwrap(), ["one", "two"]);
}

#[test]
fn json_lines_and_arrays() {
    let lines = "{\"text\": \" one \", \"id\": 1}\r\n\n{\"id\": 2, \"text\": \"t\\u0077o\"}";
    let array = "\u{FEFF}[{\"text\": \" one \", \"id\": 1},\n {\"id\": {\"x\": []}, \"text\": \"two\"}]\n";
    for (name, content) in [("a.jsonl", lines), ("a.json", lines), ("a.json", array)] {
        assert_eq!(read(name, content).unwrap(), ["one", "two"], "{name}: {content}");
    }
    let dir = TempDir::new().unwrap();
    let path = file(dir.path(), "a.jsonl", "{\"body\": \"b\"}");
    assert_eq!(columns(&path, "body").unwrap(), ["b"]);
}

#[test]
fn an_array_is_read_object_by_object() {
    let dir = TempDir::new().unwrap();
    let texts: Vec<String> =
        (0..3000).map(|i| format!("{i} \"é🦊\\ ]}}, {{\n{}.", "x".repeat(i % 700))).collect();
    let row = |text: &String| serde_json::json!({"id": [1, {"a": "}"}], "text": text}).to_string();
    let rows: Vec<String> = texts.iter().map(row).collect();
    let array = format!("\u{FEFF} [{}\n]\n", rows.join(" ,\n"));
    let path = file(dir.path(), "a.json", &array);
    let corpus = Corpus::open(std::slice::from_ref(&path), CorpusOptions::default()).unwrap();
    let mut documents = corpus.documents();
    assert_eq!(documents.next().unwrap().unwrap().text, texts[0]);
    let first = documents.bytes_read();
    assert!(first < corpus.total_bytes() / 4, "{first} bytes were read for the first row");
    let rest: Vec<String> = documents.by_ref().map(|document| document.unwrap().text).collect();
    assert!(rest == texts[1..]);
    assert_eq!(documents.bytes_read(), corpus.total_bytes());
    assert!(read("a.json.gz", gzip(array.as_bytes())).unwrap() == texts);

    assert_eq!(read_all("[]"), [""; 0]);
    assert_eq!(read_all(" [ {\"text\": \"a\"} ,\n{\"text\": null}, {}] "), ["a"]);
    for (end, wanted) in [
        (
            ",\n1]",
            "line 3001: expected an object at column 1; expected one JSON object per line, or one array",
        ),
        (",\n {\"text\": 1}]", "line 3001: column \"text\" holds a number, not text; "),
        (",\n{\"text\": one}]", "line 3001: expected a value at column 10; "),
        ("\n] x", "line 3001: more text after the end at column 3; "),
        ("\n {}]", "line 3001: expected `,` or `]` at column 2; "),
        ("\n", "line 3001: the array does not end at column 1; "),
        (",\n", "line 3001: expected an object at column 1; "),
        (",\n{\"text\": \"b", "line 3001: a text is never closed at column "),
        (",\n{\"text\": {\"b\": 1}", "line 3001: the object does not end at column "),
    ] {
        let text = message("a.json", format!("[{}{end}", rows.join(",\n")));
        assert!(text.starts_with(wanted), "{end}: {text}");
    }
    let bytes = [b"[{\"text\": \"a\"}, {\"text\": \"".to_vec(), vec![0xff], b"\"}]".to_vec()].concat();
    assert!(message("a.json", bytes).starts_with("not UTF-8 at byte 26 "));
}

/// The documents of an array; none if it has none.
fn read_all(array: &str) -> Vec<String> {
    match read("a.json", array) {
        Err(Error::EmptyCorpus { .. }) => Vec::new(),
        documents => documents.unwrap(),
    }
}

#[test]
fn an_object_without_an_end_is_told_from_one_that_is_too_large() {
    let open =
        format!("[{{\"text\": \"a\"}},\n{{\"text\": \"b}},\n{}", "{\"text\": \"c\"},\n".repeat(5 << 20));
    let text = message("a.json", open);
    assert!(text.starts_with("line 3: expected `,` or `}` at column"), "{text}");
    let closed = format!("[{{\"x\": [{}1], \"text\": \"c\"}}]", "1, ".repeat(23 << 20));
    assert!(message("a.json", closed).starts_with("a document of more than 67108864 bytes; split the file"));
}

#[test]
fn json_in_another_form_is_named_with_what_helps() {
    let array = message("a.jsonl", "[{\"text\": \"one\"},\n {\"text\": \"two\"}]");
    assert_eq!(
        array,
        "line 1: an array and not an object; end the name of a file that is one array of objects in .json"
    );
    for name in ["a.json", "a.jsonl"] {
        let pretty = message(name, "{\n \"text\": \"one\"\n}\n");
        assert!(
            pretty.starts_with("line 1: the object does not end in this line; write each object in"),
            "{pretty}"
        );
    }
    let cut = message("a.jsonl", "{\"text\": \"one\"}\n{\"text\": \"tw");
    assert!(cut.starts_with("line 2: the object does not end in this line"), "{cut}");
    let word = message("a.jsonl", "{\"text\": one}");
    assert_eq!(
        word,
        "line 1: expected a value at column 10; expected one JSON object per line, or one array of objects"
    );
    assert!(
        message("a.jsonl", "{\"text\": \"a\"}\n[1]").starts_with("line 2: expected an object at column 1; ")
    );
}

#[test]
fn files_that_are_not_what_their_names_say_are_named() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n";
    for name in
        ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.zst", "a.txt.bz2", "a.txt.xz", "a.parquet"]
    {
        assert!(
            message(name, pointer).starts_with("is a Git LFS pointer and not the file itself; run"),
            "{name}"
        );
    }
    assert_eq!(message("a.txt.gz", zstd(b"one")), "it holds Zstandard data; end its name in .zst");
    assert_eq!(message("a.parquet", gzip(b"one")), "it holds gzip data; end its name in .gz");
    assert_eq!(
        message("a.txt.xz", "once upon a time"),
        "it holds text that is not compressed; take .xz off its name"
    );
}

#[test]
fn compressed_files_read_as_plain_ones() {
    let long: String = (0..20_000).map(|i| format!("{{\"text\": \"line {i}\"}}\n")).collect();
    let plain = read("a.jsonl", &long).unwrap();
    assert_eq!(plain.len(), 20_000);
    assert_eq!(read("a.jsonl.gz", gzip(long.as_bytes())).unwrap(), plain);
    assert_eq!(read("a.jsonl.ZST", zstd(long.as_bytes())).unwrap(), plain);

    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"xyz"].concat();
    let frames = [skippable, zstd(b"{\"text\": \"a\"}\n{\"te"), zstd(b"xt\": \"b\"}")].concat();
    assert_eq!(read("a.jsonl.zst", frames).unwrap(), ["a", "b"]);
    let members = [gzip(b"one "), gzip(b"two")].concat();
    assert_eq!(read("a.txt.gz", &members).unwrap(), ["one two"]);
    for zeros in [1, 511, 1 << 18] {
        assert_eq!(
            read("a.txt.gz", [&members[..], &vec![0; zeros]].concat()).unwrap(),
            ["one two"],
            "{zeros}"
        );
    }
    let between = [gzip(b"one "), vec![0; 9], gzip(b"two")].concat();
    assert_eq!(read("a.txt.gz", between).unwrap(), ["one two"]);
    assert!(message("a.txt.gz", [&members[..], b"\0\0x"].concat()).starts_with("damaged or truncated gzip"));

    assert_eq!(read("a.jsonl.bz2", bzip2(long.as_bytes())).unwrap(), plain);
    assert_eq!(read("a.txt.bz2", [bzip2(b"one "), bzip2(b"two")].concat()).unwrap(), ["one two"]);
    for (name, member) in [("a.txt.bz2", bzip2(b"x ")), ("a.txt.zst", zstd(b"x ")), ("a.txt.gz", gzip(b"x "))]
    {
        let zeros = vec![0; 700];
        let joined = [&member[..], &zeros, &member, &zeros].concat();
        assert_eq!(read(name, joined).unwrap(), ["x x"], "{name}");
        let text = message(name, [&member[..], b"other"].concat());
        assert!(
            text.contains(" data (other data follow its end: ") && text.ends_with("; fetch the file again"),
            "{text}"
        );
    }
    assert_eq!(read("a.jsonl.xz", unhex(XZ)).unwrap(), ["one", "two é"]);
    assert_eq!(read("a.jsonl.xz", unhex(XZ).repeat(2)).unwrap(), ["one", "two é"].repeat(2));
}

#[test]
fn files_that_are_no_text_are_named() {
    let packed: [(&[u8], &str, &str); 5] = [
        (&gzip(b"x"), "gzip data", ".gz"),
        (&zstd(b"x"), "Zstandard data", ".zst"),
        (&bzip2(b"x"), "bzip2 data", ".bz2"),
        (&unhex(XZ), "xz data", ".xz"),
        (b"PK\x03\x04rest", "a ZIP archive", "unpack it"),
    ];
    for (content, what, help) in packed {
        for name in ["a.txt", "a.jsonl", "a.json", "a.bin"] {
            let text = message(name, content);
            assert!(text.starts_with(&format!("it holds {what}; ")) && text.ends_with(help), "{text}");
        }
    }
    for content in [&b"\xff\xfea\0"[..], b"\xfe\xff\0a"] {
        assert!(message("a.txt", content).ends_with("convert it (iconv -f UTF-16 -t UTF-8)"));
    }
    assert_eq!(read("a.txt", "PAR1 and BZh9 are words").unwrap(), ["PAR1 and BZh9 are words"]);
}

#[test]
fn data_that_needs_too_much_memory_is_refused_with_the_fix() {
    // A frame whose window has 256 MiB.
    let window = [0x28, 0xb5, 0x2f, 0xfd, 0, 18 << 3, 1, 0, 0];
    let text = message("a.jsonl.zst", window);
    assert!(
        text.starts_with("zstd data that takes more than 134217728 bytes")
            && text.contains("zstd -d -M2048MB"),
        "{text}"
    );
    let text = message("a.jsonl.xz", unhex(XZ_LARGE));
    assert!(
        text.starts_with("xz data that takes more than 134217728 bytes") && text.contains("xz -dc"),
        "{text}"
    );
}

/// All documents of a file, and what reading it showed.
fn noted(
    name: &str,
    content: impl AsRef<[u8]>,
    options: CorpusOptions,
) -> (Vec<String>, Skipped, Vec<String>) {
    let dir = TempDir::new().unwrap();
    let corpus = Corpus::open(&[file(dir.path(), name, content)], options).unwrap();
    let mut read = Vec::new();
    // The counts are those of one reading.
    for _ in 0..2 {
        read = corpus.documents().map(|document| document.unwrap().text).collect();
    }
    (read, corpus.skipped(), corpus.notices().iter().map(ToString::to_string).collect())
}

#[test]
fn rows_without_text_are_left_out_and_counted() {
    let lines = "{\"x\": NaN, \"text\": \"a\\ud800\"}\n{\"text\": null}\n{\"y\": 1e999}\n{\"text\": \"b\", \"z\": [Infinity]}\n";
    let array = format!("[{}]", lines.trim().replace('\n', ",\n"));
    for (name, content) in [("a.jsonl", lines), ("a.json", lines), ("a.json", &array)] {
        let (read, skipped, notices) = noted(name, content, CorpusOptions::default());
        assert_eq!(read, ["a\u{FFFD}", "b"], "{content}");
        assert_eq!(skipped, Skipped { null: 1, missing: 1, surrogates: 1 });
        assert!(
            notices[0].ends_with("2 rows were left out: the text is null in 1 and absent in 1"),
            "{notices:?}"
        );
        assert!(notices[1].contains("1 lone surrogates in JSON texts became U+FFFD"), "{notices:?}");
    }
    // A wrong type is an error all the same, and so is a column that no row has: after a thousand rows at the latest.
    assert!(
        message("a.jsonl", "{\"text\": \"a\"}\n{\"text\": 1}")
            .starts_with("line 2: column \"text\" holds a number")
    );
    let without = "{\"body\": \"b\"}\n";
    assert!(
        message("a.jsonl", without.repeat(3)).starts_with("line 1: no column \"text\" (columns: \"body\")")
    );
    let late = format!("{}{{\"text\": \"a\"}}\n", without.repeat(1000));
    assert!(message("a.jsonl", &late).starts_with("line 1: no column"));
    let early = format!("{{\"text\": \"a\"}}\n{}", without.repeat(2000));
    assert_eq!(noted("a.jsonl", early, CorpusOptions::default()).1.missing, 2000);
}

#[test]
fn large_undivided_texts_and_absent_separators_are_noticed() {
    let story = "Once upon a time.\n".repeat(40);
    let text = format!("{story}\n===\n").repeat(2000);
    let (read, _, notices) = noted("a.txt", &text, CorpusOptions::default());
    assert_eq!((read.len(), notices.len()), (1, 1));
    assert!(
        notices[0]
            .contains("are one document; if it holds more, name what separates them with doc_separator")
    );
    assert!(notices[0].ends_with("it contains \"===\" (2000 times), \"\\n\\n\" (2000 times)"), "{notices:?}");
    let with =
        |separator: &str| CorpusOptions { doc_separator: Some(separator.into()), ..CorpusOptions::default() };
    let (read, _, notices) = noted("a.txt", &text, with("==="));
    assert_eq!((read.len(), notices.len()), (2000, 0));
    let (read, _, notices) = noted("a.txt", &text, with("<x>"));
    assert_eq!(read.len(), 1);
    assert!(notices.len() == 1 && notices[0].contains("the separator \"<x>\" never occurs"), "{notices:?}");
    assert!(noted("a.txt", "small", CorpusOptions::default()).2.is_empty());
    assert!(noted("a.jsonl", "{\"text\": \"a\"}", with("<x>")).2.is_empty(), "no text file");
}

#[test]
fn byte_order_marks_are_dropped_wherever_files_were_joined() {
    let lines = "\u{FEFF}{\"text\": \"a\"}\n\u{FEFF}{\"text\": \"b\"}\n";
    assert_eq!(read("a.jsonl", lines).unwrap(), ["a", "b"]);
    let options = CorpusOptions { doc_separator: Some("<x>".into()), ..CorpusOptions::default() };
    assert_eq!(noted("a.txt", "\u{FEFF}a<x>\u{FEFF}b", options).0, ["a", "b"]);
    assert_eq!(read("a.txt", "\u{FEFF}a\u{FEFF}").unwrap(), ["a\u{FEFF}"], "inside a text it is a character");
}

#[cfg(unix)]
#[test]
fn a_directory_is_read_in_the_order_of_names() {
    let dir = TempDir::new().unwrap();
    for name in ["b.txt", "a/z.md", "a/y.text.gz", "c.tex", "a/no.bin", "d.jsonl.zst", "no"] {
        let content = match name.rsplit_once('.').map(|(_, extension)| extension) {
            Some("gz") => gzip(name.as_bytes()),
            Some("zst") => zstd(format!("{{\"text\": \"{name}\"}}").as_bytes()),
            _ => name.as_bytes().to_vec(),
        };
        file(dir.path(), name, content);
    }
    std::os::unix::fs::symlink(dir.path(), dir.path().join("a/loop")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("a"), dir.path().join("again")).unwrap();
    let other = TempDir::new().unwrap();
    file(other.path(), "linked.txt", "linked");
    std::os::unix::fs::symlink(other.path(), dir.path().join("bb")).unwrap();
    std::os::unix::fs::symlink(other.path(), dir.path().join("cc")).unwrap();
    std::os::unix::fs::symlink(dir.path().parent().unwrap(), dir.path().join("up")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("dangling")).unwrap();
    let wanted = ["a/y.text.gz", "a/z.md", "b.txt", "linked", "c.tex", "d.jsonl.zst"];
    assert_eq!(documents(dir.path()).unwrap(), wanted);

    let corpus =
        Corpus::open(&[dir.path().join("no"), dir.path().join("a")], CorpusOptions::default()).unwrap();
    let mut iter = corpus.documents();
    let sources: Vec<usize> = iter.by_ref().map(|document| document.unwrap().source).collect();
    assert_eq!(sources, [0, 1, 2]);
    assert_eq!(corpus.files().nth(1).unwrap(), dir.path().join("a/y.text.gz"));
    assert_eq!(iter.bytes_read(), corpus.total_bytes());
}

#[test]
fn the_depth_of_folders_is_bounded() {
    let dir = TempDir::new().unwrap();
    let below = |levels: usize| dir.path().join(vec!["a"; levels].join("/"));
    fs::create_dir_all(below(64)).unwrap();
    fs::write(below(64).join("x.txt"), "deep").unwrap();
    assert_eq!(documents(dir.path()).unwrap(), ["deep"]);
    fs::create_dir_all(below(65)).unwrap();
    let Err(error) = Corpus::open(&[dir.path().to_path_buf()], CorpusOptions::default()) else {
        panic!("it is searched")
    };
    let error = error.to_string();
    assert!(error.contains("it lies more than 64 folders below"), "{error}");
    assert!(error.ends_with("name a folder further down, or move its files up"), "{error}");
}

#[test]
fn a_path_that_is_named_again_is_read_again() {
    let dir = TempDir::new().unwrap();
    let [one, two] = ["a/one.txt", "two.txt"].map(|name| file(dir.path(), name, name));
    file(dir.path(), "a/three.txt", "three");
    let folder = dir.path().join("a");
    let paths = [one.clone(), folder.clone(), one.clone(), two, folder];
    let corpus = Corpus::open(&paths, CorpusOptions::default()).unwrap();
    let read: Vec<String> = corpus.documents().map(|document| document.unwrap().text).collect();
    assert_eq!(read, ["a/one.txt", "a/one.txt", "three", "a/one.txt", "two.txt", "a/one.txt", "three"]);
    assert_eq!(corpus.total_bytes(), read.iter().map(|text| text.len() as u64).sum::<u64>());
    let mut iter = corpus.documents();
    assert_eq!((iter.by_ref().count(), iter.bytes_read()), (7, corpus.total_bytes()));
    let files: Vec<&Path> = corpus.files().collect();
    assert_eq!((files.len(), files[0], files[5]), (7, one.as_path(), one.as_path()));
}

#[test]
fn the_number_of_files_is_bounded() {
    let dir = TempDir::new().unwrap();
    for i in 0..1025 {
        file(dir.path(), &format!("{i}.txt"), "a");
    }
    let mut paths = vec![dir.path().to_path_buf(); 1023];
    let corpus = Corpus::open(&paths, CorpusOptions::default()).unwrap();
    assert_eq!((corpus.files().len(), corpus.total_bytes()), (1023 * 1025, 1023 * 1025));
    paths.resize(1024, dir.path().to_path_buf());
    let Err(error) = Corpus::open(&paths, CorpusOptions::default()) else { panic!("all are taken") };
    let wanted =
        format!("{}: with it the text has more than 1048576 files; join small", dir.path().display());
    assert!(error.to_string().starts_with(&wanted), "{error}");
}

const ABSENT: &str =
    "line 2: no column \"text\" (columns: \"id\", \"body\"); name the column of the text with text_column";

#[test]
fn broken_files_are_named_with_the_fix() {
    let cases: [(&str, &[u8], &str); 9] = [
        ("a.txt", b"ab\xff", "not UTF-8 at byte 2 "),
        ("a.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xc3\"}", "not UTF-8 at byte 24 "),
        ("a.txt", b"", "empty corpus"),
        ("a.txt", b" \n\t ", "empty corpus"),
        ("a.jsonl", b"\n\n", "empty corpus"),
        ("a.json", b"[]", "empty corpus"),
        ("a.jsonl", b"\n{\"id\": 1, \"body\": \"b\"}\n{\"id\": 2}", ABSENT),
        ("a.jsonl", b"{\"text\": null}", "empty corpus"),
        ("a.json", b"[{\"text\": \"a\"},\n{\"text\": 1}]", "line 2: column \"text\" holds a num"),
    ];
    for (name, content, start) in cases {
        let message = message(name, content);
        assert!(message.starts_with(start), "{message}");
    }
    for (name, content, end) in [
        ("a.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b", "or fetch the file again if its end is missing"),
        ("a.json", "[{\"text\": \"a\"},\n{\"text\": \"b", "one array of objects"),
        ("a.json", "[{\"text\": \"a\"}\n]]", "one array of objects"),
    ] {
        let text = message(name, content);
        assert!(text.starts_with("line 2: ") && text.ends_with(end), "{text}");
    }
    for content in ["[1]", "[\"a\"]", "1", "\"a\"", "{", &"[".repeat(100_000), &"{\"a\":".repeat(100_000)] {
        message("a.json", content);
        message("a.jsonl", content);
    }
}

#[test]
fn damaged_compression_is_an_error_wherever_it_is_cut() {
    let content: Vec<u8> = (0..4000u32).flat_map(|i| format!("{} ", i * i % 977).into_bytes()).collect();
    for (name, packed) in
        [("a.txt.gz", gzip(&content)), ("a.txt.zst", zstd(&content)), ("a.txt.bz2", bzip2(&content))]
    {
        assert!(read(name, &packed).is_ok());
        for cut in (1..packed.len()).step_by(packed.len() / 60).chain(packed.len() - 8..packed.len()) {
            let text = message(name, &packed[..cut]);
            assert!(text.starts_with("damaged or truncated "), "{name} cut at {cut}: {text}");
        }
        for at in (0..packed.len()).step_by(packed.len() / 60) {
            let mut bad = packed.clone();
            bad[at] ^= 0xff;
            // A flipped bit in a name or a time stamp harms nothing; what is read must be what was written.
            if let Ok(read) = read(name, &bad) {
                assert_eq!(read, [String::from_utf8_lossy(&content).trim()], "{name} changed at {at}");
            }
        }
        assert!(message(name, b"\x80no such format").starts_with("damaged or truncated "));
    }
    for empty in ["a.txt.zst", "a.txt.gz", "a.txt.xz"] {
        assert!(message(empty, b"").starts_with("damaged or truncated "), "{empty}");
    }
    let packed = unhex(XZ);
    for at in 0..packed.len() {
        assert!(message("a.jsonl.xz", &packed[..at]).starts_with("damaged or truncated xz"), "cut at {at}");
        let mut bad = packed.clone();
        bad[at] ^= 0xff;
        assert!(
            read("a.jsonl.xz", &bad).is_err_and(|error| error.to_string().contains("xz data")),
            "changed at {at}"
        );
    }
}

#[test]
fn a_document_is_bounded_in_every_format() {
    let text = "x".repeat((64 << 20) + 1);
    assert!(
        message("a.json", format!("[{{\"text\": \"{text}\"}}]"))
            .starts_with("a document of more than 67108864")
    );
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("a.parquet");
    // A cell is named, in a text column and below it.
    for (rows, column, wanted) in [
        ([(Some("a"), None), (Some(&text[..]), None)], "text", "row 2: column \"text\" has"),
        ([(Some("a"), Some(&text[..])), (Some("b"), None)], "meta.answer", "row 1: column \"meta\" has"),
    ] {
        parquet(&path, &rows);
        let message = columns(&path, column).unwrap_err().to_string();
        let wanted = format!("a.parquet: {wanted} a cell of more than 67108864 bytes; write the cell as");
        assert!(message.contains(&wanted) && !message.contains('\n'), "{message}");
    }
    // Cells within the limit may join into more.
    let half = &text[..text.len() / 2 + 1];
    parquet(&path, &[(Some(half), Some(half))]);
    let joined = columns(&path, "text,meta.answer");
    assert!(matches!(joined, Err(Error::TooLarge { what: "document", .. })));
}

#[test]
fn a_decompression_bomb_ends_at_the_limit() {
    let bomb = gzip(&vec![b' '; (64 << 20) + 1]);
    assert!(bomb.len() < 100_000);
    let text = message("a.txt.gz", bomb);
    assert!(text.starts_with("a document of more than 67108864 bytes; split the file"), "{text}");
}

#[test]
fn paths_that_cannot_be_read() {
    let dir = TempDir::new().unwrap();
    let missing = documents(&dir.path().join("none.txt")).unwrap_err().to_string();
    assert!(
        missing.ends_with("none.txt: there is no such file or folder; name the text that is to be read"),
        "{missing}"
    );
    assert!(matches!(documents(dir.path()), Err(Error::NoTextFiles { .. })));
    assert!(matches!(documents(Path::new("/dev/zero")), Err(Error::NotAFile { .. })));
    assert!(matches!(documents_with(&[], CorpusOptions::default()), Err(Error::EmptyCorpus { .. })));
    assert!(matches!(separated(&[], ""), Err(Error::Setting { .. })));
}

/// Writes a Parquet file of optional text columns and a number, `rows` rows in two row groups.
fn parquet(path: &Path, rows: &[(Option<&str>, Option<&str>)]) {
    let schema = "message m { OPTIONAL BYTE_ARRAY text (UTF8); REQUIRED INT64 id;
        OPTIONAL GROUP meta { OPTIONAL BYTE_ARRAY answer (UTF8); } }";
    let group = |half: &[(Option<&str>, Option<&str>)]| {
        let (texts, answers) = half.iter().map(|(t, a)| (t.map(str::to_owned), a.map(str::to_owned))).unzip();
        let ids = Column::Ints((0..half.len() as i64).collect());
        vec![Column::Texts(texts, 1), ids, Column::Texts(answers, 2)]
    };
    let groups = rows.chunks(rows.len().div_ceil(2).max(1)).map(group).collect();
    fs::write(path, made::parquet(schema, groups)).unwrap();
}

#[test]
fn parquet_gives_its_text_columns() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("train-00000.parquet");
    let texts: Vec<String> = (0..500).map(|i| format!("text {i} é")).collect();
    let answers: Vec<String> = (0..500).map(|i| format!("answer {i}")).collect();
    let rows: Vec<_> = texts.iter().zip(&answers).map(|(t, a)| (Some(&t[..]), Some(&a[..]))).collect();
    parquet(&path, &rows);
    assert_eq!(documents(dir.path()).unwrap(), texts, "found in a folder");
    let column = |text_column| columns(&path, text_column);
    assert_eq!(column("meta.answer").unwrap(), answers);
    assert_eq!(column("text,meta.answer").unwrap()[499], "text 499 é\nanswer 499");
    let corpus = Corpus::open(std::slice::from_ref(&path), CorpusOptions::default()).unwrap();
    let mut iter = corpus.documents();
    assert_eq!(iter.by_ref().count(), 500);
    assert_eq!(iter.bytes_read(), corpus.total_bytes());

    for (name, wanted) in [
        ("body", "row 1: no column \"body\" (columns: \"text\", \"id\", \"meta.answer\"); name the column"),
        ("id", "row 1: column \"id\" holds INT64, not text; name the column"),
    ] {
        let message = column(name).unwrap_err().to_string();
        assert!(message.contains("train-00000.parquet: ") && message.contains(wanted), "{message}");
    }
    parquet(&path, &[(Some("a"), None), (None, None), (Some("c"), None)]);
    let corpus = Corpus::open(std::slice::from_ref(&path), CorpusOptions::default()).unwrap();
    let read: Vec<String> = corpus.documents().map(|document| document.unwrap().text).collect();
    assert_eq!((&read[..], corpus.skipped().null), (&["a", "c"].map(String::from)[..], 1));
}

#[test]
fn parquet_is_read_in_every_common_compression() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let texts: Vec<String> = (0..300).filter(|i| i % 50 != 7).map(|i| format!("text {} é", i * i)).collect();
    for name in ["zstd-v1", "zstd-v2", "gzip-v1", "brotli-v2", "lz4-v1"] {
        let path = folder.join(format!("{name}.parquet"));
        let corpus = Corpus::open(std::slice::from_ref(&path), CorpusOptions::default()).unwrap();
        let read: Result<Vec<String>> = corpus.documents().map(|document| Ok(document?.text)).collect();
        assert_eq!(read.unwrap(), texts, "{name}");
        assert_eq!(corpus.skipped(), Skipped { null: 6, ..Skipped::default() }, "{name}");
        let options = CorpusOptions { text_column: "meta.answer".into(), ..CorpusOptions::default() };
        let answers = documents_with(std::slice::from_ref(&path), options).unwrap();
        assert_eq!((answers.len(), &answers[298][..]), (300, "a3"), "{name}");

        // Any damage is an error or reads as some text.
        let (good, dir) = (fs::read(&path).unwrap(), TempDir::new().unwrap());
        for at in (0..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[at] ^= 0x5a;
            let _ = documents(&file(dir.path(), "a.parquet", &bad));
        }
    }
}

#[test]
fn a_damaged_parquet_is_an_error_or_reads_as_written() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("a.parquet");
    let texts: Vec<String> = (0..300).map(|i| format!("text {}", i * i)).collect();
    let rows: Vec<_> = texts.iter().map(|text| (Some(&text[..]), None)).collect();
    parquet(&path, &rows);
    let good = fs::read(&path).unwrap();
    for cut in (0..good.len()).step_by(good.len() / 40) {
        fs::write(&path, &good[..cut]).unwrap();
        let message = documents(&path).unwrap_err().to_string();
        assert!(message.contains("a.parquet: row 1: unreadable Parquet data"), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
    for at in (0..good.len()).step_by(good.len() / 150) {
        let mut bad = good.clone();
        bad[at] ^= 0xff;
        fs::write(&path, &bad).unwrap();
        // No check sum covers the pages: a flipped bit in a text shows only as another text.
        if let Ok(read) = documents(&path) {
            assert!(read.len() <= texts.len(), "changed at {at}");
        }
    }
}

#[test]
fn several_columns_are_joined() {
    let dir = TempDir::new().unwrap();
    let columns = |content: &str, names: &str| columns(&file(dir.path(), "a.jsonl", content), names);
    let row = "{\"question\": \"q\", \"input\": \"\", \"answer\": \"a\", \"x,y\": \"z\"}";
    assert_eq!(columns(row, "question,input,answer").unwrap(), ["q\na"]);
    assert_eq!(columns(row, "answer,question").unwrap(), ["a\nq"]);
    assert_eq!(columns(row, "x,y").unwrap(), ["z"], "a column of that very name comes first");
    assert!(columns(row, "question,none").unwrap_err().to_string().contains("line 1: no column \"none\""));
    assert_eq!(columns(row, "question,question").unwrap(), ["q"], "a column counts once");
}
