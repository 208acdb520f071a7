//! The differential suite: each case runs natively and accelerated, and both must tell the same story, call by call. The
//! kernel is the oracle; no expected value stands here.
//!
//! A case is a function over a connected pair, of which the far end is another process in another guest. It writes down
//! what each call answered; when something happened is never written down. The accelerated runs begin the case at three
//! moments of a connection's life ([`pair::Moment`]), and prove by the agent's counters that bytes went over the lane.
//!
//! `cargo test --release --test posix [-- WORD…]` runs the cases whose names contain a word. This program also is both
//! ends: `posix near …` and `posix far …`.
#![allow(clippy::type_complexity)] // the cases are tables of functions

mod cases;
#[path = "../common/mod.rs"]
mod common;
mod far;
mod lanes;
mod near;
mod pair;
mod report;
mod runner;
mod sys;

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.first().map(String::as_str) {
        Some("near") => near::run(&words[1..]),
        Some("far") => far::serve(&words[1], &words[2..]),
        Some("child") => cases::processes::child(&words[1..]),
        _ => return runner::run(&words),
    }
    ExitCode::SUCCESS
}
