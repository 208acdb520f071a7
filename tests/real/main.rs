//! Real programs, unmodified, at their own tests or benchmarks: over kernel TCP for the figures, then accelerated, on one
//! host and across two. Each checks the program's own result, and by counters what carried its bytes.
//!
//! `scripts/test real` runs them; the figures are in `target/test-logs/real-figures.tsv`, a line a measurement.

#[path = "../common/mod.rs"]
mod common;

mod kit;

mod databases;
mod languages;
mod mpi;
mod streams;
mod web;
