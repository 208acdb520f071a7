//! Does what pairing wants done.

#![forbid(unsafe_code)]

#[cfg(feature = "vm")]
use std::sync::Arc;

use mio::Interest;
use vsocket_channel::Side;
use vsocket_channel::message::{Lane, Message, Segment};
use vsocket_channel::reason::Reason;

use super::data::Data;
use super::{Daemon, Source};
use crate::carrier::Fds;
use crate::pairing::{Effect, EndId, RelayStart};
use crate::relay::Relay;
use crate::slab::{Change, Doorbell, SegmentId};

impl Daemon {
    /// Pairs whom there is to pair, until nothing is left to do.
    pub(super) fn settle(&mut self) {
        while let Some(effect) = self.pairing.poll(&mut self.pool) {
            self.slabs_changed();
            match effect {
                Effect::Tell { vport, message } => self.tell(vport, &message, vec![]),
                Effect::Prepare { end, generation, segment, side, lane } => {
                    self.prepare(end, generation, segment, side, lane);
                }
                Effect::Release { segment, reuse } => self.pool.give_back(segment, reuse),
                Effect::Peer { peer, message } => self.send_peer(peer, message),
                Effect::NeedQp { peer, vni } => self.need_pair(peer, vni),
                Effect::FlowStart(start) => self.start_flow(&start),
                Effect::FlowReady { flow, rx } => self.with_data(|data| data.ready(flow, rx)),
                Effect::FlowStop { flow } => self.with_data(|data| data.stop(flow)),
                Effect::FlowDrop { flow } => {
                    let carried = self.data.as_mut().and_then(|data| data.remove(flow));
                    if let Some((vport, traffic)) = carried {
                        self.vports[vport as usize].traffic.add(traffic);
                    }
                }
                Effect::RelayStart(start) => self.start_relay(&start),
                Effect::RelayStop { relay } => {
                    for (vport, traffic) in self.relays.remove(relay).into_iter().flatten() {
                        self.vports[vport as usize].traffic.add(traffic);
                    }
                }
            }
        }
        self.slabs_changed();
        #[cfg(feature = "vm")]
        {
            self.answer_quiet();
            self.return_slabs();
        }
    }

    fn start_relay(&mut self, start: &RelayStart) {
        let RelayStart { relay, vports, generation, segments: [a, b] } = *start;
        let slab = |id: SegmentId| Some((id.slab, self.pool.slab(id.slab)?));
        let view = |id| self.pool.view(id);
        if let (Some(slabs), Some(views)) = (both(slab(a), slab(b)), both(view(a), view(b))) {
            self.relays.add(relay, vports, Relay::new(generation, views), slabs);
        } else {
            // A machine's memory can go at any time.
            self.pairing.handle_relay_failed(relay, Reason::NoRingMemory);
        }
    }

    fn with_data(&mut self, act: impl FnOnce(&mut Data)) {
        if let Some(data) = &mut self.data {
            act(data);
        }
    }

    fn tell(&mut self, vport: u32, message: &Message, fds: Fds) {
        match message {
            Message::Declined { reason, .. } => self.metrics.declined(*reason),
            Message::Withdraw { reason, .. } => self.metrics.withdrawn(*reason),
            _ => {}
        }
        if let Err(gone) = self.vports[vport as usize].tell(message, fds) {
            self.detach(vport, &gone);
        }
    }

    fn prepare(&mut self, end: EndId, generation: u32, id: SegmentId, side: Side, lane: Lane) {
        let Some(slab) = self.pool.slab(id.slab) else { return };
        let geometry = slab.memory.geometry();
        let segment = Segment { slab: id.slab, index: id.index, geometry, side, lane };
        let bells = [side, side.other()].into_iter().flat_map(|side| &slab.bells[side.index()]);
        // Of a virtual machine's memory and bells its agent has the descriptors.
        let beside = |memfd| std::iter::once(memfd).chain(bells.map(Doorbell::fd)).collect();
        let fds: Fds = slab.memfd.clone().map(beside).unwrap_or_default();
        self.tell(end.vport, &Message::Prepare { conn: end.conn, generation, segment }, fds);
    }

    /// Watches the bells of new slabs, and forgets what is no more.
    fn slabs_changed(&mut self) {
        let changes: Vec<Change> = self.pool.changes().collect();
        for change in changes {
            match change {
                Change::Created(number) => {
                    let slab = self.pool.slab(number).filter(|slab| slab.is_fabric() && !slab.is_lent());
                    let Some(bell) = slab.map(|slab| slab.bells[1][0].raw_fd()) else { continue };
                    if let Err(error) = self.watch(bell, Source::Bell(number), Interest::READABLE) {
                        tracing::warn!(%error, "cannot watch a bell");
                    }
                }
                #[cfg(feature = "vm")]
                Change::Wanted(vport, number) => self.want_slab(vport, number),
                #[cfg(not(feature = "vm"))]
                Change::Wanted(..) => {}
                Change::Gone(number, slab) => {
                    if slab.is_fabric() && !slab.is_lent() {
                        self.unwatch(slab.bells[1][0].raw_fd());
                    }
                    self.with_data(|data| data.forget_slab(number));
                    #[cfg(feature = "vm")]
                    if slab.is_lent() {
                        self.lingering.push((slab.vport(), number, Arc::downgrade(&slab.memory)));
                    }
                }
            }
        }
    }
}

fn both<T>(a: Option<T>, b: Option<T>) -> Option<[T; 2]> {
    Some([a?, b?])
}
