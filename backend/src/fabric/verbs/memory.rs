//! Protection domains and registered memory.
//!
//! The device reaches memory only through a registration, and a registration keeps its memory until the device has
//! given it up. So no order in which the rest is dropped can make the device touch memory that is no longer ours.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

use rdma_sys::{ibv_alloc_pd, ibv_dealloc_pd, ibv_dereg_mr, ibv_mr, ibv_pd, ibv_reg_mr_iova};

use super::device::{Context, check, checked};
use crate::fabric::{Access, Region};

const PAGE: usize = 4096;

/// A protection domain.
pub struct Pd {
    raw: NonNull<ibv_pd>,
    _context: Arc<Context>,
}

// SAFETY: libibverbs may be called from any thread; the pointer is freed only by the one `drop`.
unsafe impl Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

impl Pd {
    /// A new one.
    pub fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open, and kept so by our clone.
        let raw = checked(unsafe { ibv_alloc_pd(context.raw()) })?;
        Ok(Arc::new(Self { raw, _context: context.clone() }))
    }

    pub(super) fn raw(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: what was made in the domain keeps an `Arc` of it, so nothing is left in it.
        if unsafe { ibv_dealloc_pd(self.raw()) } != 0 {
            tracing::debug!("a protection domain of a lost device stays behind");
        }
    }
}

/// What a registration keeps in place.
enum Kept {
    Region(Region),
    Buffer(Buffer),
}

/// A registration.
pub struct Mr {
    /// Null once taken back.
    raw: AtomicPtr<ibv_mr>,
    lkey: u32,
    rkey: u32,
    base: u64,
    /// `None` only while dropping.
    kept: Option<Kept>,
    _pd: Arc<Pd>,
}

// SAFETY: the region's bytes are never touched through a registration, only its length is read; the pointer to the
// registration is swapped atomically.
unsafe impl Sync for Mr {}

impl Mr {
    /// Registers a region. `place` distinguishes the addresses by which peers name regions: ours are not told.
    pub fn of_region(pd: &Arc<Pd>, region: Region, access: Access, place: u32) -> io::Result<Self> {
        if region.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (pointer, len) = (region.pointer(), region.len());
        // Devices want both addresses at the same place in their page.
        let base = ((u64::from(place) + 1) << 32) | (pointer.as_ptr() as usize % PAGE) as u64;
        let flags = match access {
            Access::Local => 0,
            // Local write is what verbs ask for whenever a peer may write.
            Access::RemoteWrite => 1 | 2,
        };
        Self::new(pd, pointer, len, base, flags, Kept::Region(region))
    }

    /// Registers a buffer of our own, for sending from and receiving into.
    pub fn of_buffer(pd: &Arc<Pd>, buffer: Buffer) -> io::Result<Self> {
        let (pointer, len) = (buffer.pointer, buffer.layout.size());
        Self::new(pd, pointer, len, pointer.as_ptr() as u64, 1, Kept::Buffer(buffer))
    }

    fn new(pd: &Arc<Pd>, at: NonNull<u8>, len: usize, base: u64, flags: i32, kept: Kept) -> io::Result<Self> {
        // SAFETY: `len` bytes at the pointer are mapped, readable and writable, and stay so while `kept` lives (contract
        // of `Region::new`, or our own allocation); `kept` is dropped only after the registration is taken back.
        let raw = checked(unsafe { ibv_reg_mr_iova(pd.raw(), at.as_ptr().cast(), len, base, flags) })?;
        // SAFETY: a registration that was given out is initialised.
        let (lkey, rkey) = unsafe { (raw.as_ref().lkey, raw.as_ref().rkey) };
        let raw = AtomicPtr::new(raw.as_ptr());
        Ok(Self { raw, lkey, rkey, base, kept: Some(kept), _pd: pd.clone() })
    }

    /// Names the region here.
    pub fn lkey(&self) -> u32 {
        self.lkey
    }

    /// Names the region at the peer.
    pub fn rkey(&self) -> u32 {
        self.rkey
    }

    /// The device's address of its first byte, here and at the peer.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Whether `len` bytes at `offset` lie inside.
    pub fn contains(&self, offset: usize, len: usize) -> bool {
        let size = match &self.kept {
            Some(Kept::Region(region)) => region.len(),
            Some(Kept::Buffer(buffer)) => buffer.layout.size(),
            None => 0,
        };
        offset.checked_add(len).is_some_and(|end| end <= size)
    }

    /// The buffer, if it is one.
    pub fn buffer(&self) -> Option<&Buffer> {
        match &self.kept {
            Some(Kept::Buffer(buffer)) => Some(buffer),
            _ => None,
        }
    }

    /// Takes the memory back from the device, at once. What is still to be sent from it fails.
    pub fn revoke(&self) -> io::Result<()> {
        let raw = self.raw.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if raw.is_null() {
            return Ok(());
        }
        // SAFETY: the pointer was given out by registration and, by the swap, is given back exactly once.
        let result = check(unsafe { ibv_dereg_mr(raw) });
        if result.is_err() {
            self.raw.store(raw, Ordering::Release);
        }
        result
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        if let Err(error) = self.revoke() {
            // The device may still reach the memory: better to keep it for ever.
            tracing::warn!(%error, "a region cannot be taken back from the device; it is kept");
            std::mem::forget(self.kept.take());
        }
    }
}

/// Zeroed memory of our own that a device may read and write.
pub struct Buffer {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the allocation belongs to this value alone; access goes through the methods below.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads, of bytes that the device is not writing (see `bytes`).
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` bytes, at least one.
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), PAGE).expect("buffers are far smaller than memory");
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        let Some(pointer) = NonNull::new(pointer) else { handle_alloc_error(layout) };
        Self { pointer, layout }
    }

    fn contains(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.layout.size())
    }

    /// Copies in what is to be sent. The caller has seen to it that the device is not sending from there.
    ///
    /// # Panics
    ///
    /// If it does not fit.
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) {
        assert!(self.contains(offset, bytes.len()), "the ring gave out a place inside the buffer");
        // SAFETY: the range is inside the allocation; no reference into it lives, as `bytes()` is not used on buffers
        // for sending, and `bytes` (a Rust slice) cannot overlap memory that is only reached by this pointer.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.pointer.as_ptr().add(offset), bytes.len());
        }
    }

    /// What has been received.
    ///
    /// # Safety
    ///
    /// The device must not write to this range while the slice lives: its receive request has completed and has not
    /// been posted again.
    ///
    /// # Panics
    ///
    /// If it is not inside.
    pub unsafe fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        assert!(self.contains(offset, len), "a completion names a range of its own slot");
        // SAFETY: inside the allocation and initialised (zeroed, then written by the device); not written to while the
        // slice lives, by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr().add(offset), len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, freed once.
        unsafe { dealloc(self.pointer.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_holds_what_was_copied_in() {
        let buffer = Buffer::new(10_000);
        buffer.copy_in(9_990, b"0123456789");
        // SAFETY: no device knows this buffer.
        assert_eq!(unsafe { buffer.bytes(9_990, 10) }, b"0123456789");
        assert!(!buffer.contains(9_991, 10) && !buffer.contains(usize::MAX, 2));
        assert_eq!(buffer.pointer.as_ptr() as usize % PAGE, 0);
    }
}
