//! From nodes to values: small readers that report every fault and go on.
//!
//! A reader that returns nothing has reported why. A document counts only when no fault at all was
//! reported while it was read, so it is built from all of its fields or not at all.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    str::FromStr,
};

use super::{
    error::{ManifestError, Position, problem_and_remedy, shortened},
    tree::{Field, Node, NodeKind, Style, is_control},
};

/// How many faults of one text are kept: beyond this, more lines help nobody.
const MAX_FAULTS: usize = 1000;
/// The longest field name that is compared with the known ones.
const MAX_COMPARED_BYTES: usize = 64;

/// The faults found in one text.
pub(super) struct Problems {
    file: String,
    faults: RefCell<Vec<Fault>>,
    count: Cell<usize>,
}

/// One fault, before it knows its file.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) position: Option<Position>,
    pub(super) field: Option<String>,
    pub(super) value: Option<String>,
    pub(super) message: String,
    pub(super) remedy: String,
}

/// Where the fields of a document stand, by their path; for faults that show later.
pub(super) type Places = BTreeMap<String, Position>;

/// A node together with the path that leads to it.
pub(super) struct Value<'a> {
    node: &'a Node,
    path: String,
    problems: &'a Problems,
    places: &'a RefCell<Places>,
}

/// The place of one field in a map, filled or not.
pub(super) struct Slot<'a> {
    name: &'static str,
    value: Option<Value<'a>>,
    path: String,
    map_position: Position,
    problems: &'a Problems,
}

impl Fault {
    pub(super) fn whole(message: impl Into<String>, remedy: impl Into<String>) -> Self {
        let (message, remedy) = (message.into(), remedy.into());
        Self { position: None, field: None, value: None, message, remedy }
    }

    pub(super) fn at(
        position: Position,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { position: Some(position), ..Self::whole(message, remedy) }
    }

    pub(super) fn in_file(self, file: &str) -> ManifestError {
        let Self { position, field, value, message, remedy } = self;
        let value = value.as_deref().map(shortened);
        ManifestError { file: file.to_owned(), position, field, value, message, remedy }
    }
}

impl Problems {
    pub(super) fn new(file: &str) -> Self {
        Self { file: file.to_owned(), faults: RefCell::default(), count: Cell::new(0) }
    }

    /// How many faults were reported so far, kept or not.
    pub(super) fn count(&self) -> usize {
        self.count.get()
    }

    pub(super) fn add(&self, fault: Fault) {
        self.count.set(self.count.get() + 1);
        let mut faults = self.faults.borrow_mut();
        if faults.len() < MAX_FAULTS {
            faults.push(fault);
        } else if faults.len() == MAX_FAULTS {
            faults.push(Fault::whole(
                format!("has more than {MAX_FAULTS} errors"),
                "correct those that are shown first",
            ));
        }
    }

    /// Everything reported, in the order of the text.
    pub(super) fn into_errors(self) -> Vec<ManifestError> {
        let mut faults = self.faults.into_inner();
        // What has no position is about the whole and comes last.
        faults.sort_by_key(|fault| (fault.position.is_none(), fault.position));
        faults.into_iter().map(|fault| fault.in_file(&self.file)).collect()
    }
}

impl<'a> Value<'a> {
    pub(super) fn document(
        node: &'a Node,
        problems: &'a Problems,
        places: &'a RefCell<Places>,
    ) -> Self {
        Self { node, path: String::new(), problems, places }
    }

    /// Reports a fault of this value as a whole.
    pub(super) fn refuse(&self, message: impl Into<String>, remedy: impl Into<String>) {
        let mut fault = Fault::at(self.node.position, message, remedy);
        fault.field = (!self.path.is_empty()).then(|| self.path.clone());
        fault.value = self.scalar().map(|(text, _)| text.to_owned()).filter(|t| !t.is_empty());
        self.problems.add(fault);
    }

    /// Reports a fault given as `problem; remedy`.
    pub(super) fn refuse_for(&self, reason: &dyn fmt::Display) {
        let reason = reason.to_string();
        let (message, remedy) = problem_and_remedy(&reason);
        self.refuse(message, remedy);
    }

    /// The fields called `known`, in that order; every other field is a fault.
    pub(super) fn fields<const N: usize>(&self, known: [&'static str; N]) -> Option<[Slot<'a>; N]> {
        let NodeKind::Map(fields) = &self.node.kind else {
            self.refuse_kind("a map of fields", &format!("write {}", list_of(&known, "and")));
            return None;
        };
        for Field { name, position, value: _ } in fields {
            if !known.contains(&name.as_str()) {
                let mut fault = Fault::at(
                    *position,
                    "is not a known field",
                    match nearest(name, known.iter().copied()) {
                        Some(near) => format!("did you mean {near}?"),
                        None => format!("remove it, known here: {}", list_of(&known, "and")),
                    },
                );
                fault.field = Some(self.below(&shown_name(name)));
                self.problems.add(fault);
            }
        }
        Some(known.map(|name| {
            let field = fields.iter().find(|field| field.name == name);
            let path = self.below(name);
            Slot {
                name,
                value: field.map(|field| self.child(&field.value, path.clone())),
                path,
                map_position: self.node.position,
                problems: self.problems,
            }
        }))
    }

    /// Reports unless exactly one of `slots` is filled.
    pub(super) fn check_exactly_one<const N: usize>(&self, slots: [&Slot<'a>; N]) {
        let names = slots.map(|slot| slot.name);
        let filled: Vec<&str> =
            slots.iter().filter(|slot| slot.value.is_some()).map(|slot| slot.name).collect();
        match filled.as_slice() {
            [] => self.refuse(
                format!("has neither {}", list_of(&names, "nor")),
                "write exactly one of them",
            ),
            [_] => {}
            [..] => self.refuse(
                format!("has both {}", list_of(&filled, "and")),
                "keep exactly one of them",
            ),
        }
    }

    /// Reports unless at least one of `slots` is filled.
    pub(super) fn check_at_least_one<const N: usize>(&self, slots: [&Slot<'a>; N]) {
        if slots.iter().all(|slot| slot.value.is_none()) {
            let names = slots.map(|slot| slot.name);
            self.refuse(
                format!("has neither {}", list_of(&names, "nor")),
                "write at least one of them",
            );
        }
    }

    /// Every item read by `read`; an empty list and an item that is there twice are faults.
    pub(super) fn list<T: Ord>(&self, read: impl Fn(&Value<'a>) -> Option<T>) -> Option<Vec<T>> {
        let NodeKind::List(items) = &self.node.kind else {
            self.refuse_kind("a list", "begin each item with `- `");
            return None;
        };
        if items.is_empty() {
            self.refuse("is an empty list", "write at least one item, or remove the field");
            return None;
        }
        let mut places = BTreeMap::new();
        let mut sound = true;
        for (index, node) in items.iter().enumerate() {
            let item = self.child(node, format!("{}[{index}]", self.path));
            match read(&item).map(|value| places.entry(value)) {
                None => sound = false,
                Some(Entry::Vacant(place)) => {
                    place.insert(index);
                }
                Some(Entry::Occupied(first)) => {
                    let message = format!("repeats {}[{}]", self.path, first.get());
                    item.refuse(message, "remove one of the two");
                }
            }
        }
        let mut values: Vec<(T, usize)> = places.into_iter().collect();
        values.sort_unstable_by_key(|(_, index)| *index);
        sound.then(|| values.into_iter().map(|(value, _)| value).collect())
    }

    /// Every field of a map whose keys are the writer's, sorted; an empty map is a fault.
    pub(super) fn entries<T: Ord>(
        &self,
        read: impl Fn(&'a str, &Value<'a>) -> Option<T>,
    ) -> Option<Vec<T>> {
        let NodeKind::Map(fields) = &self.node.kind else {
            self.refuse_kind("a map of fields", "write one field or more");
            return None;
        };
        if fields.is_empty() {
            self.refuse("is an empty map", "write at least one field, or remove it");
            return None;
        }
        // Each is read, so that the faults of all are told.
        let entries: Vec<Option<T>> = fields
            .iter()
            .map(|field| {
                let path = self.below(&shown_name(&field.name));
                read(&field.name, &self.child(&field.value, path))
            })
            .collect();
        let mut entries: Vec<T> = entries.into_iter().collect::<Option<_>>()?;
        entries.sort_unstable();
        Some(entries)
    }

    /// The key of this value, with a grammar of its own.
    pub(super) fn parse_key<T: FromStr<Err: fmt::Display>>(&self, key: &str) -> Option<T> {
        key.parse()
            .map_err(|reason: T::Err| {
                let reason = reason.to_string();
                let (message, remedy) = problem_and_remedy(&reason);
                self.refuse(format!("has a key that {message}"), remedy);
            })
            .ok()
    }

    /// Text that says something: not blank, no control characters, not a number.
    pub(super) fn text(&self) -> Option<&'a str> {
        let Some((text, style)) = self.scalar() else {
            self.refuse_kind("text", "write one value");
            return None;
        };
        if text.trim().is_empty() {
            self.refuse("is empty", "write a value, or remove the field");
            return None;
        }
        if style == Style::Plain
            && let Some(meaning) = other_meaning(text)
        {
            match meaning {
                Meaning::Null => self.refuse("is null", "write a value, or remove the field"),
                Meaning::Truth => self.refuse(
                    "is a truth value where text is expected",
                    "put it in quotes if it is meant as text",
                ),
                Meaning::Number => self.refuse(
                    "is a number where text is expected",
                    "put it in quotes if it is meant as text",
                ),
            }
            return None;
        }
        if let Some(control) = text.chars().find(|c| is_control(*c)) {
            self.refuse(
                format!("has a control character (U+{:04X})", control as u32),
                "remove it and write the text on one line",
            );
            return None;
        }
        Some(text)
    }

    /// Text with a grammar of its own.
    pub(super) fn parse<T: FromStr<Err: fmt::Display>>(&self) -> Option<T> {
        self.parse_with(str::parse)
    }

    /// Text that `parse` understands; its error reads `problem; remedy`.
    pub(super) fn parse_with<T, E: fmt::Display>(
        &self,
        parse: impl FnOnce(&'a str) -> Result<T, E>,
    ) -> Option<T> {
        let text = self.text()?;
        parse(text).map_err(|reason| self.refuse_for(&reason)).ok()
    }

    /// One of the words `all`, which `word` spells.
    pub(super) fn one_of<T: Copy>(&self, all: &[T], word: fn(T) -> &'static str) -> Option<T> {
        let text = match self.scalar() {
            // Whatever else it may look like, such as `off`, it is compared with the words.
            Some((text, _)) if text.chars().any(char::is_alphanumeric) => text,
            Some(_) | None => self.text()?,
        };
        let found = all.iter().copied().find(|value| word(*value) == text);
        if found.is_none() {
            let words: Vec<&str> = all.iter().copied().map(word).collect();
            let remedy = match nearest(text, words.iter().copied()) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("write {}", list_of(&words, "or")),
            };
            self.refuse("is not known here", remedy);
        }
        found
    }

    /// A port number, 1 to 65535.
    pub(super) fn port(&self) -> Option<u16> {
        let Some((text, style)) = self.scalar() else {
            self.refuse_kind("a number", "write a port from 1 to 65535");
            return None;
        };
        if text.is_empty() || (style == Style::Plain && other_meaning(text) == Some(Meaning::Null))
        {
            self.refuse("is empty", "write a port from 1 to 65535, or remove the field");
            return None;
        }
        if style == Style::Quoted {
            self.refuse("is text where a number is expected", "remove the quotes");
            return None;
        }
        let decimal =
            text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        let negative =
            text.strip_prefix('-').is_some_and(|t| t.bytes().all(|b| b.is_ascii_digit()));
        if !decimal && !negative {
            self.refuse("is no whole decimal number", "write a port from 1 to 65535");
            return None;
        }
        match text.parse::<u16>() {
            Ok(0) => {
                self.refuse("is no port", "write 1 to 65535, or leave port out for every port");
                None
            }
            Ok(port) => Some(port),
            // Of a decimal number, only its size can be wrong.
            Err(_) => {
                self.refuse("is outside the range of ports", "write 1 to 65535");
                None
            }
        }
    }

    /// Notes where this value stands, for faults that show only later.
    pub(super) fn note(&self) {
        self.places.borrow_mut().insert(self.path.clone(), self.node.position);
    }

    fn scalar(&self) -> Option<(&'a str, Style)> {
        match &self.node.kind {
            NodeKind::Scalar { text, style } => Some((text, *style)),
            NodeKind::List(_) | NodeKind::Map(_) | NodeKind::Refused => None,
        }
    }

    fn refuse_kind(&self, expected: &str, remedy: &str) {
        let found = match &self.node.kind {
            NodeKind::Scalar { text, style: Style::Plain }
                if other_meaning(text) == Some(Meaning::Null) =>
            {
                self.refuse("is empty", "write a value, or remove the field");
                return;
            }
            NodeKind::Scalar { .. } => "one value",
            NodeKind::List(_) => "a list",
            NodeKind::Map(_) => "a map of fields",
            NodeKind::Refused => return,
        };
        self.refuse(format!("is {found} where {expected} is expected"), remedy);
    }

    fn child(&self, node: &'a Node, path: String) -> Self {
        Self { node, path, problems: self.problems, places: self.places }
    }

    fn below(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }
}

impl<'a> Slot<'a> {
    /// What the field holds; its absence is a fault.
    pub(super) fn required<T>(self, read: impl FnOnce(&Value<'a>) -> Option<T>) -> Option<T> {
        match &self.value {
            Some(value) => read(value),
            None => {
                let mut fault = Fault::at(self.map_position, "is missing", "add it");
                fault.field = Some(self.path);
                self.problems.add(fault);
                None
            }
        }
    }

    pub(super) fn is_present(&self) -> bool {
        self.value.is_some()
    }

    /// What the field holds, or that it is absent; the outer nothing is a fault.
    pub(super) fn optional<T>(
        self,
        read: impl FnOnce(&Value<'a>) -> Option<T>,
    ) -> Option<Option<T>> {
        match &self.value {
            Some(value) => read(value).map(Some),
            None => Some(None),
        }
    }
}

/// What a plain scalar means to a YAML 1.1 or 1.2 reader when it is not text.
///
/// Both are asked, because Kubernetes reads 1.1: a file has to mean the same to everyone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    Null,
    Truth,
    Number,
}

fn other_meaning(text: &str) -> Option<Meaning> {
    match text.to_ascii_lowercase().as_str() {
        "" | "~" | "null" => return Some(Meaning::Null),
        "true" | "false" | "yes" | "no" | "on" | "off" | "y" | "n" => return Some(Meaning::Truth),
        ".inf" | "+.inf" | "-.inf" | ".nan" => return Some(Meaning::Number),
        _ => {}
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let digits = unsigned.replace('_', "");
    let based = ["0x", "0o", "0b"].iter().any(|prefix| {
        digits
            .strip_prefix(prefix)
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_hexdigit()))
    });
    (based || digits.parse::<f64>().is_ok()).then_some(Meaning::Number)
}

/// A field name as part of a path in an error.
pub(super) fn shown_name(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '$');
    if name.chars().all(plain) && name.len() <= MAX_COMPARED_BYTES {
        name.to_owned()
    } else {
        format!("{:?}", shortened(name))
    }
}

/// `a, b and c`.
pub(super) fn list_of(words: &[&str], conjunction: &str) -> String {
    match words {
        [] => "nothing".to_owned(),
        [only] => (*only).to_owned(),
        [most @ .., last] => format!("{} {conjunction} {last}", most.join(", ")),
    }
}

/// The candidate that `text` is most likely meant to be, if one is close.
pub(super) fn nearest<'c>(
    text: &str,
    candidates: impl IntoIterator<Item = &'c str>,
) -> Option<&'c str> {
    near(text, candidates).into_iter().next()
}

/// The candidates that `text` may be meant to be, nearest first.
pub(super) fn near<'c>(text: &str, candidates: impl IntoIterator<Item = &'c str>) -> Vec<&'c str> {
    if text.len() > 2 * MAX_COMPARED_BYTES {
        return Vec::new();
    }
    let mut found: Vec<(usize, &str)> = candidates
        .into_iter()
        .filter_map(|candidate| {
            let limit = (candidate.len() + 1).min(9) / 3;
            // Most candidates are told apart by their length, without a closer look.
            let comparable = candidate.len().abs_diff(text.len()) <= limit;
            let distance = if comparable { distance(text, candidate) } else { usize::MAX };
            (distance <= limit).then_some((distance, candidate))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, candidate)| candidate).collect()
}

/// How many single-character edits part the two texts, upper and lower case being the same.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.to_lowercase().chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (index, l) in left.to_lowercase().chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (column, r) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(l != *r);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_looks_like_something_else_is_not_text() {
        let cases = [
            ("443", Some(Meaning::Number)),
            ("-1", Some(Meaning::Number)),
            ("1_000", Some(Meaning::Number)),
            ("1e3", Some(Meaning::Number)),
            ("0x1F", Some(Meaning::Number)),
            (".5", Some(Meaning::Number)),
            (".inf", Some(Meaning::Number)),
            ("yes", Some(Meaning::Truth)),
            ("True", Some(Meaning::Truth)),
            ("~", Some(Meaning::Null)),
            ("", Some(Meaning::Null)),
            ("never", None),
            ("inf", None),
            ("192.0.2.0/24", None),
            ("2026-11-22T09:00:00Z", None),
            ("8h", None),
            ("OPS-1234", None),
        ];
        for (text, meaning) in cases {
            assert_eq!(other_meaning(text), meaning, "{text:?}");
        }
    }

    #[test]
    fn the_nearest_word_is_found_and_a_distant_one_is_not() {
        assert_eq!(nearest("egres", ["egress", "exec"]), Some("egress"));
        assert_eq!(nearest("unixsockets", ["egress", "unixSockets"]), Some("unixSockets"));
        assert_eq!(nearest("tcp", ["TCP", "UDP"]), Some("TCP"));
        assert_eq!(nearest("firewall", ["egress", "exec"]), None);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }
}
