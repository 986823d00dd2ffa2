//! Hostile text: never a panic, never more than a bounded time, never an expansion.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

/// Far more than any text may take, also in a debug build on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn read_in_time(bytes: &[u8]) -> (Vec<Manifest>, Vec<ManifestError>) {
    let start = Instant::now();
    let read = parse_text("f", bytes, Creation::Unknown);
    let took = start.elapsed();
    assert!(took < PATIENCE, "{} bytes took {took:?}", bytes.len());
    // Every error must be printable too.
    assert!(read.1.iter().all(|error| error.to_string().starts_with("f:")));
    read
}

fn examples() -> String {
    ["scopes", "grants", "workloads"]
        .map(|name| {
            let path = repository(&format!("deploy/examples/{name}.yaml"));
            std::fs::read_to_string(path).unwrap()
        })
        .concat()
}

#[test]
fn a_billion_laughs_are_refused_one_by_one() {
    let mut text = "a0: &a0 [x, x]\n".to_owned();
    for level in 1..30 {
        text.push_str(&format!("a{level}: &a{level} [*a{0}, *a{0}, *a{0}]\n", level - 1));
    }
    let (manifests, errors) = read_in_time(text.as_bytes());
    assert!(manifests.is_empty());
    assert!(errors.iter().any(|error| error.message == "aliases are not allowed"));
}

#[test]
fn nesting_is_refused_before_it_costs_anything() {
    let size = MAX_DOCUMENT_BYTES - 1;
    for text in [
        "[".repeat(size),
        "{".repeat(size),
        "{a: ".repeat(size / 4),
        "- ".repeat(size / 2),
        "? ".repeat(size / 2),
        "[{".repeat(size / 2),
        "a:\n ".repeat(size / 4),
        "&a ".repeat(size / 3),
        "!a ".repeat(size / 3),
        "\"".repeat(size),
        "*".repeat(size),
        "%".repeat(size),
        "|".repeat(size),
        ":".repeat(size),
        "?".repeat(size),
    ] {
        let (manifests, errors) = read_in_time(text.as_bytes());
        assert!(manifests.is_empty() && !errors.is_empty(), "{}", &text[..8]);
    }
}

#[test]
fn many_small_things_take_linear_time() {
    let size = MAX_DOCUMENT_BYTES - 1000;
    for text in [
        "---\n".repeat(size / 4),
        "a\n---\n".repeat(size / 6),
        "x: y\n".repeat(size / 5),
        (0..60_000).map(|n| format!("f{n}: 1\n")).collect(),
        format!("[{}]", "a,".repeat(size / 2)),
        format!("{{{}}}", "a: b,".repeat(size / 5)),
        "\n".repeat(size),
        "\r".repeat(size),
        "# x\n".repeat(size / 4),
        format!("a: \"{}\"", "\\u0041".repeat(size / 6)),
        exec(&"/a".repeat(size / 2)),
        exec(&"*".repeat(size)),
        scope(&format!(
            "  scope: a\n  description: d\n  exec:\n{}",
            "    - path: /a\n".repeat(60_000)
        )),
        scope(&format!(
            "  scope: a\n  description: d\n  exec:\n{}",
            (0..50_000).map(|n| format!("    - path: /{n}\n")).collect::<String>()
        )),
    ] {
        read_in_time(text.as_bytes());
    }
}

#[test]
fn a_document_of_two_mebibytes_is_refused_and_the_next_one_read() {
    let text = format!("# {}\n---\n{}", "x".repeat(2 << 20), exec("/a"));
    let (manifests, errors) = read_in_time(text.as_bytes());
    assert_eq!(manifests.len(), 1);
    assert_eq!(errors.len(), 1);
    assert!(errors[0].message.ends_with("is over 1 MiB"), "{}", errors[0]);
}

#[test]
fn a_file_that_is_too_large_is_refused_as_a_whole() {
    let (manifests, errors) = read_in_time(&vec![b'\n'; MAX_FILE_BYTES + 1]);
    assert!(manifests.is_empty());
    assert_eq!(errors[0].to_string(), "f: is larger than 16 MiB; split it into several files");
}

#[test]
fn more_than_a_thousand_errors_are_cut_and_say_so() {
    let (_, errors) =
        read_in_time((0..2000).map(|n| format!("f{n}: 1\n")).collect::<String>().as_bytes());
    assert_eq!(errors.len(), 1001);
    assert_eq!(
        errors[1000].to_string(),
        "f: has more than 1000 errors; correct those that are shown first"
    );
}

#[test]
fn a_long_value_is_shown_shortened() {
    let found = errors(&exec(&"x".repeat(5000)));
    assert_eq!(found.len(), 1);
    assert!(found[0].len() < 300, "{}", found[0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        read_in_time(&bytes);
    }

    #[test]
    fn arbitrary_yaml_never_panics(text in "[-a-c:?\\[\\]{},&*!|>'\"%@`#~<=. \t\r\n0-9\u{85}\u{feff}é]{0,120}") {
        read_in_time(text.as_bytes());
    }

    #[test]
    fn a_mutated_manifest_never_panics(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 1..12),
    ) {
        let mut bytes = examples().into_bytes();
        for (place, byte, edit) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = place.index(bytes.len());
            match edit {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                2 => { bytes.remove(at); }
                _ => bytes.truncate(at.max(1)),
            }
        }
        let (manifests, errors) = read_in_time(&bytes);
        // What is left over is valid by itself, whatever was done to the rest.
        for manifest in &manifests {
            let written = manifest.to_manifest_json().to_string();
            let (again, more) = read_in_time(written.as_bytes());
            prop_assert!(more.is_empty(), "{written} {more:?} {errors:?}");
            prop_assert_eq!(again[0].to_manifest_json().to_string(), written);
        }
    }
}
