//! What a test needs of the kernel.

use std::{fs, path::Path};

use crate::cgroup;

/// A layer of hooks, as the threat model names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// The hooks of every supported kernel.
    Portable,
    /// Those that need the BPF LSM as well.
    Lsm,
}

/// Fails the test where `layer` is missing: a test that cannot run must not look green.
///
/// # Panics
///
/// When the layer is missing.
#[track_caller]
pub fn requires(layer: Layer) {
    assert!(nix::unistd::geteuid().is_root(), "the kernel tests need root");
    let root = cgroup::root();
    assert!(root.is_dir(), "{} is missing; mount cgroup v2", root.display());
    assert!(
        Path::new("/sys/kernel/btf/vmlinux").exists(),
        "the kernel has no BTF; it needs CONFIG_DEBUG_INFO_BTF=y"
    );
    match layer {
        Layer::Portable => {}
        Layer::Lsm => {
            let active = fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
            assert!(
                active.trim().split(',').any(|name| name == "bpf"),
                "the BPF LSM is not active ({active:?}); boot with lsm=…,bpf"
            );
        }
    }
}
