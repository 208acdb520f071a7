//! Does what pairing wants done.

use vsocket_channel::Side;
use vsocket_channel::message::{Lane, Message, Segment};

use super::Daemon;
use crate::carrier::Fds;
use crate::pairing::{Effect, EndId};
use crate::slab::{Change, SegmentId};

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
                _ => {}
            }
        }
        self.slabs_changed();
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
        let own = slab.bells[side.index()].iter();
        let far = slab.bells[side.other().index()].iter();
        let fds: Fds = std::iter::once(&slab.memfd).chain(own).chain(far).cloned().collect();
        self.tell(end.vport, &Message::Prepare { conn: end.conn, generation, segment }, fds);
    }

    fn slabs_changed(&mut self) {
        let changes: Vec<Change> = self.pool.changes().collect();
        drop(changes);
    }
}
