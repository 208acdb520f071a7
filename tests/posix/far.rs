//! The other end of a pair: a process in the other guest that does as it is told.
//!
//! Over a UNIX socket come lines of a verb and numbers; each is answered by a line, before it is done if the verb is
//! `later`. It waits nowhere longer than [`sys::SOON`].

use crate::lanes;
use crate::sys::{self, Ret};
use libc::c_int;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// What the far end sends.
pub const FROM_FAR: u8 = 2;
/// What the near end sends.
pub const FROM_NEAR: u8 = 1;

struct Worker {
    listeners: Vec<c_int>,
    /// Descriptors, with what has been sent and received.
    open: HashMap<i64, (c_int, u64, u64)>,
    last: i64,
    /// What was answered last, of what was done `later`.
    told: String,
}

/// Serves one near end after the other.
pub fn serve(control: &str, addresses: &[String]) {
    let listeners = addresses.iter().map(|a| sys::listener(a, 64)).collect();
    let mut worker = Worker { listeners, open: HashMap::new(), last: 0, told: String::new() };
    let _ = std::fs::remove_file(control);
    let listener = UnixListener::bind(control).expect("a control socket");
    println!("ready");
    for near in listener.incoming().flatten() {
        worker.serve(near);
        for (fd, ..) in std::mem::take(&mut worker.open).into_values() {
            sys::close(fd);
        }
    }
}

impl Worker {
    fn serve(&mut self, mut near: UnixStream) {
        let lines = BufReader::new(near.try_clone().expect("a duplicate")).lines();
        for line in lines.map_while(Result::ok) {
            let mut words = line.split(' ').filter(|w| !w.is_empty());
            let mut verb = words.next().unwrap_or_default();
            let later = verb == "later";
            if later {
                verb = words.next().unwrap_or_default();
                let _ = near.write_all(b"0\n");
                std::thread::sleep(Duration::from_millis(25));
            }
            let text: Vec<&str> = words.collect();
            let answer = self.act(verb, &text);
            if later {
                self.told.clone_from(&answer);
            }
            if !later && writeln!(near, "{answer}").is_err() {
                return;
            }
        }
    }

    fn keep(&mut self, got: Ret) -> String {
        if got.0 < 0 {
            return got.to_string();
        }
        self.last += 1;
        self.open.insert(self.last, (got.0 as c_int, 0, 0));
        self.last.to_string()
    }

    fn act(&mut self, verb: &str, words: &[&str]) -> String {
        let number = |i: usize| words.get(i).and_then(|w| w.parse::<i64>().ok()).unwrap_or(0);
        match verb {
            "told" => return self.told.clone(),
            "accept" => {
                let listener = self.listeners[number(0) as usize];
                if sys::poll(listener, libc::POLLIN, 4000).1 == 0 {
                    return "nobody connects".into();
                }
                let got = sys::accept(listener, libc::SOCK_CLOEXEC);
                return self.keep(got);
            }
            "connect" => {
                let fd = sys::socket(words[0], libc::SOCK_CLOEXEC);
                let got = sys::connect(fd, words[0]);
                return self.keep(if got.0 == 0 { Ret(fd as isize, 0) } else { got });
            }
            // Without waiting for the answer.
            "begin" => {
                let fd = sys::socket(words[0], libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
                sys::connect(fd, words[0]);
                return self.keep(Ret(fd as isize, 0));
            }
            // Bound, and connected later.
            "bound" => {
                let fd = sys::socket(words[0], libc::SOCK_CLOEXEC);
                let got = sys::bind(fd, words[0]);
                let kept = self.keep(if got.0 == 0 { Ret(fd as isize, 0) } else { got });
                return format!("{kept} {}", sys::name(fd, false));
            }
            "to" => {
                let fd = self.open.get(&number(0)).map_or(-1, |(fd, ..)| *fd);
                return sys::connect(fd, words[1]).to_string();
            }
            _ => {}
        }
        let Some((fd, mut sent, mut got)) = self.open.get(&number(0)).copied() else {
            return "unknown".into();
        };
        let answer = on(verb, fd, [number(1), number(2), number(3)], &mut sent, &mut got);
        if matches!(verb, "close" | "reset") {
            self.open.remove(&number(0));
        } else {
            self.open.insert(number(0), (fd, sent, got));
        }
        answer
    }
}

fn on(verb: &str, fd: c_int, [a, b, c]: [i64; 3], sent: &mut u64, got: &mut u64) -> String {
    match verb {
        // Everything, in as many calls as it takes.
        "send" => {
            let data = sys::pattern(FROM_FAR, *sent, a as usize);
            let mut done = 0;
            while done < data.len() {
                match sys::send(fd, &data[done..], b as c_int | libc::MSG_NOSIGNAL) {
                    Ret(n, _) if n > 0 => done += n as usize,
                    other => return format!("{done} {other}"),
                }
            }
            *sent += done as u64;
            done.to_string()
        }
        // So many bytes, or what comes before the end.
        "take" => {
            let mut data = Vec::new();
            let mut room = vec![0; 1 << 16];
            let mut end = String::new();
            while data.len() < a as usize {
                if sys::poll(fd, libc::POLLIN, 4000).0.0 == 0 {
                    end = " and no more comes".into();
                    break;
                }
                let most = room.len().min(a as usize - data.len());
                match sys::recv(fd, &mut room[..most], 0) {
                    Ret(n, _) if n > 0 => data.extend_from_slice(&room[..n as usize]),
                    Ret(0, _) => {
                        end = " then the end".into();
                        break;
                    }
                    other => {
                        end = format!(" then {other}");
                        break;
                    }
                }
            }
            *got += data.len() as u64;
            format!("{} {}{end}", data.len(), sys::show(&data))
        }
        "recv" => {
            let mut room = vec![0; a as usize];
            let n = sys::recv(fd, &mut room, b as c_int);
            format!("{n} {}", sys::show(&room[..n.0.max(0) as usize]))
        }
        // What this end's agent says of the connection.
        "lanes" => lanes::agent().map_or_else(String::new, |lanes| {
            format!("{} {}", lanes.of(&sys::name(fd, false), &sys::name(fd, true)), lanes.declined())
        }),
        // What was sent so far is not part of the case's stream.
        "again" => {
            (*sent, *got) = (0, 0);
            "0".into()
        }
        "arrived" => u8::from(sys::soon(|| sys::unread(fd) >= a as usize)).to_string(),
        "wait" => wait(fd, a as i16, b as c_int),
        "blocks" => {
            sys::set_nonblocking(fd, false);
            "0".into()
        }
        "shutdown" => sys::shutdown(fd, a as c_int).to_string(),
        "option" => sys::set_option(fd, a as c_int, b as c_int, c as c_int).to_string(),
        "close" => sys::close(fd).to_string(),
        "reset" => {
            sys::set_linger(fd, 1, 0);
            sys::close(fd).to_string()
        }
        other => format!("no verb {other}"),
    }
}

/// What `poll` says. The kernel stores a reset's error before it closes the socket, and who looks between the two sees
/// `POLLERR` alone; a moment later it is whole.
fn wait(fd: c_int, events: i16, milliseconds: c_int) -> String {
    let mut said = sys::poll(fd, events, milliseconds).1;
    if said & libc::POLLERR != 0 {
        sys::soon(|| {
            said = sys::poll(fd, events, 0).1;
            said & libc::POLLHUP != 0
        });
    }
    format!("{said:#x}")
}

/// The near end's way to it.
pub struct Far {
    out: UnixStream,
    back: BufReader<UnixStream>,
}

impl Far {
    /// Finds the process that serves `control`.
    pub fn find(control: &str) -> Self {
        let out = UnixStream::connect(control).expect("the far end serves");
        let back = BufReader::new(out.try_clone().expect("a duplicate"));
        Self { out, back }
    }

    /// Has a line done.
    pub fn ask(&mut self, line: &str) -> String {
        let mut answer = String::new();
        let asked = self.out.write_all(format!("{line}\n").as_bytes());
        if asked.is_err() || self.back.read_line(&mut answer).unwrap_or(0) == 0 {
            return "the far end has gone".into();
        }
        answer.trim_end().to_owned()
    }
}
