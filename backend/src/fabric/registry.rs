//! Which region a steering tag names, and for whom: shared by the fabrics that keep their own tables.
//!
//! A tag is a slot's index and a random byte, so that a stale tag seldom names the slot's next region. What protects
//! tenants from each other is the domain, not the tag.

#![forbid(unsafe_code)]

use super::{Access, DomainId, Error, Fault, LocalRange, MemoryKey, PostError, Region};

/// Slots are numbered in 24 bits of a tag; a host runs out of memory long before.
const MAX_SLOTS: usize = 1 << 20;

struct Entry {
    tag: u32,
    domain: DomainId,
    access: Access,
    region: Region,
}

/// The table of one fabric.
#[derive(Default)]
pub struct Registry {
    slots: Vec<Option<Entry>>,
    free: Vec<u32>,
}

/// The remote address of a region's first byte: never zero, and different for each tag, so that a user who forgets to
/// add it finds out.
fn base(tag: u32) -> u64 {
    (u64::from(tag) + 1) << 26
}

impl Registry {
    /// Adds a region.
    pub fn register(&mut self, domain: DomainId, region: Region, access: Access) -> Result<MemoryKey, Error> {
        let mut random = [0];
        getrandom::fill(&mut random).map_err(|_| Error::Entropy)?;
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < MAX_SLOTS => {
                self.slots.push(None);
                self.slots.len() as u32 - 1
            }
            None => return Err(Error::TooManyRegions),
        };
        let tag = index << 8 | u32::from(random[0]);
        self.slots[index as usize] = Some(Entry { tag, domain, access, region });
        Ok(MemoryKey { lkey: tag, rkey: tag, base: base(tag) })
    }

    /// How many regions there are.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes a region out.
    pub fn deregister(&mut self, key: MemoryKey) -> Result<(), Error> {
        self.entry(key.lkey).ok_or(Error::UnknownKey)?;
        self.slots[(key.lkey >> 8) as usize] = None;
        self.free.push(key.lkey >> 8);
        Ok(())
    }

    /// Takes all regions of a domain out.
    pub fn close_domain(&mut self, domain: DomainId) {
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.take_if(|entry| entry.domain == domain).is_some() {
                self.free.push(index as u32);
            }
        }
    }

    fn entry(&self, tag: u32) -> Option<&Entry> {
        self.slots.get((tag >> 8) as usize)?.as_ref().filter(|entry| entry.tag == tag)
    }

    /// The region of a local range.
    pub fn local(&self, domain: DomainId, range: LocalRange) -> Result<&Region, PostError> {
        let entry = self.entry(range.lkey).filter(|entry| entry.domain == domain);
        let region = &entry.ok_or(PostError::UnknownRegion)?.region;
        if region.contains(range.offset, range.len) { Ok(region) } else { Err(PostError::Bounds) }
    }

    /// The region that a peer's WRITE of `len` bytes goes to, and the offset in it.
    pub fn remote(
        &self,
        domain: DomainId,
        tag: u32,
        address: u64,
        len: usize,
    ) -> Result<(&Region, usize), Fault> {
        let entry = self.entry(tag).ok_or(Fault::InvalidTag)?;
        if entry.domain != domain {
            return Err(Fault::WrongDomain);
        }
        if entry.access != Access::RemoteWrite {
            return Err(Fault::AccessRights);
        }
        address.checked_add(len as u64).ok_or(Fault::Wrap)?;
        let offset = address.checked_sub(base(tag)).and_then(|n| usize::try_from(n).ok());
        let offset = offset.filter(|&offset| entry.region.contains(offset, len)).ok_or(Fault::Bounds)?;
        Ok((&entry.region, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_reference_has_its_fault() {
        let (own, other) = (DomainId(1), DomainId(2));
        let mut registry = Registry::default();
        let key = registry.register(own, Region::private(100), Access::RemoteWrite).unwrap();
        let quiet = registry.register(own, Region::private(100), Access::Local).unwrap();
        let fault = |domain, tag, address, len| registry.remote(domain, tag, address, len).unwrap_err();
        assert_eq!(registry.remote(own, key.rkey, key.base + 60, 40).unwrap().1, 60);
        assert_eq!(fault(own, key.rkey, key.base + 61, 40), Fault::Bounds);
        assert_eq!(fault(own, key.rkey, key.base - 1, 1), Fault::Bounds);
        assert_eq!(fault(own, key.rkey, u64::MAX, 2), Fault::Wrap);
        assert_eq!(fault(own, key.rkey ^ 1, key.base, 1), Fault::InvalidTag);
        assert_eq!(fault(own, u32::MAX, key.base, 1), Fault::InvalidTag);
        assert_eq!(fault(other, key.rkey, key.base, 1), Fault::WrongDomain);
        assert_eq!(fault(own, quiet.rkey, quiet.base, 1), Fault::AccessRights);
    }

    #[test]
    fn local_ranges_are_checked_too() {
        let mut registry = Registry::default();
        let lkey = registry.register(DomainId(1), Region::private(8), Access::Local).unwrap().lkey;
        let local = |domain, lkey, offset, len| {
            registry.local(DomainId(domain), LocalRange { lkey, offset, len }).map(|_| ())
        };
        assert_eq!(local(1, lkey, 0, 8), Ok(()));
        assert_eq!(local(1, lkey, usize::MAX, 2), Err(PostError::Bounds));
        assert_eq!(local(2, lkey, 0, 8), Err(PostError::UnknownRegion));
        assert_eq!(local(1, lkey ^ 1, 0, 8), Err(PostError::UnknownRegion));
    }

    #[test]
    fn slots_are_used_again() {
        let mut registry = Registry::default();
        for round in 0..3 {
            let domain = DomainId(round);
            let first = registry.register(domain, Region::private(8), Access::Local).unwrap();
            registry.register(domain, Region::private(8), Access::Local).unwrap();
            registry.deregister(first).unwrap();
            assert!(registry.deregister(first).is_err());
            registry.close_domain(domain);
        }
        assert_eq!(registry.slots.len(), 2);
    }
}
