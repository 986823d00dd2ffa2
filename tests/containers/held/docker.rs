//! Containers of a Docker Engine as workloads. It has no pods, and nothing of it waits for the daemon.

use std::path::Path;

use agentguard_agent::Ask;
use agentguard_tests::{
    Docker, Guard,
    containerd::{PROGRAM, TOOL},
    wait_until,
};
use serde_json::json;

use super::{
    AGENT, BASE, MODE, asks, assert_free, assert_held, gaps, grant, identity, is_held,
    volume_with_tool, workload,
};
use crate::containers::API_PORT;

fn guard(docker: &Docker) -> Guard {
    let containers = json!({
        "docker": docker.socket(),
        "nri": "off",
        "identity": super::BY_LABEL,
    });
    let configuration = json!({"mode": "enforce", "containers": containers});
    Guard::start_with(docker.world(), &[], &configuration)
}

#[test]
fn containers_are_held_by_their_labels_and_others_are_not() {
    let docker = Docker::started();
    let guard = guard(&docker);
    grant(&guard, "researcher", "researcher", BASE);

    docker.container("agent-0").label(AGENT, "true").label("app", "researcher").start();
    let workload = is_held(&guard, "agent-0");
    assert_eq!(workload["identity"], identity("researcher"));
    assert_eq!(workload["source"], "container");
    assert_eq!(workload["mode"], "enforce");
    wait_until("its own command may run again", || {
        docker.exec("agent-0", &[PROGRAM, "end"]).status.success()
    });
    assert_held(&docker.exec_attempts("agent-0", 20, &asks()), "the agent");
    assert!(!docker.exec("agent-0", &[TOOL, "end"]).status.success(), "docker exec");
    guard.recorded("a denial with the container's name", |record| {
        let workload = &record["workload"];
        record["kind"] == "verdict"
            && record["verdict"] == "deny"
            && workload["name"] == "agent-0"
            && workload["identity"] == identity("researcher")
    });

    docker.container("ordinary").label("app", "researcher").start();
    let plan = docker.container("audited").label(AGENT, "true").label("app", "researcher");
    plan.label(MODE, "audit").start();
    assert_eq!(is_held(&guard, "audited")["mode"], "audit");
    for (name, whose) in [("ordinary", "another container"), ("audited", "one in audit mode")] {
        assert_free(&docker.exec_attempts(name, 5, &asks()), whose);
    }
    assert!(self::workload(&guard, "ordinary").is_none());
}

#[test]
fn executables_are_granted_in_the_containers_own_mounts() {
    let docker = Docker::started();
    let guard = guard(&docker);
    guard.define("test:tool", &json!({"exec": [{"path": TOOL}]}));
    guard.define("test:data", &json!({"exec": [{"path": "/data/tool"}, {"path": "/fixed/tool"}]}));
    let volume = volume_with_tool(&docker.world().directory().join("volume"));
    let fixed = volume_with_tool(&docker.world().directory().join("fixed"));
    let read_only = Path::new("/fixed:ro").display().to_string();
    let plan = docker.container("coder").label(AGENT, "true").label("app", "coder");
    plan.volume(&volume, "/data").volume(&fixed, &read_only).start();
    is_held(&guard, "coder");

    let runs = |path: &str| docker.exec("coder", &[path, "end"]).status.success();
    assert!(!runs(TOOL), "what no scope grants");
    grant(&guard, "tool", "coder", "test:tool");
    grant(&guard, "data", "coder", "test:data");
    wait_until("the tool may run", || runs(TOOL));
    wait_until("a file on a volume that is read only may run", || runs("/fixed/tool"));
    assert!(!runs("/data/tool"), "a file on a volume that can be written to");
    guard.revoke("tool");
    wait_until("the tool may not run any more", || !runs(TOOL));
}

#[test]
fn containers_stay_held_while_daemon_and_engine_restart_and_end_with_their_cgroup() {
    let mut docker = Docker::started();
    let mut guard = guard(&docker);
    grant(&guard, "base", "steady", BASE);
    // It asks by itself whenever it starts, with nobody to hold it before.
    let plan = docker.container("steady").label(AGENT, "true").label("app", "steady");
    plan.start();
    is_held(&guard, "steady");
    assert_held(&docker.exec_attempts("steady", 20, &asks()), "before");
    guard.kill();
    assert_held(&docker.exec_attempts("steady", 20, &asks()), "while the daemon is dead");
    guard.restart();
    assert_held(&docker.exec_attempts("steady", 20, &asks()), "after the daemon's restart");

    docker.stop();
    // Neither listed nor forgotten: the engine has not spoken.
    wait_until("status says that the engine does not answer", || {
        gaps(&guard).iter().any(|gap| gap.contains("docker.sock"))
    });
    assert!(workload(&guard, "steady").is_some());
    docker.start();
    assert_held(&docker.exec_attempts("steady", 20, &asks()), "after the engine's restart");
    wait_until("the engine answers again", || {
        !gaps(&guard).iter().any(|gap| gap.contains("docker.sock"))
    });

    // Another process, and mostly another cgroup of the same name.
    docker.command(["restart", "--time=0", "steady"]).expect_success("docker restart");
    wait_until("the container is held once more", || {
        let report = docker.exec("steady", &[TOOL, "end"]);
        !report.status.success() && workload(&guard, "steady").is_some()
    });
    wait_until("its own command may run again", || {
        docker.exec("steady", &[PROGRAM, "end"]).status.success()
    });
    assert_held(&docker.exec_attempts("steady", 20, &asks()), "after the container's restart");
    let only = [Ask::Tcp(API_PORT)];
    let report = docker.exec_attempts("steady", 20, &only);
    assert_eq!(report.tallies[0].allowed, 20, "{report:?}");

    docker.command(["rm", "--force", "steady"]).expect_success("docker rm");
    wait_until("the workload is gone", || workload(&guard, "steady").is_none());
}
