//! What a command line runs before the workload itself decides anything: the file that was named
//! and, where that is a script, the interpreters the kernel runs in its place.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use agentguard_common::FileId;
use nix::fcntl::OFlag;

use crate::scope::ExecutablePattern;
use crate::scope::executables::Resolver;

/// Where commands are looked for when nobody says.
pub const SEARCH_PATH: &str = "/usr/local/bin:/usr/bin:/bin";
/// Interpreters of interpreters that are followed; the kernel follows five
/// (`search_binary_handler`, fs/exec.c).
const DEPTH: usize = 5;
/// `BINPRM_BUF_SIZE` of the kernel: as much of a script as it looks at.
const HEAD: usize = 256;

/// The files that running `executable` runs. `search_path` is the caller's `PATH`, for
/// `#!/usr/bin/env name`.
#[must_use]
pub fn files(executable: &Path, search_path: &str) -> Vec<PathBuf> {
    follow(executable.to_owned(), &open, &|program| find(program, search_path))
}

/// What starting a container runs: the files behind the first word of its command, and nothing for
/// one that is not there. `search_path` is the container's `PATH`.
#[must_use]
pub fn of_container(mounts: &Resolver, command: &str, search_path: &str) -> Vec<FileId> {
    let find = |program: &str| {
        let is_there = |path: &PathBuf| file_id(mounts, path).is_ok();
        if program.contains('/') {
            return Some(PathBuf::from(program));
        }
        search_path.split(':').map(|directory| Path::new(directory).join(program)).find(is_there)
    };
    let Some(executable) = find(command) else { return Vec::new() };
    let open = |path: &Path| mounts.open_file(path).ok();
    let files = follow(executable, &open, &find);
    files.iter().filter_map(|file| file_id(mounts, file).ok()).collect()
}

fn follow(
    executable: PathBuf,
    open: &dyn Fn(&Path) -> Option<File>,
    find: &dyn Fn(&str) -> Option<PathBuf>,
) -> Vec<PathBuf> {
    let mut files = vec![executable.clone()];
    let mut script = executable;
    for _ in 0..DEPTH {
        let Some((interpreter, argument)) = open(&script).and_then(interpreter) else { break };
        files.push(interpreter.clone());
        if interpreter.file_name().is_some_and(|name| name == "env")
            && let Some(program) = argument.as_deref().and_then(program_of_env)
            && let Some(found) = find(program)
        {
            files.push(found.clone());
            script = found;
        } else {
            script = interpreter;
        }
    }
    files
}

/// The files, as the kernel half knows them; what is not there is left out, since it can not run.
#[must_use]
pub fn resolve(files: &[PathBuf]) -> Vec<FileId> {
    files.iter().filter_map(|file| host_file_id(file).ok()).collect()
}

/// A file of the host, as the kernel half knows it.
///
/// # Errors
///
/// Why it is none that can be run.
fn host_file_id(path: &Path) -> Result<FileId, String> {
    let real = fs::canonicalize(path).map_err(|error| error.to_string())?;
    file_id(&Resolver::new(PathBuf::from("/")), &real)
}

/// A file of some workload's mounts, as the kernel half knows it. Symbolic links on the way lead to
/// what they lead to there.
///
/// # Errors
///
/// Why it is none that can be run.
pub fn file_id(mounts: &Resolver, path: &Path) -> Result<FileId, String> {
    let text = path.to_str().ok_or("its path is not UTF-8")?;
    let pattern: ExecutablePattern = text.parse().map_err(|error| format!("its path {error}"))?;
    let resolution = mounts.resolve(&pattern).map_err(|error| error.to_string())?;
    match (resolution.files.first(), resolution.problems.first()) {
        (Some(file), _) => Ok(file.id),
        (None, Some(problem)) => Err(problem.to_string()),
        (None, None) => Err("it is not there".to_owned()),
    }
}

/// What stands behind `#!`: the interpreter and, in one piece, its argument.
fn interpreter(script: File) -> Option<(PathBuf, Option<String>)> {
    let mut head = Vec::with_capacity(HEAD);
    if !script.metadata().ok()?.is_file() {
        return None;
    }
    script.take(HEAD as u64).read_to_end(&mut head).ok()?;
    let line = head.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?.trim();
    let (interpreter, argument) = match line.split_once([' ', '\t']) {
        Some((interpreter, argument)) => (interpreter, Some(argument.trim().to_owned())),
        None => (line, None),
    };
    (!interpreter.is_empty()).then(|| (interpreter.into(), argument))
}

/// A file of the host. The caller names it: opening a pipe or a device would wait, or do something.
fn open(script: &Path) -> Option<File> {
    if !fs::metadata(script).ok()?.is_file() {
        return None;
    }
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    File::options().read(true).custom_flags(flags).open(script).ok()
}

/// The program that `env` is asked to run: `env [-S] [NAME=VALUE…] program`.
fn program_of_env(argument: &str) -> Option<&str> {
    argument.split_whitespace().find(|word| !word.starts_with('-') && !word.contains('='))
}

fn find(program: &str, search_path: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(program.into());
    }
    search_path
        .split(':')
        .map(|directory| Path::new(directory).join(program))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_runs_its_interpreter_and_what_env_finds() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let write = |name: &str, text: &str| fs::write(path(name), text).unwrap();
        write("binary", "\u{7f}ELF");
        write("plain", &format!("#!{} -x\n", path("binary").display()));
        write("nested", &format!("#! {}\n", path("plain").display()));
        write("by-env", "#!/usr/bin/env -S A=1 binary --flag\n");
        let search_path = format!("/nowhere:{}", directory.path().display());

        assert_eq!(files(&path("binary"), ""), [path("binary")]);
        assert_eq!(files(&path("plain"), ""), [path("plain"), path("binary")]);
        assert_eq!(files(&path("nested"), ""), [path("nested"), path("plain"), path("binary")]);
        assert_eq!(
            files(&path("by-env"), &search_path),
            [path("by-env"), "/usr/bin/env".into(), path("binary")]
        );
    }

    #[test]
    fn a_pipe_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(files(&pipe, ""), [pipe]);
    }

    #[test]
    fn scripts_that_interpret_each_other_end() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("script");
        fs::write(&script, format!("#!{}\n", script.display())).unwrap();
        assert_eq!(files(&script, "").len(), DEPTH + 1);
    }
}
