//! Images of the containers that the tests run.
//!
//! Its one job is to make them from programs of this machine: no registry is asked.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    oci::{Entry, Image},
    run::{output, which},
};

/// What holds a pod's namespaces.
pub(super) const PAUSE: &str = "agentguard.test/pause:1";

/// A shell and its tools, with a web server among them, `curl`, and a shell that connects by itself.
pub(super) const TOOLS: &str = "agentguard.test/tools:1";

/// Programs of busybox that go by their own name.
const APPLETS: &[&str] = &[
    "ash", "cat", "date", "echo", "env", "head", "hostname", "httpd", "id", "ip", "kill", "ln",
    "ls", "mkdir", "mv", "nc", "ping", "ps", "readlink", "rm", "sed", "sh", "sleep", "sort",
    "stat", "tail", "test", "timeout", "touch", "tr", "true", "uname", "wc",
];

/// What a static busybox can not do: it ends by a signal when it looks up a name, or an address.
const PROGRAMS: &[&str] = &["bash", "curl"];

/// Writes the archive of [`PAUSE`].
pub(super) fn pause(to: &Path) -> Result<PathBuf> {
    let entrypoint = ["/bin/busybox", "sleep", "2147483647"];
    write(PAUSE, base()?, &entrypoint, to)
}

/// Writes the archive of [`TOOLS`].
pub(super) fn tools(to: &Path) -> Result<PathBuf> {
    let mut entries = base()?;
    for applet in APPLETS {
        entries.insert(format!("bin/{applet}"), Entry::Link { to: "busybox" });
    }
    for program in PROGRAMS {
        let path = which(program).with_context(|| format!("{program} is missing; install it"))?;
        for library in libraries(&path)? {
            add(&mut entries, &library, &library)?;
        }
        add(&mut entries, &Path::new("/usr/bin").join(program), &path)?;
    }
    write(TOOLS, entries, &["/bin/sh"], to)
}

/// What every image has.
fn base() -> Result<BTreeMap<String, Entry>> {
    let busybox = which("busybox").context("busybox is missing; install busybox-static")?;
    let mut entries: BTreeMap<String, Entry> = ["bin", "dev", "etc", "proc", "sys", "tmp", "var"]
        .map(|path| (path.to_owned(), Entry::Directory { mode: 0o755 }))
        .into();
    entries.insert("bin/busybox".to_owned(), Entry::File { mode: 0o755, content: busybox });
    entries.insert(
        "etc/passwd".to_owned(),
        Entry::Text { mode: 0o644, content: "root:x:0:0:root:/:/bin/sh\n".to_owned() },
    );
    Ok(entries)
}

/// Adds a program or library with the directories it is in.
fn add(entries: &mut BTreeMap<String, Entry>, path: &Path, content: &Path) -> Result<()> {
    let below_root = path.strip_prefix("/").context("a path is absolute")?;
    for directory in below_root.ancestors().skip(1) {
        let directory = directory.to_str().context("a path is UTF-8")?;
        if !directory.is_empty() {
            entries.entry(directory.to_owned()).or_insert(Entry::Directory { mode: 0o755 });
        }
    }
    let name = below_root.to_str().context("a path is UTF-8")?;
    let file = Entry::File { mode: 0o755, content: content.to_owned() };
    entries.insert(name.to_owned(), file);
    Ok(())
}

/// What a program is linked to, its interpreter included.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let said = output(Command::new("ldd").arg(program))?;
    Ok(said
        .lines()
        // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

fn write(
    name: &str,
    entries: BTreeMap<String, Entry>,
    entrypoint: &[&str],
    to: &Path,
) -> Result<PathBuf> {
    let image = Image {
        name: name.to_owned(),
        entries,
        entrypoint: entrypoint.iter().map(|&word| word.to_owned()).collect(),
        command: Vec::new(),
        labels: [].into(),
    };
    image.write(to)?;
    Ok(to.to_owned())
}
