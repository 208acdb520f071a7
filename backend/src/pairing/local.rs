//! Pairing two ends of this host: over one segment that both map (`direct`), or, if they are to share no memory, over one
//! each, which a **relay** joins.
//!
//! To its ends a relayed stay is one on the fabric: each is side 0 of a segment that only this backend maps too, and hears
//! the same. The relay begins right before both are told to commit, and ends the moment the stay does; so a segment is free
//! as soon as its own guest has left, however long the other takes.

#![forbid(unsafe_code)]

use vsocket_channel::reason::Reason;

use super::stay::{Guest, GuestPhase, Kind, Party, Stay};
use super::{Effect, EndId, Pairing};
use crate::relay::RELAY;
use crate::slab::{Program, SegmentId, Segments, SlabKey, Taken};

/// Why there is none.
enum Without {
    /// It is coming.
    Coming,
    Nothing(Reason),
}

impl Pairing {
    /// Pairs two open ends of this host; `a` is of the smaller vport.
    pub(super) fn start_local(&mut self, a: EndId, b: EndId, segments: &mut impl Segments) {
        let generation = [a, b].map(|id| self.ends[&id].min_generation).into_iter().fold(1, u32::max);
        if generation == u32::MAX {
            return self.decline_both([a, b], Reason::Violation);
        }
        let parties = [a, b].map(|end| Party::Guest(Guest { end, phase: GuestPhase::Asked }));
        let stay = if self.relays([a, b]) {
            self.take_each([a, b], segments).map(|each| Stay::relayed(generation, each, parties))
        } else {
            self.take_shared([a, b], segments).map(|segment| Stay::new(generation, segment, parties))
        };
        match stay {
            Ok(stay) => self.begin(stay),
            Err(Without::Coming) => {}
            Err(Without::Nothing(reason)) => self.decline_both([a, b], reason),
        }
    }

    /// A relay has failed, or could not be made.
    pub fn handle_relay_failed(&mut self, relay: u64, reason: Reason) {
        if self.stays.get(&relay).is_some_and(|stay| stay.kind() == Kind::Relay) {
            self.end_stay(relay, reason, usize::MAX);
            self.settle(relay);
        }
    }

    /// Whether one of these ends may not share memory with the other.
    fn relays(&self, ends: [EndId; 2]) -> bool {
        ends.iter().any(|id| self.vports[id.vport as usize].facts.relayed)
    }

    fn program(&self, id: EndId) -> Program {
        (id.vport, self.ends[&id].program)
    }

    fn take_shared(&self, [a, b]: [EndId; 2], segments: &mut impl Segments) -> Result<SegmentId, Without> {
        let key = SlabKey::Direct(self.program(a), self.program(b));
        let ring_len = |id: EndId| self.vports[id.vport as usize].facts.ring_len;
        taken(segments.take(key, ring_len(a).min(ring_len(b))))
    }

    /// A segment for each; the first is given back if there is none for the second.
    fn take_each(
        &mut self,
        ends: [EndId; 2],
        segments: &mut impl Segments,
    ) -> Result<[SegmentId; 2], Without> {
        let [(key, len), (other_key, other_len)] = ends.map(|id| {
            let key = SlabKey::Fabric(self.program(id), RELAY);
            (key, self.vports[id.vport as usize].facts.ring_len)
        });
        let first = taken(segments.take(key, len)).inspect_err(|without| {
            if matches!(without, Without::Coming) {
                // So that both are on their way at the same time.
                segments.look(other_key, other_len);
            }
        })?;
        match taken(segments.take(other_key, other_len)) {
            Ok(second) => Ok([first, second]),
            Err(without) => {
                // Nobody has seen it.
                self.effects.push_back(Effect::Release { segment: first, reuse: true });
                Err(without)
            }
        }
    }

    fn decline_both(&mut self, ends: [EndId; 2], reason: Reason) {
        ends.into_iter().for_each(|id| self.decline(id, reason));
    }
}

fn taken(taken: Taken) -> Result<SegmentId, Without> {
    match taken {
        Taken::Segment(segment) => Ok(segment),
        Taken::Coming => Err(Without::Coming),
        Taken::Nothing(reason) => Err(Without::Nothing(reason)),
    }
}
