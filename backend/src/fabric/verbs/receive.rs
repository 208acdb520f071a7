//! The places that messages arrive in.
//!
//! A slot is either the device's, from its posting to its completion, or ours, from there to its next posting: `ours`
//! says which, and is what makes reading it sound.

use std::io;
use std::sync::Arc;

use super::link::RECEIVE;
use super::memory::{Buffer, Mr, Pd};
use super::queue_pair::QueuePair;
use crate::fabric::MAX_SEND;

/// Messages that may arrive before we look: fewer than a peer may have under way, whose device then asks again.
pub const SLOTS: u32 = 128;

/// A message with its tag, on whole cache lines.
const SLOT: usize = MAX_SEND + 64;

/// See the module.
pub struct Receives {
    buffer: Mr,
    ours: Vec<bool>,
}

impl Receives {
    /// So many slots, none of them posted.
    pub fn new(pd: &Arc<Pd>, slots: u32) -> io::Result<Self> {
        let buffer = Mr::of_buffer(pd, Buffer::new(slots as usize * SLOT))?;
        Ok(Self { buffer, ours: vec![true; slots as usize] })
    }

    /// Posts all of them.
    pub fn post_all(&mut self, qp: &mut QueuePair) -> io::Result<()> {
        (0..self.ours.len() as u32).try_for_each(|slot| self.post(qp, slot))
    }

    /// Gives a slot of ours to the device.
    pub fn post(&mut self, qp: &mut QueuePair, slot: u32) -> io::Result<()> {
        let Some(ours) = self.ours.get_mut(slot as usize).filter(|ours| **ours) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        *ours = false;
        qp.post_receive(RECEIVE | u64::from(slot), &self.buffer, slot as usize * SLOT, SLOT as u32)
    }

    /// A slot's receive request has completed: it is ours. False if it was, and the device is mistaken.
    #[must_use]
    pub fn take(&mut self, slot: u32) -> bool {
        self.ours.get_mut(slot as usize).is_some_and(|ours| !std::mem::replace(ours, true))
    }

    /// The message in a slot of ours; empty if the slot is not ours.
    pub fn message(&self, slot: u32, len: usize) -> &[u8] {
        let ours = self.ours.get(slot as usize).is_some_and(|ours| *ours);
        match self.buffer.buffer() {
            // SAFETY: the slot is ours: its receive request has completed, and `post`, which would give it to the device
            // again, needs this value exclusively.
            Some(buffer) if ours => unsafe { buffer.bytes(slot as usize * SLOT, len.min(SLOT)) },
            _ => &[],
        }
    }
}
