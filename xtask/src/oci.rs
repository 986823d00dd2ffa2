//! Container images, written without a container engine.
//!
//! Its one job is to put files into a one-layer image and that into an archive of the OCI image
//! layout, which `ctr images import`, `skopeo` and `podman load` take. The same files give the same
//! bytes wherever and whenever it runs: entries are sorted, belong to root, and are of the first
//! second of 1970. What is in an image, and why, is the callers' matter.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use flate2::{Compression, write::GzEncoder};
use oci_spec::image::{
    Arch, ConfigBuilder, Descriptor, ImageConfigurationBuilder, ImageIndexBuilder,
    ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, RootFsBuilder, Sha256Digest,
};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// What containerd names an image by that it imports.
const NAME: &str = "io.containerd.image.name";

/// What everyone else does.
const TAG: &str = "org.opencontainers.image.ref.name";

/// The version of the layout.
const LAYOUT: &str = "1.0.0";

/// One file of an image.
#[derive(Debug)]
pub(crate) enum Entry {
    Directory { mode: u32 },
    File { mode: u32, content: PathBuf },
    Text { mode: u32, content: String },
    Link { to: &'static str },
}

/// An image before it is written.
#[derive(Debug)]
pub(crate) struct Image {
    /// `<repository>:<tag>`.
    pub(crate) name: String,
    /// By path below the root, without a slash in front. A directory sorts before what is in it.
    pub(crate) entries: BTreeMap<String, Entry>,
    pub(crate) entrypoint: Vec<String>,
    pub(crate) command: Vec<String>,
    pub(crate) labels: BTreeMap<String, String>,
}

impl Image {
    /// Writes the archive, and gives the digest of the image's manifest, which is what a registry
    /// and a container runtime know the image by.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or the archive cannot be written.
    pub(crate) fn write(&self, to: &Path) -> Result<String> {
        let mut blobs = Blobs::default();
        let layer = self.layer()?;
        let diff_id = digest(&layer);
        let mut compressed = GzEncoder::new(Vec::new(), Compression::best());
        compressed.write_all(&layer)?;
        let layer = blobs.add(MediaType::ImageLayerGzip, compressed.finish()?)?;

        let config = ConfigBuilder::default()
            .user("0:0")
            .env(["PATH=/usr/bin:/bin".to_owned()])
            .entrypoint(self.entrypoint.clone())
            .cmd(self.command.clone())
            .working_dir("/")
            .labels(self.labels.clone().into_iter().collect::<std::collections::HashMap<_, _>>())
            .build()?;
        let root = RootFsBuilder::default()
            .typ("layers")
            .diff_ids([format!("sha256:{diff_id}")])
            .build()?;
        let configuration = ImageConfigurationBuilder::default()
            .architecture(Arch::default())
            .os(Os::Linux)
            .config(config)
            .rootfs(root)
            .build()?;
        let configuration = blobs.add(MediaType::ImageConfig, sorted(&configuration)?)?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageManifest)
            .config(configuration)
            .layers([layer])
            .build()?;
        let mut manifest = blobs.add(MediaType::ImageManifest, sorted(&manifest)?)?;
        let said = manifest.digest().to_string();
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        manifest.set_annotations(Some(
            [(NAME.to_owned(), self.name.clone()), (TAG.to_owned(), tag.to_owned())].into(),
        ));
        let index = ImageIndexBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageIndex)
            .manifests([manifest])
            .build()?;
        let layout = OciLayoutBuilder::default().image_layout_version(LAYOUT).build()?;

        let mut archive = tar::Builder::new(Vec::new());
        append(&mut archive, "blobs/", Some(0o755), &[])?;
        append(&mut archive, "blobs/sha256/", Some(0o755), &[])?;
        for (digest, content) in &blobs.content {
            append(&mut archive, &format!("blobs/sha256/{digest}"), None, content)?;
        }
        append(&mut archive, "index.json", None, &sorted(&index)?)?;
        append(&mut archive, "oci-layout", None, &sorted(&layout)?)?;
        if let Some(directory) = to.parent() {
            fs::create_dir_all(directory)?;
        }
        fs::write(to, archive.into_inner()?)
            .with_context(|| format!("{}: cannot be written", to.display()))?;
        Ok(said)
    }

    /// The one layer, not compressed.
    fn layer(&self) -> Result<Vec<u8>> {
        let mut layer = tar::Builder::new(Vec::new());
        for (path, entry) in &self.entries {
            match entry {
                Entry::Directory { mode } => {
                    append(&mut layer, &format!("{path}/"), Some(*mode), &[])?;
                }
                Entry::File { mode, content } => {
                    let content = fs::read(content)
                        .with_context(|| format!("{}: cannot be read", content.display()))?;
                    append_file(&mut layer, path, *mode, &content)?;
                }
                Entry::Text { mode, content } => {
                    append_file(&mut layer, path, *mode, content.as_bytes())?;
                }
                Entry::Link { to } => {
                    let mut header = header(tar::EntryType::Symlink, 0o777);
                    header.set_size(0);
                    layer.append_link(&mut header, path, to)?;
                }
            }
        }
        Ok(layer.into_inner()?)
    }
}

/// Content by its digest.
#[derive(Default)]
struct Blobs {
    content: BTreeMap<String, Vec<u8>>,
}

impl Blobs {
    fn add(&mut self, media_type: MediaType, content: Vec<u8>) -> Result<Descriptor> {
        let digest = digest(&content);
        let size = u64::try_from(content.len())?;
        let descriptor = Descriptor::new(media_type, size, digest.parse::<Sha256Digest>()?);
        self.content.insert(digest, content);
        Ok(descriptor)
    }
}

fn digest(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// As JSON with the keys of all objects in order: the maps of these types have none.
fn sorted<T: serde::Serialize>(value: &T) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(&in_order(serde_json::to_value(value)?))?)
}

fn in_order(value: Value) -> Value {
    match value {
        Value::Object(object) => {
            let by_key: BTreeMap<String, Value> = object.into_iter().collect();
            Value::Object(by_key.into_iter().map(|(key, value)| (key, in_order(value))).collect())
        }
        Value::Array(values) => Value::Array(values.into_iter().map(in_order).collect()),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value,
    }
}

fn header(kind: tar::EntryType, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append_file(
    to: &mut tar::Builder<Vec<u8>>,
    path: &str,
    mode: u32,
    content: &[u8],
) -> Result<()> {
    let mut header = header(tar::EntryType::Regular, mode);
    header.set_size(u64::try_from(content.len())?);
    to.append_data(&mut header, path, content)?;
    Ok(())
}

/// A directory when it has a mode, a file otherwise.
fn append(
    to: &mut tar::Builder<Vec<u8>>,
    path: &str,
    directory: Option<u32>,
    content: &[u8],
) -> Result<()> {
    match directory {
        Some(mode) => {
            let mut header = header(tar::EntryType::Directory, mode);
            header.set_size(0);
            to.append_data(&mut header, path, std::io::empty())?;
            Ok(())
        }
        None => append_file(to, path, 0o644, content),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, thread, time::Duration};

    use super::*;

    /// An image of a file in `directory`, which is written anew.
    fn image(directory: &Path) -> Image {
        let file = directory.join("program");
        fs::write(&file, "what it runs").unwrap();
        let entries = [
            ("usr".to_owned(), Entry::Directory { mode: 0o755 }),
            ("usr/bin".to_owned(), Entry::Directory { mode: 0o755 }),
            ("usr/bin/program".to_owned(), Entry::File { mode: 0o755, content: file }),
            ("bin".to_owned(), Entry::Link { to: "usr/bin" }),
            ("etc".to_owned(), Entry::Directory { mode: 0o755 }),
            ("etc/name".to_owned(), Entry::Text { mode: 0o644, content: "name\n".to_owned() }),
        ];
        Image {
            name: "agentguard.test/program:1".to_owned(),
            entries: entries.into(),
            entrypoint: vec!["/usr/bin/program".to_owned()],
            command: vec!["run".to_owned()],
            // As many as it takes for an order by chance to show.
            labels: (0..16).map(|n| (format!("label{n}"), n.to_string())).collect(),
        }
    }

    /// The members of an archive.
    fn members(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let mut members = BTreeMap::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_str().unwrap().to_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            members.insert(name, content);
        }
        members
    }

    #[test]
    fn two_builds_give_one_digest_and_one_archive() {
        let directory = tempfile::tempdir().unwrap();
        let mut written = Vec::new();
        for name in ["a", "b"] {
            let source = directory.path().join(name);
            fs::create_dir(&source).unwrap();
            let to = source.join("image.tar");
            let digest = image(&source).write(&to).unwrap();
            written.push((digest, fs::read(to).unwrap()));
            // The files of the second are a second newer, which is what tar counts in.
            thread::sleep(Duration::from_millis(1100));
        }
        assert_eq!(written[0].0, written[1].0);
        assert!(written[0].1 == written[1].1, "the archives differ");
    }

    #[test]
    fn another_content_gives_another_digest() {
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("image.tar");
        let one = image(directory.path()).write(&to).unwrap();
        let mut other = image(directory.path());
        other
            .entries
            .insert("etc/more".to_owned(), Entry::Text { mode: 0o644, content: "".into() });
        assert_ne!(one, other.write(&to).unwrap());
    }

    #[test]
    fn everything_an_image_refers_to_is_in_the_archive_under_its_digest() {
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("image.tar");
        let said = image(directory.path()).write(&to).unwrap();
        let members = members(&fs::read(to).unwrap());
        let blob = |descriptor: &Value| {
            let name = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
            let content = &members[&format!("blobs/sha256/{name}")];
            assert_eq!(name, digest(content));
            assert_eq!(descriptor["size"].as_u64().unwrap(), content.len() as u64);
            content.clone()
        };
        let json = |content: &[u8]| serde_json::from_slice::<Value>(content).unwrap();

        assert_eq!(json(&members["oci-layout"])["imageLayoutVersion"], "1.0.0");
        let index = json(&members["index.json"]);
        assert_eq!(index["manifests"][0]["digest"], said.as_str());
        assert_eq!(index["manifests"][0]["annotations"][NAME], "agentguard.test/program:1");
        let manifest = json(&blob(&index["manifests"][0]));
        let configuration = json(&blob(&manifest["config"]));
        assert_eq!(configuration["config"]["Entrypoint"][0], "/usr/bin/program");
        assert_eq!(configuration["config"]["Labels"]["label3"], "3");

        let compressed = blob(&manifest["layers"][0]);
        let mut layer = Vec::new();
        flate2::read::GzDecoder::new(&compressed[..]).read_to_end(&mut layer).unwrap();
        assert_eq!(
            configuration["rootfs"]["diff_ids"][0],
            format!("sha256:{}", digest(&layer)).as_str()
        );
        assert_eq!(self::members(&layer)["usr/bin/program"], b"what it runs");
        let mut archive = tar::Archive::new(&layer[..]);
        for entry in archive.entries().unwrap() {
            let header = entry.unwrap().header().clone();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            assert_eq!(header.mtime().unwrap(), 0);
        }
    }
}
