//! The default file, and the same for the reference: every key with its meaning and default,
//! generated from the types.
//!
//! Meanings come from the schema, that is from doc comments; values and their order come from
//! [`Configuration::default`]. Must not know any key by name.

use std::fmt;

use schemars::generate::SchemaSettings;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::Configuration;

/// Longest line of a comment, in characters.
const WIDTH: usize = 100;

/// A configuration file that says what holds without one.
#[must_use]
pub fn default_file() -> String {
    let schema = schema();
    let mut file = String::new();
    comment(&mut file, "", &schema);
    comment_text(&mut file, "", "Every key may be left out; what stands here is its default.");
    section(&mut file, "", &schema, &defaults());
    file
}

/// What the reference says about a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// From the top, as `api.socket`.
    pub path: String,
    /// As it is written in the file.
    pub default: String,
    /// What it is for.
    pub meaning: String,
}

/// Every key that has a value, in the order of the default file.
#[must_use]
pub fn describe() -> Vec<Key> {
    let mut found = Vec::new();
    describe_section("", &schema(), &defaults(), &mut found);
    found
}

fn describe_section(path: &str, schema: &Value, keys: &[(String, Ordered)], found: &mut Vec<Key>) {
    for (key, value) in keys {
        let schema = &schema["properties"][key];
        match value {
            Ordered::Keys(keys) => {
                describe_section(&format!("{path}{key}."), schema, keys, found);
            }
            Ordered::Value(value) => found.push(Key {
                path: format!("{path}{key}"),
                default: plain(value),
                meaning: schema["description"].as_str().unwrap_or_default().to_owned(),
            }),
        }
    }
}

fn schema() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.inline_subschemas = true;
    settings.into_generator().into_root_schema_for::<Configuration>().to_value()
}

fn defaults() -> Vec<(String, Ordered)> {
    // Our own types serialise, and what JSON serialises reads back.
    let values = serde_json::to_string(&Configuration::default())
        .and_then(|values| serde_json::from_str(&values));
    match values {
        Ok(Ordered::Keys(keys)) => keys,
        Ok(Ordered::Value(_)) => unreachable!("the configuration is an object"),
        Err(error) => unreachable!("the defaults are of the kinds that `Ordered` reads: {error}"),
    }
}

/// As YAML needs it: plain where that is unmistakable.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn section(file: &mut String, indent: &str, schema: &Value, keys: &[(String, Ordered)]) {
    for (key, value) in keys {
        let schema = &schema["properties"][key];
        if indent.is_empty() {
            file.push('\n');
        }
        comment(file, indent, schema);
        match value {
            Ordered::Keys(keys) => {
                file.push_str(&format!("{indent}{key}:\n"));
                section(file, &format!("{indent}  "), schema, keys);
            }
            Ordered::Value(value) => {
                let line = format!("{indent}{key}: {value}\n");
                match value.as_array().filter(|_| line.chars().count() > WIDTH) {
                    None => file.push_str(&line),
                    Some(items) => {
                        file.push_str(&format!("{indent}{key}:\n"));
                        for item in items {
                            file.push_str(&format!("{indent}  - {item}\n"));
                        }
                    }
                }
            }
        }
    }
}

fn comment(file: &mut String, indent: &str, schema: &Value) {
    if let Some(description) = schema["description"].as_str() {
        comment_text(file, indent, description);
    }
}

fn comment_text(file: &mut String, indent: &str, text: &str) {
    let mut line = format!("{indent}#");
    for word in text.split_whitespace() {
        if line.chars().count() + 1 + word.chars().count() > WIDTH {
            file.push_str(&line);
            file.push('\n');
            line = format!("{indent}#");
        }
        line.push(' ');
        line.push_str(word);
    }
    file.push_str(&line);
    file.push('\n');
}

/// JSON whose keys keep their order.
enum Ordered {
    Keys(Vec<(String, Ordered)>),
    Value(Value),
}

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Ordered;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object, a list, a word, a number, true, false or nothing")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered, A::Error> {
                let mut keys = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    keys.push(entry);
                }
                Ok(Ordered::Keys(keys))
            }

            fn visit_str<E>(self, word: &str) -> Result<Ordered, E> {
                // As YAML needs it: plain where that is unmistakable.
                Ok(Ordered::Value(word.into()))
            }

            fn visit_bool<E>(self, is: bool) -> Result<Ordered, E> {
                Ok(Ordered::Value(is.into()))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Ordered, E> {
                Ok(Ordered::Value(number.into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Ordered, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = list.next_element::<Value>()? {
                    values.push(value);
                }
                Ok(Ordered::Value(Value::Array(values)))
            }

            fn visit_unit<E>(self) -> Result<Ordered, E> {
                Ok(Ordered::Value(Value::Null))
            }
        }

        deserializer.deserialize_any(Any)
    }
}
