//! A virtual machine that runs one job and ends.
//!
//! Its one job is to start QEMU and the server of the host's files, to hand on line by line what
//! the job says, and to tell how it ended. It knows nothing of tests. Each machine is one call on
//! one thread; machines share nothing but the host's files, which they only read.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    image::{self, Job, Manager},
    kernels::Kernel,
};
use crate::{
    interrupt,
    run::{output, which},
};

pub(super) const QEMU: &str = "qemu-system-x86_64";

/// What QEMU warns of because the processor it shows is not wholly emulated; of no matter.
const NO_MATTER: &str = "TCG doesn't support requested feature";

/// What the tests take, in MiB.
pub(super) const MEMORY: u32 = 2048;

/// How long the probe of an accelerator may take; a boot takes a tenth of it.
const PROBE: Duration = Duration::from_secs(20);

/// How the processor comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    Kvm,
    /// Emulated.
    Tcg,
}

impl Accelerator {
    const fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // A processor that is quick with `rep movsb` has the kernel copy and clear by it, which an emulator
            // does byte by byte: without, starting programs takes a quarter less.
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "Haswell-v4,-erms"],
        }
    }

    /// What this adds to the kernel's command line. The processor that is shown has the faults of the real
    /// one, and what the kernel does against them (a flush of the translations at each system call, above
    /// all) makes emulation half as slow again, for nobody: who attacks an emulated processor attacks QEMU.
    const fn parameters(self) -> &'static str {
        match self {
            Self::Kvm => "",
            Self::Tcg => "mitigations=off",
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "hardware acceleration (kvm)",
            Self::Tcg => "emulation (tcg)",
        }
    }
}

/// What a machine is given.
#[derive(Clone, Debug)]
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Kernel,
    /// Added to the kernel's command line.
    pub(super) parameters: &'a str,
    pub(super) accelerator: Accelerator,
    /// Serves the host's files.
    pub(super) virtiofsd: &'a Path,
    /// Of memory, in MiB.
    pub(super) memory: u32,
    /// After this it is switched off.
    pub(super) limit: Duration,
    /// Where what the kernel says is kept.
    pub(super) console: PathBuf,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// The job's exit code; `None`: the machine ended before it.
    pub(super) code: Option<i32>,
    /// What the job wrote to its descriptor 3.
    pub(super) report: String,
    pub(super) took: Duration,
}

/// A process that ends with its owner.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _status = self.0.wait();
    }
}

impl Machine<'_> {
    /// Boots it, runs the job, and hands each line that it says to `say`.
    ///
    /// # Errors
    ///
    /// A machine cannot be started, or the run was interrupted. How a job ended is no error here.
    pub(super) fn run(&self, job: &Job<'_>, mut say: impl FnMut(&str)) -> Result<Ended> {
        let begin = Instant::now();
        let scratch = tempfile::tempdir()?;
        let file = |name: &str| scratch.path().join(name);
        let initrd = file("initrd");
        image::write(self.kernel, job, &initrd)?;
        let (socket, report) = (file("files"), file("report"));
        let _files = serve_files(self.virtiofsd, &socket)?;
        let errors = file("qemu");

        let mut qemu = Command::new(QEMU);
        qemu.args(["-M", "q35", "-smp", "2", "-no-reboot", "-nodefaults"])
            .args(["-m", &self.memory.to_string()])
            .args(["-display", "none"])
            .args(self.accelerator.arguments())
            .arg("-object")
            .arg(format!("memory-backend-memfd,id=memory,size={}M,share=on", self.memory))
            .args(["-numa", "node,memdev=memory"])
            .arg("-kernel")
            .arg(self.kernel.image())
            .arg("-initrd")
            .arg(&initrd)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet panic=-1 no_timer_check {} {}",
                self.accelerator.parameters(),
                self.parameters
            ))
            .arg("-serial")
            .arg(format!("file:{}", self.console.display()))
            .arg("-chardev")
            .arg(format!("socket,id=files,path={}", socket.display()))
            .args(["-device", "vhost-user-fs-pci,chardev=files,tag=host"])
            .args(["-device", "virtio-serial-pci"])
            .args(["-chardev", "stdio,id=said,signal=off"])
            .args(["-device", "virtserialport,chardev=said,name=said"])
            .arg("-chardev")
            .arg(format!("file,id=report,path={}", report.display()))
            .args(["-device", "virtserialport,chardev=report,name=report"])
            // A standard input that stays open: at its end QEMU would hang up on the job.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&errors)?);
        let mut qemu = Server(qemu.spawn().context("QEMU cannot be started")?);
        let said = qemu.0.stdout.take().context("QEMU has no standard output")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(said).split(b'\n').map_while(Result::ok) {
                let text = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if sender.send(text).is_err() {
                    return;
                }
            }
        });
        let mut in_time = true;
        loop {
            interrupt::check()?;
            match lines.recv_timeout(Duration::from_millis(200)) {
                Ok(line) => say(&line),
                Err(RecvTimeoutError::Timeout) if begin.elapsed() > self.limit => {
                    say(&format!("vm: not done after {} s, switched off", self.limit.as_secs()));
                    in_time = false;
                    break;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        drop(qemu);

        let mut report = fs::read_to_string(&report).unwrap_or_default();
        let last = report.trim_end().rfind('\n').map_or(0, |at| at + 1);
        let code = report[last..].trim().strip_prefix("ended ").and_then(|code| code.parse().ok());
        if code.is_some() {
            report.truncate(last);
        } else {
            if in_time {
                say("vm: the machine ended before its job");
            }
            for line in fs::read_to_string(&errors).unwrap_or_default().lines() {
                if !line.contains(NO_MATTER) {
                    say(&format!("vm: {line}"));
                }
            }
            let console = fs::read(&self.console).unwrap_or_default();
            let console = String::from_utf8_lossy(&console);
            let lines: Vec<_> = console.lines().collect();
            for line in &lines[lines.len().saturating_sub(40)..] {
                say(&format!("console: {line}"));
            }
        }
        Ok(Ended { code, report, took: begin.elapsed() })
    }
}

/// Serves the host's files until it is dropped.
///
/// A machine keeps what it has read: with any other policy it reads a program anew each time that one
/// is started, and an emulated processor then translates it anew, which takes twenty times as long.
/// What changes on the host meanwhile, a machine need not see: a build makes new files.
fn serve_files(program: &Path, socket: &Path) -> Result<Server> {
    let mut command = Command::new(program);
    command.arg(format!("--socket-path={}", socket.display()));
    // The one that came with QEMU takes its options as file systems do; the one that replaced it,
    // as programs do.
    if speaks_for_itself(program) {
        command.args([
            "--shared-dir=/",
            "--sandbox=chroot",
            "--announce-submounts",
            "--cache=always",
        ]);
    } else {
        command.args(["-o", "source=/,cache=always,sandbox=chroot,announce_submounts"]);
    }
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("{}: cannot be started", program.display()))?;
    let mut server = Server(child);
    for _ in 0..100 {
        if socket.exists() {
            return Ok(server);
        }
        if let Some(status) = server.0.try_wait()? {
            bail!("{}: {status}; the host's files cannot be shared", program.display());
        }
        thread::sleep(Duration::from_millis(50));
    }
    bail!("{}: serves nothing", program.display())
}

/// Whether it is the program of its own that QEMU no longer ships.
fn speaks_for_itself(program: &Path) -> bool {
    output(Command::new(program).arg("--help")).is_ok_and(|help| help.contains("--shared-dir"))
}

/// The accelerator that boots a stock kernel here. That `/dev/kvm` is there does not tell: a boot
/// does. It is tried once for each boot of this machine.
///
/// # Errors
///
/// Not even the emulation boots.
pub(super) fn probe(kernel: &Kernel, virtiofsd: &Path, cache: &Path) -> Result<Accelerator> {
    let remembered = cache.join("accelerator");
    let this_boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let known = fs::read_to_string(&remembered).unwrap_or_default();
    if let Some(works) = known.strip_prefix(&this_boot) {
        return Ok(if works == "kvm" { Accelerator::Kvm } else { Accelerator::Tcg });
    }
    let accelerator = if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        Accelerator::Tcg
    } else {
        let machine = Machine {
            kernel,
            parameters: "",
            accelerator: Accelerator::Kvm,
            virtiofsd,
            memory: MEMORY,
            limit: PROBE,
            console: cache.join("probe.console"),
        };
        let job = Job { script: "exit 0", manager: Manager::None, visible: &[] };
        let ended = machine.run(&job, |_| {})?;
        if ended.code == Some(0) { Accelerator::Kvm } else { Accelerator::Tcg }
    };
    let word = match accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg",
    };
    fs::write(&remembered, format!("{this_boot}{word}"))?;
    Ok(accelerator)
}

/// Where the server of files may be, beside `PATH`.
pub(super) fn find_virtiofsd(cache: &Path) -> Option<PathBuf> {
    let kept = cache.join("virtiofsd/usr/lib/qemu/virtiofsd");
    ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"]
        .map(PathBuf::from)
        .into_iter()
        .chain([kept])
        .find(|path| path.is_file())
        .or_else(|| which("virtiofsd"))
}

/// That QEMU is one that boots present kernels: version 7.2 corrupts those from 6.12 on.
///
/// # Errors
///
/// It is missing or too old.
pub(super) fn check_qemu() -> Result<String> {
    let said = output(Command::new(QEMU).arg("--version"))?;
    let version = said
        .split_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1)
        .with_context(|| format!("{QEMU} does not tell its version"))?;
    let major: u32 = version.split('.').next().unwrap_or_default().parse()?;
    ensure!(major >= 8, "{QEMU} {version} does not boot present kernels reliably; 8 or newer does");
    Ok(version.to_owned())
}
