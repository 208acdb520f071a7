//! The lane state machines: how each direction of a connection changes between the anchor and a ring at an exact byte.
//!
//! Sans-IO: the state is plain data (it stands in a record shared by the processes of one guest, under a lock), the
//! methods say what to do next and are told what was done. The caller owns sockets, rings and clocks. One direction
//! has a [`tx::TxState`] at its sender and an [`rx::RxState`] at its receiver; what travels between them on the anchor
//! is `raw | escape REWIND raw | …`.
//!
//! Any process may die between two steps, so the order in which they take effect counts:
//! - A state is stored as a whole (two slots and an index, say), never field by field.
//! - The sender records ring bytes, then publishes the stay and the ring's head; it writes to the anchor, then records.
//! - The receiver takes raw bytes, then records them; of a frame it stores the verdict, then takes the frame.
//! - Who takes a lock over begins with [`tx::TxState::recover`] and, on the ring, [`tx::TxState::seal`]; or with
//!   [`rx::RxState::recover`].

pub mod rx;
pub mod tx;

/// The state, the peer or the kernel says something that cannot be: the connection must be aborted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Violation {
    /// A shared record holds a phase that does not exist.
    Phase,
    /// An acknowledged offset outside the stay.
    Acknowledged,
    /// A REWIND of another generation, outside what was received, or that is no frame at all.
    Rewind,
    /// The kernel has seen other bytes on the anchor than we have.
    Counters,
    /// A ring index outside the ring.
    Index,
}

impl Violation {
    /// All of them, in the order of their codes, which begin at 1.
    pub const ALL: [Self; 5] = [Self::Phase, Self::Acknowledged, Self::Rewind, Self::Counters, Self::Index];

    /// Its code in a record.
    pub fn code(self) -> u32 {
        self as u32 + 1
    }

    /// What a record's code means; 0 is none.
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.get(code.checked_sub(1)? as usize).copied()
    }

    /// Its name in the counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Phase => "record-phase",
            Self::Acknowledged => "acknowledged-offset",
            Self::Rewind => "rewind",
            Self::Counters => "kernel-counters",
            Self::Index => "ring-index",
        }
    }
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Phase => "a connection record holds a phase that does not exist",
            Self::Acknowledged => "an acknowledged offset lies outside the stay",
            Self::Rewind => "a REWIND does not fit the stay it ends",
            Self::Counters => "the kernel has seen other bytes on the anchor than were recorded",
            Self::Index => "a ring index lies outside the ring",
        })
    }
}

impl std::error::Error for Violation {}
