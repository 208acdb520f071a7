//! The differential fuzzer: random sequences of socket calls, run over kernel TCP and accelerated; both must tell the same
//! story, call by call. The kernel is the oracle; no expected value stands here.
//!
//! A sequence is a [`plan`]: steps of two sides, which take turns. A turn begins when everything that the other side's turn
//! brings has come, so each answer is the only one that the kernel may give. Calls that wait are met by what they wait for.
//! Each side may have a second thread and children, which make calls too; lanes are taken away in the middle and given
//! back, on one host and across two.
//!
//! `cargo test --release --test fuzzer` runs `FUZZ_CALLS` calls (default 400000) from seed `FUZZ_SEED` (default 1) on.
//! `FUZZ_SEED=SEED:STEP,STEP…`, as a difference is reported, tells both stories of that one, which is run `FUZZ_TIMES` times
//! or until they differ; `SEED:` is the whole of it. `FUZZ_WAYS=direct,…` chooses
//! accelerated runs. This program also is both ends: `fuzzer near …` and `fuzzer far …`.

mod actors;
mod calls;
#[path = "../common/mod.rs"]
mod common;
mod end;
mod ends;
#[allow(dead_code)]
#[path = "../posix/lanes.rs"]
mod lanes;
mod moving;
mod plan;
mod runner;
mod shrink;
mod side;
#[allow(dead_code)]
#[path = "../posix/sys.rs"]
mod sys;
mod way;

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.first().map(String::as_str) {
        Some("near") => ends::near(&words[1..]),
        Some("far") => ends::far(&words[1..]),
        _ => return runner::run(),
    }
    ExitCode::SUCCESS
}
