//! From a JSON Schema to the rows of a table.
//!
//! Its one job is to lay a nested document out flat, one row for each field with its whole path,
//! in the order of the type. It reads what `schemars` writes of our own types, inlined; it must
//! not know any field by name. No state, no side effects.

use serde_json::{Map, Value};

use super::page::{code, sentence};

/// One field of a document.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// From the root, as `spec.egress[].ports`.
    pub(super) path: String,
    /// What it holds, for a reader.
    pub(super) holds: String,
    /// Whether the object it is in must have it.
    pub(super) required: bool,
    pub(super) meaning: String,
}

/// Every field of the object that `schema` describes.
pub(super) fn fields(schema: &Value) -> Vec<Field> {
    let mut found = Vec::new();
    object("", schema, &mut found);
    found
}

/// Whether a document of this form is one of several, told apart by a field with a fixed word;
/// gives the words.
pub(super) fn tag(schema: &Value) -> Option<(&str, Vec<&str>)> {
    let variants = schema["oneOf"].as_array()?;
    let (name, _) = variants
        .first()?
        .get("properties")?
        .as_object()?
        .iter()
        .find(|(_, property)| property.get("const").is_some())?;
    let words = variants.iter().map(|variant| variant["properties"][name]["const"].as_str());
    Some((name, words.collect::<Option<_>>()?))
}

fn object(path: &str, schema: &Value, found: &mut Vec<Field>) {
    if let Some(variants) = schema["oneOf"].as_array() {
        alternatives(path, schema, variants, found);
    }
    for (name, property) in in_order(schema) {
        let required = is_required(schema, name);
        field(&join(path, name), property, required, found);
    }
}

/// The fields of all variants, each once; where not all have it, it says which do.
fn alternatives(path: &str, schema: &Value, variants: &[Value], found: &mut Vec<Field>) {
    let tag = tag(schema);
    if let Some((name, _)) = &tag {
        let words = variants.iter().map(|variant| {
            meaning_of_word(&variant["properties"][name]["const"], &variant["description"])
        });
        found.push(Field {
            path: join(path, name),
            holds: "one of the words".into(),
            required: true,
            meaning: words.collect::<Vec<_>>().join("<br>"),
        });
    }
    let mut seen: Vec<&str> = Vec::new();
    for variant in variants {
        for (name, property) in in_order(variant) {
            let is_tag = tag.as_ref().is_some_and(|(tag, _)| tag == name);
            if is_tag || seen.contains(&name.as_str()) {
                continue;
            }
            seen.push(name);
            let at = found.len();
            field(&join(path, name), property, is_required(variant, name), found);
            let Some(first) = found.get_mut(at) else { continue };
            if first.meaning.is_empty() {
                first.meaning = sentence(variant["description"].as_str().unwrap_or_default());
            }
            match &tag {
                Some((tag, words)) => {
                    let having = words.iter().zip(variants);
                    let having: Vec<_> = having
                        .filter(|(_, variant)| variant["properties"].get(name).is_some())
                        .map(|(word, _)| code(word))
                        .collect();
                    if having.len() < variants.len() {
                        first.meaning += &format!(" With {tag} {}.", having.join(", "));
                    }
                }
                None => {
                    let names = variants.iter().flat_map(in_order);
                    let names: Vec<_> = names.map(|(name, _)| code(name)).collect();
                    if names.len() > 1 {
                        first.meaning += &format!(" Exactly one of {}.", names.join(", "));
                    }
                }
            }
        }
    }
}

fn field(path: &str, schema: &Value, required: bool, found: &mut Vec<Field>) {
    let mut meaning = sentence(schema["description"].as_str().unwrap_or_default());
    let within = &schema["items"];
    if meaning.is_empty() {
        meaning = sentence(within["description"].as_str().unwrap_or_default());
    }
    for words in words_with_meaning(schema) {
        meaning += &format!(" {words}");
    }
    let meaning = meaning.trim().to_owned();
    found.push(Field { path: path.to_owned(), holds: holds(schema), required, meaning });
    object_unless_words(path, schema, found);
    if within.is_object() {
        object_unless_words(&format!("{path}[]"), within, found);
    }
}

fn object_unless_words(path: &str, schema: &Value, found: &mut Vec<Field>) {
    if words(schema).is_empty() {
        object(path, schema, found);
    }
}

/// The type of a value, in words.
fn holds(schema: &Value) -> String {
    let words = words(schema);
    let or_null = if is_nullable(schema) { ", or null" } else { "" };
    if !words.is_empty() {
        return words.iter().map(|word| code(word)).collect::<Vec<_>>().join(", ") + or_null;
    }
    let name = match first_type(schema) {
        Some("string") => "text".into(),
        Some("integer" | "number") => number(schema),
        Some("boolean") => "`true`, `false`".into(),
        Some("array") => format!("list of {}", plural(&holds(&schema["items"]))),
        _ => "object".into(),
    };
    name + or_null
}

/// A number, with its range where that is narrower than what its type can hold.
fn number(schema: &Value) -> String {
    match (schema["minimum"].as_u64(), schema["maximum"].as_u64()) {
        (Some(minimum), Some(maximum)) => format!("number, {minimum} to {maximum}"),
        (Some(minimum), None) if minimum > 0 => format!("number from {minimum}"),
        (Some(_) | None, None | Some(_)) => "number".into(),
    }
}

fn plural(name: &str) -> String {
    match name {
        "object" => "objects".into(),
        "text" => "texts".into(),
        other => other.into(),
    }
}

/// The fixed words that a value can be.
fn words(schema: &Value) -> Vec<&str> {
    let listed = schema["enum"].as_array().into_iter().flatten();
    let consts = schema["oneOf"].as_array().into_iter().flatten().flat_map(|variant| {
        let inner = variant["enum"].as_array().into_iter().flatten();
        variant.get("const").into_iter().chain(inner)
    });
    listed.chain(consts).chain(schema.get("const")).filter_map(Value::as_str).collect()
}

/// Fixed words that have a meaning of their own.
fn words_with_meaning(schema: &Value) -> Vec<String> {
    let variants = schema["oneOf"].as_array().into_iter().flatten();
    variants
        .filter(|variant| variant.get("const").is_some() && variant.get("description").is_some())
        .map(|variant| meaning_of_word(&variant["const"], &variant["description"]))
        .collect()
}

fn meaning_of_word(word: &Value, meaning: &Value) -> String {
    let word = code(word.as_str().unwrap_or_default());
    match meaning.as_str() {
        Some(meaning) => format!("{word}: {}", sentence(meaning)),
        None => word,
    }
}

fn is_nullable(schema: &Value) -> bool {
    schema["type"].as_array().is_some_and(|types| types.iter().any(|name| name == "null"))
}

fn first_type(schema: &Value) -> Option<&str> {
    let types = &schema["type"];
    types.as_str().or_else(|| types.as_array()?.iter().find_map(Value::as_str))
}

fn is_required(schema: &Value, name: &str) -> bool {
    required(schema).any(|required| required == name)
}

fn required(schema: &Value) -> impl Iterator<Item = &str> {
    schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// What an object must have, in the order of the type, then the rest by name.
fn in_order(schema: &Value) -> Vec<(&String, &Value)> {
    let empty = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&empty);
    let mut found: Vec<_> = required(schema)
        .filter_map(|name| schema["properties"].as_object()?.get_key_value(name))
        .collect();
    for (name, _) in properties {
        let entry = schema["properties"].as_object().and_then(|all| all.get_key_value(name));
        found.extend(entry.filter(|(name, _)| !is_required(schema, name)));
    }
    found
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn field(path: &str, holds: &str, required: bool, meaning: &str) -> Field {
        Field { path: path.into(), holds: holds.into(), required, meaning: meaning.into() }
    }

    #[test]
    fn nested_fields_have_their_whole_path_and_required_ones_come_first() {
        let schema = json!({
            "type": "object",
            "required": ["z"],
            "properties": {
                "a": {"type": ["integer", "null"], "minimum": 1, "maximum": 9, "description": "A"},
                "z": {"type": "array", "description": "Z", "items": {
                    "type": "object", "properties": {"b": {"enum": ["x", "y"], "type": "string"}}
                }},
            },
        });
        assert_eq!(
            fields(&schema),
            [
                field("z", "list of objects", true, "Z."),
                field("z[].b", "`x`, `y`", false, ""),
                field("a", "number, 1 to 9, or null", false, "A."),
            ]
        );
    }

    #[test]
    fn fields_of_some_variants_say_of_which() {
        let variant = |word: &str, property: &str| {
            json!({
                "description": word.to_uppercase(), "type": "object", "required": ["kind", "all", property],
                "properties": {
                    "kind": {"const": word, "type": "string"},
                    "all": {"type": "boolean", "description": "All"},
                    property: {"type": "string", "description": "One"},
                },
            })
        };
        let schema = json!({"oneOf": [variant("a", "left"), variant("b", "right")]});
        assert_eq!(
            fields(&schema),
            [
                field("kind", "one of the words", true, "`a`: A.<br>`b`: B."),
                field("all", "`true`, `false`", true, "All."),
                field("left", "text", true, "One. With kind `a`."),
                field("right", "text", true, "One. With kind `b`."),
            ]
        );
    }
}
