//! A question to the agent.

use crate::carrier::Carrier;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::path::{Path, PathBuf};
use vsocket_channel::message::Message;

const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// No answer is longer, whatever is announced.
const LONGEST: u64 = 1 << 30;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody serves the socket.
    #[error("no agent at {path} (is `vsocket agent` running? --agent or VSOCKET_AGENT names its socket)")]
    Unreachable {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It was reached, and no answer came.
    #[error("the agent at {path} does not answer (look at its log)")]
    Silent {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It says that it cannot.
    #[error("the agent refuses: {0}")]
    Refused(String),
    /// Its answer is not what we understand.
    #[error("the agent's answer is not understood (is it of the same version as this program?)")]
    Foreign(#[source] serde_json::Error),
}

/// Asks question `what`.
pub fn ask<T: serde::de::DeserializeOwned>(path: &Path, what: u32) -> Result<T, Error> {
    let unreachable = |source| Error::Unreachable { path: path.to_owned(), source };
    let carrier = Carrier::connect(path).map_err(unreachable)?;
    let (ok, text) =
        reply(&carrier, what).map_err(|source| Error::Silent { path: path.to_owned(), source })?;
    if !ok {
        return Err(Error::Refused(String::from_utf8_lossy(&text).into_owned()));
    }
    serde_json::from_slice(&text).map_err(Error::Foreign)
}

fn reply(carrier: &Carrier, what: u32) -> io::Result<(bool, Vec<u8>)> {
    carrier.send(&Message::Query { what }, &[])?;
    let ready = poll(&mut [PollFd::new(carrier, PollFlags::IN)], Some(&PATIENCE))?;
    if ready == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let packet = carrier.recv()?.ok_or_else(|| invalid("it has closed the connection"))?;
    match (packet.message, packet.fds.first()) {
        (Ok(Message::Reply { len, ok }), Some(sheet)) if len <= LONGEST => {
            let mut text = vec![0; len as usize];
            let mut at = 0;
            while at < text.len() {
                match rustix::io::pread(sheet, &mut text[at..], at as u64)? {
                    0 => return Err(invalid("its answer is shorter than announced")),
                    n => at += n,
                }
            }
            Ok((ok, text))
        }
        (Err(malformed), _) => Err(invalid(&malformed.to_string())),
        _ => Err(invalid("it answers something else")),
    }
}
