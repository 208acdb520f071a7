//! `vsocket stat`: totals since the agent's start.

use super::ask::{Error, ask};
use super::print;
use crate::agent::report::Stat;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// Shows the totals of an agent.
pub fn stat(agent: &Path, json: bool) -> Result<(), Error> {
    let stat: Stat = ask(agent, 0)?;
    if json {
        print(&serde_json::to_string(&stat).map_err(Error::Foreign)?);
    } else {
        print(text(&stat).trim_end());
    }
    Ok(())
}

fn text(stat: &Stat) -> String {
    let c = &stat.connections;
    let mut out = String::new();
    let backend =
        if stat.backend.connected { format!("VNI {}", stat.backend.vni) } else { "not there".to_owned() };
    let _ = writeln!(out, "backend      {backend}");
    if let Some(keeper) = &stat.keeper {
        let state = if keeper.registered { "registered" } else { "not registered" };
        let (host, slabs, pinned) = (&keeper.host, keeper.slabs, keeper.pinned);
        let _ = writeln!(out, "keeper       {state} at {host}, {slabs} slabs, {pinned} bytes pinned");
    }
    let p = &stat.programs;
    let _ = writeln!(out, "programs     {} open, {} processes, {} slabs", p.open, p.processes, p.slabs);
    let _ = writeln!(out, "connections  {} open, {} on a lane", c.open, c.on_lane);
    let _ = writeln!(
        out,
        "upgraded     {} ({} direct, {} fabric)",
        c.upgraded_total, c.direct_total, c.fabric_total
    );
    for (name, n) in [("tcp", stat.bytes.tcp), ("direct", stat.bytes.direct), ("fabric", stat.bytes.fabric)] {
        let _ = writeln!(out, "bytes        {name:<6} {} sent, {} received", n.tx, n.rx);
    }
    list(&mut out, "on tcp", &stat.declined);
    list(&mut out, "drops", &stat.drops);
    out
}

fn list(out: &mut String, title: &str, counts: &BTreeMap<String, u64>) {
    for (name, n) in counts {
        let _ = writeln!(out, "{title:<12} {name} {n}");
    }
}
