//! The kernel half's object, fitted to the running kernel.

use agentguard_common::abi::kfunc;

/// The object, as the build made it.
pub(super) const OBJECT: &[u8] = aya::include_bytes_aligned!(env!("AGENTGUARD_OBJECT"));

/// `BPF_JMP | BPF_CALL`.
const CALL: u8 = 0x85;
/// `BPF_ALU64 | BPF_MOV | BPF_K`.
const MOVE: u8 = 0xb7;
/// `BPF_PSEUDO_KFUNC_CALL` as the source register of a call: the immediate is a BTF id.
const KFUNC: u8 = 2 << 4;
const ENOSYS: i32 = 38;

/// The SHA-256 of [`OBJECT`]: three megabytes, which each start would read for it.
pub(super) const OBJECT_DIGEST: &str = env!("AGENTGUARD_OBJECT_DIGEST");

/// The object as the build made it.
#[must_use]
pub const fn object_bytes() -> &'static [u8] {
    OBJECT
}

/// The object with its calls of kernel functions bound: to the function where the kernel has it,
/// to the constant `-ENOSYS` where not.
///
/// aya has no relocation for kernel functions, so the object calls numbers that no helper has
/// (see [`kfunc`]).
#[must_use]
pub(super) fn bind(send_signal_task: Option<u32>) -> Vec<u8> {
    let bound = match send_signal_task {
        Some(id) => instruction(CALL, KFUNC, id),
        None => instruction(MOVE, 0, (-ENOSYS).cast_unsigned()),
    };
    let mut object = OBJECT.to_vec();
    let (instructions, _rest) = object.as_chunks_mut();
    for found in instructions.iter_mut().filter(|found| **found == PLACEHOLDER) {
        *found = bound;
    }
    object
}

/// The call that stands in the object.
const PLACEHOLDER: [u8; 8] = instruction(CALL, 0, kfunc::SEND_SIGNAL_TASK);

/// An instruction without an offset, as the kernel reads it (`struct bpf_insn`).
const fn instruction(code: u8, registers: u8, immediate: u32) -> [u8; 8] {
    let [a, b, c, d] = immediate.to_le_bytes();
    [code, registers, 0, 0, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(object: &[u8], number: u32) -> usize {
        let call = [[CALL, 0, 0, 0], number.to_le_bytes()].concat();
        object.chunks_exact(8).filter(|instruction| **instruction == call).count()
    }

    #[test]
    fn every_call_of_a_kernel_function_is_bound() {
        assert!(calls(OBJECT, kfunc::SEND_SIGNAL_TASK) > 0);
        for function in [None, Some(4711)] {
            assert_eq!(calls(&bind(function), kfunc::SEND_SIGNAL_TASK), 0);
        }
    }
}
