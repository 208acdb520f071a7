//! `splice` between a connection and a pipe: what the kernel does by moving pages is done by copying. No byte is taken from
//! where it comes from before it is where it goes.

use super::socket;
use super::table::Slot;
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::io::{Errno, IoSlice, IoSliceMut, ReadWriteFlags};
use rustix::net::{RecvFlags, SendFlags};
use rustix::pipe::{PipeFlags, SpliceFlags};

/// The most that one call moves; a pipe has no more room unless it was asked to.
const MOST: usize = 65536;

fn borrowed<'a>(fd: i32) -> BorrowedFd<'a> {
    // SAFETY: the application's descriptor, in a call on it.
    unsafe { BorrowedFd::borrow_raw(fd.max(0)) }
}

fn is_pipe(fd: i32) -> bool {
    let kind = rustix::fs::fstat(borrowed(fd)).map(|s| rustix::fs::FileType::from_raw_mode(s.st_mode));
    kind == Ok(rustix::fs::FileType::Fifo)
}

/// From a connection into a pipe.
///
/// # Errors
///
/// As `splice(2)`.
pub fn from_socket(fd: i32, slot: &'static Slot, pipe: i32, n: usize, wait: bool) -> Result<usize, Errno> {
    if !is_pipe(pipe) {
        return Err(Errno::INVAL);
    }
    let mut piece = [0; MOST];
    let n = n.min(MOST);
    // Whether the socket waits is its own mode to say; the flag is about the pipe.
    let got = socket::recv(fd, slot, &mut [IoSliceMut::new(&mut piece[..n])], RecvFlags::PEEK)?;
    if got == 0 {
        return Ok(0);
    }
    let put = put(pipe, &piece[..got], wait)?;
    socket::recv(fd, slot, &mut [IoSliceMut::new(&mut piece[..put])], RecvFlags::DONTWAIT)
}

/// Puts what there is room for into a pipe; waits for some room, if it is to.
fn put(pipe: i32, data: &[u8], wait: bool) -> Result<usize, Errno> {
    loop {
        let bufs = [IoSlice::new(data)];
        match rustix::io::pwritev2(borrowed(pipe), &bufs, u64::MAX, ReadWriteFlags::NOWAIT) {
            Err(Errno::AGAIN) if wait && !is_nonblocking(pipe) => {
                let mut one =
                    [rustix::event::PollFd::from_borrowed_fd(borrowed(pipe), rustix::event::PollFlags::OUT)];
                rustix::event::poll(&mut one, None)?;
            }
            Err(Errno::OPNOTSUPP) => return put_by(pipe, data, wait),
            other => return other,
        }
    }
}

/// The same where the kernel writes to no pipe without waiting: by way of a pipe of our own, as `splice` can be told not to wait.
fn put_by(pipe: i32, data: &[u8], wait: bool) -> Result<usize, Errno> {
    let (back, front) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    // It may have less room than it was asked to hold, where the user has many.
    rustix::fs::fcntl_setfl(&front, rustix::fs::OFlags::NONBLOCK)?;
    let held = rustix::io::write(&front, data)?;
    let flags = if wait { SpliceFlags::empty() } else { SpliceFlags::NONBLOCK };
    rustix::pipe::splice(&back, None, borrowed(pipe), None, held, flags)
}

fn is_nonblocking(fd: i32) -> bool {
    rustix::fs::fcntl_getfl(borrowed(fd)).is_ok_and(|flags| flags.contains(rustix::fs::OFlags::NONBLOCK))
}

/// From a pipe into a connection.
///
/// # Errors
///
/// As `splice(2)`.
pub fn to_socket(pipe: i32, fd: i32, slot: &'static Slot, n: usize, wait: bool) -> Result<usize, Errno> {
    let (back, front) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let flags = if wait { SpliceFlags::empty() } else { SpliceFlags::NONBLOCK };
    // A copy of what is in the pipe: how much the connection takes is known only afterwards.
    let copied = rustix::pipe::tee(borrowed(pipe), &front, n.min(MOST), flags)?;
    let mut piece = [0; MOST];
    let piece = &mut piece[..copied];
    fill(&back, piece)?;
    if copied == 0 {
        return Ok(0);
    }
    let sent = socket::send(fd, slot, &[IoSlice::new(piece)], SendFlags::empty())?;
    take(pipe, &mut piece[..sent]);
    Ok(sent)
}

fn fill(from: &OwnedFd, room: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < room.len() {
        match rustix::io::read(from, &mut room[done..])? {
            0 => break,
            n => done += n,
        }
    }
    Ok(())
}

/// Takes what was sent out of the pipe, where it still is.
fn take(pipe: i32, room: &mut [u8]) {
    let mut done = 0;
    while done < room.len() {
        match rustix::io::read(borrowed(pipe), &mut room[done..]) {
            Ok(n @ 1..) => done += n,
            Err(Errno::INTR) => {}
            Ok(0) | Err(_) => return,
        }
    }
}
