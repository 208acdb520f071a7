//! What another backend says.

#![forbid(unsafe_code)]

use std::net::SocketAddr;

use vsocket_channel::layout::Geometry;
use vsocket_channel::message::Tuple;
use vsocket_channel::reason::Reason;

use super::remote::leads;
use super::stay::{Guest, Host, HostPhase, Party, Stay};
use super::{Effect, EndState, FlowUse, Pairing, Place, RemoteOffer};
use crate::peer::message::{PeerMessage, RegionRef};
use crate::slab::{Segments, Taken};

/// Offers of other backends that wait at the same time.
const MAX_OFFERS: usize = 1 << 16;

/// Why a peer's message was dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dropped {
    /// It offers an address that the directory has elsewhere.
    Address,
    /// Too many offers wait.
    Crowded,
    /// It names a flow or generation that is not.
    Unknown,
    /// It does not fit the flow's state.
    Unexpected,
}

impl Dropped {
    /// Its name in the counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Address => "peer-offer-address",
            Self::Crowded => "peer-offer-crowded",
            Self::Unknown => "peer-flow-unknown",
            Self::Unexpected => "peer-message-unexpected",
        }
    }
}

impl Pairing {
    /// A whole message of a peer.
    ///
    /// # Errors
    ///
    /// [`Dropped`] if it was ignored.
    pub fn handle_peer_message(
        &mut self,
        peer: u32,
        message: &PeerMessage,
        segments: &mut impl Segments,
    ) -> Result<(), Dropped> {
        match *message {
            PeerMessage::Offer { flow, vni, local, remote, mac: _, min_gen } => {
                self.offered(peer, flow, vni, Tuple::new(local, remote), min_gen)
            }
            PeerMessage::Revoke { flow, reason } => self.revoked(peer, flow, reason),
            PeerMessage::Prepare { flow, peer_flow, generation, rx } => {
                let refused = self.prepare(peer, flow, peer_flow, generation, rx, segments);
                if let Err(reason) = refused {
                    let reason = reason as u16;
                    let message =
                        PeerMessage::Refuse { flow: peer_flow, peer_flow: flow, generation, reason };
                    self.effects.push_back(Effect::Peer { peer, message });
                }
                Ok(())
            }
            PeerMessage::Prepared { peer_flow, generation, rx, .. } => {
                self.prepared(peer, peer_flow, generation, rx)
            }
            PeerMessage::Commit { peer_flow, generation, .. } => {
                let id = self.stay_of(peer, peer_flow, generation).ok_or(Dropped::Unknown)?;
                self.commit(id);
                Ok(())
            }
            PeerMessage::Refuse { peer_flow, generation, reason, .. } => {
                let id = self.stay_of(peer, peer_flow, generation).ok_or(Dropped::Unknown)?;
                let reason = Reason::from_code(reason).unwrap_or(Reason::PeerLeft);
                if let Some(stay) = self.stays.get_mut(&id) {
                    // Nothing is wrong with our end: its agent need not open it again.
                    stay.again = matches!(reason, Reason::Busy | Reason::PeerNotOpen | Reason::Superseded);
                }
                self.quiet(id, reason);
                Ok(())
            }
            PeerMessage::Withdraw { flow, peer_flow, generation, reason } => {
                self.withdrawn_by_peer(peer, flow, peer_flow, generation, reason);
                Ok(())
            }
            PeerMessage::Withdrawn { peer_flow, generation, .. } => {
                let id = self.stay_of(peer, peer_flow, generation).ok_or(Dropped::Unknown)?;
                self.quiet(id, Reason::PeerLeft);
                Ok(())
            }
            _ => Err(Dropped::Unexpected),
        }
    }

    fn offered(
        &mut self,
        peer: u32,
        flow: u64,
        vni: u32,
        theirs: Tuple,
        min_generation: u32,
    ) -> Result<(), Dropped> {
        let ours = theirs.mirrored();
        let there = self.place(vni, ours.remote.ip());
        if !matches!(there, Place::Peer(host, _) if host == peer) || !self.is_local(vni, ours.local) {
            return Err(Dropped::Address);
        }
        if self.remote_offers.len() >= MAX_OFFERS {
            return Err(Dropped::Crowded);
        }
        let key = (vni, ours);
        self.remote_offers.insert(key, RemoteOffer { key, peer, flow, min_generation });
        if let Some(id) = self.by_tuple.get(&(vni, ours)) {
            self.ready.push_back(*id);
        }
        Ok(())
    }

    fn revoked(&mut self, peer: u32, flow: u64, reason: u16) -> Result<(), Dropped> {
        let waiting = self.remote_offers.iter().find(|(_, o)| o.peer == peer && o.flow == flow);
        if let Some(key) = waiting.map(|(key, _)| *key) {
            self.remote_offers.remove(&key);
            return Ok(());
        }
        let unasked = |stay: &Stay| match stay.parties[1] {
            Party::Host(Host { phase: HostPhase::Unasked(offer), .. }) => {
                offer.peer == peer && offer.flow == flow
            }
            _ => false,
        };
        // Overtaken by a `Prepare` on its way, or unknown: the peer will refuse.
        let stay = self.stays.iter().find(|(_, stay)| unasked(stay)).map(|(id, _)| *id);
        let id = stay.ok_or(Dropped::Unknown)?;
        let reason = Reason::from_code(reason).unwrap_or(Reason::PeerLeft);
        let Some(host) = self.stays.get_mut(&id).and_then(Stay::host) else { return Ok(()) };
        host.phase = HostPhase::Quiet;
        let ours = host.flow;
        let message = PeerMessage::Revoke { flow: ours, reason: Reason::Superseded as u16 };
        self.effects.push_back(Effect::Peer { peer, message });
        if let Some(stay) = self.stays.get_mut(&id) {
            stay.again = true;
        }
        self.end_stay(id, reason, 1);
        self.settle(id);
        Ok(())
    }

    /// The leader asks: our guest is to prepare.
    fn prepare(
        &mut self,
        peer: u32,
        flow: u64,
        own: u64,
        generation: u32,
        rx: RegionRef,
        segments: &mut impl Segments,
    ) -> Result<(), Reason> {
        let Some(FlowUse::Offer(id)) = self.flows.get(&own).copied() else {
            // Taken back while this was under way. The leader's offer is used up all the same.
            self.remote_offers.retain(|_, offer| (offer.peer, offer.flow) != (peer, flow));
            return Err(Reason::PeerNotOpen);
        };
        let vni = self.vni(id);
        let Some(tuple) = self.ends.get(&id).map(|end| end.tuple) else { return Err(Reason::PeerNotOpen) };
        if self.place_of(vni, tuple) != Some(peer) {
            return Err(Reason::Violation);
        }
        // Whatever happens now, both offers are used up.
        let Some(end) = self.ends.get_mut(&id) else { return Err(Reason::PeerNotOpen) };
        self.flows.remove(&own);
        end.offer = None;
        let (state, least) = (end.state, end.min_generation);
        match self.remote_offers.get(&(vni, tuple)) {
            Some(offer) if (offer.peer, offer.flow) == (peer, flow) => {
                self.remote_offers.remove(&(vni, tuple));
            }
            _ => {
                self.ready.push_back(id);
                return Err(Reason::Superseded);
            }
        }
        self.ready.push_back(id);
        if state == EndState::Resting {
            return Err(Reason::Busy);
        }
        if state != EndState::Open {
            return Err(Reason::PeerNotOpen);
        }
        if let Some(reason) = self.vports[id.vport as usize].barred() {
            return Err(reason);
        }
        if leads(tuple) || generation == u32::MAX || Geometry::new(1, rx.len).is_none() {
            return Err(Reason::Violation);
        }
        if generation < least {
            return Err(Reason::Superseded);
        }
        let segment = match self.segment(id, peer, segments) {
            Taken::Segment(segment) => segment,
            // Others were faster. Our end is offered again when there is more.
            Taken::Coming => return Err(Reason::PeerNotOpen),
            Taken::Nothing(reason) => return Err(reason),
        };
        let phase = HostPhase::Waiting(rx);
        let host = Host { peer, flow: own, peer_flow: flow, phase, ended: false };
        self.begin_fabric(id, generation, segment, host);
        Ok(())
    }

    fn prepared(&mut self, peer: u32, own: u64, generation: u32, rx: RegionRef) -> Result<(), Dropped> {
        let id = self.stay_of(peer, own, generation).ok_or(Dropped::Unknown)?;
        let Some(host) = self.stays.get_mut(&id).and_then(Stay::host) else { return Err(Dropped::Unknown) };
        if host.phase != HostPhase::Asked {
            return Err(Dropped::Unexpected);
        }
        let (flow, peer_flow) = (host.flow, host.peer_flow);
        if Geometry::new(1, rx.len).is_none() {
            self.end_stay(id, Reason::Violation, usize::MAX);
            return Ok(());
        }
        host.phase = HostPhase::Ready;
        self.effects.push_back(Effect::FlowReady { flow, rx });
        let message = PeerMessage::Commit { flow, peer_flow, generation };
        self.effects.push_back(Effect::Peer { peer, message });
        self.commit(id);
        Ok(())
    }

    fn withdrawn_by_peer(&mut self, peer: u32, theirs: u64, own: u64, generation: u32, reason: u16) {
        let Some(id) = self.stay_of(peer, own, generation) else {
            // Nothing of it is here, so nothing of it will be written.
            let message = PeerMessage::Withdrawn { flow: own, peer_flow: theirs, generation };
            return self.effects.push_back(Effect::Peer { peer, message });
        };
        let reason = match Reason::from_code(reason) {
            Some(Reason::BackendGone) => Reason::PeerBackendGone,
            Some(reason) => reason,
            None => Reason::PeerLeft,
        };
        let Some(host) = self.stays.get_mut(&id).and_then(Stay::host) else { return };
        let Host { flow, peer_flow, .. } = *host;
        match host.phase {
            HostPhase::Asked | HostPhase::Ready => {
                host.phase = if host.ended { HostPhase::Quiet } else { HostPhase::Withdrawn };
                self.effects.push_back(Effect::FlowStop { flow });
            }
            HostPhase::Waiting(_) => {
                host.phase = HostPhase::Quiet;
                let message = PeerMessage::Withdrawn { flow, peer_flow, generation };
                self.effects.push_back(Effect::Peer { peer, message });
            }
            HostPhase::Unasked(_) => host.phase = HostPhase::Quiet,
            HostPhase::Withdrawn | HostPhase::Quiet => {}
        }
        self.end_stay(id, reason, 1);
        self.settle(id);
    }

    fn stay_of(&self, peer: u32, own: u64, generation: u32) -> Option<u64> {
        let FlowUse::Stay(id) = *self.flows.get(&own)? else { return None };
        let stay = self.stays.get(&id)?;
        let Party::Host(host) = stay.parties[1] else { return None };
        (stay.generation == generation && host.peer == peer).then_some(id)
    }

    /// Tenant and connection of a stay's guest.
    pub(super) fn key_of(&self, stay: u64) -> Option<(u32, Tuple)> {
        let Party::Guest(Guest { end, .. }) = self.stays.get(&stay)?.parties[0] else { return None };
        Some((self.vni(end), self.ends.get(&end)?.tuple))
    }

    fn is_local(&self, vni: u32, address: SocketAddr) -> bool {
        matches!(self.place(vni, address.ip()), Place::Vport(_))
    }
}
