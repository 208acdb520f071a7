//! The agent of a guest: it keeps the programs' records, speaks with the host's backend for them, and ends what they
//! leave behind. One thread, one loop; when nothing is due it sleeps without a timer.
//!
//! | file | what |
//! |---|---|
//! | `course` | one connection between program, agent and backend (sans-IO) |
//! | `liveness` | does the backend still answer (sans-IO) |
//! | `registry` | programs, processes, connections, totals |
//! | `program` | what programs say |
//! | `backend` | what the backend says, and its connection |
//! | `machine` | in a virtual machine: what the keeper says, and the slabs that it makes |
//! | `bells` | in a virtual machine: programs' doorbells, streams to the host |
//! | `ending` | connections whose program has closed them, or died |
//! | `parting` | connections that an executed program inherits |
//! | `reclaiming` | connections that programs have found, of others that had them |
//! | `resuming` | connections that an agent before had |
//! | `report` | what a person asks |
//! | `established` | the guest's connections, as its kernel knows them |

mod backend;
mod bells;
mod course;
mod ending;
mod established;
mod liveness;
mod machine;
mod parting;
mod program;
mod reclaiming;
mod registry;
pub mod report;
mod resuming;
mod slice;

use crate::carrier::Carrier;
use crate::host::Host;
use liveness::Liveness;
use machine::Machine;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use registry::Registry;
use rustix::fd::{AsFd, OwnedFd};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// How long the lanes may take to be left when the agent is told to end.
const STOPPING: Duration = Duration::from_secs(1);

/// How the agent reaches the backend.
#[derive(Debug)]
pub enum Way {
    /// In a container: by the vport's socket.
    Vport(PathBuf),
    /// In a virtual machine: by streams to the host, with a keeper for memory.
    Machine {
        /// Where the host is.
        host: Host,
        /// The socket to the keeper.
        keeper: OwnedFd,
    },
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vport(path) => write!(f, "{}", path.display()),
            Self::Machine { host, .. } => write!(f, "{host}"),
        }
    }
}

/// What the agent is told on its command line.
#[derive(Debug)]
pub struct Options {
    /// Where programs and tools find it.
    pub socket: PathBuf,
    /// Where it finds the backend.
    pub way: Way,
    /// A connection is opened once it has moved this many bytes,
    pub threshold_bytes: u64,
    /// or has made this many round trips.
    pub threshold_rounds: u32,
}

/// Why the agent cannot start, or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else serves the socket.
    #[error("another agent serves {0}: stop it, or choose another --socket")]
    Taken(PathBuf),
    /// A file that is no socket is in the way.
    #[error("{0} is there and is no socket: remove it, or choose another --socket")]
    InTheWay(PathBuf),
    /// The socket cannot be made.
    #[error("cannot listen at {path}: does its directory exist, and may I write there?")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A system call that the loop rests on.
    #[error("cannot {what}")]
    System {
        /// Which.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

fn system(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::System { what, source }
}

/// What a readiness event is about: the low bits of its token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Listener,
    Signal,
    Backend,
    Pidfd,
    Holder,
    Watchdog,
    Anchor,
    Keeper,
    Bells,
}

const KINDS: [Kind; 9] = [
    Kind::Listener,
    Kind::Signal,
    Kind::Backend,
    Kind::Pidfd,
    Kind::Holder,
    Kind::Watchdog,
    Kind::Anchor,
    Kind::Keeper,
    Kind::Bells,
];

fn token(kind: Kind, id: u64) -> Token {
    Token((id as usize) << 4 | kind as usize)
}

/// What is due at some time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
enum Timer {
    /// Look for the backend.
    Connect,
    /// Accept again.
    Accept,
    /// This connection may be opened.
    Open(u64),
    /// This connection's record has something to be done.
    Work(u64),
    /// This process is of no use any more.
    Lose(u64),
    /// This program's doorbells may be opened.
    Bells(u64),
}

/// Timers, the next first. One that has lost its meaning does no harm.
#[derive(Debug, Default)]
struct Timers(BinaryHeap<Reverse<(Instant, Timer)>>);

impl Timers {
    fn at(&mut self, at: Instant, timer: Timer) {
        self.0.push(Reverse((at, timer)));
    }

    fn next(&self) -> Option<Instant> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    fn pop(&mut self, now: Instant) -> Option<Timer> {
        self.next().filter(|at| *at <= now)?;
        self.0.pop().map(|Reverse((_, timer))| timer)
    }
}

/// The agent.
#[derive(Debug)]
struct Agent {
    options: Options,
    poll: Poll,
    listener: OwnedFd,
    signals: OwnedFd,
    registry: Registry,
    link: backend::Link,
    machine: Option<Machine>,
    liveness: Liveness,
    /// When it is next looked who holds a connection.
    looks_from: Option<Instant>,
    timers: Timers,
    programs_made: u64,
    /// Tracked connections whose programs are still to be told.
    untold: Vec<u64>,
    now: Instant,
    stopping: Option<Instant>,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
///
/// [`Error`], if it cannot start or the kernel refuses to wait.
pub fn run(options: Options) -> Result<(), Error> {
    raise_descriptor_limit();
    slice::ask();
    let signals = crate::signal::descriptor().map_err(system("receive signals"))?;
    let listener = listen(&options.socket)?;
    let poll = Poll::new().map_err(system("wait for events"))?;
    let machine = match &options.way {
        Way::Vport(_) => None,
        Way::Machine { host, keeper } => {
            let keeper = keeper.try_clone().and_then(|keeper| Machine::new(host.clone(), keeper));
            Some(keeper.map_err(system("listen to the keeper"))?)
        }
    };
    let programs_made = if machine.is_some() { machine::first_program() } else { 0 };
    let mut agent = Agent {
        options,
        machine,
        poll,
        listener,
        signals,
        registry: Registry::default(),
        link: backend::Link::default(),
        liveness: Liveness::default(),
        looks_from: None,
        timers: Timers::default(),
        programs_made,
        untold: Vec::new(),
        now: Instant::now(),
        stopping: None,
    };
    let sources = [(&agent.listener, Kind::Listener), (&agent.signals, Kind::Signal)];
    for (source, kind) in sources {
        agent.add(source, kind, 0, Interest::READABLE).map_err(system("wait for events"))?;
    }
    agent.watch_machine().map_err(system("wait for events"))?;
    info!(socket = %agent.options.socket.display(), backend = %agent.options.way, "serves");
    agent.timers.at(agent.now, Timer::Connect);
    let ended = agent.serve();
    let _ = std::fs::remove_file(&agent.options.socket);
    ended
}

impl Agent {
    fn serve(&mut self) -> Result<(), Error> {
        let mut events = Events::with_capacity(1024);
        loop {
            self.now = Instant::now();
            if self.stopping.is_some_and(|until| self.now >= until || !self.drains()) {
                return Ok(());
            }
            let due = [self.timers.next(), self.liveness.next_deadline(), self.stopping];
            let wait = due.into_iter().flatten().min().map(|at| at.saturating_duration_since(self.now));
            match self.poll.poll(&mut events, wait) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(Error::System { what: "wait for events", source }),
            }
            self.now = Instant::now();
            for event in &events {
                self.handle_event(event.token());
            }
            while let Some(timer) = self.timers.pop(self.now) {
                self.handle_timer(timer);
            }
            self.handle_liveness();
        }
    }

    fn handle_event(&mut self, Token(token): Token) {
        let id = (token >> 4) as u64;
        match KINDS.get(token & 15) {
            Some(Kind::Listener) => self.handle_listener_ready(),
            Some(Kind::Signal) => self.stop(),
            Some(Kind::Backend | Kind::Pidfd) => self.handle_backend_ready(),
            Some(Kind::Holder) => self.handle_holder_ready(id),
            Some(Kind::Watchdog) => self.handle_watchdog(id),
            Some(Kind::Anchor) => self.work(id),
            Some(Kind::Keeper) => self.handle_keeper_ready(),
            Some(Kind::Bells) => self.handle_bells_ready(),
            None => {}
        }
    }

    fn handle_timer(&mut self, timer: Timer) {
        match timer {
            Timer::Connect => self.connect_backend(),
            Timer::Accept => self.handle_listener_ready(),
            Timer::Open(conn) => self.follow(conn),
            Timer::Work(conn) => self.work(conn),
            Timer::Lose(holder) => self.lose_holder(holder),
            Timer::Bells(program) => self.open_bells(program),
        }
    }

    /// Leaves every lane, so that programs go on without an agent.
    fn stop(&mut self) {
        if self.stopping.is_some() {
            return;
        }
        info!("ends");
        self.stopping = Some(self.now + STOPPING);
        let _ = std::fs::remove_file(&self.options.socket);
        self.remove_source(&self.listener);
        let ids: Vec<u64> = self.registry.conns.keys().copied().collect();
        for id in ids {
            let now = self.now;
            let reason = vsocket_channel::reason::Reason::NoAgent;
            let conn = self.registry.conns.get_mut(&id);
            if let Some(act) = conn.and_then(|c| c.course.handle_withdraw(None, reason, now)) {
                self.act(id, act);
            }
        }
    }

    /// Whether bytes that a lane did not deliver are still to be put into a kernel socket.
    fn drains(&self) -> bool {
        let holds = |e: &ending::Ending| !matches!(e, ending::Ending::Reading(_));
        self.registry.conns.values().any(|c| c.draining || c.shutting || c.ending.as_ref().is_some_and(holds))
    }

    // ---- what the loop waits for -----------------------------------------------------------------------------------

    fn add(&self, fd: &impl AsFd, kind: Kind, id: u64, interest: Interest) -> io::Result<()> {
        self.poll.registry().register(&mut SourceFd(&program::raw(fd)), token(kind, id), interest)
    }

    fn remove_source(&self, fd: &impl AsFd) {
        let _ = self.poll.registry().deregister(&mut SourceFd(&program::raw(fd)));
    }

    /// Hears of the anchor's readiness from now on; it is told at once if it is ready already.
    fn watch(&mut self, id: u64) {
        let Some(conn) = self.registry.conns.get(&id).filter(|c| !c.watched) else { return };
        let Some(anchor) = &conn.anchor else { return };
        let added = self.add(anchor, Kind::Anchor, id, Interest::READABLE | Interest::WRITABLE);
        if let Err(error) = &added {
            warn!(%error, "cannot wait for an anchor");
        }
        if let Some(conn) = self.registry.conns.get_mut(&id) {
            conn.watched = added.is_ok();
        }
    }

    fn unwatch(&mut self, id: u64) {
        let Some(conn) = self.registry.conns.get(&id).filter(|c| c.watched) else { return };
        if let Some(anchor) = &conn.anchor {
            self.remove_source(anchor);
        }
        if let Some(conn) = self.registry.conns.get_mut(&id) {
            conn.watched = false;
        }
    }
}

/// A listener at `path`; a socket that nobody serves any more is replaced.
fn listen(path: &Path) -> Result<OwnedFd, Error> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return Err(Error::InTheWay(path.to_owned()));
        }
        match Carrier::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                let _ = std::fs::remove_file(path);
            }
            _ => return Err(Error::Taken(path.to_owned())),
        }
    }
    let listener = Carrier::listen(path).and_then(|listener| {
        // Every user's programs may use it; what a program gets is its own.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
        Ok(listener)
    });
    listener.map_err(|source| Error::Listen { path: path.to_owned(), source })
}

/// A duplicate of each accelerated socket is held here.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "cannot raise the limit of open files");
    }
}
