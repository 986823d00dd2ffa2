//! The reference: one page for each thing that people write or read.
//!
//! Its one job is to choose what is said in which order. Everything that can change with the
//! program comes from the types; what stands here as text is what no type says. No state, no side
//! effects.

use clap::{Arg, ArgAction, Command};
use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::page::{Page, code, sentence};
use super::schema::{Field, fields, tag};
use crate::audit::record::Record;
use crate::{config, manifest, metrics};

/// Every page, by the name of its file.
pub(super) fn pages(command_line: Command) -> Vec<(&'static str, String)> {
    vec![
        ("manifests.md", manifests()),
        ("configuration.md", configuration()),
        ("audit-records.md", audit_records()),
        ("metrics.md", metrics()),
        ("cli.md", cli(command_line)),
    ]
}

fn manifests() -> String {
    let mut page = Page::new("Manifests");
    page.paragraph(
        "A manifest is a YAML document of one of four kinds. A file may hold several, each after \
         a line `---`. The daemon reads every `.yaml` and `.yml` file of its manifests directory \
         and watches it. A document that is not valid changes nothing that is enforced: \
         `agentguard check` and `agentguard status` say what is wrong with it, with file, line \
         and remedy.",
    );
    page.paragraph(
        "In a Kubernetes cluster, Scope, Grant and ClusterGrant are custom resources of the same \
         form (`deploy/helm/agentguard/crds`). There a Grant has a namespace, and may name \
         subjects of this namespace only; its errors, and what each node has in force, are in its \
         status. Nodes, pods, services and the API server are never covered by an `ipBlock` that \
         is wider than one address: a scope reaches them by `service`, by selectors, or by an \
         `ipBlock` of exactly the address.",
    );
    page.paragraph(
        "`required` means: by the object that the field is in. The schemas are in \
         `deploy/schemas`.",
    );
    for (_, schema) in manifest::schema::schemas() {
        let kind = schema["title"].as_str().unwrap_or_default();
        page.heading(2, kind);
        page.paragraph(schema["description"].as_str().unwrap_or_default());
        let rows: Vec<_> = fields(&schema)
            .into_iter()
            .map(|field| {
                let required = if field.required { "yes" } else { "no" };
                [code(&field.path), field.holds, required.into(), field.meaning]
            })
            .collect();
        page.table(["field", "type", "required", "meaning"], &rows);
    }
    page.finish()
}

fn configuration() -> String {
    let mut page = Page::new("Configuration");
    page.paragraph(&format!(
        "The daemon reads {} if it is there, or the file that `--config` or `AGENTGUARD_CONFIG` \
         names. Every key may be left out. A key that is not known, or a value that can not be \
         meant, is refused at start with line, column and remedy. The file with every key at its \
         default is `deploy/agentguard.yaml`.",
        code(config::DEFAULT_PATH)
    ));
    let rows: Vec<_> = config::describe()
        .into_iter()
        .map(|key| [code(&key.path), code(&key.default), sentence(&key.meaning)])
        .collect();
    page.table(["key", "default", "meaning"], &rows);
    page.finish()
}

fn audit_records() -> String {
    let mut page = Page::new("Audit records");
    page.paragraph(
        "The audit log has one JSON object on each line. Names and meanings are stable: a field \
         is never renamed or given another meaning, new ones may be added. Every key is always \
         present; what is not known, or does not apply, is `null`.",
    );
    page.paragraph(
        "Each line holds the hash of the line before it, so that a line that was changed, taken \
         out or put in shows: `agentguard audit verify FILE` checks the chain.",
    );
    let schema = audit_schema();
    let mut common = schema.clone();
    let variants = common.as_object_mut().and_then(|object| object.remove("oneOf"));
    page.heading(2, "In every record");
    let mut rows = rows(fields(&common));
    // The kinds stand below; here only their names.
    if let Some((name, words)) = tag(&schema) {
        let words = words.into_iter().map(code).collect::<Vec<_>>().join(", ");
        let meaning = "What happened, which says the other fields.".to_owned();
        let at = rows.iter().position(|[path, ..]| path == "`prev`").unwrap_or(rows.len());
        rows.insert(at, [code(name), words, meaning]);
        page.table(["field", "type", "meaning"], &rows);
        for variant in variants.as_ref().and_then(Value::as_array).into_iter().flatten() {
            let word = variant["properties"][name]["const"].as_str().unwrap_or_default();
            page.heading(2, &code(word));
            page.paragraph(variant["description"].as_str().unwrap_or_default());
            let fields = fields(variant).into_iter().filter(|field| field.path != name).collect();
            page.table(["field", "type", "meaning"], &self::rows(fields));
        }
    }
    page.finish()
}

fn audit_schema() -> Value {
    let settings =
        SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<Record>().to_value()
}

fn rows(fields: Vec<Field>) -> Vec<[String; 3]> {
    fields.into_iter().map(|field| [code(&field.path), field.holds, field.meaning]).collect()
}

fn metrics() -> String {
    let mut page = Page::new("Metrics");
    page.paragraph(
        "The daemon serves them in the text format of Prometheus at `/metrics`, on the address \
         `metrics.listen`. No label is ever an address, a path or a process, and the number of \
         workload identities that get a label of their own is bounded by \
         `metrics.max_identities`. Counters start from zero when the daemon does.",
    );
    let metrics = metrics::describe();
    let rows: Vec<_> = metrics
        .iter()
        .map(|metric| {
            let labels: Vec<_> = metric.labels.iter().map(|label| code(label.name)).collect();
            [
                code(metric.name),
                metric.kind.as_str().to_owned(),
                labels.join(", "),
                metric.help.to_owned(),
            ]
        })
        .collect();
    page.table(["metric", "type", "labels", "meaning"], &rows);
    page.heading(2, "Labels");
    let labels: Vec<_> = metrics
        .iter()
        .flat_map(|metric| {
            metric
                .labels
                .iter()
                .map(|label| [code(metric.name), code(label.name), label.values.to_owned()])
        })
        .collect();
    page.table(["metric", "label", "values"], &labels);
    page.finish()
}

fn cli(mut command_line: Command) -> String {
    command_line.build();
    let mut page = Page::new("Command line");
    page.paragraph(&sentence(&text(command_line.get_about())));
    page.code("text", &usage(&command_line));
    let shown = |command: &&Command| !command.is_hide_set() && command.get_name() != "help";
    let rows: Vec<_> = command_line
        .get_subcommands()
        .filter(shown)
        .map(|command| [link(command), sentence(&text(command.get_about()))])
        .collect();
    page.table(["command", "meaning"], &rows);
    page.heading(2, "With every command");
    arguments(&mut page, &command_line, |argument| argument.is_global_set());
    page.heading(2, "Exit status");
    page.paragraph(&text(command_line.get_after_help()).replace("Exit status: ", ""));
    for command in command_line.get_subcommands().filter(shown) {
        subcommand(&mut page, 2, command);
    }
    page.finish()
}

fn subcommand(page: &mut Page, level: usize, command: &Command) {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    page.heading(level, &code(name));
    let about = command.get_long_about().or(command.get_about());
    let about = about.map(ToString::to_string).unwrap_or_default();
    for part in about.split("\n\n") {
        page.paragraph(&sentence(part));
    }
    page.code("text", &usage(command));
    arguments(page, command, |argument| !argument.is_global_set());
    for below in command.get_subcommands().filter(|command| command.get_name() != "help") {
        subcommand(page, level + 1, below);
    }
}

/// The table of the arguments that `shown` picks.
fn arguments(page: &mut Page, command: &Command, shown: fn(&Arg) -> bool) {
    let rows: Vec<_> = command
        .get_arguments()
        .filter(|argument| shown(argument) && !argument.is_hide_set())
        .filter(|argument| !["help", "version"].contains(&argument.get_id().as_str()))
        .map(|argument| [code(&spelling(argument)), meaning(argument)])
        .collect();
    page.table(["argument", "meaning"], &rows);
}

/// How an argument is written.
fn spelling(argument: &Arg) -> String {
    let value = || {
        let names = argument.get_value_names().unwrap_or_default();
        names.iter().map(|name| format!("<{name}>")).collect::<Vec<_>>().join(" ")
    };
    let takes_value = argument.get_action().takes_values();
    let flag = match (argument.get_short(), argument.get_long()) {
        (Some(short), Some(long)) => format!("-{short}, --{long}"),
        (Some(short), None) => format!("-{short}"),
        (None, Some(long)) => format!("--{long}"),
        (None, None) => return value(),
    };
    if takes_value { format!("{flag} {}", value()) } else { flag }
}

/// What an argument means, with what it can be and what it is when left out.
fn meaning(argument: &Arg) -> String {
    let mut said = sentence(&text(argument.get_long_help().or(argument.get_help())));
    let is_switch = matches!(argument.get_action(), ArgAction::SetTrue | ArgAction::Count);
    let words: Vec<_> = argument
        .get_possible_values()
        .iter()
        .filter(|value| !value.is_hide_set())
        .map(|value| code(value.get_name()))
        .collect();
    if !words.is_empty() && !is_switch {
        said += &format!(" One of {}.", words.join(", "));
    }
    let defaults: Vec<_> =
        argument.get_default_values().iter().map(|value| code(&value.to_string_lossy())).collect();
    if !defaults.is_empty() && !is_switch {
        said += &format!(" Default: {}.", defaults.join(", "));
    }
    if let Some(variable) = argument.get_env() {
        said += &format!(" Also by the variable {}.", code(&variable.to_string_lossy()));
    }
    said
}

fn usage(command: &Command) -> String {
    let usage = command.clone().render_usage().to_string();
    usage.strip_prefix("Usage: ").unwrap_or(&usage).to_owned()
}

fn link(command: &Command) -> String {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    format!("[`{name}`](#{})", name.replace(' ', "-"))
}

fn text(styled: Option<&clap::builder::StyledStr>) -> String {
    styled.map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_field_of_a_manifest_and_of_an_audit_record_has_a_meaning() {
        let schemas = manifest::schema::schemas().into_iter().map(|(_, schema)| schema);
        let meaningless: Vec<_> = schemas
            .chain([audit_schema()])
            .flat_map(|schema| fields(&schema))
            .filter(|field| field.meaning.is_empty())
            .map(|field| field.path)
            .collect();
        assert_eq!(meaningless, Vec::<String>::new());
    }

    #[test]
    fn every_command_and_argument_has_a_meaning() {
        let page = cli(Cli::command());
        let empty: Vec<_> = page.lines().filter(|line| line.ends_with("|  |")).collect();
        assert_eq!(empty, Vec::<&str>::new());
    }

    #[test]
    fn every_kind_of_record_has_a_part_of_its_own() {
        let page = audit_records();
        for kind in ["verdict", "start", "stop", "grant", "workload", "loss", "rotated"] {
            assert!(page.contains(&format!("\n## `{kind}`\n")), "{kind}");
        }
    }
}
