//! Memory that the host writes to: made, mapped, pinned, and never moved until it is dropped. All of the keeper's unsafe
//! code is here.
//!
//! A page that is only locked may still be moved by compaction, and the host would write where it was. So it is pinned,
//! by whichever of these the kernel grants:
//!
//! | how | what it needs |
//! |---|---|
//! | registered as a buffer of an io_uring | io_uring not disabled |
//! | registered as the memory of an AF_XDP socket | AF_XDP in the kernel, CAP_NET_RAW |
//! | locked huge pages, which compaction leaves alone | free huge pages |

use io_uring::IoUring;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vsocket_channel::layout::{Geometry, LAYOUT_VERSION, SLAB_MAGIC, SlabHeader};

/// The way that is tried first.
pub const FIRST_WAY: &str = "io_uring";
/// The kernel takes no longer piece as one buffer.
const LONGEST_BUFFER: usize = 1 << 30;

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Half of what is left must remain for others: touching more could kill them.
    #[error("a slab of {want} bytes is more than half of the {available} bytes that are available")]
    Scarce {
        /// Bytes of the slab.
        want: usize,
        /// Bytes that the kernel could give.
        available: usize,
    },
    /// The kernel does not give it.
    #[error("cannot make {0} bytes of memory")]
    Make(usize, #[source] io::Error),
    /// Nothing keeps it where it is.
    #[error("nothing pins memory here: {}", tried(.0))]
    Pin(Vec<(&'static str, io::Error)>),
}

fn tried(ways: &[(&'static str, io::Error)]) -> String {
    ways.iter().map(|(way, error)| format!("{way}: {error}")).collect::<Vec<_>>().join("; ")
}

/// What keeps the pages where they are.
enum Pin {
    Uring(Box<IoUring>),
    // Kept open: its end lets the pages go.
    Xdp { _socket: OwnedFd },
    Locked,
}

/// A slab's memory, pinned until it is dropped.
pub struct Pinned {
    pin: Option<Pin>,
    base: *mut u8,
    len: usize,
    fd: Arc<Vec<OwnedFd>>,
}

impl std::fmt::Debug for Pinned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pinned({} bytes, {})", self.len, self.how())
    }
}

impl Pinned {
    /// Memory of this size, with a slab's header in it, pinned.
    ///
    /// # Errors
    ///
    /// [`Error`]: nothing is left of it then.
    pub fn make(geometry: Geometry) -> Result<Self, Error> {
        let mut memory = Self::map(geometry.slab_len())?;
        memory.write_header(geometry);
        memory.pin = Some(pin(memory.base, memory.len, memory.len != geometry.slab_len())?);
        Ok(memory)
    }

    /// On huge pages if enough are free: fewer runs to tell. They are rounded up, and who maps them sees that by the
    /// file's block size.
    fn map(len: usize) -> Result<Self, Error> {
        let (free, huge) = super::pages::free_huge_pages();
        let rounded = len.next_multiple_of(huge.max(4096));
        if huge > 0 && free >= rounded / huge && rounded != len {
            if let Ok(memory) = Self::map_file(rounded, MemfdFlags::HUGETLB) {
                return Ok(memory);
            }
        }
        let available = super::pages::available();
        if len > available / 2 {
            return Err(Error::Scarce { want: len, available });
        }
        Self::map_file(len, MemfdFlags::empty()).map_err(|source| Error::Make(len, source))
    }

    fn map_file(len: usize, flags: MemfdFlags) -> io::Result<Self> {
        let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("vsocket-slab", flags)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new shared mapping at an address of the kernel's choice touches no existing memory; the file has
        // `len` bytes, and was just sealed against shrinking.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, rights, flags, &fd, 0) }?;
        Ok(Self { pin: None, base: base.cast(), len, fd: Arc::new(vec![fd]) })
    }

    fn write_header(&self, geometry: Geometry) {
        // SAFETY: the mapping is page-aligned and longer than the header; the type is `Shared`.
        let header: &SlabHeader = unsafe { &*self.base.cast() };
        header.magic.store(SLAB_MAGIC, Ordering::Relaxed);
        header.version.store(LAYOUT_VERSION, Ordering::Relaxed);
        header.segments.store(geometry.segments(), Ordering::Relaxed);
        header.ring_len.store(geometry.ring_len() as u64, Ordering::Relaxed);
    }

    /// The memfd, for those who map it too.
    pub fn fd(&self) -> Arc<Vec<OwnedFd>> {
        self.fd.clone()
    }

    /// Where it is in this process.
    pub fn address(&self) -> usize {
        self.base.addr()
    }

    /// What keeps it in its place.
    pub fn how(&self) -> &'static str {
        match self.pin {
            Some(Pin::Uring(_)) => FIRST_WAY,
            Some(Pin::Xdp { .. }) => "AF_XDP",
            Some(Pin::Locked) => "locked huge pages",
            None => "nothing",
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some(Pin::Uring(ring)) = &self.pin {
            // Closing the ring would do it some time later.
            let _ = ring.submitter().unregister_buffers();
        }
        self.pin = None;
        // SAFETY: made by `map_file` with this length; no reference into it outlives a call of this file.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

/// How memory can be pinned here, as tried on one page: the way, or what each one says.
pub fn probe() -> Result<&'static str, Error> {
    let mut page = Pinned::map_file(4096, MemfdFlags::empty()).map_err(|source| Error::Make(4096, source))?;
    page.pin = Some(pin(page.base, page.len, false)?);
    Ok(page.how())
}

/// Pins a mapping of a [`Pinned`], which lives longer than what this returns.
fn pin(base: *mut u8, len: usize, huge: bool) -> Result<Pin, Error> {
    let mut failed = Vec::new();
    match uring(base, len) {
        Ok(ring) => return Ok(Pin::Uring(Box::new(ring))),
        Err(error) => failed.push((FIRST_WAY, error)),
    }
    match xdp(base, len) {
        Ok(socket) => return Ok(Pin::Xdp { _socket: socket }),
        Err(error) => failed.push(("AF_XDP", error)),
    }
    if !huge {
        failed.push(("locked huge pages", io::Error::other("not enough are free (vm.nr_hugepages)")));
        return Err(Error::Pin(failed));
    }
    // SAFETY: the range is a mapping of this process; locking it changes nothing that anybody sees.
    match unsafe { rustix::mm::mlock(base.cast(), len) } {
        Ok(()) => Ok(Pin::Locked),
        Err(error) => {
            failed.push(("locked huge pages", error.into()));
            Err(Error::Pin(failed))
        }
    }
}

fn uring(base: *mut u8, len: usize) -> io::Result<IoUring> {
    let ring = IoUring::new(1)?;
    let pieces = (0..len).step_by(LONGEST_BUFFER).map(|at| libc::iovec {
        iov_base: base.wrapping_add(at).cast(),
        iov_len: LONGEST_BUFFER.min(len - at),
    });
    let pieces: Vec<libc::iovec> = pieces.collect();
    // SAFETY: the pieces are one live mapping, which is unmapped only after they were unregistered; no operation is ever
    // submitted on them.
    unsafe { ring.submitter().register_buffers(&pieces) }?;
    Ok(ring)
}

fn xdp(base: *mut u8, len: usize) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let family = AddressFamily::from_raw(libc::AF_XDP as libc::sa_family_t);
    let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    // SAFETY: a structure of integers, for which zero is valid.
    let mut umem: libc::xdp_umem_reg = unsafe { std::mem::zeroed() };
    (umem.addr, umem.len, umem.chunk_size) = (base.expose_provenance() as u64, len as u64, 4096);
    // SAFETY: the option takes this structure and reads it only in this call; the range that it names is a live mapping,
    // which is unmapped after the socket was closed, and no ring of the socket is ever made.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            libc::XDP_UMEM_REG,
            (&raw const umem).cast(),
            size_of_val(&umem) as libc::socklen_t,
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits until half of so many pages more have been pinned, or let go, in the whole machine: the kernel's count is not
    /// exact, and late.
    fn counted(which: &str, before: u64, pages: u64) {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while pins(which) < before + pages / 2 {
            assert!(std::time::Instant::now() < until, "not {which}");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Pages of the whole machine that were pinned so far, or let go.
    fn pins(which: &str) -> u64 {
        let text = std::fs::read_to_string("/proc/vmstat").unwrap();
        let name = format!("nr_foll_pin_{which} ");
        text.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap()
    }

    #[test]
    fn each_way_pins_and_lets_go() {
        let (bytes, count) = (8 << 20, 2048);
        let make = || Pinned::map_file(bytes, MemfdFlags::empty()).unwrap();
        let way = |memory: &Pinned, n| match n {
            0 => uring(memory.base, memory.len).map(|ring| Pin::Uring(Box::new(ring))),
            _ => xdp(memory.base, memory.len).map(|socket| Pin::Xdp { _socket: socket }),
        };
        for n in 0..2 {
            let mut memory = make();
            let before = (pins("acquired"), pins("released"));
            // What the kernel has not got cannot be seen.
            let Ok(pin) = way(&memory, n) else { continue };
            memory.pin = Some(pin);
            counted("acquired", before.0, count);
            drop(memory);
            counted("released", before.1, count);
        }
    }

    #[test]
    fn pinned_pages_stay_where_they_are_while_others_are_moved() {
        let numbers = |all: &[Pinned]| {
            let of = |memory: &Pinned| super::super::pages::numbers(memory.address(), memory.len);
            all.iter().map(of).collect::<Result<Vec<_>, _>>()
        };
        // Small pieces with gaps between them: plain ones, and pinned ones of each kind.
        let piece = |_| Pinned::map_file(256 << 10, MemfdFlags::empty()).unwrap();
        let mut all: Vec<Pinned> = (0..500).map(piece).collect();
        let mut keep = (0..).map(|n: u32| n.is_multiple_of(2));
        all.retain(|_| keep.next().unwrap_or(false));
        let mut pinned = all.split_off(all.len() / 2);
        for (n, memory) in pinned.iter_mut().enumerate() {
            let (base, len) = (memory.base, memory.len);
            let xdp = || xdp(base, len).map(|socket| Pin::Xdp { _socket: socket });
            let tried = if n % 2 == 0 { None } else { xdp().ok() };
            memory.pin = Some(tried.unwrap_or_else(|| pin(base, len, false).unwrap()));
        }
        // Who may not see where they are (CAP_SYS_ADMIN), or not have memory compacted, has nothing to compare.
        let (Ok(at), Ok(plain)) = (numbers(&pinned), numbers(&all)) else { return };
        for _ in 0..20 {
            if std::fs::write("/proc/sys/vm/compact_memory", "1").is_err() {
                return;
            }
            assert_eq!(numbers(&pinned).unwrap(), at);
            if numbers(&all).unwrap() != plain {
                return;
            }
        }
        eprintln!("nothing was moved, so this shows nothing");
    }

    #[test]
    fn a_slab_is_mapped_by_whoever_has_its_descriptor() {
        let geometry = Geometry::new(2, 8192).unwrap();
        let memory = Pinned::make(geometry).unwrap();
        let slab = crate::memory::Slab::map(&memory.fd()[0], 3, geometry).unwrap();
        assert_eq!(slab.id, 3);
        assert_ne!(memory.how(), "nothing");
    }
}
