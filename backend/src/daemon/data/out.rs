//! One flow's way out for the time of a call.

#![forbid(unsafe_code)]

use vsocket_channel::layout::BELLS;

use crate::capture::{Payload, Taps, Way};
use crate::fabric::{Fabric, LocalRange, PostError, QpId, RemoteAddress, Signal, WorkId};
use crate::flow::Transmit;
use crate::slab::Doorbell;

pub(super) struct Out<'a> {
    pub fabric: &'a mut dyn Fabric,
    pub qp: QpId,
    pub lkey: u32,
    pub far: RemoteAddress,
    pub bells: &'a [Doorbell; BELLS],
    pub posted: bool,
    /// Something was not taken, and is to be tried again.
    pub refused: bool,
    pub broken: bool,
    /// Only while a capture wants the flow's segments.
    pub tap: Option<(&'a mut Taps, u8, u32)>,
}

impl Out<'_> {
    fn posted(&mut self, result: Result<(), PostError>) -> bool {
        match result {
            Ok(()) => {
                self.posted = true;
                true
            }
            // Either there is room later, or the end of the queue pair is about to be reported.
            Err(PostError::Full | PostError::NotConnected) => {
                self.refused = true;
                false
            }
            Err(_) => {
                self.broken = true;
                false
            }
        }
    }
}

impl Transmit for Out<'_> {
    fn send(&mut self, header: &[u8], payload: &[u8]) -> bool {
        let result = self.fabric.post_send(self.qp, WorkId(0), &[header, payload], Signal::No);
        self.posted(result)
    }

    fn write(&mut self, offset: usize, place: u64, len: usize) -> bool {
        let local = LocalRange { lkey: self.lkey, offset, len };
        let remote = RemoteAddress { rkey: self.far.rkey, address: self.far.address.wrapping_add(place) };
        let result = self.fabric.post_write(self.qp, WorkId(0), local, remote, Signal::No);
        self.posted(result)
    }

    fn ring(&mut self, bell: usize) {
        self.bells[bell].ring();
    }

    fn sent(&mut self, header: &[u8], payload: Payload<'_>) {
        if let Some((taps, mask, peer)) = &mut self.tap {
            taps.take(*mask, Way::Tx, *peer, header, payload);
        }
    }
}
