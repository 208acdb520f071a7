//! All flows, by place, number and key. A flow's place does not change while it is there.

#![forbid(unsafe_code)]

use std::collections::HashMap;

use vsocket_channel::layout::BELLS;

use crate::fabric::{QpId, RemoteAddress};
use crate::flow::{Flow, FlowKey};
use crate::slab::Doorbell;

/// A flow with what it needs outside itself.
#[derive(Debug)]
pub(in super::super) struct Entry {
    pub id: u64,
    pub peer: u32,
    pub vport: u32,
    pub flow: Flow,
    pub qp: QpId,
    pub(super) lkey: u32,
    pub(super) far: RemoteAddress,
    pub(super) bells: [Doorbell; BELLS],
    /// The shelf of its slab.
    pub(super) shelf: usize,
    /// Which captures want its segments.
    pub(super) tapped: u8,
    /// Reported as failed: it is not reported again.
    pub(super) failed: bool,
    /// Forgotten but for its last word to the peer.
    pub(super) leaving: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Flows {
    places: Vec<Option<Entry>>,
    free: Vec<usize>,
    by_id: HashMap<u64, usize>,
    by_key: HashMap<(QpId, FlowKey), usize>,
}

impl Flows {
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.places.iter().flatten()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.places.iter_mut().flatten()
    }

    pub fn get(&self, at: usize) -> Option<&Entry> {
        self.places.get(at)?.as_ref()
    }

    pub fn get_mut(&mut self, at: usize) -> Option<&mut Entry> {
        self.places.get_mut(at)?.as_mut()
    }

    /// Where the next one will be.
    pub fn next_place(&self) -> usize {
        self.free.last().copied().unwrap_or(self.places.len())
    }

    pub fn add(&mut self, entry: Entry) {
        let at = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        self.by_id.insert(entry.id, at);
        self.by_key.insert((entry.qp, entry.flow.key()), at);
        self.places[at] = Some(entry);
    }

    /// The flow that a segment belongs to.
    pub fn by_key(&mut self, qp: QpId, key: FlowKey) -> Option<&mut Entry> {
        let at = *self.by_key.get(&(qp, key))?;
        self.get_mut(at)
    }

    /// The flow with this number.
    pub fn by_id(&mut self, id: u64) -> Option<&mut Entry> {
        let at = *self.by_id.get(&id)?;
        self.get_mut(at)
    }

    /// From now on it is not found by its number.
    pub fn forget(&mut self, id: u64) -> Option<usize> {
        self.by_id.remove(&id)
    }

    pub fn take(&mut self, at: usize) -> Option<Entry> {
        let entry = self.places.get_mut(at)?.take()?;
        self.free.push(at);
        let key = (entry.qp, entry.flow.key());
        // The key may have become another's, and so may the number of one that is leaving.
        if self.by_key.get(&key) == Some(&at) {
            self.by_key.remove(&key);
        }
        if self.by_id.get(&entry.id) == Some(&at) {
            self.by_id.remove(&entry.id);
        }
        Some(entry)
    }

    /// The places of those that answer to this.
    pub fn places(&self, of: impl Fn(&Entry) -> bool) -> Vec<usize> {
        let found = self.places.iter().enumerate();
        found.filter_map(|(at, entry)| entry.as_ref().is_some_and(&of).then_some(at)).collect()
    }
}
