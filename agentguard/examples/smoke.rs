use agentguard::allowlist::*;
use agentguard::datapath::*;
use agentguard_common::abi::Settings;
use agentguard_common::*;
fn main() {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let t = std::time::Instant::now();
    let o = Options {
        pin_directory: "/sys/fs/bpf/agkernel".into(),
        sizes: Sizes::default(),
        settings: Settings { aggregation_window: 1_000_000_000, ..Default::default() },
    };
    let rt = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let _g = rt.enter();
    let mut d = Datapath::open(&o).unwrap();
    println!("open {:?} adopted {}", t.elapsed(), d.adopted());
    for p in aya::programs::loaded_programs().flatten() {
        println!("{:?} verified {:?}", p.name_as_str(), p.verified_instruction_count());
    }
    for (door, s) in d.states() {
        println!("{} {:?}", door.hook, s);
    }
    let cg = std::path::Path::new("/sys/fs/cgroup/unified/agkernel");
    std::fs::create_dir_all(cg).unwrap();
    let exe = |p: &str| {
        use std::os::unix::fs::MetadataExt;
        let m = std::fs::metadata(p).unwrap();
        FileId {
            inode: m.ino(),
            device: ((libc_major(m.dev())) << 20) | libc_minor(m.dev()),
            generation: 0,
        }
    };
    fn libc_major(d: u64) -> u32 {
        nix::sys::stat::major(d) as u32
    }
    fn libc_minor(d: u64) -> u32 {
        nix::sys::stat::minor(d) as u32
    }
    let permits = vec![Permit {
        scope: ScopeId(1),
        grant: GrantId(1),
        expires_at: allowlist::NEVER,
        egress: vec![EgressPermit {
            blocks: vec![Block { cidr: "127.0.0.1/32".parse().unwrap(), except: vec![] }],
            ports: vec![PortRange { protocol: Protocol::Tcp, first: 8000, last: 8100 }],
        }],
        executables: vec![exe("/bin/bash"), exe("/usr/bin/curl"), exe("/bin/sh")],
        listening: vec![],
    }];
    let c = compile::compile(&permits).unwrap();
    let rows = c.rows(AllowlistId(1), RuleSetId(1)).unwrap();
    d.load_allowlist(&rows).unwrap();
    d.switch(
        WorkloadId(1),
        Tag::new(IdentityId(1), Mode::Enforce, AllowlistId(1), rows.listening, 1),
    )
    .unwrap();
    println!("cg {:?} {:?}", d.capture(cg, WorkloadId(1)).unwrap(), t.elapsed());
    let mut rings = d.rings().unwrap();
    let out = std::process::Command::new("/bin/bash").arg("-c").arg("echo $$ > /sys/fs/cgroup/unified/agkernel/cgroup.procs; curl -sS -m 2 http://127.0.0.1:8080/; curl -sS -m 2 http://127.0.0.1:9090/; ls /; curl -sS -m 2 http://[::1]:8000; (echo $BASHPID > /sys/fs/cgroup/unified/cgroup.procs; echo escaped) ; echo end").output().unwrap();
    println!(
        "{:?}\n{}\n{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    rings.drain(1000, |r| match r {
        Ok(kernel_record) => {
            let e = kernel_record.event();
            println!(
                "{:?} v{} hook{} kind{} {:?}:{} pid{} folded{}",
                e.key.workload,
                e.verdict,
                e.hook,
                e.kind,
                e.address().ip(),
                e.key.port,
                e.pid,
                e.folded
            )
        }
        Err(e) => println!("{e}"),
    });
    let c = d.counters(1).unwrap();
    println!("{} = {} + {} + {}", c.decided(), c.logged, c.aggregated, c.lost);
    for x in c.iter() {
        println!("{x:?}");
    }
    println!("removed {:?}", uninstall(&o.pin_directory));
    std::fs::remove_dir(cg).unwrap();
}
