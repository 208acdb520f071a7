//! Calls on one descriptor: sending, receiving, closing, duplicating.

use super::Outcome;
use super::cancel;
use super::client;
use super::conn::ConnRef;
use super::epoll;
use super::exec;
use super::poll::{self, Want};
use super::table::{self, Slot};
use super::unseen;
use super::wait;
use crate::kernel;
use crate::record::status;
use rustix::fd::BorrowedFd;
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{RecvFlags, SendFlags};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vsocket_channel::reason::Reason;

/// Sent or received, in the slot's counting.
const SENT: u8 = 1;
const RECEIVED: u8 = 2;

/// A call that is inside the kernel on a counted descriptor, by the hook's own real call.
pub struct Inside(&'static Slot, i32, u8);

impl Inside {
    /// Where it is counted.
    pub fn slot(&self) -> &'static Slot {
        self.0
    }

    /// Nobody can cancel this thread.
    pub fn is_alone(&self) -> bool {
        kernel::single_threaded()
    }

    /// The real call has returned.
    pub fn returned(self, n: isize) {
        let Self(slot, fd, direction) = self;
        slot.count(direction, n.max(0) as u64);
        slot.leave();
        // Not after an error: errno is the application's.
        if n > 0 && client::worth_it(slot) {
            unseen::keeps(fd);
            if slot.want() {
                client::open(fd, slot);
            }
        }
    }
}

/// How a data call is to be served.
pub enum Route {
    /// Make the real call.
    Kernel,
    /// Make the real call, and say what it returned.
    Counted(Inside),
    /// Serve it.
    Served(&'static Slot),
}

fn route(fd: i32, direction: u8) -> Route {
    let Some(slot) = table::followed(fd) else { return Route::Kernel };
    if slot.phase.load(Ordering::Acquire) == table::COUNTED && slot.enter() {
        return Route::Counted(Inside(slot, fd, direction));
    }
    Route::Served(slot)
}

/// How a receiving call with these flags is to be served.
///
/// # Errors
///
/// `INTR` if a signal came while it waited to begin.
pub fn receiving(fd: i32, flags: RecvFlags) -> Result<Route, Errno> {
    let at_once = RecvFlags::DONTWAIT | RecvFlags::ERRQUEUE | RecvFlags::OOB;
    if !flags.intersects(at_once)
        && let Some(slot) = table::followed(fd)
    {
        wait_outside(fd, slot)?;
    }
    Ok(route(fd, RECEIVED))
}

/// A thread that waits in the kernel's recv would keep the connection from being opened, for as long as others send on it:
/// so it waits for readability first, where it can be woken. One system call more, on counted connections only.
fn wait_outside(fd: i32, slot: &'static Slot) -> Result<(), Errno> {
    let counted = || slot.phase.load(Ordering::Acquire) == table::COUNTED;
    if !counted() || kernel::single_threaded() || slot.nonblocking(fd) {
        return Ok(());
    }
    if timeout(fd, rustix::net::sockopt::Timeout::Recv).is_some() {
        return Ok(());
    }
    while counted() {
        match poll::wait_one(fd, slot, Want::Read, None) {
            Ok(true) => return Ok(()),
            Err(cancel::CANCELLED) => return Err(cancel::CANCELLED),
            Err(Errno::INTR) if !kernel::calls_are_restarted() => return Err(Errno::INTR),
            _ => {}
        }
    }
    Ok(())
}

/// How a sending call is to be served.
pub fn sending(fd: i32) -> Route {
    route(fd, SENT)
}

/// How `splice` from a descriptor is to be served.
pub fn splicing(fd: i32) -> Route {
    route(fd, RECEIVED)
}

/// Whether the descriptor has a connection object: then special calls must be served or refused, not passed on.
pub fn held(fd: i32) -> Option<ConnRef> {
    table::followed(fd)?.conn()
}

/// Whether the descriptor is followed at all.
#[inline]
pub fn is_followed(fd: i32) -> bool {
    table::may_follow(fd) && table::followed(fd).is_some()
}

/// Whether its close is of interest: a followed descriptor's, or a set's.
#[inline]
pub fn concerns_close(fd: i32) -> bool {
    let set = |slot: &Slot| !slot.epoll.load(Ordering::Relaxed).is_null();
    table::slot(fd).is_some_and(|slot| slot.phase.load(Ordering::Relaxed) != table::NONE || set(slot))
}

/// A call moves bytes that cannot be counted: a descriptor without a connection object is not followed any more.
pub fn leave_alone(fd: i32) {
    // One whose answer is outstanding is not taken when it comes.
    if let Some(slot) = table::followed(fd).filter(|s| s.phase.load(Ordering::Relaxed) < table::HELD) {
        slot.leave_alone();
    }
}

fn timeout(fd: i32, which: rustix::net::sockopt::Timeout) -> Option<Instant> {
    // SAFETY: the application's descriptor, in a call on it.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let limit: Option<Duration> = rustix::net::sockopt::socket_timeout(fd, which).ok().flatten();
    limit.map(|t| Instant::now() + t)
}

/// A call that may have to wait, told by `once` what can be done now.
fn waiting(
    fd: i32,
    slot: &'static Slot,
    want: Want,
    nonblocking: bool,
    mut once: impl FnMut(bool) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    client::check_mail();
    if matches!(slot.phase.load(Ordering::Relaxed), table::WANTED | table::OPENING) {
        client::open(fd, slot);
    }
    let mut look = false;
    let mut deadline = None;
    loop {
        match once(look) {
            Err(Errno::AGAIN) if !nonblocking && !slot.nonblocking(fd) => {
                if deadline.is_none() {
                    let which = match want {
                        Want::Read => rustix::net::sockopt::Timeout::Recv,
                        Want::Write => rustix::net::sockopt::Timeout::Send,
                    };
                    deadline = Some(timeout(fd, which));
                }
                look = match poll::wait_one(fd, slot, want, deadline.flatten()) {
                    Err(Errno::INTR) if deadline.flatten().is_none() && kernel::calls_are_restarted() => true,
                    other => other?,
                };
            }
            other => return other,
        }
    }
}

/// One attempt on a descriptor without a connection object, without waiting.
fn raw<T>(slot: &Slot, direction: u8, call: impl FnOnce() -> Result<usize, T>) -> Option<Result<usize, T>> {
    if !slot.enter() {
        return None;
    }
    let got = call();
    if let Ok(n) = &got {
        slot.count(direction, *n as u64);
    }
    slot.leave();
    Some(got)
}

/// Sends as `send(2)` does. Nothing of `bufs` is kept.
pub fn send(fd: i32, slot: &'static Slot, bufs: &[IoSlice<'_>], flags: SendFlags) -> Result<usize, Errno> {
    let total: usize = bufs.iter().map(|b| b.len()).sum();
    if flags.contains(SendFlags::from_bits_retain(libc::MSG_ZEROCOPY as u32)) && completes(fd) {
        // The program waits for the kernel's word that its buffer is free: it is told to send without.
        return Err(Errno::NOBUFS);
    }
    let nonblocking = flags.contains(SendFlags::DONTWAIT);
    let urgent = flags.contains(SendFlags::OOB);
    let mut done = 0;
    loop {
        let rest;
        let piece = if done == 0 {
            bufs
        } else {
            rest = Rest::after(bufs, done);
            rest.as_slice()
        };
        let sent = waiting(fd, slot, Want::Write, nonblocking, |_| {
            loop {
                if let Some(conn) = slot.conn() {
                    if urgent {
                        // Only TCP has urgent bytes; its counters then differ from ours, and it stays there.
                        conn.endpoint().stay_on_anchor()?;
                    }
                    let got = conn.stirring(|| conn.endpoint().send(piece, flags));
                    if got == Err(Errno::AGAIN) || got.is_ok_and(|n| n < total - done) {
                        blocked(&conn);
                    }
                    client::tell_sent(&conn, got.unwrap_or(0));
                    return got;
                }
                // SAFETY: the application's descriptor, in a call on it.
                let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
                if done > 0 && poll::has_failed(anchor) {
                    // The next call is told why; this one has sent something.
                    return Err(Errno::PIPE);
                }
                let call = || {
                    let mut control = rustix::net::SendAncillaryBuffer::default();
                    let flags = flags | SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                    rustix::net::sendmsg(anchor, piece, &mut control, flags)
                };
                if let Some(got) = raw(slot, SENT, call) {
                    return got;
                }
            }
        });
        match sent {
            Ok(n) => done += n,
            Err(error) if done > 0 => {
                later(slot, error);
                return Ok(done);
            }
            Err(error) => return Err(error),
        }
        // A blocking send returns when all is taken; a non-blocking one with what was.
        if done >= total || nonblocking || slot.nonblocking(fd) {
            return Ok(done);
        }
    }
}

/// A call has moved bytes, which is what it reports: why it moved no more, the next one is told.
fn later(slot: &Slot, error: Errno) {
    let Some(conn) = slot.conn() else { return };
    if matches!(error, Errno::CONNRESET | Errno::TIMEDOUT) {
        // The kernel has told it, and will not again.
        conn.endpoint().broken(error);
    }
    conn.endpoint().tell_later();
}

/// Whether the kernel is to report sends without copying (`SO_ZEROCOPY`).
fn completes(fd: i32) -> bool {
    // SAFETY: the application's descriptor, in a call on it.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    kernel::reports_completions(fd)
}

/// A send took less than it was given: from now on room is a new edge.
fn blocked(conn: &ConnRef) {
    conn.blocked.fetch_add(1, Ordering::Relaxed);
    conn.stir();
    // Another thread may sleep in a set, upon room that it was told of before this. Either the far end is asked to ring
    // when there is room again, or there is.
    if conn.has_members() && !kernel::single_threaded() && conn.endpoint().writable() == Some(true) {
        wait::kick();
    }
}

/// What is left of a gather list, without allocation for short ones.
struct Rest<'a> {
    few: [IoSlice<'a>; 8],
    many: Vec<IoSlice<'a>>,
    len: usize,
}

impl<'a> Rest<'a> {
    fn after(bufs: &'a [IoSlice<'a>], mut skip: usize) -> Self {
        let mut rest = Self { few: [IoSlice::new(&[]); 8], many: Vec::new(), len: 0 };
        for buf in bufs {
            let from = skip.min(buf.len());
            skip -= from;
            if from < buf.len() {
                rest.push(&buf[from..]);
            }
        }
        rest
    }

    fn push(&mut self, piece: &'a [u8]) {
        if self.many.is_empty() && self.len < self.few.len() {
            self.few[self.len] = IoSlice::new(piece);
        } else {
            if self.many.is_empty() {
                self.many.extend_from_slice(&self.few);
            }
            self.many.push(IoSlice::new(piece));
        }
        self.len += 1;
    }

    fn as_slice(&self) -> &[IoSlice<'a>] {
        if self.many.is_empty() { &self.few[..self.len] } else { &self.many }
    }
}

/// Receives as `recv(2)` does.
pub fn recv(
    fd: i32,
    slot: &'static Slot,
    bufs: &mut [IoSliceMut<'_>],
    flags: RecvFlags,
) -> Result<usize, Errno> {
    let total: usize = bufs.iter().map(|b| b.len()).sum();
    if flags.contains(RecvFlags::TRUNC) {
        // TCP takes the bytes, and gives them to nobody.
        let mut nowhere = vec![0; total.min(1 << 20)];
        return recv(fd, slot, &mut [IoSliceMut::new(&mut nowhere)], flags - RecvFlags::TRUNC);
    }
    let nonblocking = flags.contains(RecvFlags::DONTWAIT) || slot.nonblocking(fd);
    let peek = flags.contains(RecvFlags::PEEK);
    let target = match (nonblocking, flags.contains(RecvFlags::WAITALL)) {
        (true, _) => 0,
        (_, true) => total,
        _ => slot.least().min(total),
    };
    let mut done = match recv_some(fd, slot, bufs, flags, (nonblocking, peek)) {
        // Who asks for nothing waits, and has it, whatever ended the wait.
        Err(Errno::AGAIN | Errno::INTR) if total == 0 && !nonblocking => 0,
        other => other?,
    };
    if peek && done > 0 && done < target {
        return peek_all(fd, slot, bufs, flags, target);
    }
    while done > 0 && done < target && !is_over(fd, slot) {
        match recv_some(fd, slot, &mut after_mut(bufs, done), flags, (nonblocking, peek)) {
            Ok(n) if n > 0 => done += n,
            Ok(_) => break,
            Err(error) => {
                later(slot, error);
                break;
            }
        }
    }
    Ok(done)
}

/// Whether nothing more comes to a descriptor without a connection object: the kernel's word why is the next call's.
fn is_over(fd: i32, slot: &Slot) -> bool {
    // SAFETY: the application's descriptor, in a call on it.
    let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
    slot.conn().is_none() && poll::has_failed(anchor) && kernel::unread(anchor).is_ok_and(|n| n == 0)
}

/// Peeks until so much is there, or no more will come. What is there already is no event to wait for, so it is looked
/// at again after moments; nobody waits so on a path that matters.
fn peek_all(
    fd: i32,
    slot: &'static Slot,
    bufs: &mut [IoSliceMut<'_>],
    flags: RecvFlags,
    target: usize,
) -> Result<usize, Errno> {
    let end = timeout(fd, rustix::net::sockopt::Timeout::Recv);
    loop {
        let done = recv_some(fd, slot, bufs, flags, (true, true))?;
        if done >= target || done == 0 || end.is_some_and(|end| end <= Instant::now()) {
            return Ok(done);
        }
        let shut = || slot.conn().is_some_and(|conn| conn.record().is(status::RX_SHUT | status::BROKEN));
        if shut() || poll::ends_within(fd, Duration::from_millis(1)) {
            return recv_some(fd, slot, bufs, flags, (true, true));
        }
    }
}

fn recv_some(
    fd: i32,
    slot: &'static Slot,
    bufs: &mut [IoSliceMut<'_>],
    flags: RecvFlags,
    (nonblocking, peek): (bool, bool),
) -> Result<usize, Errno> {
    waiting(fd, slot, Want::Read, nonblocking, |look| {
        loop {
            if let Some(conn) = slot.conn() {
                let quick = nonblocking || slot.nonblocking(fd);
                return recv_conn(&conn, bufs, peek, look, quick);
            }
            // SAFETY: the application's descriptor, in a call on it.
            let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
            let call = || {
                let mut control = rustix::net::RecvAncillaryBuffer::default();
                let flags = (flags - RecvFlags::WAITALL) | RecvFlags::DONTWAIT;
                rustix::net::recvmsg(anchor, bufs, &mut control, flags).map(|m| m.bytes)
            };
            if let Some(got) = raw(slot, if peek { 0 } else { RECEIVED }, call) {
                return got;
            }
        }
    })
}

fn after_mut<'a>(bufs: &'a mut [IoSliceMut<'_>], mut skip: usize) -> Vec<IoSliceMut<'a>> {
    let mut rest = Vec::with_capacity(bufs.len());
    for buf in bufs {
        let from = skip.min(buf.len());
        skip -= from;
        rest.push(IoSliceMut::new(&mut buf[from..]));
    }
    rest
}

fn recv_conn(
    conn: &ConnRef,
    bufs: &mut [IoSliceMut<'_>],
    peek: bool,
    look: bool,
    quick: bool,
) -> Result<usize, Errno> {
    // Cleared before the read: an edge that comes meanwhile stays.
    let edge = conn.kernel_in.load(Ordering::Relaxed) != 0 && conn.kernel_in.swap(0, Ordering::AcqRel) != 0;
    // Where another process may have had the edge.
    let look = look || edge || wait::is_shared() && conn.looks_now();
    let on_ring = conn.record().is(status::TX_RING);
    let mut got = conn.stirring(|| conn.endpoint().recv(bufs, peek, look));
    if got == Err(Errno::AGAIN) && quick && !look && on_lane(conn) && conn.looks_now() {
        got = conn.stirring(|| conn.endpoint().recv(bufs, peek, true));
    }
    if got == Err(Errno::AGAIN) {
        conn.empty.fetch_add(1, Ordering::Release);
    }
    wait::kick_if_left(conn, on_ring);
    // On the ring an edge stays until the ring is empty and the anchor was looked at; off it, more may be there.
    if got != Err(Errno::AGAIN) && (edge || !conn.record().is(status::RX_RING)) {
        conn.kernel_in.store(1, Ordering::Release);
        conn.stir();
    }
    client::tell_left(conn);
    got
}

fn on_lane(conn: &ConnRef) -> bool {
    conn.record().is(status::RX_RING)
}

/// `close(2)` was called: forgets the number before the kernel does. What the connection still owes is the agent's.
pub fn before_close(fd: i32) {
    let Some(slot) = table::slot(fd) else { return };
    if !slot.epoll.load(Ordering::Relaxed).is_null() {
        epoll::closed_set(fd);
    }
    if slot.phase.load(Ordering::Relaxed) == table::NONE {
        return;
    }
    if super::fork::is_foreign() {
        return;
    }
    match slot.conn() {
        Some(conn) if conn.names.load(Ordering::Acquire) > 1 => epoll::keep(fd, &conn),
        Some(conn) => {
            epoll::forget_fd(fd);
            epoll::forget_kept(&conn);
        }
        None => {
            // The agent may have a duplicate.
            let opening = slot.phase.load(Ordering::Relaxed) == table::OPENING;
            epoll::forget_plain(fd, opening);
        }
    }
    let Some(conn) = slot.forget() else { return };
    if conn.names.fetch_sub(1, Ordering::AcqRel) > 1 {
        // Another number names the connection: it must not hold on to this one.
        if conn.fd.load(Ordering::Relaxed) == fd {
            let other = table::all().find(|(n, s)| *n != fd && std::ptr::eq(s.conn_ptr(), &raw const *conn));
            if let Some((other, _)) = other {
                conn.fd.store(other, Ordering::Release);
            }
        }
        return;
    }
    if !client::closed(&conn) {
        finish_alone(&conn);
        client::released(&conn);
    }
}

/// No agent is there to finish: what can be delivered in a moment is.
fn finish_alone(conn: &ConnRef) {
    if conn.endpoint().is_plain() {
        // Nobody has a duplicate: the kernel ends it as it would end any.
        return;
    }
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(500) {
        match conn.endpoint().shut() {
            Ok(false) => poll::wait_writable(conn.anchor(), 10),
            _ => return,
        }
    }
    conn.endpoint().break_off();
}

/// A descriptor was duplicated: the new number names the same connection.
pub fn duplicated(old: i32, new: i32) {
    if super::fork::is_foreign() {
        // The table is the parent's, the descriptors are not.
        return;
    }
    let (Some(from), Some(to)) = (table::followed(old), table::slot(new)) else { return };
    match from.conn() {
        Some(conn) => {
            conn.names.fetch_add(1, Ordering::AcqRel);
            to.hold(conn);
        }
        // Counted under one number only: two would see half each. It stays on TCP.
        None => from.leave_alone(),
    }
}

/// Others are to find all of these connections in the kernel's sockets: they go back to TCP, for good, with what was not
/// received. This process goes on there as well.
pub fn give(fds: &[i32], reason: Reason) {
    if client::is_confined() {
        return;
    }
    fds.iter().for_each(|fd| leave_alone(*fd));
    let held: Vec<i32> = fds.iter().copied().filter(|fd| held(*fd).is_some()).collect();
    if !held.is_empty() {
        exec::hand_over(&held, reason);
    }
}

/// These descriptors are about to be passed on (`SCM_RIGHTS`), to whoever receives them.
pub fn passing(fds: &[i32]) {
    give(fds, Reason::Passed);
}

/// A new connection came into being under this number.
pub fn appeared(fd: i32, connector: bool) {
    let Some(slot) = table::slot(fd) else { return };
    if slot.phase.load(Ordering::Relaxed) != table::NONE {
        // The number was closed behind our back.
        before_close(fd);
    }
    slot.forget_mode();
    slot.follow(connector);
}

/// `shutdown(2)`.
pub fn shutdown(fd: i32, read: bool, write: bool) -> Outcome<i32> {
    let Some(conn) = held(fd) else { return Outcome::Bypass };
    // Also one that fails is an edge; what the kernel makes of it, it is to be asked.
    conn.shut_calls.fetch_add(1, Ordering::Relaxed);
    conn.kernel_in.store(1, Ordering::Release);
    let done = conn.stirring(|| shut(&conn, read, write));
    let endpoint = conn.endpoint();
    if endpoint.record.is(status::RX_SHUT) && endpoint.record.is(status::TX_SHUT) {
        // The kernel would answer what still comes with a reset.
        endpoint.deafen();
        client::tell_left(&conn);
        if endpoint.defers_shutdown() {
            // When the stay has ended, if this program makes no more calls.
            client::shut(&conn);
        }
    }
    // An agent that has died does none of this.
    client::check_mail();
    done
}

fn shut(conn: &ConnRef, read: bool, write: bool) -> Outcome<i32> {
    let endpoint = conn.endpoint();
    if endpoint.record.is(status::BROKEN) {
        // What the kernel says of a socket that is connected no more.
        let said = rustix::net::shutdown(conn.anchor(), rustix::net::Shutdown::Write);
        return Outcome::Done(said.map(|()| 0));
    }
    if read {
        if let Err(error) = endpoint.shut_reading() {
            return Outcome::Done(Err(error));
        }
        if endpoint.defers_shutdown() {
            // The kernel's socket wakes nobody.
            wait::kick();
        }
    }
    if write && endpoint.record.is(status::TX_SHUT) && !endpoint.record.is(status::TX_DRAINING) {
        let again = rustix::net::shutdown(conn.anchor(), rustix::net::Shutdown::Write);
        return Outcome::Done(again.map(|()| 0));
    }
    if write && !endpoint.record.is(status::TX_SHUT) {
        match endpoint.shut() {
            Ok(true) => {}
            Ok(false) => client::shut(conn),
            Err(error) => return Outcome::Done(Err(error)),
        }
        client::tell_left(conn);
    }
    Outcome::Done(Ok(0))
}

/// Bytes that `FIONREAD` would report, if the connection is not simply the kernel's.
pub fn unread(fd: i32) -> Option<usize> {
    let conn = held(fd)?;
    // Without a lane too: what a stay that has ended delivered already, may come once more.
    conn.bound()?;
    let there = conn.endpoint().unread()?;
    if there > 0 && on_lane(&conn) && kernel::unread(conn.anchor()).is_ok_and(|n| n > 0) {
        // Who asks for so much is to have it by one call: the ring first, then what comes behind it.
        conn.kernel_in.store(1, Ordering::Release);
    }
    Some(there)
}

/// `SO_ERROR` of a connection that was reset in a way that the kernel does not know of, or tells no more: told once, as from
/// the kernel.
pub fn error_told(fd: i32) -> Option<Errno> {
    let conn = held(fd)?;
    let told = conn.record().is(status::BROKEN) && conn.record().take(status::UNTOLD);
    told.then(|| conn.endpoint().reset_errno())
}

/// A call that first tells an error that is pending, whatever there is to be received (`recvmmsg`).
pub fn pending_error(fd: i32) -> Option<Errno> {
    // SAFETY: the application's descriptor, in a call on it.
    let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
    error_told(fd).or_else(|| rustix::net::sockopt::socket_error(anchor).ok()?.err())
}

/// The application has asked that no fewer bytes be received (`SO_RCVLOWAT`).
pub fn receive_least(fd: i32, least: i32) {
    match held(fd) {
        Some(conn) => conn.least.store(least.max(1) as u32, Ordering::Relaxed),
        // The kernel knows; a connection object is told when it is made.
        None if least > 1 => leave_alone(fd),
        None => {}
    }
}

/// Descriptors from `first` to `last` are about to be closed.
pub fn before_close_range(first: u32, last: u32) {
    for (fd, _) in table::all() {
        if (first..=last).contains(&(fd as u32)) {
            before_close(fd);
        }
    }
}

/// `dup2` is about to make the number another's, if it has something to duplicate.
pub fn before_dup(fd: i32, to: i32) {
    if fd != to && is_open(fd) {
        before_close(to);
    }
}

/// Whether the number is an open descriptor.
fn is_open(fd: i32) -> bool {
    // SAFETY: only asked about; a number that is not open gives EBADF.
    fd >= 0 && rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok()
}

/// The application has changed the descriptor's mode.
pub fn set_nonblocking(fd: i32, set: bool) {
    let Some(slot) = table::followed(fd) else { return };
    slot.set_nonblocking(set);
    // The mode is the open file's, and so every duplicate's.
    if let Some(conn) = slot.conn().filter(|conn| conn.names.load(Ordering::Relaxed) > 1) {
        let twins = table::all().filter(|(_, twin)| std::ptr::eq(twin.conn_ptr(), &raw const *conn));
        twins.for_each(|(_, twin)| twin.set_nonblocking(set));
    }
}
