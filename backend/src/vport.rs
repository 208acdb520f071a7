//! One guest's attachment: its listening socket, its agent while there is one, and its counters.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use vsocket_channel::message::Message;

use crate::carrier::{self, Carrier, Fds, Gone};
use crate::config;
#[cfg(feature = "vm")]
use crate::machine::Machine;
use crate::metrics::Traffic;

/// The agent of a vport.
#[derive(Debug)]
pub struct Agent {
    /// Its control connection.
    pub carrier: Carrier,
    /// Its process, after `Hello`.
    pub pid: Option<u32>,
}

/// A vport.
#[derive(Debug)]
pub struct Vport {
    /// What the configuration says.
    pub config: config::Vport,
    /// What flows that are over have carried.
    pub traffic: Traffic,
    /// Its agent.
    pub agent: Option<Agent>,
    /// What a virtual machine has besides.
    #[cfg(feature = "vm")]
    pub machine: Option<Machine>,
    listener: OwnedFd,
}

impl Vport {
    /// Listens for the agent.
    ///
    /// # Errors
    ///
    /// What the socket calls say.
    pub fn new(config: config::Vport) -> io::Result<Self> {
        let listener = carrier::listen_at(&config.socket)?;
        #[cfg(feature = "vm")]
        let machine = config.machine.is_some().then(Machine::default);
        Ok(Self {
            config,
            traffic: Traffic::default(),
            agent: None,
            #[cfg(feature = "vm")]
            machine,
            listener,
        })
    }

    /// For registration with the event loop.
    pub fn raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// The next agent that wants in.
    ///
    /// # Errors
    ///
    /// What `accept` says.
    pub fn accept(&self) -> io::Result<Option<Carrier>> {
        let carrier = carrier::accept(&self.listener)?;
        Ok(carrier.map(|carrier| carrier.for_connections(self.config.max_connections)))
    }

    /// Sends to the agent, if there is one that has said `Hello`.
    ///
    /// # Errors
    ///
    /// [`Gone`]: the agent is to be forgotten.
    pub fn tell(&mut self, message: &Message, fds: Fds) -> Result<(), Gone> {
        match &mut self.agent {
            Some(agent) if agent.pid.is_some() => agent.carrier.send(message, fds),
            _ => Ok(()),
        }
    }
}

impl Drop for Vport {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.config.socket);
    }
}
