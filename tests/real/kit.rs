//! What the programs' tests share: a place to run in, figures over TCP and over lanes, and what is missing here.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::common::{self, Before, Lab, Path, Program, profile_dir, v4};

/// Over which guests reach each other.
pub const PATHS: [Path; 2] = [Path::SameHost, Path::CrossHost];

/// Kernel TCP, then accelerated: the verbs of `scripts/lab`.
pub const VERBS: [&str; 2] = ["exec", "run"];

/// Whether the commands are there, each given as `command:package`. Where Debian has no such package it says so, and the
/// test is skipped; where it has, `scripts/setup --real` was forgotten.
pub fn have(needs: &[&str]) -> bool {
    needs.iter().all(|need| {
        let (command, package) = need.split_once(':').expect("command:package");
        let look = if command.starts_with('/') { "ls" } else { "command -v" };
        if quietly("sh", &["-c", &format!("PATH=$PATH:/usr/sbin; {look} {command}")]) {
            return true;
        }
        assert!(!quietly("apt-cache", &["show", package]), "{command} is missing: scripts/setup --real");
        // Not captured: it is to be seen when the test passes.
        let _ = writeln!(std::io::stderr(), "skipped: there is no package {package} for {command}");
        false
    })
}

fn quietly(program: &str, args: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Runs a program of the test's own preparation, outside the lab: what it prints.
pub fn prepare(command: &[&str]) -> String {
    let output = Command::new(command[0]).args(&command[1..]).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{err}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A file of `tests/real/programs`.
pub fn source(name: &str) -> String {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/real/programs").join(name);
    assert!(file.exists(), "{} is missing", file.display());
    file.into_os_string().into_string().expect("a path in UTF-8")
}

/// A lab, the path through it, and a directory in memory, which anybody may read.
pub struct Site {
    /// The lab.
    pub lab: Lab,
    /// From guest a to the server's guest.
    pub path: Path,
    name: String,
    dir: PathBuf,
}

impl Site {
    /// A lab of the test's own.
    pub fn new(test: &str, path: Path) -> Self {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let name = format!("vs-real-{}-{}", std::process::id(), LAST.fetch_add(1, Ordering::Relaxed));
        let dir = PathBuf::from("/dev/shm").join(name);
        fs::create_dir_all(&dir).expect("a directory in memory");
        prepare(&["chmod", "755", dir.to_str().expect("a path in UTF-8")]);
        let lab = Lab::up(&format!("real-{test}-{}", path.lane()));
        Self { lab, path, name: test.to_owned(), dir }
    }

    /// The guest with the server.
    pub fn server(&self) -> &'static str {
        self.path.server()
    }

    /// The third guest of the network, on whichever host.
    pub fn third(&self) -> &'static str {
        if self.server() == "b" { "c" } else { "b" }
    }

    /// The server's address.
    pub fn ip(&self) -> String {
        self.ip_of(self.server())
    }

    /// A guest's address.
    pub fn ip_of(&self, guest: &str) -> String {
        v4(guest, 0).ip().to_string()
    }

    /// The directory, or something in it.
    pub fn at(&self, name: &str) -> String {
        self.dir.join(name).into_os_string().into_string().expect("a path in UTF-8")
    }

    /// A file in the directory, with this text.
    pub fn text(&self, name: &str, text: &str) -> String {
        fs::write(self.at(name), text).expect("a file in memory");
        self.at(name)
    }

    /// A file in the directory, with bytes that no shift of it has.
    pub fn bytes(&self, name: &str, len: usize) -> String {
        let mut file = File::create(self.at(name)).expect("a file in memory");
        let mut state = 0x9E37_79B9_7F4A_7C15_u64 ^ len as u64;
        let mut block = vec![0; 1 << 20];
        let mut left = len;
        while left > 0 {
            for word in block.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            let now = left.min(block.len());
            file.write_all(&block[..now]).expect("room in memory");
            left -= now;
        }
        self.at(name)
    }

    /// A client's good end: what it has printed.
    pub fn client(&self, verb: &str, command: &[&str]) -> String {
        self.lab.start(verb, "a", command).ok()
    }

    /// A server of the path, which listens.
    pub fn serve(&self, verb: &str, port: u16, command: &[&str]) -> Program {
        self.lab.serve_by(verb, self.server(), port, command)
    }

    /// Figures of the same thing over kernel TCP and accelerated, more being better; what the counters have to say of the
    /// second is asked of `proof`.
    pub fn compare(
        &self,
        what: &str,
        unit: &str,
        proof: impl Fn(&Before<'_>),
        mut measure: impl FnMut(&str) -> f64,
    ) {
        let plain = measure(VERBS[0]);
        let before = self.lab.before(self.path);
        let fast = measure(VERBS[1]);
        proof(&before);
        figure(&self.name, what, self.path, unit, (plain, fast));
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Keeps a measurement: over TCP, and accelerated.
pub fn figure(test: &str, what: &str, path: Path, unit: &str, (plain, fast): (f64, f64)) {
    let line =
        format!("{test}\t{what}\t{}\t{plain:.0}\t{fast:.0}\t{unit}\t{:.2}\n", path.lane(), fast / plain);
    let file = profile_dir().parent().expect("target").join("test-logs/real-figures.tsv");
    let mut file = OpenOptions::new().create(true).append(true).open(file).expect("a file under target");
    file.write_all(line.as_bytes()).expect("a file under target");
}

/// Nine of ten bytes went over the lane, and so many connections were put on it. An upgrade takes some milliseconds where
/// programs, agents and backends share two processors, in which a fast sender fills the kernel's buffers, of up to 10 MB a
/// connection: so a run must be so long that this is little.
pub fn on_lane(connections: u64, bytes: u64) -> impl Fn(&Before<'_>) {
    move |before| {
        before.upgraded(connections);
        before.on_lane(bytes, 0.9);
    }
}

/// Two files hold the same bytes.
pub fn same(one: &str, other: &str) {
    let open = |path| File::open(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let (mut left, mut right) = (open(one), open(other));
    let lengths = [&left, &right].map(|file| file.metadata().expect("a file").len());
    assert_eq!(lengths[0], lengths[1], "lengths of {one} and {other}");
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < lengths[0] {
        let now = a.len().min((lengths[0] - at) as usize);
        left.read_exact(&mut a[..now]).expect("a file");
        right.read_exact(&mut b[..now]).expect("a file");
        let differs = a[..now].iter().zip(&b[..now]).position(|(x, y)| x != y);
        assert_eq!(differs.map(|d| at + d as u64), None, "{one} and {other} differ there");
        at += now as u64;
    }
}

/// The number that follows `label` in a text.
pub fn number(text: &str, label: &str) -> f64 {
    let found = text.split_once(label).unwrap_or_else(|| panic!("no '{label}' in: {text}")).1.trim_start();
    let end = found.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(found.len());
    found[..end].parse().unwrap_or_else(|_| panic!("no number after '{label}' in: {text}"))
}

/// The processes that a process has started and that still run.
pub fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// A server's good end on SIGTERM.
pub fn stop(server: Program) {
    let ended = server.terminate();
    // Some end by the signal itself.
    let by_signal = std::os::unix::process::ExitStatusExt::signal(&ended.status) == Some(15);
    let good = by_signal || ended.status.success() || ended.status.code() == Some(143);
    assert!(good, "{}\n{}{}", ended.status, ended.out, ended.err);
}

/// A moment that many things may take on a busy machine.
pub use common::SOON;
