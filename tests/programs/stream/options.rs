//! What the program is told.

use super::{Result, USAGE};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[derive(Default, Clone)]
pub struct Options {
    pub address: Option<SocketAddr>,
    pub from: Option<SocketAddr>,
    pub bytes: Option<u64>,
    pub rounds: Option<u64>,
    pub seed: u64,
    pub size: usize,
    pub until_eof: bool,
    pub once: bool,
    pub epoll: bool,
    pub one_way: bool,
    pub answer_at_end: bool,
    pub no_trailer: bool,
    pub hold: bool,
    pub spin: bool,
    pub report: Option<String>,
    pub pause_after: Option<u64>,
    pub idle_after: Option<u64>,
    pub connections: u64,
    pub pace: Option<u64>,
    pub largest: Option<u64>,
    pub every: Option<Duration>,
    pub hex: Vec<u8>,
}

impl Options {
    pub fn parse(mut words: VecDeque<String>) -> Result<Self> {
        let mut o = Self { seed: 1, size: 64, connections: 1, ..Self::default() };
        while let Some(word) = words.pop_front() {
            let mut value = || words.pop_front().ok_or(format!("{word}: a value is missing"));
            match word.as_str() {
                "--bytes" => o.bytes = Some(number(&value()?)?),
                "--rounds" => o.rounds = Some(number(&value()?)?),
                "--seed" => o.seed = number(&value()?)?,
                "--size" => o.size = number(&value()?)? as usize,
                "--connections" => o.connections = number(&value()?)?,
                "--largest" => o.largest = Some(number(&value()?)?),
                "--pace" => o.pace = Some(number(&value()?)?),
                "--pause-after" => o.pause_after = Some(number(&value()?)?),
                "--idle-after" => o.idle_after = Some(number(&value()?)?),
                "--every" => o.every = Some(Duration::from_millis(number(&value()?)?)),
                "--from" => o.from = Some(address(&value()?)?),
                "--report" => o.report = Some(value()?),
                "--hex" => o.hex = hex(&value()?)?,
                "--until-eof" => o.until_eof = true,
                "--once" => o.once = true,
                "--epoll" => o.epoll = true,
                "--answer-at-end" => o.answer_at_end = true,
                "--one-way" => o.one_way = true,
                "--no-trailer" => o.no_trailer = true,
                "--hold" => o.hold = true,
                "--spin" => o.spin = true,
                _ if o.address.is_none() && !word.starts_with('-') => o.address = Some(address(&word)?),
                _ => return Err(format!("no option {word}\n{USAGE}")),
            }
        }
        Ok(o)
    }

    pub fn address(&self) -> Result<SocketAddr> {
        self.address.ok_or(USAGE.to_owned())
    }

    /// Whether to go on after `n` of what was asked for, unless standard input has ended.
    pub fn goes_on(&self, n: u64, limit: Option<u64>) -> bool {
        limit.is_none_or(|limit| n < limit)
    }

    pub fn open(&self) -> Result<TcpStream> {
        let address = self.address()?;
        let domain = socket2::Domain::for_address(address);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).map_err(text)?;
        if let Some(from) = self.from {
            socket.set_reuse_address(true).map_err(text)?;
            socket.bind(&from.into()).map_err(|e| format!("bind {from}: {e}"))?;
        }
        socket.connect(&address.into()).map_err(|e| format!("connect {address}: {e}"))?;
        Ok(socket.into())
    }
}

pub fn number(word: &str) -> Result<u64> {
    word.parse().map_err(|_| format!("'{word}' is no number"))
}

pub fn address(word: &str) -> Result<SocketAddr> {
    word.parse().map_err(|_| format!("'{word}' is no ADDRESS:PORT"))
}

pub fn hex(word: &str) -> Result<Vec<u8>> {
    let digit = |at| word.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    (0..word.len()).step_by(2).map(|at| digit(at).ok_or(format!("'{word}' is no hex"))).collect()
}

pub fn text(error: io::Error) -> String {
    error.to_string()
}

/// Set when standard input ends.
pub fn standard_input_ends() -> Arc<AtomicBool> {
    let ended = Arc::new(AtomicBool::new(false));
    let theirs = ended.clone();
    std::thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        theirs.store(true, Ordering::Relaxed);
    });
    ended
}

pub fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
