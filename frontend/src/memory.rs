//! Mappings: slabs that the host made, and records that the agent made. The only place of the frontend that maps.

use crate::record::{RECORDS, RECORDS_HEADER_LEN, RECORDS_LAYOUT, Record, RecordsHeader};
use rustix::fd::{AsFd, OwnedFd};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Instant;
use vsocket_channel::Side;
use vsocket_channel::layout::{Bell, Geometry, LAYOUT_VERSION, SLAB_MAGIC, SegmentHeader, SlabHeader};
use vsocket_channel::ring::{BadIndex, Bytes, Ring};
use vsocket_channel::sync::Ordering;

/// A shared mapping.
#[derive(Debug)]
struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: a mapping is plain memory; what is in it is reached through atomics, locks and copies.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: impl AsFd, len: usize) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&fd)?;
        let have = usize::try_from(stat.st_size).unwrap_or(0);
        // On huge pages the file, and with it the mapping, ends with a whole one.
        let block = usize::try_from(stat.st_blksize).unwrap_or(0).max(1);
        if have != len && have != len.next_multiple_of(block) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{have} bytes, want {len}")));
        }
        let len = have;
        // SAFETY: a new shared mapping at an address of the kernel's choice touches no existing memory; the file has
        // `len` bytes, and its maker sealed it against shrinking.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        }?;
        Ok(Self { base: base.cast(), len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and nobody holds a reference into it: they all borrow its owner.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

/// A mapped slab.
#[derive(Debug)]
pub struct Slab {
    mapping: Mapping,
    geometry: Geometry,
    /// Its number, unique under its host's `boot`.
    pub id: u64,
}

impl Slab {
    /// Maps a slab and checks its header.
    pub fn map(fd: impl AsFd, id: u64, geometry: Geometry) -> io::Result<Self> {
        let slab = Self { mapping: Mapping::new(fd, geometry.slab_len())?, geometry, id };
        let header = slab.header();
        let found = (header.magic.load(Ordering::Relaxed), header.version.load(Ordering::Relaxed));
        if found != (SLAB_MAGIC, LAYOUT_VERSION) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a slab of this version"));
        }
        Ok(slab)
    }

    fn header(&self) -> &SlabHeader {
        // SAFETY: the mapping is page-aligned and longer than the header; the type is `Shared`.
        unsafe { &*self.mapping.base.cast() }
    }

    /// The doorbells of a side.
    pub fn bells(&self, side: Side) -> &[Bell] {
        &self.header().bells[side.index()]
    }

    /// The header of a segment. `index` was checked against the geometry when the message was decoded; one that is
    /// out of range names the first.
    pub fn segment(&self, index: u32) -> &SegmentHeader {
        let at = self.geometry.segment_offset(index).unwrap_or(vsocket_channel::layout::SLAB_HEADER_LEN);
        // SAFETY: the geometry keeps the segment inside the mapping, page-aligned; the type is `Shared`.
        unsafe { &*self.mapping.base.add(at).cast() }
    }

    fn bytes(&self, index: u32, from: Side) -> Option<Bytes> {
        let at = self.geometry.ring_offset(index, from)?;
        // SAFETY: the ring lies inside the mapping; its length is a power of two by `Geometry::new`. The value is kept
        // only in a `Bound`, which holds the slab.
        Some(unsafe { Bytes::new(self.mapping.base.add(at), self.geometry.ring_len()) })
    }
}

/// The far side's doorbells: eventfds of this machine, or, in a virtual machine, streams to its host.
#[derive(Clone, Debug)]
pub struct Ringers {
    fds: Arc<Vec<OwnedFd>>,
    streams: bool,
}

impl From<Arc<Vec<OwnedFd>>> for Ringers {
    fn from(fds: Arc<Vec<OwnedFd>>) -> Self {
        let is_socket = |fd: &OwnedFd| {
            let stat = rustix::fs::fstat(fd);
            stat.is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_socket())
        };
        let streams = fds.first().is_some_and(is_socket);
        Self { fds, streams }
    }
}

/// What it takes to ring a stream, in nanoseconds, smoothed. On an emulated processor it was 150 to 600 µs; before the first
/// ring, something between that and a real one's is assumed.
static STREAM_RING: AtomicU32 = AtomicU32::new(60_000);
/// A longer one was interrupted.
const STREAM_RING_MOST: u32 = 500_000;

/// What a ring takes at present where doorbells are streams, in nanoseconds.
pub fn stream_ring() -> u32 {
    STREAM_RING.load(Ordering::Relaxed)
}

impl Ringers {
    /// Rings one. A bell that takes no more has been rung; one whose other end is gone has nobody to wake.
    pub fn ring(&self, n: usize) {
        let Some(fd) = self.fds.get(n) else { return };
        let one = 1u64.to_ne_bytes();
        if self.streams {
            // In the application's process: a stream that the host has ended must not kill it with SIGPIPE.
            let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
            let began = Instant::now();
            let _ = rustix::net::send(fd, &one, flags);
            let took = u32::try_from(began.elapsed().as_nanos()).unwrap_or(u32::MAX).min(STREAM_RING_MOST);
            // Two threads that ring at once lose one of their measurements.
            let was = STREAM_RING.load(Ordering::Relaxed);
            STREAM_RING.store(was - was / 8 + took / 8, Ordering::Relaxed);
        } else {
            let _ = rustix::io::write(fd, &one);
        }
    }

    /// The descriptors, as they are passed on.
    pub fn fds(&self) -> &Arc<Vec<OwnedFd>> {
        &self.fds
    }
}

/// A segment bound to one endpoint for one generation.
#[derive(Debug)]
pub struct Bound {
    /// The generation it was prepared for.
    pub generation: u32,
    /// `Direct` or `Fabric`.
    pub lane: vsocket_channel::message::Lane,
    /// Our side.
    pub side: Side,
    /// Which segment of the slab.
    pub index: u32,
    /// The slab.
    pub slab: Arc<Slab>,
    /// The far side's doorbells.
    pub far: Ringers,
    tx: Bytes,
    rx: Bytes,
    /// The consumer's index as it was last read: the line it stands in is the consumer's, and reading it costs a transfer
    /// between processors. Used under the sender's lock.
    seen_tail: std::sync::atomic::AtomicU64,
}

impl Bound {
    /// Binds a segment of a mapped slab.
    pub fn new(
        generation: u32,
        segment: &vsocket_channel::message::Segment,
        slab: Arc<Slab>,
        far: impl Into<Ringers>,
    ) -> Option<Self> {
        let far = far.into();
        let (side, index) = (segment.side, segment.index);
        let (tx, rx) = (slab.bytes(index, side)?, slab.bytes(index, side.other())?);
        let seen_tail = std::sync::atomic::AtomicU64::new(u64::MAX);
        Some(Self { generation, lane: segment.lane, side, index, slab, far, tx, rx, seen_tail })
    }

    /// The segment's shared words.
    pub fn header(&self) -> &SegmentHeader {
        self.slab.segment(self.index)
    }

    /// The ring that this end fills.
    pub fn tx(&self) -> Ring<'_> {
        Ring { indices: &self.header().directions[self.side.index()], bytes: &self.tx }
    }

    /// The ring that this end empties.
    pub fn rx(&self) -> Ring<'_> {
        Ring { indices: &self.header().directions[self.side.other().index()], bytes: &self.rx }
    }

    /// Bytes that may be written to the ring now, at least `want` if there are as many; under the sender's lock.
    ///
    /// # Errors
    ///
    /// [`BadIndex`] if the consumer's index lies outside what was produced.
    pub fn tx_space(&self, head: u64, want: usize) -> Result<usize, BadIndex> {
        let used = head.wrapping_sub(self.seen_tail.load(Ordering::Relaxed));
        let size = self.tx.len();
        if used as usize <= size && size - used as usize >= want.min(size) {
            return Ok(size - used as usize);
        }
        let space = self.tx().space(head)?;
        self.seen_tail.store(head.wrapping_sub((size - space) as u64), Ordering::Relaxed);
        Ok(space)
    }

    /// Rings the far side's waiters of this connection that have announced their sleep. To be called after something
    /// was published.
    pub fn ring_far(&self) {
        vsocket_channel::bell::publish_fence();
        let far = self.side.other();
        let mask = self.header().waiters[far.index()].mask.load(Ordering::Relaxed);
        if mask == 0 {
            return;
        }
        for (n, bell) in self.slab.bells(far).iter().enumerate() {
            if mask & (1 << n) != 0 && bell.take() {
                self.far.ring(n);
            }
        }
    }
}

/// A program's records, mapped.
#[derive(Debug)]
pub struct Records(Mapping);

impl Records {
    /// Makes the memory for a program's records.
    pub fn create() -> io::Result<(OwnedFd, Self)> {
        use rustix::fs::{MemfdFlags, SealFlags};
        let fd =
            rustix::fs::memfd_create("vsocket-records", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, Record::memory_len() as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let records = Self::map(&fd)?;
        records.header().layout.store(RECORDS_LAYOUT, Ordering::Release);
        Ok((fd, records))
    }

    /// Maps records that a program has from an agent before. Whoever made them, they cannot become shorter.
    pub fn take_over(fd: impl AsFd) -> io::Result<Self> {
        use rustix::fs::SealFlags;
        let exact = rustix::fs::fstat(&fd)?.st_size as u64 == Record::memory_len() as u64;
        let sealed = rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK | SealFlags::GROW);
        if !exact || !sealed {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not the memory of records"));
        }
        let records = Self::map(fd)?;
        match records.header().layout.load(Ordering::Acquire) {
            RECORDS_LAYOUT => Ok(records),
            other => Err(io::Error::other(format!("records of layout {other}, want {RECORDS_LAYOUT}"))),
        }
    }

    /// Maps a program's records.
    pub fn map(fd: impl AsFd) -> io::Result<Self> {
        Ok(Self(Mapping::new(fd, Record::memory_len())?))
    }

    /// The header.
    pub fn header(&self) -> &RecordsHeader {
        // SAFETY: page-aligned, inside the mapping, atomics only.
        unsafe { &*self.0.base.cast() }
    }

    /// Record `index`, if there is such a one.
    pub fn record(&self, index: u32) -> Option<&Record> {
        // SAFETY: the index is in range, so the record lies inside the mapping, aligned; it holds atomics and locks that
        // an agent initialises before it names the record to anybody.
        (index < RECORDS)
            .then(|| unsafe { &*self.0.base.add(RECORDS_HEADER_LEN).cast::<Record>().add(index as usize) })
    }
}
