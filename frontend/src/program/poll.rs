//! Waiting for one descriptor, and `poll`, `ppoll`, `select`, `pselect` over both kinds of descriptor.

use super::Outcome;
use super::cancel;
use super::client;
use super::conn::ConnRef;
use super::epoll;
use super::table::{self, Slot};
use super::wait::{self, Asleep, Spin};
use crate::kernel;
use crate::record::status;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::BorrowedFd;
use rustix::io::{Errno, IoSliceMut};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What a thread waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// Bytes, or the end of the stream.
    Read,
    /// Room.
    Write,
}

/// A deadline as a time-out for the kernel.
fn remaining(deadline: Option<Instant>) -> Option<Timespec> {
    deadline.map(|d| {
        let left = d.saturating_duration_since(Instant::now());
        Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
    })
}

fn is_ready(conn: &ConnRef, want: Want) -> Option<bool> {
    let endpoint = conn.endpoint();
    match want {
        Want::Read => is_readable(conn),
        Want::Write => endpoint.writable(),
    }
}

/// Whether the ring side has as much as `SO_RCVLOWAT` asks for, or all there will be. `None`: the anchor decides.
fn is_readable(conn: &ConnRef) -> Option<bool> {
    let endpoint = conn.endpoint();
    let readable = endpoint.readable()?;
    let least = conn.least.load(Ordering::Relaxed) as usize;
    if !readable
        || least <= 1
        || endpoint.record.is(status::RX_EOF | status::RX_SHUT | status::BROKEN)
        || has_ended(conn.anchor(), Duration::ZERO)
    {
        return Some(readable);
    }
    // On both carriers together: while the lane changes, some may still be on the one before.
    Some(endpoint.unread().is_none_or(|there| there >= least))
}

/// Whether the peer's FIN has come, or a reset, or comes within a time.
pub fn has_ended(anchor: BorrowedFd<'_>, limit: Duration) -> bool {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    let mut one = [PollFd::from_borrowed_fd(anchor, PollFlags::RDHUP)];
    rustix::event::poll(&mut one, Some(&limit)).unwrap_or(1) > 0
}

/// The same of a descriptor; also if a signal came.
pub fn ends_within(fd: i32, limit: Duration) -> bool {
    // SAFETY: the application's descriptor, in a call on it.
    has_ended(unsafe { BorrowedFd::borrow_raw(fd) }, limit)
}

/// Whether the kernel has an error to tell, or the connection is over both ways.
pub fn has_failed(anchor: BorrowedFd<'_>) -> bool {
    let mut one = [PollFd::from_borrowed_fd(anchor, PollFlags::empty())];
    rustix::event::poll(&mut one, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap_or(0) > 0
}

/// Waits until a descriptor may be ready. True if the anchor had something to say.
///
/// # Errors
///
/// `AGAIN` at the deadline, `INTR` after a signal.
pub fn wait_one(fd: i32, slot: &'static Slot, want: Want, deadline: Option<Instant>) -> Result<bool, Errno> {
    let _within = cancel::Within::now();
    let (conn, began) = (slot.conn(), Instant::now());
    if let Some(conn) = &conn {
        if is_ready(conn, want) == Some(false) && spin_one(conn, want) {
            return Ok(false);
        }
    }
    let Some(asleep) = Asleep::take() else {
        std::thread::yield_now();
        return Ok(true);
    };
    let bound = conn.as_ref().and_then(|c| c.bound());
    if let (Some(conn), Some(bound)) = (&conn, bound) {
        asleep.watch_slab(conn);
        wait::announce(bound, asleep.bell);
    }
    let done = |result| {
        if let Some(bound) = bound {
            wait::awake(bound, asleep.bell);
        }
        result
    };
    client::check_mail();
    let changed =
        slot.conn().map(|c| std::ptr::from_ref(&*c)) != conn.as_ref().map(|c| std::ptr::from_ref(&**c));
    if changed || conn.as_ref().is_some_and(|c| is_ready(c, want) == Some(true)) {
        return done(Ok(false));
    }
    let on_ring = want == Want::Write && conn.as_ref().is_some_and(|c| c.record().is(status::TX_RING));
    let events = match want {
        Want::Read => PollFlags::IN,
        Want::Write if on_ring => PollFlags::empty(),
        Want::Write => PollFlags::OUT,
    };
    // SAFETY: the application's descriptor, in a call on it.
    let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
    let set = asleep.as_fd();
    let mut fds = [PollFd::from_borrowed_fd(anchor, events), PollFd::from_borrowed_fd(set, PollFlags::IN)];
    if cancel::wanted() {
        return done(Err(cancel::CANCELLED));
    }
    let polled = rustix::event::poll(&mut fds, remaining(deadline).as_ref());
    let said = fds[0].revents();
    if !fds[1].revents().is_empty() {
        asleep.settle();
        if let Some(conn) = conn.as_ref().filter(|c| is_ready(c, want) == Some(true)) {
            wait::woke(&conn.spin, began);
        }
    }
    client::check_mail();
    let over = |conn: &&ConnRef| {
        // Not by our own shutdown, or by a word about a send.
        on_ring
            && said.contains(PollFlags::ERR | PollFlags::HUP)
            && conn.record().is(status::TX_RING)
            && kernel::has_closed(conn.anchor())
    };
    if let Some(conn) = conn.as_ref().filter(over) {
        conn.stirring(|| conn.endpoint().found_over());
    }
    match polled {
        Ok(0) => done(Err(Errno::AGAIN)),
        Ok(_) => done(Ok(!said.is_empty())),
        Err(error) => done(Err(error)),
    }
}

fn spin_one(conn: &ConnRef, want: Want) -> bool {
    let Some(bound) = conn.bound() else { return false };
    // A full ring means bulk: the reader needs the processor more than we need the moment.
    let crowded = want == Want::Write || wait::same_cpu(bound, 0);
    let mut spin = Spin::new(conn.spin.load(Ordering::Relaxed), crowded);
    while spin.turn() {
        if is_ready(conn, want) != Some(false) {
            wait::learn(&conn.spin, true);
            return true;
        }
    }
    wait::learn(&conn.spin, false);
    false
}

/// Waits until the kernel socket takes bytes, at most so many milliseconds.
pub fn wait_writable(anchor: BorrowedFd<'_>, milliseconds: i64) {
    let limit = Timespec { tv_sec: 0, tv_nsec: milliseconds * 1_000_000 };
    let _ = rustix::event::poll(&mut [PollFd::from_borrowed_fd(anchor, PollFlags::OUT)], Some(&limit));
}

/// The events of a connection on which its anchor alone decides now.
pub fn anchor_decides(conn: &ConnRef, interest: PollFlags) -> PollFlags {
    let endpoint = conn.endpoint();
    let mut decides = PollFlags::empty();
    if !endpoint.record.is(status::RX_RING) {
        // The FIN is told as soon as it has come, whatever is unread.
        decides |= interest & PollFlags::RDHUP;
    }
    if endpoint.readable().is_none() {
        decides |= interest & (PollFlags::IN | PollFlags::RDNORM | PollFlags::PRI);
    }
    if endpoint.writable().is_none() && !endpoint.record.is(status::TX_DRAINING) {
        decides |= interest & (PollFlags::OUT | PollFlags::WRNORM);
    }
    decides
}

/// The events of a connection that are true without asking the kernel.
pub fn ring_events(conn: &ConnRef, interest: PollFlags) -> PollFlags {
    let endpoint = conn.endpoint();
    let mut events = PollFlags::empty();
    if is_readable(conn) == Some(true) {
        events |= interest & (PollFlags::IN | PollFlags::RDNORM);
    }
    if endpoint.writable() == Some(true) {
        events |= interest & (PollFlags::OUT | PollFlags::WRNORM);
    }
    let bits = endpoint.record.status.load(Ordering::Acquire);
    let broken = bits & status::BROKEN != 0;
    let ended = bits & (status::RX_EOF | status::RX_SHUT) != 0;
    if ended || broken {
        events |= interest & PollFlags::RDHUP;
    }
    if broken || ended && bits & (status::TX_SHUT | status::TX_STATE) == status::TX_SHUT {
        events |= PollFlags::HUP;
    }
    if broken && bits & status::UNTOLD != 0 {
        events |= PollFlags::ERR;
    }
    events
}

/// A connection's events, with what the kernel says about its anchor when it decides, or may end a stay. And whether the
/// anchor has something to say that must wait until the ring is empty: it will not come as an edge again.
pub fn events_now(conn: &ConnRef, interest: PollFlags) -> (PollFlags, bool) {
    let mut events = ring_events(conn, interest);
    let mut wanted = anchor_decides(conn, interest);
    let ring = conn.record().is(status::RX_RING);
    if conn.record().is(status::TX_DRAINING) {
        if conn.endpoint().drain() == Ok(true) {
            wanted |= interest & (PollFlags::OUT | PollFlags::WRNORM);
        }
        client::tell_left(conn);
    }
    if ring {
        wanted |= PollFlags::IN | (interest & (PollFlags::RDHUP | PollFlags::PRI));
    }
    let mut one = [PollFd::new(conn, wanted)];
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    if rustix::event::poll(&mut one, Some(&zero)).unwrap_or(0) == 0 {
        return (events, false);
    }
    let mut pending = false;
    let mut said = one[0].revents();
    if said & (PollFlags::ERR | PollFlags::HUP) == PollFlags::ERR {
        // The kernel shows a reset's error first, and the state that comes with it a moment later: when it answers this.
        let _ = kernel::has_closed(conn.anchor());
        if rustix::event::poll(&mut one, Some(&zero)).unwrap_or(0) > 0 {
            said = one[0].revents();
        }
    }
    if said.contains(PollFlags::ERR | PollFlags::HUP) && conn.record().is(status::TX_RING) {
        // Nothing that goes into the ring arrives any more.
        conn.endpoint().found_over();
        events |= ring_events(conn, interest);
    }
    let bits = conn.record().status.load(Ordering::Acquire);
    if bits & status::BROKEN != 0 && bits & status::UNTOLD == 0 {
        // The application was told otherwise than by the kernel, which still has it.
        said -= PollFlags::ERR;
    }
    if ring && said.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
        let on_ring = conn.record().is(status::TX_RING);
        conn.endpoint().attend();
        wait::kick_if_left(conn, on_ring);
        client::tell_left(conn);
        events |= ring_events(conn, interest);
        if conn.record().is(status::RX_RING) {
            // Still on the ring: what the anchor says is not the application's yet.
            // But when the kernel has the far end's FIN, all of the stream is there.
            pending = true;
            // Whoever next finds the ring empty looks there.
            conn.kernel_in.store(1, Ordering::Release);
            if said.contains(PollFlags::ERR | PollFlags::HUP) {
                conn.endpoint().found_over();
            }
            said -= PollFlags::IN | PollFlags::RDNORM;
        } else if said.contains(PollFlags::IN) {
            // That may have been the frame by which the stay has ended, which is taken: what is there now?
            said -= PollFlags::IN | PollFlags::RDNORM;
            let mut now = [PollFd::new(conn, wanted | anchor_decides(conn, interest))];
            if rustix::event::poll(&mut now, Some(&zero)).unwrap_or(0) > 0 {
                said |= now[0].revents();
            }
        }
    }
    if said.contains(PollFlags::IN) && !said.intersects(PollFlags::HUP | PollFlags::ERR) && is_mistaken(conn)
    {
        // Its edge may have been a frame's, which is to be looked at when the ring is empty.
        (said, pending) = (said - (PollFlags::IN | PollFlags::RDNORM), true);
        events |= ring_events(conn, interest);
    }
    (events | (said & (interest | PollFlags::ERR | PollFlags::HUP)), pending)
}

/// Whether what the anchor has is not the application's: bytes that it has by a ring, which are taken away by this, or a
/// frame of a stay that was announced meanwhile.
fn is_mistaken(conn: &ConnRef) -> bool {
    if !conn.record().is(status::RX_OPEN | status::RX_KNOWN) {
        return false;
    }
    let (mut one, on_ring) = ([0], conn.record().is(status::TX_RING));
    let got = conn.endpoint().recv(&mut [IoSliceMut::new(&mut one)], true, false);
    wait::kick_if_left(conn, on_ring);
    client::tell_left(conn);
    if let Err(error) = got
        && error != Errno::AGAIN
    {
        // The application's next call is to be told.
        conn.endpoint().broken(error);
        conn.endpoint().tell_later();
    }
    got == Err(Errno::AGAIN)
}

impl rustix::fd::AsFd for ConnRef {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.anchor()
    }
}

/// Counted descriptors that a poll inside the kernel waits for.
struct Entered(Vec<&'static Slot>);

impl Drop for Entered {
    fn drop(&mut self) {
        for slot in &self.0 {
            slot.leave();
        }
    }
}

fn flags_of(events: i16) -> PollFlags {
    PollFlags::from_bits_retain(events as u16)
}

/// Whether one of these may be a connection, or the agent has said something.
#[inline]
pub fn concerns(fds: &[libc::pollfd]) -> bool {
    client::mail_waits() || table::may_follow_any(fds)
}

/// Whether one of the numbers below `nfds` in these sets may be a connection, or the agent has said something.
#[inline]
pub fn concerns_sets(nfds: i32, sets: [*mut libc::fd_set; 3]) -> bool {
    if client::mail_waits() {
        return true;
    }
    let last = usize::try_from(nfds).unwrap_or(0).div_ceil(64);
    (0..last).any(|n| {
        let ours = table::may_follow_of(n);
        // SAFETY: sets are whole words, and the application's has room for its own `nfds` numbers.
        let has = |set: &*mut libc::fd_set| unsafe { set.cast::<u64>().add(n).read_unaligned() } & ours != 0;
        ours != 0 && sets.iter().filter(|set| !set.is_null()).any(has)
    })
}

/// `poll` and `ppoll`. `real` is the real `ppoll` on a list, with the caller's signal mask.
pub fn poll(
    fds: &mut [libc::pollfd],
    timeout: Option<Duration>,
    mut real: impl FnMut(&mut [libc::pollfd], Option<Timespec>) -> Result<usize, Errno>,
) -> Outcome<usize> {
    client::check_mail();
    let deadline = deadline(timeout);
    let phase = |fd: i32| table::slot(fd).map_or(table::NONE, |s| s.phase.load(Ordering::Acquire));
    // Beside other threads, a wait inside the kernel would keep them from opening a connection.
    let least = if kernel::single_threaded() { table::WANTED } else { table::COUNTED };
    let sets = fds.iter().filter(|p| epoll::is_set_of_ours(p.fd)).count();
    let special = sets > 0 || fds.iter().any(|p| phase(p.fd) >= least);
    if !special {
        let counted = fds.iter().filter(|p| phase(p.fd) == table::COUNTED);
        let slots: Vec<_> = counted.filter_map(|p| table::slot(p.fd)).collect();
        if slots.is_empty() {
            return Outcome::Bypass;
        }
        let mut entered = Entered(Vec::new());
        for slot in slots {
            if slot.enter() {
                entered.0.push(slot);
            }
        }
        let result = real(fds, remaining(deadline));
        return Outcome::Done(result);
    }
    Outcome::Done(serve(fds, deadline, &mut real))
}

fn serve(
    fds: &mut [libc::pollfd],
    deadline: Option<Instant>,
    real: &mut impl FnMut(&mut [libc::pollfd], Option<Timespec>) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        let conns: Vec<(usize, ConnRef)> =
            fds.iter().enumerate().filter_map(|(i, p)| Some((i, table::followed(p.fd)?.conn()?))).collect();
        // What the kernel is asked: everything that is not a connection, as it is; those below.
        let mut kernel: Vec<libc::pollfd> = fds.to_vec();
        for (i, _) in &conns {
            kernel[*i].fd = -1;
        }
        let look = |fds: &mut [libc::pollfd],
                    kernel: &mut [libc::pollfd],
                    real: &mut dyn FnMut(&mut [libc::pollfd]) -> Result<usize, Errno>| {
            for _ in 0..epoll::LOOKS {
                fds.iter().for_each(|p| epoll::refresh(p.fd));
                real(kernel)?;
                if !kernel.iter().any(|k| k.fd >= 0 && k.revents != 0 && epoll::is_edged(k.fd)) {
                    break;
                }
            }
            for (p, k) in fds.iter_mut().zip(kernel.iter()) {
                p.revents = if k.fd < 0 { 0 } else { k.revents };
            }
            for (i, conn) in &conns {
                let events = conn.stirring(|| events_now(conn, flags_of(fds[*i].events)).0);
                fds[*i].revents = events.bits() as i16;
            }
            Ok(fds.iter().filter(|p| p.revents != 0).count())
        };
        let n = look(fds, &mut kernel, &mut |k| real(k, Some(zero)))?;
        if n > 0 || deadline.is_some_and(|d| d <= Instant::now()) {
            return Ok(n);
        }
        let ring_now = |fds: &[libc::pollfd]| {
            conns.iter().any(|(i, c)| !ring_events(c, flags_of(fds[*i].events)).is_empty())
        };
        // Spin only where a ring can answer.
        let ringed = conns.iter().find(|(i, c)| {
            let wants = flags_of(fds[*i].events);
            c.record().is(if wants.contains(PollFlags::IN) { status::RX_RING } else { status::TX_RING })
        });
        let began = Instant::now();
        if let Some((_, conn)) = ringed {
            let crowded = conn.bound().is_some_and(|b| wait::same_cpu(b, 0));
            let mut spin = Spin::new(conn.spin.load(Ordering::Relaxed), crowded);
            let mut paid = false;
            while !paid && spin.turn() {
                paid = ring_now(fds);
            }
            wait::learn(&conn.spin, paid);
            if paid {
                continue;
            }
        }
        let Some(asleep) = Asleep::take() else { continue };
        for (_, conn) in &conns {
            if let Some(bound) = conn.bound() {
                asleep.watch_slab(conn);
                wait::announce(bound, asleep.bell);
            }
        }
        let mail = client::mail_waits();
        let slept = if cancel::wanted() {
            Err(cancel::CANCELLED)
        } else if mail || ring_now(fds) {
            Ok(1)
        } else {
            for (i, conn) in &conns {
                kernel[*i].fd = fds[*i].fd;
                let mut wanted = anchor_decides(conn, flags_of(fds[*i].events));
                if conn.record().is(status::RX_RING) {
                    wanted |= flags_of(fds[*i].events) & PollFlags::RDHUP;
                    // While the ring has something, what stands on the anchor waits, and would keep us from sleeping.
                    if conn.endpoint().readable() != Some(true) {
                        wanted |= PollFlags::IN;
                    }
                }
                if conn.record().is(status::TX_DRAINING) {
                    wanted |= PollFlags::OUT;
                }
                kernel[*i].events = wanted.bits() as i16;
            }
            let set = rustix::fd::AsRawFd::as_raw_fd(&asleep.as_fd());
            kernel.push(libc::pollfd { fd: set, events: libc::POLLIN, revents: 0 });
            real(&mut kernel, remaining(deadline))
        };
        for (_, conn) in &conns {
            if let Some(bound) = conn.bound() {
                wait::awake(bound, asleep.bell);
            }
        }
        if let Some((_, conn)) = ringed.filter(|_| ring_now(fds)) {
            wait::woke(&conn.spin, began);
        }
        asleep.settle();
        client::check_mail();
        slept?;
    }
}

/// `select` and `pselect`: the sets become a list, and back. Numbers beyond `nfds` are left alone.
pub fn select(
    nfds: i32,
    sets: [*mut libc::fd_set; 3],
    timeout: Option<Duration>,
    real: impl FnMut(&mut [libc::pollfd], Option<Timespec>) -> Result<usize, Errno>,
) -> Outcome<usize> {
    const EVENTS: [i16; 3] = [libc::POLLIN | libc::POLLRDHUP, libc::POLLOUT, libc::POLLPRI];
    const ANSWERS: [i16; 3] = [
        libc::POLLIN | libc::POLLHUP | libc::POLLERR | libc::POLLRDHUP,
        libc::POLLOUT | libc::POLLERR,
        libc::POLLPRI,
    ];
    let has = |set: *mut libc::fd_set, fd: i32| {
        // SAFETY: the application's set has room for its own `nfds` numbers.
        !set.is_null() && unsafe { *set.cast::<u8>().add(fd as usize / 8) } & (1 << (fd % 8)) != 0
    };
    let mut list = Vec::new();
    for fd in 0..nfds.max(0) {
        let events = (0..3).filter(|i| has(sets[*i], fd)).fold(0, |all, i| all | EVENTS[i]);
        if events != 0 {
            list.push(libc::pollfd { fd, events, revents: 0 });
        }
    }
    if !list.iter().any(|p| table::followed(p.fd).is_some() || epoll::is_set_of_ours(p.fd)) {
        return Outcome::Bypass;
    }
    let result = match poll(&mut list, timeout, real) {
        Outcome::Bypass => return Outcome::Bypass,
        Outcome::Done(result) => result,
    };
    if let Err(error) = result {
        return Outcome::Done(Err(error));
    }
    if list.iter().any(|p| p.revents & libc::POLLNVAL != 0) {
        return Outcome::Done(Err(Errno::BADF));
    }
    let mut count = 0;
    for (i, set) in sets.into_iter().enumerate().filter(|(_, s)| !s.is_null()) {
        for p in &list {
            let (byte, bit) = (p.fd as usize / 8, 1u8 << (p.fd % 8));
            // SAFETY: as above.
            let place = unsafe { &mut *set.cast::<u8>().add(byte) };
            if *place & bit != 0 {
                if p.revents & ANSWERS[i] == 0 {
                    *place &= !bit;
                } else {
                    count += 1;
                }
            }
        }
    }
    Outcome::Done(Ok(count))
}

/// A relative time-out as a deadline.
pub fn deadline(timeout: Option<Duration>) -> Option<Instant> {
    timeout.map(|t| Instant::now() + t)
}
