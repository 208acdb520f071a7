//! The daemon: one thread that owns everything, and the only place that waits.
//!
//! A turn does what the kernel reported, then what pairing wants, then moves bytes. While bytes move it polls, and yields
//! the processor on every pass that found nothing; after [`SPIN`] without work it announces its sleep in every slab it
//! shares, looks once more, and blocks. A host whose guests use only `direct` lanes just blocks.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use vsocket_channel::reason::Reason;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::operator::Operator;
use crate::pairing::{Pairing, VportFacts};
use crate::slab::Pool;
use crate::vport::Vport;

mod effects;
mod guests;
mod tools;

/// Polling goes on for so long without work.
const SPIN: Duration = Duration::from_micros(50);
/// While polling, the kernel is asked at least this often.
const ASK: Duration = Duration::from_micros(50);
/// An orderly end waits for guests to leave at most this long.
const FAREWELL: Duration = Duration::from_secs(1);

/// What a token of the event loop stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Waker,
    Signal,
    Listener(u32),
    Agent(u32),
    Operator,
    Tool(u32),
    Fabric,
    Bell(u64),
}

const KIND_SHIFT: u32 = 48;

impl Source {
    fn token(self) -> Token {
        let (kind, n) = match self {
            Self::Waker => (0, 0),
            Self::Signal => (1, 0),
            Self::Listener(n) => (2, u64::from(n)),
            Self::Agent(n) => (3, u64::from(n)),
            Self::Operator => (4, 0),
            Self::Tool(n) => (5, u64::from(n)),
            Self::Fabric => (6, 0),
            Self::Bell(n) => (7, n),
        };
        Token((kind << KIND_SHIFT | n) as usize)
    }

    fn of(token: Token) -> Option<Self> {
        let (kind, n) = (token.0 as u64 >> KIND_SHIFT, token.0 as u64 & ((1 << KIND_SHIFT) - 1));
        Some(match kind {
            0 => Self::Waker,
            1 => Self::Signal,
            2 => Self::Listener(n as u32),
            3 => Self::Agent(n as u32),
            4 => Self::Operator,
            5 => Self::Tool(n as u32),
            6 => Self::Fabric,
            7 => Self::Bell(n),
            _ => return None,
        })
    }
}

/// Ends a daemon from another thread, as SIGTERM does.
#[derive(Clone, Debug)]
pub struct Stop {
    waker: Arc<Waker>,
    flag: Arc<AtomicBool>,
}

impl Stop {
    /// Asks the daemon to end in order.
    pub fn stop(&self) {
        self.flag.store(true, Ordering::Release);
        // If the waker fails the loop is gone already.
        let _ = self.waker.wake();
    }
}

/// Everything of one host.
#[derive(Debug)]
pub struct Daemon {
    pub(crate) host: String,
    pub(crate) vports: Vec<Vport>,
    pub(crate) pairing: Pairing,
    pub(crate) pool: Pool,
    pub(crate) metrics: Metrics,
    operator: Operator,
    boot: u64,
    poll: Poll,
    stop: Stop,
    signals: Option<mio::net::UnixStream>,
    pidfd: Arc<OwnedFd>,
    /// Agents whose sockets may hold more than one turn may take.
    more: Vec<u32>,
    /// Since when we are to end.
    ending: Option<Instant>,
}

impl Daemon {
    /// Listens everywhere; nothing is served before [`run`](Self::run).
    ///
    /// # Errors
    ///
    /// What cannot be listened at, or what the system does not give.
    pub fn new(config: Config) -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), Source::Waker.token())?);
        let facts = |vport: &crate::config::Vport| VportFacts {
            vni: vport.vni,
            addresses: vport.addresses.clone(),
            mac: vport.mac,
            max_connections: vport.max_connections,
            ring_len: u64::from(vport.ring_bytes),
        };
        let hosts: Vec<_> = config.backends.iter().flat_map(|b| &b.peers).map(|p| p.host.clone()).collect();
        let pairing = Pairing::new(config.vports.iter().map(facts).collect(), config.directory, &hosts);
        let mut vports = Vec::new();
        for vport in config.vports {
            let path = vport.socket.clone();
            vports.push(Vport::new(vport).map_err(|error| self::at(&path, error))?);
        }
        let operator = Operator::new(config.control)?;
        let mut boot = [0; 8];
        getrandom::fill(&mut boot).map_err(|_| io::Error::other("no random bytes"))?;
        let pidfd = rustix::process::pidfd_open(
            rustix::process::getpid(),
            rustix::process::PidfdFlags::empty(),
        )?;
        let daemon = Self {
            host: config.host.as_str().to_owned(),
            vports,
            pairing,
            pool: Pool::default(),
            metrics: Metrics::default(),
            operator,
            boot: u64::from_le_bytes(boot),
            poll,
            stop: Stop { waker, flag: Arc::default() },
            signals: None,
            pidfd: Arc::new(pidfd),
            more: Vec::new(),
            ending: None,
        };
        for (n, vport) in daemon.vports.iter().enumerate() {
            daemon.watch(vport.raw_fd(), Source::Listener(n as u32), Interest::READABLE)?;
        }
        daemon.watch(daemon.operator.raw_fd(), Source::Operator, Interest::READABLE)?;
        Ok(daemon)
    }

    /// What ends this daemon from another thread.
    pub fn stopper(&self) -> Stop {
        self.stop.clone()
    }

    /// SIGTERM and SIGINT end the daemon.
    ///
    /// # Errors
    ///
    /// If the system takes no handler.
    pub fn watch_signals(&mut self) -> io::Result<()> {
        let (mut reader, writer) = mio::net::UnixStream::pair()?;
        let second = std::os::fd::AsFd::as_fd(&writer).try_clone_to_owned()?;
        signal_hook::low_level::pipe::register(signal_hook::consts::SIGTERM, OwnedFd::from(writer))?;
        signal_hook::low_level::pipe::register(signal_hook::consts::SIGINT, second)?;
        self.poll.registry().register(&mut reader, Source::Signal.token(), Interest::READABLE)?;
        self.signals = Some(reader);
        Ok(())
    }

    /// Serves until it is told to end.
    ///
    /// # Errors
    ///
    /// If waiting itself fails.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        loop {
            let now = Instant::now();
            if self.stop.flag.load(Ordering::Acquire) && self.ending.is_none() {
                self.ending = Some(now);
                self.pairing.handle_stop(Reason::BackendGone);
            }
            self.settle();
            if let Some(since) = self.ending
                && (self.pairing.fabric_stays() == 0 || now >= since + FAREWELL)
            {
                return Ok(());
            }
            let timeout = if self.more.is_empty() { self.deadline(now) } else { Some(Duration::ZERO) };
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for event in &events {
                if let Some(source) = Source::of(event.token()) {
                    self.handle(source);
                }
            }
            events.clear();
            for vport in std::mem::take(&mut self.more) {
                self.agent_ready(vport);
            }
            self.pairing.handle_timeout(Instant::now());
        }
    }

    /// How long the kernel may keep us.
    fn deadline(&self, now: Instant) -> Option<Duration> {
        let ending = self.ending.map(|since| since + FAREWELL);
        let at = [self.pairing.next_deadline(), ending].into_iter().flatten().min()?;
        Some(at.saturating_duration_since(now))
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Waker | Source::Fabric | Source::Bell(_) => {}
            Source::Signal => self.stop.flag.store(true, Ordering::Release),
            Source::Listener(vport) => self.agent_arrives(vport),
            Source::Agent(vport) => self.agent_ready(vport),
            Source::Operator => self.tool_arrives(),
            Source::Tool(tool) => self.tool_ready(tool),
        }
    }

    fn watch(&self, fd: i32, source: Source, interest: Interest) -> io::Result<()> {
        self.poll.registry().register(&mut SourceFd(&fd), source.token(), interest)
    }

    fn unwatch(&self, fd: i32) {
        // A descriptor that is about to be closed leaves the set with its last copy anyhow.
        let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
    }
}

fn at(path: &std::path::Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

impl Daemon {
    pub(crate) fn fabric_name(&self) -> &'static str {
        "none"
    }

    pub(crate) fn peer_states(&self) -> serde_json::Value {
        serde_json::Value::Array(vec![])
    }

    pub(crate) fn traffic(&self, vport: usize) -> crate::metrics::Traffic {
        self.vports[vport].traffic
    }
}
