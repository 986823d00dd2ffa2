//! E7: so many at once that one gets through.

use std::{
    ffi::CString,
    fs,
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use crate::{
    outcome::{Attempt, Failure},
    payload::{Forbidden, environment, execute, text},
};

/// How long a storm lasts.
const STORM: Duration = Duration::from_millis(1000);
/// Attempts that are enough.
const ATTEMPTS: u32 = 400;
const THREADS: usize = 16;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    forbidden: Forbidden,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// A thread that is not the first one of its process.
    Thread,
    /// Many threads of one process at once.
    Threads,
    /// Children that share the memory until they run it, one after the other.
    Vfork,
    /// The same from many threads at once.
    VforkThreads,
    /// A child that shares everything but the process itself.
    Clone,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let forbidden = &arguments.forbidden;
    forbidden.run(|line| match exec(forbidden, arguments.how, line) {
        Ok(never) => match never {},
        Err(failure) => failure,
    })
}

fn exec(
    forbidden: &Forbidden,
    how: How,
    line: &[CString],
) -> Result<std::convert::Infallible, Failure> {
    let path = text(&forbidden.program)?;
    Err(match how {
        How::Thread => {
            let (program, line) = (forbidden.program.clone(), line.to_vec());
            thread::spawn(move || execute(&program, &line))
                .join()
                .map_err(|_| Failure::unfit("the thread panicked"))?
        }
        How::Threads => {
            let together = Arc::new(Barrier::new(THREADS));
            let threads: Vec<_> = (0..THREADS)
                .map(|_| {
                    let (program, line) = (forbidden.program.clone(), line.to_vec());
                    let together = Arc::clone(&together);
                    thread::spawn(move || {
                        together.wait();
                        execute(&program, &line)
                    })
                })
                .collect();
            let mut last = Failure::unfit("no thread");
            for thread in threads {
                last = thread.join().map_err(|_| Failure::unfit("a thread panicked"))?;
            }
            last
        }
        How::Vfork => return storm(forbidden, &path, line, libc::CLONE_VM | libc::CLONE_VFORK),
        How::Clone => {
            let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FS | libc::CLONE_FILES;
            return storm(forbidden, &path, line, flags);
        }
        How::VforkThreads => {
            let threads: Vec<_> = (0..THREADS)
                .map(|_| {
                    let (path, line) = (path.clone(), line.to_vec());
                    thread::spawn(move || born_to_run(&path, &line, STORM))
                })
                .collect();
            for thread in threads {
                thread.join().map_err(|_| Failure::unfit("a thread panicked"))??;
            }
            outcome(forbidden)
        }
    })
}

fn storm(
    forbidden: &Forbidden,
    path: &CString,
    line: &[CString],
    flags: i32,
) -> Result<std::convert::Infallible, Failure> {
    let deadline = Instant::now() + STORM;
    for _ in 0..ATTEMPTS {
        if Instant::now() > deadline {
            break;
        }
        one(path, line, flags)?;
    }
    Err(outcome(forbidden))
}

fn born_to_run(path: &CString, line: &[CString], lasts: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + lasts;
    for _ in 0..ATTEMPTS {
        if Instant::now() > deadline {
            break;
        }
        one(path, line, libc::CLONE_VM | libc::CLONE_VFORK)?;
    }
    Ok(())
}

/// Whether one of them got through. Those that did end like the payload, and the storm with them.
fn outcome(forbidden: &Forbidden) -> Failure {
    if fs::exists(&forbidden.token).unwrap_or(false) {
        // As the program itself ends.
        // SAFETY: `_exit` takes any number and only ends the process.
        unsafe { libc::_exit(0) }
    }
    Failure::refused("none of the storm ran")
}

/// What a child of [`one`] needs, all of it made beforehand.
struct Plan {
    path: *const libc::c_char,
    arguments: *const *const libc::c_char,
    environment: *const *const libc::c_char,
}

extern "C" fn child(plan: *mut libc::c_void) -> i32 {
    // SAFETY: the parent waits with what the plan points to until this child has run or ended.
    unsafe {
        let plan = &*plan.cast::<Plan>();
        libc::execve(plan.path, plan.arguments, plan.environment);
        libc::_exit(1)
    }
}

/// One child, waited for.
fn one(path: &CString, line: &[CString], flags: i32) -> Result<(), Failure> {
    let environment = environment();
    let pointers = |texts: &[CString]| -> Vec<*const libc::c_char> {
        texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(line), pointers(&environment));
    let mut plan = Plan {
        path: path.as_ptr(),
        arguments: arguments.as_ptr(),
        environment: environment.as_ptr(),
    };
    let mut stack = vec![0_u128; 4096];
    // SAFETY: the child runs on a stack of its own, touches only what the plan points to, and the
    // caller is stopped until it has run another program or ended.
    let pid = unsafe {
        libc::clone(
            child,
            stack.as_mut_ptr_range().end.cast(),
            flags | libc::SIGCHLD,
            (&raw mut plan).cast(),
        )
    };
    if pid < 0 {
        return Err(Failure::setup("clone", std::io::Error::last_os_error()));
    }
    let mut status = 0;
    // SAFETY: the status outlives the call.
    if unsafe { libc::waitpid(pid, &raw mut status, 0) } < 0 {
        return Err(Failure::setup("waitpid", std::io::Error::last_os_error()));
    }
    Ok(())
}
