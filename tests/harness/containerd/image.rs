//! Images for the containers of the tests, made by hand: one program and where it lies.
//!
//! There is no registry; an image is an OCI layout in an archive, which containerd imports.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// The image of a pod's first container.
pub(super) const PAUSE: &str = "localhost/pause:1";
/// The image of every other.
pub(super) const AGENT: &str = "localhost/agent:1";

/// Where the program lies in both.
pub const PROGRAM: &str = "/bin/agent";
/// A second file with the same content, to be run by attempts at exec.
pub const TOOL: &str = "/bin/tool";

/// Writes an archive of both images. `program` has to be linked statically.
///
/// # Errors
///
/// A file cannot be read or written.
pub(super) fn write(program: &Path, archive: &Path) -> io::Result<()> {
    let mut blobs = Blobs(tar::Builder::new(File::create(archive)?));
    let layer = blobs.add("application/vnd.oci.image.layer.v1.tar", &layer(program)?)?;
    let mut images = Vec::new();
    for (name, command) in [(PAUSE, "pause"), (AGENT, "pause")] {
        let config = json!({
            "architecture": ARCHITECTURE,
            "os": "linux",
            "config": {"Entrypoint": [PROGRAM, command], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
            // By this the two differ, and so does what they are known by.
            "history": [{"created_by": name}],
        });
        let config = blobs.add("application/vnd.oci.image.config.v1+json", &text(&config))?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config,
            "layers": [layer],
        });
        let mut manifest = blobs.add(MANIFEST, &text(&manifest))?;
        manifest["annotations"] = json!({"io.containerd.image.name": name});
        images.push(manifest);
    }
    let index = json!({"schemaVersion": 2, "manifests": images});
    blobs.file("index.json", &text(&index))?;
    blobs.file("oci-layout", &text(&json!({"imageLayoutVersion": "1.0.0"})))?;
    blobs.0.into_inner().map(drop)
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// As images name it.
const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

/// The root directory: the program, twice, and places to mount on.
///
/// # Errors
///
/// The program cannot be read.
pub(crate) fn layer(program: &Path) -> io::Result<Vec<u8>> {
    let program = fs::read(program)?;
    let mut layer = tar::Builder::new(Vec::new());
    for directory in ["bin/", "dev/", "etc/", "proc/", "sys/", "tmp/"] {
        layer.append_data(
            &mut header(0, 0o755, tar::EntryType::Directory),
            directory,
            io::empty(),
        )?;
    }
    for file in [PROGRAM, TOOL] {
        let mut header = header(program.len(), 0o755, tar::EntryType::Regular);
        layer.append_data(&mut header, file.trim_start_matches('/'), program.as_slice())?;
    }
    layer.into_inner()
}

fn header(size: usize, mode: u32, kind: tar::EntryType) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size as u64);
    header.set_mode(mode);
    header.set_entry_type(kind);
    header.set_mtime(0);
    header
}

fn text(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// An OCI layout that is being written.
struct Blobs(tar::Builder<File>);

impl Blobs {
    fn file(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.0.append_data(
            &mut header(content.len(), 0o644, tar::EntryType::Regular),
            name,
            content,
        )
    }

    /// Adds a blob and gives what refers to it.
    fn add(&mut self, kind: &str, content: &[u8]) -> io::Result<Value> {
        let digest: String =
            Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        self.file(&format!("blobs/sha256/{digest}"), content)?;
        Ok(json!({
            "mediaType": kind,
            "digest": format!("sha256:{digest}"),
            "size": content.len(),
        }))
    }
}
