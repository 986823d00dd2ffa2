//! `agentguard generate` and `agentguard completions`: what the program writes about itself.
//!
//! Its one job is the list of documents and their places, which mirror the repository. Each is
//! made from the types that the program itself reads and writes by, so that none can say anything
//! else: [`mod@reference`] makes the pages, [`schema`] and [`page`] their tables.

mod page;
mod reference;
mod schema;

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::Shell;
use serde_json::Value;

use super::exit::{Exit, Failure};
use super::{Cli, Context, Result};
use crate::{api, config, manifest};

/// Write every generated document below a directory
#[derive(Debug, Args)]
#[command(hide = true)]
pub(super) struct Arguments {
    directory: PathBuf,
}

/// Write completions for a shell
#[derive(Debug, Args)]
#[command(hide = true)]
pub(super) struct Completions {
    shell: Shell,
}

pub(super) fn run(arguments: &Arguments, _: Context<'_, '_>) -> Result {
    let failed = |path: &Path, error: &std::io::Error| {
        Failure::new(Exit::Failed, format!("{} can not be written: {error}", path.display()))
            .with_remedy("name a directory that can be written to")
    };
    for (path, content) in documents() {
        let path = arguments.directory.join(path);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(|error| failed(directory, &error))?;
        }
        fs::write(&path, content).map_err(|error| failed(&path, &error))?;
    }
    let manual = arguments.directory.join("man");
    fs::create_dir_all(&manual)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), &manual))
        .map_err(|error| failed(&manual, &error))?;
    Ok(Exit::Done)
}

pub(super) fn completions(arguments: &Completions, context: Context<'_, '_>) -> Result {
    context.console.out.write_all(&completions_of(arguments.shell))?;
    Ok(Exit::Done)
}

fn completions_of(shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "agentguard", &mut text);
    text
}

/// Every document but the manual pages, by its path in the repository.
fn documents() -> Vec<(PathBuf, Vec<u8>)> {
    let mut documents: Vec<(PathBuf, Vec<u8>)> = manifest::schema::schemas()
        .into_iter()
        .map(|(name, schema)| (Path::new("deploy/schemas").join(name), json(&schema)))
        .collect();
    documents.push(("deploy/openapi.json".into(), json(&api::openapi::openapi())));
    documents.push(("deploy/agentguard.yaml".into(), config::default_file().into_bytes()));
    for (name, text) in reference::pages(Cli::command()) {
        documents.push((Path::new("docs/reference").join(name), text.into_bytes()));
    }
    for shell in Shell::value_variants() {
        let name = format!("completions/agentguard.{shell}");
        documents.push((name.into(), completions_of(*shell)));
    }
    documents
}

/// As it is kept in the repository: indented, with a newline at the end.
fn json(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}
