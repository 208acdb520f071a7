//! What a guest lends: slabs whose pages are being told, and the doorbells of its programs.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use vsocket_channel::layout::{BELLS, Geometry};
use vsocket_channel::message::Runs;

use super::{PAGE, Ram};
use crate::slab::{Doorbell, Memory, Piece};

/// Bytes of a file of the guest's memory.
#[derive(Debug, Clone)]
pub struct Part {
    /// The file.
    pub file: Arc<File>,
    /// Where in it.
    pub offset: u64,
    /// How many.
    pub len: usize,
}

/// A slab that was asked for.
#[derive(Debug)]
struct Slab {
    program: u64,
    geometry: Geometry,
    pages: usize,
    parts: Vec<Part>,
}

impl Slab {
    fn wanted(&self) -> usize {
        self.geometry.slab_len() / PAGE as usize
    }

    fn take(&mut self, memory: &Ram, first: u32, runs: &Runs) -> Result<(), &'static str> {
        if first as usize != self.pages {
            return Err("pages-order");
        }
        for (page, count) in runs.iter() {
            if count > self.wanted() - self.pages {
                return Err("pages-count");
            }
            let part = memory.part(page, count).ok_or("pages-outside")?;
            self.pages += count;
            match self.parts.last_mut() {
                Some(last) if last.leads_to(&part) => last.len += part.len,
                _ => self.parts.push(part),
            }
        }
        Ok(())
    }
}

impl Part {
    fn leads_to(&self, next: &Self) -> bool {
        Arc::ptr_eq(&self.file, &next.file) && self.offset + self.len as u64 == next.offset
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Lending {
    slabs: HashMap<u64, Slab>,
    /// The bells of each program, as far as they have come, and its number in the event loop.
    programs: HashMap<u64, [Option<Doorbell>; BELLS]>,
    /// Programs by their number in the event loop.
    slots: Vec<Option<u64>>,
}

impl Lending {
    /// A slab of this program was asked for.
    pub fn ask(&mut self, number: u64, program: u64, geometry: Geometry) {
        self.slabs.insert(number, Slab { program, geometry, pages: 0, parts: Vec::new() });
    }

    /// It is not waited for any more: whether it was.
    pub fn forget(&mut self, number: u64) -> bool {
        self.slabs.remove(&number).is_some()
    }

    /// The next pages of a slab.
    ///
    /// # Errors
    ///
    /// What is wrong, by name. `pages-unknown`: nobody waits for it; else the slab is of no use.
    pub fn take_pages(
        &mut self,
        memory: Option<&Ram>,
        number: u64,
        first: u32,
        runs: &Runs,
    ) -> Result<(), &'static str> {
        let slab = self.slabs.get_mut(&number).ok_or("pages-unknown")?;
        slab.take(memory.ok_or("pages-outside")?, first, runs)
    }

    /// Slabs of this program, or of all, that have all their pages and all their bells.
    pub fn whole(&self, program: Option<u64>) -> Vec<u64> {
        let rung = |program| self.bells(program).is_some();
        let whole = |slab: &Slab| {
            program.is_none_or(|p| p == slab.program) && slab.pages == slab.wanted() && rung(slab.program)
        };
        self.slabs.iter().filter(|(_, slab)| whole(slab)).map(|(number, _)| *number).collect()
    }

    /// Maps a slab that is whole.
    ///
    /// # Errors
    ///
    /// What the system does not give; the slab is of no use then.
    pub fn map(&mut self, number: u64) -> std::io::Result<Option<(Memory, [Doorbell; BELLS])>> {
        let Some(slab) = self.slabs.remove(&number) else { return Ok(None) };
        let Some(bells) = self.bells(slab.program) else { return Ok(None) };
        let piece = |part: &Part| (part.offset, part.len);
        let parts = slab.parts.iter().map(|part| (part.file.as_fd(), piece(part)));
        let pieces: Vec<_> = parts.map(|(file, (offset, len))| Piece { file, offset, len }).collect();
        Ok(Some((Memory::gather(&pieces, slab.geometry)?, bells)))
    }

    fn bells(&self, program: u64) -> Option<[Doorbell; BELLS]> {
        let known = self.programs.get(&program)?;
        known.iter().all(Option::is_some).then(|| known.each_ref().map(|bell| bell.clone().expect("all are")))
    }

    /// A doorbell of a program; for the first bell, the number by which the event loop is to know it.
    ///
    /// # Errors
    ///
    /// By name, if there is no such bell, or it has come before.
    pub fn take_bell(&mut self, program: u64, n: u32, bell: Doorbell) -> Result<Option<u32>, &'static str> {
        let place = self.programs.entry(program).or_default().get_mut(n as usize).ok_or("bell-number")?;
        if place.is_some() {
            return Err("bell-twice");
        }
        *place = Some(bell);
        if n > 0 {
            return Ok(None);
        }
        let slot = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(program);
        Ok(Some(slot as u32))
    }

    /// The program that rings there, and the bell.
    pub fn ringer(&self, slot: u32) -> Option<(u64, &Doorbell)> {
        let program = (*self.slots.get(slot as usize)?)?;
        Some((program, self.programs.get(&program)?[0].as_ref()?))
    }

    /// A program has ended: its first bell, and its slabs that were to come.
    pub fn end_program(&mut self, program: u64) -> (Option<Doorbell>, Vec<u64>) {
        self.slots.iter_mut().filter(|slot| **slot == Some(program)).for_each(|slot| *slot = None);
        let bells = self.programs.remove(&program);
        let its = |(number, slab): (&u64, &Slab)| (slab.program == program).then_some(*number);
        let slabs: Vec<u64> = self.slabs.iter().filter_map(its).collect();
        slabs.iter().for_each(|number| {
            self.slabs.remove(number);
        });
        (bells.and_then(|[first, ..]| first), slabs)
    }

    /// Every program that has a bell.
    pub fn programs(&self) -> Vec<u64> {
        self.programs.keys().copied().collect()
    }

    /// Bells that are to be read empty, each once.
    pub fn full(&self) -> Vec<(u64, u32)> {
        let each = self.programs.iter().flat_map(|(program, bells)| {
            bells.iter().enumerate().map(move |(n, bell)| (*program, n as u32, bell.as_ref()))
        });
        let full = each.filter(|(_, _, bell)| bell.is_some_and(Doorbell::take_full));
        full.map(|(program, n, _)| (program, n)).collect()
    }

    /// No slab is waited for any more: those that were.
    pub fn forget_slabs(&mut self) -> Vec<u64> {
        self.slabs.drain().map(|(number, _)| number).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{SEALED, memfd, region};
    use super::*;
    use proptest::prelude::*;

    fn ram() -> Ram {
        Ram::map(vec![
            (region(0, 2, 0, 0x10_0000), memfd(0x10_0000, SEALED)),
            (region(1, 2, 1 << 32, 0x10_0000), memfd(0x10_0000, SEALED)),
        ])
        .unwrap()
    }

    /// A header, and a segment of three pages.
    fn lending() -> Lending {
        let mut lending = Lending::default();
        lending.ask(7, 1, Geometry::new(1, 4096).unwrap());
        lending
    }

    fn tell(lending: &mut Lending, first: u32, pages: &[u64]) -> Result<(), &'static str> {
        lending.take_pages(Some(&ram()), 7, first, &Runs::of(pages).unwrap().0)
    }

    #[test]
    fn pages_come_in_order_and_as_many_as_there_are() {
        let mut lending = lending();
        assert_eq!(tell(&mut lending, 1, &[9]), Err("pages-order"));
        assert_eq!(tell(&mut lending, 0, &[9, 10]), Ok(()));
        assert_eq!(tell(&mut lending, 0, &[11]), Err("pages-order"));
        assert_eq!(tell(&mut lending, 2, &[20, 21, 22]), Err("pages-count"));
        assert_eq!(tell(&mut lending, 2, &[0xff, 0x100]), Err("pages-outside"));
        assert_eq!(lending.take_pages(None, 7, 2, &Runs::of(&[1]).unwrap().0), Err("pages-outside"));
        assert_eq!(lending.take_pages(Some(&ram()), 8, 0, &Runs::of(&[1]).unwrap().0), Err("pages-unknown"));
    }

    #[test]
    fn a_slab_is_whole_with_its_pages_and_its_programs_bells() {
        let mut lending = lending();
        tell(&mut lending, 0, &[9, 0x10_0000, 1, 2]).unwrap();
        assert!(lending.whole(None).is_empty());
        let bell = || Doorbell::new().unwrap();
        assert_eq!(lending.take_bell(1, 4, bell()), Err("bell-number"));
        for n in (0..BELLS as u32).rev() {
            assert_eq!(lending.take_bell(1, n, bell()), Ok((n == 0).then_some(0)));
        }
        assert_eq!(lending.take_bell(1, 0, bell()), Err("bell-twice"));
        assert_eq!((lending.whole(None), lending.whole(Some(2))), (vec![7], vec![]));
        let (memory, _) = lending.map(7).unwrap().unwrap();
        assert_eq!(memory.geometry().slab_len(), 4 * 4096);
        assert_eq!(lending.ringer(0).map(|(program, _)| program), Some(1));
        let (first, slabs) = lending.end_program(1);
        assert!(first.is_some() && slabs.is_empty() && lending.ringer(0).is_none());
    }

    proptest! {
        #[test]
        fn whatever_is_told_no_page_lies_outside(
            told in prop::collection::vec((0u32..5, prop::collection::vec(1u64..0x10_0200, 1..4)), 1..20),
        ) {
            let mut lending = lending();
            for (first, pages) in told {
                let _ = tell(&mut lending, first, &pages);
            }
            let slab = &lending.slabs[&7];
            prop_assert!(slab.pages <= slab.wanted());
            prop_assert!(slab.parts.iter().all(|part| part.offset + part.len as u64 <= 0x10_0000));
        }
    }
}
