//! What the running kernel is like: where its structures keep their fields, which functions it
//! lends to BPF programs.
//!
//! Everything is read from the kernel's BTF; nothing is concluded from a version number.

use std::path::Path;

use agentguard_common::abi::KernelOffsets;
use btf_rs::{Btf, Struct, Type};

/// Where the kernel describes its own types.
pub const BTF: &str = "/sys/kernel/btf/vmlinux";

/// The kernel's description of itself does not hold what the datapath needs.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("{BTF} can not be read ({source}); boot a kernel built with CONFIG_DEBUG_INFO_BTF=y")]
    NoBtf { source: anyhow::Error },
    #[error("the kernel's BTF has no field {path}; this kernel is too different to be guarded")]
    NoField { path: String },
}

/// The kernel's own types.
pub struct Kernel {
    btf: Btf,
}

impl Kernel {
    /// Reads the running kernel's BTF.
    ///
    /// # Errors
    ///
    /// When the kernel has none.
    pub fn running() -> Result<Self, KernelError> {
        let btf = Btf::from_file(Path::new(BTF)).map_err(|source| KernelError::NoBtf { source })?;
        Ok(Self { btf })
    }

    /// Where the fields are that the kernel programs read.
    ///
    /// # Errors
    ///
    /// Names the first field that this kernel does not have.
    pub fn offsets(&self) -> Result<KernelOffsets, KernelError> {
        let at = |structure: &str, fields: &[&str]| self.offset(structure, fields);
        Ok(KernelOffsets {
            bprm_file: at("linux_binprm", &["file"])?,
            bprm_filename: at("linux_binprm", &["filename"])?,
            file_inode: at("file", &["f_inode"])?,
            inode_number: at("inode", &["i_ino"])?,
            inode_super_block: at("inode", &["i_sb"])?,
            inode_links: at("inode", &["i_nlink"])?,
            inode_generation: at("inode", &["i_generation"])?,
            super_block_device: at("super_block", &["s_dev"])?,
            task_pid: at("task_struct", &["pid"])?,
            task_tgid: at("task_struct", &["tgid"])?,
            // Renamed in 5.5.
            task_start_boottime: at("task_struct", &["start_boottime"])
                .or_else(|_renamed| at("task_struct", &["real_start_time"]))?,
            task_real_parent: at("task_struct", &["real_parent"])?,
            task_cgroups: at("task_struct", &["cgroups"])?,
            css_set_default_cgroup: at("css_set", &["dfl_cgrp"])?,
            cgroup_kernfs_node: at("cgroup", &["kn"])?,
            cgroup_parent: at("cgroup", &["self", "parent"])?,
            css_cgroup: at("cgroup_subsys_state", &["cgroup"])?,
            cgroup_root: at("cgroup", &["root"])?,
            cgroup_root_hierarchy: at("cgroup_root", &["hierarchy_id"])?,
            kernfs_node_id: at("kernfs_node", &["id"])?,
        })
    }

    /// The BTF id of a function of the kernel, by which a BPF program can call it.
    #[must_use]
    pub fn function(&self, name: &str) -> Option<u32> {
        let ids = self.btf.resolve_ids_by_name(name).ok()?;
        ids.into_iter().find(|id| matches!(self.btf.resolve_type_by_id(*id), Ok(Type::Func(_))))
    }

    fn offset(&self, structure: &str, fields: &[&str]) -> Result<u32, KernelError> {
        let no_field =
            || KernelError::NoField { path: format!("{structure}.{}", fields.join(".")) };
        let types = self.btf.resolve_types_by_name(structure).map_err(|_unknown| no_field())?;
        let mut current = types
            .into_iter()
            .find_map(|found| match found {
                Type::Struct(found) => Some(found),
                _ => None,
            })
            .ok_or_else(no_field)?;
        let mut bits = 0;
        for (depth, field) in fields.iter().enumerate() {
            let (offset, inner) = self.find(&current, field).ok_or_else(no_field)?;
            bits += offset;
            if depth + 1 < fields.len() {
                current = inner.ok_or_else(no_field)?;
            }
        }
        Ok(bits / 8)
    }

    /// The offset of a field in bits, also inside unnamed members, and its type if that has
    /// fields itself.
    fn find(&self, structure: &Struct, field: &str) -> Option<(u32, Option<Struct>)> {
        for member in &structure.members {
            let inner = match self.btf.resolve_chained_type(member) {
                Ok(Type::Struct(inner) | Type::Union(inner)) => Some(inner),
                Ok(_) | Err(_) => None,
            };
            let name = self.btf.resolve_name(member).unwrap_or_default();
            if name == field {
                return Some((member.bit_offset(), inner));
            }
            if name.is_empty()
                && let Some((offset, found)) = inner.and_then(|inner| self.find(&inner, field))
            {
                return Some((member.bit_offset() + offset, found));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_has_every_field_the_programs_read() {
        let kernel = Kernel::running().unwrap();
        let offsets = kernel.offsets().unwrap();
        assert_ne!(offsets.inode_number, offsets.inode_super_block);
        assert_ne!(offsets.task_pid, offsets.task_tgid);
    }

    #[test]
    fn an_unknown_field_is_named() {
        let kernel = Kernel::running().unwrap();
        let error = kernel.offset("inode", &["i_wish"]).unwrap_err();
        assert!(error.to_string().contains("inode.i_wish"), "{error}");
    }

    #[test]
    fn functions_are_found_by_name() {
        let kernel = Kernel::running().unwrap();
        assert!(kernel.function("vfs_read").is_some());
        assert_eq!(kernel.function("no_such_function_in_any_kernel"), None);
    }
}
