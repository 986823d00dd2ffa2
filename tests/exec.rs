//! The ways out by running what is not granted: rows E1, E2, E4, E5, E7 and E8 of the threat model.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use agentguard_tests::{
    Attack, BASE_SCOPE, Facility, Guard, Mode, Outcome, Programs, WayOut, World, attack_binary,
    ways_out,
};
use serde_json::json;

fn exec(name: &str, how: &str, world: &World) -> WayOut {
    WayOut::exec(Attack::new(name).option("how", how), &world.programs())
}

ways_out! {
    /// E1
    absolute_path: |world| exec("e1-paths", "absolute", world);
    relative_path: |world| exec("e1-paths", "relative", world);
    path_through_dot_dot: |world| exec("e1-paths", "dot-dot", world);
    path_through_proc_self_root: |world| exec("e1-paths", "proc-root", world);
    path_through_proc_self_cwd: |world| exec("e1-paths", "proc-cwd", world);
    copy_of_the_granted_program: |world| exec("e1-paths", "proc-exe-copy", world);
    path_through_dev_fd: |world| exec("e1-paths", "dev-fd", world);
    execveat_relative_to_a_directory: |world| exec("e1-paths", "execveat", world);
    execveat_of_a_descriptor: |world| exec("e1-paths", "execveat-empty-path", world);
    symlink: |world| exec("e1-paths", "symlink", world);
    view_of_a_chroot: |world| exec("e1-paths", "chroot", world);
    view_of_a_pivot_root: |world| exec("e1-paths", "pivot-root", world);
}

/// E2
fn alias(how: &str, world: &World) -> WayOut {
    let programs = world.programs();
    let attack = Attack::new("e2-aliases").option("how", how).option("granted", programs.granted());
    WayOut::exec(attack, &programs)
}

ways_out! {
    /// E2
    hard_link: |world| alias("hard-link", world);
    bind_mount_over_a_granted_path: |world| alias("bind-mount", world);
    rename_over_a_granted_path: |world| alias("rename", world);
    overlay_copy_of_a_granted_path: |world| alias("overlay-copy-up", world);
    second_mount_of_the_file_system: |world| alias("second-mount", world);
}

ways_out! {
    /// E4
    memfd: |world| exec("e4-unnamed", "memfd", world);
    deleted_file: |world| exec("e4-unnamed", "deleted", world);
    file_that_never_had_a_name: |world| exec("e4-unnamed", "tmpfile", world);
    file_on_a_tmpfs_of_the_workload: |world| exec("e4-unnamed", "tmpfs", world);
    file_that_the_workload_wrote: |world| exec("e4-unnamed", "written", world);
}

/// Writes a script: what interprets it, and a mark at its end.
fn script(world: &World, name: &str, interpreter: &str, mark: &str) -> PathBuf {
    let path = world.directory().join(name);
    fs::write(&path, format!("#!{interpreter}\n{mark:#^64}")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// E5: `forbidden` is the file that is not granted, `granted` are those that are.
fn interpreted(how: &str, programs: &Programs, forbidden: PathBuf, granted: &[PathBuf]) -> WayOut {
    let mut way_out = WayOut::exec(Attack::new("e5-scripts").option("how", how), programs);
    // The last of an option counts.
    way_out.attack = Attack::new("e5-scripts")
        .option("how", how)
        .option("program", forbidden)
        .option("token", programs.token())
        .option("scratch", programs.scratch());
    if let Some(first) = granted.first() {
        way_out.attack = way_out.attack.option("granted", first);
        let exec: Vec<_> = granted.iter().map(|path| json!({"path": path})).collect();
        way_out = way_out.granted("test:scripts", json!({"exec": exec}));
    }
    way_out
}

/// What `status` says where a script's own file is not looked at.
const OPEN: &str = "(E5)";

/// E5: a script that is not granted, for an interpreter that is.
fn ungranted_script(how: &str, world: &World) -> WayOut {
    let programs = world.programs();
    let interpreter = format!("{} interpret", programs.granted().display());
    let script = script(world, "script", &interpreter, "script");
    interpreted(how, &programs, script, &[]).or_gap(OPEN)
}

/// E5: a granted script for an interpreter that is not.
fn ungranted_interpreter(world: &World) -> WayOut {
    let programs = world.programs();
    let interpreter = format!("{} interpret-as", programs.forbidden().display());
    let script = script(world, "script", &interpreter, "script");
    interpreted("interpreter", &programs, programs.forbidden(), &[script])
}

/// E5: a script that is interpreted by scripts, `depth` of them; the one at `forbidden` (from the
/// outermost, 0) is not granted.
fn nested_scripts(depth: usize, forbidden: usize, world: &World) -> WayOut {
    let programs = world.programs();
    let mut interpreter = format!("{} interpret", programs.granted().display());
    let mut scripts = Vec::new();
    for number in (0..depth).rev() {
        let path = script(world, &format!("script-{number}"), &interpreter, "nested");
        interpreter = path.display().to_string();
        scripts.insert(0, path);
    }
    let outermost = scripts[0].clone();
    let outer = scripts.remove(forbidden);
    // What runs in the end reads the mark of the innermost, which is the mark of all.
    let mut way_out = interpreted("interpreter", &programs, outer, &scripts);
    way_out.attack = way_out.attack.option("start", outermost);
    way_out.or_gap(OPEN)
}

const FORMATS: Facility = Facility::OwnFormats;

ways_out! {
    /// E5
    script_that_is_not_granted: |world| ungranted_script("script", world);
    script_by_a_descriptor: |world| ungranted_script("descriptor", world);
    script_without_a_name: |world| ungranted_script("memfd", world);
    interpreter_that_is_not_granted: |world| ungranted_interpreter(world);
    outer_script_that_is_not_granted: |world| nested_scripts(3, 0, world);
    script_as_an_interpreter_that_is_not_granted: |world| nested_scripts(3, 1, world);
    innermost_script_that_is_not_granted: |world| nested_scripts(3, 2, world);
    registered_interpreter_that_is_not_granted needs [FORMATS]: |world| {
        let programs = world.programs();
        interpreted("registered", &programs, programs.forbidden(), &[])
    };
    registered_interpreter_that_is_open_already needs [FORMATS]: |world| {
        let programs = world.programs();
        interpreted("registered-open", &programs, programs.forbidden(), &[])
    };
    file_for_a_registered_interpreter needs [FORMATS]: |world| {
        let programs = world.programs();
        let file = world.directory().join("kind");
        fs::write(&file, format!("AGT\n{:#^64}", "file")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        interpreted("registered-script", &programs, file, &[programs.granted()]).or_gap(OPEN)
    };
}

ways_out! {
    /// E7
    thread_that_is_not_the_first: |world| exec("e7-storm", "thread", world);
    threads_at_once: |world| exec("e7-storm", "threads", world);
    storm_of_vfork: |world| exec("e7-storm", "vfork", world);
    storm_of_vfork_from_many_threads: |world| exec("e7-storm", "vfork-threads", world);
    storm_of_clone: |world| exec("e7-storm", "clone", world);
}

ways_out! {
    /// E8
    set_user_id: |world| exec("e8-privilege", "set-user-id", world);
    set_group_id: |world| exec("e8-privilege", "set-group-id", world);
    file_capabilities: |world| exec("e8-privilege", "capabilities", world);
    no_new_privileges: |world| exec("e8-privilege", "no-new-privileges", world);
    no_new_privileges_with_set_user_id:
        |world| exec("e8-privilege", "no-new-privileges-set-user-id", world);
}

/// E1: where the kernel asks before the old program is gone, a refused exec is an error to whoever
/// tried; where not, it is its end.
#[test]
fn a_refused_exec_is_an_error_where_the_kernel_asks_first_and_the_end_where_not() {
    agentguard_tests::requires(agentguard_tests::Layer::Portable);
    let world = World::new();
    let mut way_out = exec("e1-paths", "absolute", &world);
    let guard = Guard::start(&world, &[attack_binary()]);
    let asks_first = !guard.status()["gaps"].to_string().contains(OPEN);
    let identity = "spiffe://agentguard.test/exec";
    let report =
        way_out.attack.run_as_workload(&world, &guard, identity, &[BASE_SCOPE], Mode::Enforce);
    assert_eq!(report.outcome, Outcome::Refused, "{report:?}");
    if asks_first {
        assert_eq!(report.errno, Some(libc::EPERM), "{report:?}");
    } else {
        assert_eq!(report.errno, None, "{report:?}");
        assert!(report.detail.contains("SIGKILL"), "{report:?}");
    }
    let denied: Vec<_> = guard
        .audit_records()
        .into_iter()
        .filter(|record| record["verdict"] == "deny" && record["request"]["action"] == "exec")
        .collect();
    assert_eq!(denied.len(), 1, "one request is one record: {denied:#?}");
}
