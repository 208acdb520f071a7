//! The contract of guest and host: what the shared memory looks like, what the control messages say, when a doorbell
//! is rung, and the frame that ends a stay on a ring. No I/O and no system calls; all unsafe code on rings lives here.
//!
//! # Memory
//!
//! A **slab** is one shared mapping with a fixed set of mappers. Its first page is a [`layout::SlabHeader`] with the
//! doorbells of its two sides; the rest is an array of **segments**. A segment serves one generation of one
//! connection: a page with one [`layout::Direction`] per direction, then the two rings.
//!
//! ```text
//! slab     | SlabHeader 4 KiB | segment 0 | segment 1 | …
//! segment  | Direction 0→1, Direction 1→0 (4 KiB) | ring 0→1 | ring 1→0 |
//! ```
//!
//! The sides are 0 and 1. On a `direct` lane they are two endpoints, on a `fabric` lane side 1 is the backend. Each
//! side treats the other as hostile: an index is fetched once, checked, and the copy is used.
//!
//! # Offsets
//!
//! Ring indices are *stream offsets*: the application's bytes since the connection began, 64 bit, wrapping. So the
//! byte at offset `o` stands at `o & mask`, and no table translates between lanes.
#![warn(clippy::pedantic)]
#![allow(clippy::module_name_repetitions, clippy::cast_possible_truncation, clippy::must_use_candidate)]

pub mod bell;
pub mod lane;
pub mod layout;
pub mod message;
pub mod reason;
pub mod ring;
pub mod sync;

/// Which end of a slab: 0 or 1.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Side {
    /// The first side; on a `fabric` lane the guest.
    Zero,
    /// The second side; on a `fabric` lane the backend.
    One,
}

impl Side {
    /// The side across.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Zero => Self::One,
            Self::One => Self::Zero,
        }
    }

    /// 0 or 1.
    pub fn index(self) -> usize {
        usize::from(self == Self::One)
    }

    /// The side with this number, if there is one.
    pub fn from_index(index: u8) -> Option<Self> {
        match index {
            0 => Some(Self::Zero),
            1 => Some(Self::One),
            _ => None,
        }
    }
}
