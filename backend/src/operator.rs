//! The operator's socket: questions from `vsocketd stat`, orders from `vsocketd drain`, captures.
//!
//! A question is a control message, the answer one too, with a memfd beside it that holds JSON or an error's words.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};
use vsocket_channel::message::Message;

use crate::carrier::{self, Carrier};
use crate::daemon::Daemon;
use crate::fabric::Facts;
use crate::pairing::Lanes;

mod tool;

pub use tool::{ToolError, as_text, ask, drain, find_vport, stat};

/// Tools that may be connected at the same time.
const TOOLS: usize = 16;

/// The listening socket and the tools that came.
#[derive(Debug)]
pub struct Operator {
    path: PathBuf,
    listener: OwnedFd,
    tools: [Option<Carrier>; TOOLS],
}

impl Operator {
    /// Listens at `path`.
    ///
    /// # Errors
    ///
    /// What the socket calls say.
    pub fn new(path: PathBuf) -> io::Result<Self> {
        let listener = carrier::listen_at(&path)?;
        Ok(Self { path, listener, tools: [const { None }; TOOLS] })
    }

    /// For registration with the event loop.
    pub fn raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// Takes the next tool in: its place and its descriptor.
    pub fn accept(&mut self) -> Option<(u32, RawFd)> {
        let carrier = carrier::accept(&self.listener).ok().flatten()?;
        // With every place taken the newest pushes out the oldest place; a tool that was waiting sees its end.
        let at = self.tools.iter().position(Option::is_none).unwrap_or(0);
        let fd = carrier.raw_fd();
        self.tools[at] = Some(carrier);
        Some((at as u32, fd))
    }

    /// The tool at this place.
    pub fn tool(&mut self, at: u32) -> Option<&mut Carrier> {
        self.tools.get_mut(at as usize)?.as_mut()
    }

    /// Forgets a tool.
    pub fn forget(&mut self, at: u32) {
        if let Some(tool) = self.tools.get_mut(at as usize) {
            *tool = None;
        }
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Daemon {
    /// Answers one message of a tool.
    pub(crate) fn answer(&mut self, message: Message) -> (bool, String) {
        match message {
            Message::Query { what: 0 } => (true, self.totals().to_string()),
            Message::Query { what: 1 } => (true, self.connections().to_string()),
            Message::Drain { vport, on } if self.pairing.handle_drain(vport, on) => (true, String::new()),
            Message::Drain { vport, .. } => (false, format!("there is no vport {vport}")),
            _ => (false, "this is not a question to a backend".to_owned()),
        }
    }

    fn totals(&self) -> Value {
        let vports: Vec<_> = self.vports.iter().enumerate().map(|(n, _)| self.vport(n)).collect();
        let Lanes { direct, fabric, relay } = self.pairing.lanes();
        let (kind, uses) = match self.fabric() {
            Some((name, why, facts)) => (name, fabric_uses(why, facts)),
            None => ("none", fabric_uses("no [[peer]]", Facts::default())),
        };
        let peer = |(host, up, other): (&str, bool, Option<&str>)| json!({ "host": host, "up": up, "fabric": other.unwrap_or(kind) });
        let peers: Vec<_> = self.peer_states().map(peer).collect();
        json!({
            "host": self.host,
            "fabric": kind,
            "fabric_uses": uses,
            "vports": vports,
            "lanes": { "direct": direct, "fabric": fabric, "relay": relay },
            "passes": self.passes,
            "stays": self.pairing.stays(),
            "slabs": self.pool.len(),
            "offers": self.pairing.offers(),
            "declines": object(self.metrics.declines()),
            "withdrawals": object(self.metrics.withdrawals()),
            "drops": object(self.metrics.drops.iter()),
            "peers": peers,
            "captures": self.captures().count(),
        })
    }

    fn vport(&self, n: usize) -> Value {
        let (vport, number) = (&self.vports[n], n as u32);
        let traffic = self.traffic(n);
        #[cfg(feature = "vm")]
        let machine = vport.machine.as_ref().map(|machine| {
            let memory = machine.memory.as_ref().map(crate::machine::Ram::bytes);
            let front = machine.front.as_ref().and_then(|front| front.pid);
            json!({
                "front": front.is_some(),
                "memory_bytes": memory.unwrap_or(0),
                "paused": machine.paused,
                "registered": machine.keeper.as_ref().is_some_and(|keeper| keeper.answered),
                "slabs": self.pool.lent(number),
            })
        });
        #[cfg(not(feature = "vm"))]
        let machine: Option<Value> = None;
        json!({
            "number": n,
            "name": vport.config.name,
            "machine": machine,
            "vni": vport.config.vni,
            "agent": vport.agent.as_ref().and_then(|a| a.pid).is_some(),
            "drained": self.pairing.drained(number),
            "connections": self.pairing.open_connections(number),
            "tx_bytes": traffic.tx_bytes,
            "tx_segments": traffic.tx_segments,
            "rx_bytes": traffic.rx_bytes,
            "rx_segments": traffic.rx_segments,
        })
    }

    fn connections(&self) -> Value {
        let line = |line: crate::pairing::Line| {
            json!({
                "vport": self.vports[line.end.vport as usize].config.name,
                "conn": line.end.conn,
                "local": line.tuple.local.to_string(),
                "remote": line.tuple.remote.to_string(),
                "lane": line.lane,
                "generation": line.generation,
                "reason": line.reason.map(vsocket_channel::reason::Reason::name),
            })
        };
        self.pairing.lines().map(line).collect()
    }
}

/// What the fabric stands on; what it does not have is left out.
fn fabric_uses(why: &str, facts: Facts) -> Value {
    let Facts { device, port, gid, mtu, queue_pairs, regions } = facts;
    let mut uses = json!({
        "why": why,
        "device": device,
        "port": port,
        "gid": gid,
        "mtu": mtu,
        "queue_pairs": queue_pairs,
        "regions": regions,
    });
    if let Value::Object(fields) = &mut uses {
        fields.retain(|_, value| !value.is_null());
    }
    uses
}

fn object(counters: impl Iterator<Item = (&'static str, u64)>) -> Value {
    counters.map(|(name, n)| (name.to_owned(), Value::from(n))).collect::<serde_json::Map<_, _>>().into()
}

/// The answer as a memfd, and its length.
///
/// # Errors
///
/// If the system gives no memory.
pub fn answer_file(text: &str) -> io::Result<(Arc<OwnedFd>, u64)> {
    let file = File::from(memfd_create(c"vsocketd-answer", MemfdFlags::CLOEXEC)?);
    // Written by offset, so that the receiver reads from the beginning.
    std::os::unix::fs::FileExt::write_all_at(&file, text.as_bytes(), 0)?;
    Ok((Arc::new(file.into()), text.len() as u64))
}
