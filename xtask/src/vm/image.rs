//! The initial RAM file system of a virtual machine.
//!
//! Its one job is to write one: a static busybox, the modules by which the host's files are
//! reached, the two scripts in `guest/`, and what this run is about. Everything else is the host's
//! own file system, shared read-only, so that a machine has every program of the host, and the
//! very test programs that ran there.

use std::{fs, io::Write, path::Path, process::Command};

use anyhow::{Context as _, Result};

use super::kernels::Kernel;
use crate::run::{output_bytes, which};

/// Modules that a machine needs before it has modules; those that are part of the kernel are not
/// found, and not missed. If one is missed, the machine says so on its console.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_console", "virtiofs", "overlay"];

const DIRECTORIES: [&str; 5] = ["bin", "dev", "modules", "proc", "sys"];

const INIT: &str = include_str!("guest/init.sh");
const GUEST: &str = include_str!("guest/guest.sh");

/// Who is the first process while a job runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manager {
    /// Nobody who would start services.
    None,
    /// The host's own systemd; the job is one of its services.
    Systemd,
}

/// What one run is about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job<'a> {
    /// What the shell runs, as root.
    pub(super) script: &'a str,
    pub(super) manager: Manager,
    /// Directories that the script needs beyond those of the system.
    pub(super) visible: &'a [&'a Path],
}

/// Writes the image for a kernel and a job.
///
/// # Errors
///
/// A program is missing, or a file cannot be read or written.
pub(super) fn write(kernel: &Kernel, job: &Job<'_>, to: &Path) -> Result<()> {
    let busybox = which("busybox").context("busybox is missing; run `cargo xtask setup`")?;
    let mut archive = Archive::new(fs::File::create(to).map(std::io::BufWriter::new)?);
    for directory in DIRECTORIES {
        archive.directory(directory)?;
    }
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.file("guest.sh", 0o644, GUEST.as_bytes())?;
    archive.file("job.sh", 0o644, job.script.as_bytes())?;
    archive.file("machine", 0o644, machine(kernel, job).as_bytes())?;
    archive.file("bin/busybox", 0o755, &fs::read(busybox)?)?;
    let mut order = String::new();
    for (name, content) in modules(kernel)? {
        archive.file(&format!("modules/{name}"), 0o644, &content)?;
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    archive.finish()
}

/// Variables for the scripts.
fn machine(kernel: &Kernel, job: &Job<'_>) -> String {
    let modules = kernel.modules();
    let visible: Vec<_> = job
        .visible
        .iter()
        .copied()
        .chain([modules.as_path()])
        .map(|path| path.display().to_string())
        .collect();
    let manager = match job.manager {
        Manager::None => "none",
        Manager::Systemd => "systemd",
    };
    format!("visible='{}'\nmodules='{}'\nmanager={manager}\n", visible.join(" "), modules.display())
}

/// The modules in the order in which they load, unpacked.
fn modules(kernel: &Kernel) -> Result<Vec<(String, Vec<u8>)>> {
    let directory = kernel.modules().join("lib/modules").join(&kernel.release);
    let dependencies = fs::read_to_string(directory.join("modules.dep"))
        .with_context(|| format!("{}: no modules.dep", directory.display()))?;
    let mut found = Vec::new();
    for path in in_order(&dependencies, &MODULES) {
        let file = directory.join(path);
        let content = match file.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => {
                output_bytes(Command::new("xz").args(["--decompress", "--stdout"]).arg(&file))?
            }
            Some("zst") => output_bytes(Command::new("zstd").args(["-qdc"]).arg(&file))?,
            _ => fs::read(&file)?,
        };
        found.push((format!("{}.ko", module_name(path)), content));
    }
    Ok(found)
}

/// Paths of modules and of what they depend on, each once, dependencies first.
fn in_order<'a>(dependencies: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let mut order: Vec<&str> = Vec::new();
    for name in wanted {
        let line = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| module_name(path) == *name);
        let Some((path, needs)) = line else { continue };
        for path in needs.split_whitespace().rev().chain([path]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    order
}

/// `kernel/fs/fuse/virtiofs.ko.xz` is `virtiofs`; dashes are underscores.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// A cpio archive of the form that the kernel unpacks (`newc`).
struct Archive<W> {
    to: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    const fn new(to: W) -> Self {
        Self { to, inode: 0 }
    }

    fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(name, 0o040_755, &[])
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(name, 0o100_000 | mode, content)
    }

    fn finish(mut self) -> Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.to.flush().context("the image cannot be written")
    }

    /// A head of thirteen numbers, the name, the content; name and content end on a multiple of four.
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len()).with_context(|| format!("{name}: too large"))?;
        let name_size = u32::try_from(name.len() + 1)?;
        let mut head = String::from("070701");
        for number in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            head.push_str(&format!("{number:08X}"));
        }
        self.to.write_all(head.as_bytes())?;
        self.to.write_all(name.as_bytes())?;
        self.pad(head.len() + name.len() + 1, 1)?;
        self.to.write_all(content)?;
        self.pad(content.len(), 0)
    }

    /// Zeros: so many, and then up to the next multiple of four of `length`.
    fn pad(&mut self, length: usize, least: usize) -> Result<()> {
        let zeros = least + length.next_multiple_of(4) - length;
        self.to.write_all(&[0; 4][..zeros]).context("the image cannot be written")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_loads_before_it_and_once() {
        let dependencies = "kernel/drivers/virtio/virtio.ko:\n\
            kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko\n\
            kernel/fs/fuse/fuse.ko.xz:\n\
            kernel/fs/fuse/virtiofs.ko.xz: kernel/fs/fuse/fuse.ko.xz \
            kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko\n\
            kernel/drivers/virtio/virtio-pci.ko: kernel/drivers/virtio/virtio_ring.ko \
            kernel/drivers/virtio/virtio.ko\n";
        let names: Vec<_> = in_order(dependencies, &["virtio_pci", "no_such", "virtiofs"])
            .into_iter()
            .map(module_name)
            .collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_pci", "fuse", "virtiofs"]);
    }

    #[test]
    fn the_archive_is_one_that_cpio_reads() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.directory("bin").unwrap();
        archive.file("bin/abcde", 0o755, b"12345").unwrap();
        archive.finish().unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let heads: Vec<_> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(heads.len(), 3);
        assert!(heads.iter().all(|at| at % 4 == 0), "{heads:?}");
        assert_eq!(&text[heads[1] + 110..heads[1] + 120], "bin/abcde\0");
        assert_eq!(&text[heads[1] + 120..heads[1] + 125], "12345");
    }
}
