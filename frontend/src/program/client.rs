//! The process's conversation with the agent: attach, open, prepare, close. Nothing waits for an answer; what arrives is
//! noticed by a counter in shared memory on busy paths, and by the control socket in every set that sleeps.

use super::cancel;
use super::conn::{Conn, ConnRef, Shared};
use super::descriptors::lift;
use super::epoll;
use super::kin;
use super::table::{self, Slot};
use super::wait;
use super::wait::clock;
use crate::carrier::{Carrier, Packet};
use crate::memory::{Bound, Records, Ringers, Slab};
use crate::record::Past;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};
use vsocket_channel::layout::BELLS;
use vsocket_channel::message::{Message, Segment};
use vsocket_channel::reason::Reason;

mod outbox;
mod resuming;
mod tracking;

/// Environment variable that names the agent's socket.
pub const AGENT_VARIABLE: &str = "VSOCKET_AGENT";
/// The socket where none is named.
pub const AGENT_DEFAULT: &str = "/run/vsocket/agent.sock";
/// How long after a failed attach the next is tried.
const RETRY: Duration = Duration::from_millis(500);

/// A slab that this process maps.
pub struct SlabEntry {
    /// The mapping.
    pub slab: Arc<Slab>,
    /// This side's doorbells.
    pub own: Vec<OwnedFd>,
    far: Ringers,
}

impl SlabEntry {
    /// A mapping with the doorbells of this side, and of the far side.
    pub fn new(slab: Arc<Slab>, own: Vec<OwnedFd>, far: Vec<OwnedFd>) -> Self {
        Self { slab, own, far: Arc::new(far).into() }
    }
}

struct Client {
    carrier: Option<Carrier>,
    /// The agent has answered our attach.
    answered: bool,
    /// Counts the agents that have.
    attachment: u32,
    /// The records. They outlive their agent, if connections do.
    shared: Option<Arc<Shared>>,
    program: u64,
    slabs: HashMap<u64, Arc<SlabEntry>>,
    /// Connections by record.
    conns: HashMap<u32, ConnRef>,
    /// Opened descriptors and their epochs, by handle.
    opening: HashMap<u64, (i32, u32)>,
    /// Opened descriptors, by handle, and their records, which a call in the kernel has kept from getting them so far.
    granted: Vec<(u64, u32, Option<Past>)>,
    /// What the agent's socket has not taken so far.
    outbox: RefCell<VecDeque<Message>>,
    next_handle: u64,
    retry_at: Option<Instant>,
    pid: u32,
}

static CLIENT: Mutex<Option<Client>> = Mutex::new(None);
/// The mail counter in shared memory, and what was seen of it.
static MAIL: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());
static SEEN: AtomicU32 = AtomicU32::new(0);
/// When the agent is to be told what it could not be told so far, or another one is to be looked for, by the monotonic
/// clock; 0 is never.
static DUE: AtomicU64 = AtomicU64::new(0);
/// When a call on kernel TCP next looks at the control socket, by the monotonic clock.
static NEXT_LOOK: AtomicU64 = AtomicU64::new(0);
/// A call on a ring looks at it after so many bytes, as a power of two.
const LOOK_SHIFT: u32 = 20;
/// The control socket, for waiting sets; -1 is none.
static CONTROL: AtomicI32 = AtomicI32::new(-1);
/// The thresholds where an agent is told none, and until it has said its own. An upgrade costs 200 to 500 µs of
/// everybody's time beside the connection; a direct lane earns that back in some 16 round trips, or in about a MiB of
/// bulk (`cargo bench --bench upgrade`). Who has gone so far is likely to go as far again.
pub const THRESHOLD_BYTES: u64 = 256 * 1024;
/// As [`THRESHOLD_BYTES`], in turns of direction: two a round trip.
pub const THRESHOLD_ROUNDS: u32 = 16;

static WORTH_BYTES: AtomicU64 = AtomicU64::new(THRESHOLD_BYTES);
static WORTH_ROUNDS: AtomicU32 = AtomicU32::new(THRESHOLD_ROUNDS);

/// The control socket, if there is one.
pub fn control() -> Option<BorrowedFd<'static>> {
    let fd = CONTROL.load(Ordering::Acquire);
    // SAFETY: the socket stays open while its number stands here; it is closed only after it was taken away, and then
    // a late user finds a closed or another descriptor, which it only polls.
    (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Counts the control sockets that this process has had.
static CONTROL_EPOCH: AtomicU32 = AtomicU32::new(0);

/// Which control socket [`control`] is.
pub fn control_epoch() -> u32 {
    CONTROL_EPOCH.load(Ordering::Acquire)
}

fn set_control(fd: i32) {
    CONTROL.store(fd, Ordering::Release);
    CONTROL_EPOCH.fetch_add(1, Ordering::Release);
}

/// Whether a descriptor that was counted has proved worth opening.
pub fn worth_it(slot: &Slot) -> bool {
    slot.shown() >= WORTH_BYTES.load(Ordering::Relaxed)
        || slot.turns() >= WORTH_ROUNDS.load(Ordering::Relaxed)
}

/// Looks after what the agent has said, if the counter in shared memory shows that it has said something.
pub fn check_mail() {
    if mail_waits() {
        read_mail();
    }
}

/// Whether the agent has said something that nobody has read.
#[inline]
pub fn mail_waits() -> bool {
    let mail = MAIL.load(Ordering::Acquire);
    // SAFETY: null, or the counter in records that are never unmapped once attached.
    let unread =
        unsafe { mail.as_ref() }.is_some_and(|c| c.load(Ordering::Relaxed) != SEEN.load(Ordering::Relaxed));
    unread || is_due().is_some()
}

#[inline]
fn is_due() -> Option<u64> {
    let due = DUE.load(Ordering::Relaxed);
    (due != 0 && due <= clock()).then_some(due)
}

/// Reads everything the agent has said. To be called before a sleep, by a thread that holds no set's lock: who finds the
/// conversation taken waits a moment for it, as what the other thread does may not be reading.
pub fn read_mail() {
    let _within = cancel::Within::now();
    for _ in 0..1000 {
        if let Ok(mut guard) = CLIENT.try_lock() {
            if let Some(client) = guard.as_mut() {
                client.read();
            }
            return;
        }
        rustix::thread::sched_yield();
    }
    // What told us to read may have been an edge, which is not told twice.
    resuming::due_now();
}

/// A call has gone to kernel TCP. An agent that has died is heard of by who sleeps; who never does looks twice a second.
fn look_now_and_then() {
    let now = clock();
    if NEXT_LOOK.load(Ordering::Relaxed) <= now {
        NEXT_LOOK.store(now + RETRY.as_nanos() as u64, Ordering::Relaxed);
        resuming::due_now();
    }
}

/// After a call has sent, with what it sent: as [`tell_left`]. Nothing comes by the ring to who only sends, so it looks as well
/// whether its agent is alive. Not to be called by who holds a set's lock.
#[inline]
pub fn tell_sent(conn: &Conn, bytes: usize) {
    tell_left(conn);
    let now = conn.record().tx_off.load(Ordering::Relaxed);
    if now >> LOOK_SHIFT != now.wrapping_sub(bytes as u64) >> LOOK_SHIFT {
        look();
    }
}

#[cold]
fn look() {
    let _within = cancel::Within::now();
    // Who has it taken looks, or the next one does.
    if let Ok(mut guard) = CLIENT.try_lock() {
        if let Some(client) = guard.as_mut() {
            client.read();
        }
    }
}

/// The process has locked itself into a sandbox of system calls.
static CONFINED: AtomicBool = AtomicBool::new(false);

/// The process locks itself into a sandbox of system calls, as servers do before they read what a stranger sends: a call
/// that it does not foresee, such as a socket for the agent, may kill it. Nothing is opened from now on.
pub fn confine() {
    CONFINED.store(true, Ordering::Release);
    let Ok(mut guard) = CLIENT.try_lock() else { return };
    if let Some(client) = guard.as_mut().filter(|client| client.conns.is_empty()) {
        client.forget_agent();
    }
}

/// Whether it has.
pub fn is_confined() -> bool {
    CONFINED.load(Ordering::Acquire)
}

/// A followed descriptor has proved worth it, or waits for its answer: goes on with opening it.
pub fn open(fd: i32, slot: &'static Slot) {
    let _within = cancel::Within::now();
    if CONFINED.load(Ordering::Acquire) {
        return slot.leave_alone();
    }
    let Ok(mut guard) = CLIENT.try_lock() else { return };
    let client = guard.get_or_insert_with(|| {
        super::fork::install();
        Client::new()
    });
    if client.pid != std::process::id() {
        return;
    }
    client.read();
    if slot.phase.load(Ordering::Relaxed) != table::WANTED || slot.inside() > 0 {
        return;
    }
    if !kin::is_alone(fd, slot) {
        slot.again();
        return;
    }
    if client.attach() {
        client.track(fd, slot);
    } else if client.carrier.is_none() {
        // No agent: plain calls, until the next time it is tried.
        slot.phase.store(table::COUNTED, Ordering::Release);
    }
}

/// The program has closed its last descriptor of the connection. True: an agent has it, and what is left at the end is
/// that one's to do. Else no agent will have it from now on.
pub fn closed(conn: &Conn) -> bool {
    let Ok(mut guard) = CLIENT.lock() else { return false };
    let Some(client) = guard.as_mut() else { return false };
    // One that has died finishes nothing.
    client.read();
    let attended = client.attends(conn);
    if attended {
        client.release(conn);
    } else {
        conn.attended.store(resuming::NEVER, Ordering::Release);
    }
    attended
}

/// A closed connection that no agent has is not used any more.
pub fn released(conn: &Conn) {
    let Ok(mut guard) = CLIENT.lock() else { return };
    if let Some(client) = guard.as_mut() {
        client.release(conn);
    }
}

/// The connection was shut for writing, and the agent must finish it.
pub fn shut(conn: &Conn) {
    let index = conn.index.load(Ordering::Relaxed);
    if let Ok(mut guard) = CLIENT.lock() {
        if let Some(client) = guard.as_mut().filter(|client| client.attends(conn)) {
            client.tell(Message::Shut { record: index });
        }
    }
}

/// After a call: tells the agent once when neither direction uses its generation any more.
pub fn tell_left(conn: &Conn) {
    let Some(bound) = conn.bound() else { return look_now_and_then() };
    let generation = bound.generation;
    if conn.left.load(Ordering::Relaxed) == generation {
        return look_now_and_then();
    }
    if !conn.endpoint().has_left() {
        return;
    }
    let _within = cancel::Within::now();
    let Ok(mut guard) = CLIENT.try_lock() else {
        // The caller may hold a set's lock, so it does not wait; whoever next reads mail tells.
        resuming::due_now();
        return;
    };
    if let Some(client) = guard.as_mut() {
        client.tell_left(conn, generation);
    }
}

type Guard = MutexGuard<'static, Option<Client>>;

thread_local! {
    /// The conversation, while this thread forks: the child would find it taken for good by a thread that it has not.
    static FORKING: RefCell<Option<Guard>> = const { RefCell::new(None) };
}

/// Before a fork: a control connection for the child, which shares the parent's connections.
pub fn before_fork() -> Option<Carrier> {
    let mut guard = CLIENT.lock().ok()?;
    let carrier = guard.as_mut().and_then(Client::before_fork);
    FORKING.with(|forking| forking.replace(Some(guard)));
    carrier
}

/// In the parent.
pub fn forked() {
    drop(FORKING.with(RefCell::take));
}

/// In the child: goes on with its own control connection.
pub fn after_fork(carrier: Option<Carrier>) {
    let Some(mut guard) = FORKING.with(RefCell::take) else { return };
    if let Some(client) = guard.as_mut() {
        client.after_fork(carrier);
    }
}

fn raw(fd: impl AsFd) -> i32 {
    rustix::fd::AsRawFd::as_raw_fd(&fd.as_fd())
}

/// What tells files apart; all eventfds have the same.
fn inode(fd: &OwnedFd) -> Option<u64> {
    name(fd).map(|(_, inode)| inode)
}

fn name(fd: &OwnedFd) -> Option<(u64, u64)> {
    let stat = rustix::fs::fstat(fd).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// The agent's socket, as the environment named it when the program began: servers such as nginx clear theirs.
static AGENT: OnceLock<PathBuf> = OnceLock::new();

/// The agent's socket; [`super::fork::at_load`] asks first.
pub fn agent_path() -> &'static Path {
    let named =
        || std::env::var_os(AGENT_VARIABLE).map_or_else(|| PathBuf::from(AGENT_DEFAULT), PathBuf::from);
    AGENT.get_or_init(named)
}

impl Client {
    fn new() -> Self {
        Self {
            carrier: None,
            answered: false,
            attachment: 0,
            shared: None,
            program: 0,
            slabs: HashMap::new(),
            conns: HashMap::new(),
            opening: HashMap::new(),
            granted: Vec::new(),
            outbox: RefCell::default(),
            next_handle: 1,
            retry_at: None,
            pid: std::process::id(),
        }
    }

    /// Whether the agent has answered our attach; begins one if not.
    fn attach(&mut self) -> bool {
        if self.carrier.is_some() {
            return self.answered;
        }
        if self.retry_at.is_some_and(|at| Instant::now() < at) {
            return false;
        }
        self.retry_at = Some(Instant::now() + RETRY);
        let Ok(carrier) = Carrier::connect(agent_path()).map(Carrier::lifted) else { return false };
        if !self.present(&carrier) {
            return false;
        }
        set_control(raw(&carrier));
        self.carrier = Some(carrier);
        if !self.conns.is_empty() {
            epoll::watch_next_control();
        }
        false
    }

    fn before_fork(&mut self) -> Option<Carrier> {
        if self.conns.is_empty() {
            return None;
        }
        wait::shared_by_fork();
        self.read();
        if !self.answered {
            // What two processes have is brought to no other agent.
            self.forget_agent();
            return None;
        }
        let carrier = Carrier::connect(agent_path()).ok()?;
        carrier.send(&Message::Attach { pid: std::process::id(), inherit: self.program }, &[]).ok()?;
        Some(carrier)
    }

    fn after_fork(&mut self, carrier: Option<Carrier>) {
        self.pid = std::process::id();
        self.opening.clear();
        // The parent says that, and does that.
        self.outbox.get_mut().clear();
        self.granted.clear();
        let Some(carrier) = carrier else {
            // The child attaches anew when it has something to open.
            return self.forget_agent();
        };
        set_control(raw(&carrier));
        self.carrier = Some(carrier);
    }

    fn tell_left(&self, conn: &Conn, generation: u32) {
        if conn.left.swap(generation, Ordering::AcqRel) == generation {
            return;
        }
        if self.attends(conn) {
            let record = u64::from(conn.index.load(Ordering::Relaxed));
            self.tell(Message::Left { conn: record, generation });
        } else {
            self.resume(conn);
        }
    }

    fn tell_untold(&self) {
        for conn in self.conns.values() {
            if let Some(bound) = conn.bound().filter(|_| conn.endpoint().has_left()) {
                self.tell_left(conn, bound.generation);
            }
            self.resume(conn);
        }
    }

    /// A connection's record is not used here any more.
    fn release(&mut self, conn: &Conn) {
        let index = conn.index.load(Ordering::Relaxed);
        if self.conns.get(&index).is_some_and(|c| std::ptr::eq(&raw const **c, conn)) {
            self.conns.remove(&index);
            self.tell(Message::Closed { record: index });
        }
    }

    fn read(&mut self) {
        self.send_waiting();
        for (handle, record, past) in std::mem::take(&mut self.granted) {
            self.tracked(handle, record, past);
        }
        let mut changed = is_due().is_some_and(|due| self.do_due(due));
        let mail = MAIL.load(Ordering::Acquire);
        // SAFETY: null, or the counter in records that are never unmapped once attached.
        if let Some(counter) = unsafe { mail.as_ref() } {
            // Before reading: a message that arrives meanwhile leaves the two different.
            SEEN.store(counter.load(Ordering::Acquire), Ordering::Relaxed);
        }
        while let Some(carrier) = &self.carrier {
            match carrier.recv() {
                Ok(Some(packet)) => self.handle(packet),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Ok(None) | Err(_) => self.lost_agent(),
            }
            changed = true;
        }
        if changed {
            // Who sleeps knows neither the new segments nor their doorbells.
            wait::kick();
        }
    }

    fn handle(&mut self, packet: Packet) {
        let Packet { message, fds } = packet;
        match message {
            Ok(Message::Attached { program, threshold_bytes, threshold_rounds, .. }) => {
                WORTH_BYTES.store(threshold_bytes, Ordering::Relaxed);
                WORTH_ROUNDS.store(threshold_rounds, Ordering::Relaxed);
                self.attached(program, fds);
            }
            Ok(Message::Tracked { handle, record, known, generation, ahead_tx, ahead_rx }) => {
                self.tracked(handle, record, known.then_some(Past { ahead_tx, ahead_rx, generation }));
            }
            Ok(Message::Declined { conn: handle, reason }) => self.declined(handle, reason),
            Ok(Message::Prepare { conn, generation, segment }) => {
                self.prepare(conn, generation, &segment, fds)
            }
            // The change itself stands in the record; who sleeps was woken by the message's arrival.
            Ok(Message::Nudge { record }) => {
                if let Some(conn) = self.conns.get(&record) {
                    conn.kernel_in.store(1, Ordering::Release);
                    conn.kernel_out.store(1, Ordering::Release);
                    conn.stir();
                }
            }
            _ => self.lost_agent(),
        }
    }

    fn attached(&mut self, program: u64, fds: Vec<OwnedFd>) {
        self.program = program;
        if self.answered {
            // A child that shares its parent's records.
            return;
        }
        let mut fds = fds.into_iter();
        let (Some(memory), Some(watchdog)) = (fds.next(), fds.next()) else { return self.lost_agent() };
        let Some(name) = name(&memory) else { return self.lost_agent() };
        if self.shared.as_ref().is_some_and(|shared| shared.name == name) {
            (self.answered, self.attachment) = (true, self.attachment + 1);
            self.resume_all();
        } else {
            let Ok(records) = Records::map(&memory) else { return self.lost_agent() };
            let shared = Arc::new(Shared { records, memory: lift(memory), name, watchdog: lift(watchdog) });
            (self.answered, self.attachment) = (true, self.attachment + 1);
            self.begin(shared);
        }
        // Whoever has proved worth it meanwhile may make no call for a while.
        for (fd, slot) in table::all() {
            let wanted = slot.phase.load(Ordering::Relaxed) == table::WANTED && slot.inside() == 0;
            if wanted && kin::is_alone(fd, slot) {
                self.track(fd, slot);
            }
        }
    }

    /// Goes on with other records; connections of those before go on without an agent.
    fn begin(&mut self, shared: Arc<Shared>) {
        self.conns.clear();
        SEEN.store(0, Ordering::Relaxed);
        let mail = std::ptr::from_ref(&shared.records.header().mail).cast_mut();
        // The counter is looked at without a lock, so these records stay mapped for good.
        std::mem::forget(shared.clone());
        MAIL.store(mail, Ordering::Release);
        self.shared = Some(shared);
    }

    fn prepare(&mut self, conn: u64, generation: u32, segment: &Segment, fds: Vec<OwnedFd>) {
        let record = u32::try_from(conn).unwrap_or(u32::MAX);
        let refuse = |client: &mut Self, reason| {
            client.tell(Message::Refused { conn, generation, reason });
        };
        let Some(held) = self.conns.get(&record).cloned() else { return refuse(self, Reason::Busy) };
        let Some(entry) = self.slab(segment, fds) else { return refuse(self, Reason::NoMemory) };
        // The segment before must be over, else what is left in it would be lost.
        if !held.endpoint().has_left() {
            return refuse(self, Reason::Busy);
        }
        let Some(bound) = Bound::new(generation, segment, entry.slab.clone(), entry.far.clone()) else {
            return refuse(self, Reason::NoMemory);
        };
        // Until it is prepared there is nothing to leave.
        held.left.store(generation, Ordering::Release);
        held.bind(bound, entry);
        match held.endpoint().prepare(generation) {
            Ok(()) => {
                held.left.store(0, Ordering::Release);
                epoll::bound(&held);
                self.tell(Message::Prepared { conn, generation });
            }
            Err(reason) => refuse(self, reason),
        }
    }

    fn slab(&mut self, segment: &Segment, fds: Vec<OwnedFd>) -> Option<Arc<SlabEntry>> {
        let mut fds = fds.into_iter();
        let memory = fds.next()?;
        let bells: Vec<OwnedFd> = fds.collect();
        if bells.len() != 2 * BELLS {
            return None;
        }
        // A slab's number is unique only within one life of its host; the file itself tells whether it is the same.
        let id = inode(&memory)? ^ (segment.slab << 40);
        // In a virtual machine its doorbells may be new ones: the host has ended those before.
        let same = |a: Option<&OwnedFd>, b: Option<&OwnedFd>| match (a, b) {
            (Some(a), Some(b)) => inode(a) == inode(b),
            _ => true,
        };
        if let Some(entry) = self.slabs.get(&id).filter(|entry| same(entry.own.first(), bells.first())) {
            return Some(entry.clone());
        }
        let in_use = |e: &Arc<SlabEntry>| Arc::strong_count(e) > 1;
        if self.slabs.len() >= 64 {
            self.slabs.retain(|_, e| in_use(e));
        }
        let slab = Arc::new(Slab::map(&memory, segment.slab, segment.geometry).ok()?);
        let mut bells = bells.into_iter().map(lift);
        let own: Vec<_> = bells.by_ref().take(BELLS).collect();
        if own.first().is_some_and(|bell| rustix::net::sockopt::socket_type(bell).is_ok()) {
            super::wait::doorbells_are_streams();
        }
        let entry = Arc::new(SlabEntry::new(slab, own, bells.collect()));
        self.slabs.insert(id, entry.clone());
        Some(entry)
    }
}
