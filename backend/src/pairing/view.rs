//! What others may see of the pairing.

#![forbid(unsafe_code)]

use vsocket_channel::message::{Lane, Tuple};
use vsocket_channel::reason::Reason;

use super::stay::Kind;
use super::{EndId, EndState, Pairing};

/// One line of the operator's list.
#[derive(Clone, Debug)]
pub struct Line {
    /// Which end.
    pub end: EndId,
    /// Its addresses.
    pub tuple: Tuple,
    /// The name of what carries it.
    pub lane: &'static str,
    /// The generation, if it is in a stay.
    pub generation: Option<u32>,
    /// Why it is on TCP, if that was told.
    pub reason: Option<Reason>,
}

/// How many stays are committed, by what carries them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lanes {
    /// A ring that both programs map.
    pub direct: usize,
    /// A flow to another host.
    pub fabric: usize,
    /// A relay between two guests of this host.
    pub relay: usize,
}

impl Pairing {
    /// Stays that are not over and whose bytes we move.
    pub fn carried_stays(&self) -> usize {
        self.stays.values().filter(|stay| stay.lane() == Lane::Fabric).count()
    }

    /// Whether a vport is drained.
    pub fn drained(&self, vport: u32) -> bool {
        self.vports.get(vport as usize).is_some_and(|v| v.drained)
    }

    /// How many connections a vport has open.
    pub fn open_connections(&self, vport: u32) -> u32 {
        self.vports.get(vport as usize).map_or(0, |v| v.ends)
    }

    /// How many stays are committed on each lane.
    pub fn lanes(&self) -> Lanes {
        let of = |kind| self.stays.values().filter(|s| s.committed && !s.ending && s.kind() == kind).count();
        Lanes { direct: of(Kind::Direct), fabric: of(Kind::Fabric), relay: of(Kind::Relay) }
    }

    /// Stays that are not over, withdrawn or not.
    pub fn stays(&self) -> usize {
        self.stays.len()
    }

    /// Offers of other hosts whose ends here are not open.
    pub fn offers(&self) -> usize {
        self.remote_offers.len()
    }

    /// Every connection.
    pub fn lines(&self) -> impl Iterator<Item = Line> + '_ {
        self.ends.iter().map(|(id, end)| {
            let stay = match end.state {
                EndState::Staying(stay) => self.stays.get(&stay),
                _ => None,
            };
            let live = stay.filter(|s| s.committed && !s.ending);
            Line {
                end: *id,
                tuple: end.tuple,
                lane: live.map_or(Lane::Tcp.name(), |stay| stay.kind().name()),
                generation: stay.map(|s| s.generation),
                reason: end.told,
            }
        })
    }

    /// Whether no other host writes to this guest's memory: its stays are over, or have not got so far.
    pub fn is_quiet(&self, vport: u32) -> bool {
        !self.stays.values().any(|stay| stay.is_written_to(vport))
    }
}
