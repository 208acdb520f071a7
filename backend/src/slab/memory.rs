//! The memory of a slab, mapped: all of this module's unsafe code is mapping, and laying the contract's types over it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vsocket_channel::Side;
use vsocket_channel::layout::{Geometry, SegmentHeader, SlabHeader};
use vsocket_channel::ring::Bytes;

use crate::fabric::Region;

/// A part of a file that is a part of a slab.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// A guest's memory, which nobody can shorten.
    pub file: BorrowedFd<'a>,
    /// Where in it, in bytes; a multiple of a page.
    pub offset: u64,
    /// So many bytes, a multiple of a page.
    pub len: usize,
}

/// A mapped slab. Guests write to it at any time, so nothing here gives a reference to anything but atomics.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    geometry: Geometry,
}

// SAFETY: the mapping belongs to the process, not to a thread; it is reached only through atomics and the raw copies of
// `Bytes` and `Region`.
unsafe impl Send for Memory {}
// SAFETY: as for Send.
unsafe impl Sync for Memory {}

impl Memory {
    /// Makes the memory of a slab, whose size nobody can change.
    ///
    /// # Errors
    ///
    /// What the system does not give.
    pub fn create(geometry: Geometry) -> io::Result<(OwnedFd, Self)> {
        let memfd = memfd_create(c"vsocket-slab", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&memfd, geometry.slab_len() as u64)?;
        fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let memory = Self::map(&memfd, geometry)?;
        Ok((memfd, memory))
    }

    /// Maps a slab of this geometry.
    ///
    /// # Errors
    ///
    /// What `mmap` says.
    pub fn map(memfd: impl AsFd, geometry: Geometry) -> io::Result<Self> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that Rust knows.
        let base = unsafe { mmap(std::ptr::null_mut(), geometry.slab_len(), protection, flags, memfd, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, geometry })
    }

    /// Maps pieces one behind the other, as a slab.
    ///
    /// # Errors
    ///
    /// What `mmap` says: the system has a limit of mappings (`vm.max_map_count`), and each piece is one. Also if the
    /// pieces are not as long as the slab.
    pub fn gather(pieces: &[Piece<'_>], geometry: Geometry) -> io::Result<Self> {
        let len = geometry.slab_len();
        if pieces.iter().try_fold(0usize, |sum, piece| sum.checked_add(piece.len)) != Some(len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that Rust knows.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let memory = Self { base, geometry };
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
        let mut at = 0;
        for Piece { file, offset, len } in pieces {
            let to = memory.base.as_ptr().wrapping_add(at).cast();
            // SAFETY: the pieces' lengths add up to the reservation's, so each replaces only a part of that, to which nothing
            // refers yet; on an error the whole is unmapped by `Drop`.
            unsafe { mmap(to, *len, protection, flags, file, *offset) }?;
            at += len;
        }
        Ok(memory)
    }

    /// The slab's first page.
    pub fn header(&self) -> &SlabHeader {
        // SAFETY: the mapping begins page-aligned, is longer than the header, and lives as long as `self`; the header is
        // `Shared`: atomics only, any bit pattern valid.
        unsafe { self.base.cast().as_ref() }
    }

    /// The slab's sizes.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The header of a segment.
    pub fn segment(&self, index: u32) -> Option<&SegmentHeader> {
        let at = self.geometry.segment_offset(index)?;
        // SAFETY: `at` is a multiple of a page inside the mapping, which is long enough for the whole segment; otherwise
        // as for `header`.
        Some(unsafe { self.base.add(at).cast().as_ref() })
    }

    /// The ring of the direction that begins at `from`. It is valid as long as `self`.
    pub fn ring(&self, index: u32, from: Side) -> Option<Bytes> {
        let at = self.geometry.ring_offset(index, from)?;
        // SAFETY: offset and length are the geometry's, so inside the mapping; the length is a power of two. The caller
        // keeps `self` beside the ring, as documented (`View` does).
        Some(unsafe { Bytes::new(self.base.as_ptr().add(at), self.geometry.ring_len()) })
    }

    /// The whole slab as a region for a fabric, which keeps it mapped.
    pub fn region(self: &Arc<Self>) -> Region {
        // SAFETY: the mapping is as long as the geometry says, readable and writable, and is unmapped when the last Arc,
        // of which the region holds one, goes; it is sealed against shrinking; this process holds references only to
        // the atomics of the headers.
        unsafe { Region::new(self.base, self.geometry.slab_len(), self.clone()) }
    }

    /// Takes the pages of `len` bytes at `at` from the system now, not at the first access.
    ///
    /// # Errors
    ///
    /// If there are none.
    pub(crate) fn populate(&self, at: usize, len: usize) -> io::Result<()> {
        debug_assert!(at + len <= self.geometry.slab_len());
        let from = self.base.as_ptr().wrapping_add(at).cast();
        // SAFETY: the range lies in our mapping (callers pass the geometry's offsets), and populating changes no byte.
        match unsafe { madvise(from, len, Advice::LinuxPopulateWrite) } {
            // A kernel before 5.14 cannot; the pages then come at the first access.
            Err(Errno::INVAL) => Ok(()),
            other => Ok(other?),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: base and length are those of `map`; references and rings borrow from or stand beside an Arc of self.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.geometry.slab_len()) };
    }
}

/// One segment, with the mapping it lies in.
#[derive(Clone, Debug)]
pub struct View {
    memory: Arc<Memory>,
    index: u32,
    /// The ring of direction 0 → 1, and of 1 → 0.
    pub rings: [Bytes; 2],
}

impl View {
    /// The segment `index` of `memory`, if it has one.
    pub fn new(memory: &Arc<Memory>, index: u32) -> Option<Self> {
        let rings = [memory.ring(index, Side::Zero)?, memory.ring(index, Side::One)?];
        Some(Self { memory: memory.clone(), index, rings })
    }

    /// The segment's header.
    pub fn header(&self) -> &SegmentHeader {
        self.memory.segment(self.index).expect("`new` has checked the index")
    }

    /// The slab's header, with the bells.
    pub fn slab(&self) -> &SlabHeader {
        self.memory.header()
    }

    /// Where the ring of the direction that begins at `from` is in the slab.
    pub fn ring_offset(&self, from: Side) -> usize {
        self.memory.geometry.ring_offset(self.index, from).expect("`new` has checked the index")
    }
}
