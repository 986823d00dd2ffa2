//! What the running kernel is like: where its structures keep their fields, which functions it
//! lends to BPF programs.
//!
//! Everything is read from the kernel's BTF; nothing is concluded from a version number.

use std::{fs, io};

use agentguard_common::abi::KernelOffsets;
use aya::Btf;

use super::btf::Types;

/// Where the kernel describes its own types.
pub(super) const BTF: &str = "/sys/kernel/btf/vmlinux";

/// The kernel's description of itself does not hold what the datapath needs.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("{BTF} can not be read ({source}); boot a kernel built with CONFIG_DEBUG_INFO_BTF=y")]
    NoBtf { source: io::Error },
    #[error("{BTF} is not understood; this kernel is too different to be guarded")]
    Format,
    #[error("the kernel's BTF has no field {path}; this kernel is too different to be guarded")]
    NoField { path: String },
}

/// The kernel's own types.
pub struct Kernel {
    bytes: Vec<u8>,
}

impl Kernel {
    /// Reads the running kernel's BTF.
    ///
    /// # Errors
    ///
    /// When the kernel has none.
    pub fn running() -> Result<Self, KernelError> {
        let bytes = fs::read(BTF).map_err(|source| KernelError::NoBtf { source })?;
        Ok(Self { bytes })
    }

    /// The types as the loader wants them.
    ///
    /// # Errors
    ///
    /// When the loader does not understand them.
    pub(super) fn for_loader(&self) -> Result<Btf, KernelError> {
        Btf::parse(&self.bytes, Default::default()).map_err(|_error| KernelError::Format)
    }

    /// Its types and functions, by name.
    ///
    /// # Errors
    ///
    /// When they are not understood.
    pub(super) fn types(&self) -> Result<Types<'_>, KernelError> {
        Types::parse(&self.bytes).ok_or(KernelError::Format)
    }
}

impl Types<'_> {
    /// Where the fields are that the kernel programs read.
    ///
    /// # Errors
    ///
    /// Names the first field that this kernel does not have.
    pub(super) fn offsets(&self) -> Result<KernelOffsets, KernelError> {
        let at = |structure: &str, fields: &[&str]| offset(self, structure, fields);
        Ok(KernelOffsets {
            bprm_file: at("linux_binprm", &["file"])?,
            bprm_filename: at("linux_binprm", &["filename"])?,
            bprm_interpreter: at("linux_binprm", &["interp"])?,
            file_inode: at("file", &["f_inode"])?,
            inode_number: at("inode", &["i_ino"])?,
            inode_super_block: at("inode", &["i_sb"])?,
            inode_links: at("inode", &["i_nlink"])?,
            inode_generation: at("inode", &["i_generation"])?,
            super_block_device: at("super_block", &["s_dev"])?,
            task_pid: at("task_struct", &["pid"])?,
            task_thread_pid: at("task_struct", &["thread_pid"])?,
            task_tgid: at("task_struct", &["tgid"])?,
            // Renamed in 5.5.
            task_start_boottime: at("task_struct", &["start_boottime"])
                .or_else(|_renamed| at("task_struct", &["real_start_time"]))?,
            task_real_parent: at("task_struct", &["real_parent"])?,
            task_mm: at("task_struct", &["mm"])?,
            mm_exe_file: at("mm_struct", &["exe_file"])?,
            task_group_leader: at("task_struct", &["group_leader"])?,
            task_cgroups: at("task_struct", &["cgroups"])?,
            css_set_default_cgroup: at("css_set", &["dfl_cgrp"])?,
            cgroup_kernfs_node: at("cgroup", &["kn"])?,
            cgroup_parent: at("cgroup", &["self", "parent"])?,
            css_cgroup: at("cgroup_subsys_state", &["cgroup"])?,
            cgroup_root: at("cgroup", &["root"])?,
            cgroup_root_hierarchy: at("cgroup_root", &["hierarchy_id"])?,
            kernfs_node_id: at("kernfs_node", &["id"])?,
            sock_family: at("sock", &["__sk_common", "skc_family"])?,
            sock_type: at("sock", &["sk_type"])?,
            sock_state: at("sock", &["__sk_common", "skc_state"])?,
            sock_protocol: at("sock", &["sk_protocol"])?,
            sock_num: at("sock", &["__sk_common", "skc_num"])?,
            sock_dport: at("sock", &["__sk_common", "skc_dport"])?,
            sock_daddr: at("sock", &["__sk_common", "skc_daddr"])?,
            sock_v6_daddr: at("sock", &["__sk_common", "skc_v6_daddr"])?,
            sock_cgroup: at("sock", &["sk_cgrp_data"])?,
            socket_sk: at("socket", &["sk"])?,
            msghdr_name: at("msghdr", &["msg_name"])?,
            msghdr_namelen: at("msghdr", &["msg_namelen"])?,
            unix_address: at("unix_sock", &["addr"])?,
            unix_dentry: at("unix_sock", &["path", "dentry"])?,
            unix_peer: at("unix_sock", &["peer"])?,
            file_private_data: at("file", &["private_data"])?,
            inode_mode: at("inode", &["i_mode"])?,
            unix_address_length: at("unix_address", &["len"])?,
            unix_address_name: at("unix_address", &["name"])?,
            dentry_inode: at("dentry", &["d_inode"])?,
            dentry_parent: at("dentry", &["d_parent"])?,
            dentry_name: at("dentry", &["d_name", "name"])?,
            dentry_name_length: at("dentry", &["d_name", "len"])?,
        })
    }
}

fn offset(types: &Types<'_>, structure: &str, fields: &[&str]) -> Result<u32, KernelError> {
    types
        .offset(structure, fields)
        .ok_or_else(|| KernelError::NoField { path: format!("{structure}.{}", fields.join(".")) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_has_every_field_the_programs_read() {
        let kernel = Kernel::running().unwrap();
        let offsets = kernel.types().unwrap().offsets().unwrap();
        assert_ne!(offsets.inode_number, offsets.inode_super_block);
        assert_ne!(offsets.task_pid, offsets.task_tgid);
    }

    #[test]
    fn an_unknown_field_is_named() {
        let kernel = Kernel::running().unwrap();
        let error = offset(&kernel.types().unwrap(), "inode", &["i_wish"]).unwrap_err();
        assert!(error.to_string().contains("inode.i_wish"), "{error}");
    }

    #[test]
    fn functions_are_found_by_name() {
        let kernel = Kernel::running().unwrap();
        let types = kernel.types().unwrap();
        assert!(types.function("vfs_read").is_some());
        assert_eq!(types.function("no_such_function_in_any_kernel"), None);
    }
}
