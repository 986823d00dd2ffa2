//! From bytes to trees of nodes that know where they stand.
//!
//! Accepts the part of YAML that reads the same to everyone: no anchors, aliases, merge keys, tags
//! or directives, every key a text that occurs once. Knows nothing of what a manifest means. Time
//! and memory are linear in the length of the text: nothing expands, and nesting is bounded.

use std::{collections::HashMap, collections::hash_map::Entry as MapEntry};

use saphyr_parser::{Event, Parser, ScalarStyle, Span, StrInput};

use super::{
    error::Position,
    reader::{Fault, Problems},
};

/// The largest document, in bytes.
pub const MAX_DOCUMENT_BYTES: usize = 1 << 20;
/// The largest file, in bytes; a bound on memory for files that hold several documents.
pub const MAX_FILE_BYTES: usize = 16 << 20;
/// The deepest nesting of maps and lists.
pub const MAX_DEPTH: usize = 32;

/// One document.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) root: Node,
    /// Whether nothing in it was refused.
    pub(super) is_sound: bool,
}

/// A value and where it begins.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) position: Position,
    pub(super) kind: NodeKind,
}

#[derive(Debug)]
pub(super) enum NodeKind {
    Scalar {
        text: String,
        style: Style,
    },
    List(Vec<Node>),
    Map(Vec<Field>),
    /// Already reported; the reader passes over it.
    Refused,
}

/// How a scalar was written, as far as it decides what the scalar means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// Without quotes: a number, a truth value or null if it looks like one.
    Plain,
    /// In quotes or as a block: always text.
    Quoted,
}

#[derive(Debug)]
pub(super) struct Field {
    pub(super) name: String,
    pub(super) position: Position,
    pub(super) value: Node,
}

/// The text of one document, or of several that are parted by `...` only.
struct Part<'a> {
    text: &'a str,
    first_line: usize,
}

/// The rest of this part cannot be read; the reason is reported.
struct Stop;

type Read<T> = Result<T, Stop>;

/// Reads every document of `bytes`. What is refused goes to `problems`; a document that cannot be
/// read does not keep the next from being read.
pub(super) fn documents(bytes: &[u8], problems: &Problems) -> Vec<Document> {
    if bytes.len() > MAX_FILE_BYTES {
        let remedy = "split it into several files";
        problems.add(Fault::whole(format!("is larger than {} MiB", MAX_FILE_BYTES >> 20), remedy));
        return Vec::new();
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
        Err(error) => {
            let valid = &bytes[..error.valid_up_to()];
            let position = end_position(&String::from_utf8_lossy(valid));
            problems.add(Fault::at(position, "is not UTF-8 from here on", "save it as UTF-8"));
            return Vec::new();
        }
    };
    let mut documents = Vec::new();
    for part in parts(text) {
        if part.is_sound(problems) {
            let mut builder = Builder::new(&part, problems);
            // A part that stops early keeps the documents before the place where it stopped.
            let (Ok(()) | Err(Stop)) = builder.read(&mut documents);
        }
    }
    documents
}

impl Part<'_> {
    /// Checks what can be told before parsing.
    fn is_sound(&self, problems: &Problems) -> bool {
        let start = Position { line: self.first_line, column: 1 };
        if self.text.len() > MAX_DOCUMENT_BYTES {
            let message = format!("a document of {} bytes is over 1 MiB", self.text.len());
            problems.add(Fault::at(start, message, "split it into several documents"));
            return false;
        }
        let stranger = self.text.char_indices().find(|(_, c)| !is_printable(*c));
        if let Some((offset, stranger)) = stranger {
            let position = self.place(end_position(&self.text[..offset]));
            let message = format!("has a control character (U+{:04X})", stranger as u32);
            problems.add(Fault::at(position, message, "remove it"));
            return false;
        }
        if self.text.lines().find(|line| !is_blank(line)).is_some_and(|l| l.starts_with('%')) {
            problems.add(Fault::at(
                start,
                "YAML directives are not allowed",
                "remove the line with `%`",
            ));
            return false;
        }
        true
    }

    /// A position in this part as a position in the whole text.
    fn place(&self, inside: Position) -> Position {
        Position { line: self.first_line + inside.line - 1, column: inside.column }
    }

    fn starts_with_tab(&self, line: usize) -> bool {
        let line = self.text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
        line.trim_start_matches(' ').starts_with('\t')
    }
}

struct Builder<'a> {
    part: &'a Part<'a>,
    parser: Parser<'a, StrInput<'a>>,
    problems: &'a Problems,
    /// The path of the field that is being read.
    path: Vec<Step>,
}

enum Step {
    Name(String),
    Index(usize),
}

impl<'a> Builder<'a> {
    fn new(part: &'a Part<'a>, problems: &'a Problems) -> Self {
        let parser = Parser::new_from_str(part.text);
        Self { part, parser, problems, path: Vec::new() }
    }

    fn read(&mut self, documents: &mut Vec<Document>) -> Read<()> {
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => return Ok(()),
                Event::Nothing
                | Event::StreamStart
                | Event::DocumentStart(_)
                | Event::DocumentEnd => {}
                Event::Alias(_)
                | Event::Scalar(..)
                | Event::SequenceStart(..)
                | Event::SequenceEnd
                | Event::MappingStart(..)
                | Event::MappingEnd => {
                    self.path.clear();
                    let before = self.problems.count();
                    let root = self.node(event, span, 0)?;
                    if !is_nothing(&root) {
                        let is_sound = self.problems.count() == before;
                        documents.push(Document { root, is_sound });
                    }
                }
            }
        }
    }

    fn next(&mut self) -> Read<(Event<'a>, Span)> {
        match self.parser.next_event() {
            Some(Ok(next)) => Ok(next),
            None => Err(Stop),
            Some(Err(error)) => {
                let marker = error.marker();
                // A tab that ends a scalar is noticed where the scalar began.
                let lines = [marker.line(), marker.line() + 1];
                let remedy = if lines.into_iter().any(|line| self.part.starts_with_tab(line)) {
                    "indent with spaces, not with tabs"
                } else if error.info().contains("Unicode character escape") {
                    // JSON escapes what lies beyond 16 bits in two halves; YAML knows no halves.
                    "write the character itself"
                } else {
                    "correct the syntax here"
                };
                let position = self.position(*marker);
                let message = format!("is not valid YAML: {}", error.info());
                self.problems.add(Fault::at(position, message, remedy));
                Err(Stop)
            }
        }
    }

    fn node(&mut self, event: Event<'a>, span: Span, depth: usize) -> Read<Node> {
        let position = self.position(span.start);
        let kind = match event {
            Event::Alias(_) => {
                self.refuse(position, "aliases are not allowed", "write the value out");
                NodeKind::Refused
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.refuse_decoration(position, anchor, tag.is_some());
                let style = match style {
                    ScalarStyle::Plain => Style::Plain,
                    ScalarStyle::SingleQuoted
                    | ScalarStyle::DoubleQuoted
                    | ScalarStyle::Literal
                    | ScalarStyle::Folded => Style::Quoted,
                };
                NodeKind::Scalar { text: text.into_owned(), style }
            }
            Event::SequenceStart(anchor, tag) => {
                self.refuse_decoration(position, anchor, tag.is_some());
                self.check_depth(position, depth)?;
                NodeKind::List(self.list(depth + 1)?)
            }
            Event::MappingStart(anchor, tag) => {
                self.refuse_decoration(position, anchor, tag.is_some());
                self.check_depth(position, depth)?;
                NodeKind::Map(self.map(depth + 1)?)
            }
            // The parser never gives one of these where a node belongs.
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd
            | Event::SequenceEnd
            | Event::MappingEnd => return Err(Stop),
        };
        Ok(Node { position, kind })
    }

    fn list(&mut self, depth: usize) -> Read<Vec<Node>> {
        let mut items = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::SequenceEnd {
                return Ok(items);
            }
            self.path.push(Step::Index(items.len()));
            items.push(self.node(event, span, depth)?);
            self.path.pop();
        }
    }

    fn map(&mut self, depth: usize) -> Read<Vec<Field>> {
        let mut fields: Vec<Field> = Vec::new();
        let mut seen: HashMap<String, Position> = HashMap::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::MappingEnd {
                return Ok(fields);
            }
            let key = self.node(event, span, depth)?;
            let name = self.key_name(&key);
            self.path.push(Step::Name(name.clone().unwrap_or_else(|| "?".to_owned())));
            let (event, span) = self.next()?;
            let mut value = self.node(event, span, depth)?;
            if matches!(&value.kind, NodeKind::Scalar { text, style: Style::Plain } if text.is_empty())
            {
                // A value that is not there stands where its key stands.
                value.position = key.position;
            }
            if let Some(name) = name {
                match seen.entry(name.clone()) {
                    MapEntry::Vacant(place) => {
                        place.insert(key.position);
                        fields.push(Field { name, position: key.position, value });
                    }
                    MapEntry::Occupied(first) => {
                        let message = format!("is given twice, first on line {}", first.get().line);
                        self.refuse(key.position, &message, "keep one of the two");
                    }
                }
            }
            self.path.pop();
        }
    }

    /// The name that a key spells; nothing when it was reported and its value is to be ignored.
    fn key_name(&self, key: &Node) -> Option<String> {
        match &key.kind {
            NodeKind::Scalar { text, style: Style::Plain } if text == "<<" => {
                self.refuse(key.position, "merge keys are not allowed", "write the fields out");
                None
            }
            NodeKind::Scalar { text, style: Style::Plain | Style::Quoted } if !text.is_empty() => {
                Some(text.clone())
            }
            NodeKind::Scalar { text: _, style: _ } | NodeKind::List(_) | NodeKind::Map(_) => {
                self.refuse(key.position, "a field has no plain name", "write `name: value`");
                None
            }
            NodeKind::Refused => None,
        }
    }

    fn refuse_decoration(&self, position: Position, anchor: usize, has_tag: bool) {
        if anchor != 0 {
            self.refuse(position, "anchors are not allowed", "remove the `&` and its name");
        }
        if has_tag {
            self.refuse(position, "tags are not allowed", "remove the `!` and its name");
        }
    }

    fn check_depth(&self, position: Position, depth: usize) -> Read<()> {
        if depth < MAX_DEPTH {
            return Ok(());
        }
        let message = format!("is nested deeper than {MAX_DEPTH} levels");
        self.problems.add(Fault::at(position, message, "write it flatter"));
        Err(Stop)
    }

    fn refuse(&self, position: Position, message: &str, remedy: &str) {
        let mut fault = Fault::at(position, message, remedy);
        fault.field = self.rendered_path();
        self.problems.add(fault);
    }

    fn rendered_path(&self) -> Option<String> {
        let mut rendered = String::new();
        for step in &self.path {
            match step {
                Step::Name(name) => {
                    if !rendered.is_empty() {
                        rendered.push('.');
                    }
                    rendered.push_str(&super::reader::shown_name(name));
                }
                Step::Index(index) => rendered.push_str(&format!("[{index}]")),
            }
        }
        (!rendered.is_empty()).then_some(rendered)
    }

    fn position(&self, marker: saphyr_parser::Marker) -> Position {
        self.part.place(Position { line: marker.line().max(1), column: marker.col() + 1 })
    }
}

/// Cuts the text before every line that begins a document, which YAML lets no value contain.
fn parts(text: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let mut part = Part { text, first_line: 1 };
    let mut start = 0;
    let mut line = 1;
    for (offset, begins) in line_starts(text) {
        if offset > 0 {
            line += 1;
        }
        if begins && offset > start {
            part.text = &text[start..offset];
            parts.push(part);
            part = Part { text: &text[offset..], first_line: line };
            start = offset;
        }
    }
    parts.push(part);
    parts
}

/// Where each line starts, and whether it is a `---` line.
fn line_starts(text: &str) -> impl Iterator<Item = (usize, bool)> {
    let bytes = text.as_bytes();
    let breaks = (0..bytes.len()).filter(|at| match bytes[*at] {
        b'\n' => true,
        b'\r' => bytes.get(at + 1) != Some(&b'\n'),
        _ => false,
    });
    std::iter::once(0).chain(breaks.map(|at| at + 1)).map(|start| {
        let line = &bytes[start..];
        let begins = line.starts_with(b"---")
            && matches!(line.get(3), None | Some(b' ' | b'\t' | b'\r' | b'\n'));
        (start, begins)
    })
}

/// The position right behind `text`.
fn end_position(text: &str) -> Position {
    let (line, start) = line_starts(text)
        .enumerate()
        .last()
        .map_or((1, 0), |(index, (start, _))| (index + 1, start));
    Position { line, column: text[start..].chars().count() + 1 }
}

/// The characters YAML allows unescaped, less those that only serve to deceive a reader.
fn is_printable(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r') || !is_control(c)
}

/// Whether `c` has no shape of its own but changes how other text is shown or split.
pub(super) fn is_control(c: char) -> bool {
    // Line and paragraph separators, direction marks and overrides, byte-order mark.
    c.is_control()
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{feff}')
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn is_blank(line: &str) -> bool {
    let line = line.trim_start();
    line.is_empty() || line.starts_with('#')
}

/// Whether a document holds nothing at all, as between two `---` lines.
fn is_nothing(node: &Node) -> bool {
    matches!(&node.kind, NodeKind::Scalar { text, style: Style::Plain } if text.is_empty())
}
