//! What the guest's agent says of lanes: asked as `vsocket ss` and `vsocket stat` ask it.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use std::path::PathBuf;
use vsocket_channel::message::Message;
use vsocket_frontend::carrier::Carrier;

/// Bytes that went over lanes and over TCP.
#[derive(Clone, Copy, Default, Debug)]
pub struct Moved {
    /// Over a direct or a fabric lane.
    pub fast: u64,
    /// Over the kernel's socket.
    pub tcp: u64,
}

/// The agent.
pub struct Lanes {
    path: PathBuf,
    before: Moved,
}

/// This guest's agent, if this process runs accelerated.
pub fn agent() -> Option<Lanes> {
    std::env::var_os("LD_PRELOAD").filter(|l| !l.is_empty())?;
    let path = PathBuf::from(std::env::var_os("VSOCKET_AGENT")?);
    Some(Lanes { path, before: Moved::default() })
}

/// Whether both directions are on a lane.
pub fn is_fast(lanes: &str) -> bool {
    lanes == "direct direct" || lanes == "fabric fabric"
}

impl Lanes {
    fn ask(&self, what: u32) -> Value {
        let carrier = Carrier::connect(&self.path).expect("the agent serves");
        carrier.send(&Message::Query { what }, &[]).expect("the agent listens");
        let patience = Timespec { tv_sec: 5, tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(&carrier, PollFlags::IN)], Some(&patience));
        let packet = carrier.recv().expect("an answer").expect("an answer");
        let Ok(Message::Reply { len, .. }) = packet.message else {
            panic!("the agent answers something else")
        };
        let mut text = vec![0; len as usize];
        let read = rustix::io::pread(&packet.fds[0], &mut text[..], 0).expect("the answer's text");
        serde_json::from_slice(&text[..read]).expect("JSON of the agent")
    }

    /// The lanes of a connection, out and in, and why not if on none.
    pub fn of(&self, local: &str, peer: &str) -> String {
        let [local, peer] = [local, peer].map(unmapped);
        let lines = self.ask(1);
        let text = |line: &Value, key: &str| line[key].as_str().unwrap_or_default().to_owned();
        let lines = lines.as_array().map(Vec::as_slice).unwrap_or_default();
        let line = lines.iter().find(|l| text(l, "local") == local && text(l, "peer") == peer);
        line.map_or_else(
            || "unknown".into(),
            |l| {
                let lanes = format!("{} {}", text(l, "tx_lane"), text(l, "rx_lane"));
                if is_fast(&lanes) { lanes } else { format!("{lanes} {}", text(l, "reason")) }
            },
        )
    }

    /// Why connections were declined, as counted.
    pub fn declined(&self) -> String {
        self.ask(0)["declined"].to_string()
    }

    /// Whether any connection is on a lane: cheaper to ask.
    pub fn any(&self) -> bool {
        self.ask(0)["connections"]["on_lane"].as_u64() != Some(0)
    }

    fn totals(&self) -> Moved {
        let stat = self.ask(0);
        let both = |lane: &str| {
            let way = |way: &str| stat["bytes"][lane][way].as_u64().unwrap_or(0);
            way("tx") + way("rx")
        };
        Moved { fast: both("direct") + both("fabric"), tcp: both("tcp") }
    }

    /// From now on is counted.
    pub fn begin(&mut self) {
        self.before = self.totals();
    }

    /// What has moved since.
    pub fn moved(&mut self) -> Moved {
        let now = self.totals();
        let Moved { fast, tcp } = self.before;
        Moved { fast: now.fast.saturating_sub(fast), tcp: now.tcp.saturating_sub(tcp) }
    }
}

/// An IPv4 address that was written as an IPv6 one, as itself.
fn unmapped(address: &str) -> String {
    address.strip_prefix("[::ffff:").map_or_else(|| address.to_owned(), |rest| rest.replace(']', ""))
}
