//! The object as the build made it, without a kernel.

use agentguard::datapath::{Door, doors, object_bytes};
use object::{Object as _, ObjectSymbol as _};

#[test]
fn every_door_has_its_program_and_its_gate_and_every_program_its_door() {
    let bytes = object_bytes();
    let file = object::File::parse(bytes).unwrap();
    let mut programs: Vec<&str> = file
        .symbols()
        .filter(|symbol| symbol.is_global() && symbol.kind() == object::SymbolKind::Text)
        .filter(|symbol| {
            let section = symbol.section_index().and_then(|index| {
                object::ObjectSection::name(&file.section_by_index(index).ok()?)
                    .ok()
                    .map(str::to_owned)
            });
            section.is_some_and(|name| name != ".text")
        })
        .filter_map(|symbol| symbol.name().ok())
        .collect();
    let programs_of = |door: &Door| [Some(door.program), door.gate_program()];
    let mut expected: Vec<&str> = doors().iter().flat_map(programs_of).flatten().collect();
    expected.push("lsm_probe");
    programs.sort_unstable();
    expected.sort_unstable();
    assert_eq!(programs, expected);
}
