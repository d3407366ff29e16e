//! Files import each other in one direction: no circle of imports has more than three files.
//!
//! The graph is read from the sources. An edge leads from a file to the file that defines what it names by a path of its
//! crate (`crate::`, `super::`, `self::` or a child module). A re-export is followed to the definition and is no edge
//! itself. Code under `cfg(test)` does not count. There is no exception: types that several files of a module share lie in a
//! file below all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

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
        let file = if module.is_empty() { "lib" } else { module };
        sources.add(module.to_owned(), file.to_owned(), text);
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
        let (code, test_modules) = without_tests(&comments_and_literals().replace_all(text, " "));
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

/// Comments, in the group of that name, and literals: raw strings, strings and characters, but no lifetimes.
pub(crate) fn comments_and_literals() -> Regex {
    let raw = (0..4).map(|hashes| "#".repeat(hashes)).map(|hashes| format!(r#"\bb?r{hashes}".*?"{hashes}"#));
    let raw = raw.collect::<Vec<_>>().join("|");
    let comment = r"(?<comment>//[^\n]*|/\*.*?\*/)";
    let others = r#""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.[^']*)'"#;
    Regex::new(&format!("(?s){comment}|{raw}|{others}")).expect("a constant pattern")
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
    // Not a visibility such as pub(in path), and not the path of another crate.
    let path = Regex::new(r"(?<other>\bin |::)?(?<path>\w+(?:::\w+)+)").expect("a constant pattern");
    let found = path.captures_iter(code).filter(|found| found.name("other").is_none());
    found.map(|found| found["path"].split("::").map(str::to_owned).collect()).collect()
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
