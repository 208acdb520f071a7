//! The harness: labs, programs in guests, and the counters that prove what carried their bytes.
//!
//! Each test has a lab of its own, up when it is made and down when it goes, also when the test panics. Nothing sleeps
//! for a condition that can be looked at: [`wait_until`] looks.
#![allow(dead_code)] // each test file uses its part

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Long enough for whatever takes a moment, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(15);
/// A program that has not ended by then hangs.
pub const PROGRAM: Duration = Duration::from_secs(90);

/// How two guests lie to each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Path {
    /// Guests a and b.
    SameHost,
    /// Guests a and c.
    CrossHost,
    /// Guests a and b, which share no memory.
    Relayed,
}

impl Path {
    /// The guest with the server; the client is in guest a.
    pub fn server(self) -> &'static str {
        match self {
            Self::SameHost | Self::Relayed => "b",
            Self::CrossHost => "c",
        }
    }

    /// The lane that its connections belong on.
    pub fn lane(self) -> &'static str {
        match self {
            Self::SameHost => "direct",
            Self::CrossHost | Self::Relayed => "fabric",
        }
    }
}

/// A guest's IPv4 address and a port.
pub fn v4(guest: &str, port: u16) -> SocketAddr {
    format!("198.51.100.{}:{port}", number(guest)).parse().unwrap()
}

/// A guest's IPv6 address and a port.
pub fn v6(guest: &str, port: u16) -> SocketAddr {
    format!("[2001:db8:100::{}]:{port}", number(guest)).parse().unwrap()
}

fn number(guest: &str) -> u8 {
    match guest {
        "a" | "d" => 1,
        "b" => 2,
        "c" | "e" => 3,
        other => panic!("no guest {other}"),
    }
}

/// Looks until it holds, and panics with `what` when it has not after `limit`.
pub fn wait_until(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Looks until it is there, as [`wait_until`] does.
pub fn wait_for<T>(limit: Duration, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let mut value = None;
    wait_until(limit, what, || {
        value = found();
        value.is_some()
    });
    value.unwrap_or_else(|| unreachable!("waited until it was some"))
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Where this profile's programs are: `target/release`.
pub fn profile_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("a test knows where it is");
    exe.ancestors().nth(2).expect("a test lies in target/PROFILE/deps").to_owned()
}

/// A program of `tests/programs`.
pub fn example(name: &str) -> String {
    let file = profile_dir().join("examples").join(name);
    assert!(file.exists(), "{} is missing: cargo build --examples -p vsocket-tests", file.display());
    file.into_os_string().into_string().expect("a path in UTF-8")
}

/// A lab, down when it is dropped.
pub struct Lab {
    /// Its name, which its namespaces begin with.
    pub name: String,
    bin: PathBuf,
    logs: PathBuf,
    started: AtomicU32,
}

impl Lab {
    /// A lab with its daemons.
    pub fn up(test: &str) -> Self {
        Self::up_with(test, &[])
    }

    /// The lab that a path needs.
    pub fn up_for(test: &str, path: Path) -> Self {
        Self::up_with(test, if path == Path::Relayed { &["--relay"] } else { &[] })
    }

    fn up_with(test: &str, options: &[&str]) -> Self {
        let lab = Self::prepare(test);
        for file in ["vsocketd", "vsocket", "libvsocket.so"] {
            let file = lab.bin.join(file);
            assert!(file.exists(), "{} is missing: cargo build --release --workspace", file.display());
        }
        lab.must(&[&["up"], options].concat());
        lab
    }

    /// Only the networks.
    pub fn plain(test: &str) -> Self {
        let lab = Self::prepare(test);
        lab.must(&["up", "--no-vsocket"]);
        lab
    }

    fn prepare(test: &str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "needs root, for network namespaces: run it with sudo");
        static LAST: AtomicU32 = AtomicU32::new(0);
        let name = format!("t{}n{}", std::process::id(), LAST.fetch_add(1, Ordering::Relaxed));
        let logs = profile_dir().parent().expect("target").join("test-logs").join(test);
        let _ = fs::remove_dir_all(&logs);
        fs::create_dir_all(&logs).expect("a directory for logs under target");
        let bin = std::env::var_os("VSOCKET_BIN").map_or_else(profile_dir, PathBuf::from);
        Self { name, bin, logs, started: AtomicU32::new(0) }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(root().join("scripts/lab"));
        command.args(args).env("LAB", &self.name).env("VSOCKET_BIN", &self.bin).stdin(Stdio::null());
        command
    }

    /// `scripts/lab ARGS`.
    pub fn lab(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("scripts/lab")
    }

    /// `scripts/lab ARGS`, which must succeed; what it prints.
    pub fn must(&self, args: &[&str]) -> String {
        let output = self.lab(args);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "lab {args:?}: {}\n{out}{err}", output.status);
        out.into_owned()
    }

    /// `lab kill backend h1` and the like.
    pub fn daemon(&self, verb: &str, role: &str, name: &str) {
        self.must(&[verb, role, name]);
    }

    /// The lab's files: configurations, sockets, certificates.
    pub fn state(&self) -> PathBuf {
        let state = self.status()["state"].as_str().expect("a state directory").to_owned();
        state.into()
    }

    /// `lab status --json`.
    pub fn status(&self) -> Value {
        serde_json::from_str(&self.must(&["status", "--json"])).expect("JSON of lab status")
    }

    /// All daemons that run: role, name, pid.
    pub fn daemons(&self) -> Vec<(String, String, u32)> {
        let status = self.status();
        let text = |daemon: &Value, key: &str| daemon[key].as_str().unwrap_or_default().to_owned();
        let daemons = status["daemons"].as_array().expect("daemons").iter();
        daemons
            .filter_map(|d| Some((text(d, "role"), text(d, "name"), u32::try_from(d["pid"].as_u64()?).ok()?)))
            .collect()
    }

    /// The pid of a daemon.
    pub fn pid(&self, role: &str, name: &str) -> u32 {
        let found = self.daemons().into_iter().find(|(r, n, _)| r == role && n == name);
        found.unwrap_or_else(|| panic!("{role} {name} does not run")).2
    }

    /// What a daemon has logged.
    pub fn log(&self, role: &str, name: &str) -> String {
        fs::read_to_string(self.state().join(format!("log/{role}-{name}.log"))).unwrap_or_default()
    }

    // ------------------------------------------------------------ programs

    /// Starts a program accelerated in a guest.
    pub fn run(&self, guest: &str, command: &[&str]) -> Program {
        self.start("run", guest, command)
    }

    /// Starts a program plainly in a guest or on a host.
    pub fn exec(&self, guest: &str, command: &[&str]) -> Program {
        self.start("exec", guest, command)
    }

    /// Starts a program: `verb` is `run` or `exec`.
    pub fn start(&self, verb: &str, guest: &str, command: &[&str]) -> Program {
        let n = self.started.fetch_add(1, Ordering::Relaxed);
        let program =
            std::path::Path::new(command[0]).file_name().and_then(|name| name.to_str()).unwrap_or("program");
        let base = format!("{n:02}-{guest}-{verb}-{program}");
        let (out, err) = (self.logs.join(format!("{base}.out")), self.logs.join(format!("{base}.err")));
        let file = |path| File::create(path).expect("a file under target");
        let mut child = self
            .command(&[&[verb, guest, "--"], command].concat())
            .current_dir(&self.logs)
            .stdin(Stdio::piped())
            .stdout(file(&out))
            .stderr(file(&err))
            .spawn()
            .expect("scripts/lab");
        let stdin = child.stdin.take();
        Program { what: format!("{program} in {guest} ({base})"), child, stdin, out, err }
    }

    /// Starts an accelerated server and waits until it listens.
    pub fn serve(&self, guest: &str, port: u16, command: &[&str]) -> Program {
        self.serve_by("run", guest, port, command)
    }

    /// Starts a server, accelerated or (`exec`) plain, and waits until it listens.
    pub fn serve_by(&self, verb: &str, guest: &str, port: u16, command: &[&str]) -> Program {
        let mut server = self.start(verb, guest, command);
        server.listens(port);
        server
    }

    /// Starts `stream serve`, accelerated or (`exec`) plain.
    pub fn stream_server(&self, verb: &str, guest: &str, address: SocketAddr, options: &[&str]) -> Program {
        let (program, address_text) = (example("stream"), address.to_string());
        let command = [&[program.as_str(), "serve", &address_text], options].concat();
        let mut server = self.start(verb, guest, &command);
        server.listens(address.port());
        server
    }

    /// Starts `stream connect` or `stream echo`.
    pub fn stream(&self, verb: &str, guest: &str, mode: &str, to: SocketAddr, options: &[&str]) -> Program {
        let (program, to) = (example("stream"), to.to_string());
        self.start(verb, guest, &[&[program.as_str(), mode, &to], options].concat())
    }

    /// An agent of the test's own options in place of the lab's, which must be stopped.
    pub fn agent(&self, guest: &str, options: &[&str]) -> Program {
        let file = |kind: &str| self.state().join(format!("{guest}.{kind}")).display().to_string();
        let (socket, vport, program) = (file("agent"), file("vport"), self.bin.join("vsocket"));
        let _ = fs::remove_file(&socket);
        let program = program.to_str().expect("a path in UTF-8");
        let agent = self
            .exec(guest, &[&[program, "agent", "--socket", &socket, "--vport", &vport], options].concat());
        wait_until(SOON, "the agent serves", || std::path::Path::new(&socket).exists());
        agent
    }

    // ------------------------------------------------------------ counters

    /// `vsocket stat --json` of a guest's agent.
    pub fn stat(&self, guest: &str) -> Stat {
        let text = self.must(&["vsocket", guest, "stat", "--json"]);
        Stat(serde_json::from_str(&text).unwrap_or_else(|e| panic!("stat of {guest}: {e}: {text}")))
    }

    /// `vsocket ss --json` of a guest's agent.
    pub fn ss(&self, guest: &str) -> Vec<Line> {
        let text = self.must(&["vsocket", guest, "ss", "--json"]);
        let lines: Value =
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("ss of {guest}: {e}: {text}"));
        lines.as_array().expect("an array of connections").iter().cloned().map(Line).collect()
    }

    /// The line of `vsocket ss` for the one connection whose peer is `peer`.
    pub fn connection(&self, guest: &str, peer: SocketAddr) -> Option<Line> {
        let peer = peer.to_string();
        self.ss(guest).into_iter().find(|line| line.text("peer") == peer)
    }

    /// Waits until every connection of a program is on a lane, both ways, and there are `n` of them.
    pub fn on_lane(&self, guest: &str, pid: u32, n: usize, lane: &str) {
        let lines = || self.ss(guest).into_iter().filter(|l| l.pid() == pid).collect::<Vec<_>>();
        let end = Instant::now() + SOON;
        loop {
            let lines = lines();
            if lines.len() >= n && lines.iter().all(|l| l.lanes() == (lane, lane)) {
                return;
            }
            if Instant::now() >= end {
                let far: Vec<_> = ["b", "c"].iter().map(|g| (g, self.ss(g))).collect();
                let stacks = stacks(pid);
                let stat = self.stat(guest);
                panic!(
                    "want {n} connections of {pid} in {guest} on {lane}: {lines:?}\n{stacks}{stat:?}\n{far:#?}"
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// `vsocketd stat` of a host's backend.
    pub fn host_stat(&self, host: &str) -> Value {
        let text = self.must(&["vsocketd", host, "stat", "--json"]);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("stat of {host}: {e}: {text}"))
    }

    /// How often a backend has dropped something for the reason of this name.
    pub fn dropped(&self, host: &str, name: &str) -> u64 {
        self.host_stat(host)["drops"][name].as_u64().unwrap_or(0)
    }

    /// The counters of both ends of a path, to compare with later.
    pub fn before(&self, path: Path) -> Before<'_> {
        Before { lab: self, path, stats: [self.stat("a"), self.stat(path.server())] }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // For whoever looks into the failure: the daemons' logs and last counters.
            let status = self.lab(&["status"]);
            let _ = fs::write(self.logs.join("status"), &status.stdout);
            for guest in ["a", "b", "c", "d", "e"] {
                for what in ["ss", "stat"] {
                    let output = self
                        .command(&["vsocket", guest, what, "--json"])
                        .stdout(Stdio::piped())
                        .stderr(Stdio::null())
                        .spawn()
                        .map(|child| within(child, Duration::from_secs(2)));
                    if let Ok(text) = output {
                        let _ = fs::write(self.logs.join(format!("{guest}.{what}")), text);
                    }
                }
            }
            if let Some(state) = self.lab_state_quietly() {
                let logs = fs::read_dir(state.join("log")).into_iter().flatten().flatten();
                for log in logs {
                    let _ = fs::copy(log.path(), self.logs.join(log.file_name()));
                }
            }
            eprintln!("logs of programs and daemons are in {}", self.logs.display());
        }
        let _ = self.lab(&["down"]);
    }
}

impl Lab {
    fn lab_state_quietly(&self) -> Option<PathBuf> {
        let status: Value = serde_json::from_slice(&self.lab(&["status", "--json"]).stdout).ok()?;
        Some(status["state"].as_str()?.into())
    }
}

/// What a program prints, if it ends in time.
fn within(mut child: Child, limit: Duration) -> String {
    let mut text = String::new();
    let end = Instant::now() + limit;
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    if let Some(mut out) = child.stdout.take() {
        let _ = out.read_to_string(&mut text);
    }
    let _ = child.wait();
    text
}

// ---------------------------------------------------------------- programs

/// A program in a guest, killed when it is dropped.
pub struct Program {
    what: String,
    child: Child,
    stdin: Option<ChildStdin>,
    out: PathBuf,
    err: PathBuf,
}

/// A program that has ended.
pub struct Ended {
    what: String,
    /// How.
    pub status: ExitStatus,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Program {
    /// Its process: `lab run` and `lab exec` become the program.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    pub fn out(&self) -> String {
        fs::read_to_string(&self.out).unwrap_or_default()
    }

    /// What it has complained of so far.
    pub fn err(&self) -> String {
        fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it has printed something.
    pub fn prints(&mut self, text: &str) {
        let end = Instant::now() + SOON;
        while !self.out().contains(text) {
            let runs = self.runs();
            let (out, err) = (self.out(), self.err());
            assert!(runs && Instant::now() < end, "{} does not print '{text}':\n{out}{err}", self.what);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until something in its network namespace listens at a port.
    pub fn listens(&mut self, port: u16) {
        let end = Instant::now() + SOON;
        // The program's own view: right from `lab exec`'s switch into the namespace on.
        while !["tcp", "tcp6"].iter().any(|family| self.listens_in(family, port)) {
            let runs = self.runs();
            assert!(
                runs && Instant::now() < end,
                "{} does not listen:\n{}{}",
                self.what,
                self.out(),
                self.err()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn listens_in(&self, family: &str, port: u16) -> bool {
        // Before the switch the namespace is still the test's own.
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        if namespace(&self.pid().to_string()) == namespace("self") {
            return false;
        }
        let table = fs::read_to_string(format!("/proc/{}/net/{family}", self.pid())).unwrap_or_default();
        let port = format!(":{port:04X}");
        table.lines().any(|line| {
            let mut words = line.split_whitespace().skip(1);
            words.next().is_some_and(|local| local.ends_with(&port)) && words.nth(1) == Some("0A")
        })
    }

    /// A line on its standard input.
    pub fn tell(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("standard input is open");
        writeln!(stdin, "{line}").expect("the program reads");
    }

    /// Ends its standard input.
    pub fn end_input(&mut self) {
        self.stdin = None;
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).expect("the pid of a child");
        rustix::process::kill_process(pid, signal).expect("a child of ours");
    }

    /// SIGTERM, and waits until it has gone, as a server does that ends its children first.
    pub fn terminate(self) -> Ended {
        self.signal(rustix::process::Signal::TERM);
        self.ends(SOON)
    }

    /// Waits for its end; standard input is left as it is.
    pub fn ends(mut self, limit: Duration) -> Ended {
        let end = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                break status;
            }
            if Instant::now() >= end {
                let stacks = stacks(self.pid());
                panic!("{} has not ended after {limit:?}\n{}{}{stacks}", self.what, self.out(), self.err());
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        Ended { what: self.what.clone(), status, out: self.out(), err: self.err() }
    }

    /// Waits for its good end: what it has printed.
    pub fn ok(self) -> String {
        self.ends(PROGRAM).ok()
    }

    /// Waits for the good end of `stream`: its report.
    pub fn report(self) -> Value {
        let out = self.ok();
        reports(&out).pop().unwrap_or_else(|| panic!("no report: {out}"))
    }

    /// Waits for the good end of `stream`: the reports of all its connections.
    pub fn reports_at_end(self) -> Vec<Value> {
        reports(&self.ok())
    }

    /// Ends its standard input, and waits for the good end of `stream`: its report.
    pub fn finish(mut self) -> Value {
        self.end_input();
        self.report()
    }

    /// The reports that `stream serve` has printed so far.
    pub fn reports(&self) -> Vec<Value> {
        reports(&self.out())
    }

    /// CPU time used so far by all its threads, in clock ticks.
    pub fn ticks(&self) -> u64 {
        ticks(self.pid())
    }
}

impl Ended {
    /// Its output, if it ended well.
    pub fn ok(self) -> String {
        let Self { what, status, out, err } = self;
        assert!(status.success(), "{what}: {status}\n{out}{err}");
        out
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}

fn reports(out: &str) -> Vec<Value> {
    out.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Where in the kernel a process's threads wait, for the message about one that hangs.
fn stacks(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lines = tasks.map(|task| {
        let read = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        format!("thread {:?}: waits in {} {}\n", task.file_name(), read("wchan"), read("syscall").trim())
    });
    lines.collect()
}

/// CPU time of a process so far, in clock ticks.
pub fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process that runs");
    let (_, fields) = stat.rsplit_once(") ").expect("the format of /proc/PID/stat");
    let field = |n: usize| fields.split(' ').nth(n).and_then(|f| f.parse::<u64>().ok()).expect("a number");
    // The first of these fields is the third of the file.
    field(14 - 3) + field(15 - 3)
}

// ---------------------------------------------------------------- what the counters say

/// An agent's totals.
#[derive(Clone, Debug)]
pub struct Stat(pub Value);

impl Stat {
    /// One of `connections`.
    pub fn connections(&self, key: &str) -> u64 {
        self.0["connections"][key].as_u64().unwrap_or_else(|| panic!("no connections.{key} in {}", self.0))
    }

    /// Bytes of a lane, one way.
    pub fn bytes(&self, lane: &str, way: &str) -> u64 {
        self.0["bytes"][lane][way].as_u64().unwrap_or_else(|| panic!("no bytes.{lane}.{way} in {}", self.0))
    }

    /// Bytes of a lane, both ways.
    pub fn moved(&self, lane: &str) -> u64 {
        self.bytes(lane, "tx") + self.bytes(lane, "rx")
    }

    /// Connections declined for the reason of this name.
    pub fn declined(&self, reason: &str) -> u64 {
        self.0["declined"][reason].as_u64().unwrap_or(0)
    }

    /// Drops of this name.
    pub fn drops(&self, name: &str) -> u64 {
        self.0["drops"][name].as_u64().unwrap_or(0)
    }
}

/// A connection, as `vsocket ss` shows it.
#[derive(Clone, Debug)]
pub struct Line(pub Value);

impl Line {
    fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or_default()
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.0["pid"].as_u64().map_or(0, |pid| pid as u32)
    }

    /// Both directions' lanes: out, in.
    pub fn lanes(&self) -> (&str, &str) {
        (self.text("tx_lane"), self.text("rx_lane"))
    }

    /// Bytes one way (`tx` or `rx`), over all lanes.
    pub fn bytes(&self, way: &str) -> u64 {
        let lanes = ["tcp", "direct", "fabric"].into_iter();
        lanes.map(|lane| self.0["bytes"][lane][way].as_u64().expect("a number of bytes")).sum()
    }

    /// Why it is on TCP.
    pub fn reason(&self) -> &str {
        self.text("reason")
    }

    /// This end's address.
    pub fn local(&self) -> &str {
        self.text("local")
    }

    /// The other end's address.
    pub fn peer(&self) -> &str {
        self.text("peer")
    }
}

/// The counters of both ends of a path at an earlier moment.
pub struct Before<'a> {
    lab: &'a Lab,
    path: Path,
    stats: [Stat; 2],
}

impl Before<'_> {
    fn guests(&self) -> [&'static str; 2] {
        ["a", self.path.server()]
    }

    /// Both ends have upgraded at least `n` connections since, each to the lane of the path.
    pub fn upgraded(&self, n: u64) {
        let total = format!("{}_total", self.path.lane());
        for (guest, before) in self.guests().into_iter().zip(&self.stats) {
            let now = self.lab.stat(guest);
            for key in ["upgraded_total", &total] {
                let rose = now.connections(key) - before.connections(key);
                assert!(rose >= n, "{key} of {guest} rose by {rose}, want {n}: {}", now.0);
            }
        }
    }

    /// Of the bytes that moved since, at least this share went over the lane of the path, at both ends; and at least `moved`
    /// did, out and in together.
    pub fn on_lane(&self, moved: u64, least_share: f64) {
        let lane = self.path.lane();
        for (guest, before) in self.guests().into_iter().zip(&self.stats) {
            let now = self.lab.stat(guest);
            let rose = |lane| now.moved(lane) - before.moved(lane);
            let (fast, tcp) = (rose(lane), rose("tcp"));
            assert!(fast >= moved, "{fast} bytes on {lane} by the agent of {guest}, want {moved}: {}", now.0);
            let share = fast as f64 / (fast + tcp) as f64;
            assert!(
                share >= least_share,
                "{share:.4} of the bytes on {lane} by the agent of {guest}: {}",
                now.0
            );
        }
    }

    /// No end has put a connection on any lane since.
    pub fn none_upgraded(&self) {
        for (guest, before) in self.guests().into_iter().zip(&self.stats) {
            let now = self.lab.stat(guest);
            let rose = now.connections("upgraded_total") - before.connections("upgraded_total");
            assert_eq!(rose, 0, "upgraded by the agent of {guest}");
        }
    }
}

pub mod agent;
