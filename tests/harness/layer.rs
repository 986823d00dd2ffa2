//! What a test needs of the kernel.

use std::{env, fs, path::Path};

use crate::{
    cgroup,
    promise::{Promise, VARIABLE},
};

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
/// When the layer is missing, or when this row of the matrix does not promise it: then the runner
/// was to leave the test out, and could not tell from its name.
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
        Layer::Portable => is_promised(Promise::Portable),
        Layer::Lsm => {
            is_promised(Promise::Lsm);
            let active = fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
            assert!(
                active.trim().split(',').any(|name| name == "bpf"),
                "the BPF LSM is not active ({active:?}); boot with lsm=…,bpf"
            );
        }
    }
}

/// Whether this is promised here. Whoever runs a test by hand promises everything.
///
/// # Panics
///
/// When the runner names a promise that is unknown.
#[track_caller]
#[must_use]
pub fn is_to_give(promise: Promise) -> bool {
    let Ok(promises) = env::var(VARIABLE) else { return true };
    let promises = Promise::list(&promises)
        .unwrap_or_else(|| panic!("{VARIABLE}={promises:?} names a promise that is unknown"));
    promises.contains(&promise)
}

#[track_caller]
pub(crate) fn is_promised(needed: Promise) {
    assert!(
        is_to_give(needed),
        "this row does not promise {needed:?}, and the test's name does not say that it needs it: \
         put it into a module `{}`",
        needed.as_str()
    );
}
