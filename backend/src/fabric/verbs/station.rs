//! The device as this fabric uses it: opened, one port, one GID.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::epoll;

use super::completion::{Channel, Cq};
use super::device::{self, Context, Incident, Limits, Port};
use super::link::{Link, Purpose, depths};
use super::memory::Pd;
use super::queue_pair::Way;
use super::removal::Removal;
use super::select::{Candidate, Wanted, choose, list};
use crate::fabric::{Error, Facts};

/// What the readiness of the completion channel is reported with.
pub const CHANNEL: u64 = 1;

/// See the module.
pub struct Station {
    /// The open device.
    pub context: Arc<Context>,
    /// What wakes us.
    pub channel: Arc<Channel>,
    /// What the device allows.
    pub limits: Limits,
    /// The port's state when it was opened.
    pub port: Port,
    /// What tells us that it goes without a report.
    removal: Option<Removal>,
    /// Port and GID.
    pub chosen: Candidate,
}

/// The devices that libibverbs can drive, or why there are none.
pub fn drivers() -> Result<Vec<String>, String> {
    device::names().map_err(|error| format!("libibverbs: {error}"))
}

/// Everything there is, what does not fit `wanted` marked as unusable, and the best of the rest.
pub fn survey(wanted: &Wanted) -> (Vec<Candidate>, Option<Candidate>) {
    let mut candidates = list(&drivers());
    let chosen = choose(wanted, &mut candidates).cloned();
    (candidates, chosen)
}

/// Why nothing of what there is can be used.
fn why_none(candidates: &[Candidate]) -> String {
    let mut reasons = Vec::new();
    for Candidate { device, port, unusable, .. } in candidates {
        let reason = format!("{device} port {port}: {}", unusable.as_deref().unwrap_or("usable"));
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    }
    if reasons.is_empty() { "there is no RDMA device".to_owned() } else { reasons.join("; ") }
}

impl Station {
    /// Opens the best of what is wanted, and watches it.
    pub fn open(wanted: &Wanted, epoll: &OwnedFd) -> Result<Self, Error> {
        let (candidates, chosen) = survey(wanted);
        let Some(chosen) = chosen else {
            return Err(Error::NoDevice(why_none(&candidates)));
        };
        let failed = |what| move |source| Error::Device { what, source };
        let context = Context::open(&chosen.device).map_err(failed("context"))?;
        let limits = context.limits().map_err(failed("limits"))?;
        let port = context.port(chosen.port).map_err(failed("port state"))?;
        if !port.active {
            return Err(Error::NoDevice(format!("{} port {} is not active", chosen.device, chosen.port)));
        }
        let channel = Channel::new(&context).map_err(failed("completion channel"))?;
        let flags = epoll::EventFlags::IN;
        epoll::add(epoll, &context, epoll::EventData::new_u64(0), flags)
            .and_then(|()| epoll::add(epoll, &channel, epoll::EventData::new_u64(CHANNEL), flags))
            .map_err(|error| Error::Readiness(error.into()))?;
        let removal = Removal::watch(context.node());
        if let Some(removal) = &removal {
            epoll::add(epoll, removal, epoll::EventData::new_u64(2), flags)
                .map_err(|error| Error::Readiness(error.into()))?;
        }
        let at = chosen.address();
        tracing::info!(device = chosen.device, port = chosen.port, gid = %at, kind = chosen.transport(), "verbs");
        Ok(Self { context, channel, limits, port, removal, chosen })
    }

    /// Watches it no more.
    pub fn forget(&self, epoll: &OwnedFd) {
        // Descriptors that are about to be closed leave the set with them.
        let _ = epoll::delete(epoll, &self.channel);
        let _ = epoll::delete(epoll, &self.context);
        let _ = self.removal.as_ref().map(|removal| epoll::delete(epoll, removal));
    }

    /// The next thing that the device, or its absence, reports.
    pub fn next_incident(&self) -> Option<Incident> {
        if self.removal.as_ref().is_some_and(Removal::is_gone) {
            return Some(Incident::Gone);
        }
        self.context.next_incident()
    }

    /// Whether port and GID are still what was chosen: addresses move, and with them the entries of a port's table.
    pub fn stands(&self) -> bool {
        let Candidate { port, index, gid, .. } = self.chosen;
        self.context.gid(port, index).is_ok_and(|now| now == gid)
            && self.context.port(port).is_ok_and(|now| now.active)
    }

    /// Our GID.
    pub fn gid(&self) -> [u8; 16] {
        self.chosen.gid
    }

    /// Whether the device has room for one more.
    pub fn check(&self, what: &'static str, have: usize, limit: usize) -> Result<(), Error> {
        if have < limit { Ok(()) } else { Err(Error::Exhausted { what, limit }) }
    }

    /// A new queue pair with its completion queue, whose events bear `token`; there are `count` already.
    pub fn link(&self, purpose: Purpose, pd: &Arc<Pd>, count: usize, token: usize) -> Result<Link, Error> {
        self.check("queue pairs", count, self.limits.max_qp)?;
        self.check("completion queues", count, self.limits.max_cq)?;
        let depths = depths(&self.limits);
        let way = Way { port: self.chosen.port, gid_index: self.chosen.index as u8, mtu: self.port.mtu };
        let what = "queue pair";
        let cq = Cq::new(&self.channel, depths.0 + depths.1, token);
        cq.and_then(|cq| Link::new(purpose, pd, cq, depths, way, self.port.max_message))
            .map_err(|source| Error::Device { what, source })
    }

    /// For the operator.
    pub fn describe(&self, facts: &mut Facts) {
        facts.device = Some(self.chosen.device.clone());
        facts.port = Some(self.chosen.port);
        facts.gid = Some(format!("{} ({})", self.chosen.address(), self.chosen.transport()));
        facts.mtu = Some(128 << self.port.mtu);
    }
}
