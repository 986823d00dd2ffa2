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
    let mut object = OBJECT.to_vec();
    for instruction in object.chunks_exact_mut(8) {
        let placeholder = kfunc::SEND_SIGNAL_TASK.to_le_bytes();
        if instruction[..4] == [CALL, 0, 0, 0] && instruction[4..] == placeholder {
            match send_signal_task {
                Some(id) => {
                    instruction[1] = KFUNC;
                    instruction[4..].copy_from_slice(&id.to_le_bytes());
                }
                None => {
                    instruction[0] = MOVE;
                    instruction[4..].copy_from_slice(&(-ENOSYS).to_le_bytes());
                }
            }
        }
    }
    object
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
