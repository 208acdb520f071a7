//! Epoll sets over both kinds of descriptor.
//!
//! The set stays a kernel epoll set. A descriptor that is not ours, or not yet, is registered as the application asked.
//! One with a connection object is registered once, edge-triggered, under a token of ours, and stays so whatever lane
//! it is on; what the application asked for is kept here, and its readiness is worked out from rings and edges. The
//! slabs' doorbells and the control socket are in the kernel's set as well, so that one `epoll_wait` wakes for all.
//!
//! `inner` has what decides which connections are looked at, `hot` whether one of them is ready.

use self::hot::Interest;
use self::inner::Inner;
use super::Outcome;
use super::cancel;
use super::client::{self, SlabEntry};
use super::conn::ConnRef;
use super::table;
use super::wait::{self, Spin};
use crate::record::status;
use rustix::event::{Timespec, epoll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub(super) use self::nested::LOOKS;
pub use self::nested::{is_edged, is_set_of_ours, refresh};

mod hot;
mod inner;
mod nested;
#[cfg(test)]
mod tests;

/// Kernel readiness is looked at in a busy set at least this often.
const KERNEL_TURN: Duration = Duration::from_micros(50);
/// Upper half of our tokens; the lower half is a descriptor number, a slab's from `BELLS` on, or one of the last few.
const TOKEN: u64 = 0xd35a_9e1c_0000_0000;
const TOKEN_MASK: u64 = 0xffff_ffff_0000_0000;
const KICK: u64 = 0xffff_ffff;
const CONTROL: u64 = 0xffff_fffe;
const BELLS: u64 = 0x8000_0000;
const NOWHERE: u32 = u32::MAX;
/// In a set with more descriptors that are the kernel's, it is not asked whether one has fired: it would list them all.
const FIRED_MOST: usize = 1024;

/// The real wait on a set.
type Real<'a> = &'a mut dyn FnMut(&mut [libc::epoll_event], Option<Timespec>) -> Result<usize, Errno>;

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
    /// The kernel's events left no room for ours, which come first at the next look.
    crowded: AtomicBool,
    inner: Mutex<Inner>,
    /// Connections that have changed otherwise than by the kernel and the far end, by descriptor and serial number.
    stirred: Mutex<Vec<(i32, u32)>>,
    /// There are such.
    stir: AtomicBool,
    /// Something else watches it: another set, `poll`, `select`.
    is_watched: AtomicBool,
    /// There may be sets in it.
    nests: AtomicBool,
}

/// All sets, for what concerns a descriptor in each of them.
static SETS: Mutex<Vec<&'static EpollSet>> = Mutex::new(Vec::new());

#[inline]
fn set_of(fd: i32) -> Option<&'static EpollSet> {
    // SAFETY: sets are leaked, so a pointer in the table is valid for good.
    unsafe { table::slot(fd)?.epoll.load(Ordering::Acquire).as_ref() }
}

/// Whether a set may hold a connection, or the agent has said something.
#[inline]
pub fn concerns(fd: i32) -> bool {
    let may = |set: &EpollSet| set.ours.load(Ordering::Acquire) || set.nests.load(Ordering::Acquire);
    client::mail_waits() || set_of(fd).is_some_and(may)
}

/// Whether a descriptor is a set.
#[inline]
pub fn is_set(fd: i32) -> bool {
    set_of(fd).is_some()
}

/// `epoll_create` made a set.
pub fn created(fd: i32) {
    let Some(slot) = table::slot(fd) else { return };
    closed_set(fd);
    let set: &'static EpollSet = Box::leak(Box::new(EpollSet::new(fd)));
    if let Ok(mut sets) = SETS.lock() {
        sets.push(set);
    }
    slot.epoll.store(std::ptr::from_ref(set).cast_mut(), Ordering::SeqCst);
    // Whoever polls it is to ask us.
    slot.seen();
}

/// A set's descriptor is closed.
pub fn closed_set(fd: i32) {
    let Some(set) = set_of(fd) else { return };
    if let Some(slot) = table::slot(fd) {
        slot.epoll.store(std::ptr::null_mut(), Ordering::SeqCst);
        slot.unseen(|| !slot.epoll.load(Ordering::SeqCst).is_null());
    }
    if let Ok(mut sets) = SETS.lock() {
        sets.retain(|s| !std::ptr::eq(*s, set));
    }
    if let Ok(mut inner) = set.inner.lock() {
        *inner = Inner::new(set.bell);
    }
    nested::closed(set);
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
            set.watch_control(&inner);
        }
    });
}

/// There is another control socket: sets that hold connections must hear it.
pub fn watch_next_control() {
    each_set(|set, inner| {
        if set.ours.load(Ordering::Acquire) {
            set.watch_control(&inner);
        }
    });
}

/// A descriptor has got a connection object: its registrations become ours.
pub fn hold(fd: i32, conn: &ConnRef) {
    each_set(|set, mut inner| {
        if let Some(interest) = inner.plain.remove(&fd) {
            set.watch_control(&inner);
            let _ = set.register(&mut inner, fd, conn, interest, true);
        }
    });
}

/// A connection was bound to a segment: sets that hold it must hear its doorbells.
pub fn bound(conn: &ConnRef) {
    for member in conn.members() {
        let Ok(mut inner) = member.set.inner.lock() else { continue };
        if let Some(at) = inner.find(member.fd).filter(|at| inner.hot(*at).names(&raw const **conn)) {
            member.set.hear(&mut inner, at, conn);
        }
    }
}

/// A descriptor number is about to be closed.
pub fn forget_fd(fd: i32) {
    each_set(|set, mut inner| {
        inner.plain.remove(&fd);
        if inner.remove(fd) {
            // The agent's duplicate would keep the registration alive after the close.
            // SAFETY: the application's descriptor, which it is closing just now.
            let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
            let _ = epoll::delete(set.home(&inner), anchor);
        }
    });
}

/// The same of one without a connection object. Another's duplicate would keep its registrations alive.
pub fn forget_plain(fd: i32, duplicated: bool) {
    each_set(|set, mut inner| {
        if inner.plain.remove(&fd).is_some() && duplicated {
            // SAFETY: the application's descriptor, which it is closing just now.
            let _ = epoll::delete(set.as_fd(), unsafe { BorrowedFd::borrow_raw(fd) });
        }
    });
}

/// A descriptor number is about to be closed, and another names the connection: as the kernel's sets watch the open file and
/// not a number, the sets that hold it go on, by a duplicate of ours.
pub fn keep(fd: i32, conn: &ConnRef) {
    each_set(|set, mut inner| {
        inner.plain.remove(&fd);
        let Some(at) = inner.find(fd).filter(|at| inner.hot(*at).names(&raw const **conn)) else { return };
        // SAFETY: the application's descriptor, which it is closing just now.
        let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
        let twin = inner.hot(at).is_wanted().then(|| super::descriptors::twin(anchor)).flatten();
        let home = set.home(&inner);
        let _ = epoll::delete(home, anchor);
        let Some(twin) = twin.filter(|twin| watch_anchor(home, twin.as_fd()).is_ok()) else {
            inner.remove(fd);
            return;
        };
        let member = conn.join(set, twin.as_raw_fd());
        inner.rename(at, twin, member);
    });
}

/// The last number of a connection is about to be closed: sets that went on with it under duplicates of ours are done.
pub fn forget_kept(conn: &ConnRef) {
    for member in conn.members() {
        let Ok(mut inner) = member.set.inner.lock() else { continue };
        if let Some(at) = inner.find(member.fd).filter(|at| inner.hot(*at).names(&raw const **conn)) {
            let home = member.set.home(&inner);
            if let Some(twin) = inner.hot(at).twin() {
                let _ = epoll::delete(home, twin);
            }
            inner.remove(member.fd);
        }
    }
}

/// `epoll_ctl`. Says whether it was served; [`ctl_done`] is to be told of a call that was not, and that the kernel did.
pub fn ctl(epfd: i32, op: i32, fd: i32, event: Option<(u32, u64)>) -> Outcome<i32> {
    let interest = event.map(|(events, data)| Interest { events, data });
    if let (Some(child), Some(set)) = (set_of(fd), set_of(epfd)) {
        nested::ctl(set, op, fd, child, interest);
        return Outcome::Bypass;
    }
    let Some(slot) = table::followed(fd) else { return Outcome::Bypass };
    let Some(set) = set_of(epfd) else { return Outcome::Bypass };
    let Ok(mut inner) = set.inner.lock() else { return Outcome::Bypass };
    if interest.is_none() && matches!(op, libc::EPOLL_CTL_ADD | libc::EPOLL_CTL_MOD) {
        return Outcome::Done(Err(Errno::FAULT));
    }
    if interest.is_some_and(|interest| !interest.is_allowed(op)) {
        return Outcome::Done(Err(Errno::INVAL));
    }
    let known = inner.find(fd);
    if let Some(at) = known.filter(|at| inner.hot(*at).names(slot.conn_ptr())) {
        // In the set already: the set's own reference keeps the connection.
        inner.watch(at);
        let done = inner.hot(at).control(op, interest);
        if done.is_ok() && inner.sleepers > 0 {
            // Who sleeps may have been told of what it is now to be told.
            wait::kick();
        }
        return Outcome::Done(done.map(|()| 0));
    }
    match slot.conn() {
        Some(conn) => {
            let result = set.ctl_held(&mut inner, &conn, op, fd, interest);
            Outcome::Done(result.map(|()| 0))
        }
        None => Outcome::Bypass,
    }
}

/// The kernel has done this `epoll_ctl` on a descriptor that had no connection object.
pub fn ctl_done(epfd: i32, op: i32, fd: i32, event: Option<(u32, u64)>) {
    let (Some(slot), Some(set)) = (table::followed(fd), set_of(epfd)) else { return };
    let Ok(mut inner) = set.inner.lock() else { return };
    let known = inner.find(fd).filter(|at| inner.hot(*at).names(slot.conn_ptr()));
    let Some((events, data)) = event.filter(|_| op != libc::EPOLL_CTL_DEL) else {
        inner.plain.remove(&fd);
        if known.is_some() {
            inner.remove(fd);
        }
        return;
    };
    let interest = Interest { events, data };
    match (slot.conn(), known) {
        // It has got one meanwhile, which did not know of this.
        (Some(conn), None) => {
            let _ = set.register(&mut inner, fd, &conn, interest, true);
        }
        (Some(conn), Some(at)) => {
            inner.hot(at).renew(interest);
            inner.watch(at);
            let _ = epoll::modify(set.home(&inner), conn.anchor(), anchor_data(fd), anchor_flags());
            wait::kick();
        }
        (None, _) => {
            inner.plain.insert(fd, interest);
            if slot.phase.load(Ordering::Relaxed) == table::OPENING {
                set.watch_control(&inner);
            }
        }
    }
}

impl EpollSet {
    fn new(fd: i32) -> Self {
        let bell = wait::assign_bell();
        Self {
            fd,
            bell,
            ours: AtomicBool::new(false),
            control: AtomicBool::new(false),
            spin: AtomicU32::new(wait::spin_most()),
            kernel_turn: AtomicU64::new(0),
            crowded: AtomicBool::new(false),
            inner: Mutex::new(Inner::new(bell)),
            stirred: Mutex::default(),
            stir: AtomicBool::new(false),
            is_watched: AtomicBool::new(false),
            nests: AtomicBool::new(false),
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the application's epoll descriptor; if it closes it meanwhile it gets EBADF, as from the kernel.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }

    fn watch_control(&self, inner: &Inner) {
        if let Some(control) = client::control() {
            self.becomes_ours();
            wait::watch(self.home(inner), control, TOKEN | CONTROL);
            wait::watch_kick(self.home(inner), TOKEN | KICK);
        }
    }

    fn ctl_held(
        &'static self,
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
        &'static self,
        inner: &mut Inner,
        fd: i32,
        conn: &ConnRef,
        interest: Interest,
        present: bool,
    ) -> Result<(), Errno> {
        let (data, flags) = (anchor_data(fd), anchor_flags());
        // SAFETY: the application's descriptor, in a call on it or under its table entry.
        let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
        self.settle_down(inner);
        if self.becomes_ours() {
            // The first of ours in this set: who waits there is woken as well.
            wait::watch_kick(self.home(inner), TOKEN | KICK);
            self.watch_control(inner);
        }
        let exclusive = interest.events as i32 & libc::EPOLLEXCLUSIVE != 0;
        let asked = present && interest.is_for_once() && inner.plain.len() < FIRED_MOST;
        let spent = asked && has_fired(self.fd, fd);
        if present && (exclusive || inner.nest.is_some()) {
            // What is exclusive cannot be changed.
            epoll::delete(self.as_fd(), anchor)?;
            epoll::add(self.home(inner), anchor, data, flags)?;
        } else if present {
            epoll::modify(self.as_fd(), anchor, data, flags)?;
        } else {
            epoll::add(self.home(inner), anchor, data, flags)?;
        }
        let member = conn.join(self, fd);
        let at = inner.insert(fd, conn, interest, member);
        inner.hot(at).settle(spent);
        self.hear(inner, at, conn);
        Ok(())
    }

    /// Hears the doorbell of the connection's slab.
    fn hear(&self, inner: &mut Inner, at: usize, conn: &ConnRef) {
        let (Some(bound), Some(entry)) = (conn.bound(), conn.slab()) else { return };
        bound.header().waiters[bound.side.index()].mask.fetch_or(1 << self.bell, Ordering::Relaxed);
        let (slab, new) = inner.join(at, bound, &entry, self.last_turn());
        if new {
            let home = self.home(inner);
            watch_bell(home, &entry, self.bell, slab);
            for gone in inner.sweep() {
                let _ = gone.own.get(self.bell).map(|eventfd| epoll::delete(home, eventfd));
            }
        }
        if inner.sleepers > 0 {
            wait::kick();
        }
    }

    /// A connection has changed.
    pub(super) fn stir(&self, fd: i32, serial: u32) {
        if let Ok(mut stirred) = self.stirred.lock() {
            stirred.push((fd, serial));
        }
        self.stir.store(true, Ordering::Release);
    }

    /// The set's state for a look, in which everything that has changed so far is watched.
    fn looking(&self) -> Result<MutexGuard<'_, Inner>, Errno> {
        let Ok(mut inner) = self.inner.lock() else { return Err(Errno::INTR) };
        if self.stir.load(Ordering::Relaxed) && self.stir.swap(false, Ordering::AcqRel) {
            let stirred = self.stirred.lock().map(|mut stirred| std::mem::take(&mut *stirred));
            for (fd, serial) in stirred.unwrap_or_default() {
                inner.stirred(fd, serial);
            }
        }
        if wait::is_shared() {
            inner.watch_all();
        }
        Ok(inner)
    }

    fn last_turn(&self) -> u64 {
        self.kernel_turn.load(Ordering::Relaxed)
    }

    fn harvest(&self, inner: &mut Inner, out: &mut [libc::epoll_event], asking: bool) -> usize {
        inner.harvest(out, asking, self.last_turn())
    }

    /// Takes the kernel's events: ours become edges of connections, the application's are reported.
    fn sift(&self, inner: &mut Inner, out: &mut [libc::epoll_event], n: usize) -> usize {
        let mut kept = 0;
        let nests = self.nests.load(Ordering::Relaxed);
        for i in 0..n {
            let event = out[i];
            let (data, events) = (event.u64, event.events);
            if data & TOKEN_MASK == TOKEN {
                self.take(inner, data, events);
            } else if !nests || !self.is_in_vain(inner, data) {
                out[kept] = event;
                kept += 1;
            }
        }
        kept
    }

    /// Takes an event that is ours.
    fn take(&self, inner: &mut Inner, data: u64, events: u32) {
        let number = data & !TOKEN_MASK;
        match number {
            CONTROL => self.control.store(true, Ordering::Relaxed),
            KICK => {}
            nested::HOME => self.empty_home(inner),
            BELLS..CONTROL => inner.rung((number - BELLS) as u32, self.last_turn()),
            _ => {
                let Some(at) = inner.find(number as i32) else { return };
                inner.watch(at);
                let conn = &inner.hot(at).conn;
                let bits = events as i32;
                if bits & (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) != 0 {
                    conn.kernel_in.store(1, Ordering::Release);
                }
                if bits & (libc::EPOLLOUT | libc::EPOLLHUP | libc::EPOLLERR) != 0 {
                    conn.kernel_out.store(1, Ordering::Release);
                }
            }
        }
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
    let Some(set) = set_of(epfd).filter(|s| s.concerns_us(nested::DEEPEST)) else { return Outcome::Bypass };
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
            if cancel::wanted() {
                return Err(cancel::CANCELLED);
            }
            let began = Instant::now();
            n = self.spin(out, real, zero)?;
            if n > 0 {
                return Ok(n);
            }
            // Announce, look once more, then sleep.
            let mut inner = self.looking()?;
            inner.sleepers += 1;
            inner.announce();
            let known = inner.registrations();
            inner.rest();
            drop(inner);
            client::check_mail();
            let looked = self.look(out, real, zero);
            let told = self.control.load(Ordering::Relaxed);
            if matches!(looked, Ok(0)) && !told && !cancel::wanted() {
                let left = deadline.map(|d| {
                    let left = d.saturating_duration_since(Instant::now());
                    Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
                });
                let slept = real(out, left);
                client::check_mail();
                let mut inner = self.looking()?;
                inner.sleepers -= 1;
                n = self.sift(&mut inner, out, slept?);
                let mut came = 0;
                if n > 0 && inner.registrations() != known {
                    // What the kernel has reported as the application's may have become ours since: not twice. Ours come
                    // first at the next look.
                    self.crowded.store(true, Ordering::Relaxed);
                } else {
                    let room = out.len();
                    came = self.harvest(&mut inner, &mut out[n..room], true);
                }
                drop(inner);
                if came > 0 {
                    wait::woke(&self.spin, began);
                }
                n += came;
                self.hear_control();
                if n == 0 && deadline.is_some_and(|d| d <= Instant::now()) {
                    return Ok(0);
                }
            } else {
                self.looking()?.sleepers -= 1;
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
        self.refresh_children(nested::DEEPEST);
        let mut inner = self.looking()?;
        if self.crowded.swap(false, Ordering::Relaxed) {
            let n = self.harvest(&mut inner, out, true);
            if n > 0 {
                return Ok(n);
            }
        }
        if self.kernels_turn() {
            inner.cool(self.last_turn());
        } else {
            let n = self.harvest(&mut inner, out, false);
            if n > 0 {
                return Ok(n);
            }
        }
        for _ in 0..LOOKS {
            let got = real(out, zero)?;
            let n = self.sift(&mut inner, out, got);
            self.crowded.store(n == out.len(), Ordering::Relaxed);
            let n = n + self.harvest(&mut inner, &mut out[n..], true);
            // Events of ours may have taken the room of the one that there is to report.
            if n > 0 || got < out.len() {
                return Ok(n);
            }
        }
        Ok(0)
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

    /// Whether one of those that are looked at is on a ring; and if so, whether spinning would keep its other end from
    /// running.
    fn may_spin(&self, inner: &Inner) -> Option<bool> {
        inner.watched().find(|h| h.conn.record().is(status::RX_RING | status::TX_RING))?;
        let bound = inner.watched().find_map(|h| h.conn.bound());
        Some(bound.is_some_and(|bound| wait::same_cpu(bound, self.bell)))
    }

    fn spin(
        &self,
        out: &mut [libc::epoll_event],
        real: Real<'_>,
        zero: Option<Timespec>,
    ) -> Result<usize, Errno> {
        let Some(crowded) = self.may_spin(&*self.looking()?) else { return Ok(0) };
        let mut spin = Spin::new(self.spin.load(Ordering::Relaxed), crowded);
        while spin.turn() {
            let mut inner = self.looking()?;
            let n = self.harvest(&mut inner, out, false);
            if n > 0 {
                wait::learn(&self.spin, true);
                return Ok(n);
            }
            if self.kernels_turn() {
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

/// Whether `EPOLLONESHOT` has fired for a descriptor while it was the kernel's: then the kernel lists it without events
/// (proc(5), `fdinfo`).
fn has_fired(set: i32, fd: i32) -> bool {
    if client::is_confined() {
        return false;
    }
    let Ok(info) = std::fs::read_to_string(format!("/proc/self/fdinfo/{set}")) else { return false };
    let events = info.lines().find_map(|line| {
        let mut words = line.strip_prefix("tfd:")?.split_whitespace();
        (words.next()?.parse() == Ok(fd) && words.next()? == "events:").then(|| words.next())?
    });
    let asked =
        libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLPRI | libc::EPOLLRDHUP | libc::EPOLLERR | libc::EPOLLHUP;
    events.and_then(|hex| u32::from_str_radix(hex, 16).ok()).is_some_and(|events| events & asked as u32 == 0)
}

/// Registers an anchor with a kernel's set, under its own number.
fn watch_anchor(home: BorrowedFd<'_>, anchor: BorrowedFd<'_>) -> Result<(), Errno> {
    epoll::add(home, anchor, anchor_data(anchor.as_raw_fd()), anchor_flags())
}

/// Registers a slab's bell with a kernel's set.
fn watch_bell(home: BorrowedFd<'_>, entry: &SlabEntry, bell: usize, slab: u32) {
    let Some(eventfd) = entry.own.get(bell) else { return };
    let data = epoll::EventData::new_u64(TOKEN | BELLS | u64::from(slab));
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    if epoll::add(home, eventfd, data, flags) == Err(Errno::EXIST) {
        // From a time when the slab had another number here.
        let _ = epoll::modify(home, eventfd, data, flags);
    }
}

/// What the kernel's set says of the anchor with this number.
fn anchor_data(fd: i32) -> epoll::EventData {
    epoll::EventData::new_u64(TOKEN | fd as u64)
}

fn anchor_flags() -> epoll::EventFlags {
    use epoll::EventFlags as E;
    E::IN | E::OUT | E::RDHUP | E::PRI | E::ET
}

impl AsRawFd for EpollSet {
    fn as_raw_fd(&self) -> i32 {
        self.fd
    }
}
