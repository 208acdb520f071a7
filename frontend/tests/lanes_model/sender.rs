//! The sending endpoint, step by step under its lock: application, library, and who takes over from a dead process.

use crate::anchor::Origin;
use crate::world::{Broken, Config, Kind, Lane, Moves, Mutation, World, require};
use vsocket_channel::lane::{REWIND_LEN, Rewind};
use vsocket_frontend::lane::tx::{Due, Phase};

/// Where the lock's owner stands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SenderAt {
    /// The lock is free.
    Idle,
    /// The kernel took this many raw bytes; to be recorded.
    RawWritten(u8),
    /// The stay is begun in the record; this many bytes are in ring memory.
    Switched(u8),
    /// The stay is to be published; so many bytes are not yet recorded (none, but for a mutation).
    StayDue(u8),
    /// It is stored; `reader.sealed` is to be loaded.
    StayStored(u8),
    /// The ring's head is to be published.
    HeadDue(u8),
    /// Published, to be recorded (only by a mutation).
    RecordDue(u8),
    /// `confirmed` was read so; the tail is to be read, and the stay sealed.
    Sealing(bool),
    /// The kernel took this many bytes of what was due; to be recorded.
    DrainWritten(u8),
    /// The owner has died.
    TakeOver,
    /// Taken over on the ring: to be sealed.
    MustSeal,
}

pub fn moves(moves: &mut Moves, config: &Config) {
    let world = moves.from;
    if world.anchor.reset || world.guest_gone {
        return;
    }
    match world.sender {
        SenderAt::Idle => idle(moves, config),
        SenderAt::RawWritten(n) => moves.add(Kind::Duty, "X records raw", n.into(), |w| {
            w.tx.sent_raw(n.into());
            w.sent();
            Ok(())
        }),
        SenderAt::Switched(n) => moves.add(Kind::Duty, "X records ring", n.into(), |w| {
            w.sender = SenderAt::StayDue(w.record_or_defer(config, n));
            Ok(())
        }),
        SenderAt::StayDue(n) => moves.add(Kind::Duty, "X stores the stay", 0, |w| {
            w.publish_stay(config);
            w.sender = SenderAt::StayStored(n);
            Ok(())
        }),
        SenderAt::StayStored(n) => {
            moves.add(Kind::Duty, "X loads sealed", 0, |w| w.stay_published(config, n))
        }
        SenderAt::HeadDue(n) => moves.add(Kind::Duty, "X publishes the head", 0, |w| {
            w.publish_head(config, w.tx.off + u64::from(n));
            if n == 0 {
                w.sent();
            } else {
                w.sender = SenderAt::RecordDue(n);
            }
            Ok(())
        }),
        SenderAt::RecordDue(n) => moves.add(Kind::Duty, "X records ring", n.into(), |w| {
            w.tx.sent_ring(n.into());
            w.sent();
            Ok(())
        }),
        SenderAt::Sealing(confirmed) => moves.add(Kind::Duty, "X seals", confirmed.into(), |w| {
            let tail = w.generation(w.tx.generation).tx_tail;
            w.seal(config, confirmed, tail.into())
        }),
        SenderAt::DrainWritten(n) => moves.add(Kind::Duty, "X records what was due", n.into(), |w| {
            w.tx.drained(n.into());
            w.sender = SenderAt::Idle;
            Ok(())
        }),
        SenderAt::TakeOver => moves.add(Kind::Duty, "X's lock is taken over", 0, |w| {
            if !config.mutated(Mutation::SenderUnrecovered) {
                w.tx.recover(w.anchor.put)?;
            }
            w.sender = if w.phase() == Phase::Ring { SenderAt::MustSeal } else { SenderAt::Idle };
            Ok(())
        }),
        SenderAt::MustSeal => seal(moves, config),
    }
}

fn idle(moves: &mut Moves, config: &Config) {
    let world = moves.from;
    if !world.closed {
        send(moves, config);
        moves.add(Kind::Application, "X closes", 0, |w| {
            w.closed = true;
            Ok(())
        });
    }
    match world.phase() {
        Phase::Anchor => {
            if world.closed && !world.anchor.fin {
                moves.add(Kind::Duty, "X shuts the anchor", 0, |w| {
                    w.anchor.fin = true;
                    Ok(())
                });
            }
        }
        // Planned, failed, suspected or shut: at any time, and all one procedure.
        Phase::Ring => seal(moves, config),
        Phase::Draining => drain(moves, config),
    }
}

fn send(moves: &mut Moves, config: &Config) {
    let world = moves.from;
    let left = config.bytes.saturating_sub(world.tx.off);
    match world.phase() {
        Phase::Anchor => {
            for n in config.sizes(world.tx.off, left.min(config.anchor.saturating_sub(world.anchor.len()))) {
                moves.add(Kind::Application, "X writes raw", n, |w| {
                    w.anchor.put(Origin::Tenant(w.tx.off as u8), n)?;
                    w.sender = SenderAt::RawWritten(n as u8);
                    Ok(())
                });
            }
            if world.ready == 0 {
                return;
            }
            for n in config.sizes(world.tx.off, left.min(config.ring)) {
                moves.add(Kind::Application, "X switches", n, |w| {
                    let first = config.data[w.tx.off as usize];
                    // `escape_for` is an involution without fixed point: of its result it makes the byte itself.
                    let first = if config.mutated(Mutation::SameEscape) { !first } else { first };
                    let stay = w.tx.switch(w.ready.into(), first);
                    let generation = w.generation(stay.generation);
                    generation.start = stay.start as u8;
                    generation.escape = stay.escape;
                    w.ready = 0;
                    w.sender = SenderAt::Switched(n as u8);
                    Ok(())
                });
            }
        }
        Phase::Ring => {
            let generation = &world.generations[world.tx.generation as usize - 1];
            let tail = if config.lane == Lane::Direct { generation.tail } else { generation.tx_tail };
            let room = config.ring - (world.tx.off - u64::from(tail));
            for n in config.sizes(world.tx.off, left.min(room)) {
                moves.add(Kind::Application, "X puts on the ring", n, |w| {
                    w.sender = SenderAt::HeadDue(w.record_or_defer(config, n as u8));
                    Ok(())
                });
            }
        }
        Phase::Draining => {}
    }
}

fn seal(moves: &mut Moves, config: &Config) {
    let generation = moves.from.generations[moves.from.tx.generation as usize - 1];
    if config.mutated(Mutation::WaitForBackend) && !generation.confirmed {
        return;
    }
    moves.add(Kind::Duty, "X begins to seal", 0, |w| {
        if config.lane == Lane::Direct {
            return w.seal(config, false, generation.head.into());
        }
        w.sender = SenderAt::Sealing(generation.confirmed);
        Ok(())
    });
}

fn drain(moves: &mut Moves, config: &Config) {
    let world = moves.from;
    let room = config.anchor.saturating_sub(world.anchor.len());
    let sizes = match world.tx.due() {
        Due::Frame { done, .. } => {
            let rest = (REWIND_LEN - done) as u64;
            let raw = world.tx.off - world.tx.raw;
            let part = if config.parts && done == 0 { 7 } else { 0 };
            vec![part, rest, if raw > 0 { rest + raw } else { 0 }]
        }
        Due::Raw { from, to } => config.sizes(from, to - from).collect(),
        Due::Nothing => Vec::new(),
    };
    for n in sizes.into_iter().filter(|n| (1..=room).contains(n)) {
        moves.add(Kind::Duty, "X writes what is due", n, |w| w.write_due(config, n));
    }
}

impl World {
    /// The stay ends, and the frame will say why.
    fn seal(&mut self, config: &Config, confirmed: bool, acknowledged: u64) -> Result<(), Broken> {
        if self.closed || config.mutated(Mutation::ShutUnshut) {
            self.tx.shut();
        }
        self.tx.seal(confirmed, acknowledged)?;
        self.sender = SenderAt::Idle;
        Ok(())
    }

    /// A send call returns.
    fn sent(&mut self) {
        self.accepted = self.tx.off as u8;
        self.sender = SenderAt::Idle;
    }

    /// The record counts ring bytes before the ring's head shows them.
    fn record_or_defer(&mut self, config: &Config, n: u8) -> u8 {
        if config.mutated(Mutation::PublishFirst) {
            return n;
        }
        self.tx.sent_ring(n.into());
        0
    }

    fn publish_stay(&mut self, config: &Config) {
        let raw = self.rx.raw;
        let generation = self.generation(self.tx.generation);
        generation.published = true;
        generation.tx_head = generation.start;
        generation.tx_tail = generation.start;
        if config.lane == Lane::Direct {
            generation.announce(raw);
        }
    }

    fn stay_published(&mut self, config: &Config, n: u8) -> Result<(), Broken> {
        if config.lane == Lane::Direct {
            if self.generation(self.tx.generation).reader_sealed {
                self.tx.sent_ring(n.into());
                self.tx.seal(false, self.tx.start)?;
                self.sent();
                return Ok(());
            }
            self.tx.confirm();
        }
        self.sender = SenderAt::HeadDue(n);
        Ok(())
    }

    fn publish_head(&mut self, config: &Config, head: u64) {
        let generation = self.generation(self.tx.generation);
        if config.lane == Lane::Direct {
            generation.head = head as u8;
        } else {
            generation.tx_head = head as u8;
        }
    }

    fn write_due(&mut self, config: &Config, n: u64) -> Result<(), Broken> {
        let (mut frame_part, mut raw_part) = (0, n);
        if let Due::Frame { frame, done } = self.tx.due() {
            frame_part = n.min((REWIND_LEN - done) as u64);
            raw_part = n - frame_part;
            let origin = Origin::Frame {
                generation: self.tx.generation as u8,
                resume: self.tx.resume as u8,
                escape: frame[0],
                last: Rewind::decode(&frame, frame[0]).is_some_and(|rewind| rewind.last),
                from: done as u8,
            };
            self.anchor.put(origin, frame_part)?;
        } else if config.mutated(Mutation::LateAcks) {
            let tail = self.generation(self.tx.generation).tx_tail;
            self.tx.raw = self.tx.raw.max(tail.into());
            raw_part = raw_part.min(self.tx.off - self.tx.raw);
        }
        require(raw_part == 0 || self.tx.raw + config.ring >= self.tx.off, || {
            format!("byte {} is not in the ring any more", self.tx.raw)
        })?;
        self.anchor.put(Origin::Tenant(self.tx.raw as u8), raw_part)?;
        self.sender = SenderAt::DrainWritten((frame_part + raw_part) as u8);
        Ok(())
    }
}
