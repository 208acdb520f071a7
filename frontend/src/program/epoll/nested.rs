//! A set that something else watches: another set, `poll` or `select`.
//!
//! They ask the kernel, which knows nothing of rings. So what is ours of such a set moves into a kernel's set of its own,
//! its **home**, which stands in the application's, and beside it an eventfd that is readable while one of the
//! connections is to be reported. Our calls work that out before they ask the kernel ([`refresh`]). Whoever sleeps in the
//! kernel is woken by the slabs' bells, which are announced for good, and by the anchors' edges: maybe in vain, which our
//! calls find out.

use super::hot::Interest;
use super::inner::Inner;
use super::{EpollSet, KICK, TOKEN, each_set, set_of};
use crate::program::client;
use crate::program::descriptors::lift;
use crate::program::{table, wait};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};

/// How deep sets may stand in sets (`epoll_ctl(2)`, ELOOP).
pub(super) const DEEPEST: u32 = 5;
/// How often a set is looked at again while edges come that make it look ready.
pub(in crate::program) const LOOKS: u32 = 8;
/// What the application's set says of the home.
pub(super) const HOME: u64 = 0xffff_fffd;
/// What the home says of the eventfd.
const READY: u64 = 0xffff_fffc;

/// Of a set that is watched.
pub(super) struct Nest {
    home: OwnedFd,
    ready: OwnedFd,
    raised: bool,
}

impl Nest {
    /// With the set as it is, in which nothing of ours is yet.
    fn new(set: BorrowedFd<'_>) -> Result<Self, Errno> {
        let home = lift(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let ready = lift(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        epoll::add(&home, &ready, epoll::EventData::new_u64(TOKEN | READY), epoll::EventFlags::IN)?;
        epoll::add(set, &home, epoll::EventData::new_u64(TOKEN | HOME), epoll::EventFlags::IN)?;
        Ok(Self { home, ready, raised: false })
    }

    /// Readable, and not because one of ours is to be reported.
    fn is_edged(&self) -> bool {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let asked = &mut [PollFd::new(&self.home, PollFlags::IN)];
        !self.raised && rustix::event::poll(asked, Some(&zero)).is_ok_and(|n| n > 0)
    }

    /// Shows the kernel whether one of ours is to be reported.
    pub(super) fn show(&mut self, is_ready: bool) {
        if std::mem::replace(&mut self.raised, is_ready) == is_ready {
            return;
        }
        if is_ready {
            let _ = rustix::io::write(&self.ready, &1u64.to_ne_bytes());
        } else {
            let _ = rustix::io::read(&self.ready, &mut [0; 8]);
        }
    }
}

impl AsRawFd for Nest {
    fn as_raw_fd(&self) -> i32 {
        self.home.as_raw_fd()
    }
}

/// A set within a set.
pub(super) struct Child {
    fd: i32,
    set: &'static EpollSet,
    interest: Interest,
}

/// `epoll_ctl` of a descriptor that is a set itself: it is remembered, and the call must be made as well.
pub(super) fn ctl(set: &EpollSet, op: i32, fd: i32, child: &'static EpollSet, interest: Option<Interest>) {
    if child.reaches(set, DEEPEST) {
        // A circle, which the kernel refuses; looks through it would not end.
        return;
    }
    let Ok(mut inner) = set.inner.lock() else { return };
    inner.children.retain(|c| c.fd != fd || op == libc::EPOLL_CTL_ADD && std::ptr::eq(c.set, child));
    let Some(interest) = interest else { return };
    match inner.children.iter_mut().find(|c| c.fd == fd) {
        // Refused by the kernel, as it is there.
        Some(_) => {}
        None => inner.children.push(Child { fd, set: child, interest }),
    }
    set.comes_to(&set.nests);
    drop(inner);
    child.is_watched.store(true, Ordering::Release);
    child.refresh(DEEPEST);
}

/// A set has been closed.
pub(super) fn closed(set: &EpollSet) {
    each_set(|_, mut inner| inner.children.retain(|child| !std::ptr::eq(child.set, set)));
}

/// Whether a descriptor is a set whose readiness the kernel may not know; from now on it is taken to be watched.
pub fn is_set_of_ours(fd: i32) -> bool {
    let Some(set) = set_of(fd) else { return false };
    set.is_watched.store(true, Ordering::Release);
    let is_ours = set.concerns_us(DEEPEST);
    if !is_ours {
        set.pass_over();
    }
    is_ours
}

/// Whether the kernel may take the set to be ready only because of edges that nobody has looked after.
pub fn is_edged(fd: i32) -> bool {
    set_of(fd).is_some_and(|set| set.is_edged(DEEPEST))
}

/// Shows the kernel whether the set has something of ours to report, if the descriptor is a set.
pub fn refresh(fd: i32) {
    if let Some(set) = set_of(fd) {
        set.refresh(DEEPEST);
    }
}

impl EpollSet {
    /// Something of ours is in it from now on. Whether that is new.
    pub(super) fn becomes_ours(&self) -> bool {
        self.comes_to(&self.ours)
    }

    /// Something is true of it from now on for which whoever polls it is to ask us. Whether that is new.
    fn comes_to(&self, what: &AtomicBool) -> bool {
        let new = !what.swap(true, Ordering::SeqCst);
        if let Some(slot) = table::slot(self.fd).filter(|_| new) {
            slot.seen();
        }
        new
    }

    /// Known to be watched, and with nothing for which to ask us, it is any other's descriptor in a list until that comes.
    fn pass_over(&self) {
        let Some(slot) = table::slot(self.fd) else { return };
        slot.unseen(|| {
            let asked = self.ours.load(Ordering::SeqCst) || self.nests.load(Ordering::SeqCst);
            asked || !std::ptr::eq(slot.epoll.load(Ordering::SeqCst), self)
        });
    }

    /// Whether it has connections of ours, or a set that has.
    pub(super) fn concerns_us(&self, deepest: u32) -> bool {
        self.ours.load(Ordering::Acquire)
            || deepest > 0 && self.children().iter().any(|child| child.concerns_us(deepest - 1))
    }

    /// Whether the other is this one, or is in it.
    fn reaches(&self, other: &EpollSet, deepest: u32) -> bool {
        std::ptr::eq(self, other)
            || deepest > 0 && self.children().iter().any(|child| child.reaches(other, deepest - 1))
    }

    fn children(&self) -> Vec<&'static EpollSet> {
        if !self.nests.load(Ordering::Acquire) {
            return Vec::new();
        }
        self.inner.lock().map_or_else(|_| Vec::new(), |inner| inner.children.iter().map(|c| c.set).collect())
    }

    /// The kernel's set with what is ours.
    pub(super) fn home(&self, inner: &Inner) -> BorrowedFd<'_> {
        match &inner.nest {
            // SAFETY: it is closed only when the set is, under the lock of `inner`, which the caller has.
            Some(nest) => unsafe { BorrowedFd::borrow_raw(nest.as_raw_fd()) },
            None => self.as_fd(),
        }
    }

    /// Shows the kernel what the sets in it have, then what it has itself.
    fn refresh(&self, deepest: u32) {
        self.refresh_children(deepest);
        if !self.ours.load(Ordering::Acquire) {
            return;
        }
        let Ok(mut inner) = self.looking() else { return };
        self.settle_down(&mut inner);
        self.empty_home(&mut inner);
        // Announced before the look: what comes later rings.
        inner.announce();
        let is_ready = inner.peek(self.last_turn());
        if let Some(nest) = &mut inner.nest {
            nest.show(is_ready);
        }
        drop(inner);
        self.hear_control();
    }

    /// Shows the kernel what the sets in it have.
    pub(super) fn refresh_children(&self, deepest: u32) {
        if deepest > 0 {
            self.children().iter().for_each(|child| child.refresh(deepest - 1));
        }
    }

    /// Whether the set has something to report, its own or ours, as far as can be told.
    fn is_ready(&self) -> bool {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        for _ in 0..LOOKS {
            self.refresh(DEEPEST);
            let asked = &mut [PollFd::from_borrowed_fd(self.as_fd(), PollFlags::IN)];
            if rustix::event::poll(asked, Some(&zero)) == Ok(0) {
                return false;
            }
            if !self.is_edged(DEEPEST) {
                break;
            }
        }
        true
    }

    fn is_edged(&self, deepest: u32) -> bool {
        let own = self.inner.lock().is_ok_and(|inner| inner.nest.as_ref().is_some_and(Nest::is_edged));
        own || deepest > 0 && self.children().iter().any(|child| child.is_edged(deepest - 1))
    }

    /// What is ours moves into a home, if somebody watches the set.
    pub(super) fn settle_down(&self, inner: &mut Inner) {
        if inner.nest.is_some() || !self.is_watched.load(Ordering::Acquire) {
            return;
        }
        let Ok(nest) = Nest::new(self.as_fd()) else { return };
        for anchor in inner.anchors() {
            // SAFETY: the application's descriptor, under its entry in the set.
            let anchor = unsafe { BorrowedFd::borrow_raw(anchor) };
            let _ = epoll::delete(self.as_fd(), anchor);
            let _ =
                epoll::add(&nest.home, anchor, super::anchor_data(anchor.as_raw_fd()), super::anchor_flags());
        }
        for (slab, entry) in inner.entries() {
            if let Some(eventfd) = entry.own.get(self.bell) {
                let _ = epoll::delete(self.as_fd(), eventfd);
            }
            super::watch_bell(nest.home.as_fd(), &entry, self.bell, slab);
        }
        if let Some(control) = client::control() {
            let _ = epoll::delete(self.as_fd(), control);
        }
        wait::unwatch_kick(self.as_fd());
        wait::watch_kick(&nest.home, TOKEN | KICK);
        // Whoever watches sleeps, for all we know.
        inner.sleepers += 1;
        inner.nest = Some(nest);
        self.watch_control(inner);
        inner.announce();
    }

    /// Takes what the home has.
    pub(super) fn empty_home(&self, inner: &mut Inner) {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let home = self.home(inner);
        while inner.nest.is_some() {
            let mut space = [std::mem::MaybeUninit::uninit(); 32];
            let Ok((fired, rest)) = epoll::wait(home, &mut space, Some(&zero)) else { return };
            for event in fired.iter().filter(|event| event.data.u64() != TOKEN | READY) {
                let (data, flags) = (event.data.u64(), event.flags);
                self.take(inner, data, flags.bits());
            }
            if !rest.is_empty() {
                return;
            }
        }
    }

    /// Whether an event of the kernel's is of a set in this one that has nothing to report after all.
    pub(super) fn is_in_vain(&self, inner: &Inner, data: u64) -> bool {
        let mut children = inner.children.iter().filter(|child| child.interest.data == data);
        let (Some(child), None) = (children.next(), children.next()) else { return false };
        if !child.set.concerns_us(DEEPEST) {
            return false;
        }
        if child.set.is_ready() {
            return false;
        }
        if child.interest.events as i32 & libc::EPOLLONESHOT != 0 {
            let flags = epoll::EventFlags::from_bits_retain(child.interest.events);
            let _ = epoll::modify(self.as_fd(), child.set.as_fd(), epoll::EventData::new_u64(data), flags);
        }
        true
    }
}

/// All tokens of this module stand above the slabs'.
const _: () = assert!(READY < HOME && HOME < super::CONTROL && super::CONTROL < KICK);

#[cfg(test)]
mod tests {
    use super::super::{closed_set, created};
    use super::*;

    #[test]
    fn a_set_is_asked_about_until_it_is_known_to_have_nothing_of_ours_and_again_when_it_has() {
        let sets = [(); 2].map(|()| lift(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap()));
        let [outer, fd] = [0, 1].map(|n: usize| sets[n].as_raw_fd());
        [outer, fd].into_iter().for_each(created);
        let listed = |fd: i32| table::may_follow_any(&[libc::pollfd { fd, events: 0, revents: 0 }; 5]);
        assert!(listed(fd), "it does not know yet that it is watched");
        assert!(!is_set_of_ours(fd) && !listed(fd));
        assert!(set_of(fd).unwrap().becomes_ours() && listed(fd));
        assert!(is_set_of_ours(fd) && listed(fd));
        assert!(!is_set_of_ours(outer) && !listed(outer));
        let interest = Some(Interest { events: 1, data: 2 });
        ctl(set_of(outer).unwrap(), libc::EPOLL_CTL_ADD, fd, set_of(fd).unwrap(), interest);
        assert!(listed(outer) && is_set_of_ours(outer) && listed(outer));
        closed_set(fd);
        assert!(!listed(fd));
        assert!(!is_set_of_ours(outer) && listed(outer), "another may come into it");
        closed_set(outer);
    }
}
