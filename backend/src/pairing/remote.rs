//! Pairing with an end on another host.
//!
//! Both backends offer what their guests have opened. The one whose end has the smaller address **leads**: when both
//! offers and the queue pair are there it picks the generation and asks its guest; then it tells the peer where it
//! receives (`Prepare`), the peer asks its guest and answers where that one receives (`Prepared`), and the leader
//! commits. From the moment a side has told where it receives, the peer may write there, so from then on the memory is
//! free only when the peer has said behind its last byte that it was the last (a segment with FIN on the queue pair), or
//! when the queue pair is gone. A peer that was not yet told says `Refuse` or `Withdrawn` instead.

#![forbid(unsafe_code)]

use vsocket_channel::message::Tuple;
use vsocket_channel::reason::Reason;

use super::stay::{Guest, GuestPhase, Host, HostPhase, Party, Stay};
use super::{Effect, EndId, EndState, FlowStart, FlowUse, Pairing, Place, RemoteOffer};
use crate::peer::message::PeerMessage;
use crate::slab::{SegmentId, Segments, SlabKey, Taken};

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
        self.no_qp.retain(|(p, _), _| *p != peer);
        self.quiet_all(peer, None, reason);
        self.retry_peer(peer);
    }

    /// A queue pair works.
    pub fn handle_qp_up(&mut self, peer: u32, vni: u32) {
        self.qps.insert((peer, vni));
        self.no_qp.remove(&(peer, vni));
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

    /// A queue pair did not come to be: who waits for it is told why, and goes on waiting.
    pub fn handle_no_qp(&mut self, peer: u32, vni: u32, reason: Reason) {
        self.no_qp.insert((peer, vni), reason);
        self.handle_qp_down(peer, vni, reason);
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

    /// Offers an open end to its peer, and starts the stay if everything is there and we lead.
    pub(super) fn try_remote(&mut self, id: EndId, peer: u32, segments: &mut impl Segments) {
        if !self.peers_up.contains(&peer) {
            return self.decline(id, Reason::PeerHostDown);
        }
        let vni = self.vni(id);
        let ring_len = self.vports[id.vport as usize].facts.ring_len;
        let Some(end) = self.ends.get_mut(&id) else { return };
        let tuple = end.tuple;
        if end.offer.is_none() {
            // The peer, if it leads, takes our word that we can follow.
            if !segments.look(SlabKey::Fabric((id.vport, end.program), peer), ring_len) {
                return;
            }
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
            if let Some(reason) = self.no_qp.get(&(peer, vni)).copied() {
                self.decline(id, reason);
            }
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
        let segment = match self.segment(id, offer.peer, segments) {
            Taken::Segment(segment) => segment,
            Taken::Coming => return,
            Taken::Nothing(reason) => return self.decline(id, reason),
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

    pub(super) fn begin_fabric(&mut self, end: EndId, generation: u32, segment: SegmentId, host: Host) {
        let guest = Party::Guest(Guest { end, phase: GuestPhase::Asked });
        self.begin(Stay::new(generation, segment, [guest, Party::Host(host)]));
    }

    pub(super) fn segment(&self, id: EndId, peer: u32, segments: &mut impl Segments) -> Taken {
        let Some(end) = self.ends.get(&id) else { return Taken::Nothing(Reason::Ending) };
        let ring_len = self.vports[id.vport as usize].facts.ring_len;
        segments.take(SlabKey::Fabric((id.vport, end.program), peer), ring_len)
    }

    /// The peer of a stay writes no more; if it is not ending yet, it ends now.
    pub(super) fn quiet(&mut self, id: u64, reason: Reason) {
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

    /// The peer that the other end of this connection is at.
    pub(super) fn place_of(&self, vni: u32, tuple: Tuple) -> Option<u32> {
        match self.place(vni, tuple.remote.ip()) {
            Place::Peer(peer, _) => Some(peer),
            _ => None,
        }
    }

    /// The peer that an offer of this end went to.
    pub(super) fn offer_peer(&self, id: EndId, tuple: Tuple) -> Option<u32> {
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
pub(super) fn leads(tuple: Tuple) -> bool {
    tuple.local < tuple.remote
}
