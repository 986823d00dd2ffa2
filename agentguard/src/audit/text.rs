//! Makes text that others chose safe to write down.
//!
//! Paths, names and messages reach the audit log from processes that want to mislead its reader.
//! [`Text`] is the only way such text gets into a record: nothing in it can end a line, move a
//! cursor, reorder what stands beside it, or fill the disk. Must not know what the text means.

use std::borrow::Cow;
use std::fmt::{self, Write};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Text that is safe to print, in at most [`Text::MAX_BYTES`] bytes.
///
/// Printable characters stand for themselves, except that a backslash is doubled. What is not
/// printable is written `\xNN` (a control character below 0x80, or a byte that is not UTF-8) or
/// `\u{N}` (any other character that is invisible or changes the direction of text). Text that was
/// too long ends in `\[+N bytes]`, N being how many bytes of the original are missing. A backslash
/// of the original is always doubled, so none of these can be forged.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Text(String);

impl Text {
    /// Longest escaped text, in bytes, without the mark that says how much is missing.
    pub const MAX_BYTES: usize = 1024;

    /// Escapes and bounds `raw`.
    #[must_use]
    pub fn new(raw: impl AsRef<[u8]>) -> Self {
        let raw = raw.as_ref();
        let mut text = String::with_capacity(raw.len().min(Self::MAX_BYTES));
        let mut kept = 0;
        for chunk in raw.utf8_chunks() {
            let characters =
                chunk.valid().chars().map(|character| (character.len_utf8(), escape(character)));
            let bytes =
                chunk.invalid().iter().map(|byte| (1, Cow::Owned(format!("\\x{byte:02x}"))));
            for (length, escaped) in characters.chain(bytes) {
                if text.len() + escaped.len() > Self::MAX_BYTES {
                    // Writing to a string does not fail.
                    let _ = write!(text, "\\[+{} bytes]", raw.len() - kept);
                    return Self(text);
                }
                text.push_str(&escaped);
                kept += length;
            }
        }
        Self(text)
    }

    /// The escaped text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As many of `items` as [`Text::MAX_ITEMS`] allows; the last one says how many are missing.
    pub fn list<T: AsRef<[u8]>>(items: impl IntoIterator<Item = T>) -> Vec<Self> {
        let mut items = items.into_iter();
        let mut list: Vec<Self> = items.by_ref().take(Self::MAX_ITEMS).map(Self::new).collect();
        let missing = items.count();
        if missing > 0 {
            list.push(Self(format!("\\[+{missing} items]")));
        }
        list
    }

    /// Longest list of texts in a record.
    pub const MAX_ITEMS: usize = 16;
}

impl fmt::Display for Text {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl From<&str> for Text {
    fn from(raw: &str) -> Self {
        Self::new(raw)
    }
}

impl From<String> for Text {
    fn from(raw: String) -> Self {
        Self::new(raw)
    }
}

impl JsonSchema for Text {
    fn schema_name() -> Cow<'static, str> {
        "Text".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "Escaped text: `\\\\` is a backslash, `\\xNN` a byte, `\\u{N}` a \
                            character that would not show, a final `\\[+N bytes]` what was cut.",
        })
    }
}

/// How a character is written.
fn escape(character: char) -> Cow<'static, str> {
    match character {
        '\\' => "\\\\".into(),
        '\0'..='\x1f' | '\x7f' => format!("\\x{:02x}", character as u32).into(),
        character if misleads(character) => format!("\\u{{{:x}}}", character as u32).into(),
        character => character.to_string().into(),
    }
}

/// Whether a character does not show, or changes how its neighbours show.
fn misleads(character: char) -> bool {
    matches!(
        character,
        // C1 controls: some terminals take them for escape sequences.
        '\u{80}'..='\u{9f}'
            // Invisible: soft hyphen, joiners, fillers, byte order mark, invisible operators.
            | '\u{ad}'
            | '\u{34f}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffc}'
            // Direction: marks, embeddings, overrides and isolates.
            | '\u{61c}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            // Tags and variation selectors, which can hide a text inside another.
            | '\u{e0000}'..='\u{e0fff}'
            // Private use: shows differently everywhere.
            | '\u{e000}'..='\u{f8ff}'
            | '\u{f0000}'..='\u{10ffff}'
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_would_mislead_a_reader_is_spelled_out() {
        for (raw, escaped) in [
            (&b"/usr/bin/git"[..], "/usr/bin/git"),
            ("/home/\u{e9}mile/\u{65e5}\u{672c}".as_bytes(), "/home/\u{e9}mile/\u{65e5}\u{672c}"),
            (b"a\nb\r\tc\0", "a\\x0ab\\x0d\\x09c\\x00"),
            (b"\x1b[31mred\x1b[0m\x7f", "\\x1b[31mred\\x1b[0m\\x7f"),
            (b"\xff\xfe\xc3(", "\\xff\\xfe\\xc3("),
            ("gpj.\u{202e}exe".as_bytes(), "gpj.\\u{202e}exe"),
            (
                "a\u{200b}b\u{feff}\u{e0041}\u{9b}".as_bytes(),
                "a\\u{200b}b\\u{feff}\\u{e0041}\\u{9b}",
            ),
            (br"\x0a", r"\\x0a"),
        ] {
            assert_eq!(Text::new(raw).as_str(), escaped);
        }
    }

    #[test]
    fn long_text_is_cut_and_says_by_how_much() {
        let text = Text::new("a".repeat(Text::MAX_BYTES + 7));
        assert!(text.as_str().ends_with("a\\[+7 bytes]"));
        let text = Text::new(b"\xff".repeat(Text::MAX_BYTES));
        let kept = Text::MAX_BYTES / 4;
        assert!(text.as_str().ends_with(&format!("\\xff\\[+{} bytes]", Text::MAX_BYTES - kept)));
        assert_eq!(Text::new("a".repeat(Text::MAX_BYTES)).as_str().len(), Text::MAX_BYTES);
    }

    #[test]
    fn long_lists_are_cut_and_say_by_how_much() {
        let list = Text::list((0..100).map(|number| number.to_string()));
        assert_eq!(list.len(), Text::MAX_ITEMS + 1);
        assert_eq!(list[Text::MAX_ITEMS].as_str(), "\\[+84 items]");
    }

    proptest! {
        #[test]
        fn any_bytes_become_short_printable_text(raw in prop::collection::vec(any::<u8>(), 0..3000)) {
            let text = Text::new(&raw);
            prop_assert!(text.as_str().len() <= Text::MAX_BYTES + 32);
            prop_assert!(text.as_str().chars().all(|c| !c.is_control() && !misleads(c)));
        }

        #[test]
        fn text_that_was_not_cut_can_be_told_apart(a in ".{0,80}", b in ".{0,80}") {
            prop_assert_eq!(a == b, Text::new(&a) == Text::new(&b));
        }
    }
}
