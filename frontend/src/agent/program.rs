//! What programs say, and what becomes of them.

use super::course::{Act, Course, Stage};
use super::registry::{Conn, Holder, Program};
use super::{Agent, Kind, Timer};
use crate::carrier::{BACKLOG, Carrier};
use crate::endpoint::Endpoint;
use crate::kernel;
use crate::post::{Parcel, Post};
use crate::record::{Past, RECORDS};
use mio::Interest;
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::sockopt::socket_cookie;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tracing::{debug, warn};
use vsocket_channel::message::{Message, Tuple};
use vsocket_channel::reason::Reason;

/// So many are accepted before the others have their turn.
const AT_ONCE: usize = 64;
/// Out of descriptors: whoever waits in the listener's queue is accepted after this.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// A message that cannot be, by its counter's name: its sender's connection is closed.
struct Unexpected(&'static str);

impl Agent {
    /// Somebody wants to connect. Who has is listened to when its turn comes: were each answered here, those that ask, and ask
    /// again when they are answered, would keep everybody else from being heard.
    pub(super) fn handle_listener_ready(&mut self) {
        for _ in 0..AT_ONCE {
            if !self.accept() {
                return;
            }
        }
        // The loop looks at the others first.
        self.timers.at(self.now + Duration::from_nanos(1), Timer::Accept);
    }

    /// Listens to all who have not said who they are.
    pub(super) fn handle_newcomers(&mut self) {
        for _ in 0..=BACKLOG {
            if !self.accept() {
                break;
            }
        }
        let strangers = self.registry.holders.iter().filter(|(_, h)| h.program.is_none());
        let strangers: Vec<u64> = strangers.map(|(id, _)| *id).collect();
        for id in strangers {
            self.handle_holder_ready(id);
        }
    }

    /// Takes one who waits in the listener's queue; false if there is none.
    fn accept(&mut self) -> bool {
        match Carrier::accept(&self.listener) {
            Ok(carrier) => self.welcome_holder(carrier),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => {}
            Err(error) => {
                warn!(%error, "cannot accept");
                self.timers.at(self.now + ACCEPT_AGAIN, Timer::Accept);
                return false;
            }
        }
        true
    }

    fn welcome_holder(&mut self, carrier: Carrier) {
        let Ok((pid, uid)) = kernel::peer_credentials(&carrier) else { return };
        let id = self.registry.number();
        if self.add(&carrier, Kind::Holder, id, Interest::READABLE | Interest::WRITABLE).is_err() {
            return;
        }
        let holder = Holder { post: Post::new(carrier), pid, uid, program: None };
        self.registry.holders.insert(id, holder);
    }

    /// A process has something to say, or takes messages again.
    pub(super) fn handle_holder_ready(&mut self, id: u64) {
        if !self.registry.flush_holder(id) {
            return self.lose_holder(id);
        }
        while let Some(holder) = self.registry.holders.get_mut(&id) {
            let packet = match holder.post.recv() {
                Ok(Some(packet)) => packet,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return self.hear_rest(id),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(None) | Err(_) => return self.lose_holder(id),
            };
            let done = match packet.message {
                Ok(message) => self.handle_message(id, message, packet.fds),
                Err(malformed) => Err(Unexpected(malformed.name())),
            };
            if let Err(Unexpected(what)) = done {
                warn!(holder = id, what, "a program's connection is closed");
                self.registry.totals.drop(what);
                return self.lose_holder(id);
            }
        }
    }

    /// A program's socket has been read: what it did not take, it takes now. Which process waits is not known.
    fn hear_rest(&mut self, id: u64) {
        let program = self.registry.holders.get(&id).and_then(|holder| holder.program);
        let Some(program) = program.and_then(|program| self.registry.programs.get(&program)) else { return };
        let behind = &program.records.header().behind;
        // Pairs with `send_waiting`: either its second attempt finds room, or what it says is seen here.
        if behind.load(Ordering::SeqCst) != 0 && behind.swap(0, Ordering::SeqCst) != 0 {
            for holder in program.holders.clone() {
                // Of no connection: the message itself is what makes it send.
                self.tell_holder(holder, Message::Nudge { record: u32::MAX }, Parcel::new());
            }
        }
    }

    fn handle_message(&mut self, from: u64, message: Message, fds: Vec<OwnedFd>) -> Result<(), Unexpected> {
        let attached = self.registry.holders.get(&from).and_then(|h| h.program);
        match (message, attached) {
            (Message::Query { what }, _) => {
                self.handle_query(from, what);
                Ok(())
            }
            (Message::Parted { handle, reason }, _) if reason.is_whole() => {
                let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| Unexpected("parted-descriptors"))?;
                self.handle_parted(from, handle, reason, &fd);
                Ok(())
            }
            (Message::Attach { inherit, .. }, None) => self.attach(from, inherit, fds),
            (Message::Track { handle, tx, rx, connector, found }, Some(program)) => {
                let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| Unexpected("track-descriptors"))?;
                match self.track(from, program, &fd, (tx, rx), connector, found) {
                    Ok((record, past)) => {
                        let known = past.is_some();
                        let Past { ahead_tx, ahead_rx, generation } = past.unwrap_or_default();
                        let granted =
                            Message::Tracked { handle, record, known, generation, ahead_tx, ahead_rx };
                        self.tell_holder(from, granted, Parcel::new());
                    }
                    Err(reason) => {
                        self.tell_holder(from, Message::Declined { conn: handle, reason }, Parcel::new());
                    }
                }
                drop(fd);
                self.open_new();
                Ok(())
            }
            (Message::Prepared { conn, generation }, Some(program)) => {
                let Some(conn) = self.named(program, conn) else { return Ok(()) };
                self.handle_prepared(conn, generation, fds)
            }
            (Message::Refused { conn, generation, reason }, Some(program)) => {
                let Some(conn) = self.named(program, conn) else { return Ok(()) };
                let now = self.now;
                let of = self.registry.conns.get_mut(&conn);
                match of.and_then(|c| c.course.handle_refused(generation, reason, now).map(|act| (c, act))) {
                    Some((of, act)) => {
                        of.asked = None;
                        self.act(conn, act);
                    }
                    None => self.registry.totals.drop("stale-refused"),
                }
                Ok(())
            }
            (Message::Left { conn, .. }, Some(program)) => {
                if let Some(conn) = self.named(program, conn) {
                    if self.responds(conn) {
                        self.settle_left(conn);
                    }
                }
                Ok(())
            }
            (Message::Shut { record }, Some(program)) => {
                if let Some(id) = self.named(program, u64::from(record)) {
                    if let Some(conn) = self.registry.conns.get_mut(&id) {
                        conn.shutting = conn.anchor.is_some();
                        conn.deaf = conn.shutting;
                    }
                    self.work(id);
                }
                Ok(())
            }
            (Message::Resume { record, generation }, Some(program)) => {
                let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| Unexpected("resume-descriptors"))?;
                if !self.resume(from, program, &fd, record, generation) {
                    return Err(Unexpected("resumed-record"));
                }
                drop(fd);
                self.open_new();
                Ok(())
            }
            (Message::Closed { record }, Some(program)) if self.give_up(program, record) => Ok(()),
            (Message::Closed { record }, Some(program)) => {
                if let Some(conn) = self.named(program, u64::from(record)) {
                    self.release(conn, from);
                }
                Ok(())
            }
            _ => Err(Unexpected("unexpected-message")),
        }
    }

    /// The connection of a record that a message names. One that has ended meanwhile is no fault.
    fn named(&mut self, program: u64, record: u64) -> Option<u64> {
        let conn = self.registry.conn_of(program, record);
        let alive = conn.filter(|id| self.registry.conns.get(id).is_some_and(|c| c.ending.is_none()));
        if alive.is_none() {
            self.registry.totals.drop("freed-record");
        }
        alive
    }

    fn attach(&mut self, from: u64, inherit: u64, fds: Vec<OwnedFd>) -> Result<(), Unexpected> {
        let Some(holder) = self.registry.holders.get(&from) else { return Ok(()) };
        let (pid, uid) = (holder.pid, holder.uid);
        let id = if inherit == 0 {
            let program = self.make_program(pid, uid, fds).map_err(|error| {
                warn!(%error, "no memory for a program's records");
                Unexpected("no-memory")
            })?;
            self.programs_made += 1;
            let id = self.programs_made;
            if self.add(program.watchdog(), Kind::Watchdog, id, Interest::READABLE).is_err() {
                return Err(Unexpected("no-memory"));
            }
            self.registry.programs.insert(id, program);
            id
        } else {
            inherit
        };
        let program = self.registry.programs.get_mut(&id).filter(|p| p.uid == uid && !p.living(inherit));
        let Some(program) = program else { return Err(Unexpected("foreign-program")) };
        program.holders.push(from);
        let parcel = vec![program.fds.clone()];
        debug!(program = id, name = program.name, pid, "attached");
        for conn in self.registry.conns.values_mut().filter(|c| c.program == id && c.ending.is_none()) {
            conn.holders.push(from);
        }
        if let Some(holder) = self.registry.holders.get_mut(&from) {
            holder.program = Some(id);
        }
        let attached = Message::Attached {
            program: id,
            records: RECORDS,
            threshold_bytes: self.options.threshold_bytes,
            threshold_rounds: self.options.threshold_rounds,
        };
        self.tell_holder(from, attached, parcel);
        Ok(())
    }

    /// Gives a connection a record, if what the program says of it is what the kernel says. One that was found has a past.
    fn track(
        &mut self,
        from: u64,
        program: u64,
        fd: &OwnedFd,
        moved: (u64, u64),
        connector: bool,
        found: bool,
    ) -> Result<(u32, Option<Past>), Reason> {
        let tuple = kernel::tuple(fd).map_err(|_| Reason::NotEstablished);
        let past = if found { self.reclaim(from, fd) } else { Ok(Some(Past::default())) };
        let checked = tuple.and_then(|_| Ok((past?, self.check(fd, moved, connector, found)?)));
        let Some(owner) = self.registry.programs.get_mut(&program) else { return Err(Reason::Ending) };
        let taken = checked.and_then(|checked| Ok((checked, owner.take_record().ok_or(Reason::Quota)?)));
        let (tuple, (past, cookie), record) = match (tuple, taken) {
            (Ok(tuple), Ok((checked, record))) => (tuple, checked, record),
            (tuple, Err(reason)) | (tuple @ Err(reason), _) => {
                let room = tuple.ok().filter(|_| owner.declined.len() < RECORDS as usize);
                let before = room.and_then(|tuple| owner.declined.insert(tuple, reason));
                // What is found is asked for time and again.
                if !found || before != Some(reason) {
                    self.registry.totals.decline(reason);
                }
                return Err(reason);
            }
        };
        owner.declined.remove(&tuple);
        if let Some(state) = owner.records.record(record) {
            if found {
                state.init_after(past, moved, connector);
            } else {
                state.init(moved.0, moved.1, connector);
            }
        }
        let course = match past {
            Some(past) => Course::resumed(past.generation, self.now),
            None => Course::of_unknown_past(0, self.now),
        };
        let conn = Conn::new(program, record, from, tuple, cookie, course);
        self.insert(Conn { past, ..conn });
        Ok((record, past))
    }

    /// A connection has a record, and is to be opened.
    pub(super) fn insert(&mut self, conn: Conn) {
        let id = self.registry.number();
        if let Some(owner) = self.registry.programs.get_mut(&conn.program) {
            owner.by_record.insert(conn.record, id);
        }
        self.registry.cookies.insert(conn.cookie, id);
        self.registry.conns.insert(id, conn);
        self.untold.push(id);
    }

    /// The cookie of a connection that may be opened; `found`: also one that others have had.
    pub(super) fn check(
        &self,
        fd: &OwnedFd,
        moved: (u64, u64),
        connector: bool,
        found: bool,
    ) -> Result<u64, Reason> {
        // The program goes on meanwhile, and brings the record up to date when it takes it; only prepare compares exactly.
        let counters = kernel::counters_at_least(fd, connector).map_err(|_| Reason::NotEstablished)?;
        if !counters.established {
            return Err(Reason::NotEstablished);
        }
        if counters.tx < moved.0 || counters.rx < moved.1 {
            return Err(Reason::Untrackable);
        }
        let cookie = socket_cookie(fd).map_err(|_| Reason::NotEstablished)?;
        if let Some(reason) = self.registry.given.reason(cookie).filter(|_| !found) {
            return Err(reason);
        }
        if self.registry.cookies.contains_key(&cookie) { Err(Reason::TupleTaken) } else { Ok(cookie) }
    }

    /// Opens what was tracked, after its program was told of its record.
    fn open_new(&mut self) {
        while let Some(id) = self.untold.pop() {
            self.follow(id);
        }
    }

    fn handle_prepared(&mut self, id: u64, generation: u32, fds: Vec<OwnedFd>) -> Result<(), Unexpected> {
        // Before a fork it may have asked for one more holder, and that may still lie unread.
        self.handle_newcomers();
        if self.registry.conns.get(&id).is_some_and(Conn::is_shared) {
            // One that was forked before the answer may not have the segment.
            self.handle_unanswered(id);
        }
        let Some(conn) = self.registry.conns.get_mut(&id) else { return Ok(()) };
        if !matches!(conn.course.stage(), Stage::Preparing { generation: asked, .. } if asked == generation) {
            // Its preparation was given up while the answer was under way.
            self.registry.totals.drop("stale-prepared");
            if conn.course.generation() != Some(generation) {
                self.close_unanswered(id, generation);
            }
            return Ok(());
        }
        if let Some(anchor) = fds.into_iter().next() {
            if socket_cookie(&anchor) != Ok(conn.cookie) {
                return Err(Unexpected("wrong-anchor"));
            }
            conn.anchor.get_or_insert(anchor);
        }
        if conn.anchor.is_none() {
            return Err(Unexpected("no-anchor"));
        }
        conn.bound = conn.asked.take().map(|(bound, _)| bound);
        if let Some(act) = conn.course.handle_prepared(generation) {
            self.act(id, act);
        }
        Ok(())
    }

    /// A process has a connection no longer.
    fn release(&mut self, id: u64, holder: u64) {
        if self.registry.conns.get(&id).is_some_and(|c| c.holders == [holder]) {
            // Before a fork it may have asked for one more holder, and that may still lie unread.
            self.handle_newcomers();
        }
        let Some(conn) = self.registry.conns.get_mut(&id) else { return };
        let before = conn.holders.len();
        conn.holders.retain(|h| *h != holder);
        if conn.holders.len() == before {
            self.registry.totals.drop("closed-twice");
        } else if conn.holders.is_empty() {
            self.begin_ending(id);
        } else if conn.asked.as_ref().is_some_and(|(_, asked)| *asked == holder) {
            self.handle_unanswered(id);
        }
    }

    /// A process has gone, or is shown the door.
    pub(super) fn lose_holder(&mut self, id: u64) {
        let Some(holder) = self.registry.holders.remove(&id) else { return };
        self.remove_source(&holder.post);
        let Some(program) = holder.program else { return };
        let held =
            self.registry.conns.iter().filter(|(_, c)| c.program == program && c.holders.contains(&id));
        let held: Vec<u64> = held.map(|(conn, _)| *conn).collect();
        drop(holder);
        for conn in held {
            self.release(conn, id);
        }
        let Some(owner) = self.registry.programs.get_mut(&program) else { return };
        owner.holders.retain(|h| *h != id);
        if owner.holders.is_empty() {
            let fds = owner.fds.clone();
            self.remove_source(&fds[1]);
            if self.registry.retire(program).is_some() {
                self.tell_ended(program);
            }
        }
    }

    /// A program has neither processes nor connections any more.
    pub(super) fn tell_ended(&mut self, program: u64) {
        if self.machine.is_some() {
            self.close_bells(program);
        } else {
            self.tell_backend(Message::Ended { program });
        }
    }

    /// A program's watchdog was rung.
    pub(super) fn handle_watchdog(&mut self, program: u64) {
        // It is not drained: each ring is an edge. And one that a program has brought may be anything.
        if self.registry.programs.contains_key(&program) {
            self.liveness.handle_wake(self.now);
        }
    }

    /// Sends a message to one process.
    pub(super) fn tell_holder(&mut self, holder: u64, message: Message, parcel: Parcel) {
        if !self.registry.tell_holder(holder, message, parcel) {
            // Not at once: the caller may be in the middle of a list.
            self.timers.at(self.now, Timer::Lose(holder));
        }
    }

    /// Makes every process of a connection look at its record.
    pub(super) fn nudge(&mut self, id: u64) {
        let Some(conn) = self.registry.conns.get(&id) else { return };
        let record = conn.record;
        for holder in conn.holders.clone() {
            self.tell_holder(holder, Message::Nudge { record }, Parcel::new());
        }
    }

    /// Does what an event made necessary.
    pub(super) fn act(&mut self, id: u64, act: Act) {
        let Some(conn) = self.registry.conns.get(&id) else { return };
        match act {
            Act::Open { min_generation } => {
                let (program, tuple) = (conn.program, conn.tuple);
                self.tell_backend(Message::Open { conn: id, program, tuple, min_generation });
            }
            Act::TellPrepared(generation) => self.tell_backend(Message::Prepared { conn: id, generation }),
            Act::TellRefused(generation, reason) => {
                self.tell_backend(Message::Refused { conn: id, generation, reason });
            }
            Act::TellLeft(generation) => self.tell_backend(Message::Left { conn: id, generation }),
            Act::Part(generation, reason) => {
                self.tell_backend(Message::Withdraw { conn: id, generation, reason });
            }
            Act::Ready(generation) => {
                if let Some(record) = self.registry.record(conn) {
                    record.ready.store(generation, Ordering::Release);
                }
                self.registry.count_upgrade(id);
                self.nudge(id);
            }
            Act::Leave(_) => {
                self.work(id);
                self.nudge(id);
            }
        }
        self.registry.count_reason(id);
        self.follow(id);
    }

    /// Opens a connection, now or when it is due.
    pub(super) fn follow(&mut self, id: u64) {
        let (session, now) = (self.session(), self.now);
        let Some(conn) = self.registry.conns.get_mut(&id) else { return };
        match conn.course.due() {
            Some(due) if due > now => self.timers.at(due, Timer::Open(id)),
            Some(_) if self.stopping.is_none() => match conn.course.open(session, now) {
                Some(act) => self.act(id, act),
                None => self.registry.count_reason(id),
            },
            _ => {}
        }
    }

    /// Does what a connection's record waits for: leaving, draining, shutting, ending.
    pub(super) fn work(&mut self, id: u64) {
        let Some(conn) = self.registry.conns.get(&id) else { return };
        if conn.ending.is_some() {
            return self.go_on_ending(id);
        }
        if conn.parting.is_some() {
            return self.go_on_parting(id);
        }
        if !self.responds(id) {
            return;
        }
        let Some(endpoint) = self.registry.endpoint(id) else { return };
        let Some(conn) = self.registry.conns.get(&id) else { return };
        let mut draining = false;
        if let Stage::Leaving { generation } = conn.course.stage() {
            draining = endpoint.leave(generation) == Ok(false);
            endpoint.close_unopened(generation);
        }
        let shutting = conn.shutting && endpoint.shut() == Ok(false);
        if conn.deaf && endpoint.defers_shutdown() {
            endpoint.attend();
        }
        let deaf = conn.deaf && endpoint.defers_shutdown();
        if let Some(conn) = self.registry.conns.get_mut(&id) {
            (conn.draining, conn.shutting, conn.deaf) = (draining, shutting, deaf);
        }
        if draining || shutting || deaf {
            self.watch(id);
        } else {
            self.unwatch(id);
        }
        self.settle_left(id);
    }

    /// If neither direction uses the generation any more, it is left for good.
    pub(super) fn settle_left(&mut self, id: u64) {
        let Some(conn) = self.registry.conns.get(&id) else { return };
        let Some(generation) = conn.course.prepared_generation() else { return };
        let Some(endpoint) = self.registry.endpoint(id).filter(Endpoint::has_left) else { return };
        // From here on the sender cannot come back to it.
        if endpoint.leave(generation) == Ok(false) {
            return;
        }
        endpoint.close_unopened(generation);
        if !endpoint.has_left() {
            return;
        }
        let (session, now) = (self.link_session(), self.now);
        let of = self.registry.conns.get_mut(&id);
        match of.and_then(|c| c.course.handle_left(session, now)) {
            Some(act) => self.act(id, act),
            None => self.follow(id),
        }
        self.let_go(id);
    }
}

impl Program {
    /// Whether this program, to be inherited from, has no process any more.
    fn living(&self, inherit: u64) -> bool {
        inherit != 0 && self.holders.is_empty()
    }
}

impl Conn {
    /// Whether several processes have it. Only one of them would be asked to prepare, and the others find its segment
    /// nowhere: a fork hands on what was prepared before it.
    pub(super) fn is_shared(&self) -> bool {
        self.holders.len() > 1
    }

    pub(super) fn new(
        program: u64,
        record: u32,
        holder: u64,
        tuple: Tuple,
        cookie: u64,
        course: Course,
    ) -> Self {
        Self {
            program,
            record,
            holders: vec![holder],
            tuple,
            cookie,
            course,
            anchor: None,
            bound: None,
            asked: None,
            shutting: false,
            deaf: false,
            draining: false,
            watched: false,
            ending: None,
            parting: None,
            parted: false,
            past: None,
            first_lane: None,
            counted: 0,
        }
    }
}

/// The descriptor of a control connection, for the loop.
pub(super) fn raw(fd: &impl AsFd) -> std::os::fd::RawFd {
    use std::os::fd::AsRawFd;
    fd.as_fd().as_raw_fd()
}
