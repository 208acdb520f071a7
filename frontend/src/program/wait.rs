//! How a thread waits: spin while it pays, announce the sleep, look once more, then block in the kernel.
//!
//! A thread that must block takes a [`Waiter`] from a pool for as long as it sleeps: an epoll descriptor that watches
//! the slabs' doorbells and the control socket, edge-triggered, so that nobody drains an eventfd that another needs.

use super::client::{self, SlabEntry};
use super::conn::Conn;
use super::descriptors::lift;
use crate::kernel;
use crate::memory::{Bound, stream_ring};
use crate::record::status;
use rustix::event::epoll;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use vsocket_channel::layout::BELLS;

/// Longest spin, in nanoseconds: longer adds little, as what it saves is a wake-up across cores.
const SPIN_MAX: u32 = 50_000;
/// And where doorbells are streams of a virtual machine's device, so many times what it takes to ring one, as the way of a
/// ring to a sleeper is longer: two processes of the host, an interrupt of the guest and a thread of its kernel. What runs
/// meanwhile on the guest's processor is nobody else. On an emulated processor a redis of 1 connection across hosts had
/// 0.7 ms a request with a spin of 5 ms each time, and with 2 ms now 0.7 and now 2.9, where every message met a sleeper.
const SPIN_STREAM_RINGS: u32 = 32;
/// But no longer, in nanoseconds.
const SPIN_MAX_STREAM: u32 = 5_000_000;
/// Whether doorbells are streams.
static STREAMS: AtomicBool = AtomicBool::new(false);
/// Shortest spin.
const SPIN_MIN: u32 = 2_000;
/// Pure spinning before the processor is offered to others.
const PAUSE: Duration = Duration::from_micros(4);

/// How many waiters of this process use each doorbell number.
static WAITERS: [AtomicU32; BELLS] = [const { AtomicU32::new(0) }; BELLS];
/// After a fork two processes share the doorbells.
static SHARED: AtomicBool = AtomicBool::new(false);

/// From now on no waiter is alone on its bell.
pub fn shared_by_fork() {
    SHARED.store(true, Ordering::Relaxed);
}

/// Whether another process may share this one's waiters.
pub fn is_shared() -> bool {
    SHARED.load(Ordering::Relaxed)
}

/// The longest spin, in nanoseconds.
pub fn spin_most() -> u32 {
    if !STREAMS.load(Ordering::Relaxed) {
        return SPIN_MAX;
    }
    stream_ring().saturating_mul(SPIN_STREAM_RINGS).clamp(SPIN_MAX, SPIN_MAX_STREAM)
}

/// A slab's doorbells are streams, so this is a virtual machine.
pub fn doorbells_are_streams() {
    STREAMS.store(true, Ordering::Relaxed);
}

/// The doorbell number for a new waiter: the one with the fewest.
pub fn assign_bell() -> usize {
    let n = (0..BELLS).min_by_key(|n| WAITERS[*n].load(Ordering::Relaxed)).unwrap_or(0);
    WAITERS[n].fetch_add(1, Ordering::Relaxed);
    n
}

/// A waiter has ended.
pub fn return_bell(n: usize) {
    WAITERS[n].fetch_sub(1, Ordering::Relaxed);
}

/// Announces on a slab's bell that a waiter of this side goes to sleep.
pub fn announce(bound: &Bound, bell: usize) {
    let mask = &bound.header().waiters[bound.side.index()].mask;
    let bit = 1 << bell;
    if mask.load(Ordering::Relaxed) & bit == 0 {
        mask.fetch_or(bit, Ordering::Relaxed);
    }
    bound.slab.bells(bound.side)[bell].announce();
}

/// Takes the announcement back.
pub fn awake(bound: &Bound, bell: usize) {
    bound.slab.bells(bound.side)[bell].awake(is_alone(bell));
}

/// Whether only one waiter of this side uses the bell.
pub fn is_alone(bell: usize) -> bool {
    WAITERS[bell].load(Ordering::Relaxed) == 1 && !is_shared()
}

fn current_cpu() -> u32 {
    rustix::thread::sched_getcpu() as u32 + 1
}

/// Tells the far side on which processor this waiter runs; whether the far side's waiters run on the same.
pub fn same_cpu(bound: &Bound, bell: usize) -> bool {
    let cpu = current_cpu();
    let own = &bound.slab.bells(bound.side)[bell].cpu;
    if own.load(Ordering::Relaxed) != cpu {
        own.store(cpu, Ordering::Relaxed);
    }
    let far = bound.side.other();
    let mask = bound.header().waiters[far.index()].mask.load(Ordering::Relaxed);
    let bells = bound.slab.bells(far).iter().enumerate();
    bells.filter(|(n, _)| mask & (1 << n) != 0).any(|(_, b)| b.cpu.load(Ordering::Relaxed) == cpu)
}

/// One bounded spin.
pub struct Spin {
    began: Instant,
    polls: u32,
    budget: Duration,
    yielding: bool,
}

impl Spin {
    /// A spin of at most `budget` nanoseconds. `crowded` says that spinning would keep the other side from running.
    pub fn new(budget: u32, crowded: bool) -> Self {
        Self {
            began: Instant::now(),
            polls: 0,
            budget: Duration::from_nanos(u64::from(budget)),
            // Where nobody else runs meanwhile, spinning without offering the processor is in vain.
            yielding: crowded || kernel::one_processor(),
        }
    }

    /// Waits a moment; false when the spin is over.
    pub fn turn(&mut self) -> bool {
        self.polls += 1;
        if !self.yielding {
            if self.polls & 31 == 0 && self.began.elapsed() > PAUSE {
                self.yielding = true;
            }
            std::hint::spin_loop();
            return true;
        }
        rustix::thread::sched_yield();
        self.began.elapsed() < self.budget
    }
}

/// What the next spin may cost, learnt from whether this one paid.
pub fn learn(spin: &AtomicU32, paid: bool) {
    let was = spin.load(Ordering::Relaxed);
    let next = if paid { (was * 2).min(spin_most()) } else { (was / 2).max(SPIN_MIN) };
    if next != was {
        spin.store(next, Ordering::Relaxed);
    }
}

/// A sleep has ended by what came on a ring, that followed a spin in vain begun then. In a machine, where it would have been
/// met by a longer one, the next is longer, as a hypervisor polls longer for a processor that has halted for a moment only.
/// A sleep that ended by something else, a timer say, teaches nothing: no spin would have met that.
pub fn woke(spin: &AtomicU32, began: Instant) {
    relearn(spin, began.elapsed(), spin_most());
}

fn relearn(spin: &AtomicU32, slept: Duration, most: u32) {
    if most > SPIN_MAX && slept < Duration::from_nanos(u64::from(most)) {
        let was = spin.load(Ordering::Relaxed);
        spin.store((was * 8).min(most), Ordering::Relaxed);
    }
}

/// Wakes every sleeping thread and set of this process. Watched edge-triggered, so it is never drained.
static KICK: OnceLock<Option<OwnedFd>> = OnceLock::new();

fn kick_fd() -> Option<&'static OwnedFd> {
    let make = || {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let fd = rustix::event::eventfd(0, flags).ok()?;
        Some(lift(fd))
    };
    KICK.get_or_init(make).as_ref()
}

/// Wakes everybody who sleeps in this process, to look again.
pub fn kick() {
    if let Some(fd) = kick_fd() {
        let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
    }
}

/// This thread has read that the far end left: a thread that sleeps for room in our ring must look elsewhere for it.
pub fn kick_if_left(conn: &Conn, was_on_ring: bool) {
    if was_on_ring && !conn.record().is(status::TX_RING) {
        conn.stir();
        kick();
    }
}

/// Adds the kick to a set.
pub fn watch_kick(set: impl AsFd, data: u64) {
    if let Some(fd) = kick_fd() {
        watch(set, fd, data);
    }
}

/// Takes the kick out of a set.
pub fn unwatch_kick(set: impl AsFd) {
    if let Some(fd) = kick_fd() {
        let _ = epoll::delete(set, fd);
    }
}

/// What a waiter's set says of the control socket.
const CONTROL: u64 = 1;

/// What a sleeping thread uses.
pub struct Waiter {
    set: OwnedFd,
    /// Its doorbell number.
    pub bell: usize,
    /// Slabs whose doorbell the set watches, by their address.
    slabs: Mutex<HashMap<usize, Arc<SlabEntry>>>,
    /// Which control socket the set watches; a closed one has left it by itself.
    control: AtomicU32,
}

static POOL: Mutex<Vec<Waiter>> = Mutex::new(Vec::new());

/// A waiter for as long as the thread sleeps.
pub struct Asleep(Option<Waiter>);

impl Asleep {
    /// Takes a waiter from the pool.
    pub fn take() -> Option<Self> {
        let pooled = POOL.lock().ok()?.pop();
        let waiter = match pooled {
            Some(waiter) => waiter,
            None => Waiter::new()?,
        };
        waiter.watch_control();
        Some(Self(Some(waiter)))
    }
}

impl std::ops::Deref for Asleep {
    type Target = Waiter;
    fn deref(&self) -> &Waiter {
        self.0.as_ref().unwrap_or_else(|| unreachable!("taken only in drop"))
    }
}

impl Drop for Asleep {
    fn drop(&mut self) {
        if let (Some(waiter), Ok(mut pool)) = (self.0.take(), POOL.lock()) {
            pool.push(waiter);
        }
    }
}

/// Adds a descriptor to an epoll set, edge-triggered.
pub fn watch(set: impl AsFd, fd: impl AsFd, data: u64) -> bool {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    let added = epoll::add(set, fd, epoll::EventData::new_u64(data), flags);
    matches!(added, Ok(()) | Err(rustix::io::Errno::EXIST))
}

impl Waiter {
    fn new() -> Option<Self> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).ok()?;
        let set = lift(set);
        watch_kick(&set, 0);
        let bell = assign_bell();
        Some(Self { set, bell, slabs: Mutex::default(), control: AtomicU32::new(0) })
    }

    fn watch_control(&self) {
        let epoch = client::control_epoch();
        if self.control.swap(epoch, Ordering::Relaxed) != epoch {
            if let Some(control) = client::control() {
                watch(&self.set, control, CONTROL);
            }
        }
    }

    /// Watches the doorbell of the connection's slab.
    pub fn watch_slab(&self, conn: &Conn) {
        let (Some(entry), Ok(mut slabs)) = (conn.slab(), self.slabs.lock()) else { return };
        let name = Arc::as_ptr(&entry) as usize;
        if slabs.contains_key(&name) {
            return;
        }
        if slabs.len() >= 32 {
            slabs.retain(|_, s| Arc::strong_count(s) > 2);
        }
        if let Some(eventfd) = entry.own.get(self.bell) {
            watch(&self.set, eventfd, 0);
        }
        slabs.insert(name, entry);
    }

    /// The descriptor to poll beside the application's.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.set.as_fd()
    }

    /// Takes the edges that have fired, and reads what the agent has said: its end is no message, only an edge.
    pub fn settle(&self) {
        let mut events = [std::mem::MaybeUninit::uninit(); 16];
        let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok((fired, _)) = epoll::wait(&self.set, &mut events, Some(&zero)) else { return };
        if fired.iter().any(|e| e.data.u64() == CONTROL) {
            client::read_mail();
        }
    }
}

/// Nanoseconds of the monotonic clock.
pub fn clock() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_spins_longer_after_a_sleep_that_a_spin_would_have_met() {
        let (micro, most) = (Duration::from_micros(1), 2_000_000);
        let spin = AtomicU32::new(SPIN_MIN);
        relearn(&spin, micro * 2000, most);
        assert_eq!(spin.load(Ordering::Relaxed), SPIN_MIN, "too long for any spin");
        relearn(&spin, micro * 1999, most);
        assert_eq!(spin.load(Ordering::Relaxed), SPIN_MIN * 8);
        (0..8).for_each(|_| relearn(&spin, micro, most));
        assert_eq!(spin.load(Ordering::Relaxed), most);
        let spin = AtomicU32::new(SPIN_MIN);
        relearn(&spin, micro, SPIN_MAX);
        assert_eq!(spin.load(Ordering::Relaxed), SPIN_MIN, "no machine");
    }

    #[test]
    fn learns_from_spins() {
        let spin = AtomicU32::new(SPIN_MAX / 2);
        learn(&spin, true);
        learn(&spin, true);
        assert_eq!(spin.load(Ordering::Relaxed), SPIN_MAX);
        (0..32).for_each(|_| learn(&spin, false));
        assert_eq!(spin.load(Ordering::Relaxed), SPIN_MIN);
    }
}
