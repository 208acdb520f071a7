//! Our own descriptors stand at high numbers: the low ones are the application's.
//!
//! A process's descriptor table grows when a number beyond it is used, and where several threads share it the kernel then
//! waits for all processors (an RCU grace period, 15 to 60 ms) while the calling thread stands still. So it is made
//! large enough once, at the library's load, when there is one thread.

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::io::fcntl_dupfd_cloexec;

/// The first of our numbers. Below the usual soft limit of 1024, which some programs take for the last.
const FIRST: i32 = 900;

/// The same descriptor under a number of ours, if there is one.
pub fn lift(fd: OwnedFd) -> OwnedFd {
    fcntl_dupfd_cloexec(&fd, FIRST).unwrap_or(fd)
}

/// A duplicate under a number of ours.
pub fn twin(fd: BorrowedFd<'_>) -> Option<OwnedFd> {
    fcntl_dupfd_cloexec(fd, FIRST).ok()
}

/// Makes the table large enough for our numbers.
pub fn reserve() {
    if let Ok(fd) = eventfd(0, EventfdFlags::CLOEXEC) {
        // Both are closed at once; the table stays.
        drop(lift(fd));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_stays_large() {
        let size = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
            line.trim().parse::<i32>().unwrap()
        };
        reserve();
        assert!(size() > FIRST);
    }
}
