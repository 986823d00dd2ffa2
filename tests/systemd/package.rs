//! The Debian package: what installing, upgrading, removing and purging it does, and what it does not.
//!
//! `dpkg` has the machine's own database before it, and programs that can be written to: both lie over
//! the host's, whose files are seen and never changed.

use std::env;

use super::*;

/// What the package puts where; the unit of the package runs this.
const INSTALLED: &str = "/usr/bin/agentguard";
const CONFIGURATION: &str = "/etc/agentguard/agentguard.yaml";
const STATE: &str = "/var/lib/agentguard";
const AUDIT_LOG: &str = "/var/log/agentguard";
/// By which systemd knows that the service starts with the machine.
const ENABLED: &str = "/etc/systemd/system/multi-user.target.wants/agentguard.service";

/// The package, and the one of the version after it.
#[track_caller]
fn packages() -> [String; 2] {
    ["AGENTGUARD_DEB", "AGENTGUARD_NEXT_DEB"].map(|name| {
        env::var(name).unwrap_or_else(|_none| {
            panic!("{name} names no package; `cargo xtask deb --verify` makes them")
        })
    })
}

/// Has `/usr` and dpkg's database written to, in memory.
#[track_caller]
fn prepare() {
    if Path::new("/run/over").exists() {
        return;
    }
    let script = "set -e\n\
        mkdir -p /run/over/usr /run/over/usr-work /run/over/dpkg /run/over/dpkg-work /run/host\n\
        mount -t virtiofs -o ro host /run/host\n\
        mkdir -p /var/lib/dpkg\n\
        over() { mount -t overlay -o \"lowerdir=$1,upperdir=/run/over/$2,workdir=/run/over/$2-work\" \
        overlay \"$3\"; }\n\
        over /usr usr /usr\n\
        over /run/host/var/lib/dpkg dpkg /var/lib/dpkg\n";
    let mut shell = Command::new("sh");
    run(shell.args(["-c", script]), PATIENCE).expect_success("what lies over the host's files");
}

#[track_caller]
fn dpkg(arguments: &[&str]) -> String {
    let mut dpkg = Command::new("dpkg");
    dpkg.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    let said = run(&mut dpkg, PATIENCE).expect_success(&format!("dpkg {arguments:?}"));
    format!("{}{}", said.stdout, said.stderr)
}

#[track_caller]
fn installed_version() -> String {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat", "${db:Status-Status} ${Version}", "agentguard"]);
    run(&mut query, PATIENCE).stdout
}

#[track_caller]
fn agentguard(arguments: &[&str]) -> String {
    let mut command = Command::new(INSTALLED);
    run(command.args(arguments), PATIENCE).expect_success(&arguments.join(" ")).stdout
}

/// Whether the unit is enabled, as systemd says it.
fn enablement() -> String {
    let mut is_enabled = Command::new("systemctl");
    run(is_enabled.args(["is-enabled", SERVICE]), PATIENCE).stdout.trim().to_owned()
}

/// All of it, in the order in which a machine meets it: what one step leaves, the next one finds.
#[test]
fn a_package_is_installed_upgraded_and_removed_and_what_is_in_force_stays() {
    let [package, next] = packages();
    prepare();

    // Installed: everything is there, and nothing runs or is enforced.
    let said = dpkg(&["--install", &package]);
    assert!(said.contains("systemctl enable --now agentguard"), "what is to be done next: {said}");
    let first_version = installed_version();
    assert!(first_version.starts_with("installed "), "{first_version}");
    assert_eq!(run(Command::new("dpkg").args(["--verify", "agentguard"]), PATIENCE).stdout, "");
    assert_eq!(enablement(), "disabled");
    assert_eq!(property(SERVICE, "ActiveState"), "inactive");
    assert_eq!(property(SERVICE, "FragmentPath"), "/usr/lib/systemd/system/agentguard.service");
    assert!(Path::new("/etc/agentguard/manifests").is_dir());
    assert!(!Path::new("/sys/fs/bpf/agentguard").exists(), "something was put in force");
    let found: Value = serde_json::from_str(&agentguard(&["doctor", "--output", "json"])).unwrap();
    assert_ne!(found["protection"]["level"], "none", "{found:#}");
    assert!(!Path::new("/sys/fs/bpf/agentguard").exists(), "looking put something in force");

    // Enabled, as the package says. The unit is the package's own: no other is in its place.
    let installed = Installed::with_nothing_started();
    systemctl(&["daemon-reload"]);
    assert!(!Path::new(&format!("{UNITS}/{SERVICE}")).exists());
    systemctl(&["enable", "--now", SERVICE]);
    assert_eq!(enablement(), "enabled");
    assert_eq!(property(SERVICE, "ActiveState"), "active");
    installed.first_round();
    let settled = rounds().len() + 5;
    rounds_after(settled, 1);
    let agent = property(AGENT, "MainPID");

    // Upgraded while the agent asks on: another daemon, what the administrator wrote, no window.
    let configured = fs::read_to_string(CONFIGURATION).unwrap() + "\n# of this machine\n";
    fs::write(CONFIGURATION, &configured).unwrap();
    let old = daemon();
    dpkg(&["--install", &next]);
    assert_ne!(installed_version(), first_version);
    assert!(installed_version().starts_with("installed "));
    let new = daemon();
    assert!(new != old && property(SERVICE, "ActiveState") == "active", "{old} {new}");
    assert_eq!(fs::read_link(format!("/proc/{new}/exe")).unwrap(), Path::new(INSTALLED));
    assert_eq!(fs::read_to_string(CONFIGURATION).unwrap(), configured);
    assert_eq!(enablement(), "enabled");
    // The same again, as `apt-get install --reinstall` does.
    dpkg(&["--install", &next]);
    assert_ne!(daemon(), new, "the daemon is not the one that was installed last");
    rounds_after(rounds().len(), 5);

    // Removed: the daemon ends and what is in force stays, as the package says.
    let said = dpkg(&["--remove", "agentguard"]);
    assert!(said.contains("what is in force stays in force"), "{said}");
    assert!(!Path::new(INSTALLED).exists());
    assert_eq!(property(SERVICE, "ActiveState"), "inactive");
    assert!(Path::new(CONFIGURATION).exists() && Path::new(STATE).exists());
    rounds_after(rounds().len(), 5);

    // Purged: its configuration and state go; what an administrator wrote, and the evidence, do not.
    dpkg(&["--purge", "agentguard"]);
    for gone in [CONFIGURATION, STATE] {
        assert!(!Path::new(gone).exists(), "{gone} is left");
    }
    assert!(fs::symlink_metadata(ENABLED).is_err(), "it is enabled, and there is nothing to start");
    assert!(Path::new("/etc/agentguard/manifests/grant.yaml").exists());
    assert!(fs::read_dir(AUDIT_LOG).unwrap().next().is_some());
    assert_held_since(settled);
    assert_eq!(property(AGENT, "MainPID"), agent, "the agent was started anew");

    // Ended, as what removal said: installed again, and told to.
    dpkg(&["--install", &package]);
    assert_eq!(enablement(), "disabled");
    assert_eq!(property(SERVICE, "ActiveState"), "inactive");
    agentguard(&["uninstall"]);
    assert!(!Path::new("/sys/fs/bpf/agentguard").exists());
    let released = rounds().len();
    let after = rounds_after(released + 1, 5);
    assert!(after.iter().all(|round| round == "open open"), "{after:?}");
    drop(installed);
}
