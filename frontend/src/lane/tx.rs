//! The sender's half of a direction.
//!
//! | phase | event | then |
//! |---|---|---|
//! | anchor | READY, and something to send: [`TxState::switch`] | ring |
//! | ring | withdrawn, suspected, shut or closed: [`TxState::seal`] | draining |
//! | draining | the last byte that was due is in the anchor: [`TxState::drained`] | anchor |
//!
//! While draining, frame and bytes come from the record and from the sender's own ring, so any process that maps both
//! can finish what another began.

use super::Violation;
use vsocket_channel::lane::{REWIND_LEN, Rewind, Stay, escape_for};

/// Where the next byte goes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    /// Into the kernel socket.
    Anchor,
    /// Onto the ring.
    Ring,
    /// Nowhere, until the bytes that the ring did not deliver are in the kernel socket.
    Draining,
}

/// What a draining sender must write to the anchor next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Due {
    /// The rest of this frame, from byte `done` on.
    Frame {
        /// The whole frame.
        frame: [u8; REWIND_LEN],
        /// How much of it is in the anchor.
        done: usize,
    },
    /// These stream offsets, from the ring.
    Raw {
        /// The first.
        from: u64,
        /// One past the last.
        to: u64,
    },
    /// Nothing.
    Nothing,
}

/// The sender's state. Plain data: it stands in shared memory, and any bit pattern is checked when it is used.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct TxState {
    /// Application bytes accepted since the connection began (`tx_off`).
    pub off: u64,
    /// Stream offset of the next raw byte for the anchor; equal to `off` on the anchor.
    pub raw: u64,
    /// Bytes put into the anchor, frames included: must agree with the kernel's counters.
    pub wire: u64,
    /// First offset of the stay (S).
    pub start: u64,
    /// Where the anchor goes on after the stay (A).
    pub resume: u64,
    /// Application bytes that went over rings.
    pub on_ring: u64,
    /// Generation of the stay, or of the last one.
    pub generation: u32,
    phase: u32,
    escape: u32,
    confirmed: u32,
    /// Bytes of the frame that are in the anchor; `REWIND_LEN` when none is due.
    frame_done: u32,
    /// 1: the stay was sealed because the sender has shut.
    last: u32,
}

const ANCHOR: u32 = 0;
const RING: u32 = 1;
const DRAINING: u32 = 2;

impl TxState {
    /// A sender that has put `off` application bytes into the anchor.
    pub fn new(off: u64) -> Self {
        Self { off, raw: off, wire: off, frame_done: REWIND_LEN as u32, ..Self::default() }
    }

    /// The same, where `off` is so far ahead of what was put into the anchor, by stays up to this generation.
    pub fn after(wire: u64, ahead: u64, generation: u32) -> Self {
        Self { wire, generation, ..Self::new(wire.wrapping_add(ahead)) }
    }

    /// How far `off` is ahead of what was put into the anchor, if nothing of a stay is left.
    pub fn ahead(&self) -> Option<u64> {
        let done = self.phase == ANCHOR && self.raw == self.off && self.frame_done == REWIND_LEN as u32;
        done.then(|| self.off.wrapping_sub(self.wire))
    }

    /// Where the next byte goes.
    ///
    /// # Errors
    ///
    /// [`Violation::Phase`] if the record was garbled.
    pub fn phase(&self) -> Result<Phase, Violation> {
        match self.phase {
            ANCHOR => Ok(Phase::Anchor),
            RING => Ok(Phase::Ring),
            DRAINING => Ok(Phase::Draining),
            _ => Err(Violation::Phase),
        }
    }

    /// The anchor took `n` application bytes.
    pub fn sent_raw(&mut self, n: u64) {
        self.off += n;
        self.raw += n;
        self.wire += n;
    }

    /// Begins a stay whose first byte will be `first`. The caller tells [`TxState::sent_ring`] of at least that byte,
    /// publishes the stay, and tells [`TxState::confirm`] if the receiver is known to hold it: so the byte at S is
    /// settled before anyone can see the stay, whichever way it will travel.
    pub fn switch(&mut self, generation: u32, first: u8) -> Stay {
        debug_assert!(self.phase == ANCHOR && generation > self.generation);
        self.phase = RING;
        self.generation = generation;
        self.start = self.off;
        self.escape = u32::from(escape_for(first));
        self.confirmed = 0;
        self.last = 0;
        Stay { generation, start: self.off, escape: self.escape as u8 }
    }

    /// The receiver holds the stay.
    pub fn confirm(&mut self) {
        self.confirmed = 1;
    }

    /// The ring's memory took `n` application bytes. They are published (the ring's head) after this is stored: the head
    /// of who dies between must not be ahead of his record.
    pub fn sent_ring(&mut self, n: u64) {
        self.off += n;
        self.on_ring += n;
    }

    /// Nothing more will be sent: if there is a stay, it ends for this reason when it is sealed.
    pub fn shut(&mut self) {
        if self.phase == RING {
            self.last = 1;
        }
    }

    /// Ends the stay: what was not `acknowledged` goes over the anchor. `confirmed` adds to what [`TxState::confirm`]
    /// said. Later acknowledgements of this generation do not count any more.
    ///
    /// # Errors
    ///
    /// [`Violation::Acknowledged`] if the offset cannot be.
    pub fn seal(&mut self, confirmed: bool, acknowledged: u64) -> Result<(), Violation> {
        debug_assert!(self.phase == RING);
        if confirmed || self.confirmed != 0 {
            if !(self.start..=self.off).contains(&acknowledged) {
                return Err(Violation::Acknowledged);
            }
            self.resume = acknowledged;
            self.frame_done = 0;
        } else {
            // Cancelled: the receiver finds at S a byte that is not the escape.
            self.resume = self.start;
            self.frame_done = REWIND_LEN as u32;
        }
        self.raw = self.resume;
        self.phase = DRAINING;
        self.settle();
        Ok(())
    }

    /// Ends the stay so that the receiver finds on the anchor all that its application has not taken: everything from `taken`
    /// on, which must still be in the ring's memory. If that is the whole stay, it is cancelled, so that no frame stands
    /// behind raw bytes that the application has not taken either.
    ///
    /// # Errors
    ///
    /// [`Violation::Acknowledged`] if the offset cannot be.
    pub fn seal_untaken(&mut self, taken: u64) -> Result<(), Violation> {
        if !(self.start..=self.off).contains(&taken) {
            return Err(Violation::Acknowledged);
        }
        self.confirmed = u32::from(taken > self.start);
        self.seal(false, taken)
    }

    /// Ends the stay without a word: nobody is left who would read one, and all bytes have been delivered.
    pub fn abandon(&mut self) {
        debug_assert!(self.phase == RING);
        self.raw = self.off;
        self.resume = self.off;
        self.frame_done = REWIND_LEN as u32;
        self.phase = DRAINING;
        self.settle();
    }

    /// What must be written to the anchor next.
    pub fn due(&self) -> Due {
        if self.phase != DRAINING {
            return Due::Nothing;
        }
        let done = self.frame_done as usize;
        if done < REWIND_LEN {
            let Self { generation, resume, last, .. } = *self;
            let rewind = Rewind { generation, resume, last: last != 0 };
            return Due::Frame { frame: rewind.encode(self.escape as u8), done };
        }
        if self.raw < self.off {
            return Due::Raw { from: self.raw, to: self.off };
        }
        Due::Nothing
    }

    /// The anchor took `n` bytes of what was due: of one [`Due`], or of several in their order.
    pub fn drained(&mut self, n: u64) {
        let frame = n.min((REWIND_LEN as u64).saturating_sub(u64::from(self.frame_done)));
        self.frame_done += frame as u32;
        self.raw += n - frame;
        self.wire += n;
        self.settle();
    }

    /// The lock was taken over from a dead owner: the kernel has `wire` bytes of ours on the anchor, and what the owner
    /// wrote last may not be recorded.
    ///
    /// # Errors
    ///
    /// [`Violation::Counters`] if the kernel has less than was recorded, or more than can be.
    pub fn recover(&mut self, wire: u64) -> Result<(), Violation> {
        let unseen = wire.checked_sub(self.wire).ok_or(Violation::Counters)?;
        match self.phase()? {
            Phase::Anchor => self.sent_raw(unseen),
            Phase::Draining => {
                let due = u64::from(REWIND_LEN as u32 - self.frame_done.min(REWIND_LEN as u32)) + self.off
                    - self.raw;
                if unseen > due {
                    return Err(Violation::Counters);
                }
                self.drained(unseen);
            }
            Phase::Ring if unseen > 0 => return Err(Violation::Counters),
            Phase::Ring => {}
        }
        Ok(())
    }

    fn settle(&mut self) {
        if self.phase == DRAINING && self.due() == Due::Nothing {
            self.phase = ANCHOR;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_ring(bytes: u64) -> TxState {
        let mut tx = TxState::new(100);
        let stay = tx.switch(3, b'a');
        assert_eq!((stay.start, stay.generation), (100, 3));
        assert_ne!(stay.escape, b'a');
        tx.sent_ring(bytes);
        tx
    }

    #[test]
    fn a_confirmed_stay_ends_with_a_rewind_and_the_rest() {
        let mut tx = on_ring(10);
        tx.confirm();
        tx.seal(false, 104).unwrap();
        let Due::Frame { frame, done: 0 } = tx.due() else { panic!("{:?}", tx.due()) };
        assert_eq!(
            Rewind::decode(&frame, frame[0]),
            Some(Rewind { generation: 3, resume: 104, last: false })
        );
        tx.drained(5);
        assert!(matches!(tx.due(), Due::Frame { done: 5, .. }));
        tx.drained(11);
        assert_eq!(tx.due(), Due::Raw { from: 104, to: 110 });
        tx.drained(6);
        assert_eq!((tx.phase(), tx.wire), (Ok(Phase::Anchor), 100 + 16 + 6));
    }

    #[test]
    fn a_stay_that_ends_by_a_shutdown_says_so() {
        let mut tx = on_ring(10);
        tx.confirm();
        tx.shut();
        tx.seal(false, 110).unwrap();
        let Due::Frame { frame, .. } = tx.due() else { panic!("{:?}", tx.due()) };
        assert_eq!(Rewind::decode(&frame, frame[0]).map(|r| r.last), Some(true));
        // A frame that is under way does not change any more.
        let mut tx = on_ring(10);
        tx.confirm();
        tx.seal(false, 110).unwrap();
        tx.shut();
        let Due::Frame { frame, .. } = tx.due() else { panic!("{:?}", tx.due()) };
        assert_eq!(Rewind::decode(&frame, frame[0]).map(|r| r.last), Some(false));
    }

    #[test]
    fn an_abandoned_stay_writes_nothing() {
        let mut tx = on_ring(4);
        let wire = tx.wire;
        tx.confirm();
        tx.abandon();
        assert_eq!((tx.phase(), tx.due(), tx.wire, tx.raw), (Ok(Phase::Anchor), Due::Nothing, wire, tx.off));
    }

    #[test]
    fn an_unconfirmed_stay_is_cancelled_without_a_frame() {
        let mut tx = on_ring(10);
        tx.seal(false, 777).unwrap();
        assert_eq!(tx.due(), Due::Raw { from: 100, to: 110 });
    }

    #[test]
    fn what_was_not_taken_goes_over_the_anchor_again() {
        let mut tx = on_ring(10);
        tx.confirm();
        tx.seal_untaken(103).unwrap();
        assert!(matches!(tx.due(), Due::Frame { done: 0, .. }));
        tx.drained(REWIND_LEN as u64);
        assert_eq!(tx.due(), Due::Raw { from: 103, to: 110 });
        let mut tx = on_ring(10);
        tx.confirm();
        tx.seal_untaken(100).unwrap();
        assert_eq!(tx.due(), Due::Raw { from: 100, to: 110 }, "without a frame");
        assert_eq!(on_ring(10).seal_untaken(111), Err(Violation::Acknowledged));
    }

    #[test]
    fn an_acknowledgement_outside_the_stay_is_a_violation() {
        for acknowledged in [99, 111] {
            assert_eq!(on_ring(10).seal(true, acknowledged), Err(Violation::Acknowledged));
        }
    }

    #[test]
    fn a_taken_over_lock_learns_from_the_kernel() {
        let mut tx = TxState::new(100);
        tx.recover(107).unwrap();
        assert_eq!((tx.off, tx.raw, tx.wire), (107, 107, 107));
        let mut tx = on_ring(10);
        tx.seal(true, 104).unwrap();
        tx.recover(100 + 16 + 2).unwrap();
        assert_eq!(tx.due(), Due::Raw { from: 106, to: 110 });
        assert_eq!(tx.recover(100 + 16 + 7), Err(Violation::Counters));
        assert_eq!(tx.recover(99), Err(Violation::Counters));
    }
}
