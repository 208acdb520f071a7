//! The daemon: one thread that owns everything, and the only place that waits.
//!
//! A turn does what the kernel reported, then what pairing wants, then moves bytes. While bytes move it polls, and yields
//! the processor on every pass that found nothing, and on each where there is only one; after a while without work
//! ([`rhythm`]) it announces its sleep in every slab that it has looked at, looks once more, and blocks. A host whose guests
//! use only `direct` lanes just blocks.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use rustix::time::{ClockId, clock_gettime};
use vsocket_channel::reason::Reason;

use crate::config::Config;
use crate::fabric::Facts;
use crate::metrics::{Metrics, Traffic};
use crate::operator::Operator;
use crate::pairing::{Pairing, VportFacts};
use crate::slab::Pool;
use crate::vport::Vport;

mod data;
mod effects;
mod guests;
#[cfg(feature = "vm")]
mod keepers;
#[cfg(feature = "vm")]
mod machines;
mod peers;
mod relays;
mod rhythm;
mod shelves;
mod start;
mod tools;

pub use peers::{Link, LinkEvent};
pub use start::{Error, run};

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
    #[cfg(feature = "vm")]
    Front(u32),
    /// Of a vport, by number.
    #[cfg(feature = "vm")]
    Caller(u32, u32),
    #[cfg(feature = "vm")]
    Keeper(u32),
    /// Of a vport, by number.
    #[cfg(feature = "vm")]
    GuestBell(u32, u32),
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
            #[cfg(feature = "vm")]
            Self::Front(n) => (8, u64::from(n)),
            // Of both there are far fewer.
            #[cfg(feature = "vm")]
            Self::Caller(vport, n) => (9, u64::from(vport) << 16 | u64::from(n)),
            #[cfg(feature = "vm")]
            Self::Keeper(n) => (10, u64::from(n)),
            #[cfg(feature = "vm")]
            Self::GuestBell(vport, n) => (11, u64::from(vport) << 16 | u64::from(n)),
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
            #[cfg(feature = "vm")]
            8 => Self::Front(n as u32),
            #[cfg(feature = "vm")]
            9 => Self::Caller((n >> 16) as u32, n as u32 & 0xffff),
            #[cfg(feature = "vm")]
            10 => Self::Keeper(n as u32),
            #[cfg(feature = "vm")]
            11 => Self::GuestBell((n >> 16) as u32, n as u32 & 0xffff),
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

/// The hosts' ends of the overlay, as a capture names them.
#[derive(Debug, Default)]
struct Overlay {
    own: Option<std::net::IpAddr>,
    /// Each peer's.
    peers: Vec<std::net::IpAddr>,
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
    data: Option<data::Data>,
    relays: relays::Relays,
    overlay: Overlay,
    peers: Option<peers::Peers>,
    /// When the peers were last looked at.
    watched: Instant,
    /// Sockets that may hold more than one turn may take.
    more: Vec<Source>,
    /// Turns of the loop: an idle daemon makes none.
    pub(crate) passes: u64,
    /// Since when we are to end.
    ending: Option<Instant>,
    /// A doorbell of a virtual machine is to be read empty there.
    #[cfg(feature = "vm")]
    bells_full: Arc<AtomicBool>,
    /// Guests that stand still, whose fronts wait for our word.
    #[cfg(feature = "vm")]
    quieting: Vec<u32>,
    /// Slabs of guests that are no more, but that the fabric may still read from.
    #[cfg(feature = "vm")]
    lingering: Vec<(u32, u64, std::sync::Weak<crate::slab::Memory>)>,
}

impl Daemon {
    /// Listens everywhere; nothing is served before [`run`](Self::run).
    ///
    /// # Errors
    ///
    /// What cannot be listened at, or what the system does not give.
    pub fn new(config: Config) -> Result<Self, Error> {
        let poll = Poll::new().map_err(Error::System)?;
        let waker = Arc::new(Waker::new(poll.registry(), Source::Waker.token()).map_err(Error::System)?);
        let facts = |vport: &crate::config::Vport| VportFacts {
            vni: vport.vni,
            addresses: vport.addresses.clone(),
            mac: vport.mac,
            max_connections: vport.max_connections,
            ring_len: u64::from(vport.ring_bytes),
            // A machine's rings lie in its own memory, which is nobody else's.
            relayed: vport.machine.is_some() || !vport.direct,
        };
        let hosts: Vec<_> = config.backends.iter().flat_map(|b| &b.peers).map(|p| p.host.clone()).collect();
        let pairing = Pairing::new(config.vports.iter().map(facts).collect(), config.directory, &hosts);
        let mut vports = Vec::new();
        for vport in config.vports {
            let path = vport.socket.clone();
            vports.push(Vport::new(vport).map_err(|source| Error::Listen { path, source })?);
        }
        let path = config.control.clone();
        let operator = Operator::new(config.control).map_err(|source| Error::Listen { path, source })?;
        let mut boot = [0; 8];
        getrandom::fill(&mut boot).map_err(|error| Error::System(io::Error::other(error)))?;
        let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).map_err(|e| Error::System(e.into()))?;
        let mut daemon = Self {
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
            data: None,
            relays: relays::Relays::default(),
            overlay: Overlay::default(),
            peers: None,
            watched: Instant::now(),
            more: Vec::new(),
            passes: 0,
            ending: None,
            #[cfg(feature = "vm")]
            bells_full: Arc::default(),
            #[cfg(feature = "vm")]
            quieting: Vec::new(),
            #[cfg(feature = "vm")]
            lingering: Vec::new(),
        };
        for (n, vport) in daemon.vports.iter().enumerate() {
            let source = Source::Listener(n as u32);
            if vport.config.machine.is_some() {
                daemon.pool.set_lender(n as u32);
            }
            daemon.watch(vport.raw_fd(), source, Interest::READABLE).map_err(Error::System)?;
        }
        let operator = daemon.operator.raw_fd();
        daemon.watch(operator, Source::Operator, Interest::READABLE).map_err(Error::System)?;
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
        let mut rhythm = rhythm::Rhythm::new(Instant::now());
        // With one processor, whoever is to take what was just posted runs only if this one lets it.
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online");
        let only = online.is_ok_and(|list| !list.contains(['-', ',']));
        loop {
            if self.stop.flag.load(Ordering::Acquire) && self.ending.is_none() {
                self.ending = Some(Instant::now());
                self.pairing.handle_stop(Reason::BackendGone);
            }
            self.passes += 1;
            self.settle();
            let worked = self.move_bytes();
            let now = Instant::now();
            rhythm.passed(now, worked);
            let machines = self.relays.machines() || self.data.as_ref().is_some_and(data::Data::machines);
            let polls = !self.is_idle() && rhythm.spins(now, machines);
            let naps = polls && machines && !worked && self.more.is_empty();
            if naps {
                self.nap(&mut rhythm);
            } else if polls && !rhythm.asks(now) && self.more.is_empty() {
                if !worked || only {
                    rustix::thread::sched_yield();
                }
                continue;
            }
            let gone = |since: Instant| self.pairing.carried_stays() == 0 || now >= since + FAREWELL;
            if self.ending.is_some_and(gone) {
                return Ok(());
            }
            // Who sleeps must know until when.
            self.watch_peers(now);
            if self.pairing.has_work() || (worked && !polls) {
                continue;
            }
            let mut timeout = Some(Duration::ZERO);
            if !polls && self.more.is_empty() && self.may_sleep() {
                timeout = self.deadline(now);
            }
            let slept = timeout != Some(Duration::ZERO);
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            let now = Instant::now();
            rhythm.asked(now, slept);
            for event in &events {
                if let Some(source) = Source::of(event.token()) {
                    self.handle(source);
                }
            }
            events.clear();
            for source in std::mem::take(&mut self.more) {
                self.handle(source);
            }
            self.handle_time(now);
        }
    }

    /// Sleeps for a moment, which the kernel ends early if it has something to say.
    fn nap(&self, rhythm: &mut rhythm::Rhythm) {
        let spent = clock_gettime(ClockId::ThreadCPUTime);
        let length = rhythm.nap(Duration::new(spent.tv_sec as u64, spent.tv_nsec as u32));
        let limit = Timespec { tv_sec: 0, tv_nsec: i64::from(length.subsec_nanos()) };
        let _ = rustix::event::poll(&mut [PollFd::new(self.poll.registry(), PollFlags::IN)], Some(&limit));
    }

    /// Whether no connection's bytes go through this backend.
    fn is_idle(&self) -> bool {
        self.relays.is_idle() && self.data.as_ref().is_none_or(data::Data::is_idle)
    }

    /// Moves bytes, and does what came of it. Says whether there was anything.
    fn move_bytes(&mut self) -> bool {
        let mut worked = self.relays.pass(&mut self.metrics.drops);
        for relay in self.relays.failed() {
            self.pairing.handle_relay_failed(relay, Reason::Violation);
        }
        if let Some(data) = &mut self.data {
            // Also a backend that never rests acknowledges everything within moments.
            worked |= data.pass(&mut self.metrics.drops, self.passes.is_multiple_of(64));
        }
        self.take_notices();
        #[cfg(feature = "vm")]
        if self.bells_full.load(Ordering::Relaxed) && self.bells_full.swap(false, Ordering::Relaxed) {
            self.empty_bells();
        }
        worked
    }

    /// Announces that we sleep, and looks once more: true if there is really nothing. What was announced stands until
    /// its slab is looked at again.
    fn may_sleep(&mut self) -> bool {
        let drops = &mut self.metrics.drops;
        self.relays.rest(drops) && self.data.as_mut().is_none_or(|data| data.rest(drops))
    }

    fn handle_time(&mut self, now: Instant) {
        self.pairing.handle_timeout(now);
        self.watch_peers(now);
        self.relays.cool(now, &mut self.metrics.drops);
        if let Some(data) = &mut self.data {
            data.cool(now, &mut self.metrics.drops);
            if data.fabric.next_deadline().is_some_and(|at| at <= now) {
                data.fabric.handle_timeout(now);
            }
        }
    }

    /// How long the kernel may keep us.
    fn deadline(&self, now: Instant) -> Option<Duration> {
        let ending = self.ending.map(|since| since + FAREWELL);
        let peers = self.peers.as_ref().and_then(peers::Peers::next_deadline);
        let fabric = self.data.as_ref().and_then(|data| data.fabric.next_deadline());
        let all = [self.pairing.next_deadline(), peers, fabric, ending];
        let at = all.into_iter().flatten().min()?;
        Some(at.saturating_duration_since(now))
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Waker => self.link_ready(),
            Source::Fabric => {}
            Source::Bell(number) => self.bell_rung(number),
            Source::Signal => self.stop.flag.store(true, Ordering::Release),
            #[cfg(feature = "vm")]
            Source::Listener(vport) if self.vports[vport as usize].machine.is_some() => {
                self.front_arrives(vport)
            }
            #[cfg(feature = "vm")]
            Source::Front(vport) => self.front_ready(vport),
            #[cfg(feature = "vm")]
            Source::Caller(vport, slot) => self.caller_ready(vport, slot),
            #[cfg(feature = "vm")]
            Source::Keeper(vport) => self.keeper_ready(vport),
            #[cfg(feature = "vm")]
            Source::GuestBell(vport, slot) => self.guest_rings(vport, slot),
            Source::Listener(vport) => self.agent_arrives(vport),
            Source::Agent(vport) => self.agent_ready(vport),
            Source::Operator => self.tool_arrives(),
            Source::Tool(tool) => self.tool_ready(tool),
        }
    }

    fn bell_rung(&mut self, slab: u64) {
        self.relays.bell(slab);
        if let Some(data) = &mut self.data {
            data.bell(slab);
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

impl Daemon {
    /// What wakes this daemon: for a [`Link`].
    pub fn waker(&self) -> Arc<Waker> {
        self.stop.waker.clone()
    }

    /// The fabric's name, why it is that one, and what it stands on.
    pub(crate) fn fabric(&self) -> Option<(&'static str, &str, Facts)> {
        let data = self.data.as_ref()?;
        Some((data.fabric.kind().name(), &data.why, data.fabric.facts()))
    }

    /// The peers' names, whether each can be reached, and its fabric if that is not ours.
    pub(crate) fn peer_states(&self) -> impl Iterator<Item = (&str, bool, Option<&'static str>)> {
        let states = self.peers.iter().flat_map(|peers| &peers.states);
        states.map(|peer| (peer.host.as_str(), peer.connected && !peer.silent, peer.other_fabric))
    }

    /// The counters of the captures that run.
    pub(crate) fn captures(&self) -> impl Iterator<Item = serde_json::Value> {
        self.data.iter().flat_map(data::Data::taps).map(crate::capture::Tap::counters)
    }

    /// What a vport's flows and relays have carried, those that are over and those that are not.
    pub(crate) fn traffic(&self, vport: usize) -> Traffic {
        let mut sum = self.vports[vport].traffic;
        let entries = self.data.iter().flat_map(data::Data::entries);
        entries.filter(|e| e.vport as usize == vport).for_each(|e| sum.add(e.flow.traffic));
        let relayed = self.relays.traffic().filter(|(of, _)| *of as usize == vport);
        relayed.for_each(|(_, traffic)| sum.add(traffic));
        sum
    }
}
