//! Reading documents from files of every kind, whole and broken.

#[expect(dead_code, reason = "other tests use the rest")]
#[path = "common/made.rs"]
mod made;

use dsmoe_datasets::{Corpus, CorpusOptions, Error, Result};
use made::{Column, gzip};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn zstd(content: &[u8]) -> Vec<u8> {
    compress_to_vec(content, CompressionLevel::Fastest)
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
    assert_eq!(read("a.txt.gz", members).unwrap(), ["one two"]);
}

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
    assert_eq!(documents(dir.path()).unwrap(), ["a/y.text.gz", "a/z.md", "b.txt", "c.tex", "d.jsonl.zst"]);

    let corpus =
        Corpus::open(&[dir.path().join("no"), dir.path().join("a")], CorpusOptions::default()).unwrap();
    let mut iter = corpus.documents();
    let sources: Vec<usize> = iter.by_ref().map(|document| document.unwrap().source).collect();
    assert_eq!(sources, [0, 1, 2]);
    assert_eq!(corpus.files().nth(1).unwrap(), dir.path().join("a/y.text.gz"));
    assert_eq!(iter.bytes_read(), corpus.total_bytes());
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
        ("a.jsonl", b"{\"text\": \"a\"}\n{\"id\": 1, \"body\": \"b\"}", ABSENT),
        ("a.jsonl", b"{\"text\": null}", "line 1: column \"text\" holds null"),
        ("a.json", b"[{\"text\": \"a\"},\n{\"text\": 1}]", "line 2: column \"text\" holds a num"),
    ];
    for (name, content, start) in cases {
        let message = message(name, content);
        assert!(message.starts_with(start), "{message}");
    }
    for (name, content) in [
        ("a.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b"),
        ("a.json", "[{\"text\": \"a\"},\n{\"text\": \"b"),
        ("a.json", "[{\"text\": \"a\"}\n]]"),
    ] {
        let text = message(name, content);
        assert!(text.starts_with("line 2: ") && text.ends_with("one array of objects"), "{text}");
    }
    for content in ["[1]", "[\"a\"]", "1", "\"a\"", "{", &"[".repeat(100_000), &"{\"a\":".repeat(100_000)] {
        message("a.json", content);
        message("a.jsonl", content);
    }
}

#[test]
fn damaged_compression_is_an_error_wherever_it_is_cut() {
    let content: Vec<u8> = (0..4000u32).flat_map(|i| format!("{} ", i * i % 977).into_bytes()).collect();
    for (name, packed) in [("a.txt.gz", gzip(&content)), ("a.txt.zst", zstd(&content))] {
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
        assert!(message(name, b"no such format").starts_with("damaged or truncated "));
    }
    assert!(message("a.txt.zst", b"").starts_with("damaged or truncated "));
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
    assert!(matches!(documents(&dir.path().join("none.txt")), Err(Error::Io { .. })));
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
    let message = documents(&path).unwrap_err().to_string();
    let wanted = "row 2: column \"text\" holds null, not text; name another column with text_column";
    assert!(message.ends_with(wanted), "{message}");
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
    assert!(columns(row, "question,question").unwrap_err().to_string().contains("holds null"));
}
