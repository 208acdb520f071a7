//! Connections that come from another process: with a message (`SCM_RIGHTS`), or by the execution of this program. Whoever had
//! one has brought it back to kernel TCP, with everything that is unread. It is counted from here on as one of our own, and comes
//! to a lane when the agent sees that nobody else holds it any more ([`HeldByOthers`]): what it had moved before, the kernel
//! tells then.
//!
//! The standard streams are left alone: the C library reads and writes those by itself, where nobody sees it. So is everything if
//! a set of `epoll` has come as well, which may watch what is found, and knows only the kernel's socket.
//!
//! [`HeldByOthers`]: vsocket_channel::reason::Reason::HeldByOthers

use super::socket::{self, before_close, duplicated, is_followed};
use super::{client, table};
use crate::kernel;
use rustix::fd::BorrowedFd;
use rustix::fs::FileType;
use std::sync::atomic::{AtomicBool, Ordering};
use vsocket_channel::reason::Reason;

/// The first number that is no standard stream's.
const FIRST: i32 = 3;
/// Programs are executed with few descriptors, and those stand first.
const LAST: i32 = 256;

/// A set of another process has come.
static STRANGE_SET: AtomicBool = AtomicBool::new(false);

/// When the library is loaded: what the program has inherited. It asks for the kinds of descriptors, as the loader does, and for more
/// only if there is a socket: the program may have been executed in a sandbox.
pub fn at_load() {
    let sockets: Vec<i32> = (FIRST..LAST).filter(|fd| look(*fd) == Some(FileType::Socket)).collect();
    if sockets.is_empty() {
        return;
    }
    let names = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers = names.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    numbers.filter(|fd| *fd >= LAST).for_each(|fd| {
        look(fd);
    });
    sockets.iter().for_each(|fd| follow(*fd));
}

/// A descriptor came with a message: if it is a connection that this process has, it is one more number for it.
pub fn passed(fd: i32) {
    if is_followed(fd) {
        // The number was closed behind our back.
        before_close(fd);
    }
    // SAFETY: the application's descriptor, which it has just received.
    let cookie = |fd| rustix::net::sockopt::socket_cookie(unsafe { BorrowedFd::borrow_raw(fd) }).ok();
    if !table::has_followed() && client::is_confined() {
        return;
    }
    let Some(wanted) = cookie(fd) else {
        look(fd);
        return;
    };
    let held = table::all().filter(|(_, slot)| !slot.conn_ptr().is_null());
    let old = held.map(|(old, _)| old).find(|old| *old != fd && cookie(*old) == Some(wanted));
    match old {
        Some(old) => duplicated(old, fd),
        None => follow(fd),
    }
}

/// What a descriptor is, if it is one. A set of `epoll` ends the following of what was found.
fn look(fd: i32) -> Option<FileType> {
    // SAFETY: only asked about; a number that is not open gives EBADF.
    let what = rustix::fs::fstat(unsafe { BorrowedFd::borrow_raw(fd) }).ok()?;
    let kind = FileType::from_raw_mode(what.st_mode);
    // Files that are only the kernel's have no type.
    if kind == FileType::Unknown && !client::is_confined() {
        let name = std::fs::read_link(format!("/proc/self/fd/{fd}"));
        if name.is_ok_and(|name| name.as_os_str() == "anon_inode:[eventpoll]") {
            STRANGE_SET.store(true, Ordering::Relaxed);
            let found: Vec<i32> =
                table::all().filter(|(_, slot)| slot.is_found()).map(|(fd, _)| fd).collect();
            socket::give(&found, Reason::Passed);
        }
    }
    Some(kind)
}

/// Begins to follow a descriptor, if it is a connection of TCP whose counters tell what has become of it.
fn follow(fd: i32) {
    // A sandbox may kill whoever asks more.
    if STRANGE_SET.load(Ordering::Relaxed) || client::is_confined() {
        return;
    }
    // SAFETY: a descriptor that this process has just got; of another that has come in its place the same is asked.
    let socket = unsafe { BorrowedFd::borrow_raw(fd) };
    let is_connection = kernel::tuple(socket).is_ok() && kernel::is_as_new(socket);
    let Some(slot) = table::slot(fd).filter(|_| is_connection) else { return };
    if let Ok(Some(connector)) = kernel::is_connector(socket) {
        slot.follow_found(connector);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn a_connection_is_followed_from_where_it_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        near.write_all(&[1; 100]).unwrap();
        far.read_exact(&mut [0; 60]).unwrap();
        for (fd, connector) in [(near.as_raw_fd(), true), (far.as_raw_fd(), false)] {
            passed(fd);
            let slot = table::followed(fd).unwrap();
            assert!(slot.is_found() && slot.connector() == connector);
            assert_eq!((slot.moved(), slot.shown()), ((0, 0), 0), "it is to show its worth here");
            let _ = slot.forget();
        }
        passed(listener.as_raw_fd());
        assert!(!is_followed(listener.as_raw_fd()), "no connection");
        let (end, _) = std::os::unix::net::UnixStream::pair().unwrap();
        passed(end.as_raw_fd());
        assert!(!is_followed(end.as_raw_fd()), "none of TCP");
    }
}
