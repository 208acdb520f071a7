//! What the library adds to a call on a descriptor that is not its own: pipes, files, UNIX sockets, sets of these.
//!
//! `cargo bench --bench hooks` prints, for each call, its time without and with the library, medians of batches that two
//! processes run in turn on one processor, and the median of what the second of two batches took more; it fails if a call
//! adds more than 50 ns, and a list 1 ns a descriptor. Both processes have a second
//! thread and a TCP connection, so that nothing is easier than in a program that uses the library.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

#[path = "hooks/calls.rs"]
mod calls;

use calls::Calls;

/// What one call may cost more, in nanoseconds.
const MOST: f64 = 50.0;
/// And for each descriptor of a list.
const LISTED: f64 = 1.0;
/// Batches of each kind in a pair of processes.
const ROUNDS: usize = 41;
/// Pairs of processes: where the kernel puts a program makes a difference too.
const PAIRS: usize = 7;
/// How long a batch lasts, in nanoseconds, about.
const BATCH: f64 = 150_000.0;

/// Runs batches as its parent says, a line each: the number of the call, and how often.
fn child() {
    let mut calls = Calls::new();
    let mut out = std::io::stdout();
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let mut words = line.split(' ').map_while(|w| w.parse::<usize>().ok());
        let (Some(which), Some(times)) = (words.next(), words.next()) else { return };
        let began = Instant::now();
        for _ in 0..times {
            calls.make(which);
        }
        let each = began.elapsed().as_nanos() as f64 / (times * calls::ALL[which].1) as f64;
        writeln!(out, "{each}").and_then(|()| out.flush()).expect("its parent reads");
    }
}

struct Runner {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Runner {
    fn new(library: Option<&std::path::Path>) -> Self {
        let exe = std::env::current_exe().expect("a program knows where it is");
        let mut command = Command::new("taskset");
        command.args(["-c", "1"]).arg(exe).arg("child").stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(library) = library {
            command.env("LD_PRELOAD", library).env("VSOCKET_AGENT", "/nonexistent/agent.sock");
        }
        let mut child = command.spawn().expect("taskset, of util-linux");
        let (to, from) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        Self { child, to, from: BufReader::new(from) }
    }

    /// Nanoseconds of one call.
    fn run(&mut self, which: usize, times: usize) -> f64 {
        writeln!(self.to, "{which} {times}").expect("the child reads");
        let mut line = String::new();
        self.from.read_line(&mut line).expect("the child answers");
        line.trim().parse().expect("nanoseconds")
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|w| !w.starts_with("--")).collect();
    if words.first().is_some_and(|w| w == "child") {
        return child();
    }
    let exe = std::env::current_exe().expect("a program knows where it is");
    let release = exe.ancestors().nth(2).expect("target/release/deps/…");
    let library = release.join("libvsocket.so");
    // As it is now, not as it was built last.
    let built = Command::new(env!("CARGO")).args(["build", "--release", "--workspace", "--lib"]).status();
    assert!(
        built.is_ok_and(|status| status.success()) && library.exists(),
        "{} is not built",
        library.display()
    );
    let mut pairs: Vec<_> = (0..PAIRS).map(|_| [Runner::new(None), Runner::new(Some(&library))]).collect();
    println!("{:40} {:>8} {:>8} {:>8}  ns a call", "", "without", "with", "added");
    let mut worst = (f64::MIN, "");
    for (which, (name, _)) in calls::ALL.iter().enumerate() {
        if !words.is_empty() && !words.iter().any(|word| name.contains(word.as_str())) {
            continue;
        }
        let times = (BATCH / pairs[0][1].run(which, 200)).max(1.0) as usize;
        let mut taken = [Vec::new(), Vec::new()];
        for (round, pair) in (0..ROUNDS).flat_map(|_| 0..PAIRS).enumerate() {
            for turn in [round % 2, 1 - round % 2] {
                taken[turn].push(pairs[pair][turn].run(which, times));
            }
        }
        let added = median(taken[0].iter().zip(&taken[1]).map(|(without, with)| with - without).collect());
        let [without, with] = taken.map(median);
        println!("{name:40} {without:8.1} {with:8.1} {added:8.1}");
        let listed = if name.contains("64 pipes") { 64.0 * LISTED } else { 0.0 };
        if added - listed > worst.0 {
            worst = (added - listed, name);
        }
    }
    println!("most: {:.0} ns, {} (a descriptor of a list may cost {LISTED:.0} ns)", worst.0, worst.1);
    assert!(worst.0 <= MOST, "more than {MOST} ns");
}
