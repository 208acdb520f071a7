//! Connections that an executed program inherits. It knows of no lane, so they go back to TCP, for good, before it begins: all
//! that was sent is in the kernel's sockets, and all that was not received comes there. Then the agent keeps nothing of them.

use super::{Agent, Timer};
use crate::endpoint::Return;
use crate::post::Parcel;
use rustix::fd::OwnedFd;
use rustix::net::sockopt::socket_cookie;
use std::collections::{HashSet, VecDeque};
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
    since: Instant,
    look: Instant,
}

/// Sockets that executed programs have inherited, by their cookies: the last of them.
#[derive(Debug, Default)]
pub struct Inherited {
    cookies: HashSet<u64>,
    order: VecDeque<u64>,
}

impl Inherited {
    /// Whether this is one.
    pub fn contains(&self, cookie: u64) -> bool {
        self.cookies.contains(&cookie)
    }

    fn insert(&mut self, cookie: u64) {
        if self.cookies.insert(cookie) {
            self.order.push_back(cookie);
        }
        if self.order.len() > REMEMBERED {
            let oldest = self.order.pop_front();
            oldest.map(|cookie| self.cookies.remove(&cookie));
        }
    }
}

impl Agent {
    /// Somebody is about to execute a program that inherits this connection.
    pub(super) fn handle_parted(&mut self, from: u64, handle: u64, fd: &OwnedFd) {
        let Ok(cookie) = socket_cookie(fd) else { return self.answer_parted(from, handle) };
        self.registry.inherited.insert(cookie);
        let id = self.registry.cookies.get(&cookie).copied();
        let conn = id.and_then(|id| Some((id, self.registry.conns.get_mut(&id)?)));
        let Some((id, conn)) = conn.filter(|(_, c)| !c.parted && c.ending.is_none()) else {
            return self.answer_parted(from, handle);
        };
        if let Some(parting) = &mut conn.parting {
            return parting.asked.push((from, handle));
        }
        debug!(conn = id, "is inherited");
        let (since, look) = (self.now, self.now);
        conn.parting = Some(Parting { asked: vec![(from, handle)], since, look });
        let unanswered = conn.asked.take().and_then(|_| conn.course.generation());
        if let Some(act) = conn.course.part(self.now) {
            self.act(id, act);
        }
        if let Some(generation) = unanswered {
            self.close_unanswered(id, generation);
        }
        self.registry.count_reason(id);
        self.watch(id);
        self.go_on_parting(id);
    }

    fn answer_parted(&mut self, from: u64, handle: u64) {
        let answer = Message::Declined { conn: handle, reason: Reason::Inherited };
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
        let asked = conn.parting.take().map(|parting| parting.asked).unwrap_or_default();
        conn.parted = true;
        if stuck {
            self.registry.totals.drop("inherited-on-lane");
        }
        self.unwatch(id);
        self.nudge(id);
        for (from, handle) in asked {
            self.answer_parted(from, handle);
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
        let mut inherited = Inherited::default();
        for cookie in 0..=REMEMBERED as u64 {
            inherited.insert(cookie);
            inherited.insert(cookie);
        }
        assert!(!inherited.contains(0) && inherited.contains(1) && inherited.contains(REMEMBERED as u64));
    }
}
