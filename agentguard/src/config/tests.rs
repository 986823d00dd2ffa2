use super::*;

const PATH: &str = "/etc/agentguard/agentguard.yaml";

fn parse(text: &str) -> Result<Configuration, ConfigurationError> {
    Configuration::parse(Path::new(PATH), text)
}

fn refused(text: &str) -> String {
    parse(text).expect_err(text).to_string()
}

#[test]
fn a_file_that_says_nothing_asks_for_the_defaults() {
    for text in ["", "\n", "# nothing\n", "---\n", "{}\n"] {
        assert_eq!(parse(text).unwrap(), Configuration::default(), "{text:?}");
    }
}

#[test]
fn the_default_file_says_what_holds_without_one_and_explains_every_key() {
    let file = default_file();
    assert_eq!(parse(&file).unwrap(), Configuration::default(), "{file}");
    let lines: Vec<&str> = file.lines().collect();
    for (above, line) in lines.iter().zip(&lines[1..]) {
        let text = line.trim_start();
        let key = !text.is_empty() && !text.starts_with('#') && !text.starts_with("- ");
        assert!(!key || above.trim_start().starts_with('#'), "no comment above `{line}`");
        assert!(line.chars().count() <= 100, "{line}");
    }
    assert!(file.contains("\n  listen: \"127.0.0.1:9469\"\n"), "{file}");
    assert!(file.find("trust_domain:") < file.find("datapath:"), "keys keep their order");
}

#[test]
fn every_key_can_be_set() {
    let text = r#"
node: edge-7
trust_domain: agents.example.org
mode: enforce
require: full
cgroup_root: /sys/fs/cgroup/unified
cgroup_parent: agents/exec
pin_directory: /sys/fs/bpf/other
state_directory: /srv/agentguard
runtime_directory: /run/other
manifests_directory: /srv/manifests
kubernetes: {access: in-cluster, events: false, max_kind_bytes: 1048576}
api: {socket: /run/other/api.sock}
containers:
  runtimes: [/run/containerd/containerd.sock]
  docker: /run/docker.sock
  nri: /run/other/nri.sock
  runtime_programs: [/opt/bin/runc]
  identity: spiffe://{trust_domain}/ns/{namespace}/pod/{pod}
  agent_selectors: [{app: agent}, {tier: ai, team: research}]
  exempt_namespaces: [kube-system]
  sandboxed_handlers: [runsc]
metrics: {listen: off, max_identities: 3}
audit: {output: stdout, max_file_bytes: 1048576, max_files: 2}
log: {level: debug, format: json}
datapath:
  denied_ring_bytes: 4096
  events_ring_bytes: 8192
  aggregation_window: 500ms
  maps:
    {workloads: 1, cgroups: 2, destinations: 3, rules: 4, executables: 5, verdict_cache: 6,
    unix_sockets: 7, unix_names: 8, tasks: 9}
"#;
    let configuration = parse(text).unwrap();
    assert_eq!(configuration.metrics.listen, Listen::Off);
    assert_eq!(configuration.audit.options().output, audit::Output::Stdout);
    assert_eq!(configuration.datapath.maps.verdict_cache.get(), 6);
    assert_eq!(configuration.datapath.maps.tasks.get(), 9);
    assert_eq!(configuration.datapath.aggregation_window.get().as_millis(), 500);
    assert_eq!(configuration.node_name().unwrap().as_str(), "edge-7");
    assert_eq!(configuration.find_cgroup_root().unwrap(), Path::new("/sys/fs/cgroup/unified"));
    let parent = configuration.find_cgroup_parent().unwrap();
    assert_eq!(parent, Path::new("/sys/fs/cgroup/unified/agents/exec"));
    // What was set is what is said when it is written down again.
    let written = serde_json::to_value(&configuration).unwrap();
    let default = serde_json::to_value(Configuration::default()).unwrap();
    for (key, value) in written.as_object().unwrap() {
        assert_ne!(value, &default[key], "{key} is not set by this test");
    }
    assert_eq!(serde_json::from_value::<Configuration>(written).unwrap(), configuration);
}

#[test]
fn what_can_not_be_meant_is_refused_with_place_key_value_and_remedy() {
    for (text, place, parts) in [
        ("mode: audit\nmetric: {}\n", "2:1", vec!["unknown field `metric`", "expected one of"]),
        ("audit:\n  path: /x\n", "2:3", vec!["audit", "unknown field `path`", "max_files"]),
        ("mode: strict\n", "1:7", vec!["mode: ", "strict", "audit", "enforce"]),
        (
            "datapath:\n  denied_ring_bytes: 5000\n",
            "2:22",
            vec!["datapath.denied_ring_bytes: ", "`5000`", "power of two", "as 8192"],
        ),
        ("metrics:\n  listen: \"\"\n", "2:11", vec!["metrics.listen: ", "`off`"]),
        ("metrics:\n  listen: 9469\n", "2:11", vec!["metrics.listen: ", "`9469`", "ADDRESS:PORT"]),
        (
            "kubernetes: {access: cluster}\n",
            "1:22",
            vec!["kubernetes.access: ", "`cluster`", "`in-cluster`", "kubeconfig"],
        ),
        ("pin_directory: bpf\n", "1:16", vec!["pin_directory: ", "`bpf`", "begin it with `/`"]),
        ("cgroup_parent: /agents\n", "1:16", vec!["cgroup_parent: ", "`/agents`", "names"]),
        ("cgroup_parent: a/../b\n", "1:16", vec!["cgroup_parent: ", "`a/../b`"]),
        ("cgroup_parent: \"\"\n", "1:16", vec!["cgroup_parent: "]),
        ("trust_domain: Example.org\n", "1:15", vec!["trust_domain: ", "`Example.org`"]),
        ("datapath: {aggregation_window: 2h}\n", "1:32", vec!["`2h`", "1ms to 1h"]),
        ("datapath: {maps: {rules: 0}}\n", "1:26", vec!["datapath.maps.rules: ", "`0`"]),
        ("audit:\n  max_files: many\n", "2:14", vec!["audit.max_files: ", "`many`", "digits"]),
        ("audit:\n  max_files: -3\n", "2:14", vec!["audit.max_files: ", "`-3`", "digits"]),
        ("audit:\n  max_files: 2.5\n", "2:14", vec!["audit.max_files: ", "`2.5`"]),
        ("audit:\n  max_files: 5000000000\n", "2:14", vec!["`5000000000`", "too large"]),
        ("audit:\n  max_files: 1\n", "2:14", vec!["audit.max_files: ", "`1`", "2 to 10000"]),
        ("mode: audit\nmode: enforce\n", "2:1", vec!["mode: ", "twice"]),
        ("mode: [audit\n", "1:7", vec!["mode: "]),
        ("- a\n", "1:1", vec![]),
    ] {
        let message = refused(text);
        assert!(message.starts_with(&format!("{PATH}:{place}: ")), "{text:?}: {message}");
        for part in parts {
            assert!(message.contains(part), "{text:?}: {message} lacks {part}");
        }
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}

#[test]
fn flags_only_override() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agentguard.yaml");
    fs::write(&path, "mode: enforce\nlog: {level: warn}\n").unwrap();
    let overrides = Overrides {
        log_level: Some(logging::Level::Trace),
        audit_output: Some(AuditOutput::Stdout),
        ..Overrides::default()
    };
    let configuration = Configuration::load(Some(&path), &overrides).unwrap();
    assert_eq!(configuration.mode, DefaultMode::Enforce);
    assert_eq!(configuration.log.level, logging::Level::Trace);
    assert_eq!(configuration.audit.output, AuditOutput::Stdout);
    assert_eq!(configuration.metrics, Metrics::default());
}

#[test]
fn words_of_flags_are_those_of_the_file() {
    assert_eq!("enforce".parse(), Ok(DefaultMode::Enforce));
    assert_eq!("portable".parse(), Ok(Require::Portable));
    let error = "strict".parse::<DefaultMode>().unwrap_err().to_string();
    assert_eq!(error, "unknown variant `strict`, expected `audit` or `enforce`");
}

#[test]
fn a_named_file_must_be_there_and_the_default_one_need_not() {
    let missing = Path::new("/nonexistent/agentguard.yaml");
    let none = Overrides::default();
    let error = Configuration::load_or_default(Some(missing), missing, &none).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/agentguard.yaml"), "{error}");
    let configuration = Configuration::load_or_default(None, missing, &none).unwrap();
    assert_eq!(configuration, Configuration::default());
}

#[test]
fn the_cgroup_root_is_the_whole_hierarchy_with_the_shortest_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mountinfo");
    let line = |root: &str, point: &str, kind: &str| {
        format!("30 24 0:27 {root} {point} rw,nosuid - {kind} none rw\n")
    };
    fs::write(
        &path,
        [
            line("/", "/sys/fs/cgroup/memory", "cgroup"),
            line("/pod", "/c", "cgroup2"),
            line("/", "/var/lib/somewhere/cgroup", "cgroup2"),
            line("/", "/sys/fs/cgroup", "cgroup2"),
        ]
        .concat(),
    )
    .unwrap();
    assert_eq!(cgroup2_mount(&path).unwrap(), Path::new("/sys/fs/cgroup"));
    fs::write(&path, line("/", "/sys/fs/cgroup/memory", "cgroup")).unwrap();
    let error = cgroup2_mount(&path).unwrap_err().to_string();
    assert_eq!(error, "cgroup v2 is not mounted; mount it or set cgroup_root");
}

#[test]
fn an_alias_bomb_is_refused() {
    let mut text = String::from("a: &a0 [x]\n");
    for level in 1..40 {
        text.push_str(&format!("b{level}: &a{level} [*a{0}, *a{0}, *a{0}]\n", level - 1));
    }
    let began = std::time::Instant::now();
    refused(&text);
    assert!(began.elapsed().as_secs() < 5);
}
