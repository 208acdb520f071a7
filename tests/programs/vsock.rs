//! A program in a virtual machine that talks over AF_VSOCK to the stand-in daemon of `scripts/vmfront.py`: what it sends
//! comes back, or what its first byte says. Checks every byte.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use socket2::{Domain, SockAddr, Socket, Type};

const USAGE: &str = "usage: vsock echo CID PORT BYTES [STREAMS]   send and get back, half-close, see the end
       vsock half CID PORT BYTES             the other end closes its direction first; then send
       vsock slow CID PORT BYTES             to one that does not read for a while
       vsock abort CID PORT BYTES STREAMS    close with bytes under way both ways
       vsock hold CID PORT                   say when it is open, and when it has ended
       vsock refused CID PORT                say how it is refused
       vsock ping CID PORT ROUNDS            time round trips of 128 bytes";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let Some((mode, numbers)) = words.split_first() else { return usage() };
    let Ok(numbers) = numbers.iter().map(|n| n.parse()).collect::<Result<Vec<u64>, _>>() else {
        return usage();
    };
    let result = match (*mode, numbers.as_slice()) {
        ("echo", &[cid, port, bytes]) => echo_all(cid, port, bytes, 1),
        ("echo", &[cid, port, bytes, streams]) => echo_all(cid, port, bytes, streams),
        ("half", &[cid, port, bytes]) => half(cid, port, bytes),
        ("slow", &[cid, port, bytes]) => connect(cid, port).and_then(|socket| echo(socket, b'S', bytes)),
        ("abort", &[cid, port, bytes, streams]) => abort(cid, port, bytes, streams),
        ("hold", &[cid, port]) => hold(cid, port),
        ("refused", &[cid, port]) => refused(cid, port),
        ("ping", &[cid, port, rounds]) => ping(cid, port, rounds),
        _ => return usage(),
    };
    match result {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vsock: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

fn connect(cid: u64, port: u64) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.connect(&SockAddr::vsock(cid as u32, port as u32))?;
    Ok(socket)
}

/// Bytes that tell where they belong.
fn fill(seed: u64, at: u64, buffer: &mut [u8]) {
    for (n, byte) in (at..).zip(buffer) {
        *byte = (n.wrapping_mul(2_654_435_761) >> 11) as u8 ^ seed as u8;
    }
}

fn send(mut socket: &Socket, mode: u8, bytes: u64) -> io::Result<()> {
    let mut buffer = vec![0; 60_000];
    let mut at = 0;
    while at < bytes {
        let len = buffer.len().min((bytes - at) as usize);
        fill(mode.into(), at, &mut buffer[..len]);
        if at == 0 {
            buffer[0] = mode;
        }
        socket.write_all(&buffer[..len])?;
        at += len as u64;
    }
    Ok(())
}

fn wrong(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn echo(socket: Socket, mode: u8, bytes: u64) -> io::Result<String> {
    let sender = socket.try_clone()?;
    let sending = thread::spawn(move || -> io::Result<()> {
        send(&sender, mode, bytes)?;
        sender.shutdown(Shutdown::Write)
    });
    let (mut buffer, mut want) = (vec![0; 60_000], vec![0; 60_000]);
    let mut at = 0;
    loop {
        let len = (&socket).read(&mut buffer)?;
        if len == 0 {
            break;
        }
        fill(mode.into(), at, &mut want[..len]);
        if at == 0 {
            want[0] = mode;
        }
        if buffer[..len] != want[..len] {
            return Err(wrong(format!("a wrong byte behind {at}")));
        }
        at += len as u64;
    }
    sending.join().map_err(|_| wrong("the sender panicked".to_owned()))??;
    if at != bytes {
        return Err(wrong(format!("{at} bytes came back of {bytes}")));
    }
    Ok(format!("ok {bytes}"))
}

fn echo_all(cid: u64, port: u64, bytes: u64, streams: u64) -> io::Result<String> {
    // All are open before the first byte goes: the kernel waits no longer than two seconds for an answer, and the
    // machine is emulated.
    let open: Vec<_> = (0..streams).map(|_| connect(cid, port)).collect::<Result<_, _>>()?;
    let begun = Instant::now();
    let all: Vec<_> =
        open.into_iter().map(|socket| thread::spawn(move || echo(socket, b'E', bytes))).collect();
    let mut worst = Ok(());
    for one in all {
        let result = one.join().map_err(|_| wrong("a stream panicked".to_owned()))?;
        worst = worst.and(result.map(|_| ()));
    }
    worst?;
    let seconds = begun.elapsed().as_secs_f64();
    Ok(format!("ok {streams} x {bytes}, {:.1} MB/s each way", (streams * bytes) as f64 / 1e6 / seconds))
}

fn half(cid: u64, port: u64, bytes: u64) -> io::Result<String> {
    let socket = connect(cid, port)?;
    (&socket).write_all(b"H")?;
    let mut greeting = Vec::new();
    (&socket).read_to_end(&mut greeting)?;
    if greeting != b"greeting" {
        return Err(wrong(format!("the greeting is {greeting:?}")));
    }
    let mut bytes_sent = vec![0; bytes as usize];
    fill(1, 0, &mut bytes_sent);
    (&socket).write_all(&bytes_sent)?;
    let digest = Sha256::digest(&bytes_sent);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sent {bytes} {hex}"))
}

fn abort(cid: u64, port: u64, bytes: u64, streams: u64) -> io::Result<String> {
    for _ in 0..streams {
        let socket = connect(cid, port)?;
        let sender = socket.try_clone()?;
        let sending = thread::spawn(move || send(&sender, b'E', bytes));
        (&socket).read_exact(&mut [0; 1000])?;
        socket.shutdown(Shutdown::Both)?;
        drop(socket);
        // It may have been stopped in the middle.
        let _ = sending.join();
    }
    Ok(format!("aborted {streams}"))
}

fn hold(cid: u64, port: u64) -> io::Result<String> {
    let socket = connect(cid, port)?;
    (&socket).write_all(b"E")?;
    (&socket).read_exact(&mut [0; 1])?;
    println!("open");
    io::stdout().flush()?;
    Ok(match (&socket).read(&mut [0; 1]) {
        Ok(len) => format!("ended with {len}"),
        Err(error) => format!("ended: {error}"),
    })
}

fn refused(cid: u64, port: u64) -> io::Result<String> {
    let begun = Instant::now();
    match connect(cid, port) {
        Ok(_) => Err(wrong("not refused".to_owned())),
        Err(error) if begun.elapsed() > Duration::from_secs(1) => Err(wrong(format!("late: {error}"))),
        Err(error) => Ok(format!("refused: {error}")),
    }
}

fn ping(cid: u64, port: u64, rounds: u64) -> io::Result<String> {
    let socket = connect(cid, port)?;
    let mut message = [b'E'; 128];
    let mut times = Vec::new();
    for _ in 0..rounds {
        let begun = Instant::now();
        (&socket).write_all(&message)?;
        (&socket).read_exact(&mut message)?;
        times.push(begun.elapsed());
    }
    times.sort();
    let at = |share: usize| times[(times.len() * share / 100).min(times.len() - 1)].as_micros();
    Ok(format!("median {} us, p99 {} us of {rounds}", at(50), at(99)))
}
