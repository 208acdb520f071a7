//! A guest that is a virtual machine, as the daemon has it: its front, its memory, and who has called from it.
//!
//! Its keeper and its agent speak over streams of the guest's, so everything in the guest that can open one may pretend to be
//! one of them. The first privileged caller of a boot that registers is the keeper; it is given a token, and without that nobody
//! registers or presents himself before the guest boots again. The front keeps the token, so that another daemon knows it.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};
use vsocket_channel::message::Region;

use crate::carrier::Carrier;

mod lending;

pub use lending::{Lending, Part};

/// Bytes of a page of the guest's memory.
const PAGE: u64 = 4096;
/// Ports below that are for the privileged, in the guest's kernel as in ours.
const UNPRIVILEGED: u32 = 1024;
/// Callers that have not yet said what they are: so many of the privileged, and of the others.
const CALLERS: [usize; 2] = [32, 256];

/// The guest's memory, mapped.
#[derive(Debug)]
pub struct Ram {
    mapped: GuestMemoryMmap,
}

impl Ram {
    /// Maps a whole table. Memory that somebody could take away while it is in use is not accepted.
    ///
    /// # Errors
    ///
    /// Why not, by name.
    pub fn map(table: Vec<(Region, OwnedFd)>) -> Result<Self, &'static str> {
        let map = |(region, fd): (Region, OwnedFd)| {
            let file = File::from(fd);
            let seals = fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
            if !seals.contains(SealFlags::SHRINK) {
                return Err("memory-unsealed");
            }
            let len = file.metadata().map_err(|_| "memory-file")?.len();
            if region.offset.checked_add(region.size).is_none_or(|end| end > len) {
                return Err("memory-short");
            }
            let size = usize::try_from(region.size).map_err(|_| "memory-size")?;
            let mapped = MmapRegion::from_file(FileOffset::new(file, region.offset), size)
                .map_err(|_| "memory-map")?;
            GuestRegionMmap::new(mapped, GuestAddress(region.address)).ok_or("memory-size")
        };
        let mut regions = table.into_iter().map(map).collect::<Result<Vec<_>, _>>()?;
        regions.sort_by_key(|region| region.start_addr());
        Ok(Self { mapped: GuestMemoryMmap::from_regions(regions).map_err(|_| "memory-overlap")? })
    }

    /// How much there is.
    pub fn bytes(&self) -> u64 {
        self.mapped.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Where pages of it are, which must lie in one region. Page 0 is what a guest names that does not know better.
    pub fn part(&self, page: u64, count: usize) -> Option<Part> {
        let address = page.checked_mul(PAGE).filter(|address| *address > 0)?;
        let len = count.checked_mul(PAGE as usize).filter(|len| *len > 0)?;
        let region = self.mapped.find_region(GuestAddress(address))?;
        let at = address - region.start_addr().0;
        if region.len() - at < len as u64 {
            return None;
        }
        let file = region.file_offset()?;
        Some(Part { file: file.arc().clone(), offset: file.start() + at, len })
    }
}

/// A table that is being told, region by region.
#[derive(Debug, Default)]
struct Coming {
    table: u64,
    regions: Vec<(Region, OwnedFd)>,
}

/// A front, from its first message on with its process.
#[derive(Debug)]
pub struct Front {
    /// Its connection.
    pub carrier: Carrier,
    /// Its process.
    pub pid: Option<u32>,
}

/// Who has opened a stream, and has not said what for.
#[derive(Debug)]
pub struct Caller {
    /// Its stream.
    pub carrier: Carrier,
    /// Whether its port says that it may bind such ports.
    pub privileged: bool,
}

/// Who has registered.
#[derive(Debug)]
pub struct Keeper {
    /// Its stream.
    pub carrier: Carrier,
    /// Its process in the guest.
    pub pid: u32,
    /// It was told that it has registered: what is asked of it, it was asked in this registration.
    pub answered: bool,
}

/// A virtual machine.
#[derive(Debug, Default)]
pub struct Machine {
    /// Its front, while there is one.
    pub front: Option<Front>,
    /// Its memory, while it is known.
    pub memory: Option<Ram>,
    /// It stands still, and its memory must not be touched.
    pub paused: bool,
    /// The daemon has still to say that it touches nothing.
    pub quiet_due: bool,
    /// What proves in this boot who registers, if anybody has.
    pub token: Option<u128>,
    /// Who has, while he is there.
    pub keeper: Option<Keeper>,
    /// What he lends.
    pub lending: Lending,
    coming: Coming,
    callers: Vec<Option<Caller>>,
}

impl Machine {
    /// A region of a table: the table's memory is taken when the last one has come.
    ///
    /// # Errors
    ///
    /// What is wrong, by name.
    pub fn take_region(
        &mut self,
        table: u64,
        region: Region,
        fd: Option<OwnedFd>,
    ) -> Result<(), &'static str> {
        let fd = fd.ok_or("memory-descriptor")?;
        if region.index == 0 {
            self.coming = Coming { table, regions: Vec::new() };
        }
        let Coming { table: expected, regions } = &mut self.coming;
        if *expected != table || regions.len() != region.index as usize {
            return Err("memory-order");
        }
        regions.push((region, fd));
        if region.index + 1 == region.count {
            // Never the old one and the new one at a time, and never a part of the new.
            self.memory = None;
            let whole = std::mem::take(&mut self.coming).regions;
            self.memory = Some(Ram::map(whole)?);
        }
        Ok(())
    }

    /// The guest has rebooted.
    pub fn handle_reset(&mut self) {
        (self.token, self.paused, self.quiet_due) = (None, false, false);
    }

    /// The guest is gone, or its front.
    pub fn handle_gone(&mut self) {
        (self.memory, self.coming) = (None, Coming::default());
        self.handle_reset();
    }

    /// Somebody wants to register, with this token or 0; `fresh` is one that nobody knows. The token that counts from now on.
    ///
    /// # Errors
    ///
    /// Why not, by name.
    pub fn handle_register(
        &mut self,
        privileged: bool,
        token: u128,
        fresh: u128,
    ) -> Result<u128, &'static str> {
        if !privileged {
            return Err("registration-unprivileged");
        }
        // The front tells the token of this boot first, if there is one.
        if self.memory.is_none() {
            return Err("registration-early");
        }
        match self.token {
            Some(known) if known != token => Err("second-registration"),
            // A guest that was here before, or elsewhere, brings its own.
            _ => Ok(*self.token.insert(if token == 0 { fresh } else { token })),
        }
    }

    /// Whether a caller may present himself with this token.
    pub fn knows(&self, token: u128) -> bool {
        self.token == Some(token) && self.keeper.as_ref().is_some_and(|keeper| keeper.answered)
    }

    /// Takes a caller in, under a number.
    ///
    /// # Errors
    ///
    /// By name, if there are too many.
    pub fn admit(&mut self, stream: OwnedFd, guest_port: u32) -> Result<u32, &'static str> {
        let privileged = guest_port < UNPRIVILEGED;
        let like = self.callers.iter().flatten().filter(|caller| caller.privileged == privileged).count();
        if like >= CALLERS[usize::from(!privileged)] {
            return Err("caller-limit");
        }
        let caller = Some(Caller { carrier: Carrier::stream(stream), privileged });
        let slot = match self.callers.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.callers.push(None);
                self.callers.len() - 1
            }
        };
        self.callers[slot] = caller;
        Ok(slot as u32)
    }

    /// A caller.
    pub fn caller(&mut self, slot: u32) -> Option<&mut Caller> {
        self.callers.get_mut(slot as usize)?.as_mut()
    }

    /// Hands a caller out.
    pub fn take_caller(&mut self, slot: u32) -> Option<Caller> {
        self.callers.get_mut(slot as usize)?.take()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    pub fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, len).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    pub fn region(index: u32, count: u32, address: u64, size: u64) -> Region {
        Region { index, count, address, size, offset: 0 }
    }

    pub const SEALED: SealFlags = SealFlags::SHRINK;

    #[test]
    fn a_table_counts_when_it_is_whole() {
        let mut machine = Machine::default();
        let take = |machine: &mut Machine, table, region| {
            machine.take_region(table, region, Some(memfd(0x10_0000, SEALED)))
        };
        take(&mut machine, 1, region(0, 2, 0, 0x10_0000)).unwrap();
        assert!(machine.memory.is_none());
        take(&mut machine, 1, region(1, 2, 1 << 32, 0x8_0000)).unwrap();
        let memory = machine.memory.as_ref().unwrap();
        assert_eq!(memory.bytes(), 0x18_0000);
        assert_eq!(memory.part(1, 0xff).map(|part| (part.offset, part.len)), Some((0x1000, 0xf_f000)));
        assert_eq!(memory.part(0x10_007f, 1).map(|part| (part.offset, part.len)), Some((0x7_f000, 0x1000)));
        for (page, count) in
            [(0, 1), (1, 0x100), (0x100, 1), (0xf_ffff, 2), (1, 0), (u64::MAX, 1), (1 << 52, 1)]
        {
            assert!(memory.part(page, count).is_none(), "{page:x}");
        }
        assert_eq!(take(&mut machine, 2, region(1, 2, 0, 4096)), Err("memory-order"));
        assert_eq!(machine.take_region(2, region(0, 1, 0, 4096), None), Err("memory-descriptor"));
        assert!(machine.memory.is_some(), "the one before still holds");
        take(&mut machine, 3, region(0, 1, 0, 4096)).unwrap();
        assert_eq!(machine.memory.as_ref().unwrap().bytes(), 4096);
        machine.handle_gone();
        assert!(machine.memory.is_none());
    }

    #[test]
    fn memory_that_could_go_away_is_not_taken() {
        let mut machine = Machine::default();
        let fds = [
            (memfd(0x10_0000, SealFlags::GROW), "memory-unsealed"),
            (memfd(0x1000, SEALED), "memory-short"),
            (std::fs::File::open("/dev/zero").unwrap().into(), "memory-unsealed"),
        ];
        for (fd, name) in fds {
            assert_eq!(machine.take_region(1, region(0, 1, 0, 0x2000), Some(fd)), Err(name));
        }
        let mut two = |index, address| {
            machine.take_region(1, region(index, 2, address, 0x2000), Some(memfd(0x2000, SEALED)))
        };
        assert_eq!((two(0, 0x1000), two(1, 0)), (Ok(()), Err("memory-overlap")));
        assert!(machine.memory.is_none());
    }

    #[test]
    fn silent_callers_are_bounded_and_keep_no_other_kind_out() {
        let mut machine = Machine::default();
        let stream = || std::os::unix::net::UnixStream::pair().unwrap().0.into();
        for n in 0..CALLERS[1] as u32 {
            assert_eq!(machine.admit(stream(), 40_000 + n), Ok(n));
        }
        assert_eq!(machine.admit(stream(), 50_000), Err("caller-limit"));
        assert!(machine.admit(stream(), 1023).is_ok());
        assert!(!machine.take_caller(7).unwrap().privileged);
        assert!(machine.caller(7).is_none() && machine.caller(9999).is_none());
        assert_eq!(machine.admit(stream(), 1024), Ok(7));
    }
}
