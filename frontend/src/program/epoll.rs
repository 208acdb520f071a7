//! Epoll sets over both kinds of descriptor.
//!
//! The set stays a kernel epoll set. A descriptor that is not ours, or not yet, is registered as the application asked.
//! One with a connection object is registered once, edge-triggered, under a token of ours, and stays so whatever lane
//! it is on; what the application asked for is kept here, and its readiness is worked out from rings and edges. The
//! slabs' doorbells and the control socket are in the kernel's set as well, so that one `epoll_wait` wakes for all.

use super::Outcome;
use super::client::{self, SlabEntry};
use super::conn::ConnRef;
use super::poll;
use super::table;
use super::wait::{self, Spin};
use crate::record::status;
use rustix::event::{PollFlags, Timespec, epoll};
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use vsocket_channel::Side;
use vsocket_channel::layout::Bell;

/// Kernel readiness is looked at in a busy set at least this often.
const KERNEL_TURN: Duration = Duration::from_micros(50);
/// Upper half of our tokens; the lower half is a descriptor number, or one of those below.
const TOKEN: u64 = 0xd35a_9e1c_0000_0000;
const TOKEN_MASK: u64 = 0xffff_ffff_0000_0000;
const KICK: u64 = 0xffff_ffff;
const CONTROL: u64 = 0xffff_fffe;
const BELL: u64 = 0xffff_fffd;
const NOWHERE: u32 = u32::MAX;

/// The real wait on a set.
type Real<'a> = &'a mut dyn FnMut(&mut [libc::epoll_event], Option<Timespec>) -> Result<usize, Errno>;

/// What the application asked for.
#[derive(Clone, Copy)]
struct Interest {
    events: u32,
    data: u64,
}

/// A connection in a set.
struct Hot {
    fd: i32,
    conn: ConnRef,
    /// `None` after the application took it out: the kernel's registration stays.
    interest: Option<Interest>,
    /// `EPOLLONESHOT` has fired.
    spent: bool,
    /// What an edge-triggered watcher was told last: ring head, ring space, kernel edges.
    told: (u64, bool, u32),
}

#[derive(Default)]
struct Inner {
    /// Followed descriptors that are registered as the application asked.
    plain: HashMap<i32, Interest>,
    hot: Vec<Hot>,
    /// Where a descriptor stands in `hot`, by its number; `NOWHERE` if it does not.
    index: Vec<u32>,
    slabs: Vec<Heard>,
    next: usize,
    /// Threads between their announcement and their waking.
    sleepers: u32,
}

/// A slab whose doorbells the set hears.
struct Heard {
    entry: Arc<SlabEntry>,
    /// On which side of it, or both, the set's connections are.
    sides: [bool; 2],
}

/// One epoll set.
pub struct EpollSet {
    fd: i32,
    bell: usize,
    /// Something of ours is in the kernel's set, so its events must be looked through.
    ours: AtomicBool,
    /// The control socket had an edge: the agent has said something, or has ended.
    control: AtomicBool,
    spin: AtomicU32,
    kernel_turn: AtomicU64,
    inner: Mutex<Inner>,
}

/// All sets, for what concerns a descriptor in each of them.
static SETS: Mutex<Vec<&'static EpollSet>> = Mutex::new(Vec::new());

fn set_of(fd: i32) -> Option<&'static EpollSet> {
    // SAFETY: sets are leaked, so a pointer in the table is valid for good.
    unsafe { table::slot(fd)?.epoll.load(Ordering::Acquire).as_ref() }
}

/// `epoll_create` made a set.
pub fn created(fd: i32) {
    let Some(slot) = table::slot(fd) else { return };
    closed_set(fd);
    let set: &'static EpollSet = Box::leak(Box::new(EpollSet {
        fd,
        bell: wait::assign_bell(),
        ours: AtomicBool::new(false),
        control: AtomicBool::new(false),
        spin: AtomicU32::new(wait::SPIN_MAX),
        kernel_turn: AtomicU64::new(0),
        inner: Mutex::default(),
    }));
    if let Ok(mut sets) = SETS.lock() {
        sets.push(set);
    }
    slot.epoll.store(std::ptr::from_ref(set).cast_mut(), Ordering::Release);
}

/// A set's descriptor is closed.
pub fn closed_set(fd: i32) {
    let Some(set) = set_of(fd) else { return };
    if let Some(slot) = table::slot(fd) {
        slot.epoll.store(std::ptr::null_mut(), Ordering::Release);
    }
    if let Ok(mut sets) = SETS.lock() {
        sets.retain(|s| !std::ptr::eq(*s, set));
    }
    if let Ok(mut inner) = set.inner.lock() {
        *inner = Inner::default();
    }
    wait::return_bell(set.bell);
}

fn each_set(mut f: impl FnMut(&'static EpollSet, MutexGuard<'_, Inner>)) {
    let Ok(sets) = SETS.lock() else { return };
    for set in sets.iter() {
        if let Ok(inner) = set.inner.lock() {
            f(set, inner);
        }
    }
}

/// A descriptor was opened with the agent: sets that hold it must wake when the agent answers.
pub fn watch_control(fd: i32) {
    each_set(|set, inner| {
        if inner.plain.contains_key(&fd) {
            set.watch_control();
        }
    });
}

/// A descriptor has got a connection object: its registrations become ours.
pub fn hold(fd: i32, conn: &ConnRef) {
    each_set(|set, mut inner| {
        if let Some(interest) = inner.plain.remove(&fd) {
            set.watch_control();
            let _ = set.register(&mut inner, fd, conn, interest, true);
        }
    });
}

/// A connection was bound to a segment: sets that hold it must hear its doorbells.
pub fn bound(conn: &ConnRef) {
    each_set(|set, mut inner| {
        if inner.hot.iter().any(|h| std::ptr::eq(&raw const *h.conn, &raw const **conn)) {
            set.hear(&mut inner, conn);
        }
    });
}

/// A descriptor number is about to be closed.
pub fn forget_fd(fd: i32) {
    each_set(|set, mut inner| {
        inner.plain.remove(&fd);
        if inner.remove(fd) {
            // The agent's duplicate would keep the registration alive after the close.
            // SAFETY: the application's descriptor, which it is closing just now.
            let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
            let _ = epoll::delete(set.as_fd(), anchor);
        }
    });
}

impl Inner {
    fn find(&self, fd: i32) -> Option<usize> {
        let at = *self.index.get(usize::try_from(fd).ok()?)?;
        (at != NOWHERE).then_some(at as usize)
    }

    /// Announces on every slab's bell that a thread is about to sleep.
    fn announce(&self, bell: usize) {
        self.each_bell(bell, Bell::announce);
    }

    /// A thread sleeps no more. The announcement stands while another does, or may, on the same bells.
    fn awake(&mut self, bell: usize) {
        self.sleepers -= 1;
        if self.sleepers == 0 && wait::is_alone(bell) {
            self.each_bell(bell, |bell| bell.awake(true));
        }
    }

    fn each_bell(&self, bell: usize, f: impl Fn(&Bell)) {
        for Heard { entry, sides } in &self.slabs {
            for side in [Side::Zero, Side::One].into_iter().filter(|side| sides[side.index()]) {
                f(&entry.slab.bells(side)[bell]);
            }
        }
    }

    fn place(&mut self, fd: i32, at: u32) {
        let fd = fd as usize;
        if self.index.len() <= fd {
            self.index.resize(fd + 1, NOWHERE);
        }
        self.index[fd] = at;
    }

    fn remove(&mut self, fd: i32) -> bool {
        let Some(at) = self.find(fd) else { return false };
        self.place(fd, NOWHERE);
        self.hot.swap_remove(at);
        if let Some(moved) = self.hot.get(at).map(|h| h.fd) {
            self.place(moved, at as u32);
        }
        true
    }
}

/// `epoll_ctl`. Says whether it was served; a call on a descriptor that is followed but has no connection object is
/// remembered, and must be made as well.
pub fn ctl(epfd: i32, op: i32, fd: i32, event: Option<(u32, u64)>) -> Outcome<i32> {
    let Some(slot) = table::followed(fd) else { return Outcome::Bypass };
    let Some(set) = set_of(epfd) else { return Outcome::Bypass };
    let Ok(mut inner) = set.inner.lock() else { return Outcome::Bypass };
    let interest = event.map(|(events, data)| Interest { events, data });
    if let Some(at) = inner.find(fd).filter(|at| inner.hot[*at].names(slot.conn_ptr())) {
        // In the set already: the set's own reference keeps the connection.
        return Outcome::Done(inner.hot[at].control(op, interest).map(|()| 0));
    }
    match slot.conn() {
        Some(conn) => {
            let result = set.ctl_held(&mut inner, &conn, op, fd, interest);
            Outcome::Done(result.map(|()| 0))
        }
        None => {
            match (op, interest) {
                (libc::EPOLL_CTL_ADD | libc::EPOLL_CTL_MOD, Some(interest)) => {
                    inner.plain.insert(fd, interest);
                    if slot.phase.load(Ordering::Relaxed) == table::OPENING {
                        set.watch_control();
                    }
                }
                _ => {
                    inner.plain.remove(&fd);
                }
            }
            Outcome::Bypass
        }
    }
}

impl EpollSet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the application's epoll descriptor; if it closes it meanwhile it gets EBADF, as from the kernel.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }

    fn watch_control(&self) {
        if let Some(control) = client::control() {
            self.ours.store(true, Ordering::Release);
            wait::watch(self.as_fd(), control, TOKEN | CONTROL);
            wait::watch_kick(self.as_fd(), TOKEN | KICK);
        }
    }

    fn ctl_held(
        &self,
        inner: &mut Inner,
        conn: &ConnRef,
        op: i32,
        fd: i32,
        interest: Option<Interest>,
    ) -> Result<(), Errno> {
        // A descriptor number that stands here for an earlier connection.
        inner.remove(fd);
        match (op, interest) {
            (libc::EPOLL_CTL_ADD, Some(interest)) => self.register(inner, fd, conn, interest, false),
            (libc::EPOLL_CTL_MOD | libc::EPOLL_CTL_DEL, _) => Err(Errno::NOENT),
            _ => Err(Errno::INVAL),
        }
    }

    fn register(
        &self,
        inner: &mut Inner,
        fd: i32,
        conn: &ConnRef,
        interest: Interest,
        present: bool,
    ) -> Result<(), Errno> {
        use epoll::EventFlags as E;
        let data = epoll::EventData::new_u64(TOKEN | fd as u64);
        let flags = E::IN | E::OUT | E::RDHUP | E::PRI | E::ET;
        // SAFETY: the application's descriptor, in a call on it or under its table entry.
        let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
        self.ours.store(true, Ordering::Release);
        if present {
            epoll::modify(self.as_fd(), anchor, data, flags)?;
        } else {
            epoll::add(self.as_fd(), anchor, data, flags)?;
        }
        let mut hot = Hot { fd, conn: conn.clone(), interest: None, spent: false, told: (0, false, 0) };
        hot.renew(interest);
        inner.place(fd, inner.hot.len() as u32);
        inner.hot.push(hot);
        self.hear(inner, conn);
        Ok(())
    }

    /// Hears the doorbell of the connection's slab.
    fn hear(&self, inner: &mut Inner, conn: &ConnRef) {
        let (Some(bound), Some(entry)) = (conn.bound(), conn.slab()) else { return };
        bound.header().waiters[bound.side.index()].mask.fetch_or(1 << self.bell, Ordering::Relaxed);
        if let Some(heard) = inner.slabs.iter_mut().find(|heard| Arc::ptr_eq(&heard.entry, &entry)) {
            heard.sides[bound.side.index()] = true;
            return;
        }
        inner.slabs.retain(|heard| Arc::strong_count(&heard.entry) > 2);
        if let Some(eventfd) = entry.own.get(self.bell) {
            wait::watch(self.as_fd(), eventfd, TOKEN | BELL);
        }
        let mut sides = [false; 2];
        sides[bound.side.index()] = true;
        if inner.sleepers > 0 {
            // Another thread sleeps, which has not announced it there, and may have missed what came before this.
            entry.slab.bells(bound.side)[self.bell].announce();
            wait::kick();
        }
        inner.slabs.push(Heard { entry, sides });
    }

    /// Reports what is ready among the connections.
    fn harvest(&self, inner: &mut Inner, out: &mut [libc::epoll_event], asking: bool) -> usize {
        let count = inner.hot.len();
        let mut n = 0;
        for step in 0..count {
            if n == out.len() {
                break;
            }
            let at = (inner.next + step) % count;
            let hot = &mut inner.hot[at];
            if let Some(event) = hot.event(asking) {
                out[n] = event;
                n += 1;
                if n == out.len() {
                    // The next call begins after this one, so that none is starved.
                    inner.next = (at + 1) % count;
                }
            }
        }
        n
    }

    /// Takes the kernel's events: ours become edges of connections, the application's are reported.
    fn sift(&self, inner: &mut Inner, out: &mut [libc::epoll_event], n: usize) -> usize {
        let (mut kept, mut rung) = (0, false);
        for i in 0..n {
            let event = out[i];
            let (data, events) = (event.u64, event.events);
            if data & TOKEN_MASK != TOKEN {
                out[kept] = event;
                kept += 1;
                continue;
            }
            if data == TOKEN | CONTROL {
                self.control.store(true, Ordering::Relaxed);
                continue;
            }
            rung |= data == TOKEN | BELL;
            let fd = (data & !TOKEN_MASK) as i32;
            if let Some(at) = inner.find(fd) {
                let conn = &inner.hot[at].conn;
                let bits = events as i32;
                if bits & (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) != 0 {
                    conn.kernel_in.store(1, Ordering::Release);
                }
                if bits & (libc::EPOLLOUT | libc::EPOLLHUP | libc::EPOLLERR) != 0 {
                    conn.kernel_out.store(1, Ordering::Release);
                }
            }
        }
        if rung && inner.sleepers > 0 {
            // Who rang has taken the announcement, and the edge that would have woken a sleeper, maybe this thread in a
            // moment, is spent. What was published is looked at after this.
            inner.announce(self.bell);
        }
        kept
    }

    fn on_ring(inner: &Inner) -> bool {
        inner.hot.iter().any(|h| h.conn.record().is(status::RX_RING | status::TX_RING))
    }
}

impl Hot {
    fn renew(&mut self, interest: Interest) {
        self.interest = Some(interest);
        self.spent = false;
        self.told = (u64::MAX, false, 0);
        // As after a MOD in the kernel: what is ready now is a new edge.
        if !self.conn.record().is(status::RX_RING) {
            self.conn.kernel_in.store(1, Ordering::Release);
        }
        if !self.conn.record().is(status::TX_RING) {
            self.conn.kernel_out.store(1, Ordering::Release);
        }
    }

    fn names(&self, conn: *const super::conn::Conn) -> bool {
        std::ptr::eq(&raw const *self.conn, conn)
    }

    /// `epoll_ctl` on a connection that the kernel's set holds.
    fn control(&mut self, op: i32, interest: Option<Interest>) -> Result<(), Errno> {
        match (op, interest, self.interest.is_some()) {
            (libc::EPOLL_CTL_ADD, Some(_), true) => Err(Errno::EXIST),
            (libc::EPOLL_CTL_ADD, Some(interest), false) | (libc::EPOLL_CTL_MOD, Some(interest), true) => {
                self.renew(interest);
                Ok(())
            }
            (libc::EPOLL_CTL_DEL, _, true) => {
                self.interest = None;
                Ok(())
            }
            (libc::EPOLL_CTL_MOD | libc::EPOLL_CTL_DEL, _, false) => Err(Errno::NOENT),
            _ => Err(Errno::INVAL),
        }
    }

    /// Whether nothing can be ready, by one look at the shared words: the usual case of a descriptor on its lane.
    fn quiet(&self, events: u32) -> bool {
        let record = self.conn.record();
        let bits = record.status.load(Ordering::Acquire);
        let usual = status::RX_RING | status::RX_OPEN | status::TX_RING;
        let only_in = events as i32 & (libc::EPOLLIN | libc::EPOLLOUT) == libc::EPOLLIN;
        match self.conn.bound() {
            Some(bound) if only_in && bits == usual => {
                bound.rx().indices.head.head.load(Ordering::Acquire) == record.rx_off.load(Ordering::Relaxed)
            }
            _ => false,
        }
    }

    /// The event to report, if there is one. `asking`: the kernel may be asked about anchors that had an edge.
    fn event(&mut self, asking: bool) -> Option<libc::epoll_event> {
        let interest = self.interest.filter(|_| !self.spent)?;
        if !asking && self.quiet(interest.events) {
            return None;
        }
        let wanted = PollFlags::from_bits_retain((interest.events & 0xffff) as u16);
        let mut ready = poll::ring_events(&self.conn, wanted);
        let edge =
            self.conn.kernel_in.load(Ordering::Acquire) | self.conn.kernel_out.load(Ordering::Acquire) << 1;
        let concerns = u32::from(wanted.intersects(PollFlags::IN | PollFlags::RDHUP | PollFlags::PRI))
            | u32::from(wanted.contains(PollFlags::OUT)) << 1;
        let draining = self.conn.record().is(status::TX_DRAINING);
        let mut pending = false;
        if asking && (edge & concerns != 0 || draining) {
            // Cleared first: an edge that comes while the kernel is asked stays.
            self.conn.kernel_in.store(0, Ordering::Release);
            self.conn.kernel_out.store(0, Ordering::Release);
            (ready, pending) = poll::events_now(&self.conn, wanted);
            // What the anchor had, it may still have at the next look; what a ring has, the ring says.
            let record = self.conn.record();
            let broken = ready.intersects(PollFlags::HUP | PollFlags::ERR);
            if broken || pending || (ready.contains(PollFlags::IN) && !record.is(status::RX_RING)) {
                self.conn.kernel_in.store(1, Ordering::Release);
            }
            if ready.contains(PollFlags::OUT) && !record.is(status::TX_RING) {
                self.conn.kernel_out.store(1, Ordering::Release);
            }
        }
        if ready.is_empty() {
            return None;
        }
        if interest.events as i32 & libc::EPOLLET != 0 && !self.new_edge(ready, pending) {
            return None;
        }
        if interest.events as i32 & libc::EPOLLONESHOT != 0 {
            self.spent = true;
        }
        Some(libc::epoll_event { events: u32::from(ready.bits()), u64: interest.data })
    }

    /// Edge-triggered: whether something has arrived, or room has come, since the last report.
    fn new_edge(&mut self, ready: PollFlags, pending: bool) -> bool {
        let endpoint = self.conn.endpoint();
        let head = endpoint.bound.map_or(0, |b| b.rx().indices.head.head.load(Ordering::Relaxed));
        let status = u64::from(endpoint.record.status.load(Ordering::Relaxed));
        let edges =
            self.conn.kernel_in.swap(0, Ordering::AcqRel) | self.conn.kernel_out.swap(0, Ordering::AcqRel);
        if pending {
            self.conn.kernel_in.store(1, Ordering::Release);
        }
        let blocked = self.conn.blocked.load(Ordering::Relaxed);
        let now = (head ^ status << 48, ready.contains(PollFlags::OUT), blocked);
        let new = now != self.told
            || (edges != 0 && (endpoint.readable().is_none() || !endpoint.record.is(status::TX_RING)));
        self.told = now;
        new
    }
}

/// `epoll_wait` and its kin. `real` is the real call on the set, with the caller's signal mask.
pub fn wait(
    epfd: i32,
    out: &mut [libc::epoll_event],
    timeout: Option<Duration>,
    mut real: impl FnMut(&mut [libc::epoll_event], Option<Timespec>) -> Result<usize, Errno>,
) -> Outcome<usize> {
    client::check_mail();
    let Some(set) = set_of(epfd).filter(|s| s.ours.load(Ordering::Acquire)) else { return Outcome::Bypass };
    if out.is_empty() {
        return Outcome::Bypass;
    }
    let deadline = timeout.map(|t| Instant::now() + t);
    Outcome::Done(set.wait(out, timeout, deadline, &mut real))
}

impl EpollSet {
    fn wait(
        &self,
        out: &mut [libc::epoll_event],
        timeout: Option<Duration>,
        deadline: Option<Instant>,
        real: Real<'_>,
    ) -> Result<usize, Errno> {
        let zero = Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        loop {
            let mut n = self.look(out, real, zero)?;
            self.hear_control();
            if n > 0 || timeout == Some(Duration::ZERO) || deadline.is_some_and(|d| d <= Instant::now()) {
                return Ok(n);
            }
            n = self.spin(out, real, zero)?;
            if n > 0 {
                return Ok(n);
            }
            // Announce, look once more, then sleep.
            let Ok(mut inner) = self.inner.lock() else { return Err(Errno::INTR) };
            inner.sleepers += 1;
            inner.announce(self.bell);
            drop(inner);
            client::check_mail();
            let looked = self.look(out, real, zero);
            let told = self.control.load(Ordering::Relaxed);
            if matches!(looked, Ok(0)) && !told {
                let left = deadline.map(|d| {
                    let left = d.saturating_duration_since(Instant::now());
                    Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
                });
                let slept = real(out, left);
                client::check_mail();
                let Ok(mut inner) = self.inner.lock() else { return Err(Errno::INTR) };
                inner.awake(self.bell);
                n = self.sift(&mut inner, out, slept?);
                let room = out.len();
                n += self.harvest(&mut inner, &mut out[n..room], true);
                drop(inner);
                self.hear_control();
                if n == 0 && deadline.is_some_and(|d| d <= Instant::now()) {
                    return Ok(0);
                }
            } else {
                let Ok(mut inner) = self.inner.lock() else { return Err(Errno::INTR) };
                inner.awake(self.bell);
                n = looked?;
            }
            if n > 0 {
                return Ok(n);
            }
        }
    }

    /// Reads what the agent has said, if the kernel's set heard of it. The set must not be locked.
    fn hear_control(&self) {
        if self.control.load(Ordering::Relaxed) && self.control.swap(false, Ordering::Relaxed) {
            client::read_mail();
        }
    }

    /// One look at the rings, and at the kernel when its turn has come or nothing else is there.
    fn look(
        &self,
        out: &mut [libc::epoll_event],
        real: Real<'_>,
        zero: Option<Timespec>,
    ) -> Result<usize, Errno> {
        let Ok(mut inner) = self.inner.lock() else { return Err(Errno::INTR) };
        if !self.kernels_turn() {
            let n = self.harvest(&mut inner, out, false);
            if n > 0 {
                return Ok(n);
            }
        }
        let got = real(out, zero)?;
        let n = self.sift(&mut inner, out, got);
        Ok(n + self.harvest(&mut inner, &mut out[n..], true))
    }

    fn kernels_turn(&self) -> bool {
        let now = super::wait::clock();
        let last = self.kernel_turn.load(Ordering::Relaxed);
        if now.wrapping_sub(last) < KERNEL_TURN.as_nanos() as u64 {
            return false;
        }
        self.kernel_turn.store(now, Ordering::Relaxed);
        true
    }

    fn spin(
        &self,
        out: &mut [libc::epoll_event],
        real: Real<'_>,
        zero: Option<Timespec>,
    ) -> Result<usize, Errno> {
        let Ok(inner) = self.inner.lock() else { return Ok(0) };
        if !Self::on_ring(&inner) {
            return Ok(0);
        }
        let crowded =
            inner.hot.iter().find_map(|h| h.conn.bound()).is_some_and(|b| wait::same_cpu(b, self.bell));
        drop(inner);
        let mut spin = Spin::new(self.spin.load(Ordering::Relaxed), crowded);
        while spin.turn() {
            let Ok(mut inner) = self.inner.lock() else { return Ok(0) };
            let n = self.harvest(&mut inner, out, false);
            drop(inner);
            if n > 0 {
                wait::learn(&self.spin, true);
                return Ok(n);
            }
            if self.kernels_turn() {
                let Ok(mut inner) = self.inner.lock() else { return Ok(0) };
                let got = real(out, zero)?;
                let mut n = self.sift(&mut inner, out, got);
                if got > n || n > 0 {
                    n += self.harvest(&mut inner, &mut out[n..], true);
                }
                if n > 0 {
                    return Ok(n);
                }
                drop(inner);
                client::check_mail();
            }
        }
        wait::learn(&self.spin, false);
        Ok(0)
    }
}

impl AsRawFd for EpollSet {
    fn as_raw_fd(&self) -> i32 {
        self.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Slab;
    use vsocket_channel::layout::{Geometry, LAYOUT_VERSION, SLAB_MAGIC};

    /// A set that hears a slab's doorbells on one side.
    fn listening() -> (EpollSet, Arc<SlabEntry>) {
        let geometry = Geometry::new(1, 4096).unwrap();
        let memfd = rustix::fs::memfd_create("slab", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, geometry.slab_len() as u64).unwrap();
        let header = [&SLAB_MAGIC.to_ne_bytes()[..], &LAYOUT_VERSION.to_ne_bytes()].concat();
        assert_eq!(rustix::io::pwrite(&memfd, &header, 0), Ok(12));
        let slab = Arc::new(Slab::map(&memfd, 1, geometry).unwrap());
        let entry = Arc::new(SlabEntry::new(slab, vec![], vec![]));
        let inner =
            Inner { slabs: vec![Heard { entry: entry.clone(), sides: [false, true] }], ..Inner::default() };
        let set = EpollSet {
            fd: -1,
            bell: wait::assign_bell(),
            ours: AtomicBool::new(true),
            control: AtomicBool::new(false),
            spin: AtomicU32::new(0),
            kernel_turn: AtomicU64::new(0),
            inner: Mutex::new(inner),
        };
        (set, entry)
    }

    const APPLICATION: libc::epoll_event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 7 };

    /// Whoever publishes between the announcement and the last look takes the announcement, and that look takes the edge:
    /// the thread must not then sleep as one who has announced nothing.
    #[test]
    fn a_bell_heard_in_the_last_look_is_announced_again() {
        let (set, entry) = listening();
        let bell = &entry.slab.bells(Side::One)[set.bell];
        let mut out = [libc::epoll_event { events: 0, u64: 0 }; 4];
        let (mut rung, mut slept) = (0, 0);
        let mut real = |out: &mut [libc::epoll_event], timeout: Option<Timespec>| {
            if timeout.is_none() {
                slept += 1;
                assert!(bell.take(), "asleep without an announcement");
                out[0] = APPLICATION;
                return Ok(1);
            }
            if bell.take() {
                rung += 1;
                out[0] = libc::epoll_event { events: libc::EPOLLIN as u32, u64: TOKEN | BELL };
                return Ok(1);
            }
            Ok(0)
        };
        assert_eq!(set.wait(&mut out, None, None, &mut real), Ok(1));
        assert_eq!({ out[0].u64 }, 7);
        assert_eq!((rung, slept), (1, 1));
        let far = &entry.slab.bells(Side::Zero)[set.bell];
        assert!(!far.take() && set.inner.lock().unwrap().sleepers == 0);
        wait::return_bell(set.bell);
    }

    /// What the agent says between the announcement and the last look is read, not slept upon.
    #[test]
    fn mail_heard_in_the_last_look_is_read_before_sleeping() {
        let (set, entry) = listening();
        let bell = &entry.slab.bells(Side::One)[set.bell];
        let mut out = [libc::epoll_event { events: 0, u64: 0 }; 4];
        let mut said = false;
        let mut real = |out: &mut [libc::epoll_event], timeout: Option<Timespec>| {
            if timeout.is_none() {
                assert!(said && !set.control.load(Ordering::Relaxed), "slept upon unread mail");
                out[0] = APPLICATION;
                return Ok(1);
            }
            if bell.sleeping.load(Ordering::Relaxed) != 0 && !std::mem::replace(&mut said, true) {
                out[0] = libc::epoll_event { events: libc::EPOLLIN as u32, u64: TOKEN | CONTROL };
                return Ok(1);
            }
            Ok(0)
        };
        assert_eq!(set.wait(&mut out, None, None, &mut real), Ok(1));
        wait::return_bell(set.bell);
    }

    /// One of two sleeping threads takes the edge: the other's sleep stays announced.
    #[test]
    fn a_bell_that_wakes_one_thread_is_announced_for_the_other() {
        let (set, entry) = listening();
        let bell = &entry.slab.bells(Side::One)[set.bell];
        let mut out = [libc::epoll_event { events: 0, u64: 0 }; 4];
        let mut real = |out: &mut [libc::epoll_event], timeout: Option<Timespec>| {
            if timeout.is_some() {
                return Ok(0);
            }
            set.inner.lock().unwrap().sleepers += 1;
            assert!(bell.take());
            out[0] = APPLICATION;
            out[1] = libc::epoll_event { events: libc::EPOLLIN as u32, u64: TOKEN | BELL };
            Ok(2)
        };
        assert_eq!(set.wait(&mut out, None, None, &mut real), Ok(1));
        assert!(bell.take(), "the other thread sleeps without an announcement");
        wait::return_bell(set.bell);
    }
}
