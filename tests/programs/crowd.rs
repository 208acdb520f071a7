//! Many connections at once, each of which has proved worth a lane and then has little to say.
//!
//! ```text
//! crowd serve ADDR
//! crowd hold ADDR N    opens N connections one after another, says `open N`, waits for standard input to end, and
//!                      then asks each of them once more
//! ```
//!
//! A message is 264,000 bytes, more than a connection has to move to be opened, and its answer is the last 64 of them. It
//! knows nothing of vsocket.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;

use mio::net::TcpListener;
use mio::{Events, Interest, Poll, Token};

const USAGE: &str = "usage: crowd serve ADDR | crowd hold ADDR N";
const MESSAGE: usize = 264_000;
const ANSWER: usize = 64;
/// The listener's token; those of connections come after it.
const LISTENER: Token = Token(0);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["serve", address] => serve(address),
        ["hold", address, n] => n.parse().map_err(io::Error::other).and_then(|n| hold(address, n)),
        _ => Err(io::Error::other(USAGE)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crowd: {error}");
            ExitCode::FAILURE
        }
    }
}

// ---------------------------------------------------------------- the server

/// A connection of the server, and how much of a message it has brought.
struct Guest {
    stream: mio::net::TcpStream,
    message: Vec<u8>,
}

impl Guest {
    /// Reads and answers until there is no more for now: whether the connection goes on.
    fn serve(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        loop {
            match self.stream.read(buffer) {
                Ok(0) => return Ok(false),
                Ok(n) => self.message.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) => return Err(e),
            }
            while self.message.len() >= MESSAGE {
                // So short an answer always finds room.
                self.stream.write_all(&self.message[MESSAGE - ANSWER..MESSAGE])?;
                self.message.drain(..MESSAGE);
            }
        }
    }
}

fn serve(address: &str) -> io::Result<()> {
    let mut listener = TcpListener::bind(address.parse().map_err(io::Error::other)?)?;
    let mut poll = Poll::new()?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut events = Events::with_capacity(1024);
    let mut guests = HashMap::new();
    let mut last = LISTENER.0;
    let mut buffer = vec![0; 64 << 10];
    loop {
        poll.poll(&mut events, None)?;
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    last += 1;
                    poll.registry().register(&mut stream, Token(last), Interest::READABLE)?;
                    guests.insert(Token(last), Guest { stream, message: Vec::new() });
                }
            } else if let Some(guest) = guests.get_mut(&event.token())
                && !guest.serve(&mut buffer).unwrap_or(false)
            {
                guests.remove(&event.token());
            }
        }
    }
}

// ---------------------------------------------------------------- the client

fn hold(address: &str, n: usize) -> io::Result<()> {
    let mut streams = Vec::with_capacity(n);
    for i in 0..n {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("connection {i}: {e}"));
        let mut stream = TcpStream::connect(address).map_err(named)?;
        ask(&mut stream, i).map_err(named)?;
        streams.push(stream);
    }
    println!("open {n}");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    for (i, stream) in streams.iter_mut().enumerate() {
        ask(stream, i + 1).map_err(|e| io::Error::new(e.kind(), format!("connection {i}, later: {e}")))?;
    }
    println!("asked {n}");
    Ok(())
}

/// One message and its answer.
fn ask(stream: &mut TcpStream, seed: usize) -> io::Result<()> {
    let message: Vec<u8> = (0..MESSAGE).map(|at| (at * 31 + seed * 7) as u8).collect();
    stream.write_all(&message)?;
    let mut answer = [0; ANSWER];
    stream.read_exact(&mut answer)?;
    if answer != message[MESSAGE - ANSWER..] {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is another's"));
    }
    Ok(())
}
