//! What the operator wrote, value by value, with its place in the text.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

/// A mistake, and where.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    /// Bytes of the text.
    pub at: Range<usize>,
    /// The key with its table, such as `vport.mac`.
    pub key: String,
    /// What is wrong.
    pub what: String,
}

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the keys are explained where their meaning is: in `Config`
pub struct Config {
    pub host: Spanned<String>,
    pub control: Spanned<PathBuf>,
    pub tls: Option<Spanned<Tls>>,
    pub peers: Option<Spanned<Peers>>,
    pub fabric: Option<Spanned<Fabric>>,
    #[serde(default)]
    pub peer: Vec<Spanned<Peer>>,
    #[serde(default)]
    pub vport: Vec<Vport>,
    #[serde(default)]
    pub directory: Vec<Entry>,
}

/// `[tls]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Tls {
    pub ca: Spanned<PathBuf>,
    pub cert: Spanned<PathBuf>,
    pub key: Spanned<PathBuf>,
}

/// `[peers]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Peers {
    pub listen: Spanned<SocketAddr>,
}

/// `[fabric]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Fabric {
    pub kind: Option<Spanned<String>>,
    pub listen: Option<Spanned<SocketAddr>>,
    pub device: Option<Spanned<String>>,
    pub netdev: Option<Spanned<String>>,
    pub address: Option<Spanned<IpAddr>>,
}

/// `[[peer]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Peer {
    pub host: Spanned<String>,
    pub vtep: Spanned<IpAddr>,
    pub control: Spanned<SocketAddr>,
}

/// `[[vport]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Vport {
    pub name: Spanned<String>,
    pub vni: Spanned<i64>,
    pub mac: Spanned<String>,
    pub addresses: Spanned<Vec<Spanned<IpAddr>>>,
    pub socket: Spanned<PathBuf>,
    pub max_connections: Option<Spanned<i64>>,
    pub ring_bytes: Option<Spanned<i64>>,
    pub direct: Option<Spanned<bool>>,
    pub cid: Option<Spanned<i64>>,
    pub front: Option<Spanned<PathBuf>>,
    pub port: Option<Spanned<i64>>,
    pub max_streams: Option<Spanned<i64>>,
}

/// `[[directory]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Entry {
    pub vni: Spanned<i64>,
    pub address: Spanned<IpAddr>,
    pub mac: Spanned<String>,
    pub vtep: Spanned<IpAddr>,
}

impl Config {
    /// Reads the text, judging form and types only.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        toml::from_str(text).map_err(|error| {
            let at = error.span().unwrap_or(0..0);
            let key = key_at(text, at.start);
            Fault { at, key, what: error.message().trim().replace('\n', "; ") }
        })
    }
}

/// The key that the byte at `at` belongs to: its line's own, behind the last table header above.
fn key_at(text: &str, at: usize) -> String {
    let at = at.min(text.len());
    let line_end = text[at..].find('\n').map_or(text.len(), |n| at + n);
    let upto = &text[..line_end];
    let table = upto.lines().rev().find_map(|line| {
        let line = line.trim();
        line.starts_with('[').then(|| line.trim_matches(|c| matches!(c, '[' | ']' | ' ')).to_owned())
    });
    let key = upto.lines().rev().find_map(|line| {
        let name = line.split_once('=').map(|(name, _)| name.trim());
        if line.trim_start().starts_with('[') { Some("") } else { name }
    });
    match (table, key.filter(|key| !key.is_empty())) {
        (Some(table), Some(key)) => format!("{table}.{key}"),
        (Some(table), None) => table,
        (None, Some(key)) => key.to_owned(),
        (None, None) => "file".to_owned(),
    }
}
