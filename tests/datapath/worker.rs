//! What runs inside a workload: reads one command a line, does it, and says how it went.

use std::{
    env, fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        linux::net::SocketAddrExt as _,
        unix::{
            self,
            net::{UnixDatagram, UnixListener, UnixStream},
            process::{CommandExt as _, ExitStatusExt as _},
        },
    },
    process::{self, Child, ChildStdin, ChildStdout, Command, Stdio},
    ptr,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::wait::WaitStatus,
    unistd::Pid,
};
use socket2::{Domain, SockAddr, Socket, Type};

const VARIABLE: &str = "AGENTGUARD_DATAPATH_WORKER";
/// What a worker's answers begin with, between the lines of the test runner.
const ANSWER: &str = "answer: ";

/// A process that does what it is told; dropped, it is killed.
pub(crate) struct Worker {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    pub(crate) fn start() -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "worker::worker", "--nocapture", "--test-threads=1"])
            .env(VARIABLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut worker = Self { child, commands, answers };
        assert_eq!(worker.told("hello"), "ok");
        worker
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it answers to a command; `killed` when it does not live to answer.
    pub(crate) fn told(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer()
    }

    pub(crate) fn tell(&mut self, command: &str) {
        // A worker that is killed is noticed by its missing answer.
        let _killed = writeln!(self.commands, "{command}");
    }

    pub(crate) fn answer(&mut self) -> String {
        let mut line = String::new();
        while self.answers.read_line(&mut line).is_ok_and(|length| length > 0) {
            if let Some((_, answer)) = line.split_once(ANSWER) {
                return answer.trim().to_owned();
            }
            line.clear();
        }
        let status = self.child.wait().unwrap();
        if status.signal() == Some(libc::SIGKILL) {
            "killed".to_owned()
        } else {
            status.to_string()
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _ended_already = self.child.wait();
    }
}

/// The worker itself. As a test it has nothing to do and passes.
#[test]
fn worker() {
    if env::var_os(VARIABLE).is_none() {
        return;
    }
    // In a thread of its own, so that the process can lose the one it began with.
    thread::spawn(obey_all).join().unwrap();
}

fn obey_all() {
    let mut flow = None;
    for line in io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let outcome = obey(&words, &mut flow);
        let answer = outcome.unwrap_or_else(|error| match error.raw_os_error() {
            Some(libc::EPERM) => "EPERM".to_owned(),
            Some(_) | None => error.to_string(),
        });
        println!("{ANSWER}{answer}");
    }
}

fn obey(words: &[&str], flow: &mut Option<Socket>) -> io::Result<String> {
    let ok = |()| "ok".to_owned();
    match words {
        ["hello"] => Ok("ok".to_owned()),
        ["connect", kind, to] => open(kind, address(to)).map(|socket| {
            *flow = Some(socket);
            "ok".to_owned()
        }),
        ["send", to] => {
            let to = address(to);
            socket("udp", to)?.send_to(b"datagram", &to.into()).map(|_length| "ok".to_owned())
        }
        ["flow"] => flow.as_ref().unwrap().send(b".").map(|_length| "ok".to_owned()),
        ["bind", at] => {
            let at = address(at);
            let socket = socket("tcp", at)?;
            socket.set_reuse_address(true)?;
            socket.bind(&at.into()).map(ok)
        }
        ["listen", at] => {
            let at = address(at);
            let socket = socket("tcp", at)?;
            socket.bind(&at.into())?;
            socket.listen(1).map(ok)
        }
        ["socket", family, kind, protocol] => {
            let [family, kind, protocol] =
                [family, kind, protocol].map(|number| number.parse::<i32>().unwrap());
            Socket::new(family.into(), kind.into(), Some(protocol.into()))
                .map(|_socket| "ok".to_owned())
        }
        ["unix-stream", name] => {
            UnixStream::connect_addr(&unix(name)?).map(|_stream| "ok".to_owned())
        }
        ["unix-datagram", name] => UnixDatagram::unbound()?
            .send_to_addr(b"datagram", &unix(name)?)
            .map(|_length| "ok".to_owned()),
        ["unix-own"] => own_unix_server().map(ok),
        ["unix-pair"] => {
            let (one, _other) = UnixDatagram::pair()?;
            one.send(b"datagram").map(|_length| "ok".to_owned())
        }
        ["take", pid, descriptor] => {
            *flow = Some(take(pid.parse().unwrap(), descriptor.parse().unwrap())?);
            Ok("ok".to_owned())
        }
        ["accept"] => flow.as_ref().unwrap().accept().map(|_accepted| "ok".to_owned()),
        ["connect-flow", to] => flow.as_ref().unwrap().connect(&address(to).into()).map(ok),
        ["raw"] => Socket::new(Domain::IPV4, Type::RAW, Some(socket2::Protocol::ICMPV4))
            .map(|_socket| "ok".to_owned()),
        ["run", path] => {
            let status = Command::new(path).stdout(Stdio::null()).stderr(Stdio::null()).status();
            // Killed before its first instruction, a child never tells that its exec went well.
            match status {
                Ok(status) if status.success() => Ok("ok".to_owned()),
                Ok(status) if status.signal() == Some(libc::SIGKILL) => Ok("killed".to_owned()),
                Ok(status) => Ok(status.to_string()),
                Err(error) => Err(error),
            }
        }
        // By this thread, which is not the one that the process began with.
        ["become", path] => Err(Command::new(path).exec()),
        ["move", cgroup] => fs::write(format!("{cgroup}/cgroup.procs"), "0").map(ok),
        ["mkdir", cgroup] => fs::create_dir(cgroup).map(ok),
        ["end-leader"] => end_leader(),
        ["threads", number] => {
            for _ in 0..number.parse::<u32>().unwrap() {
                thread::Builder::new().spawn(thread::park)?;
            }
            Ok("ok".to_owned())
        }
        ["children-leave", number, cgroup] => children_leave(number.parse().unwrap(), cgroup),
        ["clone-into", cgroup] => clone_into(cgroup),
        ["bear", threads, each] => bear(threads.parse().unwrap(), each.parse().unwrap()).map(ok),
        ["bury"] => bury().map(ok),
        ["flood", kind, threads, each] => {
            Ok(flood(*kind == "distinct", threads.parse().unwrap(), each.parse().unwrap()))
        }
        ["hammer", permitted, denied, milliseconds] => {
            let time = Duration::from_millis(milliseconds.parse().unwrap());
            hammer(address(permitted), address(denied), time)
        }
        _ => panic!("{words:?} is no command"),
    }
}

/// A path, or an abstract name behind an `@`.
fn unix(name: &str) -> io::Result<unix::net::SocketAddr> {
    match name.strip_prefix('@') {
        Some(name) => unix::net::SocketAddr::from_abstract_name(name),
        None => unix::net::SocketAddr::from_pathname(name),
    }
}

/// Serves on a name of its own, and connects there.
fn own_unix_server() -> io::Result<()> {
    let name = unix(&format!("@agentguard-worker-{}", process::id()))?;
    let _server = UnixListener::bind_addr(&name)?;
    UnixStream::connect_addr(&name).map(drop)
}

/// A copy of another process's descriptor (`pidfd_getfd(2)`).
fn take(pid: i32, descriptor: i32) -> io::Result<Socket> {
    // SAFETY: plain numbers; the descriptors they return are new ones of this process.
    unsafe {
        let process = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        if process < 0 {
            return Err(io::Error::last_os_error());
        }
        let taken = libc::syscall(libc::SYS_pidfd_getfd, process, descriptor, 0);
        let error = io::Error::last_os_error();
        libc::close(process as i32);
        if taken < 0 { Err(error) } else { Ok(Socket::from_raw_fd(taken as i32)) }
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn socket(kind: &str, to: SocketAddr) -> io::Result<Socket> {
    let kind = if kind == "tcp" { Type::STREAM } else { Type::DGRAM };
    Socket::new(Domain::for_address(to), kind, None)
}

fn open(kind: &str, to: SocketAddr) -> io::Result<Socket> {
    let socket = socket(kind, to)?;
    socket.connect_timeout(&SockAddr::from(to), Duration::from_secs(5))?;
    Ok(socket)
}

/// Ends the thread that the process began with, and waits until it is gone.
fn end_leader() -> io::Result<String> {
    extern "C" fn end_this_thread(_signal: libc::c_int) {
        // SAFETY: a plain system call, which ends the calling thread only; nothing of its stack is
        // used by another one, as they all live in closures that own what they use.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    let pid = process::id();
    // SAFETY: the handler does nothing but a system call, and the process is this one.
    unsafe {
        libc::signal(libc::SIGUSR1, end_this_thread as *const () as libc::sighandler_t);
        if libc::syscall(libc::SYS_tgkill, pid, pid, libc::SIGUSR1) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    for _ in 0..200 {
        // A leader that ended stays as a zombie until its process ends.
        if fs::read_to_string(format!("/proc/self/task/{pid}/stat"))?.contains(") Z ") {
            return Ok("ok".to_owned());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok("lives".to_owned())
}

/// Children that live all at once, and then each move to another cgroup and connect to somewhere: how many
/// were killed, refused the connect, and had it.
fn children_leave(number: usize, cgroup: &str) -> io::Result<String> {
    const REFUSED: i32 = 77;
    let procs = std::ffi::CString::new(format!("{cgroup}/cgroup.procs"))?;
    // SAFETY: zeroes are an address of no family.
    let mut nowhere: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    nowhere.sin_family = libc::AF_INET as u16;
    nowhere.sin_port = 9_u16.to_be();
    nowhere.sin_addr.s_addr = u32::from(Ipv4Addr::LOCALHOST).to_be();
    let mut children = Vec::new();
    for _ in 0..number {
        // SAFETY: the child runs on a copy and makes async-signal-safe calls only, with pointers to
        // what was made before it.
        let child = unsafe { libc::fork() };
        if child < 0 {
            return Err(io::Error::last_os_error());
        }
        if child > 0 {
            children.push(child);
            continue;
        }
        // SAFETY: as above.
        unsafe {
            libc::usleep(300_000);
            let file = libc::open(procs.as_ptr(), libc::O_WRONLY);
            libc::write(file, c"0".as_ptr().cast(), 1);
            let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
            let size = size_of_val(&nowhere) as u32;
            let connected = libc::connect(socket, (&raw const nowhere).cast(), size);
            libc::_exit(if connected == 0 { 0 } else { REFUSED });
        }
    }
    let (mut killed, mut refused, mut free) = (0, 0, 0);
    for child in children {
        let mut status = 0;
        // SAFETY: a child of this process, and room for its status.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        if libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL {
            killed += 1;
        } else if libc::WEXITSTATUS(status) == REFUSED {
            refused += 1;
        } else {
            free += 1;
        }
    }
    Ok(format!("{killed} killed, {refused} refused, {free} free"))
}

/// The children of [`bear`], and what they wait for the end of.
static BORN: Mutex<(Vec<Pid>, Option<OwnedFd>)> = Mutex::new((Vec::new(), None));

/// Children of several threads at once, on one processor, where births meet each other; they wait until
/// [`bury`].
///
/// They are processes that share this one's memory: what a fork copies takes ten times as long as all that
/// is asked of it here, which is that it calls the hooks.
fn bear(threads: usize, each: usize) -> io::Result<()> {
    let mut one = CpuSet::new();
    one.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &one)?;
    let (waits, ends) = nix::unistd::pipe()?;
    let ends_of_pipe = [waits.as_raw_fd(), ends.as_raw_fd()];
    let bear_all = || (0..each).map(|_| bear_one(ends_of_pipe)).collect::<io::Result<Vec<Pid>>>();
    let born = thread::scope(|scope| {
        let bearing: Vec<_> = (0..threads).map(|_| scope.spawn(bear_all)).collect();
        let mut born = Vec::new();
        for bearing in bearing {
            born.extend(bearing.join().unwrap()?);
        }
        io::Result::Ok(born)
    })?;
    *BORN.lock().unwrap() = (born, Some(ends));
    Ok(())
}

/// A child that waits for the end of a pipe, of which it holds only the end that it reads.
fn bear_one([reader, writer]: [RawFd; 2]) -> io::Result<Pid> {
    /// What a child does: system calls that do not fail, and so leave the memory that is not its own alone.
    /// The thread that bore it may have ended, and its `errno` with it.
    extern "C" fn wait(ends: *mut libc::c_void) -> libc::c_int {
        let ends = ends.addr();
        let (reader, writer) = (ends >> 16, ends & 0xffff);
        let mut byte = 0_u8;
        // SAFETY: a descriptor of this process's own table, and a byte of its own to be read into.
        unsafe {
            libc::syscall(libc::SYS_close, writer);
            libc::syscall(libc::SYS_read, reader, &raw mut byte, 1);
        }
        0
    }
    /// In bytes: room for a few calls.
    const STACK: usize = 16 << 10;
    // Never given back: a child may outlive whoever bore it.
    let stack = vec![0_u8; STACK].leak();
    let number = |end| usize::from(u16::try_from(end).expect("a worker has few descriptors"));
    let ends = number(reader) << 16 | number(writer);
    // SAFETY: the stack, whose top is aligned as calls ask for, is this child's alone for as long as there
    // is a process with this memory; the argument is a number.
    let child = unsafe {
        let top = stack.as_mut_ptr().add(STACK).map_addr(|address| address & !0xf);
        libc::clone(
            wait,
            top.cast(),
            libc::CLONE_VM | libc::SIGCHLD,
            ptr::without_provenance_mut(ends),
        )
    };
    if child < 0 { Err(io::Error::last_os_error()) } else { Ok(Pid::from_raw(child)) }
}

/// Has all children of [`bear`] end at once, and waits for them.
fn bury() -> io::Result<()> {
    let (born, ends) = std::mem::take(&mut *BORN.lock().unwrap());
    drop(ends);
    for child in born {
        let status = nix::sys::wait::waitpid(child, None)?;
        if status != WaitStatus::Exited(child, 0) {
            return Err(io::Error::other(format!("{status:?}")));
        }
    }
    Ok(())
}

/// A child that is born in another cgroup and waits there; how it ends, or that it lives.
fn clone_into(cgroup: &str) -> io::Result<String> {
    let directory = fs::File::open(cgroup)?;
    // SAFETY: plain numbers; zero means "not used".
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    // `CLONE_INTO_CGROUP`, for which the type that libc gives it is too small.
    arguments.flags = 0x2_0000_0000;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = directory.as_raw_fd() as u64;
    // SAFETY: like a fork: the child runs on a copy, and calls nothing but `pause` and `_exit`.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of_val(&arguments)) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        // SAFETY: async-signal-safe calls without pointers.
        unsafe {
            libc::usleep(200_000);
            libc::_exit(0);
        }
    }
    let mut status = 0;
    // SAFETY: a child of this process, and room for its status.
    unsafe { libc::waitpid(pid as i32, &raw mut status, 0) };
    let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
    Ok(if killed { "killed".to_owned() } else { "lives".to_owned() })
}

/// Refused connects from several threads at once; how many there were.
fn flood(distinct: bool, threads: u32, each: u32) -> String {
    thread::scope(|scope| {
        for number in 0..threads {
            scope.spawn(move || {
                let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                for turn in 0..each {
                    let host = if distinct { number << 20 | turn } else { 1 };
                    let host = Ipv4Addr::from(0x7f00_0000 | host & 0x00ff_ffff);
                    let refused = socket.connect((host, 9)).unwrap_err();
                    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
                }
            });
        }
    });
    (threads * each).to_string()
}

/// Connects and connected sends to what is always permitted, connects to what never is; how many
/// went the wrong way, of how many.
fn hammer(permitted: SocketAddr, denied: SocketAddr, time: Duration) -> io::Result<String> {
    let (wrong, all) = (AtomicU64::new(0), AtomicU64::new(0));
    let start = Instant::now();
    let keep_on = |attempt: &dyn Fn() -> bool| {
        while start.elapsed() < time {
            all.fetch_add(1, Ordering::Relaxed);
            if !attempt() {
                wrong.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    let refused = |outcome: io::Result<()>| {
        outcome.is_err_and(|error| error.raw_os_error() == Some(libc::EPERM))
    };
    let sockets = [(); 4].map(|()| UdpSocket::bind("127.0.0.1:0"));
    let [first, second, third, flow] = sockets;
    let (first, second, third, flow) = (first?, second?, third?, flow?);
    flow.connect(permitted)?;
    thread::scope(|scope| {
        scope.spawn(|| keep_on(&|| first.connect(permitted).is_ok()));
        scope.spawn(|| keep_on(&|| refused(second.connect(denied))));
        scope.spawn(|| keep_on(&|| third.send_to(b".", denied).is_err()));
        scope.spawn(|| keep_on(&|| flow.send(b".").is_ok()));
    });
    Ok(format!("{} of {}", wrong.into_inner(), all.into_inner()))
}
