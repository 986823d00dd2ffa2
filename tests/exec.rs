//! The ways out by running what is not granted: rows E1, E2 and E4 of the threat model.

use agentguard_tests::{Attack, WayOut, World, ways_out};

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
