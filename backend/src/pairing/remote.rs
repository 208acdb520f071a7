//! Pairing with an end on another host.
//!
//! Both backends offer what their guests have opened. The one whose end has the smaller address **leads**: when both
//! offers and the queue pair are there it picks the generation and asks its guest; then it tells the peer where it
//! receives (`Prepare`), the peer asks its guest and answers where that one receives (`Prepared`), and the leader
//! commits. From the moment a side has told where it receives, the peer may write there, so from then on the memory is
//! free only when the peer has said behind its last byte that it was the last (a segment with FIN on the queue pair), or
//! when the queue pair is gone. A peer that was not yet told says `Refuse` or `Withdrawn` instead.

use std::net::SocketAddr;

use vsocket_channel::layout::Geometry;
use vsocket_channel::message::Tuple;
use vsocket_channel::reason::Reason;

use super::stay::{Guest, GuestPhase, Host, HostPhase, Party, Stay};
use super::{Effect, EndId, EndState, FlowStart, FlowUse, Pairing, Place, RemoteOffer};
use crate::peer::message::{PeerMessage, RegionRef};
use crate::slab::{SegmentId, Segments, SlabKey};

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
    /// A peer's control connection is there.
    pub fn handle_peer_up(&mut self, peer: u32) {
        self.peers_up.insert(peer);
        self.retry_peer(peer);
    }

    /// A peer's control connection is gone, or the peer does not answer. Its queue pairs are closed.
    pub fn handle_peer_down(&mut self, peer: u32, reason: Reason) {
        self.peers_up.remove(&peer);
        self.remote_offers.retain(|_, offer| offer.peer != peer);
        let offers: Vec<_> = self.ends.iter().filter_map(|(id, e)| Some((*id, e.tuple, e.offer?))).collect();
        for (id, tuple, flow) in offers {
            if self.offer_peer(id, tuple) == Some(peer)
                && let Some(end) = self.ends.get_mut(&id)
            {
                end.offer = None;
                self.flows.remove(&flow);
            }
        }
        self.qps.retain(|(p, _)| *p != peer);
        self.quiet_all(peer, None, reason);
        self.retry_peer(peer);
    }

    /// A queue pair works.
    pub fn handle_qp_up(&mut self, peer: u32, vni: u32) {
        self.qps.insert((peer, vni));
        let waits = |stay: &Stay| match stay.parties {
            [Party::Guest(_), Party::Host(host)] => {
                host.peer == peer && matches!(host.phase, HostPhase::Waiting(_))
            }
            _ => false,
        };
        let waiting: Vec<u64> = self.stays.iter().filter(|(_, s)| waits(s)).map(|(id, _)| *id).collect();
        for stay in waiting {
            self.advance(stay);
        }
        self.retry_peer(peer);
    }

    /// A queue pair is gone: what it carried is withdrawn, and nobody writes through it any more.
    pub fn handle_qp_down(&mut self, peer: u32, vni: u32, reason: Reason) {
        self.qps.remove(&(peer, vni));
        self.quiet_all(peer, Some(vni), reason);
        self.retry_peer(peer);
    }

    /// A flow has failed on our side.
    pub fn handle_flow_failed(&mut self, flow: u64, reason: Reason) {
        let Some(FlowUse::Stay(stay)) = self.flows.get(&flow).copied() else { return };
        self.end_stay(stay, reason, usize::MAX);
        self.settle(stay);
    }

    /// A flow could not be made, so the peer was not told where it would receive.
    pub fn handle_unstarted(&mut self, flow: u64, reason: Reason) {
        let Some(FlowUse::Stay(id)) = self.flows.get(&flow).copied() else { return };
        let Some(stay) = self.stays.get_mut(&id) else { return };
        let generation = stay.generation;
        let Some(host) = stay.host() else { return };
        let Host { peer, peer_flow, phase, .. } = *host;
        host.phase = HostPhase::Quiet;
        if phase == HostPhase::Ready {
            // The one who leads waits for our answer.
            let message = PeerMessage::Refuse { flow, peer_flow, generation, reason: reason as u16 };
            self.effects.push_back(Effect::Peer { peer, message });
        } else {
            if let Some(key) = self.key_of(id) {
                let min_generation = generation + 1;
                self.put_back(id, RemoteOffer { key, peer, flow: peer_flow, min_generation });
            }
        }
        self.end_stay(id, reason, 1);
        self.settle(id);
    }

    /// Looks again at what waits for this peer.
    pub fn handle_retry(&mut self, peer: u32) {
        self.retry_peer(peer);
    }

    /// The peer's last byte of a flow is here.
    pub fn handle_quiet(&mut self, flow: u64) {
        let Some(FlowUse::Stay(id)) = self.flows.get(&flow).copied() else { return };
        let Some(host) = self.stays.get_mut(&id).and_then(Stay::host) else { return };
        host.ended = true;
        // Before its `Withdraw`, which says why, has come: that is under way on the control connection.
        if host.phase == HostPhase::Withdrawn {
            self.quiet(id, Reason::PeerLeft);
        }
    }

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

    /// Offers an open end to its peer, and starts the stay if everything is there and we lead.
    pub(super) fn try_remote(&mut self, id: EndId, peer: u32, segments: &mut impl Segments) {
        if !self.peers_up.contains(&peer) {
            return self.decline(id, Reason::PeerHostDown);
        }
        let vni = self.vni(id);
        let Some(end) = self.ends.get_mut(&id) else { return };
        let tuple = end.tuple;
        if end.offer.is_none() {
            self.last_flow += 1;
            let flow = self.last_flow;
            end.offer = Some(flow);
            let (local, remote, min_gen) = (tuple.local, tuple.remote, end.min_generation);
            let mac = self.vports[id.vport as usize].facts.mac.0;
            self.flows.insert(flow, FlowUse::Offer(id));
            let message = PeerMessage::Offer { flow, vni, local, remote, mac, min_gen };
            self.effects.push_back(Effect::Peer { peer, message });
        }
        let offer = self.remote_offers.get(&(vni, tuple)).copied().filter(|offer| offer.peer == peer);
        let Some(offer) = offer else { return self.decline(id, Reason::PeerNotOpen) };
        if !self.qps.contains(&(peer, vni)) {
            self.effects.push_back(Effect::NeedQp { peer, vni });
        } else if leads(tuple) {
            self.lead(id, offer, segments);
        }
    }

    /// Takes an end's offer back, if a peer has one.
    pub(super) fn withdraw_offer(&mut self, id: EndId, reason: Reason) {
        let Some(end) = self.ends.get_mut(&id) else { return };
        let (offer, tuple) = (end.offer.take(), end.tuple);
        if let Some(flow) = offer {
            self.flows.remove(&flow);
            self.revoke(id, tuple, flow, reason);
        }
    }

    /// A stay ended before the peer knew of it: its offer and ours stand again.
    pub(super) fn put_back(&mut self, id: u64, offer: RemoteOffer) {
        let Some(stay) = self.stays.get(&id) else { return };
        let [Party::Guest(Guest { end: end_id, .. }), Party::Host(Host { flow, .. })] = stay.parties else {
            return;
        };
        self.flows.remove(&flow);
        self.remote_offers.entry(offer.key).or_insert(offer);
        match self.ends.get_mut(&end_id) {
            Some(end) => {
                end.offer = Some(flow);
                self.flows.insert(flow, FlowUse::Offer(end_id));
            }
            None => {
                let message = PeerMessage::Revoke { flow, reason: Reason::Ending as u16 };
                self.effects.push_back(Effect::Peer { peer: offer.peer, message });
            }
        }
    }

    /// What has become possible when a party of a fabric stay is ready.
    pub(super) fn advance_fabric(&mut self, id: u64) {
        let Some(stay) = self.stays.get_mut(&id) else { return };
        let (generation, segment) = (stay.generation, stay.segment);
        let Party::Guest(Guest { end, phase: GuestPhase::Ready }) = stay.parties[0] else { return };
        let up = |host: &Host| self.qps.contains(&(host.peer, self.vports[end.vport as usize].facts.vni));
        let Some(host) = stay.host() else { return };
        let rx = match host.phase {
            HostPhase::Unasked(_) => {
                host.phase = HostPhase::Asked;
                None
            }
            // The leader may see the queue pair work a little before us.
            HostPhase::Waiting(_) if !up(host) => return,
            HostPhase::Waiting(rx) => {
                host.phase = HostPhase::Ready;
                Some(rx)
            }
            _ => return self.commit(id),
        };
        let Host { peer, flow, peer_flow, .. } = *host;
        let Some(tuple) = self.ends.get(&end).map(|e| e.tuple) else { return };
        let vni = self.vni(end);
        let Place::Peer(_, mac) = self.place(vni, tuple.remote.ip()) else { return };
        let macs = [self.vports[end.vport as usize].facts.mac, mac];
        let start = FlowStart { flow, peer, peer_flow, end, vni, tuple, macs, generation, segment, rx };
        self.effects.push_back(Effect::FlowStart(start));
    }

    fn lead(&mut self, id: EndId, offer: RemoteOffer, segments: &mut impl Segments) {
        let vni = self.vni(id);
        let Some(end) = self.ends.get(&id) else { return };
        let tuple = end.tuple;
        let generation = end.min_generation.max(offer.min_generation).max(1);
        if generation == u32::MAX {
            return self.decline(id, Reason::Violation);
        }
        let Some(segment) = self.segment(id, offer.peer, segments) else {
            return self.decline(id, Reason::Quota);
        };
        let Some(flow) = self.ends.get_mut(&id).and_then(|end| end.offer.take()) else { return };
        self.remote_offers.remove(&(vni, tuple));
        let phase = HostPhase::Unasked(offer);
        self.begin_fabric(
            id,
            generation,
            segment,
            Host { peer: offer.peer, flow, peer_flow: offer.flow, phase, ended: false },
        );
    }

    fn begin_fabric(&mut self, end: EndId, generation: u32, segment: SegmentId, host: Host) {
        let guest = Party::Guest(Guest { end, phase: GuestPhase::Asked });
        self.begin(Stay::new(generation, segment, [guest, Party::Host(host)]));
    }

    fn segment(&self, id: EndId, peer: u32, segments: &mut impl Segments) -> Option<SegmentId> {
        let program = (id.vport, self.ends.get(&id)?.program);
        segments.take(SlabKey::Fabric(program, peer), self.vports[id.vport as usize].facts.ring_len)
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
        if self.vports[id.vport as usize].drained {
            return Err(Reason::Drained);
        }
        if leads(tuple) || generation == u32::MAX || Geometry::new(1, rx.len).is_none() {
            return Err(Reason::Violation);
        }
        if generation < least {
            return Err(Reason::Superseded);
        }
        let segment = self.segment(id, peer, segments).ok_or(Reason::Quota)?;
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

    /// The peer of a stay writes no more; if it is not ending yet, it ends now.
    fn quiet(&mut self, id: u64, reason: Reason) {
        let Some(host) = self.stays.get_mut(&id).and_then(Stay::host) else { return };
        let (flow, phase) = (host.flow, host.phase);
        host.phase = HostPhase::Quiet;
        if matches!(phase, HostPhase::Asked | HostPhase::Ready) {
            self.effects.push_back(Effect::FlowStop { flow });
        }
        self.end_stay(id, reason, 1);
        self.settle(id);
    }

    /// The queue pairs of a peer, or its one for a tenant, are gone.
    fn quiet_all(&mut self, peer: u32, vni: Option<u32>, reason: Reason) {
        let with = |(id, stay): (&u64, &Stay)| match stay.parties {
            [Party::Guest(guest), Party::Host(host)] if host.peer == peer => {
                let here = vni.is_none_or(|vni| self.vni(guest.end) == vni);
                here.then_some((*id, stay.generation, host))
            }
            _ => None,
        };
        let gone: Vec<_> = self.stays.iter().filter_map(with).collect();
        for (id, generation, Host { flow, peer_flow, phase, .. }) in gone {
            let mut say = |message| self.effects.push_back(Effect::Peer { peer, message });
            if vni.is_some() && matches!(phase, HostPhase::Asked | HostPhase::Ready) {
                say(PeerMessage::Withdraw { flow, peer_flow, generation, reason: reason as u16 });
            }
            if vni.is_some() && phase == HostPhase::Asked {
                // Its end may begin only now, on the next queue pair; nothing was or will be written to it.
                say(PeerMessage::Withdrawn { flow, peer_flow, generation });
            }
            if vni.is_some() && matches!(phase, HostPhase::Unasked(_) | HostPhase::Waiting(_)) {
                self.end_stay(id, reason, usize::MAX);
            }
            self.quiet(id, reason);
        }
    }

    fn stay_of(&self, peer: u32, own: u64, generation: u32) -> Option<u64> {
        let FlowUse::Stay(id) = *self.flows.get(&own)? else { return None };
        let stay = self.stays.get(&id)?;
        let Party::Host(host) = stay.parties[1] else { return None };
        (stay.generation == generation && host.peer == peer).then_some(id)
    }

    /// Tenant and connection of a stay's guest.
    fn key_of(&self, stay: u64) -> Option<(u32, Tuple)> {
        let Party::Guest(Guest { end, .. }) = self.stays.get(&stay)?.parties[0] else { return None };
        Some((self.vni(end), self.ends.get(&end)?.tuple))
    }

    fn is_local(&self, vni: u32, address: SocketAddr) -> bool {
        matches!(self.place(vni, address.ip()), Place::Vport(_))
    }

    /// The peer that the other end of this connection is at.
    fn place_of(&self, vni: u32, tuple: Tuple) -> Option<u32> {
        match self.place(vni, tuple.remote.ip()) {
            Place::Peer(peer, _) => Some(peer),
            _ => None,
        }
    }

    /// The peer that an offer of this end went to.
    fn offer_peer(&self, id: EndId, tuple: Tuple) -> Option<u32> {
        self.place_of(self.vni(id), tuple)
    }

    fn revoke(&mut self, id: EndId, tuple: Tuple, flow: u64, reason: Reason) {
        if let Some(peer) = self.offer_peer(id, tuple) {
            let message = PeerMessage::Revoke { flow, reason: reason as u16 };
            self.effects.push_back(Effect::Peer { peer, message });
        }
    }

    /// Looks again at every open end that goes to this peer.
    fn retry_peer(&mut self, peer: u32) {
        let open = self.ends.iter().filter(|(_, end)| end.state == EndState::Open);
        let theirs = |id: &EndId, tuple| self.offer_peer(*id, tuple) == Some(peer);
        let open: Vec<_> = open.filter(|(id, end)| theirs(id, end.tuple)).map(|(id, _)| *id).collect();
        self.ready.extend(open);
    }
}

/// Whether this side leads: its end has the smaller address.
fn leads(tuple: Tuple) -> bool {
    tuple.local < tuple.remote
}
