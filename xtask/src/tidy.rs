//! `cargo xtask tidy`: conventions that a compiler does not check.
//!
//! Its one job is to hold the code to three of them: modules depend one way, `unsafe` stands
//! in named files only, and generated documents are fresh. It reads sources as text, so that
//! it needs no build for the first two; comments and string literals do not count.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    docs,
    run::{output, root},
};

/// The daemon's modules from the top down. A module may name those of the lines below its
/// own, and of its own line those that [`SIBLINGS`] allows.
const LAYERS: &[&[&str]] = &[
    &["main"],
    &["cli"],
    &["daemon"],
    &["api", "kubernetes", "reconcile", "runtimes"],
    &["config"],
    &[
        "allowlist",
        "audit",
        "datapath",
        "grant",
        "identity",
        "logging",
        "manifest",
        "metrics",
        "scope",
    ],
    &["fault", "name", "pattern", "retry"],
];

/// Edges that go sideways or up: who may name whom, and why.
const SIBLINGS: &[(&str, &str)] = &[
    // What is compiled, and what is loaded once it is.
    ("allowlist", "grant"),
    ("allowlist", "identity"),
    ("allowlist", "scope"),
    ("datapath", "allowlist"),
    // Documents are read and written as manifests, and hold one another.
    ("manifest", "grant"),
    ("manifest", "identity"),
    ("manifest", "scope"),
    ("grant", "identity"),
    ("grant", "manifest"),
    ("grant", "scope"),
    ("identity", "manifest"),
    ("scope", "manifest"),
    // Text from outside is escaped in the log as it is in records.
    ("logging", "audit"),
    ("pattern", "name"),
    // The reports that the command line asks of its back end.
    ("daemon", "cli"),
];

/// Crates that some of the daemon's modules only may name.
const CRATES: &[(&str, Only)] = &[
    ("aya", Only::In(&["datapath"])),
    ("kube", Only::In(&["kubernetes"])),
    ("k8s_openapi", Only::In(&["kubernetes"])),
    ("serde", Only::NotIn(&["allowlist", "datapath", "reconcile"])),
    ("serde_json", Only::NotIn(&["allowlist", "datapath", "reconcile"])),
    // The words of the control API are those of the command line.
    ("clap", Only::In(&["api", "cli", "main"])),
];

/// Who may ask the naive reading of the grants besides its tests: it answers `explain`, and enforces
/// nothing.
const EXPLAINS: &str = "agentguard/src/daemon/service.rs";

/// Where `unsafe` may stand. A directory ends with a slash.
const UNSAFE: &[&str] = &[
    "agentguard-common/src/pod.rs",
    // All that reads what the kernel hands over; what decides, `judge`, is not among them.
    "agentguard-ebpf/src/bind.rs",
    "agentguard-ebpf/src/cgroup.rs",
    "agentguard-ebpf/src/connect.rs",
    "agentguard-ebpf/src/context.rs",
    "agentguard-ebpf/src/diagnostics.rs",
    "agentguard-ebpf/src/exec.rs",
    "agentguard-ebpf/src/kernel.rs",
    "agentguard-ebpf/src/main.rs",
    "agentguard-ebpf/src/maps.rs",
    "agentguard-ebpf/src/packet.rs",
    "agentguard-ebpf/src/record.rs",
    "agentguard-ebpf/src/socket.rs",
    "agentguard-ebpf/src/unix.rs",
    // One system call that no safe crate makes.
    "agentguard/src/datapath/link.rs",
    "tests/attacks/",
    "tests/datapath/runtimes.rs",
    "tests/datapath/worker.rs",
    // What happens between a fork and an exec.
    "tests/harness/capabilities.rs",
];

/// Crate roots that must forbid it, so that the compiler holds the line as well.
const FORBID_UNSAFE: &[(&str, &str)] = &[
    // Denied, so that the one module above can say that it is an exception.
    ("agentguard/src/lib.rs", "#![deny(unsafe_code)]"),
    ("agentguard/src/main.rs", "#![forbid(unsafe_code)]"),
];

/// Which modules may name a crate.
#[derive(Clone, Copy, Debug)]
enum Only {
    In(&'static [&'static str]),
    NotIn(&'static [&'static str]),
}

impl Only {
    fn allows(self, module: &str) -> bool {
        match self {
            Self::In(modules) => modules.contains(&module),
            Self::NotIn(modules) => !modules.contains(&module),
        }
    }
}

/// Checks the conventions.
///
/// # Errors
///
/// A text with every breach, by file and line.
pub(crate) fn tidy() -> Result<()> {
    let mut findings = Vec::new();
    let sources = sources()?;
    for source in &sources {
        if let Some(module) = daemon_module(&source.path) {
            findings.extend(edges(source, &module));
        }
        findings.extend(unsafe_places(source));
    }
    findings.extend(missing_forbids(&sources));
    for stale in docs::stale()? {
        findings.push(format!("{}: is stale; run `cargo xtask docs`", stale.path.display()));
    }
    if findings.is_empty() {
        println!("{} source files are tidy", sources.len());
        return Ok(());
    }
    bail!("{} findings:\n  {}", findings.len(), findings.join("\n  "))
}

/// A source file without its comments and string literals.
struct Source {
    /// Relative to the checkout.
    path: PathBuf,
    code: String,
}

/// Every Rust source in the checkout: tracked, or new and not ignored.
fn sources() -> Result<Vec<Source>> {
    let list = output(std::process::Command::new("git").current_dir(root()).args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "-z",
        "*.rs",
    ]))
    .or_else(|_| walked(root()))?;
    list.split('\0')
        .filter(|path| !path.is_empty() && root().join(path).is_file())
        .map(|path| {
            let text = fs::read_to_string(root().join(path))
                .with_context(|| format!("{path}: cannot be read"))?;
            Ok(Source { path: path.into(), code: code_of(&text) })
        })
        .collect()
}

/// The list for a checkout that is not under git, as an unpacked archive is not.
fn walked(directory: &Path) -> Result<String> {
    let mut list = String::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("target") && !path.ends_with(".git") {
            list.push_str(&walked(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            list.push_str(&path.strip_prefix(root())?.to_string_lossy());
            list.push('\0');
        }
    }
    Ok(list)
}

/// The top-level module of the daemon that a path belongs to.
fn daemon_module(path: &Path) -> Option<String> {
    let inside = path.strip_prefix("agentguard/src").ok()?;
    let first = inside.components().next()?.as_os_str().to_string_lossy().into_owned();
    let module = first.strip_suffix(".rs").unwrap_or(&first);
    (module != "lib").then(|| module.to_owned())
}

/// Every name of another module, or of a crate, that this module must not know.
fn edges(source: &Source, module: &str) -> Vec<String> {
    let Some(own) = layer(module) else {
        return vec![format!(
            "{}: module {module} has no place in xtask/src/tidy.rs; give it one",
            source.path.display()
        )];
    };
    let mut findings = Vec::new();
    for (number, line) in numbered(&source.code) {
        let place = format!("{}:{number}", source.path.display());
        for named in modules_named(&source.code, line) {
            let sibling = SIBLINGS.contains(&(module, named.as_str()));
            if named != module && layer(&named).is_some_and(|other| other <= own) && !sibling {
                findings.push(format!("{place}: {module} must not know {named}"));
            }
        }
        for (name, only) in CRATES {
            if names_crate(line, name) && !only.allows(module) {
                findings.push(format!("{place}: {module} must not know the crate {name}"));
            }
        }
        let explains = source.path == Path::new(EXPLAINS);
        if module != "allowlist" && !explains && line.contains("allowlist::specification") {
            findings.push(format!("{place}: enforcement must not ask the specification"));
        }
    }
    findings
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// The modules that stand behind `crate::` or the library's name in a line, also those in the
/// braces of an import that goes over several lines.
fn modules_named(code: &str, line: &str) -> Vec<String> {
    let mut named = Vec::new();
    for root in ["crate::", "agentguard::"] {
        for (position, _) in line.match_indices(root) {
            let before = line[..position].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
                continue;
            }
            let rest = &line[position + root.len()..];
            if rest.starts_with('{') {
                // `line` is a slice of `code`, so that the distance of the two is its offset.
                let offset = rest.as_ptr() as usize - code.as_ptr() as usize;
                named.extend(heads(&code[offset..]));
            } else {
                named.extend(words(rest).next().map(str::to_owned));
            }
        }
    }
    named
}

/// The first name of each part of `{a::b, c::{d, e}, f}`.
fn heads(group: &str) -> Vec<String> {
    let mut heads = Vec::new();
    let mut depth = 0_u32;
    let mut expects_head = false;
    let mut head = String::new();
    for c in group.chars() {
        match c {
            '{' => {
                depth += 1;
                expects_head = depth == 1;
            }
            '}' if depth == 1 => break,
            '}' => depth -= 1,
            ',' if depth == 1 => expects_head = true,
            c if expects_head && (c.is_alphanumeric() || c == '_') => {
                head.push(c);
                continue;
            }
            _ => {}
        }
        if !head.is_empty() {
            heads.push(std::mem::take(&mut head));
            expects_head = false;
        }
    }
    heads.extend((!head.is_empty()).then_some(head));
    heads
}

/// Whether a line names a crate as the head of a path, or imports it.
fn names_crate(line: &str, name: &str) -> bool {
    line.match_indices(name).any(|(position, _)| {
        let before = line[..position].trim_end_matches(' ');
        let after = &line[position + name.len()..];
        let whole = !line[..position].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let head = !before.ends_with("::") && after.starts_with("::");
        let imported = before.ends_with("use") && after.starts_with([';', ' ']);
        whole && (head || imported)
    })
}

/// Every `unsafe` outside the files it may stand in.
fn unsafe_places(source: &Source) -> Vec<String> {
    let path = source.path.to_string_lossy();
    let allowed = UNSAFE
        .iter()
        .any(|place| if place.ends_with('/') { path.starts_with(place) } else { path == *place });
    if allowed {
        return Vec::new();
    }
    numbered(&source.code)
        .filter(|(_, line)| words(line).any(|word| word == "unsafe"))
        .map(|(number, _)| format!("{path}:{number}: unsafe must not stand here"))
        .collect()
}

/// Crate roots that do not forbid `unsafe`, though they must.
fn missing_forbids(sources: &[Source]) -> Vec<String> {
    FORBID_UNSAFE
        .iter()
        .filter(|(path, attribute)| {
            !sources
                .iter()
                .any(|source| source.path == Path::new(path) && source.code.contains(attribute))
        })
        .map(|(path, attribute)| format!("{path}: must begin with {attribute}"))
        .collect()
}

fn numbered(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.lines().enumerate().map(|(index, line)| (index + 1, line))
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// The text with comments and the content of literals blanked, line for line.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let (length, keep) = match c {
            '/' if rest.starts_with("//") => (rest.find('\n').unwrap_or(rest.len()), false),
            '/' if rest.starts_with("/*") => (block_comment(rest), false),
            '"' => (quoted(rest), false),
            'r' if starts_raw_string(rest) && !ends_in_word(&code) => (raw_string(rest), false),
            '\'' => match character(rest) {
                Some(length) => (length, false),
                None => (1, true),
            },
            c => (c.len_utf8(), true),
        };
        let (taken, left) = rest.split_at(length);
        if keep {
            code.push_str(taken);
        } else {
            code.push(' ');
            code.extend(taken.chars().filter(|c| *c == '\n'));
        }
        rest = left;
    }
    code
}

/// The length of a block comment, with those nested in it.
fn block_comment(text: &str) -> usize {
    let mut depth = 0_u32;
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match &bytes[at..] {
            [b'/', b'*', ..] => {
                depth += 1;
                at += 2;
            }
            [b'*', b'/', ..] => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The length of a string literal that begins here.
fn quoted(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn starts_raw_string(text: &str) -> bool {
    text[1..].trim_start_matches('#').starts_with('"')
}

/// Whether the code so far ends in a word, so that an `r` is the end of a name.
fn ends_in_word(code: &str) -> bool {
    code.ends_with(|c: char| (c.is_alphanumeric() && c != 'b' && c != 'c') || c == '_')
}

/// The length of a raw string that begins here.
fn raw_string(text: &str) -> usize {
    let hashes = text[1..].len() - text[1..].trim_start_matches('#').len();
    let end = format!("\"{}", "#".repeat(hashes));
    let begin = 1 + hashes + 1;
    text[begin..].find(&end).map_or(text.len(), |at| begin + at + end.len())
}

/// The length of a character literal, or nothing where a lifetime begins.
fn character(text: &str) -> Option<usize> {
    let mut chars = text.char_indices().skip(1);
    let (_, first) = chars.next()?;
    if first == '\\' {
        chars.next();
        return chars.find(|(_, c)| *c == '\'').map(|(at, _)| at + 1);
    }
    let (at, second) = chars.next()?;
    (second == '\'').then_some(at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.into(), code: code_of(text) }
    }

    #[test]
    fn comments_and_literals_are_no_code() {
        let text = "let a = \"unsafe \\\" //\"; // unsafe\n/* unsafe /* x */ */ let b = 'u';\n\
                    let c: &'static str = r#\"unsafe \"\"#;";
        let code = code_of(text);
        assert!(!code.contains("unsafe"), "{code}");
        assert_eq!(code.lines().count(), 3);
        assert!(code.contains("&'static str"));
    }

    #[test]
    fn an_edge_upwards_is_found() {
        let upwards = source("agentguard/src/grant/store.rs", "use crate::daemon::Daemon;\n");
        assert_eq!(
            edges(&upwards, "grant"),
            ["agentguard/src/grant/store.rs:1: grant must not know daemon"]
        );
    }

    #[test]
    fn an_edge_upwards_is_found_in_a_group_over_several_lines() {
        let upwards = source(
            "agentguard/src/scope/mod.rs",
            "use crate::{\n    name::Name,\n    reconcile::{a, b},\n};\n",
        );
        assert_eq!(edges(&upwards, "scope").len(), 1);
    }

    #[test]
    fn edges_downwards_and_allowed_siblings_are_fine() {
        let down = source("agentguard/src/grant.rs", "use crate::{name::Name, scope::Scope};\n");
        assert!(edges(&down, "grant").is_empty());
    }

    #[test]
    fn only_the_datapath_knows_aya() {
        let text = "use aya::Ebpf;\n";
        assert_eq!(edges(&source("agentguard/src/audit.rs", text), "audit").len(), 1);
        assert!(edges(&source("agentguard/src/datapath/load.rs", text), "datapath").is_empty());
    }

    #[test]
    fn only_explain_asks_the_specification() {
        let text = "use crate::allowlist::specification::Specification;\n";
        assert_eq!(edges(&source("agentguard/src/daemon/engine.rs", text), "daemon").len(), 1);
        assert!(edges(&source(EXPLAINS, text), "daemon").is_empty());
    }

    #[test]
    fn a_module_without_a_place_is_named() {
        let new = source("agentguard/src/novelty.rs", "");
        assert!(edges(&new, "novelty")[0].contains("has no place"));
    }

    #[test]
    fn unsafe_is_found_outside_its_files_only() {
        let text = "fn f() { unsafe { g() } }\n";
        assert_eq!(unsafe_places(&source("agentguard/src/audit.rs", text)).len(), 1);
        assert!(unsafe_places(&source("agentguard-common/src/pod.rs", text)).is_empty());
        assert!(unsafe_places(&source("tests/attacks/raw.rs", text)).is_empty());
        let attribute = "#![forbid(unsafe_code)]\n";
        assert!(unsafe_places(&source("agentguard/src/lib.rs", attribute)).is_empty());
    }
}
