//! Memory that guests lend: a virtual machine's rings lie in its own memory. It is asked for a slab when one is wanted, tells the
//! pages of it some time later, and has it back when no segment of it is used any more.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};

use vsocket_channel::layout::{BELLS, Geometry};
use vsocket_channel::reason::Reason;

use super::{Change, Doorbell, Memory, Pool, Program, SEGMENTS, Slab, SlabKey, Taken};

/// Segments of a program's first slab for a peer. Each further one has twice as many, up to [`SEGMENTS`]: small programs
/// pin little.
const FIRST: u32 = 2;

/// A slab that was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Want {
    /// Who is to map it.
    pub key: SlabKey,
    /// Its sizes.
    pub geometry: Geometry,
}

impl Want {
    /// The program that it is for.
    pub fn program(&self) -> Program {
        match self.key {
            SlabKey::Direct(program, _) | SlabKey::Fabric(program, _) => program,
        }
    }
}

/// A vport whose guest lends memory.
#[derive(Debug, Default)]
pub(super) struct Lender {
    /// It has said that it does.
    open: bool,
    wants: HashMap<u64, Want>,
    /// For which it had none.
    refused: HashSet<SlabKey>,
}

impl Pool {
    /// The slabs of this vport's programs are its guest's to give, once it [opens](Self::open_lender).
    pub fn set_lender(&mut self, vport: u32) {
        self.lenders.entry(vport).or_default();
    }

    /// It lends from now on.
    pub fn open_lender(&mut self, vport: u32) {
        self.lenders.insert(vport, Lender { open: true, ..Lender::default() });
    }

    /// It lends nothing any more, and nothing that it has lent is handed out again.
    pub fn close_lender(&mut self, vport: u32) {
        if let Some(lender) = self.lenders.get_mut(&vport) {
            *lender = Lender::default();
            self.retire(vport);
        }
    }

    /// How many slabs of its memory there are.
    pub fn lent(&self, vport: u32) -> usize {
        self.slabs.values().filter(|slab| slab.is_lent() && slab.key.names(vport)).count()
    }

    /// The slabs of a program for its lanes through this backend.
    pub fn slabs_of(&self, program: Program) -> Vec<u64> {
        let its = |(number, slab): (&u64, &Slab)| {
            (slab.key == SlabKey::Fabric(program, slab.key.peer())).then_some(*number)
        };
        self.slabs.iter().filter_map(its).collect()
    }

    /// A slab that this vport was asked for.
    pub fn want(&self, vport: u32, number: u64) -> Option<Want> {
        self.lenders.get(&vport)?.wants.get(&number).copied()
    }

    /// The slab that was asked for is there. Its mapping is given up if nobody wants it any more.
    pub fn lend(&mut self, vport: u32, number: u64, memory: Memory, bells: [Doorbell; BELLS]) {
        let Some(want) = self.lenders.get_mut(&vport).and_then(|lender| lender.wants.remove(&number)) else {
            return;
        };
        let backend = bells[0].clone();
        let far = [(); BELLS].map(|()| backend.clone());
        self.insert(number, Slab::new(want.key, memory, None, [bells, far]));
    }

    /// The guest has no memory for it. It is not asked again before something has come back to it.
    pub fn handle_refused(&mut self, vport: u32, number: u64) -> Option<Program> {
        let lender = self.lenders.get_mut(&vport)?;
        let want = lender.wants.remove(&number)?;
        lender.refused.insert(want.key);
        Some(want.program())
    }

    /// Nobody waits for this slab any more.
    pub fn forget_want(&mut self, vport: u32, number: u64) {
        if let Some(lender) = self.lenders.get_mut(&vport) {
            lender.wants.remove(&number);
        }
    }

    /// Nothing is asked for a program any more.
    pub(super) fn forget_wants(&mut self, program: Program) {
        if let Some(lender) = self.lenders.get_mut(&program.0) {
            lender.wants.retain(|_, want| want.program() != program);
        }
    }

    /// What came back to a guest, it may lend again.
    pub(super) fn returned(&mut self, vport: u32) {
        if let Some(lender) = self.lenders.get_mut(&vport) {
            lender.refused.clear();
        }
    }

    /// Whose memory the slabs of this key are, if it is a guest's.
    pub(super) fn lender_of(&self, key: SlabKey) -> Option<u32> {
        match key {
            SlabKey::Fabric((vport, _), _) => self.lenders.contains_key(&vport).then_some(vport),
            SlabKey::Direct(..) => None,
        }
    }

    /// Asks a guest for a slab, if it was not asked yet.
    pub(super) fn ask(&mut self, vport: u32, key: SlabKey, ring_len: u64) -> Taken {
        let known = self.by_key.get(&key).map_or(0, Vec::len) as u32;
        let segments = FIRST.checked_shl(known).unwrap_or(SEGMENTS).min(SEGMENTS);
        let Some(geometry) = Geometry::new(segments, ring_len) else { return Taken::Nothing(Reason::Quota) };
        let Some(lender) = self.lenders.get_mut(&vport) else { return Taken::Nothing(Reason::NoRingMemory) };
        if !lender.open || lender.refused.contains(&key) {
            return Taken::Nothing(Reason::NoRingMemory);
        }
        if !lender.wants.values().any(|want| want.key == key) {
            self.last += 1;
            lender.wants.insert(self.last, Want { key, geometry });
            self.changes.push(Change::Wanted(vport, self.last));
        }
        Taken::Coming
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SegmentId, Segments};
    use super::*;

    const KEY: SlabKey = SlabKey::Fabric((3, 1), 0);

    fn pool() -> Pool {
        let mut pool = Pool::default();
        pool.set_lender(3);
        assert_eq!(pool.take(KEY, 4096), Taken::Nothing(Reason::NoRingMemory));
        pool.open_lender(3);
        pool
    }

    fn wanted(pool: &mut Pool) -> Vec<u64> {
        let wanted = |change| match change {
            Change::Wanted(3, number) => Some(number),
            _ => None,
        };
        pool.changes().filter_map(wanted).collect()
    }

    fn lend(pool: &mut Pool) -> u64 {
        let wanted = wanted(pool);
        let [number] = wanted[..] else { panic!("{wanted:?}") };
        let want = pool.want(3, number).unwrap();
        let (_, memory) = Memory::create(want.geometry).unwrap();
        pool.lend(3, number, memory, [(); BELLS].map(|()| Doorbell::new().unwrap()));
        number
    }

    fn take(pool: &mut Pool) -> SegmentId {
        pool.take(KEY, 4096).segment().unwrap()
    }

    #[test]
    fn a_slab_is_asked_for_once_and_the_next_is_larger() {
        let mut pool = pool();
        for _ in 0..3 {
            assert_eq!(pool.take(KEY, 4096), Taken::Coming);
            assert!(!pool.look(KEY, 4096));
        }
        let number = lend(&mut pool);
        assert!(pool.look(KEY, 4096) && pool.slab(number).unwrap().memfd.is_none());
        assert_eq!([take(&mut pool), take(&mut pool)].map(|id| id.slab), [number; 2]);
        assert_eq!((pool.take(KEY, 4096), pool.lent(3)), (Taken::Coming, 1));
        let number = lend(&mut pool);
        assert_eq!(pool.slab(number).unwrap().memory.geometry().segments(), 4);
    }

    #[test]
    fn a_refusal_stands_until_something_comes_back() {
        let mut pool = pool();
        pool.take(KEY, 4096);
        let number = lend(&mut pool);
        let held = [take(&mut pool), take(&mut pool)];
        assert_eq!(pool.take(KEY, 4096), Taken::Coming);
        let next = wanted(&mut pool)[0];
        assert_eq!(pool.handle_refused(3, next), Some((3, 1)));
        assert_eq!(pool.handle_refused(3, next), None);
        assert_eq!(pool.take(KEY, 4096), Taken::Nothing(Reason::NoRingMemory));
        pool.retire_program((3, 1));
        held.into_iter().for_each(|id| pool.give_back(id, true));
        assert!(pool.changes().any(|change| matches!(change, Change::Gone(n, _) if n == number)));
        assert_eq!((pool.take(KEY, 4096), pool.lent(3)), (Taken::Coming, 0));
    }

    #[test]
    fn one_who_lends_no_more_is_not_asked() {
        let mut pool = pool();
        pool.take(KEY, 4096);
        let number = lend(&mut pool);
        let id = take(&mut pool);
        pool.take(SlabKey::Fabric((3, 2), 0), 4096);
        let late = wanted(&mut pool)[0];
        pool.close_lender(3);
        assert_eq!((pool.want(3, late).is_none(), pool.lent(3)), (true, 1));
        assert_eq!(pool.take(KEY, 4096), Taken::Nothing(Reason::NoRingMemory));
        pool.give_back(id, false);
        assert_eq!((pool.lent(3), pool.slab(number).is_none()), (0, true));
    }
}
