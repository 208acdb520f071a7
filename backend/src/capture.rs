//! Captures: what `vsocketd capture` writes, from the data path to the file.
//!
//! ```text
//! data path ── Tap ──> queue (memfd) ──> tool ── packets ──> FILE
//! ```
//!
//! While a capture runs, the data path copies the header and payload of each segment that matches its [`Filter`], as a
//! [`Record`], into a queue that it shares with the tool; the payload of a segment that went by WRITE it takes from the
//! ring. A queue that is full drops the segment and counts it: the data path never waits. Everything else is done by
//! the tool, a process of the person who asked: outer headers, checksums, the file. So a full disk, a slow pipe or a killed
//! tool ends a capture or thins it out, and nothing else; the daemon sees the end of the tool's control connection.
//!
//! The queue is a slab of one segment, of which only the ring from the daemon's side is used, with bell 0 of the tool's
//! side. The daemon does not trust the tool: an index that cannot be ends the capture.
//!
//! In both directions a segment is taken where it is certain: out, when the fabric has accepted it; in, after every check.
//! Direct lanes know no segments, so they are not captured.

#![forbid(unsafe_code)]

mod filter;
mod packet;
mod record;
mod tap;
mod tool;

pub use filter::{EndFilter, Filter, FlowFilter};
pub use packet::Builder;
pub use record::{RECORD_LEN, Record, Way};
pub use tap::{Payload, Tap, Taps, vteps};
pub use tool::{Error, Options, run};

/// Captures that may run at the same time.
pub const CAPTURES: usize = 4;
/// The smallest queue: a few segments.
pub const MIN_QUEUE: u64 = 256 << 10;
/// The largest queue.
pub const MAX_QUEUE: u64 = 1 << 30;
