//! `vsocket ss`: one line per connection.

use super::ask::{Error, ask};
use super::print;
use crate::agent::report::{LaneBytes, Line};
use std::path::Path;

const HEAD: [&str; 8] = ["PROGRAM", "PID", "LOCAL", "PEER", "TX", "RX", "REASON", "BYTES (tx/rx)"];

/// Lists the connections of an agent's guest.
pub fn ss(agent: &Path, json: bool) -> Result<(), Error> {
    let lines: Vec<Line> = ask(agent, 1)?;
    if json {
        print(&serde_json::to_string(&lines).map_err(Error::Foreign)?);
        return Ok(());
    }
    let rows = std::iter::once(HEAD.map(str::to_owned)).chain(lines.iter().map(row));
    for line in table(&rows.collect::<Vec<_>>()) {
        print(&line);
    }
    Ok(())
}

fn row(line: &Line) -> [String; 8] {
    [
        line.program.clone(),
        line.pid.map_or_else(|| "-".to_owned(), |p| p.to_string()),
        line.local.clone(),
        line.peer.clone(),
        line.tx_lane.clone(),
        line.rx_lane.clone(),
        line.reason.clone().unwrap_or_else(|| "-".to_owned()),
        bytes(&line.bytes),
    ]
}

/// Bytes of the lanes that carried any.
fn bytes(bytes: &LaneBytes) -> String {
    let lanes = [("tcp", bytes.tcp), ("direct", bytes.direct), ("fabric", bytes.fabric)];
    let used = lanes.iter().filter(|(_, n)| n.tx + n.rx > 0);
    let parts: Vec<String> = used.map(|(name, n)| format!("{name} {}/{}", n.tx, n.rx)).collect();
    if parts.is_empty() { "-".to_owned() } else { parts.join(", ") }
}

/// Columns as wide as their widest cell.
fn table<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::report::TxRx;

    #[test]
    fn a_connection_is_one_line() {
        let line = Line {
            program: "redis-server".into(),
            pid: Some(7),
            local: "198.51.100.2:6379".into(),
            peer: "198.51.100.1:40000".into(),
            tx_lane: "direct".into(),
            rx_lane: "tcp".into(),
            reason: None,
            bytes: LaneBytes { direct: TxRx { tx: 10, rx: 0 }, ..LaneBytes::default() },
            stage: "committed".into(),
            generation: 1,
            state: "tx-ring".into(),
        };
        let lines = table(&[HEAD.map(str::to_owned), row(&line)]);
        assert_eq!(
            lines[1],
            "redis-server  7    198.51.100.2:6379  198.51.100.1:40000  direct  tcp  -       direct 10/0"
        );
        assert_eq!(lines[0].find("TX"), lines[1].find("direct"));
    }
}
