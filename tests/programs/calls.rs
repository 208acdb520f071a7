//! What one `send` and one `recv` cost the program that makes them, without waiting: the caller's two stages of
//! `docs/performance.md`. It knows nothing of vsocket.
//!
//! ```text
//! calls serve ADDR SIZE COUNT ROUNDS
//! calls send ADDR SIZE COUNT ROUNDS
//! ```
//!
//! The sender times COUNT sends of SIZE bytes, which must have room; the server sleeps until all are there, then times
//! as many receives, and answers with one byte. Each prints the median of its rounds, in nanoseconds per call.

#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Round trips before it counts: enough for the connection to be worth a lane, and time to get onto it.
const WARM: usize = 200;

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn per_call(count: usize, mut call: impl FnMut()) -> f64 {
    let begin = Instant::now();
    (0..count).for_each(|_| call());
    begin.elapsed().as_nanos() as f64 / count as f64
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [what, address, numbers @ ..] = &words[..] else { panic!("serve|send ADDR SIZE COUNT ROUNDS") };
    let numbers: Vec<usize> = numbers.iter().map(|n| n.parse().expect("a number")).collect();
    let [size, count, rounds] = numbers[..] else { panic!("SIZE COUNT ROUNDS") };
    let serves = what == "serve";
    let mut stream = if serves {
        TcpListener::bind(address).and_then(|l| l.accept()).expect("a client").0
    } else {
        TcpStream::connect(address).expect("a server")
    };
    let (mut byte, mut buffer, mut times) = ([0], vec![7; size], Vec::new());
    for round in 0..WARM {
        if serves {
            stream.read_exact(&mut byte).expect("a peer");
        }
        stream.write_all(&[1]).expect("a peer");
        if !serves {
            stream.read_exact(&mut byte).expect("a peer");
        }
        if round % 20 == 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    for _ in 0..rounds {
        if serves {
            std::thread::sleep(Duration::from_millis(3));
            times.push(per_call(count, || stream.read_exact(&mut buffer).expect("a peer")));
            stream.write_all(&[1]).expect("a peer");
        } else {
            times.push(per_call(count, || stream.write_all(&buffer).expect("a peer")));
            stream.read_exact(&mut byte).expect("a peer");
        }
    }
    println!("{what} {size} B: {:.0} ns a call", median(times));
}
