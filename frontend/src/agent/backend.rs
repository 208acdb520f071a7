//! The connection to the host's backend: kept up, and what the backend says.

use super::course::Stage;
use super::liveness::Task;
use super::registry::{Conn, MappedSlab};
use super::{Agent, Kind, Timer, Way};
use crate::carrier::{Carrier, Packet};
use crate::memory::{Bound, Ringers, Slab};
use crate::post::{Parcel, Post};
use mio::Interest;
use rustix::fd::{AsFd, OwnedFd};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;
use tracing::{debug, info, warn};
use vsocket_channel::layout::BELLS;
use vsocket_channel::message::{Message, Segment};
use vsocket_channel::reason::Reason;

/// While there is no backend it is looked for this often: it is back on duty soon after it is back.
const RETRY: Duration = Duration::from_millis(100);
/// One that speaks nonsense is not bothered as often.
const RETRY_FAULTY: Duration = Duration::from_secs(1);

/// The connection to the backend.
#[derive(Debug, Default)]
pub struct Link {
    post: Option<Post>,
    pidfd: Option<OwnedFd>,
    /// Counts the backends that said welcome; what was told one, another does not know.
    session: u64,
    welcomed: bool,
    boot: u64,
    /// The vport's network, as the last backend said.
    pub vni: u32,
}

impl Link {
    /// The boot of the backend that said welcome last.
    pub fn boot(&self) -> u64 {
        self.boot
    }

    /// Whether a backend has said welcome.
    pub fn connected(&self) -> bool {
        self.welcomed
    }
}

impl Agent {
    /// The backend's session, or 0 if there is none.
    pub(super) fn link_session(&self) -> u64 {
        if self.link.welcomed { self.link.session } else { 0 }
    }

    /// The session of a backend that can be asked for lanes, or 0.
    pub(super) fn session(&self) -> u64 {
        if self.liveness.is_silent() { 0 } else { self.link_session() }
    }

    /// Sends the backend a message, if there is one.
    pub(super) fn tell_backend(&mut self, message: Message) {
        let Some(post) = &mut self.link.post else { return };
        if let Err(error) = post.send(message, Parcel::new()) {
            warn!(%error, "cannot tell the backend");
            self.lose_backend(RETRY);
        }
    }

    /// Tries to connect, if there is no connection.
    pub(super) fn connect_backend(&mut self) {
        if self.link.post.is_some() || self.stopping.is_some() {
            return;
        }
        let token = self.machine.as_ref().map(|machine| machine.token);
        if token == Some(None) {
            // The keeper says when it has one.
            return;
        }
        let connected = self.open_link().and_then(|post| {
            self.add(&post, Kind::Backend, 0, Interest::READABLE | Interest::WRITABLE)?;
            Ok(post)
        });
        match connected {
            Ok(post) => {
                self.link.post = Some(post);
                if let Some(token) = token.flatten() {
                    self.tell_backend(Message::Present { token, program: 0, bell: 0 });
                }
                self.tell_backend(Message::Hello { pid: std::process::id() });
            }
            Err(error) => {
                debug!(%error, backend = %self.options.way, "no backend");
                self.timers.at(self.now + RETRY, Timer::Connect);
            }
        }
    }

    fn open_link(&self) -> io::Result<Post> {
        match &self.options.way {
            Way::Vport(path) => Carrier::connect(path).map(Post::new),
            Way::Machine { host, .. } => host.connect(false).map(Post::over),
        }
    }

    /// The backend's socket or its process has something to say.
    pub(super) fn handle_backend_ready(&mut self) {
        if self.link.pidfd.as_ref().is_some_and(is_dead) {
            return self.lose_backend(RETRY);
        }
        if let Some(post) = &mut self.link.post {
            if post.flush().is_err() {
                return self.lose_backend(RETRY);
            }
        }
        while let Some(post) = &mut self.link.post {
            match post.recv() {
                Ok(Some(packet)) => self.handle_packet(packet),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(None) | Err(_) => return self.lose_backend(RETRY),
            }
        }
    }

    /// The backend is gone, or has closed the connection: what needs it is left. Its ring memory is not used again by
    /// anybody, so it makes no difference if its process is still ending.
    pub(super) fn lose_backend(&mut self, retry: Duration) {
        let Some(post) = self.link.post.take() else { return };
        self.remove_source(&post);
        if let Some(pidfd) = self.link.pidfd.take() {
            self.remove_source(&pidfd);
        }
        self.timers.at(self.now + retry, Timer::Connect);
        if !std::mem::take(&mut self.link.welcomed) {
            return;
        }
        warn!("the backend is gone");
        self.liveness.reset(self.now);
        self.leave_what_needs_the_backend(false);
        self.lose_all_bells();
    }

    fn leave_what_needs_the_backend(&mut self, reachable: bool) {
        let ids: Vec<u64> = self.registry.conns.keys().copied().collect();
        for id in ids {
            // In a virtual machine no lane goes on without a host: it is what rings.
            let (now, all) = (self.now, !reachable && self.machine.is_some());
            let act = self.registry.conns.get_mut(&id).and_then(|c| {
                let act = c.course.handle_lost(reachable, now);
                let leave = |c: &mut Conn| c.course.handle_withdraw(None, Reason::BackendGone, now);
                act.or_else(|| all.then(|| leave(c)).flatten())
            });
            if let Some(act) = act {
                self.act(id, act);
            }
        }
    }

    fn follow_all(&mut self) {
        let mut ids: Vec<u64> = self.registry.conns.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            self.follow(id);
        }
    }

    fn handle_packet(&mut self, packet: Packet) {
        let message = match packet.message {
            Ok(message) => message,
            Err(malformed) => {
                warn!(%malformed, "from the backend");
                self.registry.totals.drop(malformed.name());
                return self.lose_backend(RETRY_FAULTY);
            }
        };
        match message {
            Message::Welcome { vni, boot } if !self.link.welcomed => self.welcome(vni, boot, packet.fds),
            _ if !self.link.welcomed => {
                self.registry.totals.drop("before-welcome");
                self.lose_backend(RETRY_FAULTY);
            }
            Message::Declined { conn, reason } => {
                let now = self.now;
                if let Some(to) = self.registry.conns.get_mut(&conn) {
                    to.course.handle_declined(reason, now);
                    self.registry.count_reason(conn);
                    self.follow(conn);
                }
            }
            Message::Prepare { conn, generation, segment } => {
                if let Err(reason) = self.ask_to_prepare(conn, generation, &segment, packet.fds) {
                    self.registry.count_reason(conn);
                    debug!(conn, generation, reason = reason.name(), "cannot prepare");
                    self.tell_backend(Message::Refused { conn, generation, reason });
                }
            }
            Message::Commit { conn, generation } => {
                let now = self.now;
                let to = self.registry.conns.get_mut(&conn);
                if let Some(act) = to.and_then(|c| c.course.handle_commit(generation, now)) {
                    self.act(conn, act);
                }
            }
            Message::Withdraw { conn: 0, reason, .. } => {
                let ids: Vec<u64> = self.registry.conns.keys().copied().collect();
                for id in ids {
                    self.withdraw(id, None, reason);
                }
            }
            Message::Withdraw { conn, generation, reason } => self.withdraw(conn, Some(generation), reason),
            Message::Pong { .. } => {
                if self.liveness.handle_pong(self.now) {
                    info!("the backend answers again");
                    self.follow_all();
                }
            }
            Message::BellFull { program, bell } => self.handle_bell_full(program, bell),
            _ => self.registry.totals.drop("unexpected-from-backend"),
        }
    }

    fn welcome(&mut self, vni: u32, boot: u64, mut fds: Vec<OwnedFd>) {
        let watched = match fds.pop() {
            Some(pidfd) if fds.is_empty() => {
                self.add(&pidfd, Kind::Pidfd, 0, Interest::READABLE).map(|()| Some(pidfd))
            }
            // A host's processes are none of a guest's; the stream ends with them.
            None if self.machine.is_some() => Ok(None),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "no pidfd beside the welcome")),
        };
        match watched {
            Ok(pidfd) => self.link.pidfd = pidfd,
            Err(error) => {
                warn!(%error, "the backend's welcome");
                return self.lose_backend(RETRY_FAULTY);
            }
        }
        info!(vni, "the backend is there");
        (self.link.vni, self.link.boot, self.link.welcomed) = (vni, boot, true);
        self.link.session += 1;
        self.follow_all();
    }

    pub(super) fn withdraw(&mut self, conn: u64, generation: Option<u32>, reason: Reason) {
        let now = self.now;
        if let (true, Some(generation), Some(of)) =
            (reason.is_whole(), generation, self.registry.conns.get(&conn))
        {
            // The far end is to find on the anchor what its application has not taken.
            if let Some(record) = self.registry.record(of) {
                record.untaken.fetch_max(generation, Ordering::AcqRel);
            }
        }
        let of = self.registry.conns.get_mut(&conn);
        if let Some(act) = of.and_then(|c| c.course.handle_withdraw(generation, reason, now)) {
            self.act(conn, act);
        }
    }

    fn ask_to_prepare(
        &mut self,
        id: u64,
        generation: u32,
        segment: &Segment,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Reason> {
        // A process that was forked just now may not have been heard yet.
        self.handle_newcomers();
        let session = self.link_session();
        let conn = self.registry.conns.get(&id).filter(|c| c.ending.is_none()).ok_or(Reason::Ending)?;
        if conn.is_shared() {
            return Err(Reason::Busy);
        }
        let program = conn.program;
        let slab = if self.machine.is_some() {
            self.slab_of_machine(program, segment)?
        } else {
            let owner = self.registry.programs.get_mut(&program).ok_or(Reason::Ending)?;
            mapped(&mut owner.slabs, self.link.boot, segment, fds)?.clone()
        };
        let conn = self.registry.conns.get_mut(&id).ok_or(Reason::Ending)?;
        let holder = conn.holders.first().copied().ok_or(Reason::Ending)?;
        let bound = Bound::new(generation, segment, slab.slab, slab.far);
        let bound = bound.ok_or(Reason::Violation)?;
        let parcel = slab.parcel;
        conn.course.handle_prepare(generation, segment.lane, session)?;
        conn.asked = Some((bound, holder));
        let message = Message::Prepare { conn: u64::from(conn.record), generation, segment: *segment };
        self.tell_holder(holder, message, parcel);
        Ok(())
    }

    /// What liveness has due.
    pub(super) fn handle_liveness(&mut self) {
        while let Some(task) = self.liveness.poll(self.now) {
            match task {
                Task::Look => {
                    let mut unacknowledged = self.registry.unacknowledged();
                    if !unacknowledged {
                        self.registry.arm_watchdogs();
                        // Orders the arming before the last look. Pairs with the fence between a program's publishing
                        // and its look at the watchdog; without it bytes could wait with nobody watching.
                        fence(Ordering::SeqCst);
                        unacknowledged = self.registry.unacknowledged();
                    }
                    if let Some(Task::Ping(n)) = self.liveness.handle_look(unacknowledged, self.now) {
                        self.tell_backend(Message::Ping { n });
                    }
                }
                Task::Ping(n) => self.tell_backend(Message::Ping { n }),
                Task::Silent => {
                    warn!("the backend does not answer");
                    self.leave_what_needs_the_backend(true);
                }
            }
        }
    }

    /// The process that was asked to prepare has gone without an answer.
    pub(super) fn handle_unanswered(&mut self, id: u64) {
        let Some(conn) = self.registry.conns.get(&id) else { return };
        let Stage::Preparing { generation, .. } = conn.course.stage() else { return };
        if let Some(endpoint) = self.registry.endpoint(id) {
            endpoint.responds_within(RETRY);
        }
        self.close_unanswered(id, generation);
        let now = self.now;
        if let Some(conn) = self.registry.conns.get_mut(&id) {
            conn.asked = None;
            if let Some(act) = conn.course.handle_refused(generation, Reason::Busy, now) {
                self.act(id, act);
            }
        }
    }

    /// A program may have opened a generation of which nobody was told, so no stay can be in it.
    pub(super) fn close_unanswered(&self, id: u64, generation: u32) {
        let Some(record) = self.registry.conns.get(&id).and_then(|c| self.registry.record(c)) else { return };
        if let Ok(mut rx) = record.rx.lock_within(RETRY) {
            if rx.generation == generation {
                rx.close();
                record.set_status(crate::record::status::RX_STATE, 0);
            }
        }
    }
}

/// The slab of a segment, mapped now if it is new.
fn mapped<'a>(
    slabs: &'a mut HashMap<(u64, u64), MappedSlab>,
    boot: u64,
    segment: &Segment,
    mut fds: Vec<OwnedFd>,
) -> Result<&'a MappedSlab, Reason> {
    use std::collections::hash_map::Entry;
    match slabs.entry((boot, segment.slab)) {
        Entry::Occupied(known) => Ok(known.into_mut()),
        Entry::Vacant(new) => {
            if fds.len() != 1 + 2 * BELLS {
                return Err(Reason::Violation);
            }
            let far = Ringers::from(Arc::new(fds.split_off(1 + BELLS)));
            let slab = fds.first().map(|memfd| Slab::map(memfd, segment.slab, segment.geometry));
            let slab = slab.and_then(Result::ok).ok_or(Reason::NoMemory)?;
            let parcel = vec![Arc::new(fds), far.fds().clone()];
            Ok(new.insert(MappedSlab { slab: Arc::new(slab), parcel, far }))
        }
    }
}

fn is_dead(pidfd: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut set = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    matches!(poll(&mut set, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
}
