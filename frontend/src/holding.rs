//! Which processes hold a socket, as `/proc` tells.

use rustix::fd::{AsFd, AsRawFd};
use std::fs;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

/// What the links of `/proc` call a descriptor of this process: `socket:[INODE]`.
pub fn name(fd: impl AsFd) -> Option<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).ok()
}

/// How many descriptors of a process are what is called so; `None` if they may not be looked at, or `goes_on` says no.
pub fn count(pid: u32, name: &Path, mut goes_on: impl FnMut() -> bool) -> Option<usize> {
    let gone = |error: Error| (error.kind() == ErrorKind::NotFound).then_some(0);
    let descriptors = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(descriptors) => descriptors,
        Err(error) => return gone(error),
    };
    let mut links = 0;
    for (at, one) in descriptors.enumerate() {
        if at % 64 == 0 && !goes_on() {
            return None;
        }
        // The list of a process that has ended meanwhile cannot be read on.
        let Ok(one) = one else { return fs::exists(format!("/proc/{pid}")).ok().filter(|is| !is).map(|_| 0) };
        match fs::read_link(one.path()) {
            Ok(link) => links += usize::from(link == name),
            // Closed meanwhile, or not to be looked at.
            Err(error) => links += gone(error)?,
        }
    }
    Some(links)
}
