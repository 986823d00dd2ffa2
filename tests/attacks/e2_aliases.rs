//! E2: run a file that is not granted by an alias of it, or in the place of one that is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    outcome::{Attempt, Failure},
    own_mounts::{bind, mount_new, unshare_mounts},
    payload::{Forbidden, execute},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    forbidden: Forbidden,
    /// A program that is granted by its path.
    #[arg(long)]
    granted: PathBuf,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// A second name for the same file.
    HardLink,
    /// The file, mounted over a granted one.
    BindMount,
    /// A copy of the file, renamed over a granted one.
    Rename,
    /// The granted program behind an overlay, in which it is rewritten.
    OverlayCopyUp,
    /// The file, seen through a second mount of its file system.
    SecondMount,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    arguments.forbidden.run(|line| match alias(arguments) {
        Ok(path) => execute(path, line),
        Err(failure) => failure,
    })
}

/// Makes the alias and gives its path.
fn alias(arguments: &Arguments) -> Result<PathBuf, Failure> {
    let Arguments { forbidden, granted, how } = arguments;
    match how {
        How::HardLink => {
            let link = forbidden.scratch("innocent");
            fs::hard_link(&forbidden.program, &link)
                .map_err(|error| Failure::at(link.display(), error))?;
            Ok(link)
        }
        How::BindMount => {
            unshare_mounts()?;
            bind(&forbidden.program, granted)?;
            Ok(granted.clone())
        }
        How::Rename => {
            // Beside the granted one: a rename does not cross file systems.
            let copy = granted.with_extension("new");
            forbidden.copy_to(&copy)?;
            fs::rename(&copy, granted).map_err(|error| Failure::at(granted.display(), error))?;
            Ok(granted.clone())
        }
        How::OverlayCopyUp => overlay(forbidden, granted),
        How::SecondMount => second_mount(forbidden),
    }
}

fn overlay(forbidden: &Forbidden, granted: &Path) -> Result<PathBuf, Failure> {
    let (lower, name) = granted.parent().zip(granted.file_name()).ok_or_else(|| {
        Failure::unfit(format!("{} is no file in a directory", granted.display()))
    })?;
    let [upper, work, merged] = ["upper", "work", "merged"].map(|name| forbidden.scratch(name));
    for directory in [&upper, &work, &merged] {
        fs::create_dir(directory).map_err(|error| Failure::setup(directory.display(), error))?;
    }
    unshare_mounts()?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    mount_new(Path::new("overlay"), &merged, "overlay", Some(&options))?;
    let inside = merged.join(name);
    forbidden.copy_to(&inside)?;
    // Where it was, the name stands for the rewritten file from now on.
    bind(&merged, lower)?;
    Ok(granted.to_path_buf())
}

fn second_mount(forbidden: &Forbidden) -> Result<PathBuf, Failure> {
    let mount = mount_of(&forbidden.program)?;
    let again = forbidden.scratch("again");
    fs::create_dir(&again).map_err(|error| Failure::setup(again.display(), error))?;
    unshare_mounts()?;
    mount_new(&mount.source, &again, &mount.kind, None)?;
    Ok(again.join(mount.path_inside))
}

/// The mount that holds a file.
struct Mount {
    source: PathBuf,
    kind: String,
    /// The file's path from the root of its file system, without the leading slash.
    path_inside: PathBuf,
}

fn mount_of(file: &Path) -> Result<Mount, Failure> {
    let table = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| Failure::setup("/proc/self/mountinfo", error))?;
    table
        .lines()
        .filter_map(|line| {
            let (first, second) = line.split_once(" - ")?;
            let mut first = first.split(' ').skip(3);
            let (root, point) = (first.next()?, first.next()?);
            let mut second = second.split(' ');
            let (kind, source) = (second.next()?, second.next()?);
            let below = file.strip_prefix(point).ok()?;
            let path = Path::new(root).join(below);
            let inside = path.strip_prefix("/").ok()?.to_path_buf();
            let mount = Mount { source: source.into(), kind: kind.to_owned(), path_inside: inside };
            Some((Path::new(point).components().count(), mount))
        })
        // The innermost; of several on one point, the last covers the others.
        .max_by_key(|(depth, _)| *depth)
        .map(|(_, mount)| mount)
        .ok_or_else(|| Failure::unfit(format!("no mount holds {}", file.display())))
}
