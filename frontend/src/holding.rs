//! Which processes hold a socket, as `/proc` tells.

use rustix::fd::{AsFd, AsRawFd};
use std::fs;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

/// What the links of `/proc` call a descriptor of this process: `socket:[INODE]`.
pub fn name(fd: impl AsFd) -> Option<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).ok()
}

/// Whether a process has what is called so; `None` if it may not be looked at.
pub fn holds(pid: u32, name: &Path) -> Option<bool> {
    let gone = |error: Error| (error.kind() == ErrorKind::NotFound).then_some(false);
    let descriptors = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(descriptors) => descriptors,
        Err(error) => return gone(error),
    };
    for one in descriptors {
        // The list of a process that has ended meanwhile cannot be read on.
        let Ok(one) = one else { return fs::exists(format!("/proc/{pid}")).ok().filter(|is| !is) };
        match fs::read_link(one.path()) {
            Ok(link) if link == name => return Some(true),
            Ok(_) => {}
            // Closed meanwhile, or not to be looked at.
            Err(error) => {
                gone(error)?;
            }
        }
    }
    Some(false)
}
