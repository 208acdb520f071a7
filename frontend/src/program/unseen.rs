//! Input and output that no hook sees: `io_uring`, whose calls are made in shared memory, and asynchronous I/O. What they are
//! to work on must be in the kernel's socket, all of it.
//!
//! A process that makes a ring keeps its connections on TCP from then on, as any of them may be given to the ring; those on a
//! lane go back. A ring that is made by `syscall(2)` is seen at once. liburing makes it by an instruction of its own: then it
//! is found among the descriptors, when the next connection has proved worth a lane. A descriptor that is given to AIO goes back
//! to TCP alone.

use super::socket;
use super::wait::clock;
use super::{client, exec, table};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vsocket_channel::reason::Reason;

/// What the kernel calls a ring's descriptor.
const RING: &[u8] = b"anon_inode:[io_uring]";
/// Descriptors are looked through no more often, in nanoseconds: a process may have many.
const OFTEN: u64 = 1_000_000_000;

/// The process has a ring, or had one.
static RINGS: AtomicBool = AtomicBool::new(false);
/// When it was last looked for.
static LOOKED: AtomicU64 = AtomicU64::new(0);

/// The process has made a ring, or is about to.
pub fn ring() {
    if !RINGS.swap(true, Ordering::AcqRel) {
        let all: Vec<i32> = table::all().map(|(fd, _)| fd).collect();
        let held: Vec<i32> = all.into_iter().filter(|fd| socket::held(*fd).is_some()).collect();
        socket::give(&held, Reason::IoUring);
    }
}

/// These descriptors are given to AIO.
pub fn submitted(fds: &[i32]) {
    socket::give(fds, Reason::Aio);
}

/// A connection has proved worth a lane: whether it is to stay on TCP, as the agent is told then.
pub fn keeps(fd: i32) {
    if client::is_confined() {
        // Nothing is opened from a sandbox, and it may forbid the look.
        return;
    }
    let now = clock();
    if !RINGS.load(Ordering::Relaxed) {
        let last = LOOKED.load(Ordering::Relaxed);
        if last != 0 && now.saturating_sub(last) < OFTEN {
            return;
        }
        LOOKED.store(now, Ordering::Relaxed);
        if !has_ring() {
            return;
        }
        ring();
    }
    exec::hand_over(&[fd], Reason::IoUring);
}

/// Whether this process has a ring's descriptor. One that was made a registered one only, or closed, is not found.
fn has_ring() -> bool {
    let names = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    names.map(|name| name.path()).any(|path| is_ring(&path))
}

fn is_ring(path: &Path) -> bool {
    std::fs::read_link(path).is_ok_and(|what| what.as_os_str().as_bytes() == RING)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_found_among_the_descriptors() {
        let mut parameters = [0u32; 30];
        // SAFETY: the structure has 120 bytes.
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
        if ring < 0 {
            eprintln!("skipped: the kernel makes no rings here");
            return;
        }
        // Other tests of this process make rings as well.
        assert!(has_ring());
        let (pipe, _writer) = std::io::pipe().unwrap();
        let path = |fd: i64| std::path::PathBuf::from(format!("/proc/self/fd/{fd}"));
        assert!(is_ring(&path(ring)));
        assert!(!is_ring(&path(std::os::fd::AsRawFd::as_raw_fd(&pipe).into())));
        // SAFETY: the descriptor is this function's.
        unsafe { libc::close(ring as i32) };
    }
}
