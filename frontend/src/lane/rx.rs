//! The receiver's half of a direction.
//!
//! The receiver can always tell where the byte at `off` comes from ([`RxState::source`]):
//!
//! | state | source |
//! |---|---|
//! | no generation open | raw bytes from the anchor; those below `kept` are dropped, it has them already |
//! | open, stay unknown | raw bytes, *guarded*: only as many as FIONREAD counted before the stay was looked for |
//! | stay known, before S | raw bytes up to S |
//! | stay known, at S | the ring; when it is empty, the anchor is peeked for the stay's end |
//! | stay ended, `off < kept` | what the ring still holds, up to R |

use super::Violation;
use vsocket_channel::lane::{REWIND_LEN, Rewind, Stay};
use vsocket_channel::reason::Reason;

/// Where the next byte comes from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Source {
    /// The anchor: take the first `drop` raw bytes away, then at most `limit` in all. If `guarded`, ask FIONREAD first,
    /// then [`RxState::learn`], then this again, and take no more than FIONREAD said.
    Raw {
        /// Bytes that were delivered already.
        drop: u64,
        /// Most raw bytes to take, dropped ones included.
        limit: u64,
        /// Whether a stay may be announced any moment.
        guarded: bool,
    },
    /// The ring of this generation, at `off`.
    Ring {
        /// The generation.
        generation: u32,
    },
    /// The ring of a stay that has ended, at `off`, no further than `to`.
    Residue {
        /// One past the last byte (R).
        to: u64,
    },
}

/// What the anchor's next bytes mean, at S with the ring drained.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Verdict {
    /// Not all of the frame is there.
    Wait,
    /// The stay was cancelled: raw bytes go on at S. Nothing is to be taken from the anchor.
    Cancelled,
    /// The stay ended: take the frame ([`REWIND_LEN`] bytes) from the anchor.
    Rewound {
        /// Because the sender has shut: the other direction need not leave.
        last: bool,
    },
}

/// The receiver's state. Plain data in shared memory, as [`super::tx::TxState`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct RxState {
    /// Application bytes delivered since the connection began (`rx_off`).
    pub off: u64,
    /// Stream offset of the anchor's next raw byte.
    pub raw: u64,
    /// Bytes taken from the anchor, frames included: must agree with the kernel's counters.
    pub wire: u64,
    /// First offset of the stay (S), once known.
    pub start: u64,
    /// Everything below was received by ring: raw bytes below it are dropped (R).
    pub kept: u64,
    /// Application bytes that came over rings.
    pub on_ring: u64,
    /// The open generation, or 0.
    pub generation: u32,
    /// The smallest generation that may still be prepared.
    pub min_generation: u32,
    known: u32,
    escape: u32,
}

impl RxState {
    /// A receiver that has taken `off` application bytes from the anchor.
    pub fn new(off: u64) -> Self {
        Self { off, raw: off, wire: off, min_generation: 1, ..Self::default() }
    }

    /// The same, where `off` is so far ahead of what was taken from the anchor, by stays up to this generation.
    pub fn after(wire: u64, ahead: u64, generation: u32) -> Self {
        Self { wire, min_generation: generation.saturating_add(1), ..Self::new(wire.wrapping_add(ahead)) }
    }

    /// How far `off` is ahead of what was taken from the anchor, if nothing of a stay is left.
    pub fn ahead(&self) -> Option<u64> {
        let done = self.generation == 0 && self.raw == self.off && self.kept <= self.raw;
        done.then(|| self.off.wrapping_sub(self.wire))
    }

    /// Opens a generation.
    ///
    /// # Errors
    ///
    /// The reason why not: one is open, or it was closed before.
    pub fn prepare(&mut self, generation: u32) -> Result<(), Reason> {
        if self.generation != 0 || self.off < self.kept {
            return Err(Reason::Busy);
        }
        if generation < self.min_generation {
            return Err(Reason::Superseded);
        }
        self.generation = generation;
        self.min_generation = generation;
        self.known = 0;
        Ok(())
    }

    /// Whether the open generation's stay is known.
    pub fn knows_stay(&self) -> bool {
        self.generation != 0 && self.known != 0
    }

    /// The stay of the open generation was found published. A stay that begins below what was read raw was cancelled
    /// before it was seen.
    pub fn learn(&mut self, stay: Stay) {
        if self.generation != stay.generation || self.known != 0 {
            return;
        }
        if stay.start < self.raw {
            return self.close();
        }
        self.known = 1;
        self.start = stay.start;
        self.escape = u32::from(stay.escape);
    }

    /// Where the next byte comes from.
    pub fn source(&self) -> Source {
        if self.off < self.kept {
            return Source::Residue { to: self.kept };
        }
        if self.knows_stay() {
            if self.raw >= self.start {
                return Source::Ring { generation: self.generation };
            }
            return Source::Raw {
                drop: self.kept.saturating_sub(self.raw),
                limit: self.start - self.raw,
                guarded: true,
            };
        }
        let guarded = self.generation != 0;
        Source::Raw { drop: self.kept.saturating_sub(self.raw), limit: u64::MAX, guarded }
    }

    /// `n` raw bytes were taken from the anchor, dropped ones included. Afterwards, if the read was guarded, the stay must
    /// be looked for again and told to [`RxState::learn`]: one that begins below is a cancelled one.
    pub fn took_raw(&mut self, n: u64) {
        self.raw += n;
        self.wire += n;
        self.off = self.off.max(self.raw);
        if self.knows_stay() && self.raw > self.start {
            self.close();
        }
    }

    /// `n` bytes were taken from the ring, or from what an ended stay left in it.
    pub fn took_ring(&mut self, n: u64) {
        self.off += n;
        self.on_ring += n;
    }

    /// At S, with the ring read up to `off`: what the anchor's next bytes mean, of which `peeked` (not empty) were peeked.
    /// `head` is the ring's producer index, read after the peek. The caller takes the frame from the anchor *after*
    /// the state is stored, if the verdict is [`Verdict::Rewound`].
    ///
    /// # Errors
    ///
    /// [`Violation::Rewind`].
    pub fn judge(&mut self, peeked: &[u8], head: u64) -> Result<Verdict, Violation> {
        if peeked.first() != Some(&(self.escape as u8)) {
            self.kept = head.max(self.off);
            self.close();
            return Ok(Verdict::Cancelled);
        }
        let Some(frame) = peeked.first_chunk::<REWIND_LEN>() else { return Ok(Verdict::Wait) };
        let rewind = Rewind::decode(frame, self.escape as u8).ok_or(Violation::Rewind)?;
        if rewind.generation != self.generation || !(self.start..=head.max(self.off)).contains(&rewind.resume)
        {
            return Err(Violation::Rewind);
        }
        self.raw = rewind.resume;
        self.wire += REWIND_LEN as u64;
        self.kept = head.max(self.off);
        self.close();
        Ok(Verdict::Rewound { last: rewind.last })
    }

    /// Where raw bytes go on behind the stay, and how many bytes of a frame stand before them, if `peeked` (the anchor's bytes
    /// at S) shows that it has ended. Nothing is judged by that.
    pub fn resumes(&self, peeked: &[u8]) -> Option<(u64, u64)> {
        if *peeked.first()? != self.escape as u8 {
            return Some((self.start, 0));
        }
        let rewind = Rewind::decode(peeked.first_chunk::<REWIND_LEN>()?, self.escape as u8)?;
        (rewind.generation == self.generation).then_some((rewind.resume, REWIND_LEN as u64))
    }

    /// The lock was taken over from a dead owner: `wire` bytes of the anchor have been taken from the kernel. Raw bytes that
    /// the owner took and did not record are gone with it, as from any socket. Returns how many bytes of a judged frame
    /// it did not take: they are to be taken now. The ring's tail is to be published again.
    ///
    /// # Errors
    ///
    /// [`Violation::Counters`] if the kernel gave more than could be asked for, or less than was recorded.
    pub fn recover(&mut self, wire: u64) -> Result<u64, Violation> {
        if let Some(untaken) = self.wire.checked_sub(wire) {
            return if untaken <= REWIND_LEN as u64 { Ok(untaken) } else { Err(Violation::Counters) };
        }
        let unseen = wire - self.wire;
        match self.source() {
            Source::Raw { limit, .. } if unseen <= limit => self.took_raw(unseen),
            _ => return Err(Violation::Counters),
        }
        Ok(0)
    }

    /// Whether a byte at S would be the beginning of a frame.
    pub fn is_escape(&self, byte: u8) -> bool {
        self.escape == u32::from(byte)
    }

    /// What an ended stay left in the ring is given up: it comes once more over the anchor. False if it does not.
    pub fn give_up_residue(&mut self) -> bool {
        let comes = self.raw <= self.off;
        if comes {
            self.kept = self.off;
        }
        comes
    }

    /// Closes the open generation, after `Direction::close_unopened` said that no stay is published in it, or because it
    /// has ended.
    pub fn close(&mut self) {
        self.min_generation = self.generation + 1;
        self.generation = 0;
        self.known = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAY: Stay = Stay { generation: 5, start: 20, escape: b'e' };

    fn at_start() -> RxState {
        let mut rx = RxState::new(10);
        rx.prepare(5).unwrap();
        rx.learn(STAY);
        assert_eq!(rx.source(), Source::Raw { drop: 0, limit: 10, guarded: true });
        rx.took_raw(10);
        assert_eq!(rx.source(), Source::Ring { generation: 5 });
        rx.took_ring(4);
        rx
    }

    #[test]
    fn a_residue_is_given_up_only_if_it_comes_again() {
        for (resume, comes) in [(24, true), (25, false)] {
            let mut rx = at_start();
            let frame = Rewind { generation: 5, resume, last: false }.encode(b'e');
            assert_eq!(rx.judge(&frame, 26), Ok(Verdict::Rewound { last: false }));
            assert_eq!(rx.source(), Source::Residue { to: 26 });
            assert_eq!(rx.give_up_residue(), comes, "{resume}");
            let raw = Source::Raw { drop: 0, limit: u64::MAX, guarded: false };
            assert_eq!(rx.source(), if comes { raw } else { Source::Residue { to: 26 } });
        }
    }

    #[test]
    fn a_rewind_goes_back_and_what_is_there_already_is_dropped() {
        let mut rx = at_start();
        let frame = Rewind { generation: 5, resume: 22, last: false }.encode(b'e');
        assert_eq!(rx.judge(&frame[..15], 26), Ok(Verdict::Wait));
        assert_eq!(rx.judge(&frame, 26), Ok(Verdict::Rewound { last: false }));
        assert_eq!(rx.source(), Source::Residue { to: 26 });
        rx.took_ring(2);
        assert_eq!(rx.source(), Source::Raw { drop: 4, limit: u64::MAX, guarded: false });
        rx.took_raw(4);
        assert_eq!((rx.off, rx.raw, rx.wire), (26, 26, 20 + 16 + 4));
        assert_eq!(rx.prepare(5), Err(Reason::Superseded));
        rx.prepare(6).unwrap();
    }

    #[test]
    fn another_byte_is_a_cancel() {
        let mut rx = at_start();
        assert_eq!(rx.judge(b"x", 24), Ok(Verdict::Cancelled));
        assert_eq!(rx.source(), Source::Raw { drop: 4, limit: u64::MAX, guarded: false });
    }

    #[test]
    fn where_a_stay_resumes_is_seen_before_it_is_judged() {
        let rx = at_start();
        let frame = Rewind { generation: 5, resume: 22, last: false }.encode(b'e');
        assert_eq!(rx.resumes(&frame), Some((22, 16)));
        assert_eq!(rx.resumes(b"x"), Some((20, 0)), "cancelled");
        assert_eq!((rx.resumes(&frame[..15]), rx.resumes(b"")), (None, None));
        assert_eq!(rx.source(), Source::Ring { generation: 5 });
    }

    #[test]
    fn a_rewind_beyond_what_was_received_is_a_violation() {
        for (generation, resume) in [(5, 19), (5, 25), (4, 22)] {
            let frame = Rewind { generation, resume, last: false }.encode(b'e');
            assert_eq!(at_start().judge(&frame, 24), Err(Violation::Rewind));
        }
        assert_eq!(at_start().judge(b"eeeeeeeeeeeeeeee", 24), Err(Violation::Rewind));
    }

    #[test]
    fn a_taken_over_lock_learns_from_the_kernel() {
        let mut rx = RxState::new(10);
        rx.prepare(5).unwrap();
        assert_eq!(rx.recover(10), Ok(0));
        assert_eq!(rx.recover(14), Ok(0));
        assert_eq!((rx.off, rx.raw, rx.wire), (14, 14, 14));
        rx.learn(STAY);
        assert_eq!(rx.recover(21), Err(Violation::Counters));
        rx.took_raw(6);
        rx.took_ring(4);
        let frame = Rewind { generation: 5, resume: 22, last: false }.encode(b'e');
        assert_eq!(rx.judge(&frame, 24), Ok(Verdict::Rewound { last: false }));
        assert_eq!(rx.recover(20), Ok(16));
        assert_eq!(rx.recover(19), Err(Violation::Counters));
    }

    #[test]
    fn a_stay_below_what_was_read_was_cancelled() {
        let open = |raw| {
            let mut rx = RxState::new(10);
            rx.prepare(5).unwrap();
            rx.took_raw(raw);
            rx.learn(STAY);
            rx
        };
        let mut late = open(11);
        assert_eq!((late.generation, late.min_generation), (0, 6));
        late.prepare(6).unwrap();
        let mut early = open(5);
        assert!(early.knows_stay());
        early.took_raw(6);
        assert_eq!((early.generation, early.min_generation), (0, 6));
    }
}
