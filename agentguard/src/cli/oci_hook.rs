//! `agentguard oci-hook`: what an OCI runtime runs between making a container and running it.
//!
//! Its one job is to tell the daemon whose container is about to run, and to have the runtime give up
//! where it could not. It runs before every container of the node, so it reads two small files and
//! asks once; nothing that the node needs to run agentguard waits for agentguard.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Deserialize;
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use super::output::Tone;
use super::{Context, Result};
use crate::api::types::{Announcement, PodView};
use crate::config::EXEMPT_NAMESPACES;

/// As much of a runtime's files as is read.
const LONGEST: u64 = 16 << 20;
/// How much longer a runtime waits for the hook than the hook for the daemon, in seconds.
const SLACK: u64 = 5;

/// Have the daemon hold a container before its first instruction
///
/// An OCI runtime runs this as a createRuntime hook, with the container's state on standard input.
/// The container's first process waits meanwhile; it is held when this succeeds, and does not run
/// when this fails. --print writes what makes a runtime run it.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// What becomes of a pod's container that could not be told of: without a daemon, nothing that
    /// the hook is installed for starts, or everything does and is held once the daemon runs
    #[arg(long, value_enum, value_name = "deny|allow", default_value_t = OnFailure::Deny)]
    on_failure: OnFailure,

    /// A namespace whose pods start without being told of, beside kube-system and agentguard; may be
    /// repeated. Name the one that the daemon itself runs in, and that of the pods without which no pod
    /// has a network
    #[arg(long = "exempt-namespace", value_name = "NAMESPACE")]
    exempt: Vec<String>,

    /// How long the daemon may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(1..=60))]
    timeout: u64,

    /// Write what installs this hook, with the options that are given, in place of being it:
    /// base-spec adds it to the output of `ctr oci spec` on standard input; containerd is the part
    /// of its configuration that names the result; cri-o is a file for its hooks directory
    #[arg(long, value_enum, value_name = "WHAT")]
    print: Option<Print>,

    /// Write to this file, in one step, and not to standard output
    #[arg(long, value_name = "PATH", requires = "print")]
    write_to: Option<PathBuf>,

    /// Copy this program to a file first, in one step: out of a container to its node
    #[arg(long, value_name = "PATH")]
    copy_to: Option<PathBuf>,

    /// Delete this file, in place of being the hook: one that --write-to or --copy-to wrote; may be
    /// repeated, and is done in this order. What the runtime reads goes before the program that it runs
    #[arg(long, value_name = "PATH", conflicts_with_all = ["print", "copy_to"])]
    remove: Vec<PathBuf>,

    /// Where the program is for the container runtime, if not where it is for this process
    #[arg(long, value_name = "PATH", requires = "print")]
    program: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnFailure {
    Deny,
    Allow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Print {
    BaseSpec,
    Containerd,
    #[value(name = "cri-o")]
    CriO,
}

/// What the runtime says of the container (runtime-spec, `runtime.md`), as far as it is needed.
#[derive(Debug, Deserialize)]
struct State {
    id: String,
    #[serde(default)]
    pid: u32,
    bundle: PathBuf,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// What the container is made by (runtime-spec, `config.md`), as far as it is needed.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Spec {
    root: Root,
    process: Process,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Root {
    path: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Process {
    args: Vec<String>,
    env: Vec<String>,
}

/// The pod of a container, as its annotations tell it.
#[derive(Debug, Default, PartialEq, Eq)]
struct OfPod {
    is_sandbox: bool,
    sandbox: Option<String>,
    container: String,
    namespace: String,
    name: String,
    uid: String,
}

pub(super) fn run(arguments: &Arguments, mut context: Context<'_, '_>) -> Result {
    if let Some(path) = &arguments.copy_to {
        let program = fs::File::open(own_program()?).map_err(|error| {
            Failure::new(Exit::Failed, format!("this program can not be read: {error}"))
        })?;
        put(path, program, 0o755)?;
    }
    if let Some(print) = arguments.print {
        return write(print, arguments, &mut context);
    }
    for path in &arguments.remove {
        remove(path)?;
    }
    if arguments.copy_to.is_some() || !arguments.remove.is_empty() {
        return Ok(Exit::Done);
    }
    let mut text = String::new();
    let failure = match std::io::stdin().lock().take(LONGEST).read_to_string(&mut text) {
        Err(error) => not_told("a container", &format!("its state can not be read: {error}")),
        Ok(_) => match serde_json::from_str::<State>(&text) {
            Err(error) => not_told(
                "a container",
                &format!("its state on standard input is none of an OCI runtime: {error}"),
            ),
            Ok(state) => match tell(state, arguments, &context) {
                Ok(()) => return Ok(Exit::Done),
                Err(failure) => failure,
            },
        },
    };
    match arguments.on_failure {
        OnFailure::Deny => Err(failure),
        OnFailure::Allow => {
            let text =
                format!("{}; it starts all the same, as --on-failure allow says", failure.error);
            context.console.note("warning:", Tone::Careful, &text);
            Ok(Exit::Done)
        }
    }
}

fn tell(
    state: State,
    arguments: &Arguments,
    context: &Context<'_, '_>,
) -> std::result::Result<(), Failure> {
    let pod = pod_of(&state.annotations)
        .map_err(|why| not_told(&format!("the container {}", state.id), &why))?;
    // Here and not in the daemon, which may be what is being started.
    if pod.as_ref().is_some_and(|pod| is_exempt(&pod.namespace, &arguments.exempt)) {
        return Ok(());
    }
    let whose = match &pod {
        Some(pod) => format!("the container {} of pod {}/{}", state.id, pod.namespace, pod.name),
        None => format!("the container {}", state.id),
    };
    // Without a pod only what it says of itself can make an agent of it.
    if pod.is_none() && state.annotations.is_empty() {
        return Ok(());
    }
    let announcement = announcement(state, pod).map_err(|why| not_told(&whose, &why))?;
    let client = context.client.clone().with_patience(Duration::from_secs(arguments.timeout));
    client.announce(&announcement).map(drop).map_err(|error| {
        let failure = Failure::from(error);
        let remedy = failure.remedy.clone();
        let refused = not_told(&whose, &failure.error);
        match remedy {
            Some(remedy) => refused.with_remedy(remedy),
            None => refused,
        }
    })
}

fn is_exempt(namespace: &str, named: &[String]) -> bool {
    EXEMPT_NAMESPACES.contains(&namespace) || named.iter().any(|exempt| exempt == namespace)
}

fn not_told(whose: &str, why: &str) -> Failure {
    Failure::new(Exit::Failed, format!("{whose} is not held by agentguard: {why}")).with_remedy(
        "see agentguard status; a hook with --on-failure allow starts what it can not tell of",
    )
}

fn announcement(state: State, pod: Option<OfPod>) -> std::result::Result<Announcement, String> {
    let State { id, pid, bundle, annotations } = state;
    if pid == 0 {
        return Err("it has no process yet; run this as a createRuntime hook".to_owned());
    }
    let path = bundle.join("config.json");
    let text = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let Spec { root, process } = serde_json::from_slice(&text)
        .map_err(|error| format!("{} is no OCI configuration: {error}", path.display()))?;
    if root.path.as_os_str().is_empty() {
        return Err(format!("{} names no root", path.display()));
    }
    let search_path = process.env.iter().rev().find_map(|variable| variable.strip_prefix("PATH="));
    let search_path = search_path.map(str::to_owned);
    let (name, is_sandbox, sandbox, pod, labels) = match pod {
        Some(OfPod { is_sandbox, sandbox, container, namespace, name, uid }) => {
            // Without it nothing would tell that the container is its pod's.
            let sandbox = sandbox
                .or_else(|| is_sandbox.then(|| id.clone()))
                .ok_or("its annotations tell no sandbox; update the container runtime")?;
            let sandbox = Some(sandbox);
            let pod = PodView { namespace, name, uid };
            (container, is_sandbox, sandbox, Some(pod), BTreeMap::new())
        }
        // There is nothing else that could mark it.
        None => (id.clone(), false, None, None, annotations),
    };
    Ok(Announcement {
        id,
        pid,
        root: bundle.join(root.path),
        name,
        is_sandbox,
        sandbox,
        pod,
        labels,
        command: process.args.into_iter().next(),
        search_path,
    })
}

/// The pod that a container's annotations tell of; `None` where they tell of none.
///
/// CRI-O's own come first: it hands on what whoever made the pod has written, under any other name.
fn pod_of(annotations: &BTreeMap<String, String>) -> std::result::Result<Option<OfPod>, String> {
    let get = |key: &str| annotations.get(key).cloned().filter(|value| !value.is_empty());
    if let Some(kind) = get("io.kubernetes.cri-o.ContainerType") {
        let labels: BTreeMap<String, String> = match get("io.kubernetes.cri-o.Labels") {
            None => BTreeMap::new(),
            Some(labels) => serde_json::from_str(&labels).map_err(|error| {
                format!("its annotation io.kubernetes.cri-o.Labels is none of CRI-O: {error}")
            })?,
        };
        // Newer versions give these as annotations of their own as well.
        let own = |key: &str| labels.get(key).cloned().or_else(|| get(key));
        let of = |key: &str| own(key).ok_or_else(|| lacks(key));
        let is_sandbox = kind == "sandbox";
        return Ok(Some(OfPod {
            is_sandbox,
            sandbox: get("io.kubernetes.cri-o.SandboxID"),
            container: name_of(is_sandbox, of("io.kubernetes.container.name"))?,
            namespace: own("io.kubernetes.pod.namespace")
                .or_else(|| get("io.kubernetes.cri-o.Namespace"))
                .ok_or_else(|| lacks("io.kubernetes.cri-o.Namespace"))?,
            name: of("io.kubernetes.pod.name")?,
            uid: of("io.kubernetes.pod.uid")?,
        }));
    }
    let Some(kind) = get("io.kubernetes.cri.container-type") else { return Ok(None) };
    let of = |key: &str| {
        let key = format!("io.kubernetes.cri.{key}");
        get(&key).ok_or_else(|| lacks(&key))
    };
    let is_sandbox = kind == "sandbox";
    Ok(Some(OfPod {
        is_sandbox,
        sandbox: get("io.kubernetes.cri.sandbox-id"),
        container: name_of(is_sandbox, of("container-name"))?,
        namespace: of("sandbox-namespace")?,
        name: of("sandbox-name")?,
        uid: of("sandbox-uid")?,
    }))
}

/// A sandbox has no name of its own.
fn name_of(
    is_sandbox: bool,
    name: std::result::Result<String, String>,
) -> std::result::Result<String, String> {
    if is_sandbox { Ok(name.unwrap_or_else(|_none| String::new())) } else { name }
}

fn lacks(key: &str) -> String {
    format!("it has no annotation {key}, by which its pod is known; update the container runtime")
}

fn write(print: Print, arguments: &Arguments, context: &mut Context<'_, '_>) -> Result {
    let program = match &arguments.program {
        Some(program) => program.clone(),
        None => own_program()?,
    };
    let text = match print {
        Print::BaseSpec => {
            let mut text = String::new();
            std::io::stdin().lock().take(LONGEST).read_to_string(&mut text).map_err(|error| {
                Failure::new(Exit::Failed, format!("standard input can not be read: {error}"))
            })?;
            let spec = serde_json::from_str(&text).map_err(|error| error.to_string());
            let added = spec.and_then(|spec| add(spec, hook(&program, arguments, context)));
            let spec = added.map_err(|error| {
                Failure::new(Exit::Usage, format!("standard input is no OCI configuration: {error}"))
                    .with_remedy(
                        "pipe in that of containerd: ctr oci spec | agentguard oci-hook --print base-spec",
                    )
            })?;
            format!("{spec:#}\n")
        }
        Print::Containerd => CONTAINERD.to_owned(),
        Print::CriO => {
            let hook = json!({
                "version": "1.0.0",
                "hook": hook(&program, arguments, context),
                "when": {"always": true},
                "stages": ["createRuntime"],
            });
            format!("{hook:#}\n")
        }
    };
    match &arguments.write_to {
        Some(path) => put(path, text.as_bytes(), 0o644)?,
        None => context.console.out.write_all(text.as_bytes())?,
    }
    Ok(Exit::Done)
}

fn own_program() -> std::result::Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|error| {
        Failure::new(Exit::Failed, format!("it is not known where this program is: {error}"))
            .with_remedy("mount procfs at /proc")
    })
}

/// Writes a file so that whoever reads it sees the old one or the new one: a runtime may run the
/// program at any time.
fn put(path: &Path, mut content: impl Read, mode: u32) -> std::result::Result<(), Failure> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    fs::File::create(&beside)
        .and_then(|mut file| std::io::copy(&mut content, &mut file))
        .and_then(|_| fs::set_permissions(&beside, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&beside, path))
        .map_err(|error| {
            Failure::new(Exit::Failed, format!("{} can not be written: {error}", path.display()))
        })
}

/// Deletes a file; one that is not there is gone already.
fn remove(path: &Path) -> std::result::Result<(), Failure> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(gone) if gone.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Failure::new(
            Exit::Failed,
            format!("{} can not be removed: {error}", path.display()),
        )),
    }
}

/// The hook, as both runtimes' files have it.
fn hook(program: &Path, arguments: &Arguments, context: &Context<'_, '_>) -> Value {
    let mut words = vec!["agentguard".to_owned(), "oci-hook".to_owned()];
    let mut option = |name: &str, value: &str| words.extend([name.to_owned(), value.to_owned()]);
    if let Some(socket) = &context.socket {
        option("--socket", &socket.display().to_string());
    }
    if arguments.on_failure == OnFailure::Allow {
        option("--on-failure", "allow");
    }
    for namespace in &arguments.exempt {
        option("--exempt-namespace", namespace);
    }
    option("--timeout", &arguments.timeout.to_string());
    json!({"path": program, "args": words, "timeout": arguments.timeout + SLACK})
}

/// What `ctr oci spec` limits a process to.
fn default_limits() -> Value {
    json!([{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}])
}

/// Adds the hook to a configuration, in the place of one that was added before.
fn add(mut spec: Value, hook: Value) -> std::result::Result<Value, String> {
    if !spec.get("process").is_some_and(Value::is_object) {
        return Err("it has no `process`".to_owned());
    }
    // containerd takes its default limits away, and keeps those of a configuration that it is given: every
    // pod would have so few open files.
    if spec["process"]["rlimits"] == default_limits()
        && let Some(process) = spec["process"].as_object_mut()
    {
        process.remove("rlimits");
    }
    let hooks = &mut spec["hooks"];
    if hooks.is_null() {
        *hooks = json!({});
    }
    let hooks = hooks.as_object_mut().ok_or("its `hooks` are no object")?;
    let stage = hooks.entry("createRuntime").or_insert_with(|| json!([]));
    let stage = stage.as_array_mut().ok_or("its `hooks.createRuntime` is no list")?;
    stage.retain(|known| known["args"][1] != "oci-hook");
    stage.push(hook);
    Ok(spec)
}

/// For both generations of containerd's configuration.
const CONTAINERD: &str = r#"# Add to /etc/containerd/config.toml, for the runtime that runs pods, and restart containerd. Write the
# file first: ctr oci spec | agentguard oci-hook --print base-spec > /etc/containerd/agentguard.json

# containerd 1.5 to 1.7 (version = 2)
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  base_runtime_spec = "/etc/containerd/agentguard.json"

# containerd 2 (version = 3)
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  base_runtime_spec = "/etc/containerd/agentguard.json"
"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn expected() -> OfPod {
        OfPod {
            is_sandbox: false,
            sandbox: Some("s".to_owned()),
            container: "agent".to_owned(),
            namespace: "agents".to_owned(),
            name: "researcher-0".to_owned(),
            uid: "u-1".to_owned(),
        }
    }

    #[test]
    fn a_namespace_that_is_named_takes_none_of_the_others_place() {
        let named = ["cni".to_owned()];
        for exempt in ["cni", "kube-system", "agentguard"] {
            assert!(is_exempt(exempt, &named), "{exempt}");
        }
        assert!(!is_exempt("agents", &named) && !is_exempt("cni", &[]));
    }

    #[test]
    fn containerd_and_cri_o_tell_the_pod_of_a_container() {
        let containerd = annotations(&[
            ("io.kubernetes.cri.container-type", "container"),
            ("io.kubernetes.cri.container-name", "agent"),
            ("io.kubernetes.cri.sandbox-id", "s"),
            ("io.kubernetes.cri.sandbox-namespace", "agents"),
            ("io.kubernetes.cri.sandbox-name", "researcher-0"),
            ("io.kubernetes.cri.sandbox-uid", "u-1"),
        ]);
        assert_eq!(pod_of(&containerd), Ok(Some(expected())));
        let labels = r#"{"io.kubernetes.container.name": "agent", "io.kubernetes.pod.uid": "u-1",
            "io.kubernetes.pod.name": "researcher-0", "io.kubernetes.pod.namespace": "agents"}"#;
        let cri_o = annotations(&[
            ("io.kubernetes.cri-o.ContainerType", "container"),
            ("io.kubernetes.cri-o.SandboxID", "s"),
            ("io.kubernetes.cri-o.Labels", labels),
        ]);
        assert_eq!(pod_of(&cri_o), Ok(Some(expected())));
        // What whoever made the pod has written does not take its place.
        let mut both = cri_o;
        both.extend(annotations(&[
            ("io.kubernetes.cri.container-type", "container"),
            ("io.kubernetes.cri.sandbox-namespace", "kube-system"),
        ]));
        assert_eq!(pod_of(&both), Ok(Some(expected())));
        assert_eq!(pod_of(&annotations(&[("agentguard.dev/agent", "true")])), Ok(None));
    }

    #[test]
    fn a_pod_that_is_told_of_in_part_is_an_error_that_names_what_is_missing() {
        let whole = [
            ("io.kubernetes.cri.container-name", "agent"),
            ("io.kubernetes.cri.sandbox-namespace", "agents"),
            ("io.kubernetes.cri.sandbox-name", "researcher-0"),
            ("io.kubernetes.cri.sandbox-uid", "u-1"),
        ];
        for missing in whole {
            let mut told = annotations(&whole);
            told.insert("io.kubernetes.cri.container-type".to_owned(), "container".to_owned());
            told.insert(missing.0.to_owned(), String::new());
            assert!(pod_of(&told).unwrap_err().contains(missing.0), "{missing:?}");
        }
        let cri_o = |labels: &str| {
            pod_of(&annotations(&[
                ("io.kubernetes.cri-o.ContainerType", "container"),
                ("io.kubernetes.cri-o.Labels", labels),
            ]))
        };
        assert!(cri_o("{").unwrap_err().contains("io.kubernetes.cri-o.Labels"));
        assert!(cri_o("{}").unwrap_err().contains("io.kubernetes.container.name"));
    }

    #[test]
    fn a_container_is_announced_with_its_root_and_its_command() {
        let bundle = tempfile::tempdir().unwrap();
        let config = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"args": ["agent", "--flag"], "env": ["PATH=/first", "PATH=/bin"]},
        });
        fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
        let state = |pid| State {
            id: "c".to_owned(),
            pid,
            bundle: bundle.path().to_owned(),
            annotations: BTreeMap::new(),
        };
        let told = announcement(state(7), Some(expected())).unwrap();
        assert_eq!((told.id.as_str(), told.pid, told.name.as_str()), ("c", 7, "agent"));
        assert_eq!(told.root, bundle.path().join("rootfs"));
        assert_eq!(told.command.as_deref(), Some("agent"));
        assert_eq!(told.search_path.as_deref(), Some("/bin"));
        assert_eq!(told.sandbox.as_deref(), Some("s"));
        let sandbox = OfPod { is_sandbox: true, sandbox: None, ..expected() };
        assert_eq!(announcement(state(7), Some(sandbox)).unwrap().sandbox.as_deref(), Some("c"));
        assert!(announcement(state(0), Some(expected())).unwrap_err().contains("createRuntime"));
        let stray = OfPod { sandbox: None, ..expected() };
        assert!(announcement(state(7), Some(stray)).unwrap_err().contains("sandbox"));
    }

    #[test]
    fn what_was_put_on_a_node_is_removed_and_what_can_not_be_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agentguard.json");
        put(&path, &b"{}"[..], 0o644).unwrap();
        remove(&path).unwrap();
        assert!(!path.exists());
        remove(&path).unwrap();
        let failure = remove(directory.path()).unwrap_err();
        assert!(
            failure.error.contains(&directory.path().display().to_string()),
            "{}",
            failure.error
        );
        assert!(directory.path().is_dir());
    }

    #[test]
    fn the_hook_is_added_once_and_leaves_others() {
        let hook = |timeout: u64| json!({"path": "/a", "args": ["agentguard", "oci-hook"], "timeout": timeout});
        let other = json!({"path": "/other", "args": ["other", "x"]});
        let spec = json!({"process": {}, "hooks": {"createRuntime": [other]}});
        let once = add(spec, hook(1)).unwrap();
        let twice = add(once, hook(2)).unwrap();
        assert_eq!(twice["hooks"]["createRuntime"], json!([other, hook(2)]));
        let added = add(json!({"process": {}}), hook(1)).unwrap();
        assert_eq!(added["hooks"]["createRuntime"], json!([hook(1)]));
        let limited = |limits: Value| {
            let spec = json!({"process": {"rlimits": limits, "cwd": "/"}});
            add(spec, hook(1)).unwrap()["process"].clone()
        };
        assert_eq!(limited(default_limits()), json!({"cwd": "/"}));
        let own = json!([{"type": "RLIMIT_NOFILE", "hard": 4096, "soft": 4096}]);
        assert_eq!(limited(own.clone())["rlimits"], own);
        assert!(add(json!([]), hook(1)).is_err());
        assert!(add(json!({"process": {}, "hooks": []}), hook(1)).is_err());
    }
}
