//! The end of a connection that its program has closed, or has died with: what was sent is delivered, then the agent's
//! duplicate of the kernel socket goes, as the kernel would have ended it.
//!
//! | phase | until | then |
//! |---|---|---|
//! | begin | nothing that the program did not read is there (else reset) | holding on a fabric lane, else shutting |
//! | holding | the peer's ring has all, or 1 s | shutting |
//! | shutting | everything and the FIN are in the kernel socket | reading |
//! | reading | the peer's end of stream, an error, or 60 s; application bytes: reset | over |

use super::registry::all_held;
use super::{Agent, Timer};
use crate::endpoint::Endpoint;
use crate::record::status;
use rustix::io::{Errno, IoSliceMut};
use std::time::{Duration, Instant};
use tracing::trace;
use vsocket_channel::message::{Lane, Message};

const HOLDING_MOST: Duration = Duration::from_secs(1);
const HOLDING_LOOK: Duration = Duration::from_millis(10);
/// A peer that takes nothing for so long is given up; the kernel's own orphans have less patience.
const SHUTTING_MOST: Duration = Duration::from_secs(600);
/// As `tcp_fin_timeout`.
const READING_MOST: Duration = Duration::from_secs(60);
/// A program that is stopped inside a call keeps the agent this long, and is asked again later.
const STOPPED_WAIT: Duration = Duration::from_millis(20);
const STOPPED_AGAIN: Duration = Duration::from_millis(100);

/// How far an ending is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// Nothing was done.
    Begin,
    /// Bytes on a fabric lane are not yet with the peer.
    Holding(Instant),
    /// Bytes or the FIN are not yet in the kernel socket.
    Shutting(Instant),
    /// The peer has not ended its stream.
    Reading(Instant),
}

/// What a step came to.
enum Step {
    /// On to this phase, at once.
    Go(Ending),
    /// Wait: for the anchor, and for the time if there is one.
    Wait(Option<Instant>),
    /// It is over.
    Over,
    /// It ends with a reset.
    Abort,
}

/// Whether application bytes are there that nobody has read. `Ok(0)`: the stream has ended.
fn unread(endpoint: &Endpoint<'_>, peek: bool) -> Result<usize, Errno> {
    let mut scratch = [0; 64];
    endpoint.recv(&mut [IoSliceMut::new(&mut scratch)], peek, true)
}

impl Ending {
    fn step(self, endpoint: &Endpoint<'_>, backend_answers: bool, now: Instant) -> Step {
        match self {
            Self::Begin => begin(endpoint, now),
            Self::Holding(until) => {
                let rest = endpoint.bound.is_some_and(|b| b.lane == Lane::Fabric && !all_held(b));
                if rest && endpoint.record.is(status::TX_RING) && backend_answers && now < until {
                    return Step::Wait(Some(now + HOLDING_LOOK));
                }
                Step::Go(Self::Shutting(now + SHUTTING_MOST))
            }
            Self::Shutting(until) => match endpoint.shut() {
                Ok(true) => {
                    if endpoint.record.is(status::RX_SHUT) {
                        endpoint.tell_deaf();
                    }
                    Step::Go(Self::Reading(now + READING_MOST))
                }
                Ok(false) if now >= until || matches!(unread(endpoint, true), Ok(1..)) => Step::Abort,
                Ok(false) => Step::Wait(Some(until)),
                Err(_) => Step::Over,
            },
            Self::Reading(until) => match unread(endpoint, false) {
                Ok(1..) => Step::Abort,
                Err(Errno::AGAIN) if now < until => Step::Wait(Some(until)),
                Ok(0) | Err(_) => Step::Over,
            },
        }
    }
}

fn begin(endpoint: &Endpoint<'_>, now: Instant) -> Step {
    if rustix::net::sockopt::socket_linger(endpoint.anchor) == Ok(Some(Duration::ZERO)) {
        return Step::Abort;
    }
    if let Some(bound) = endpoint.bound {
        endpoint.close_unopened(bound.generation);
    }
    endpoint.tell_gone();
    // After the sender was told, so that nothing can slip in between.
    if matches!(unread(endpoint, true), Ok(1..)) {
        return Step::Abort;
    }
    Step::Go(Ending::Holding(now + HOLDING_MOST))
}

impl Agent {
    /// The program has the connection no longer: what is left is ours.
    pub(super) fn begin_ending(&mut self, id: u64) {
        if self.registry.conns.get(&id).is_some_and(|c| c.parting.is_some()) {
            self.end_parting(id, true);
        }
        if self.registry.conns.get(&id).is_some_and(|c| c.parted) {
            self.unwatch(id);
        }
        let Some(conn) = self.registry.conns.get_mut(&id).filter(|c| c.ending.is_none()) else { return };
        trace!(conn = id, "ends");
        if conn.parted {
            // Another program has it, of which we know nothing: the kernel ends it when that does.
            conn.anchor = None;
        }
        conn.ending = Some(Ending::Begin);
        if conn.anchor.is_none() {
            // The kernel ends it by itself: nobody holds a duplicate.
            return self.finish(id);
        }
        self.watch(id);
        self.go_on_ending(id);
    }

    /// Does what can be done now.
    pub(super) fn go_on_ending(&mut self, id: u64) {
        loop {
            let Some(phase) = self.registry.conns.get(&id).and_then(|c| c.ending) else { return };
            let Some(endpoint) = self.registry.endpoint(id) else { return self.finish(id) };
            if !endpoint.responds_within(STOPPED_WAIT) {
                return self.timers.at(self.now + STOPPED_AGAIN, Timer::Work(id));
            }
            match phase.step(&endpoint, self.session() != 0, self.now) {
                Step::Go(next) => {
                    if let Some(conn) = self.registry.conns.get_mut(&id) {
                        conn.ending = Some(next);
                    }
                }
                Step::Wait(at) => {
                    if let Some(at) = at {
                        self.timers.at(at, Timer::Work(id));
                    }
                    return;
                }
                Step::Over => {
                    endpoint.tell_deaf();
                    return self.finish(id);
                }
                Step::Abort => {
                    endpoint.break_off();
                    self.registry.totals.drop("reset-at-close");
                    return self.finish(id);
                }
            }
        }
    }

    /// Whether the locks of a connection's record can be had; if not, [`Agent::work`] comes again.
    pub(super) fn responds(&mut self, id: u64) -> bool {
        let answers = self.registry.endpoint(id).is_none_or(|e| e.responds_within(STOPPED_WAIT));
        if !answers {
            self.timers.at(self.now + STOPPED_AGAIN, Timer::Work(id));
        }
        answers
    }

    fn finish(&mut self, id: u64) {
        self.unwatch(id);
        let session = self.link_session();
        let Some(conn) = self.registry.conns.get_mut(&id) else { return };
        let late = conn.asked.is_some();
        if let Some(act) = conn.course.end(session) {
            self.act(id, act);
        }
        let Some(conn) = self.registry.remove(id) else { return };
        if conn.course.known_to(session) {
            self.tell_backend(Message::Close { conn: id });
        }
        if let Some(anchor) = &conn.anchor {
            // Ours is the last duplicate: closing it must not wait for a peer.
            let _ = rustix::net::sockopt::set_socket_linger(anchor, None);
        }
        let (program, record) = (conn.program, conn.record);
        drop(conn);
        if self.registry.give_back(program, record, late).is_some() {
            self.tell_ended(program);
        }
    }
}
