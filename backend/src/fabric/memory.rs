//! Memory that other processes write while we read it: the fabric's only unsafe.
//!
//! A [`Region`] is never seen as a Rust slice. Its bytes move in two ways only: by the kernel, which is given raw
//! iovecs ([`send`], [`receive`]), and by raw copies to and from private memory. Every access is checked against the
//! region's length first, and the guard keeps the mapping in place for as long as any clone lives.

use std::any::Any;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// What keeps a mapping in place.
pub type Guard = Arc<dyn Any + Send + Sync>;

/// A range of memory, possibly shared with other processes, that stays mapped while a clone of this lives.
#[derive(Clone)]
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    _guard: Guard,
}

// SAFETY: the pointer is only used through the checked raw copies and iovecs below, from whichever thread owns the
// clone; the memory itself is plain bytes, and the guard is Send + Sync.
unsafe impl Send for Region {}

impl Region {
    /// Describes `len` bytes at `base`.
    ///
    /// # Safety
    ///
    /// - The bytes are mapped readable and writable, and stay so while `guard` or a clone of it lives.
    /// - Nothing in this process holds a Rust reference to them while the region lives, except to types made for
    ///   concurrent change (atomics, `UnsafeCell`).
    /// - The mapping cannot be cut short by others (sealed against shrinking, or anonymous).
    pub unsafe fn new(base: NonNull<u8>, len: usize, guard: Guard) -> Self {
        Self { base, len, _guard: guard }
    }

    /// A zeroed region of private memory, for tests and benches.
    pub fn private(len: usize) -> Self {
        let cells: Arc<Cells> = Arc::new(Cells((0..len.div_ceil(8)).map(|_| Default::default()).collect()));
        // An empty boxed slice gives a dangling, well-aligned, non-null pointer: right for a region of length 0.
        let base = NonNull::from(&*cells.0).cast::<u8>();
        // SAFETY: the cells are a heap allocation of at least `len` bytes that lives as long as the Arc and never
        // moves; they are atomics, so shared change is allowed, and nobody else can shorten them.
        unsafe { Self::new(base, len, cells) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the region has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `len` bytes at `offset` lie inside.
    pub fn contains(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Where the region begins, for registration with a device. Dereferencing it is up to the region's own methods.
    #[cfg(feature = "verbs")]
    pub(super) fn pointer(&self) -> NonNull<u8> {
        self.base
    }

    /// Copies private bytes in. False, and nothing copied, if they do not fit.
    #[must_use]
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) -> bool {
        if !self.contains(offset, bytes.len()) {
            return false;
        }
        // SAFETY: the range is inside the mapping (just checked; `new`'s contract keeps it mapped), and `bytes` is
        // private memory, so the two cannot overlap.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(offset), bytes.len()) };
        true
    }

    /// Copies bytes out to private memory. False, and nothing copied, if the range is not inside.
    #[must_use]
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) -> bool {
        if !self.contains(offset, bytes.len()) {
            return false;
        }
        // SAFETY: as in `copy_in`, the other way. What is read may be torn by a concurrent writer; it is bytes only,
        // of which every value is valid.
        unsafe { ptr::copy_nonoverlapping(self.base.as_ptr().add(offset), bytes.as_mut_ptr(), bytes.len()) };
        true
    }

    /// Copies between regions. False, and nothing copied, if either range is not inside.
    #[must_use]
    pub fn copy_to(&self, offset: usize, target: &Region, target_offset: usize, len: usize) -> bool {
        if !self.contains(offset, len) || !target.contains(target_offset, len) {
            return false;
        }
        // SAFETY: both ranges are inside mappings kept by their guards; `copy` allows them to overlap.
        unsafe { ptr::copy(self.base.as_ptr().add(offset), target.base.as_ptr().add(target_offset), len) };
        true
    }

    fn iovec(&self, offset: usize, len: usize) -> Option<libc::iovec> {
        self.contains(offset, len)
            .then(|| libc::iovec { iov_base: self.base.as_ptr().wrapping_add(offset).cast(), iov_len: len })
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("len", &self.len).finish_non_exhaustive()
    }
}

/// The storage of [`Region::private`]: atomics, so that a shared reference does not promise constancy.
struct Cells(Box<[std::sync::atomic::AtomicU64]>);

/// The most pieces one [`send`] takes.
pub const MAX_PIECES: usize = 128;

/// Pieces for one gathering send, each valid while `'a` lasts.
pub struct Pieces<'a> {
    iovecs: [libc::iovec; MAX_PIECES],
    count: usize,
    bytes: usize,
    _borrow: PhantomData<&'a [u8]>,
}

impl<'a> Pieces<'a> {
    /// None yet.
    pub fn new() -> Self {
        let none = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        Self { iovecs: [none; MAX_PIECES], count: 0, bytes: 0, _borrow: PhantomData }
    }

    /// Adds private bytes; false if there is no room.
    pub fn push(&mut self, bytes: &'a [u8]) -> bool {
        self.add(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() })
    }

    /// Adds a region's bytes; false if there is no room or the range is not inside.
    pub fn push_region(&mut self, region: &'a Region, offset: usize, len: usize) -> bool {
        region.iovec(offset, len).is_some_and(|iovec| self.add(iovec))
    }

    /// The sum of the pieces' lengths.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether another piece fits.
    pub fn has_room(&self) -> bool {
        self.count < MAX_PIECES
    }

    fn add(&mut self, iovec: libc::iovec) -> bool {
        let Some(slot) = self.iovecs.get_mut(self.count) else { return false };
        *slot = iovec;
        self.count += 1;
        self.bytes += iovec.iov_len;
        true
    }
}

impl Default for Pieces<'_> {
    fn default() -> Self {
        Self::new()
    }
}

/// Sends all pieces in one system call, or as much as the socket takes. Never raises SIGPIPE.
pub fn send(socket: BorrowedFd<'_>, pieces: &Pieces<'_>) -> io::Result<usize> {
    let mut message = empty_message();
    message.msg_iov = pieces.iovecs.as_ptr().cast_mut();
    message.msg_iovlen = pieces.count as _;
    // SAFETY: the first `count` iovecs describe memory that is readable for `'a` (slices by their borrow, regions by
    // their guard and bounds check), and sendmsg only reads them.
    let sent =
        unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives into `len` bytes of the region at `offset`, and what is left into `staging`, in one system call.
pub fn receive(
    socket: BorrowedFd<'_>,
    region: &Region,
    offset: usize,
    len: usize,
    staging: &mut [u8],
) -> io::Result<usize> {
    let Some(first) = region.iovec(offset, len) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let second = libc::iovec { iov_base: staging.as_mut_ptr().cast(), iov_len: staging.len() };
    let mut iovecs = [first, second];
    let mut message = empty_message();
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len() as _;
    // SAFETY: the first iovec is inside a mapping that its guard keeps writable (checked by `iovec`), the second is an
    // exclusive borrow; recvmsg writes nothing else.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

fn empty_message() -> libc::msghdr {
    // SAFETY: msghdr is plain integers and pointers, for which all-zero bytes are valid and mean "absent".
    unsafe { std::mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn copies_stay_inside() {
        let region = Region::private(10);
        assert!(region.copy_in(6, b"abcd"));
        assert!(!region.copy_in(7, b"abcd"));
        assert!(!region.copy_in(usize::MAX, b"ab"));
        let mut out = [0; 5];
        assert!(region.copy_out(5, &mut out));
        assert_eq!(&out, b"\0abcd");
        assert!(!region.copy_out(6, &mut out));
        assert!(region.copy_to(6, &region, 5, 4));
        assert!(!region.copy_to(6, &region, 7, 4));
    }

    #[test]
    fn empty_region_has_only_its_origin() {
        let region = Region::private(0);
        assert!(region.is_empty() && region.copy_in(0, b"") && !region.copy_in(0, b"a"));
    }

    #[test]
    fn pieces_are_gathered_in_order() {
        let (a, mut b) = UnixStream::pair().unwrap();
        let region = Region::private(8);
        assert!(region.copy_in(0, b"01234567"));
        let mut pieces = Pieces::new();
        assert!(pieces.push(b"<") && pieces.push_region(&region, 2, 3) && pieces.push(b">"));
        assert!(!pieces.push_region(&region, 6, 3), "outside");
        assert_eq!(send(a.as_fd(), &pieces).unwrap(), 5);
        let mut got = [0; 5];
        b.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"<234>");
    }

    #[test]
    fn receive_fills_region_then_staging() {
        let (a, mut b) = UnixStream::pair().unwrap();
        b.write_all(b"abcdef").unwrap();
        let region = Region::private(4);
        let mut staging = [0; 8];
        assert_eq!(receive(a.as_fd(), &region, 1, 3, &mut staging).unwrap(), 6);
        let mut got = [0; 4];
        assert!(region.copy_out(0, &mut got));
        assert_eq!((&got, &staging[..3]), (b"\0abc", b"def".as_slice()));
        assert!(receive(a.as_fd(), &region, 2, 3, &mut staging).is_err(), "outside");
    }
}
