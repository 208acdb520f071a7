//! Connections that others are to find whole in the kernel's socket, as an executed program that inherits them, or a process
//! that they are passed to: it may know of no lane. They go back to TCP, for good, before: all that was sent is in the kernel's
//! sockets, and all that was not received comes there. Then the agent keeps nothing of them.

use super::{Agent, Timer};
use crate::endpoint::Return;
use crate::post::Parcel;
use crate::record::Past;
use rustix::fd::OwnedFd;
use rustix::net::sockopt::socket_cookie;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tracing::debug;
use vsocket_channel::message::Message;
use vsocket_channel::reason::Reason;

/// How long the far end has, before this end leaves without it.
const ALONE: Duration = Duration::from_millis(500);
/// How long all may take.
const MOST: Duration = Duration::from_millis(1500);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(1);
/// Sockets that are remembered.
const REMEMBERED: usize = 1 << 16;

/// A connection on its way.
#[derive(Debug)]
pub struct Parting {
    /// Who waits for it, and under which number.
    asked: Vec<(u64, u64)>,
    reason: Reason,
    since: Instant,
    look: Instant,
}

/// Sockets that others may have, by their cookies: why, and what their stays have left behind, if that is known. The last of them.
#[derive(Debug, Default)]
pub struct Given {
    sockets: HashMap<u64, (Reason, Option<Past>)>,
    order: VecDeque<u64>,
}

impl Given {
    /// Why this one is not opened, if it is one.
    pub fn reason(&self, cookie: u64) -> Option<Reason> {
        Some(self.get(cookie)?.0)
    }

    /// The same, and its past.
    pub fn get(&self, cookie: u64) -> Option<(Reason, Option<Past>)> {
        self.sockets.get(&cookie).copied()
    }

    /// It has come back to TCP whole, and its stays have left this behind.
    fn came_back(&mut self, cookie: u64, past: Option<Past>) {
        if let Some(socket) = self.sockets.get_mut(&cookie) {
            socket.1 = past;
        }
    }

    fn insert(&mut self, cookie: u64, reason: Reason) {
        match self.sockets.entry(cookie) {
            Entry::Occupied(mut known) => known.get_mut().0 = reason,
            Entry::Vacant(new) => {
                new.insert((reason, None));
                self.order.push_back(cookie);
            }
        }
        if self.order.len() > REMEMBERED {
            let oldest = self.order.pop_front();
            oldest.map(|cookie| self.sockets.remove(&cookie));
        }
    }
}

impl Agent {
    /// Somebody is about to let others have this connection.
    pub(super) fn handle_parted(&mut self, from: u64, handle: u64, reason: Reason, fd: &OwnedFd) {
        let Ok(cookie) = socket_cookie(fd) else { return self.answer_parted(from, handle, reason) };
        self.registry.given.insert(cookie, reason);
        let id = self.registry.cookies.get(&cookie).copied();
        let conn = id.and_then(|id| Some((id, self.registry.conns.get_mut(&id)?)));
        let Some((id, conn)) = conn.filter(|(_, c)| !c.parted && c.ending.is_none()) else {
            return self.answer_parted(from, handle, reason);
        };
        if let Some(parting) = &mut conn.parting {
            return parting.asked.push((from, handle));
        }
        debug!(conn = id, reason = reason.name(), "goes back whole");
        let (since, look) = (self.now, self.now);
        conn.parting = Some(Parting { asked: vec![(from, handle)], reason, since, look });
        let unanswered = conn.asked.take().and_then(|_| conn.course.generation());
        if let Some(act) = conn.course.part(reason, self.now) {
            self.act(id, act);
        }
        if let Some(generation) = unanswered {
            self.close_unanswered(id, generation);
        }
        self.registry.count_reason(id);
        self.watch(id);
        self.go_on_parting(id);
    }

    fn answer_parted(&mut self, from: u64, handle: u64, reason: Reason) {
        let answer = Message::Declined { conn: handle, reason };
        self.tell_holder(from, answer, Parcel::new());
    }

    /// Does what can be done now.
    pub(super) fn go_on_parting(&mut self, id: u64) {
        let Some(conn) = self.registry.conns.get(&id) else { return };
        let Some(Parting { since, look, .. }) = conn.parting else { return };
        let age = self.now.saturating_duration_since(since);
        let (mut left, mut stuck) = (true, age >= MOST);
        if !stuck && !self.responds(id) {
            return;
        }
        if let Some(endpoint) = self.registry.endpoint(id).filter(|_| !stuck) {
            let back = endpoint.take_back();
            // The far end goes first: when it hears of ours by the anchor, it does not know that it is to give back.
            left = (back != Return::Wait || age >= ALONE) && endpoint.leave(u32::MAX) != Ok(false);
            left &= back == Return::Done && (endpoint.has_come_back() || age >= ALONE);
            stuck = back == Return::Stuck;
        }
        if left || stuck {
            return self.end_parting(id, stuck);
        }
        if self.now >= look {
            let next = self.now + LOOK;
            self.timers.at(next, Timer::Work(id));
            if let Some(parting) = self.registry.conns.get_mut(&id).and_then(|c| c.parting.as_mut()) {
                parting.look = next;
            }
        }
    }

    pub(super) fn end_parting(&mut self, id: u64, stuck: bool) {
        let Some(conn) = self.registry.conns.get_mut(&id) else { return };
        let (parting, cookie, past) = (conn.parting.take(), conn.cookie, conn.past);
        conn.parted = true;
        if let Some(record) = self.registry.conns.get(&id).and_then(|conn| self.registry.record(conn)) {
            // Also no agent after this one is to bring it back to a lane.
            record.leave.fetch_max(u32::MAX, Ordering::AcqRel);
            // While it is being tracked, the program makes its record anew.
            let prepared = self.registry.conns.get(&id).is_some_and(|conn| conn.anchor.is_some());
            let past = if prepared { record.past(LOOK) } else { past };
            self.registry.given.came_back(cookie, past.filter(|_| !stuck));
        }
        if stuck {
            self.registry.totals.drop("inherited-on-lane");
        }
        self.unwatch(id);
        self.nudge(id);
        if let Some(Parting { asked, reason, .. }) = parting {
            asked.into_iter().for_each(|(from, handle)| self.answer_parted(from, handle, reason));
        }
        if stuck {
            // What can be left is; its program reads the rest.
            return self.work(id);
        }
        self.settle_left(id);
        self.let_go(id);
    }

    /// Keeps nothing of a connection that was brought to TCP for good: it ends when the kernel ends it.
    pub(super) fn let_go(&mut self, id: u64) {
        let Some(conn) = self.registry.conns.get(&id) else { return };
        if conn.parted && conn.ending.is_none() && conn.course.generation().is_none() {
            self.unwatch(id);
            if let Some(conn) = self.registry.conns.get_mut(&id) {
                (conn.anchor, conn.bound) = (None, None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_are_remembered() {
        let mut given = Given::default();
        for cookie in 0..=REMEMBERED as u64 {
            given.insert(cookie, Reason::Inherited);
            given.insert(cookie, Reason::Passed);
        }
        let [first, second, last] = [0, 1, REMEMBERED as u64].map(|cookie| given.reason(cookie));
        assert_eq!((first, second, last), (None, Some(Reason::Passed), Some(Reason::Passed)));
    }
}
