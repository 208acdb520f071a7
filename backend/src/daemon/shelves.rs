//! Which slabs are looked at.
//!
//! A slab is **warm** or **cold**, and only the flows of warm ones are visited, so that the cost of a pass follows the
//! connections that do something. A cold slab has an announcement standing on its bell: who publishes in it rings, and
//! that warms it, as does everything else that gives one of its flows something to do. By the rule of
//! [`vsocket_channel::bell`] a slab turns cold only if a look at all of its flows *after* the announcement found nothing;
//! and it stays warm while a flow waits for what no bell tells: room in the fabric, or an acknowledgement.
//!
//! A flow here is whatever moves a connection's bytes: a flow or a relay. No slab has both.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::slab::{Memory, Slab};

/// A slab that has been idle for so long turns cold: longer costs every pass, shorter costs a bell more often.
pub(super) const COOL: Duration = Duration::from_millis(1);
/// The same of a slab in a virtual machine, whose bell is many times as dear.
pub(super) const COOL_MACHINE: Duration = Duration::from_millis(5);

/// A slab with its flows.
#[derive(Debug)]
pub(super) struct Shelf {
    number: u64,
    memory: Arc<Memory>,
    /// Their places.
    pub flows: Vec<usize>,
    /// Of a virtual machine.
    machine: bool,
    warm: bool,
    /// Announced since that was last taken back.
    announced: bool,
    /// A look after the announcement has found nothing.
    quiet: bool,
    /// One of its flows waits for what no bell tells.
    pub held: bool,
    /// Since when its flows have had nothing to do, as far as that was noticed.
    idle_since: Option<Instant>,
}

impl Shelf {
    /// Who publishes from now on rings. A look has to follow.
    pub fn announce(&mut self) {
        self.memory.header().bells[1][0].announce();
        self.announced = true;
    }

    /// We look at it anyhow, so nobody need ring.
    pub fn recall(&mut self) {
        if std::mem::take(&mut self.announced) {
            // The daemon is the only waiter on its side.
            self.memory.header().bells[1][0].awake(true);
        }
        self.idle_since = None;
    }

    /// It had something to do.
    pub fn touch(&mut self) {
        self.idle_since = None;
    }

    /// What the look after the announcement has found.
    pub fn looked(&mut self, worked: bool) {
        self.quiet = !worked && !self.held;
        if worked {
            self.recall();
        }
    }

    /// Whether it has done nothing for long enough. Also starts counting.
    fn is_due(&mut self, now: Instant) -> bool {
        let since = *self.idle_since.get_or_insert(now);
        let due = now.saturating_duration_since(since) >= if self.machine { COOL_MACHINE } else { COOL };
        if due {
            self.idle_since = Some(now);
        }
        due
    }
}

/// All slabs with flows.
#[derive(Debug, Default)]
pub(super) struct Shelves {
    shelves: Vec<Option<Shelf>>,
    free: Vec<usize>,
    by_number: HashMap<u64, usize>,
    warm: Vec<usize>,
}

impl Shelves {
    /// Puts a flow with its slab, which becomes warm. Where that is.
    pub fn put(&mut self, number: u64, slab: &Slab, flow: usize) -> usize {
        let at = match self.by_number.get(&number) {
            Some(at) => *at,
            None => self.make(number, slab.memory.clone(), slab.is_lent()),
        };
        if let Some(shelf) = self.get(at) {
            shelf.flows.push(flow);
        }
        self.warm(at);
        at
    }

    fn make(&mut self, number: u64, memory: Arc<Memory>, machine: bool) -> usize {
        let at = self.free.pop().unwrap_or_else(|| {
            self.shelves.push(None);
            self.shelves.len() - 1
        });
        let (flows, idle_since) = (Vec::new(), None);
        let (warm, announced, quiet, held) = (false, false, false, false);
        let shelf = Shelf { number, memory, flows, machine, warm, announced, quiet, held, idle_since };
        self.shelves[at] = Some(shelf);
        self.by_number.insert(number, at);
        at
    }

    /// A flow is no more.
    pub fn take(&mut self, at: usize, flow: usize) {
        let Some(shelf) = self.get(at) else { return };
        shelf.flows.retain(|other| *other != flow);
        if shelf.flows.is_empty() {
            let number = shelf.number;
            self.shelves[at] = None;
            self.by_number.remove(&number);
            self.warm.retain(|other| *other != at);
            self.free.push(at);
        }
    }

    pub fn get(&mut self, at: usize) -> Option<&mut Shelf> {
        self.shelves.get_mut(at)?.as_mut()
    }

    /// The flows of a slab have, or may have, something to do.
    pub fn warm(&mut self, at: usize) {
        let Some(shelf) = self.shelves.get_mut(at).and_then(Option::as_mut) else { return };
        if !std::mem::replace(&mut shelf.warm, true) {
            shelf.recall();
            self.warm.push(at);
        }
        (shelf.idle_since, shelf.quiet) = (None, false);
    }

    /// The slab with this number, whose bell was rung.
    pub fn find(&self, number: u64) -> Option<usize> {
        self.by_number.get(&number).copied()
    }

    /// The n-th of the warm ones.
    pub fn nth_warm(&self, n: usize) -> Option<usize> {
        self.warm.get(n).copied()
    }

    /// The flows that are visited.
    pub fn warm_flows(&self) -> impl Iterator<Item = usize> + '_ {
        let warm = self.warm.iter().filter_map(|at| self.shelves.get(*at)?.as_ref());
        warm.flat_map(|shelf| shelf.flows.iter().copied())
    }

    /// Whether one of the warm ones is a virtual machine's.
    pub fn machines(&self) -> bool {
        self.warm
            .iter()
            .any(|at| self.shelves.get(*at).is_some_and(|s| s.as_ref().is_some_and(|s| s.machine)))
    }

    /// Adds the warm ones that have done nothing for long enough; all of them if no time is given.
    pub fn due(&mut self, now: Option<Instant>, into: &mut Vec<usize>) {
        let Self { shelves, warm, .. } = self;
        let is_due = |shelf: &mut Shelf| now.is_none_or(|now| shelf.is_due(now));
        into.extend(warm.iter().filter(|at| shelves[**at].as_mut().is_some_and(is_due)));
    }

    /// Those in which a look after the announcement has found nothing turn cold.
    pub fn chill(&mut self) {
        let Self { shelves, warm, .. } = self;
        warm.retain(|at| {
            let Some(shelf) = shelves[*at].as_mut() else { return false };
            shelf.warm = !std::mem::take(&mut shelf.quiet);
            shelf.warm
        });
    }
}
