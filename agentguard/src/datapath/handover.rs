//! Global hooks and their gates, and the change from one build of the programs to another.
//!
//! What is attached to a global hook (tracepoints, the LSM) can not be exchanged in place, so a gate
//! is attached there once and for good: it calls the program in a table of one slot, and writing the
//! slot is the exchange. What is attached to a cgroup is a link whose program the kernel exchanges.
//! Either way every request meets one program: the old one or the new one.

use std::io;
use std::path::Path;

use aya::maps::{Map, MapData, MapError, ProgramArray};
use aya::programs::links::FdLink;
use aya::programs::{BtfTracePoint, Lsm, Program, ProgramError, ProgramFd};
use aya::{Btf, Ebpf};
use nix::errno::Errno;

use super::attach::{CgroupProgram, fd_link};
use super::link;
use super::load::{Datapath, LoadError, load_program, reason_of};
use super::pins::{self, Pins, name_of};
use super::protection::{Door, Gate};
use crate::fault;

/// A program for a global hook, and the slot it stands in when it is in force.
pub(super) struct GlobalProgram {
    name: &'static str,
    program: Kind,
    slot: ProgramArray<MapData>,
}

enum Kind {
    Tracepoint(BtfTracePoint),
    Lsm(Lsm),
}

impl GlobalProgram {
    pub(super) fn open(door: &Door, gate: Gate, pins: &Pins) -> Result<Self, LoadError> {
        let path = pins.program(door.program);
        let error = |error: ProgramError| LoadError::part(door.program, error);
        let program = if door.hook.starts_with("lsm/") {
            Kind::Lsm(Lsm::from_pin(&path).map_err(error)?)
        } else {
            Kind::Tracepoint(BtfTracePoint::from_pin(&path).map_err(error)?)
        };
        let slot = open_slot(&pins.gate(gate.slot), gate.slot)?;
        Ok(Self { name: door.program, program, slot })
    }

    /// Puts the program in force: one write.
    fn enter(&mut self) -> Result<(), LoadError> {
        let fd: &ProgramFd = match &self.program {
            Kind::Tracepoint(program) => program.fd(),
            Kind::Lsm(program) => program.fd(),
        }
        .map_err(|error| LoadError::part(self.name, error))?;
        self.slot.set(0, fd, 0).map_err(|error| LoadError::part(self.name, error))
    }
}

fn open_slot(path: &Path, name: &str) -> Result<ProgramArray<MapData>, LoadError> {
    let error = |error: MapError| LoadError::part(name, error);
    let data = MapData::from_pin(path).map_err(error)?;
    Map::from_map_data(data).and_then(ProgramArray::try_from).map_err(error)
}

/// Attaches the gate of a global hook, unless it is there already. Nothing stands in its slot yet.
#[expect(clippy::wildcard_enum_match_arm, reason = "aya's kinds of programs are not ours")]
pub(super) fn attach_gate(
    ebpf: &mut Ebpf,
    btf: &Btf,
    door: &Door,
    gate: Gate,
    pins: &Pins,
) -> Result<(), String> {
    let path = pins.global_link(door.program);
    if path.exists() {
        return Ok(());
    }
    let reason = |error: ProgramError| reason_of(gate.program, error);
    let program = ebpf
        .program_mut(gate.program)
        .ok_or_else(|| format!("the object does not hold {}", gate.program))?;
    load_program(gate.program, door.hook, program, btf)?;
    let link: FdLink = match program {
        Program::BtfTracePoint(program) => {
            let id = program.attach().map_err(reason)?;
            fd_link(program.take_link(id).map_err(reason)?)?
        }
        Program::Lsm(program) => {
            let id = program.attach().map_err(reason)?;
            fd_link(program.take_link(id).map_err(reason)?)?
        }
        _ => return Err(format!("{} is of a kind that is not known here", gate.program)),
    };
    link.pin(path).map_err(|error| error.to_string())?;
    fault::point("load.gate");
    Ok(())
}

impl Datapath {
    /// Puts this build's programs in force behind every gate.
    pub(super) fn open_gates(&mut self) -> Result<(), LoadError> {
        for program in &mut self.globals {
            program.enter()?;
            fault::point("takeover.gate");
        }
        Ok(())
    }

    /// Whether another build is in force, which this one is to take the place of.
    ///
    /// # Errors
    ///
    /// When the pins can not be listed.
    pub fn has_others(&self) -> Result<bool, LoadError> {
        Ok(!self.pins.others()?.is_empty())
    }

    /// Puts this build in force in the place of all others, hook by hook, and removes theirs last; to
    /// be called once this one holds everything that they held. Returns how many pins of others went.
    ///
    /// # Errors
    ///
    /// When a hook can not be taken over. What was taken over stays so: every hook has one program.
    pub fn take_over(&mut self) -> Result<usize, LoadError> {
        let others = self.pins.others()?;
        if others.is_empty() {
            return Ok(0);
        }
        for path in pins::entries(&self.pins.links())? {
            let Some((_cgroup, name)) = name_of(&path).split_once('-') else { continue };
            match self.programs.iter().find(|program| program.name == name) {
                Some(program) => replace(&path, &program.kind)?,
                // A hook of another version that this one does not have.
                None => pins::remove(&path)?,
            }
            fault::point("takeover.link");
        }
        self.open_gates()?;
        self.close_foreign_gates()?;
        fault::point("takeover.done");
        for path in &others {
            pins::remove_build(path)?;
            fault::point("takeover.removed");
        }
        Ok(others.len())
    }

    /// Takes away gates that no program of this build stands behind.
    fn close_foreign_gates(&self) -> Result<(), LoadError> {
        let own = |name: &str| self.globals.iter().any(|program| program.name == name);
        for path in pins::entries(&self.pins.links())? {
            let name = name_of(&path);
            if !name.contains('-') && !own(name) {
                pins::remove(&path)?;
            }
        }
        let slots: Vec<_> = super::protection::doors()
            .iter()
            .filter(|door| own(door.program))
            .filter_map(|door| door.gate)
            .map(|gate| gate.slot)
            .collect();
        for path in pins::entries(&self.pins.gates())? {
            if !slots.contains(&name_of(&path)) {
                pins::remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Has a pinned link call another program; one whose cgroup is gone calls nothing any more.
fn replace(path: &Path, program: &CgroupProgram) -> Result<(), LoadError> {
    let name = name_of(path);
    let error = |error: ProgramError| LoadError::part(name, error);
    let replaced = match program {
        CgroupProgram::SockAddr(program, _) => link::replace(path, program.fd().map_err(error)?),
        CgroupProgram::Sock(program, _) => link::replace(path, program.fd().map_err(error)?),
        CgroupProgram::Skb(program, _) => link::replace(path, program.fd().map_err(error)?),
    };
    match replaced {
        Err(gone) if gone.raw_os_error() == Some(Errno::ENOLINK as i32) => Ok(()),
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|error| LoadError::part(name, error)),
    }
}
