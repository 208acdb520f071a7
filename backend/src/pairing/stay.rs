//! One generation of a connection, from the first `Prepare` to the release of its memory.

#![forbid(unsafe_code)]

use vsocket_channel::Side;
use vsocket_channel::message::{Lane, Message};
use vsocket_channel::reason::Reason;

use super::{Effect, End, EndId, EndState, FlowUse, Pairing, RelayStart, RemoteOffer};
use crate::peer::message::{PeerMessage, RegionRef};
use crate::slab::SegmentId;

/// How far a guest's end is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum GuestPhase {
    /// `Prepare` was sent.
    Asked,
    /// It has prepared.
    Ready,
    /// It is to leave, and has not said that it has.
    Withdrawn,
    /// It uses the memory no longer.
    Done,
    /// Its agent is dead: nobody can say.
    Lost,
}

/// How far the peer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum HostPhase {
    /// We lead, and the peer knows nothing yet. Its offer is kept, to be put back.
    Unasked(RemoteOffer),
    /// We lead, and have told it where we receive: from here on it may write.
    Asked,
    /// It leads, receives there, and waits for our end to prepare.
    Waiting(RegionRef),
    /// Both know where the other receives.
    Ready,
    /// We write no more, and wait for its word that neither does it.
    Withdrawn,
    /// It writes no more.
    Quiet,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Guest {
    pub end: EndId,
    pub phase: GuestPhase,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Host {
    pub peer: u32,
    pub flow: u64,
    pub peer_flow: u64,
    pub phase: HostPhase,
    /// Its last byte is here, though we do not know yet why.
    pub ended: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Party {
    Guest(Guest),
    Host(Host),
}

impl Party {
    fn settled(&self) -> bool {
        match self {
            Self::Guest(guest) => matches!(guest.phase, GuestPhase::Done | GuestPhase::Lost),
            Self::Host(host) => host.phase == HostPhase::Quiet,
        }
    }
}

/// What carries a stay's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Direct,
    Fabric,
    Relay,
}

impl Kind {
    /// Its name, for the operator.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => Lane::Direct.name(),
            Self::Fabric => Lane::Fabric.name(),
            Self::Relay => "relay",
        }
    }
}

#[derive(Debug)]
pub(super) struct Stay {
    pub generation: u32,
    pub segment: SegmentId,
    /// The second party's, if each has its own: then a relay joins them.
    second: Option<SegmentId>,
    /// Which of the two are free already.
    released: [bool; 2],
    /// Side 0 and side 1. A host is side 1.
    pub parties: [Party; 2],
    pub committed: bool,
    /// Someone has left or was told to.
    pub ending: bool,
    /// It ended because an end was busy: the other may be asked again without a new `Open`.
    pub again: bool,
}

impl Stay {
    pub fn new(generation: u32, segment: SegmentId, parties: [Party; 2]) -> Self {
        let (second, released) = (None, [false; 2]);
        let (committed, ending, again) = (false, false, false);
        Self { generation, segment, second, released, parties, committed, ending, again }
    }

    pub fn relayed(generation: u32, [first, second]: [SegmentId; 2], parties: [Party; 2]) -> Self {
        Self { second: Some(second), ..Self::new(generation, first, parties) }
    }

    pub fn kind(&self) -> Kind {
        match self.parties[1] {
            Party::Host(_) => Kind::Fabric,
            Party::Guest(_) if self.second.is_some() => Kind::Relay,
            Party::Guest(_) => Kind::Direct,
        }
    }

    /// The lane, as its guests see it.
    pub fn lane(&self) -> Lane {
        if self.kind() == Kind::Direct { Lane::Direct } else { Lane::Fabric }
    }

    /// The segment of the party at this place, and its side of it.
    fn place(&self, at: usize) -> (SegmentId, Side) {
        match (at, self.second) {
            (0, _) => (self.segment, Side::Zero),
            (_, Some(second)) => (second, Side::Zero),
            (_, None) => (self.segment, Side::One),
        }
    }

    /// The memory that nobody uses any more, once each, and whether it may be used again: not if someone who maps it is
    /// gone without a word. On a relay each party's is free without the other's word, who does not map it.
    fn take_free(&mut self) -> Vec<(SegmentId, bool)> {
        let lost = |p: &Party| matches!(p, Party::Guest(guest) if guest.phase == GuestPhase::Lost);
        let shares: Vec<(SegmentId, &[Party])> = match self.second {
            Some(second) => vec![(self.segment, &self.parties[..1]), (second, &self.parties[1..])],
            None => vec![(self.segment, &self.parties)],
        };
        let mut free = Vec::new();
        for ((segment, mappers), released) in shares.into_iter().zip(&mut self.released) {
            if mappers.iter().all(Party::settled) && !std::mem::replace(released, true) {
                free.push((segment, !mappers.iter().any(lost)));
            }
        }
        free
    }

    /// The relay to start, if it is to have one.
    fn relay(&self, id: u64) -> Option<RelayStart> {
        let ([Party::Guest(a), Party::Guest(b)], Some(second)) = (self.parties, self.second) else {
            return None;
        };
        let (vports, segments) = ([a.end.vport, b.end.vport], [self.segment, second]);
        Some(RelayStart { relay: id, vports, generation: self.generation, segments })
    }

    pub fn host(&mut self) -> Option<&mut Host> {
        match &mut self.parties[1] {
            Party::Host(host) => Some(host),
            Party::Guest(_) => None,
        }
    }

    /// Whether another host may write to this vport's memory.
    pub fn is_written_to(&self, vport: u32) -> bool {
        let [Party::Guest(guest), Party::Host(host)] = self.parties else { return false };
        let writes = matches!(host.phase, HostPhase::Asked | HostPhase::Ready | HostPhase::Withdrawn);
        writes && guest.end.vport == vport
    }

    fn ready(&self) -> bool {
        self.parties.iter().all(|party| match party {
            Party::Guest(guest) => guest.phase == GuestPhase::Ready,
            Party::Host(host) => host.phase == HostPhase::Ready,
        })
    }
}

impl Pairing {
    /// The guest at this place of a stay.
    pub(super) fn guest(&mut self, stay: u64, at: usize) -> Option<&mut Guest> {
        match self.stays.get_mut(&stay)?.parties.get_mut(at)? {
            Party::Guest(guest) => Some(guest),
            Party::Host(_) => None,
        }
    }

    /// Asks the guests of a new stay to prepare.
    pub(super) fn begin(&mut self, mut stay: Stay) {
        self.last_stay += 1;
        let (generation, lane) = (stay.generation, stay.lane());
        for at in 0..stay.parties.len() {
            let Party::Guest(Guest { end: id, .. }) = stay.parties[at] else { continue };
            let (segment, side) = stay.place(at);
            self.parties.insert((id, generation), (self.last_stay, at));
            if let Some(end) = self.ends.get_mut(&id) {
                end.state = EndState::Staying(self.last_stay);
                end.min_generation = generation + 1;
                end.told = None;
            }
            self.effects.push_back(Effect::Prepare { end: id, generation, segment, side, lane });
        }
        if let Some(host) = stay.host() {
            self.flows.insert(host.flow, FlowUse::Stay(self.last_stay));
        }
        self.stays.insert(self.last_stay, stay);
    }

    /// Does what has become possible after a party has prepared.
    pub(super) fn advance(&mut self, id: u64) {
        let Some(stay) = self.stays.get_mut(&id).filter(|s| !s.ending) else { return };
        if stay.kind() == Kind::Fabric {
            return self.advance_fabric(id);
        }
        if stay.ready() {
            self.commit(id);
        }
    }

    /// Both parties are ready: the guests here may switch.
    pub(super) fn commit(&mut self, id: u64) {
        let Some(stay) = self.stays.get_mut(&id).filter(|s| s.ready() && !s.committed && !s.ending) else {
            return;
        };
        stay.committed = true;
        let (generation, parties) = (stay.generation, stay.parties);
        // Before a guest may begin.
        self.effects.extend(stay.relay(id).map(Effect::RelayStart));
        for party in parties {
            let Party::Guest(Guest { end: id, .. }) = party else { continue };
            if let Some(end) = self.ends.get_mut(&id) {
                end.tries = 0;
            }
            let message = Message::Commit { conn: id.conn, generation };
            self.effects.push_back(Effect::Tell { vport: id.vport, message });
        }
    }

    /// A guest has said that it uses the generation no longer; the other party hears `reason`.
    pub(super) fn leave(&mut self, id: u64, at: usize, reason: Reason) {
        let Some(guest) = self.guest(id, at) else { return };
        guest.phase = GuestPhase::Done;
        let end = guest.end;
        let generation = self.stays[&id].generation;
        self.parties.remove(&(end, generation));
        self.end_stay(id, reason, at);
        let again = self.stays.get(&id).is_some_and(|s| s.again);
        self.free_end(end, id, again);
        self.settle(id);
    }

    /// A guest is to leave (or its agent is dead) and has been told, or need not be; the other party hears `reason`.
    pub(super) fn silence(&mut self, id: u64, end: EndId, phase: GuestPhase, reason: Reason) {
        let Some(stay) = self.stays.get_mut(&id) else { return };
        let of = |party: &Party| matches!(party, Party::Guest(guest) if guest.end == end);
        let Some(at) = stay.parties.iter().position(of) else { return };
        let generation = stay.generation;
        let held = |guest: &&mut Guest| !matches!(guest.phase, GuestPhase::Done | GuestPhase::Lost);
        let Some(guest) = self.guest(id, at).filter(held) else { return };
        guest.phase = phase;
        if phase == GuestPhase::Lost {
            self.parties.remove(&(end, generation));
        }
        self.end_stay(id, reason, at);
        self.settle(id);
    }

    /// An end is in its stay no longer.
    fn free_end(&mut self, id: EndId, stay: u64, again: bool) {
        let Some(end) = self.ends.get_mut(&id).filter(|end| end.state == EndState::Staying(stay)) else {
            return;
        };
        end.state = if end.reopened || again { EndState::Open } else { EndState::Spent };
        end.reopened = false;
        if end.state == EndState::Open {
            self.ready.push_back(id);
        }
    }

    /// Tells every party but `by` that the stay is over, once.
    pub(super) fn end_stay(&mut self, id: u64, reason: Reason, by: usize) {
        let Some(stay) = self.stays.get_mut(&id).filter(|s| !s.ending) else { return };
        stay.ending = true;
        let generation = stay.generation;
        if stay.committed && stay.kind() == Kind::Relay {
            self.effects.push_back(Effect::RelayStop { relay: id });
        }
        for at in 0..stay.parties.len() {
            if at == by {
                continue;
            }
            let Some(stay) = self.stays.get_mut(&id) else { return };
            match &mut stay.parties[at] {
                Party::Guest(guest) if matches!(guest.phase, GuestPhase::Asked | GuestPhase::Ready) => {
                    guest.phase = GuestPhase::Withdrawn;
                    let (EndId { vport, conn }, end) = (guest.end, guest.end);
                    let message = Message::Withdraw { conn, generation, reason };
                    self.effects.push_back(Effect::Tell { vport, message });
                    if let Some(End { told, .. }) = self.ends.get_mut(&end) {
                        *told = Some(reason);
                    }
                }
                Party::Guest(_) => {}
                Party::Host(_) => self.end_host(id, reason),
            }
        }
    }

    /// Tells the peer that the stay is over, as far as it knows of it.
    fn end_host(&mut self, id: u64, reason: Reason) {
        let Some(stay) = self.stays.get_mut(&id) else { return };
        let generation = stay.generation;
        let Some(host) = stay.host() else { return };
        let Host { peer, flow, peer_flow, phase, ended } = *host;
        let reason = reason as u16;
        match phase {
            HostPhase::Unasked(offer) => {
                host.phase = HostPhase::Quiet;
                self.put_back(id, offer);
            }
            HostPhase::Asked | HostPhase::Ready => {
                host.phase = if ended { HostPhase::Quiet } else { HostPhase::Withdrawn };
                let message = PeerMessage::Withdraw { flow, peer_flow, generation, reason };
                self.effects.push_back(Effect::FlowStop { flow });
                self.effects.push_back(Effect::Peer { peer, message });
                if phase == HostPhase::Asked {
                    // We do not know where it receives, so nothing was written; and it may have no flow yet that
                    // would take our last word on the queue pair.
                    let message = PeerMessage::Withdrawn { flow, peer_flow, generation };
                    self.effects.push_back(Effect::Peer { peer, message });
                }
            }
            HostPhase::Waiting(_) => {
                host.phase = HostPhase::Quiet;
                let message = PeerMessage::Refuse { flow, peer_flow, generation, reason };
                self.effects.push_back(Effect::Peer { peer, message });
            }
            HostPhase::Withdrawn | HostPhase::Quiet => {}
        }
    }

    /// Releases memory of a stay that is ending, and forgets the stay when no party uses any of it.
    pub(super) fn settle(&mut self, id: u64) {
        let Some(stay) = self.stays.get_mut(&id).filter(|stay| stay.ending) else { return };
        let (free, over) = (stay.take_free(), stay.parties.iter().all(Party::settled));
        if over && let Some(host) = self.stays.remove(&id).as_mut().and_then(Stay::host) {
            let flow = host.flow;
            // An offer that was put back keeps its number.
            if matches!(self.flows.get(&flow), Some(FlowUse::Stay(stay)) if *stay == id) {
                self.flows.remove(&flow);
            }
            self.effects.push_back(Effect::FlowDrop { flow });
        }
        self.effects.extend(free.into_iter().map(|(segment, reuse)| Effect::Release { segment, reuse }));
    }
}
