//! The kernel's description of its own types (BTF), as far as offsets and functions need it.
//!
//! Reads the bytes in place, in the byte order of this machine; the format is
//! `Documentation/bpf/btf.rst` of the kernel. Knows nothing of which types are asked for. The
//! loader's own parser hands out no members, and others make a value of every one of the kernel's
//! 150,000 types first, which is most of what a start would cost.

use std::collections::HashMap;

/// Types that are told apart here (`BTF_KIND_*`).
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

const MAGIC: u16 = 0xeb9f;
/// Bytes of a type before what its kind adds.
const TYPE_BYTES: usize = 12;
const MEMBER_BYTES: usize = 12;
/// Modifiers before a type, and unnamed structures inside each other, at the most.
const MAX_DEPTH: usize = 32;

/// Types by their ids.
pub(super) struct Types<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type starts; the first has id 1.
    starts: Vec<usize>,
    /// Which types are structures with these names: the first of each, by its place in `starts`.
    structures: HashMap<&'a [u8], usize>,
}

struct Header<'a> {
    name: &'a [u8],
    kind: u32,
    members: usize,
    /// Whether members are, or may be, fields of bits.
    bit_fields: bool,
    /// The type this one refers to, for kinds that do.
    of: u32,
    /// Where what the kind adds starts.
    rest: usize,
}

struct Member<'a> {
    name: &'a [u8],
    of: u32,
    bits: u32,
}

impl<'a> Types<'a> {
    /// `None`: this is no BTF of this machine's byte order.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let magic = u16::from_ne_bytes(bytes.first_chunk().copied()?);
        let [header, type_offset, type_length, string_offset, string_length] =
            [4, 8, 12, 16, 20].map(|at| word(bytes, at));
        let section = |offset: Option<u32>, length: Option<u32>| {
            let start = (header? as usize).checked_add(offset? as usize)?;
            bytes.get(start..start.checked_add(length? as usize)?)
        };
        let types = section(type_offset, type_length)?;
        let strings = section(string_offset, string_length)?;
        let starts = Vec::with_capacity(types.len() / 24);
        let mut this = Self { types, strings, starts, structures: HashMap::new() };
        let mut at = 0;
        while at < types.len() {
            this.starts.push(at);
            let found = this.header(at)?;
            if found.kind == kind::STRUCT && !found.name.is_empty() {
                let index = this.starts.len() - 1;
                this.structures.entry(found.name).or_insert(index);
            }
            at = found.rest + added_bytes(found.kind, found.members);
        }
        (magic == MAGIC).then_some(this)
    }

    /// The BTF id of a function of the kernel, by which a BPF program can call it.
    pub(super) fn function(&self, name: &str) -> Option<u32> {
        self.find(kind::FUNC, name).and_then(|(index, _)| u32::try_from(index + 1).ok())
    }

    /// Where a field is, in bytes from the start of a structure; `fields` are names from outside
    /// to inside, and those in unnamed members count as the structure's own.
    pub(super) fn offset(&self, structure: &str, fields: &[&str]) -> Option<u32> {
        let index = *self.structures.get(structure.as_bytes())?;
        let mut current = self.header(*self.starts.get(index)?)?;
        let mut bits = 0;
        for (depth, field) in fields.iter().enumerate() {
            let (offset, of) = self.field(&current, field.as_bytes(), 0)?;
            bits += offset;
            if depth + 1 < fields.len() {
                current = self.structure(of)?;
            }
        }
        Some(bits / 8)
    }

    fn field(&self, structure: &Header<'_>, name: &[u8], depth: usize) -> Option<(u32, u32)> {
        if depth > MAX_DEPTH {
            return None;
        }
        for index in 0..structure.members {
            let member = self.member(structure, index)?;
            if member.name == name {
                return Some((member.bits, member.of));
            }
            if member.name.is_empty()
                && let Some(inner) = self.structure(member.of)
                && let Some((bits, of)) = self.field(&inner, name, depth + 1)
            {
                return Some((member.bits + bits, of));
            }
        }
        None
    }

    /// The structure or union with this id, seen through names and qualifiers.
    fn structure(&self, id: u32) -> Option<Header<'a>> {
        let mut id = id;
        for _ in 0..MAX_DEPTH {
            let found = self.header(*self.starts.get((id as usize).checked_sub(1)?)?)?;
            match found.kind {
                kind::STRUCT | kind::UNION => return Some(found),
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = found.of
                }
                _ => return None,
            }
        }
        None
    }

    fn find(&self, kind: u32, name: &str) -> Option<(usize, Header<'a>)> {
        self.starts.iter().enumerate().find_map(|(index, start)| {
            let found = self.header(*start)?;
            (found.kind == kind && found.name == name.as_bytes()).then_some((index, found))
        })
    }

    fn header(&self, at: usize) -> Option<Header<'a>> {
        let info = word(self.types, at + 4)?;
        Some(Header {
            name: self.string(word(self.types, at)?)?,
            kind: (info >> 24) & 0x1f,
            members: (info & 0xffff) as usize,
            bit_fields: info >> 31 == 1,
            of: word(self.types, at + 8)?,
            rest: at + TYPE_BYTES,
        })
    }

    fn member(&self, structure: &Header<'_>, index: usize) -> Option<Member<'a>> {
        let at = structure.rest + index * MEMBER_BYTES;
        let offset = word(self.types, at + 8)?;
        Some(Member {
            name: self.string(word(self.types, at)?)?,
            of: word(self.types, at + 4)?,
            bits: if structure.bit_fields { offset & 0x00ff_ffff } else { offset },
        })
    }

    fn string(&self, at: u32) -> Option<&'a [u8]> {
        self.strings.get(at as usize..)?.split(|byte| *byte == 0).next()
    }
}

/// What stands behind a type of this kind, in bytes.
const fn added_bytes(kind: u32, members: usize) -> usize {
    match kind {
        kind::INT | kind::VAR | kind::DECL_TAG => 4,
        kind::ARRAY => 12,
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * members,
        kind::ENUM | kind::FUNC_PROTO => 8 * members,
        _ => 0,
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { int first; struct { const struct inner named; }; };`, and a function.
    fn example() -> Vec<u8> {
        let strings = b"\0outer\0first\0named\0inner\0deep\0run\0";
        let info = |kind: u32, members: u32| kind << 24 | members;
        #[rustfmt::skip]
        let types: Vec<u32> = vec![
            0, info(kind::INT, 0), 4, 32,                              // 1: int
            19, info(kind::STRUCT, 1), 8, /* deep */ 25, 1, 32,        // 2: inner
            0, info(kind::CONST, 0), 2,                                // 3
            0, info(kind::STRUCT, 1), 8, /* named */ 13, 3, 0,         // 4: unnamed
            1, info(kind::STRUCT, 2), 12, 7, 1, 0, /* unnamed */ 0, 4, 32, // 5: outer
            30, info(kind::FUNC, 0), 0,                                // 6: run
        ];
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let lengths = [24, 0, types.len(), types.len(), strings.len()];
        let mut bytes = [&MAGIC.to_ne_bytes()[..], &[1, 0]].concat();
        bytes.extend(lengths.iter().flat_map(|length| (*length as u32).to_ne_bytes()));
        [bytes, types, strings.to_vec()].concat()
    }

    #[test]
    fn fields_are_found_through_unnamed_members_and_qualifiers() {
        let bytes = example();
        let types = Types::parse(&bytes).unwrap();
        assert_eq!(types.offset("outer", &["first"]), Some(0));
        assert_eq!(types.offset("outer", &["named"]), Some(4));
        assert_eq!(types.offset("outer", &["named", "deep"]), Some(8));
        assert_eq!(types.offset("outer", &["first", "deep"]), None);
        assert_eq!(types.offset("inner", &["wide"]), None);
        assert_eq!(types.function("run"), Some(6));
        assert_eq!(types.function("outer"), None);
    }

    #[test]
    fn what_is_cut_short_is_refused() {
        let bytes = example();
        for length in 0..bytes.len() {
            assert!(Types::parse(&bytes[..length]).is_none(), "{length}");
        }
    }
}
