//! What happens to the endpoints: pairing, backends (slow, killed, or acting after they were given up), deaths, resets.
//!
//! An agent's death is no event of its own: whoever lives makes the endpoint's moves, so with the agent dead they are the
//! library's, or the connection is reset; with both dead there is [`World::guest_dies`].

use crate::receiver::ReceiverAt;
use crate::sender::SenderAt;
use crate::world::{Config, Generation, Kind, Lane, Moves, Mutation, Relay, World};
use vsocket_frontend::lane::tx::Phase;

pub fn moves(moves: &mut Moves, config: &Config) {
    pairing(moves, config);
    if config.lane == Lane::Fabric {
        for g in 1..=u32::from(moves.from.prepared) {
            relay(moves, config, g);
        }
    }
    deaths(moves, config);
    if config.aborts && !moves.from.anchor.reset {
        moves.add(Kind::Environment, "the anchor is reset", 0, |w| {
            w.reset();
            Ok(())
        });
    }
}

fn pairing(moves: &mut Moves, config: &Config) {
    let world = moves.from;
    if world.ready != 0 {
        moves.add(Kind::Environment, "READY is withdrawn", world.ready.into(), |w| {
            w.ready = 0;
            Ok(())
        });
        return;
    }
    let next = world.prepared + 1;
    let consent = world.sender == SenderAt::Idle && world.phase() == Phase::Anchor && !world.closed;
    let able = world.receiver == ReceiverAt::Idle && !world.unread && !world.anchor.reset;
    let mut rx = world.rx;
    if consent && able && usize::from(next) <= config.generations && rx.prepare(next.into()).is_ok() {
        moves.add(Kind::Environment, "both prepare", next.into(), |w| {
            w.rx = rx;
            w.prepared = next;
            w.ready = next;
            let relay = if config.lane == Lane::Fabric { Relay::Fresh } else { Relay::Gone };
            *w.generation(next.into()) = Generation { relay, ..Generation::default() };
            Ok(())
        });
    }
}

/// The backends of one generation, which look at nothing but its memory: whether the stay was sealed meanwhile, they do not
/// know. One that was killed never comes back; the one that is started after it serves other generations.
fn relay(moves: &mut Moves, config: &Config, g: u32) {
    let generation = moves.from.generations[g as usize - 1];
    if generation.relay == Relay::Gone {
        return;
    }
    moves.add(Kind::Environment, "the backend is killed", g.into(), |w| {
        w.generation(g).relay = Relay::Gone;
        Ok(())
    });
    match generation.relay {
        Relay::Fresh if generation.tx_head > generation.start => {
            moves.add(Kind::Environment, "the backend stores the stay", g.into(), |w| {
                let raw = w.rx.raw;
                w.generation(g).announce(raw);
                w.generation(g).relay = Relay::StayStored;
                Ok(())
            });
        }
        Relay::StayStored => moves.add(Kind::Environment, "the backend loads sealed", g.into(), |w| {
            let sealed = generation.reader_sealed && !config.mutated(Mutation::BlindConfirm);
            w.generation(g).relay = if sealed { Relay::Gone } else { Relay::Open };
            Ok(())
        }),
        Relay::Open => open(moves, config, g, generation),
        Relay::Fresh | Relay::Gone => {}
    }
}

fn open(moves: &mut Moves, config: &Config, g: u32, generation: Generation) {
    let room = config.ring - u64::from(generation.head - generation.tail.min(generation.head));
    for n in config.sizes(generation.head.into(), room.min(u64::from(generation.tx_head - generation.head))) {
        moves.add(Kind::Environment, "the backend delivers", n, |w| {
            w.generation(g).head += n as u8;
            Ok(())
        });
    }
    if !moves.from.sender_uses(g) {
        // What a backend acknowledges now, nobody reads.
    } else if !generation.confirmed {
        moves.add(Kind::Environment, "the backend confirms", g.into(), |w| {
            w.generation(g).confirmed = true;
            Ok(())
        });
    } else if generation.tx_tail < generation.head {
        moves.add(Kind::Environment, "the backend acknowledges", generation.head.into(), |w| {
            w.generation(g).tx_tail = generation.head;
            Ok(())
        });
    }
}

fn deaths(moves: &mut Moves, config: &Config) {
    let world = moves.from;
    if config.sender_dies && !world.sender_died && !world.anchor.fin && !world.anchor.reset {
        let dies = |w: &mut World| {
            if config.mutated(Mutation::TornRecord)
                && let SenderAt::RawWritten(n) = w.sender
            {
                w.tx.off += u64::from(n);
                w.tx.raw += u64::from(n);
            }
            w.sender_died = true;
            w.sender = SenderAt::TakeOver;
        };
        if world.sender != SenderAt::Idle {
            moves.add(Kind::Environment, "X dies, another process goes on", 0, |w| {
                dies(w);
                Ok(())
            });
            moves.add(Kind::Environment, "X dies, its agent finishes", 0, |w| {
                dies(w);
                w.closed = true;
                Ok(())
            });
        }
        moves.add(Kind::Environment, "X's guest dies", 0, |w| {
            w.sender_died = true;
            w.guest_dies(config);
            Ok(())
        });
    }
    if config.receiver_dies && !world.receiver_died {
        if world.receiver != ReceiverAt::Idle {
            moves.add(Kind::Environment, "Y dies, another process goes on", 0, |w| {
                w.receiver_died = true;
                w.receiver = ReceiverAt::TakeOver;
                Ok(())
            });
        }
        moves.add(Kind::Environment, "Y dies, its agent drains", 0, |w| {
            w.receiver_died = true;
            w.unread = true;
            w.receiver = ReceiverAt::Idle;
            Ok(())
        });
    }
}

impl World {
    fn reset(&mut self) {
        self.anchor.reset();
        self.ready = 0;
        if matches!(self.receiver, ReceiverAt::Peeked(..)) {
            self.receiver = ReceiverAt::Idle;
        }
    }

    /// Application and agent are dead, so nobody drains the ring. Who closes the anchor may end it as usual only if
    /// nothing is missing on it; else it must reset it.
    fn guest_dies(&mut self, config: &Config) {
        self.guest_gone = true;
        self.closed = true;
        let whole = self.tx.recover(self.anchor.put).is_ok() && self.phase() == Phase::Anchor;
        self.tx.wire = self.anchor.put;
        self.sender = SenderAt::Idle;
        if whole || config.mutated(Mutation::DeadGuestFin) {
            self.anchor.fin = true;
        } else {
            self.reset();
        }
    }
}
