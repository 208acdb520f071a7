//! Puts the daemon together: control connections, fabric, signals.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;

use crossbeam_channel::Receiver;
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Daemon, Link, LinkEvent, Overlay};
use crate::config::{self, Config};
use crate::fabric::soft::{Options, Soft};
use crate::fabric::{self, Fabric};
use crate::peer::message::{HostName, PeerMessage};
use crate::peer::{self, PeerEvent, PeerHandle, Peers};

/// Descriptors that the table has room for from the start: 512 KiB of the kernel's memory.
const DESCRIPTORS: i32 = 1 << 16;

/// Why the daemon cannot run, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A socket of a vport or the operator's.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The control connections.
    #[error("cannot meet other backends")]
    Peers(#[from] peer::Error),
    /// The fabric.
    #[error("cannot start the fabric")]
    Fabric(#[from] crate::fabric::Error),
    /// What every daemon needs of the system.
    #[error("cannot set up the event loop")]
    System(#[source] io::Error),
    /// The loop ended without being told to.
    #[error("cannot wait for events")]
    Wait(#[source] io::Error),
}

/// The peer thread as a [`Link`].
struct Control {
    /// Stops the thread when the daemon goes.
    _peers: Peers,
    handle: PeerHandle,
    events: Receiver<PeerEvent>,
    hosts: Vec<HostName>,
    numbers: HashMap<HostName, u32>,
}

impl Control {
    fn host(&self, peer: u32) -> Option<&HostName> {
        self.hosts.get(peer as usize)
    }
}

impl Link for Control {
    fn send(&mut self, peer: u32, message: PeerMessage) {
        if let Some(host) = self.host(peer) {
            self.handle.send(host, message);
        }
    }

    fn reset(&mut self, peer: u32) {
        if let Some(host) = self.host(peer) {
            self.handle.reset(host);
        }
    }

    fn poll(&mut self) -> Option<LinkEvent> {
        loop {
            // Events of hosts that are not configured do not come: the peer thread refuses them.
            let number = |host| self.numbers.get(host).copied();
            let event = match self.events.try_recv().ok()? {
                PeerEvent::Up { host, .. } => number(&host).map(LinkEvent::Up),
                PeerEvent::Message { host, message } => number(&host).map(|n| LinkEvent::Message(n, message)),
                PeerEvent::Down { host, reason } => {
                    tracing::info!(%host, reason = reason.name(), "control connection gone");
                    number(&host).map(LinkEvent::Down)
                }
                PeerEvent::Refused { from, reason } => {
                    tracing::warn!(%from, reason = reason.name(), "control connection refused");
                    Some(LinkEvent::Refused(reason.name()))
                }
            };
            if event.is_some() {
                return event;
            }
        }
    }
}

/// Runs until told to stop.
///
/// # Errors
///
/// [`Error`].
pub fn run(config: Config) -> Result<(), Error> {
    raise_descriptors();
    crate::slice::ask();
    // Naps of microseconds would otherwise be 50 µs longer (PR_SET_TIMERSLACK).
    if let Err(error) = rustix::thread::set_current_timer_slack(NonZeroU64::new(1)) {
        tracing::warn!(%error, "cannot ask for exact timers");
    }
    let mut daemon = Daemon::with_backends(config)?;
    daemon.watch_signals().map_err(Error::System)?;
    tracing::info!(host = daemon.host, "serving");
    daemon.run().map_err(Error::Wait)
}

/// Each slab has up to nine descriptors, so we take as many as we may. The table is made large before there are threads:
/// with them its growth would stop the data path for an RCU grace period, tens of milliseconds.
fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "cannot raise the limit of open descriptors");
    }
    let last = limit.maximum.map_or(DESCRIPTORS, |most| DESCRIPTORS.min(most as i32)) - 1;
    if let Ok(fd) = eventfd(0, EventfdFlags::CLOEXEC) {
        // Closed at once; the table stays.
        let _ = rustix::io::fcntl_dupfd_cloexec(&fd, last);
    }
}

/// The fabric that the configuration means, and why it is that one.
fn choose(config: &config::Fabric) -> Result<(Box<dyn Fabric>, String), fabric::Error> {
    let soft = |listen: &SocketAddr| Soft::new(*listen, Options::default()).map(Box::new);
    Ok(match config {
        config::Fabric::Soft { listen } => (soft(listen)?, "configured".to_owned()),
        config::Fabric::Verbs(device) => (verbs(device)?, "configured".to_owned()),
        config::Fabric::Auto { listen, device } => match open_verbs(device) {
            Ok(verbs) => (verbs, "auto: there is a usable RDMA device".to_owned()),
            Err(why) => (soft(listen)?, format!("auto: {why}")),
        },
    })
}

#[cfg(feature = "verbs")]
fn wanted(device: &config::Device) -> fabric::verbs::select::Wanted {
    let config::Device { name, netdev, address, underlay } = device.clone();
    fabric::verbs::select::Wanted { device: name, netdev, address, underlay }
}

#[cfg(feature = "verbs")]
fn verbs(device: &config::Device) -> Result<Box<dyn Fabric>, fabric::Error> {
    raise_memory();
    Ok(Box::new(fabric::verbs::Verbs::new(wanted(device))?))
}

#[cfg(feature = "verbs")]
fn open_verbs(device: &config::Device) -> Result<Box<dyn Fabric>, String> {
    raise_memory();
    match fabric::verbs::Verbs::open(wanted(device)) {
        Ok(verbs) => Ok(Box::new(verbs)),
        Err(error) => Err(error.to_string()),
    }
}

/// A device's memory stays where it is, which counts against a limit that is often tiny.
#[cfg(feature = "verbs")]
fn raise_memory() {
    let none = Rlimit { current: None, maximum: None };
    if setrlimit(Resource::Memlock, none).is_err() {
        let limit = getrlimit(Resource::Memlock);
        if let Err(error) = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit }) {
            tracing::warn!(%error, "cannot raise the limit of locked memory");
        }
    }
}

#[cfg(not(feature = "verbs"))]
fn verbs(_device: &config::Device) -> Result<Box<dyn Fabric>, fabric::Error> {
    Err(fabric::Error::NoDevice("this vsocketd is built without verbs".to_owned()))
}

#[cfg(not(feature = "verbs"))]
fn open_verbs(_device: &config::Device) -> Result<Box<dyn Fabric>, String> {
    Err("this vsocketd is built without verbs".to_owned())
}

impl Daemon {
    /// A daemon that meets the other backends of its configuration.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn with_backends(config: Config) -> Result<Self, Error> {
        let (backends, host) = (config.backends.clone(), config.host.clone());
        let mut daemon = Self::new(config)?;
        if let Some(backends) = backends {
            let (fabric, why) = choose(&backends.fabric)?;
            tracing::info!(fabric = fabric.kind().name(), why, "fabric");
            let waker = daemon.waker();
            let wake = move || {
                // Without a loop there is nobody to wake.
                let _ = waker.wake();
            };
            let (peers, events) = Peers::start(&backends, &host, daemon.boot, wake)?;
            let vteps = backends.peers.iter().map(|p| p.vtep).collect();
            daemon.overlay = Overlay { own: backends.fabric.underlay(), peers: vteps };
            let hosts: Vec<_> = backends.peers.iter().map(|p| p.host.clone()).collect();
            let numbers = hosts.iter().enumerate().map(|(n, host)| (host.clone(), n as u32)).collect();
            let names = hosts.iter().map(HostName::to_string).collect();
            let link = Control { handle: peers.handle(), _peers: peers, events, hosts, numbers };
            daemon.join(fabric, Box::new(link), names).map_err(Error::System)?;
            if let Some(data) = &mut daemon.data {
                data.why = why;
            }
        }
        Ok(daemon)
    }
}
