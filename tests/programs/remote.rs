//! Runs commands in the emulated machines of `scripts/vmlab`: a server in the machine, a client that stands for the
//! command outside.
//!
//! One TCP connection per command. The client sends the shared secret and the arguments, then standard input; the server
//! sends both outputs and at last the exit status. When the client goes away, the command's process group is killed, so
//! that whoever puts a time limit on the client has limited the command. Daemons that lead a session of their own live on.
//!
//! Not for anything but the lab: the secret travels in the clear, over loopback and an emulated wire.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

const USAGE: &str = "usage: remote serve ADDRESS:PORT SECRET-FILE
       remote run ADDRESS:PORT SECRET-FILE COMMAND [ARGUMENT…]";

/// What a frame carries: its first byte; then come the length, four bytes little-endian, and the bytes.
mod kind {
    pub const SECRET: u8 = b'S';
    pub const ARGUMENT: u8 = b'A';
    pub const START: u8 = b'X';
    pub const INPUT: u8 = b'I';
    pub const INPUT_END: u8 = b'E';
    pub const OUTPUT: u8 = b'O';
    pub const ERRORS: u8 = b'R';
    pub const STATUS: u8 = b'Q';
}

/// The longest frame: arguments may be scripts.
const LONGEST: usize = 1 << 20;
/// After a command's end its outputs are read until they end, or bring nothing for so long: children may hold them open.
const GRACE: Duration = Duration::from_secs(1);
/// The client's exit status when the fault is ours, not the command's: what ssh takes.
const BROKEN: u8 = 255;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["serve", address, secret] => serve(address, secret).map(|()| 0),
        ["run", address, secret, command @ ..] if !command.is_empty() => run(address, secret, command),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("remote: {error}");
            ExitCode::from(BROKEN)
        }
    }
}

fn write_frame(mut to: impl Write, kind: u8, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(5 + bytes.len());
    frame.push(kind);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(bytes);
    to.write_all(&frame)
}

fn read_frame(mut from: impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let [kind, length @ ..] = head;
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    Ok((kind, bytes))
}

fn read_secret(file: &str) -> io::Result<Vec<u8>> {
    let secret = std::fs::read(file).map_err(|e| io::Error::new(e.kind(), format!("{file}: {e}")))?;
    Ok(secret.trim_ascii().to_vec())
}

// ---------------------------------------------------------------- in the machine

fn serve(address: &str, secret: &str) -> io::Result<()> {
    let secret = Arc::new(read_secret(secret)?);
    let listener = TcpListener::bind(address)?;
    loop {
        let (stream, _) = listener.accept()?;
        let secret = secret.clone();
        thread::spawn(move || {
            if let Err(error) = answer(&stream, &secret) {
                // The client is told as far as there still is one.
                let _ = write_frame(&stream, kind::ERRORS, format!("remote: {error}\n").as_bytes());
                let _ = write_frame(&stream, kind::STATUS, &[BROKEN]);
            }
        });
    }
}

fn answer(stream: &TcpStream, secret: &[u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    if read_frame(stream)? != (kind::SECRET, secret.to_vec()) {
        return Err(io::Error::other("wrong secret"));
    }
    let mut words = Vec::new();
    loop {
        match read_frame(stream)? {
            (kind::ARGUMENT, word) => words.push(String::from_utf8_lossy(&word).into_owned()),
            (kind::START, _) => break,
            (other, _) => return Err(io::Error::other(format!("frame {other} before the start"))),
        }
    }
    let (program, arguments) = words.split_first().ok_or_else(|| io::Error::other("no command"))?;
    let spawned = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            // As a shell has it.
            let status = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
            write_frame(stream, kind::ERRORS, format!("{program}: {error}\n").as_bytes())?;
            return write_frame(stream, kind::STATUS, &[status]);
        }
    };
    let status = accompany(&mut child, stream)?;
    write_frame(stream, kind::STATUS, &[status])
}

/// Carry a command's input and outputs until it has ended: its exit status.
fn accompany(child: &mut Child, stream: &TcpStream) -> io::Result<u8> {
    let writer = Arc::new(Writer { stream: Mutex::new(stream.try_clone()?), frames: AtomicU64::new(0) });
    let (ended, all_ended) = channel::<()>();
    if let Some(from) = child.stdout.take() {
        let (writer, ended) = (writer.clone(), ended.clone());
        thread::spawn(move || carry(from, &writer, kind::OUTPUT, ended));
    }
    if let Some(from) = child.stderr.take() {
        let (writer, ended) = (writer.clone(), ended.clone());
        thread::spawn(move || carry(from, &writer, kind::ERRORS, ended));
    }
    drop(ended);

    let group = rustix::process::Pid::from_child(child);
    let (stdin, input) = (child.stdin.take(), stream.try_clone()?);
    let over = Arc::new(AtomicBool::new(false));
    let was_over = over.clone();
    thread::spawn(move || {
        feed(stdin, &input);
        // The client is gone before the command was.
        if !was_over.load(Ordering::Acquire) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::TERM);
            thread::sleep(Duration::from_secs(1));
            if !was_over.load(Ordering::Acquire) {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
        }
    });

    let status = child.wait()?;
    over.store(true, Ordering::Release);
    loop {
        let before = writer.frames.load(Ordering::Relaxed);
        // Nothing is ever sent: this waits for both senders to be gone.
        if all_ended.recv_timeout(GRACE) == Err(RecvTimeoutError::Disconnected) {
            break;
        }
        if writer.frames.load(Ordering::Relaxed) == before && writer.stream.try_lock().is_ok() {
            break;
        }
    }
    let status = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(i32::from(BROKEN));
    // A sender that still runs must not follow the status with more.
    writer.frames.store(u64::MAX, Ordering::Relaxed);
    drop(writer.stream.lock());
    Ok(u8::try_from(status).unwrap_or(BROKEN))
}

/// The way back to the client, of both outputs.
struct Writer {
    stream: Mutex<TcpStream>,
    /// How many went; `u64::MAX`: no more may go.
    frames: AtomicU64,
}

fn carry(mut from: impl Read, to: &Writer, kind: u8, _ended: Sender<()>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        let Ok(stream) = to.stream.lock() else { return };
        let over =
            to.frames.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_add(1)).is_err();
        if over || write_frame(&*stream, kind, &buffer[..n]).is_err() {
            return;
        }
    }
}

/// Standard input into the command, until the connection ends.
fn feed(mut stdin: Option<impl Write>, stream: &TcpStream) {
    loop {
        match read_frame(stream) {
            Ok((kind::INPUT, bytes)) => {
                if stdin.as_mut().is_some_and(|to| to.write_all(&bytes).is_err()) {
                    stdin = None;
                }
            }
            Ok((kind::INPUT_END, _)) => stdin = None,
            _ => return,
        }
    }
}

// ---------------------------------------------------------------- outside

fn run(address: &str, secret: &str, command: &[&str]) -> io::Result<u8> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    write_frame(&stream, kind::SECRET, &read_secret(secret)?)?;
    for word in command {
        write_frame(&stream, kind::ARGUMENT, word.as_bytes())?;
    }
    write_frame(&stream, kind::START, &[])?;
    let input = stream.try_clone()?;
    // Not joined: it may wait for input that never comes.
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = io::stdin().read(&mut buffer) {
            if write_frame(&input, kind::INPUT, &buffer[..n]).is_err() {
                return;
            }
        }
        let _ = write_frame(&input, kind::INPUT_END, &[]);
    });
    loop {
        match read_frame(&stream) {
            Ok((kind::OUTPUT, bytes)) => {
                io::stdout().write_all(&bytes).and_then(|()| io::stdout().flush())?
            }
            Ok((kind::ERRORS, bytes)) => io::stderr().write_all(&bytes)?,
            Ok((kind::STATUS, bytes)) => return Ok(bytes.first().copied().unwrap_or(BROKEN)),
            Ok((other, _)) => return Err(io::Error::other(format!("frame {other} from the machine"))),
            Err(_) => return Err(io::Error::other("the machine has gone away")),
        }
    }
}
