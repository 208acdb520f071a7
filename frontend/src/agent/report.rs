//! What a person asks: totals and connections, as JSON that the command line reads again.

use super::Agent;
use super::course::Stage;
use super::established;
use super::registry::{Conn, Registry};
pub use super::registry::{LaneBytes, TxRx};
use crate::record::status;
use rustix::fd::OwnedFd;
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vsocket_channel::message::{Lane, Message, Tuple};
use vsocket_channel::reason::Reason;

/// Connections that this guest has and the agent was never told of.
pub const UNKNOWN: &str = "below-threshold-or-not-preloaded";

/// One connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Its program's name, or "-".
    pub program: String,
    /// Its process, if known.
    pub pid: Option<i32>,
    /// This end's address.
    pub local: String,
    /// The other end's.
    pub peer: String,
    /// What carries the bytes that are sent now.
    pub tx_lane: String,
    /// What carries those that are received.
    pub rx_lane: String,
    /// Why it is on TCP, if anybody said.
    pub reason: Option<String>,
    /// Bytes so far.
    pub bytes: LaneBytes,
    /// What was agreed with the backend, for whoever looks into a lane that does not change.
    pub stage: String,
    /// The generation of that, or 0.
    pub generation: u32,
    /// What the record says of both directions.
    pub state: String,
}

/// Totals since the agent's start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stat {
    /// How many connections.
    pub connections: Connections,
    /// Whose they are.
    #[serde(default)]
    pub programs: Programs,
    /// Why connections were, or are, on TCP: each counts once for each reason.
    pub declined: BTreeMap<String, u64>,
    /// Bytes, of ended connections too.
    pub bytes: LaneBytes,
    /// Messages refused or ignored, by name.
    pub drops: BTreeMap<String, u64>,
    /// The backend.
    pub backend: Backend,
    /// In a virtual machine: its keeper.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keeper: Option<Keeper>,
}

/// How many connections.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Connections {
    /// With a record now.
    pub open: u64,
    /// With at least one direction on a ring now.
    pub on_lane: u64,
    /// That have been on a lane.
    pub upgraded_total: u64,
    /// Of these, first on a direct lane.
    pub direct_total: u64,
    /// Of these, first on a fabric lane.
    pub fabric_total: u64,
}

/// Who has, or may have, connections.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Programs {
    /// With records now.
    pub open: u64,
    /// Processes of these.
    pub processes: u64,
    /// Slabs that these and the agent map.
    pub slabs: u64,
}

/// The backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Backend {
    /// Whether it is there.
    pub connected: bool,
    /// The vport's network, as it last said.
    pub vni: u32,
}

/// What the keeper of a virtual machine's ring memory has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Keeper {
    /// Where the host is.
    pub host: String,
    /// Whether it has been registered there.
    pub registered: bool,
    /// Slabs that the host may write to.
    pub slabs: u64,
    /// Their bytes, which are pinned.
    pub pinned: u64,
}

impl Agent {
    pub(super) fn handle_query(&mut self, from: u64, what: u32) {
        let text = match what {
            0 => serde_json::to_vec(&self.stat()),
            1 => serde_json::to_vec(&lines(&self.registry)),
            _ => Ok(format!("the agent has no answer to question {what}").into_bytes()),
        };
        let ok = what <= 1 && text.is_ok();
        let text = text.unwrap_or_else(|error| error.to_string().into_bytes());
        let parcel = match sheet(&text) {
            Ok(sheet) => vec![Arc::new(vec![sheet])],
            Err(_) => Vec::new(),
        };
        let ok = ok && !parcel.is_empty();
        self.tell_holder(from, Message::Reply { len: text.len() as u64, ok }, parcel);
    }

    fn stat(&self) -> Stat {
        let registry = &self.registry;
        let totals = &registry.totals;
        let mut bytes = totals.bytes;
        let mut on_lane = 0;
        for conn in registry.conns.values() {
            if let Some(record) = registry.record(conn) {
                bytes.add(&LaneBytes::of(record));
                on_lane += u64::from(record.is(status::TX_RING | status::RX_RING));
            }
        }
        let named = |map: &BTreeMap<&'static str, u64>| map.iter().map(|(k, v)| ((*k).into(), *v)).collect();
        Stat {
            connections: Connections {
                open: registry.conns.len() as u64,
                on_lane,
                upgraded_total: totals.upgraded,
                direct_total: totals.direct,
                fabric_total: totals.fabric,
            },
            programs: Programs {
                open: registry.programs.len() as u64,
                processes: registry.programs.values().map(|p| p.holders.len() as u64).sum(),
                slabs: registry.programs.values().map(|p| p.slabs.len() as u64).sum(),
            },
            declined: named(&totals.declined),
            bytes,
            drops: named(&totals.drops),
            backend: Backend { connected: self.link.connected(), vni: self.link.vni },
            keeper: self.machine.as_ref().map(|machine| {
                let (pinned, slabs) = machine.pinned();
                let (host, registered) = (machine.host.to_string(), machine.token.is_some());
                Keeper { host, registered, slabs, pinned }
            }),
        }
    }
}

fn sheet(text: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("vsocket-reply", MemfdFlags::CLOEXEC)?;
    let mut at = 0;
    while at < text.len() {
        at += rustix::io::pwrite(&fd, &text[at..], at as u64)?;
    }
    Ok(fd)
}

fn lines(registry: &Registry) -> Vec<Line> {
    let mut seen = HashSet::new();
    let mut ids: Vec<_> = registry.conns.keys().copied().collect();
    ids.sort_unstable();
    let mut lines = Vec::new();
    for conn in ids.iter().filter_map(|id| registry.conns.get(id)) {
        seen.insert(conn.tuple);
        lines.push(line(registry, conn));
    }
    for tuple in established::tuples() {
        // One that does not leave the guest needs no word.
        if tuple.local.ip().is_loopback() || tuple.remote.ip().is_loopback() || seen.contains(&tuple) {
            continue;
        }
        let declined = registry.programs.values().find_map(|p| Some((p, *p.declined.get(&tuple)?)));
        let reason = declined.map_or(UNKNOWN, |(_, reason)| reason.name());
        lines.push(Line {
            program: declined.map_or_else(|| "-".into(), |(program, _)| program.name.clone()),
            pid: declined.map(|(program, _)| program.pid),
            reason: Some(reason.into()),
            ..on_tcp(tuple)
        });
    }
    lines
}

fn on_tcp(tuple: Tuple) -> Line {
    let tcp = || Lane::Tcp.name().to_owned();
    Line {
        program: "-".into(),
        pid: None,
        local: tuple.local.to_string(),
        peer: tuple.remote.to_string(),
        tx_lane: tcp(),
        rx_lane: tcp(),
        reason: None,
        bytes: LaneBytes::default(),
        stage: "unknown".into(),
        generation: 0,
        state: String::new(),
    }
}

fn line(registry: &Registry, conn: &Conn) -> Line {
    let program = registry.programs.get(&conn.program);
    let record = registry.record(conn);
    let lane = |bits| if record.is_some_and(|r| r.is(bits)) { conn.course.lane() } else { Lane::Tcp };
    let (tx, rx) = (lane(status::TX_RING), lane(status::RX_RING | status::RX_RESIDUE));
    let mut reason = conn.course.reason();
    if tx == Lane::Tcp && rx == Lane::Tcp && matches!(conn.course.stage(), Stage::Idle) {
        reason = reason.or(conn.ending.map(|_| Reason::Ending));
    }
    if record.is_some_and(|r| r.violation.load(Ordering::Relaxed) != 0) {
        reason = Some(Reason::Violation);
    }
    Line {
        program: program.map_or_else(|| "-".into(), |p| p.name.clone()),
        pid: program.map(|p| p.pid),
        tx_lane: tx.name().into(),
        rx_lane: rx.name().into(),
        reason: reason.map(|r| r.name().into()),
        bytes: record.map(LaneBytes::of).unwrap_or_default(),
        stage: conn.ending.map_or(conn.course.stage().name(), |_| "ending").into(),
        generation: conn.course.generation().unwrap_or(0),
        state: record.map_or_else(String::new, |r| status::names(r.status.load(Ordering::Acquire))),
        ..on_tcp(conn.tuple)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_the_agreed_shape() {
        let stat = Stat {
            connections: Connections {
                open: 1,
                on_lane: 1,
                upgraded_total: 2,
                direct_total: 1,
                fabric_total: 1,
            },
            programs: Programs { open: 1, processes: 2, slabs: 3 },
            declined: [("peer-not-open".to_owned(), 3)].into(),
            bytes: LaneBytes::default(),
            drops: BTreeMap::new(),
            backend: Backend { connected: true, vni: 100 },
            keeper: None,
        };
        let json = serde_json::to_value(&stat).unwrap();
        assert_eq!(json["connections"]["upgraded_total"], 2);
        assert_eq!(json["programs"]["processes"], 2);
        assert_eq!(json["bytes"]["fabric"]["rx"], 0);
        assert_eq!(json["declined"]["peer-not-open"], 3);
        assert_eq!(json["backend"]["vni"], 100);
    }
}
