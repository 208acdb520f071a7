//! What a set holds, and what of it is looked at.
//!
//! A look visits only the connections that are **watched**, so that its cost follows those that do something. A
//! connection is left out of the looks after one that found nothing, if whatever changes that is sure to be heard of:
//!
//! | what may make it ready | is heard by |
//! |---|---|
//! | the far end: bytes, room, an end | the slab's bell, if its announcement stood before that look |
//! | the kernel's socket | its edge, which the kernel's set reports |
//! | the application: `epoll_ctl`, a call that blocked or changed the lane; the agent | [`Conn::stir`] |
//!
//! So a slab is **warm**, and all its connections are watched, or **cold**, and its announcement stands since before the
//! last look at each that is not. Cold ones become warm when the bell rings.
//!
//! [`Conn::stir`]: super::super::conn::Conn::stir

use super::super::client::SlabEntry;
use super::super::conn::{ConnRef, Member};
use super::super::wait;
use super::NOWHERE;
use super::hot::{Hot, Interest};
use super::nested::{Child, Nest};
use crate::memory::Bound;
use rustix::fd::{AsRawFd, OwnedFd};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use vsocket_channel::Side;
use vsocket_channel::layout::Bell;

/// A slab in which nothing was ready for so long, in nanoseconds, turns cold also in a set that never sleeps.
const COOL: u64 = 1_000_000;

/// A slab whose doorbells the set hears.
struct Heard {
    entry: Arc<SlabEntry>,
    /// On which side of it, or both, the set's connections are.
    sides: [bool; 2],
    /// Their descriptors.
    members: Vec<i32>,
    warm: bool,
    /// When something in it was last ready.
    worked: u64,
}

impl Heard {
    fn each_bell(&self, bell: usize, f: impl Fn(&Bell)) {
        for side in [Side::Zero, Side::One].into_iter().filter(|side| self.sides[side.index()]) {
            f(&self.entry.slab.bells(side)[bell]);
        }
    }
}

/// See the module.
pub(super) struct Inner {
    /// The set's doorbell number.
    bell: usize,
    /// Followed descriptors that are registered as the application asked.
    pub plain: HashMap<i32, Interest>,
    hot: Vec<Hot>,
    /// Where a descriptor stands in `hot`, by its number; `NOWHERE` if it does not.
    index: Vec<u32>,
    serial: u32,
    /// Descriptors that are looked at, by turns, with their serial numbers.
    watched: VecDeque<(i32, u32)>,
    slabs: Vec<Option<Heard>>,
    by_entry: HashMap<usize, u32>,
    warm: Vec<u32>,
    /// Threads between their announcement and their waking; and who watches a set that has a nest.
    pub sleepers: u32,
    /// What the kernel is shown, if something else watches the set.
    pub nest: Option<Nest>,
    /// Sets in it.
    pub children: Vec<Child>,
}

impl Inner {
    pub fn new(bell: usize) -> Self {
        Self {
            bell,
            plain: HashMap::new(),
            hot: Vec::new(),
            index: Vec::new(),
            serial: 0,
            watched: VecDeque::new(),
            slabs: Vec::new(),
            by_entry: HashMap::new(),
            warm: Vec::new(),
            sleepers: 0,
            nest: None,
            children: Vec::new(),
        }
    }

    // ---- connections -----------------------------------------------------------------------------------------------

    pub fn find(&self, fd: i32) -> Option<usize> {
        let at = *self.index.get(usize::try_from(fd).ok()?)?;
        (at != NOWHERE).then_some(at as usize)
    }

    pub fn hot(&mut self, at: usize) -> &mut Hot {
        &mut self.hot[at]
    }

    /// Takes a connection in; it is watched.
    pub fn insert(&mut self, fd: i32, conn: &ConnRef, interest: Interest, member: Arc<Member>) -> usize {
        let at = self.hot.len();
        self.serial = self.serial.wrapping_add(1);
        self.hot.push(Hot::new(fd, conn, interest, self.serial, member));
        self.place(fd, at as u32);
        self.watch(at);
        at
    }

    /// How many connections have been taken in so far: tells whether one was since.
    pub fn registrations(&self) -> u32 {
        self.serial
    }

    fn place(&mut self, fd: i32, at: u32) {
        let fd = fd as usize;
        if self.index.len() <= fd {
            self.index.resize(fd + 1, NOWHERE);
        }
        self.index[fd] = at;
    }

    pub fn remove(&mut self, fd: i32) -> bool {
        let Some(at) = self.find(fd) else { return false };
        self.part(at);
        self.place(fd, NOWHERE);
        self.hot.swap_remove(at);
        if let Some(moved) = self.hot.get(at).map(|h| h.fd) {
            self.place(moved, at as u32);
        }
        true
    }

    /// A connection goes on under another number, which is ours.
    pub fn rename(&mut self, at: usize, twin: OwnedFd, member: Arc<Member>) {
        let (was, is) = (self.hot[at].fd, twin.as_raw_fd());
        self.place(was, NOWHERE);
        self.place(is, at as u32);
        let slab = self.hot[at].slab;
        if let Some(heard) = self.heard(slab) {
            heard.members.iter_mut().filter(|fd| **fd == was).for_each(|fd| *fd = is);
        }
        self.hot[at].rename(twin, member);
        self.watch(at);
    }

    /// A connection may be ready.
    pub fn watch(&mut self, at: usize) {
        let hot = &mut self.hot[at];
        if !std::mem::replace(&mut hot.watched, true) {
            self.watched.push_back((hot.fd, hot.serial));
        }
    }

    /// A connection has changed otherwise than by the kernel and the far end.
    pub fn stirred(&mut self, fd: i32, serial: u32) {
        if let Some(at) = self.find(fd).filter(|at| self.hot[*at].serial == serial) {
            // Before the look that follows: what changes during it is told again.
            self.hot[at].member.seen();
            self.watch(at);
        }
    }

    /// All descriptors of connections.
    pub fn anchors(&self) -> Vec<i32> {
        self.hot.iter().map(|hot| hot.fd).collect()
    }

    /// All slabs that it hears, with their numbers.
    pub fn entries(&self) -> Vec<(u32, Arc<SlabEntry>)> {
        let slabs = (0..).zip(&self.slabs);
        slabs.filter_map(|(n, heard)| Some((n, heard.as_ref()?.entry.clone()))).collect()
    }

    /// The connections that are looked at.
    pub fn watched(&self) -> impl Iterator<Item = &Hot> {
        let at = |(fd, serial): &(i32, u32)| {
            let hot = &self.hot[self.find(*fd)?];
            (hot.serial == *serial).then_some(hot)
        };
        self.watched.iter().filter_map(at)
    }

    /// Where each process of several may take what was meant for another, everything is looked at.
    pub fn watch_all(&mut self) {
        (0..self.hot.len()).for_each(|at| self.watch(at));
        (0..self.slabs.len() as u32).for_each(|slab| self.warm(slab));
    }

    /// Reports what is ready among the watched, and leaves those out of the next look that need it no more. `now` need
    /// not be exact.
    pub fn harvest(&mut self, out: &mut [libc::epoll_event], asking: bool, now: u64) -> usize {
        let mut n = 0;
        self.visit(out.len(), now, |hot| {
            let event = hot.event(asking);
            if let Some(event) = event {
                out[n] = event;
                n += 1;
            }
            event.is_some()
        });
        n
    }

    /// Whether one of the watched is to be reported, which it stays.
    pub fn peek(&mut self, now: u64) -> bool {
        self.visit(1, now, Hot::peek) > 0
    }

    /// A look has found nothing: whoever watches the set is told so.
    pub fn rest(&mut self) {
        if let Some(nest) = &mut self.nest {
            nest.show(false);
        }
    }

    /// Looks at the watched until so many are ready, and leaves those out of the next look that need it no more.
    fn visit(&mut self, most: usize, now: u64, mut is_ready: impl FnMut(&mut Hot) -> bool) -> usize {
        let mut n = 0;
        for _ in 0..self.watched.len() {
            if n == most {
                break;
            }
            let Some((fd, serial)) = self.watched.pop_front() else { break };
            let Some(at) = self.find(fd).filter(|at| self.hot[*at].serial == serial) else { continue };
            let hot = &mut self.hot[at];
            let slab = hot.slab;
            let ready = is_ready(hot);
            let stays = ready || hot.is_open() || self.is_warm(slab);
            self.hot[at].watched = stays;
            if stays {
                // Last, so that none is starved where there is no room for all.
                self.watched.push_back((fd, serial));
            }
            if ready {
                n += 1;
                self.worked(slab, now);
            }
        }
        n
    }

    // ---- slabs -----------------------------------------------------------------------------------------------------

    fn heard(&mut self, slab: u32) -> Option<&mut Heard> {
        self.slabs.get_mut(slab as usize)?.as_mut()
    }

    fn is_warm(&self, slab: u32) -> bool {
        self.slabs.get(slab as usize).and_then(Option::as_ref).is_some_and(|heard| heard.warm)
    }

    fn warm(&mut self, slab: u32) {
        let Some(heard) = self.heard(slab).filter(|heard| !heard.warm) else { return };
        heard.warm = true;
        self.warm.push(slab);
        self.watch_members(slab);
    }

    fn watch_members(&mut self, slab: u32) {
        for n in 0.. {
            let Some(fd) = self.heard(slab).and_then(|heard| heard.members.get(n).copied()) else { return };
            if let Some(at) = self.find(fd) {
                self.watch(at);
            }
        }
    }

    /// Something in a slab is ready. It will be looked at again, so nobody across need ring, if nobody sleeps on it.
    fn worked(&mut self, slab: u32, now: u64) {
        let (bell, recall) = (self.bell, self.sleepers == 0 && wait::is_alone(self.bell));
        let Some(heard) = self.heard(slab) else { return };
        heard.worked = now;
        if recall && !heard.warm {
            heard.each_bell(bell, |bell| bell.awake(true));
            self.warm(slab);
        }
    }

    /// A slab's bell has rung: its announcement is taken.
    pub fn rung(&mut self, slab: u32, now: u64) {
        let (bell, sleepers) = (self.bell, self.sleepers);
        let Some(heard) = self.heard(slab) else { return };
        heard.worked = now;
        if sleepers > 0 {
            // The edge that would have woken a sleeper, maybe this thread in a moment, is spent. What was published is
            // looked at after this.
            heard.each_bell(bell, Bell::announce);
            self.watch_members(slab);
        } else {
            self.warm(slab);
        }
    }

    /// Announces on the bells of warm slabs, which turn cold: before a thread sleeps.
    pub fn announce(&mut self) {
        self.announce_if(|_| true);
    }

    /// Lets slabs turn cold in which nothing was ready for a while.
    pub fn cool(&mut self, now: u64) {
        self.announce_if(|heard| now.wrapping_sub(heard.worked) >= COOL);
    }

    fn announce_if(&mut self, which: impl Fn(&Heard) -> bool) {
        let Self { warm, slabs, bell, .. } = self;
        warm.retain(|slab| {
            let Some(heard) = slabs[*slab as usize].as_mut() else { return false };
            heard.warm = !which(heard);
            if !heard.warm {
                heard.each_bell(*bell, Bell::announce);
            }
            heard.warm
        });
    }

    /// The slabs that are in use by nobody any more, with which the set has done.
    pub fn sweep(&mut self) -> Vec<Arc<SlabEntry>> {
        let unused = |heard: &mut Heard| heard.members.is_empty() && Arc::strong_count(&heard.entry) <= 2;
        let gone: Vec<Heard> = self.slabs.iter_mut().filter_map(|slab| slab.take_if(unused)).collect();
        for heard in &gone {
            self.by_entry.remove(&name(&heard.entry));
        }
        let slabs = &self.slabs;
        self.warm.retain(|slab| slabs[*slab as usize].is_some());
        gone.into_iter().map(|heard| heard.entry).collect()
    }

    /// Puts a connection with its slab: the slab's number, and whether it is new to the set.
    pub fn join(&mut self, at: usize, bound: &Bound, entry: &Arc<SlabEntry>, now: u64) -> (u32, bool) {
        self.part(at);
        let known = self.by_entry.get(&name(entry)).copied();
        let slab = known.unwrap_or_else(|| self.add(entry));
        let fd = self.hot[at].fd;
        self.hot[at].slab = slab;
        let bell = self.bell;
        if let Some(heard) = self.heard(slab) {
            heard.members.push(fd);
            heard.sides[bound.side.index()] = true;
            heard.worked = now;
        }
        if self.sleepers > 0 {
            // Another thread sleeps, which has not announced it there, and may have missed what came before this.
            if let Some(heard) = self.heard(slab) {
                heard.each_bell(bell, Bell::announce);
            }
            self.watch(at);
        } else {
            // An announcement that was made before it was a member does not count for it.
            self.warm(slab);
            self.watch(at);
        }
        (slab, known.is_none())
    }

    /// Takes a connection away from its slab.
    fn part(&mut self, at: usize) {
        let Hot { fd, slab, .. } = self.hot[at];
        if let Some(heard) = self.heard(slab) {
            heard.members.retain(|member| *member != fd);
        }
        self.hot[at].slab = NOWHERE;
    }

    fn add(&mut self, entry: &Arc<SlabEntry>) -> u32 {
        let heard =
            Heard { entry: entry.clone(), sides: [false; 2], members: Vec::new(), warm: false, worked: 0 };
        let at = self.slabs.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slabs.push(None);
            self.slabs.len() - 1
        });
        self.slabs[at] = Some(heard);
        self.by_entry.insert(name(entry), at as u32);
        at as u32
    }
}

#[cfg(test)]
impl Inner {
    /// Hears one side's bell of a slab in which it has no connection.
    pub fn hear_one(&mut self, entry: &Arc<SlabEntry>, side: Side) {
        let slab = self.add(entry);
        if let Some(heard) = self.heard(slab) {
            heard.sides[side.index()] = true;
            heard.worked = wait::clock();
        }
        self.warm(slab);
    }
}

/// What tells slabs apart.
fn name(entry: &Arc<SlabEntry>) -> usize {
    Arc::as_ptr(entry) as usize
}
