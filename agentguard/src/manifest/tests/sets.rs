//! Documents together: several in a text, texts from files, names that collide, warnings.

use std::fs;

use super::*;
use crate::grant::Expiry;

fn named(kind: &str, name: &str, spec: &str) -> String {
    format!("---\n{HEAD}kind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n")
}

fn named_scope(name: &str, scope: &str) -> String {
    named("Scope", name, &format!("{{scope: '{scope}', description: d, exec: [{{path: /a}}]}}"))
}

fn named_grant(name: &str, scopes: &str) -> String {
    named(
        "Grant",
        name,
        &format!(
            "{{subject: {{spiffeId: 'spiffe://example.org/a'}}, scopes: {scopes}, \
             expiresAt: never, grantedBy: me, reason: r}}"
        ),
    )
}

#[test]
fn a_name_is_taken_once_per_kind() {
    let text = named_scope("a", "a") + &named_grant("a", "[a]") + &named_scope("a", "b");
    let (set, errors) = assemble_text(&text);
    assert_eq!(
        errors,
        ["f:14:18: metadata.name: \"a\" is the name of another Scope too, at f:2:1; \
          give each a name of its own"]
    );
    assert_eq!((set.scopes.len(), set.grants.len()), (1, 1));
}

#[test]
fn a_scope_is_defined_once() {
    let text = named_scope("a", "x:y") + &named_scope("b", "x:y");
    let (set, errors) = assemble_text(&text);
    assert_eq!(
        errors,
        ["f:10:15: spec.scope: \"x:y\" is defined at f:2:1 already; \
          give each scope a name of its own, or merge the two"]
    );
    assert_eq!(set.scopes.get(&"x:y".parse().unwrap()).unwrap().name.as_str(), "a");
}

#[test]
fn a_grant_of_an_unknown_scope_names_the_near_ones() {
    let text = named_scope("a", "github:read")
        + &named_grant("b", "['github:raed', 'slack:post', 'github:read']");
    let (set, errors) = assemble_text(&text);
    assert_eq!(
        errors,
        [
            "f:10:64: spec.scopes[0]: \"github:raed\" is a scope that no Scope defines; \
             did you mean github:read?",
            "f:10:79: spec.scopes[1]: \"slack:post\" is a scope that no Scope defines; \
             define it in a Scope, or remove it",
        ]
    );
    assert!(set.grants.is_empty());
}

#[test]
fn a_broken_document_does_not_hide_the_others() {
    let text = format!(
        "{}---\nspec: [\n{}---\n# nothing\n---\n{}",
        named_scope("a", "a"),
        named_scope("B", "b"),
        named_scope("c", "c").trim_start_matches("---\n")
    );
    let (manifests, errors) = parse_text("f", text.as_bytes(), Creation::Unknown);
    let names: Vec<_> = manifests.iter().map(Manifest::name).collect();
    assert_eq!(names, ["a", "c"]);
    let lines: Vec<_> = errors.iter().map(|error| error.position.unwrap().line).collect();
    assert_eq!(lines, [8, 11], "{errors:#?}");
    assert_eq!(manifests[1].origin().position, Position { line: 16, column: 1 });
}

#[test]
fn a_ttl_counts_from_a_known_creation() {
    let created = at("2026-01-01T00:00:00Z");
    let read = |times: &str| parse_text("f", grant(times).as_bytes(), Creation::At(created));
    let (manifests, errors) = read("  ttl: 1d12h\n");
    assert_eq!(errors, []);
    let [Manifest::Grant(grant)] = manifests.as_slice() else { panic!("{manifests:?}") };
    assert_eq!(grant.document.expiry, Expiry::At(at("2026-01-02T12:00:00Z")));

    let (_, errors) = read("  notBefore: 2026-01-01T08:00:00Z\n  ttl: 8h\n");
    assert_eq!(
        errors[0].to_string(),
        "f:8:8: spec.ttl: \"8h\" is not after notBefore (2026-01-01T08:00:00Z), so the grant \
         would never permit anything; write a later time"
    );
    let (_, errors) = read("");
    assert_eq!(
        errors[0].to_string(),
        "f:5:3: spec: has neither expiresAt nor ttl; write exactly one of them"
    );
}

#[test]
fn json_line_endings_byte_order_mark_and_comments_do_not_matter() {
    let text = named_scope("a", "a:b");
    let expected = accepted(&text);
    let document = |text: &str| match accepted(text).as_slice() {
        [Manifest::Scope(scope)] => scope.document.clone(),
        other => panic!("{other:?}"),
    };
    let Manifest::Scope(scope) = &expected[0] else { panic!("{expected:?}") };
    let json = scope.document.to_manifest_json();
    let pretty = serde_json::to_string_pretty(&json).unwrap();
    for same in [
        text.replace('\n', "\r\n"),
        text.replace('\n', "\r"),
        format!("\u{feff}{text}"),
        format!("# comment\n{text}# comment"),
        format!("{text}...\n"),
        json.to_string(),
        pretty.clone(),
        pretty.replace("  ", "\t"),
        pretty.replace('\n', "\r\n"),
    ] {
        assert_eq!(document(&same), scope.document, "{same:?}");
    }
    let crlf = errors(&cidr("x").replace('\n', "\r\n"));
    assert_eq!(crlf, errors(&cidr("x")));
}

#[test]
fn a_text_without_documents_is_empty_and_valid() {
    for text in ["", "\n", "---\n---\n", "# only a comment\n", "\u{feff}", "--- # x\n...\n"] {
        assert!(accepted(text).is_empty(), "{text:?}");
    }
}

#[test]
fn text_that_is_not_utf_8_is_refused_where_it_begins() {
    let (_, errors) = parse_text("f", b"a: b\nc: \xff\xfe", Creation::Unknown);
    assert_eq!(errors[0].to_string(), "f:2:4: is not UTF-8 from here on; save it as UTF-8");
}

#[test]
fn far_reaching_rules_and_standing_or_past_grants_are_warned_of() {
    let now = at("2030-01-01T00:00:00Z");
    let lines = |text: &str| -> Vec<String> {
        warnings(&accepted(text), now).iter().map(ToString::to_string).collect()
    };
    let none: [&str; 0] = [];
    assert_eq!(lines(&grant("  expiresAt: 2030-01-01T00:00:01Z\n")), none);
    assert_eq!(
        lines(&grant("  expiresAt: 2029-01-01T00:00:00Z\n")),
        ["f:7:14: spec.expiresAt: \"2029-01-01T00:00:00Z\" is in the past, so the grant is over; \
          remove the grant, or give it a later time"]
    );
    assert_eq!(
        lines(&grant("  expiresAt: never\n")),
        ["f:7:14: spec.expiresAt: \"never\" makes this a standing grant, which only revocation \
          ends; write a time unless that is meant"]
    );
    assert_eq!(
        lines(&cidr("'::/0'")),
        ["f:9:27: spec.egress[0].to[0].ipBlock.cidr: \"::/0\" covers 64:ff9b::/96 and 2002::/16, \
          whose addresses are judged by the IPv4 address inside them; \
          add an ipBlock for those IPv4 addresses if they are meant"]
    );
    for (block, count) in [
        ("64:ff9b::/95", 1),
        ("64:ff9b::/96", 0),
        ("64:ff9b::c000:200/120", 0),
        ("2002::/16", 1),
        ("2002:c000::/24", 1),
        ("2002:c000:201::/48", 0),
        ("2001:db8::/32", 0),
    ] {
        assert_eq!(lines(&cidr(&format!("'{block}'"))).len(), count, "{block}");
    }
    assert_eq!(
        lines(&exec("/**")),
        ["f:8:13: spec.exec[0].path: \"/**\" permits every executable; \
          name the directories that are meant"]
    );
    assert_eq!(
        lines(&workload("cgroup: /*", "spiffe://example.org/a", "enforce")),
        ["f:5:20: spec.select.cgroup: \"/*\" restricts services of the host too, as it begins \
          with `*`; begin with the name of a slice"]
    );
}

#[test]
fn a_directory_gives_its_manifests_in_order_and_unreadable_paths_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("b.yml"), named_scope("b", "b")).unwrap();
    fs::write(path("a.yaml"), named_scope("a", "a")).unwrap();
    fs::write(path("c.json"), accepted(&named_scope("c", "c"))[0].to_manifest_json().to_string())
        .unwrap();
    fs::write(path("notes.txt"), "not a manifest").unwrap();
    fs::write(path(".hidden.yaml"), "not a manifest").unwrap();
    fs::create_dir(path("d.yaml")).unwrap();

    let paths = [directory.path().to_owned(), path("absent.yaml")];
    let (manifests, errors) = parse_paths(&paths);
    let names: Vec<_> = manifests.iter().map(Manifest::name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert_eq!(errors.len(), 1);
    assert!(errors[0].to_string().contains("absent.yaml: cannot be read: "), "{}", errors[0]);
}

#[test]
fn a_file_without_manifests_is_warned_of() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.yaml");
    fs::write(&path, "# nothing yet\n").unwrap();
    let report = check(&[path], at("2030-01-01T00:00:00Z"));
    assert_eq!(report.errors, []);
    assert!(
        report.warnings[0]
            .to_string()
            .ends_with("a.yaml: holds no manifest; write one, or remove the file")
    );
}

#[test]
fn the_examples_are_valid() {
    let report = check(&[repository("deploy/examples")], at("2026-11-22T00:00:00Z"));
    assert_eq!(report.errors, []);
    let Counts { files, scopes, grants, standing_grants, workloads } = report.counts;
    for count in [files, scopes, grants, standing_grants, workloads] {
        assert!(count > 0, "{:?}", report.counts);
    }
    assert_eq!(report.warnings.len(), standing_grants, "{:#?}", report.warnings);
    for warning in &report.warnings {
        assert!(warning.to_string().contains("standing grant"), "{warning}");
    }
}

#[test]
fn json_escapes_are_understood_except_halves_of_characters() {
    let json = accepted(&named_scope("a", "a"))[0].to_manifest_json().to_string();
    let with = |text: &str| json.replace("\"d\"", &format!("\"{text}\""));
    let manifests = accepted(&with("\\u00e9 \\/ \\\""));
    let [Manifest::Scope(scope)] = manifests.as_slice() else { panic!("{manifests:?}") };
    assert_eq!(scope.document.description, "é / \"");
    assert!(errors(&with("\\ud83d\\ude00"))[0].ends_with("; write the character itself"));
}
