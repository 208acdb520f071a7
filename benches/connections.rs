//! What following a connection costs it: `redis-benchmark` with a new connection for each request, over kernel TCP and
//! with vsocket in turn. None of them lives long enough to be upgraded.
//!
//! `cargo bench --bench connections` prints requests a second, medians of rounds in alternation, and their ratio. Needs
//! root (a lab) and `cargo build --release --workspace`.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Lab, PROGRAM, Path, v4};

const ROUNDS: usize = 9;

fn rate(lab: &Lab, verb: &str, host: &str, port: &str) -> f64 {
    let command = [
        "redis-benchmark",
        "-h",
        host,
        "-p",
        port,
        "-t",
        "get",
        "-n",
        "20000",
        "-c",
        "50",
        "-k",
        "0",
        "--csv",
    ];
    let client = if verb == "run" { lab.run("a", &command) } else { lab.exec("a", &command) };
    let out = client.ends(PROGRAM).ok();
    let row = out.lines().nth(1).and_then(|row| row.split(',').nth(1));
    row.and_then(|rps| rps.trim_matches('"').parse().ok()).expect("requests a second")
}

fn main() {
    for path in [Path::SameHost, Path::CrossHost] {
        let lab = Lab::up(&format!("bench-connections-{}", path.lane()));
        let host = v4(path.server(), 0).ip().to_string();
        let serve =
            |port| ["redis-server", "--bind", &host, "--port", port, "--save", "", "--protected-mode", "no"];
        let _plain = lab.serve_by("exec", path.server(), 6379, &serve("6379"));
        let _fast = lab.serve_by("run", path.server(), 6380, &serve("6380"));
        let before = lab.before(path);
        let mut rates = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            rates[0].push(rate(&lab, "exec", &host, "6379"));
            rates[1].push(rate(&lab, "run", &host, "6380"));
        }
        before.none_upgraded();
        let [plain, fast] = rates.map(|mut all| {
            all.sort_by(f64::total_cmp);
            (all[0], all[ROUNDS / 2], all[ROUNDS - 1])
        });
        println!(
            "{path:?}: kernel TCP {:.0} ({:.0}-{:.0}), vsocket {:.0} ({:.0}-{:.0}) connections/s, {:.3}x",
            plain.1,
            plain.0,
            plain.2,
            fast.1,
            fast.0,
            fast.2,
            fast.1 / plain.1
        );
    }
}
