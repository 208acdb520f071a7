//! A connection that was opened with the agent, as this process sees it.

use super::cancel;
use super::client::SlabEntry;
use super::epoll::EpollSet;
use crate::endpoint::Endpoint;
use crate::memory::{Bound, Records};
use crate::record::Record;
use rustix::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// In nanoseconds.
const LOOKS_EVERY: u64 = 50_000;

/// A connection. The objects are pooled and never freed, so a stale pointer names at worst another connection, which
/// the table's second look finds out.
pub struct Conn {
    users: AtomicU32,
    /// 1 while in use; the one who takes it to 0 tears down.
    live: AtomicU32,
    /// A descriptor of the connection.
    pub fd: AtomicI32,
    /// How many descriptor numbers name it.
    pub names: AtomicU32,
    /// Its record.
    pub index: AtomicU32,
    record: AtomicPtr<Record>,
    bound: AtomicPtr<Bound>,
    shared: AtomicPtr<Shared>,
    /// The generation of which the agent was told that we left it.
    pub left: AtomicU32,
    /// By which attachment to an agent that one has it; 0 if none has.
    pub attended: AtomicU32,
    /// The anchor had an edge: it may be readable.
    pub kernel_in: AtomicU32,
    /// The anchor had an edge: it may be writable.
    pub kernel_out: AtomicU32,
    /// Times a send would have blocked, or took less than it was given: after each, room is a new edge.
    pub blocked: AtomicU32,
    /// Times a receiving call found nothing: what comes after each is a new edge.
    pub empty: AtomicU32,
    /// Times it was to be shut: each is an edge.
    pub shut_calls: AtomicU32,
    /// How long the next spin may be, in nanoseconds.
    pub spin: AtomicU32,
    /// When a call that does not wait last looked at the anchor.
    looked: AtomicU64,
    /// Fewer bytes are no readiness, unless they are the last (`SO_RCVLOWAT`).
    pub least: AtomicU32,
    rest: Mutex<Rest>,
    /// Its places in epoll sets.
    members: Mutex<Vec<Arc<Member>>>,
    /// How many those are, for a look without the lock.
    memberships: AtomicU32,
}

/// A connection's place in an epoll set.
pub struct Member {
    /// Which.
    pub set: &'static EpollSet,
    /// Under which descriptor number.
    pub fd: i32,
    serial: AtomicU32,
    /// The set was told of a change, and has not looked yet.
    stirred: AtomicBool,
}

impl Member {
    /// The set gives the place its number.
    pub fn settle(&self, serial: u32) {
        self.serial.store(serial, Ordering::Relaxed);
    }

    /// The set is about to look.
    pub fn seen(&self) {
        // Acquire: what changed before it was told is seen by the look.
        self.stirred.swap(false, Ordering::AcqRel);
    }

    fn stir(&self) {
        if !self.stirred.swap(true, Ordering::AcqRel) {
            self.set.stir(self.fd, self.serial.load(Ordering::Relaxed));
        }
    }
}

/// What is touched rarely.
#[derive(Default)]
struct Rest {
    records: Option<Arc<Shared>>,
    retired: Vec<*mut Bound>,
    slab: Option<Arc<SlabEntry>>,
}

/// What connections share that were opened with one agent, or with those that took over from it.
pub struct Shared {
    /// The program's records.
    pub records: Records,
    /// Their memory, for the next agent.
    pub memory: OwnedFd,
    /// The device and the number by which their memory is known.
    pub name: (u64, u64),
    /// Wakes the agent's watchdog.
    pub watchdog: OwnedFd,
}

// SAFETY: the raw pointers name boxes that only the object's owner frees, when the last user has gone.
unsafe impl Send for Rest {}

static POOL: Mutex<Vec<&'static Conn>> = Mutex::new(Vec::new());

impl Conn {
    /// A connection with this descriptor and record; one reference.
    pub fn make(fd: i32, index: u32, shared: &Arc<Shared>) -> Option<ConnRef> {
        let record = shared.records.record(index)?;
        let conn = POOL.lock().ok()?.pop().unwrap_or_else(|| Box::leak(Box::new(Self::empty())));
        conn.fd.store(fd, Ordering::Relaxed);
        conn.index.store(index, Ordering::Relaxed);
        conn.names.store(1, Ordering::Relaxed);
        conn.left.store(0, Ordering::Relaxed);
        conn.attended.store(0, Ordering::Relaxed);
        conn.least.store(1, Ordering::Relaxed);
        conn.kernel_in.store(1, Ordering::Relaxed);
        conn.kernel_out.store(1, Ordering::Relaxed);
        conn.spin.store(super::wait::spin_most(), Ordering::Relaxed);
        conn.record.store(std::ptr::from_ref(record).cast_mut(), Ordering::Relaxed);
        conn.shared.store(Arc::as_ptr(shared).cast_mut(), Ordering::Relaxed);
        conn.rest.lock().ok()?.records = Some(shared.clone());
        conn.users.fetch_add(1, Ordering::AcqRel);
        conn.live.store(1, Ordering::Release);
        Some(ConnRef(conn))
    }

    fn empty() -> Self {
        Self {
            users: AtomicU32::new(0),
            live: AtomicU32::new(0),
            fd: AtomicI32::new(-1),
            names: AtomicU32::new(0),
            index: AtomicU32::new(0),
            record: AtomicPtr::new(std::ptr::null_mut()),
            bound: AtomicPtr::new(std::ptr::null_mut()),
            shared: AtomicPtr::new(std::ptr::null_mut()),
            left: AtomicU32::new(0),
            attended: AtomicU32::new(0),
            kernel_in: AtomicU32::new(0),
            kernel_out: AtomicU32::new(0),
            blocked: AtomicU32::new(0),
            empty: AtomicU32::new(0),
            shut_calls: AtomicU32::new(0),
            spin: AtomicU32::new(0),
            looked: AtomicU64::new(0),
            least: AtomicU32::new(1),
            rest: Mutex::new(Rest::default()),
            members: Mutex::new(Vec::new()),
            memberships: AtomicU32::new(0),
        }
    }

    /// The connection gets a place in an epoll set.
    pub fn join(&self, set: &'static EpollSet, fd: i32) -> Arc<Member> {
        let (serial, stirred) = (AtomicU32::new(0), AtomicBool::new(false));
        let member = Arc::new(Member { set, fd, serial, stirred });
        if let Ok(mut members) = self.members.lock() {
            members.push(member.clone());
            self.memberships.store(members.len() as u32, Ordering::SeqCst);
        }
        member
    }

    /// It has the place no longer.
    pub fn part(&self, member: &Arc<Member>) {
        if let Ok(mut members) = self.members.lock() {
            members.retain(|other| !Arc::ptr_eq(other, member));
            self.memberships.store(members.len() as u32, Ordering::SeqCst);
        }
    }

    /// Its places in epoll sets.
    pub fn members(&self) -> Vec<Arc<Member>> {
        self.members.lock().map(|members| members.clone()).unwrap_or_default()
    }

    /// Whether it is in any epoll set.
    pub fn has_members(&self) -> bool {
        self.memberships.load(Ordering::Relaxed) != 0
    }

    /// Something has changed that neither the kernel's socket nor a bell tells: sets that hold the connection are to
    /// look at it. They are not woken.
    pub fn stir(&self) {
        if !self.has_members() {
            return;
        }
        if let Ok(members) = self.members.lock() {
            members.iter().for_each(|member| member.stir());
        }
    }

    /// Does something that may change the lane, and tells the sets if it did.
    pub fn stirring<T>(&self, act: impl FnOnce() -> T) -> T {
        let status = || self.record().status.load(Ordering::Relaxed);
        let before = status();
        let done = act();
        if status() != before {
            self.stir();
        }
        done
    }

    /// Whether a call that does not wait is to look at the anchor as well: now and then, since what ends a stay on a fabric
    /// lane comes there, and the program may never wait.
    pub fn looks_now(&self) -> bool {
        let now = super::wait::clock();
        let due = now.wrapping_sub(self.looked.load(Ordering::Relaxed)) >= LOOKS_EVERY;
        if due {
            self.looked.store(now, Ordering::Relaxed);
        }
        due
    }

    /// Whether it stands in more than one place of epoll sets.
    pub fn is_member_twice(&self) -> bool {
        self.memberships.load(Ordering::Acquire) > 1
    }

    /// The record.
    pub fn record(&self) -> &Record {
        // SAFETY: `make` stored a reference into records that `rest` keeps until the last user has gone.
        unsafe { &*self.record.load(Ordering::Relaxed) }
    }

    /// The segment of the last generation.
    pub fn bound(&self) -> Option<&Bound> {
        // SAFETY: a box that is freed only when the last user has gone; replaced ones are kept until then.
        unsafe { self.bound.load(Ordering::Acquire).as_ref() }
    }

    /// The slab entry of the last generation.
    pub fn slab(&self) -> Option<Arc<SlabEntry>> {
        self.rest.lock().ok()?.slab.clone()
    }

    /// Binds another segment. The one before is kept until the connection ends.
    pub fn bind(&self, bound: Bound, slab: Arc<SlabEntry>) {
        let Ok(mut rest) = self.rest.lock() else { return };
        let was = self.bound.swap(Box::into_raw(Box::new(bound)), Ordering::AcqRel);
        if !was.is_null() {
            rest.retired.push(was);
        }
        rest.slab = Some(slab);
    }

    /// The anchor.
    pub fn anchor(&self) -> BorrowedFd<'_> {
        // SAFETY: the application's descriptor, open while it makes calls on it. If it closes it in another thread
        // meanwhile, it gets what it would get from the kernel.
        unsafe { BorrowedFd::borrow_raw(self.fd.load(Ordering::Relaxed).max(0)) }
    }

    /// The connection in action.
    pub fn endpoint(&self) -> Endpoint<'_> {
        // SAFETY: `rest` keeps the shared part until the last user has gone, and the caller is one.
        let shared = unsafe { self.shared.load(Ordering::Relaxed).as_ref() };
        let watchdog = shared.map(|s| (s.records.header(), rustix::fd::AsFd::as_fd(&s.watchdog)));
        Endpoint { record: self.record(), anchor: self.anchor(), bound: self.bound(), watchdog }
    }

    /// The attachment that the connection belongs to.
    pub fn shared(&self) -> *const Shared {
        self.shared.load(Ordering::Relaxed)
    }

    fn tear_down(&'static self) {
        if self.live.swap(0, Ordering::AcqRel) == 0 {
            return;
        }
        let _within = cancel::Within::now();
        if let Ok(mut rest) = self.rest.lock() {
            let last = self.bound.swap(std::ptr::null_mut(), Ordering::AcqRel);
            for bound in rest.retired.drain(..).chain((!last.is_null()).then_some(last)) {
                // SAFETY: made by Box::into_raw in `bind`, taken out of the object just now, and no user is left.
                drop(unsafe { Box::from_raw(bound) });
            }
            *rest = Rest::default();
        }
        self.record.store(std::ptr::null_mut(), Ordering::Release);
        if let Ok(mut pool) = POOL.lock() {
            pool.push(self);
        }
    }
}

/// A counted reference to a connection.
pub struct ConnRef(&'static Conn);

impl ConnRef {
    /// A reference to what the table holds now.
    pub fn acquire(place: &AtomicPtr<Conn>) -> Option<Self> {
        loop {
            let pointer = place.load(Ordering::Acquire);
            // SAFETY: connection objects are never freed.
            let conn = unsafe { pointer.as_ref() }?;
            conn.users.fetch_add(1, Ordering::AcqRel);
            let held = Self(conn);
            if place.load(Ordering::Acquire) == pointer {
                return Some(held);
            }
        }
    }

    /// Gives the reference to a place in the table, which is empty.
    pub fn put(self, place: &AtomicPtr<Conn>) {
        place.store(std::ptr::from_ref(self.0).cast_mut(), Ordering::Release);
        std::mem::forget(self);
    }

    /// Takes the table's reference back.
    pub fn take(place: &AtomicPtr<Conn>) -> Option<Self> {
        let pointer = place.swap(std::ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: connection objects are never freed, and the table held a reference.
        unsafe { pointer.as_ref() }.map(Self)
    }
}

impl Clone for ConnRef {
    fn clone(&self) -> Self {
        self.0.users.fetch_add(1, Ordering::AcqRel);
        Self(self.0)
    }
}

impl std::ops::Deref for ConnRef {
    type Target = Conn;
    fn deref(&self) -> &Conn {
        self.0
    }
}

impl Drop for ConnRef {
    fn drop(&mut self) {
        if self.0.users.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.tear_down();
        }
    }
}
