//! Files import each other in one direction: no circle of imports has more than three files.
//!
//! The graph is read from the sources. An edge leads from a file to the file that defines what it names by a path of its
//! crate (`crate::`, `super::`, `self::` or a child module). A re-export is followed to the definition and is no edge
//! itself. Code under `cfg(test)` does not count. There is no exception: types that several files of a module share lie in a
//! file below all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::{LAYERS, source_folder};

/// The most files of a circle.
const LARGEST_CIRCLE: usize = 3;

#[test]
fn no_circle_of_imports_has_more_than_three_files() {
    let mut found = Vec::new();
    for (package, _) in LAYERS {
        let graph = Sources::read(&source_folder(package)).graph();
        let circles = circles(&graph).into_iter().filter(|circle| circle.len() > LARGEST_CIRCLE);
        found.extend(circles.map(|circle| {
            let edges = circle.iter().flat_map(|from| graph[from].iter().map(move |to| (from, to)));
            let inside: Vec<String> = edges
                .filter(|(_, to)| circle.contains(to.as_str()))
                .map(|(from, to)| format!("  {from} -> {to}"))
                .collect();
            format!("{package}: {} files\n{}", circle.len(), inside.join("\n"))
        }));
    }
    assert!(found.is_empty(), "circles of imports:\n{}", found.join("\n"));
}

#[test]
fn imports_are_read_from_every_form_of_a_path() {
    let mut sources = Sources::default();
    let files = [
        ("", "mod a; mod b; pub use a::Thing; // use crate::c;\n"),
        ("a", "use std::fmt; pub struct Thing; fn f() -> &'static str { \"crate::b::No\" }"),
        (
            "b",
            "mod d; use crate::{Thing as Other, b::d::{self, Deep}}; #[cfg(test)] mod tests { use crate::c::X; }",
        ),
        ("b::d", "pub struct Deep; fn f() { super::super::a::g(); '\"'; }"),
        ("c", "pub(crate) use crate::b::*; fn f(_: Deep) {}"),
    ];
    for (module, text) in files {
        sources.add(
            module.to_owned(),
            if module.is_empty() { "lib".to_owned() } else { module.to_owned() },
            text,
        );
    }
    let graph = sources.graph();
    let edges = |file: &str| graph[file].iter().map(String::as_str).collect::<Vec<_>>();
    assert_eq!(edges("lib"), [] as [&str; 0]);
    assert_eq!(edges("a"), [] as [&str; 0]);
    assert_eq!(edges("b"), ["a", "b::d"]);
    assert_eq!(edges("b::d"), ["a"]);
    let ring = |names: &[&str]| -> Graph {
        let next = |i: usize| BTreeSet::from([names[(i + 1) % names.len()].to_owned()]);
        names.iter().enumerate().map(|(i, name)| ((*name).to_owned(), next(i))).collect()
    };
    assert_eq!(circles(&ring(&["a", "b", "c", "d"])).iter().map(BTreeSet::len).max(), Some(4));
}

/// The files that each file imports from.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// A name that a `use` brings into a module, and the path that it stands for.
struct Import {
    path: Vec<String>,
    /// `*` for a glob.
    name: String,
    public: bool,
}

struct Module {
    file: String,
    imports: Vec<Import>,
    /// The code without comments, strings, tests and `use` items.
    code: String,
}

/// The modules of a crate that are files, by path: `a::b`.
#[derive(Default)]
struct Sources {
    modules: BTreeMap<String, Module>,
}

impl Sources {
    fn read(folder: &Path) -> Sources {
        let mut sources = Sources::default();
        let mut tests = Vec::new();
        for file in files(folder) {
            let relative = file.strip_prefix(folder).expect("in the folder").with_extension("");
            let mut parts: Vec<String> =
                relative.iter().map(|part| part.to_str().expect("UTF-8").to_owned()).collect();
            match parts.last().map(String::as_str) {
                Some("main") if parts.len() == 1 => continue,
                Some("lib") if parts.len() == 1 => parts.clear(),
                Some("mod") => drop(parts.pop()),
                _ => {}
            }
            let module = parts.join("::");
            let text = fs::read_to_string(&file).expect("source file");
            tests.extend(sources.add(module, relative.display().to_string(), &text));
        }
        sources.modules.retain(|module, _| {
            !tests.iter().any(|test| module == test || module.starts_with(&format!("{test}::")))
        });
        sources
    }

    /// Adds a file, and returns the child modules that it has for tests alone.
    fn add(&mut self, module: String, file: String, text: &str) -> Vec<String> {
        let code: String =
            lex(text).iter().map(|(kind, part)| if *kind == Part::Code { *part } else { " " }).collect();
        let (code, test_modules) = without_tests(&code);
        let (code, imports) = take_imports(&code);
        let children = test_modules.into_iter().map(|child| join(&module, &child)).collect();
        self.modules.insert(module, Module { file, imports, code });
        children
    }

    /// Returns the edges of every file.
    fn graph(&self) -> Graph {
        let edges = |(path, module): (&String, &Module)| {
            let mut found = BTreeSet::new();
            for import in &module.imports {
                // A re-export is followed where it is used.
                if !import.public || import.name != "*" && has_word(&module.code, &import.name) {
                    found.extend(self.file_of(path, &import.path, 0));
                }
            }
            for words in paths(&module.code) {
                found.extend(self.file_of(path, &words, 0));
            }
            found.remove(&module.file);
            (module.file.clone(), found)
        };
        self.modules.iter().map(edges).collect()
    }

    /// The file that defines what `words` names in module `from`; none for other crates.
    fn file_of(&self, from: &str, words: &[String], depth: usize) -> Option<String> {
        let mut module = from.to_owned();
        let mut words = words.iter().peekable();
        match words.peek()?.as_str() {
            "crate" => {
                words.next();
                module.clear();
            }
            "self" | "super" => {
                while let Some(word) = words.next_if(|word| ["self", "super"].contains(&word.as_str())) {
                    if word == "super" {
                        module = parent(&module).unwrap_or_default().to_owned();
                    }
                }
            }
            first if self.modules.contains_key(&join(&module, first)) => {}
            _ => return None,
        }
        while let Some(child) = words.peek().map(|word| join(&module, word)) {
            if !self.modules.contains_key(&child) {
                break;
            }
            module = child;
            words.next();
        }
        let here = self.modules.get(&module)?;
        let Some(name) = words.next() else { return Some(here.file.clone()) };
        // Follow re-exports; a circle of them ends.
        if depth < 8 && !defines(&here.code, name) {
            for import in &here.imports {
                let mut path = import.path.clone();
                if import.name == "*" {
                    path.push(name.clone());
                }
                if (import.name == *name || import.name == "*")
                    && let Some(file) = self.file_of(&module, &path, depth + 1)
                    && (import.name == *name || self.defined_in(&file, name))
                {
                    return Some(file);
                }
            }
        }
        Some(here.file.clone())
    }

    fn defined_in(&self, file: &str, name: &str) -> bool {
        self.modules.values().any(|module| module.file == file && defines(&module.code, name))
    }
}

/// The module that declares `module`; none for the root.
fn parent(module: &str) -> Option<&str> {
    if module.is_empty() { None } else { Some(module.rsplit_once("::").map_or("", |(parent, _)| parent)) }
}

fn join(module: &str, child: &str) -> String {
    if module.is_empty() { child.to_owned() } else { format!("{module}::{child}") }
}

pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("source folder") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Code,
    Comment,
    /// A string or character.
    Literal,
}

/// The parts of a source file, in their order.
pub(crate) fn lex(text: &str) -> Vec<(Part, &str)> {
    let mut parts = Vec::new();
    let (mut start, mut at) = (0, 0);
    while at < text.len() {
        let rest = &text[at..];
        let (kind, len) = if rest.starts_with("//") {
            (Part::Comment, rest.find('\n').unwrap_or(rest.len()))
        } else if rest.starts_with("/*") {
            (Part::Comment, rest.find("*/").map_or(rest.len(), |end| end + 2))
        } else if let Some(len) = literal(rest, &text[..at]) {
            (Part::Literal, len)
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
            continue;
        };
        parts.push((Part::Code, &text[start..at]));
        parts.push((kind, &text[at..at + len]));
        at += len;
        start = at;
    }
    parts.push((Part::Code, &text[start..]));
    parts
}

/// The length of the string or character literal that `text` begins with.
fn literal(text: &str, before: &str) -> Option<usize> {
    let after_word = before.ends_with(|c: char| c.is_alphanumeric() || c == '_');
    if !after_word && (text.starts_with('r') || text.starts_with("br")) {
        let hashes_at = text.find('r')? + 1;
        let hashes = text[hashes_at..].bytes().take_while(|&byte| byte == b'#').count();
        if text[hashes_at + hashes..].starts_with('"') {
            let begin = hashes_at + hashes + 1;
            let end = format!("\"{}", "#".repeat(hashes));
            return Some(text[begin..].find(&end).map_or(text.len(), |len| begin + len + end.len()));
        }
    }
    let quote = text.chars().next().filter(|c| ['"', '\''].contains(c))?;
    let mut escaped = false;
    if quote == '\'' {
        // A lifetime has no second quote after one character.
        let mut inside = text[1..].chars();
        let first = inside.next()?;
        if first != '\\' && inside.next() != Some('\'') {
            return None;
        }
    }
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    Some(text.len())
}

/// The code without items under `#[cfg(test)]`, and the names of modules in files of their own that are such items.
pub(crate) fn without_tests(code: &str) -> (String, Vec<String>) {
    const MARK: &str = "#[cfg(test)]";
    let (mut out, mut modules, mut rest) = (String::new(), Vec::new(), code);
    while let Some(at) = rest.find(MARK) {
        out.push_str(&rest[..at]);
        let item = &rest[at + MARK.len()..];
        let end = item_end(item);
        if let Some(name) = item[..end].trim().strip_suffix(';').and_then(|item| item.rsplit_once("mod ")) {
            modules.push(name.1.trim().to_owned());
        }
        rest = &item[end..];
    }
    out.push_str(rest);
    (out, modules)
}

/// Where the item that `code` begins with ends: after its `;` or its block.
fn item_end(code: &str) -> usize {
    let mut depth = 0usize;
    for (at, c) in code.char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => {
                depth = depth.saturating_sub(1);
                if depth == 0 && c == '}' {
                    return at + 1;
                }
            }
            ';' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    code.len()
}

/// Takes the `use` items out of the code.
fn take_imports(code: &str) -> (String, Vec<Import>) {
    let (mut out, mut imports, mut rest) = (String::new(), Vec::new(), code);
    while let Some(at) = find_word(rest, "use") {
        let line = rest[..at].rsplit(['\n', ';', '}', '{', ']']).next().unwrap_or_default();
        let public = line.contains("pub");
        out.push_str(&rest[..at]);
        let Some(end) = rest[at..].find(';') else { break };
        let tree: String = rest[at + 3..at + end].split_whitespace().collect::<Vec<_>>().join(" ");
        add_tree(&tree, &[], public, &mut imports);
        rest = &rest[at + end..];
    }
    out.push_str(rest);
    (out, imports)
}

fn add_tree(tree: &str, prefix: &[String], public: bool, imports: &mut Vec<Import>) {
    let tree = tree.trim().trim_start_matches("::");
    if let Some((head, inner)) = tree.split_once('{') {
        let mut path = prefix.to_vec();
        path.extend(head.split("::").map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned));
        let inner = inner.trim_end().strip_suffix('}').unwrap_or(inner);
        let (mut depth, mut start) = (0, 0);
        for (at, c) in inner.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    add_tree(&inner[start..at], &path, public, imports);
                    start = at + 1;
                }
                _ => {}
            }
        }
        return add_tree(&inner[start..], &path, public, imports);
    }
    if tree.is_empty() {
        return;
    }
    let (path_text, alias) =
        tree.split_once(" as ").map_or((tree, None), |(path, alias)| (path, Some(alias)));
    let mut path = prefix.to_vec();
    path.extend(path_text.split("::").map(|word| word.trim().to_owned()));
    if path.last().is_some_and(|last| last == "self") && path.len() > 1 {
        path.pop();
    }
    let last = path.last().cloned().unwrap_or_default();
    let name = alias.map_or(last, |alias| alias.trim().to_owned());
    if name == "*" {
        path.pop();
    }
    imports.push(Import { path, name, public });
}

/// The paths in code that is no `use`: their words.
fn paths(code: &str) -> Vec<Vec<String>> {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(next) = code[at..].find(|c: char| word(c) || c == ':') {
        at += next;
        let end = code[at..].find(|c: char| !word(c) && c != ':').map_or(code.len(), |len| at + len);
        let text = code[at..end].trim_end_matches(':');
        // Not a visibility such as pub(in path), and not the path of another crate.
        if text.contains("::") && !text.starts_with("::") && !code[..at].ends_with("in ") {
            found.push(text.split("::").map(str::to_owned).collect());
        }
        at = end;
    }
    found
}

fn find_word(code: &str, word: &str) -> Option<usize> {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .map(|(at, _)| at)
        .find(|&at| !code[..at].ends_with(part) && !code[at + word.len()..].starts_with(part))
}

fn has_word(code: &str, word: &str) -> bool {
    find_word(code, word).is_some()
}

/// Returns true when the code defines `name` as an item.
fn defines(code: &str, name: &str) -> bool {
    ["fn", "struct", "enum", "trait", "type", "const", "static", "union", "mod", "macro_rules!"]
        .iter()
        .any(|kind| has_word(code, &format!("{kind} {name}")))
}

/// The strongly connected components.
fn circles(graph: &Graph) -> Vec<BTreeSet<String>> {
    let reach = |from: &String| -> BTreeSet<String> {
        let (mut seen, mut queue) = (BTreeSet::new(), vec![from]);
        while let Some(file) = queue.pop() {
            for to in &graph[file] {
                if seen.insert(to.clone()) {
                    queue.push(to);
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&String, BTreeSet<String>> = graph.keys().map(|file| (file, reach(file))).collect();
    let mut found: BTreeSet<BTreeSet<String>> = BTreeSet::new();
    for (file, others) in &reached {
        let circle: BTreeSet<String> =
            others.iter().filter(|other| reached[other].contains(*file)).cloned().collect();
        if circle.len() > 1 {
            found.insert(circle);
        }
    }
    found.into_iter().collect()
}
