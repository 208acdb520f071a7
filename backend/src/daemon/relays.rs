//! The other half of the data path: relays between guests of this host, which needs no fabric.
//!
//! A relay stands on two shelves, those of its guests' slabs, and is visited when either is warm; so only the slab of the
//! one who writes need be. What keeps a shelf warm is what its own guest does. A cold one hears of everything by its bell:
//! of bytes that its guest publishes, and, as both ways are armed before any sleep, of room that the other's bytes wait for.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::time::Instant;

use vsocket_channel::layout::BELLS;

use super::shelves::Shelves;
use crate::metrics::{Named, Traffic};
use crate::relay::Relay;
use crate::slab::{Doorbell, Slab};

#[cfg(test)]
mod tests;

/// A relay with what it needs outside itself. A guest's place is the same in all of it.
#[derive(Debug)]
struct Entry {
    id: u64,
    vports: [u32; 2],
    relay: Relay,
    bells: [[Doorbell; BELLS]; 2],
    shelves: [usize; 2],
    /// Reported as failed: it is not pumped again.
    failed: bool,
}

impl Entry {
    /// What it has carried, by vport.
    fn traffic(&self) -> [(u32, Traffic); 2] {
        let [a, b] = self.vports;
        [(a, self.relay.traffic[0]), (b, self.relay.traffic[1])]
    }
}

/// All relays. One's place does not change while it is there.
#[derive(Debug, Default)]
pub(super) struct Relays {
    places: Vec<Option<Entry>>,
    free: Vec<usize>,
    by_id: HashMap<u64, usize>,
    shelves: Shelves,
    failed: Vec<u64>,
    /// Slabs that are about to turn cold.
    cooling: Vec<usize>,
}

impl Relays {
    pub fn is_idle(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Whether the relays of a virtual machine are looked at.
    pub fn machines(&self) -> bool {
        self.shelves.machines()
    }

    /// Begins to relay between two guests, each with its slab and that one's number.
    pub fn add(&mut self, id: u64, vports: [u32; 2], relay: Relay, slabs: [(u64, &Slab); 2]) {
        let at = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        let bells = slabs.map(|(_, slab)| slab.bells[0].clone());
        let shelves = slabs.map(|(number, slab)| self.shelves.put(number, slab, at));
        self.places[at] = Some(Entry { id, vports, relay, bells, shelves, failed: false });
        self.by_id.insert(id, at);
    }

    /// Ends a relay: from here on its guests' memory is touched no more. What it has carried, by vport.
    pub fn remove(&mut self, id: u64) -> Option<[(u32, Traffic); 2]> {
        let at = self.by_id.remove(&id)?;
        let entry = self.places.get_mut(at)?.take()?;
        entry.shelves.iter().for_each(|shelf| self.shelves.take(*shelf, at));
        self.free.push(at);
        Some(entry.traffic())
    }

    /// What those that are not over have carried, by vport.
    pub fn traffic(&self) -> impl Iterator<Item = (u32, Traffic)> {
        self.places.iter().flatten().flat_map(Entry::traffic)
    }

    /// The relays that cannot go on, each once.
    pub fn failed(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.failed)
    }

    /// One pass. Says whether it found anything to do.
    pub fn pass(&mut self, drops: &mut Named) -> bool {
        let (mut worked, mut n) = (false, 0);
        while let Some(shelf) = self.shelves.nth_warm(n) {
            worked |= self.visit(shelf, drops).any;
            n += 1;
        }
        worked || !self.failed.is_empty()
    }

    /// Before a sleep: every slab turns cold, if it can. True if there is really nothing to do.
    pub fn rest(&mut self, drops: &mut Named) -> bool {
        !self.cool_down(None, drops) && self.failed.is_empty()
    }

    /// Slabs that have been idle for long enough turn cold.
    pub fn cool(&mut self, now: Instant, drops: &mut Named) {
        self.cool_down(Some(now), drops);
    }

    /// The bell of this slab was rung.
    pub fn bell(&mut self, number: u64) {
        if let Some(shelf) = self.shelves.find(number) {
            self.shelves.warm(shelf);
        }
    }

    /// Announces on the bells of the slabs that are due, looks once more, and lets those turn cold whose guests had
    /// nothing. Says whether anyone had.
    fn cool_down(&mut self, now: Option<Instant>, drops: &mut Named) -> bool {
        let mut due = std::mem::take(&mut self.cooling);
        due.clear();
        self.shelves.due(now, &mut due);
        due.iter().for_each(|shelf| self.announce(*shelf));
        let mut worked = false;
        for at in &due {
            let found = self.visit(*at, drops);
            worked |= found.any;
            if let Some(shelf) = self.shelves.get(*at) {
                shelf.looked(found.own);
            }
        }
        self.shelves.chill();
        self.cooling = due;
        worked
    }

    fn announce(&mut self, shelf: usize) {
        let Some(shelf) = self.shelves.get(shelf) else { return };
        let entries = shelf.flows.iter().filter_map(|at| self.places.get(*at)?.as_ref());
        entries.filter(|entry| !entry.failed).for_each(|entry| entry.relay.arm());
        shelf.announce();
    }

    /// Lets the relays of a slab carry what there is.
    fn visit(&mut self, shelf: usize, drops: &mut Named) -> Found {
        let (mut found, mut n) = (Found::default(), 0);
        while let Some(place) = self.shelves.get(shelf).and_then(|shelf| shelf.flows.get(n).copied()) {
            n += 1;
            let entry = self.places.get_mut(place).and_then(Option::as_mut);
            let Some(entry) = entry.filter(|entry| !entry.failed) else { continue };
            let bells = &entry.bells;
            let mut ring = |guest: usize, bell: usize| bells[guest][bell].ring();
            let Ok(worked) = entry.relay.pump(&mut ring) else {
                drops.count("ring-index");
                entry.failed = true;
                self.failed.push(entry.id);
                continue;
            };
            for (at, _) in entry.shelves.into_iter().zip(worked).filter(|(_, worked)| *worked) {
                found.any = true;
                found.own |= at == shelf;
                if let Some(shelf) = self.shelves.get(at) {
                    shelf.touch();
                }
            }
        }
        found
    }
}

/// Who had something to carry.
#[derive(Clone, Copy, Default)]
struct Found {
    any: bool,
    /// A guest of the slab that was visited.
    own: bool,
}
