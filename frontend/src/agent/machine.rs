//! The agent in a virtual machine: what it hears from its keeper, and the doorbells that it has with the host.

#![forbid(unsafe_code)]

use super::bells::Bells;
use super::registry::MappedSlab;
use super::{Agent, Kind, Timer};
use crate::carrier::{Carrier, Packet};
use crate::host::Host;
use crate::memory::Slab;
use mio::Interest;
use rustix::fd::OwnedFd;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tracing::{debug, info, warn};
use vsocket_channel::layout::Geometry;
use vsocket_channel::message::{Message, Segment};
use vsocket_channel::reason::Reason;

/// How long after bells could not be opened, or were ended by the host, they are opened again.
const BELLS_AGAIN: Duration = Duration::from_secs(1);

/// A slab that the keeper has made.
#[derive(Debug)]
struct Made {
    program: u64,
    geometry: Geometry,
    memfd: Arc<Vec<OwnedFd>>,
}

/// What an agent in a virtual machine has that one in a container has not.
#[derive(Debug)]
pub struct Machine {
    /// Where the host is.
    pub host: Host,
    /// What proves to the host who we are, once the keeper has registered.
    pub token: Option<u128>,
    keeper: Carrier,
    made: HashMap<u64, Made>,
    bells: Bells,
}

impl Machine {
    /// Nothing is made yet.
    ///
    /// # Errors
    ///
    /// Out of descriptors.
    pub fn new(host: Host, keeper: OwnedFd) -> io::Result<Self> {
        let bells = Bells::new()?;
        Ok(Self { host, token: None, keeper: keeper.into(), made: HashMap::new(), bells })
    }

    /// Bytes of the slabs that the keeper has made, and how many these are.
    pub fn pinned(&self) -> (u64, u64) {
        let bytes = self.made.values().map(|made| made.geometry.slab_len() as u64).sum();
        (bytes, self.made.len() as u64)
    }
}

/// A number for programs to count from: the host may still know those of an agent that has died.
pub fn first_program() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(0))
}

impl Agent {
    /// Listens to the keeper, and for the ends of bells.
    pub(super) fn watch_machine(&self) -> io::Result<()> {
        let Some(machine) = &self.machine else { return Ok(()) };
        self.add(&machine.keeper, Kind::Keeper, 0, Interest::READABLE)?;
        self.add(&machine.bells, Kind::Bells, 0, Interest::READABLE)
    }

    /// The keeper has something to say.
    pub(super) fn handle_keeper_ready(&mut self) {
        while let Some(machine) = &self.machine {
            match machine.keeper.recv() {
                Ok(Some(packet)) => self.handle_keeper(packet),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(None) | Err(_) => {
                    if self.stopping.is_none() {
                        warn!("the keeper is gone, and with it what keeps the rings' memory in its place");
                    }
                    self.remove_source(&machine.keeper);
                    return self.stop();
                }
            }
        }
    }

    fn handle_keeper(&mut self, mut packet: Packet) {
        let Some(machine) = &mut self.machine else { return };
        match (packet.message, packet.fds.pop()) {
            (Ok(Message::Registered { token, .. }), None) => {
                debug!("registered");
                machine.token = Some(token);
                // The host touches nothing any more that was made before.
                machine.made.clear();
                self.lose_backend(Duration::ZERO);
                self.timers.at(self.now, Timer::Connect);
            }
            (Ok(Message::SlabMade { slab, program, geometry }), Some(memfd)) => {
                machine.made.insert(slab, Made { program, geometry, memfd: Arc::new(vec![memfd]) });
                self.open_bells(program);
            }
            (Ok(Message::SlabRelease { slab }), None) => {
                let Some(made) = machine.made.remove(&slab) else { return };
                if let Some(program) = self.registry.programs.get_mut(&made.program) {
                    program.slabs.retain(|(_, number), _| *number != slab);
                }
            }
            (message, _) => {
                warn!(?message, "from the keeper");
                self.registry.totals.drop("unexpected-from-keeper");
            }
        }
    }

    /// The slab of a segment, as the keeper has made it, and the doorbells of its program.
    pub(super) fn slab_of_machine(&mut self, program: u64, segment: &Segment) -> Result<MappedSlab, Reason> {
        let key = (self.link.boot(), segment.slab);
        let made = |agent: &Self| agent.machine.as_ref().is_some_and(|m| m.made.contains_key(&segment.slab));
        if !made(self) {
            // The host may have been quicker to say that it is there.
            self.handle_keeper_ready();
        }
        // Where the keeper has lost its registration meanwhile there is nothing made, and nobody who asks.
        let made = self.machine.as_ref().and_then(|m| m.made.get(&segment.slab)).ok_or(Reason::Busy)?;
        if (made.program, made.geometry) != (program, segment.geometry) {
            return Err(Reason::Violation);
        }
        let bells = self.machine.as_ref().and_then(|m| m.bells.of(program)).ok_or(Reason::Busy)?;
        let owner = self.registry.programs.get_mut(&program).ok_or(Reason::Ending)?;
        if let Some(known) = owner.slabs.get(&key) {
            return Ok(known.clone());
        }
        let slab = Slab::map(&made.memfd[0], segment.slab, segment.geometry).map_err(|_| Reason::NoMemory)?;
        let parcel = vec![made.memfd.clone(), bells.own, bells.far.fds().clone()];
        let mapped = MappedSlab { slab: Arc::new(slab), parcel, far: bells.far };
        owner.slabs.insert(key, mapped.clone());
        Ok(mapped)
    }

    /// Opens a program's bells, if it has a slab and no bells, and the backend is there.
    pub(super) fn open_bells(&mut self, program: u64) {
        if !self.link.connected() || !self.registry.programs.contains_key(&program) {
            return;
        }
        let Some(machine) = &mut self.machine else { return };
        let Some(token) = machine.token else { return };
        if !machine.made.values().any(|made| made.program == program) {
            return;
        }
        if let Err(error) = machine.bells.open(&machine.host, token, program) {
            info!(%error, program, "cannot open doorbells");
            machine.bells.close(program);
            self.timers.at(self.now + BELLS_AGAIN, Timer::Bells(program));
        }
    }

    /// Something has happened to bells.
    pub(super) fn handle_bells_ready(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        for program in machine.bells.handle_ready() {
            self.lose_bells(program);
        }
    }

    /// The host has ended a program's bells: its slabs are of no use without.
    fn lose_bells(&mut self, program: u64) {
        info!(program, "the host has ended its doorbells");
        self.close_bells(program);
        if let Some(owner) = self.registry.programs.get_mut(&program) {
            owner.slabs.clear();
        }
        let of = |c: &super::registry::Conn| c.program == program && c.course.generation().is_some();
        let held: Vec<u64> = self.registry.conns.iter().filter(|(_, c)| of(c)).map(|(id, _)| *id).collect();
        for conn in held {
            self.withdraw(conn, None, Reason::BackendGone);
        }
        self.timers.at(self.now + BELLS_AGAIN, Timer::Bells(program));
    }

    /// A program's bells are needed no more.
    pub(super) fn close_bells(&mut self, program: u64) {
        if let Some(machine) = &mut self.machine {
            machine.bells.close(program);
        }
    }

    /// The backend is gone: nobody rings any more, and nobody hears.
    pub(super) fn lose_all_bells(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        machine.bells.close_all();
        self.registry.programs.values_mut().for_each(|program| program.slabs.clear());
    }

    /// The host says that a bell is full.
    pub(super) fn handle_bell_full(&mut self, program: u64, bell: u32) {
        if let Some(machine) = &self.machine {
            machine.bells.read_down(program, bell);
        }
    }
}
