//! The receiving endpoint, step by step under its lock.

use crate::anchor::Origin;
use crate::world::{Broken, Config, End, Generation, Kind, Moves, Mutation, World, require};
use vsocket_channel::lane::REWIND_LEN;
use vsocket_frontend::lane::rx::{Source, Verdict};

/// Where the lock's owner stands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ReceiverAt {
    /// The lock is free.
    Idle,
    /// FIONREAD counted this many; the stay is to be looked for.
    Counted(u8),
    /// The stay was looked for; at most this many may be taken.
    Looked(u8),
    /// So many bytes were taken, to be recorded; the read was guarded.
    Taken(u8, bool),
    /// They are recorded; the stay is to be looked for again.
    LookDue,
    /// Ring bytes are copied and recorded; the tail of this generation is to be published.
    ReleaseDue(u8),
    /// By a mutation, the ring's head is sampled already; the anchor is to be peeked.
    Sampled(u8),
    /// The anchor's first bytes were peeked, so many; perhaps the ring's head was sampled before.
    Peeked(u8, Option<u8>),
    /// The verdict is stored; so many bytes of the frame are to be taken from the anchor.
    ConsumeDue(u8),
    /// By a mutation the frame is taken; the verdict is to be stored.
    StoreDue,
    /// `reader.sealed` is stored; the stay is to be looked for.
    Closing,
    /// The owner has died.
    TakeOver,
    /// The taken-over ring's tail is to be published.
    TailDue,
}

pub fn moves(moves: &mut Moves, config: &Config) {
    let world = moves.from;
    if world.unread {
        return unread(moves);
    }
    match world.receiver {
        ReceiverAt::Idle => idle(moves, config),
        ReceiverAt::Counted(q) => moves.add(Kind::Duty, "Y looks for the stay", 0, |w| {
            w.look(config);
            let raw = matches!(w.rx.source(), Source::Raw { .. });
            w.receiver = if raw { ReceiverAt::Looked(q) } else { ReceiverAt::Idle };
            Ok(())
        }),
        ReceiverAt::Looked(q) => {
            let most = if config.mutated(Mutation::Uncapped) { u64::MAX } else { q.into() };
            take_raw(moves, config, most, true);
            if world.anchor.is_empty() {
                moves.add(Kind::Duty, "Y finds a reset", 0, World::fail);
            }
        }
        ReceiverAt::Taken(n, guarded) => moves.add(Kind::Duty, "Y records raw", n.into(), |w| {
            w.rx.took_raw(n.into());
            let look = guarded
                && !config.mutated(Mutation::NoLookAfterRaw)
                && !config.mutated(Mutation::NoCheckAfterRaw);
            w.receiver = if look { ReceiverAt::LookDue } else { ReceiverAt::Idle };
            Ok(())
        }),
        ReceiverAt::LookDue => moves.add(Kind::Duty, "Y looks again", 0, |w| {
            w.look(config);
            w.receiver = ReceiverAt::Idle;
            Ok(())
        }),
        ReceiverAt::ReleaseDue(g) => moves.add(Kind::Duty, "Y releases", g.into(), |w| {
            w.generation(g.into()).tail = w.rx.off as u8;
            w.receiver = ReceiverAt::Idle;
            Ok(())
        }),
        ReceiverAt::Sampled(head) => peek(moves, Some(head)),
        ReceiverAt::Peeked(n, head) => {
            moves.add(Kind::Duty, "Y judges", n.into(), |w| w.judge(config, n, head))
        }
        ReceiverAt::ConsumeDue(n) => moves.add(Kind::Duty, "Y takes the frame", n.into(), |w| w.consume(n)),
        ReceiverAt::StoreDue => moves.add(Kind::Duty, "Y stores the verdict", 0, |w| {
            w.store_late();
            Ok(())
        }),
        ReceiverAt::Closing => moves.add(Kind::Duty, "Y looks before it closes", 0, |w| {
            w.receiver = ReceiverAt::Idle;
            if w.found().is_none_or(|g| !g.announced) || config.mutated(Mutation::NoSecondLook) {
                w.rx.close();
            } else {
                w.look(config);
            }
            Ok(())
        }),
        ReceiverAt::TakeOver => moves.add(Kind::Duty, "Y's lock is taken over", 0, |w| w.take_over(config)),
        ReceiverAt::TailDue => moves.add(Kind::Duty, "Y releases again", 0, |w| {
            let g = if w.rx.generation == 0 { w.rx.min_generation - 1 } else { w.rx.generation };
            if g > 0 && w.generation(g).announced && w.rx.off >= w.generation(g).start.into() {
                w.generation(g).tail = w.rx.off as u8;
            }
            w.receiver = ReceiverAt::Idle;
            Ok(())
        }),
    }
}

fn idle(moves: &mut Moves, config: &Config) {
    let world = moves.from;
    if world.rx.generation != 0 && !world.rx.knows_stay() {
        // It was told that the generation failed, be it true or not.
        moves.add(Kind::Environment, "Y gives the generation up", world.rx.generation.into(), |w| {
            w.generation(w.rx.generation).reader_sealed = true;
            w.receiver = ReceiverAt::Closing;
            Ok(())
        });
    }
    match world.rx.source() {
        Source::Raw { guarded: false, .. } => {
            take_raw(moves, config, u64::MAX, false);
            end_of_anchor(moves);
        }
        Source::Raw { .. } => {
            if !world.anchor.is_empty() {
                moves.add(Kind::Duty, "Y counts", world.anchor.len(), |w| {
                    w.receiver = ReceiverAt::Counted(w.anchor.len() as u8);
                    Ok(())
                });
            } else if world.found().is_some_and(|g| g.announced) && !world.rx.knows_stay() {
                moves.add(Kind::Duty, "Y looks for the stay", 0, |w| {
                    w.look(config);
                    Ok(())
                });
            } else {
                end_of_anchor(moves);
            }
        }
        Source::Ring { generation } => {
            let head = u64::from(world.generations[generation as usize - 1].head);
            if head == world.rx.off {
                at_the_end_of_the_ring(moves, config, head);
            } else {
                take_ring(moves, config, generation, head);
            }
        }
        Source::Residue { to } => take_ring(moves, config, world.rx.min_generation - 1, to),
    }
}

fn end_of_anchor(moves: &mut Moves) {
    let world = moves.from;
    if world.anchor.reset {
        moves.add(Kind::Duty, "Y finds a reset", 0, World::fail);
    } else if world.anchor.fin && world.anchor.is_empty() {
        moves.add(Kind::Duty, "Y reads the end", 0, World::eof);
    }
}

fn take_raw(moves: &mut Moves, config: &Config, most: u64, guarded: bool) {
    let world = moves.from;
    let Source::Raw { limit, drop, .. } = world.rx.source() else { unreachable!("a raw source") };
    let drop = if config.mutated(Mutation::KeepDuplicates) { 0 } else { drop };
    for n in config.sizes(world.rx.raw, world.anchor.len().min(limit).min(most)) {
        moves.add(Kind::Duty, "Y takes raw", n, |w| {
            for i in 0..n {
                w.took_byte(i < drop, w.rx.raw + i)?;
            }
            w.receiver = ReceiverAt::Taken(n as u8, guarded);
            Ok(())
        });
    }
}

fn take_ring(moves: &mut Moves, config: &Config, generation: u32, to: u64) {
    let world = moves.from;
    let off = world.rx.off;
    if off > to {
        return moves.add(Kind::Duty, "Y reads the ring", 0, |_| {
            Err(Broken(format!("the ring ends at {to}, the receiver stands at {off}")))
        });
    }
    for n in config.sizes(off, to - off) {
        moves.add(Kind::Duty, "Y reads the ring", n, |w| {
            let Generation { head, tail, .. } = *w.generation(generation);
            require(
                off >= tail.into() && off + n <= head.into() && off + config.ring >= head.into(),
                || format!("the ring holds {tail}..{head}, the receiver stands at {off}"),
            )?;
            w.rx.took_ring(n);
            w.delivered += n as u8;
            w.receiver = ReceiverAt::ReleaseDue(generation as u8);
            Ok(())
        });
    }
}

fn at_the_end_of_the_ring(moves: &mut Moves, config: &Config, head: u64) {
    let world = moves.from;
    if config.mutated(Mutation::HeadFirst) {
        moves.add(Kind::Environment, "Y samples the head", head, |w| {
            w.receiver = ReceiverAt::Sampled(head as u8);
            Ok(())
        });
    } else if !world.anchor.is_empty() {
        peek(moves, None);
    } else if world.anchor.reset {
        moves.add(Kind::Duty, "Y finds a reset", 0, World::fail);
    } else if world.anchor.fin {
        moves.add(Kind::Duty, "Y reads the end", 0, |w| {
            require(w.guest_gone, || "the anchor ends at S, and nobody has died".into())?;
            w.fail()
        });
    }
}

fn peek(moves: &mut Moves, head: Option<u8>) {
    let n = moves.from.anchor.len().min(REWIND_LEN as u64) as u8;
    moves.add(Kind::Duty, "Y peeks", n.into(), |w| {
        w.receiver = if n == 0 { ReceiverAt::Idle } else { ReceiverAt::Peeked(n, head) };
        Ok(())
    });
}

/// The receiver's application is gone; its agent takes everything from the anchor.
fn unread(moves: &mut Moves) {
    let anchor = &moves.from.anchor;
    if !anchor.is_empty() {
        moves.add(Kind::Duty, "Y's agent drains", anchor.len(), |w| {
            w.anchor.drain();
            Ok(())
        });
    } else if anchor.fin || anchor.reset {
        moves.add(Kind::Duty, "Y's agent has the end", 0, |w| {
            w.end = End::Drained;
            Ok(())
        });
    }
}

impl World {
    /// The direction memory of the open generation.
    fn found(&self) -> Option<&Generation> {
        self.rx.generation.checked_sub(1).map(|g| &self.generations[g as usize])
    }

    /// Looks for the stay of the open generation, and learns it.
    fn look(&mut self, config: &Config) {
        let Some(generation) = self.found() else { return };
        let Some(stay) = generation.stay(self.rx.generation) else { return };
        let late = config.mutated(Mutation::StaleStay)
            || config.mutated(Mutation::NoCheckAfterRaw) && generation.in_time;
        let raw = self.rx.raw;
        if late {
            self.rx.raw = raw.min(stay.start);
        }
        self.rx.learn(stay);
        self.rx.raw = raw;
    }

    /// The application gets a raw byte, or one is dropped that it has.
    fn took_byte(&mut self, dropped: bool, at: u64) -> Result<(), Broken> {
        let delivered = self.delivered;
        match self.anchor.take() {
            Origin::Frame { resume, from, .. } => {
                Err(Broken(format!("byte {from} of REWIND({resume}) goes to the application")))
            }
            Origin::Tenant(o) if u64::from(o) != at => {
                Err(Broken(format!("byte {o} is taken for byte {at}")))
            }
            Origin::Tenant(o) if dropped => {
                require(o < delivered, || format!("byte {o} is dropped, only {delivered} were delivered"))
            }
            Origin::Tenant(o) => {
                self.delivered += 1;
                require(o == delivered, || format!("byte {o} is delivered after {delivered}"))
            }
        }
    }

    fn judge(&mut self, config: &Config, n: u8, sampled: Option<u8>) -> Result<(), Broken> {
        let (peeked, origin) = self.anchor.peek(n.into(), config.data);
        let open = self.rx.generation;
        let head = sampled.unwrap_or(self.generation(open).head);
        let before = self.rx;
        let verdict = self.rx.judge(&peeked, head.into());
        let right = match origin {
            Origin::Frame { generation, last, from: 0, .. } if u32::from(generation) == open => match verdict
            {
                Ok(Verdict::Rewound { last: said }) => said == last,
                _ => verdict != Ok(Verdict::Cancelled),
            },
            _ => verdict == Ok(Verdict::Cancelled) && origin == Origin::Tenant(before.start as u8),
        };
        require(right, || format!("{origin:?} is judged {verdict:?}"))?;
        let verdict = verdict?;
        // Who hears so keeps the other direction where it is: no stay of this one follows.
        let last = verdict == Verdict::Rewound { last: true };
        require(!last || self.closed, || "the last stay has ended, and its sender may send".into())?;
        if verdict != Verdict::Wait {
            self.generation(open).reader_sealed = true;
        }
        self.receiver = match verdict {
            Verdict::Rewound { .. } if config.mutated(Mutation::ConsumeFirst) => {
                self.rx = before;
                self.consume(REWIND_LEN as u8)?;
                ReceiverAt::StoreDue
            }
            Verdict::Rewound { .. } => ReceiverAt::ConsumeDue(REWIND_LEN as u8),
            Verdict::Cancelled | Verdict::Wait => ReceiverAt::Idle,
        };
        Ok(())
    }

    fn consume(&mut self, n: u8) -> Result<(), Broken> {
        if self.anchor.reset {
            return self.fail();
        }
        for _ in 0..n {
            let origin = self.anchor.take();
            require(matches!(origin, Origin::Frame { .. }), || format!("{origin:?} is thrown away"))?;
        }
        self.receiver = ReceiverAt::Idle;
        Ok(())
    }

    /// [`Mutation::ConsumeFirst`] only: nothing dies here, so the verdict need not be right, just stored.
    fn store_late(&mut self) {
        let head = self.generation(self.rx.generation).head;
        self.rx.kept = u64::from(head).max(self.rx.off);
        self.rx.wire += REWIND_LEN as u64;
        self.rx.raw = self.tx.resume;
        self.rx.close();
        self.receiver = ReceiverAt::Idle;
    }

    fn take_over(&mut self, config: &Config) -> Result<(), Broken> {
        self.receiver = ReceiverAt::TailDue;
        if !config.mutated(Mutation::ReceiverUnrecovered) && !self.anchor.reset {
            let untaken = self.rx.recover(self.anchor.taken)?;
            if untaken > 0 && !config.mutated(Mutation::FrameLeft) {
                self.receiver = ReceiverAt::ConsumeDue(untaken as u8);
            }
        }
        Ok(())
    }

    /// The application gets an error, for a reason.
    pub fn fail(&mut self) -> Result<(), Broken> {
        require(self.anchor.reset || self.guest_gone, || "an error without a cause".into())?;
        self.end = End::Error;
        Ok(())
    }
}
