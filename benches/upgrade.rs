//! When is an upgrade worth its price? Connections that live for so many round trips, or so many bytes, one after the
//! other, over kernel TCP alone and with every threshold: where the upgraded ones begin to win is where the default
//! threshold belongs.
//!
//! `cargo bench --bench upgrade` prints the time per connection, in microseconds: medians of rounds in alternation.
//! Needs root (a lab) and `cargo build --release --workspace --examples`.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Lab, Path, Program, v4};

const PORT: u16 = 7000;
const NEVER: u64 = u32::MAX as u64;
const ROUNDS: usize = 5;

/// What makes a connection worth it, and how long it lives, in the same measure.
struct Measure {
    what: &'static str,
    threshold: &'static str,
    thresholds: [u64; 6],
    lives: [u64; 8],
    /// The client's command, options and how much of it one run may be.
    mode: &'static str,
    life: &'static str,
    options: &'static [&'static str],
    run: u64,
}

const MEASURES: [Measure; 2] = [
    Measure {
        what: "round trips of 64 bytes",
        threshold: "--threshold-rounds",
        thresholds: [NEVER, 1, 4, 16, 64, 256],
        lives: [1, 4, 16, 32, 64, 128, 256, 1024],
        mode: "echo",
        life: "--rounds",
        options: &[],
        run: 2048,
    },
    Measure {
        what: "bytes sent one way",
        threshold: "--threshold-bytes",
        thresholds: [NEVER, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20],
        lives: [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20],
        mode: "connect",
        life: "--bytes",
        options: &["--one-way"],
        run: 64 << 20,
    },
];

/// Agents of a and the server's guest with a threshold of their own.
fn agents(lab: &Lab, path: Path, option: &str, threshold: u64) -> Vec<Program> {
    let (value, never) = (threshold.to_string(), NEVER.to_string());
    let mut options = vec![option, &value];
    if threshold == NEVER {
        let other = if option == "--threshold-bytes" { "--threshold-rounds" } else { "--threshold-bytes" };
        options.extend([other, &never]);
    }
    ["a", path.server()].map(|guest| lab.agent(guest, &options)).into()
}

/// Time per connection.
fn microseconds(lab: &Lab, measure: &Measure, path: Path, life: u64) -> f64 {
    let connections = (measure.run / life).clamp(4, 128);
    let (life, count) = (life.to_string(), connections.to_string());
    let options = [&[measure.life, &life, "--connections", &count], measure.options].concat();
    let client = lab.stream("run", "a", measure.mode, v4(path.server(), PORT), &options);
    let reports = client.reports_at_end();
    let seconds: f64 = reports.iter().map(|r| r["seconds"].as_f64().expect("seconds")).sum();
    seconds * 1e6 / connections as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn table(lab: &Lab, measure: &Measure, path: Path) {
    println!("lane {}: microseconds per connection, by its {}", path.lane(), measure.what);
    print!("{:>10}", "threshold");
    measure.lives.iter().for_each(|life| print!("{life:>9}"));
    println!();
    let mut values = vec![vec![Vec::new(); measure.lives.len()]; measure.thresholds.len()];
    for _ in 0..ROUNDS {
        for (row, threshold) in values.iter_mut().zip(measure.thresholds) {
            let agents = agents(lab, path, measure.threshold, threshold);
            let server = lab.stream_server("run", path.server(), v4(path.server(), PORT), &[]);
            for (cell, life) in row.iter_mut().zip(measure.lives) {
                cell.push(microseconds(lab, measure, path, life));
            }
            drop((server, agents));
        }
    }
    for (row, threshold) in values.into_iter().zip(measure.thresholds) {
        print!("{:>10}", if threshold == NEVER { "never".to_owned() } else { threshold.to_string() });
        row.into_iter().for_each(|cell| print!("{:>9.0}", median(cell)));
        println!();
    }
}

fn main() {
    for path in [Path::SameHost, Path::CrossHost] {
        let lab = Lab::up(&format!("bench-upgrade-{}", path.lane()));
        for guest in ["a", path.server()] {
            lab.daemon("stop", "agent", guest);
        }
        MEASURES.iter().for_each(|measure| table(&lab, measure, path));
    }
}
