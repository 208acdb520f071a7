//! The ways that a plan is run, and the pairs of processes that run it.

use crate::common::{Lab, Program};
use crate::plan::Name;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// A run that says nothing for so long hangs.
const HANGS: Duration = Duration::from_secs(20);

/// Which way a run goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way {
    /// For people.
    pub name: &'static str,
    verb: &'static str,
    near: &'static str,
    far: &'static str,
    /// Of the two labs, the one where lanes are taken away and given back.
    pub drains: bool,
    port: u16,
}

/// Natively.
pub const NATIVE: Way = Way { name: "native", verb: "exec", near: "a", far: "b", drains: false, port: 7001 };
/// Natively once more: whether the kernel tells the same story twice.
pub const TWICE: Way = Way { name: "twice", verb: "exec", near: "d", far: "e", drains: true, port: 7051 };
/// Accelerated: on one host, across two, and both while lanes come and go.
pub const WAYS: [Way; 4] = [
    Way { name: "direct", verb: "run", near: "a", far: "b", drains: false, port: 7011 },
    Way { name: "fabric", verb: "run", near: "d", far: "e", drains: false, port: 7021 },
    Way { name: "direct-drains", verb: "run", near: "a", far: "b", drains: true, port: 7031 },
    Way { name: "fabric-drains", verb: "run", near: "d", far: "e", drains: true, port: 7041 },
];

/// What a run came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Told {
    /// Its story, and the bytes that went over lanes and over TCP.
    Story(Vec<String>, [u64; 2]),
    /// It did not come to its end.
    Broke(String),
    /// It is not run this way.
    Skipped,
}

impl Told {
    /// The lines of its story.
    pub fn lines(&self) -> Vec<String> {
        match self {
            Self::Story(lines, _) => lines.clone(),
            Self::Broke(why) => vec![why.clone()],
            Self::Skipped => Vec::new(),
        }
    }

    /// Whether both tell the same.
    pub fn agrees(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Story(a, _), Self::Story(b, _)) => a == b,
            (_, Self::Skipped) | (Self::Skipped, _) => true,
            _ => false,
        }
    }
}

/// Two processes that run plans one way.
pub struct Pair<'a> {
    lab: &'a Lab,
    /// Which.
    pub way: Way,
    threaded: bool,
    running: Option<Running>,
}

struct Running {
    jobs: UnixStream,
    back: BufReader<UnixStream>,
    _near: Program,
    _far: Program,
}

impl<'a> Pair<'a> {
    /// None runs yet.
    pub fn new(lab: &'a Lab, way: Way, threaded: bool) -> Self {
        Self { lab, way, threaded, running: None }
    }

    fn start(&self) -> Running {
        let Self { lab, way, threaded, .. } = *self;
        let state = lab.state();
        let file = |kind: &str| state.join(format!("{kind}-{}-{threaded}", way.port)).display().to_string();
        let (jobs, control, crew) = (file("j"), file("c"), if threaded { "threads" } else { "single" });
        let address = crate::common::v4(way.far, way.port + u16::from(threaded)).to_string();
        let exe = std::env::current_exe().expect("a test knows where it is").display().to_string();
        let mut far = lab.start(way.verb, way.far, &[&exe, "far", &control, &address, crew]);
        far.prints("ready");
        let _ = std::fs::remove_file(&jobs);
        let listener = UnixListener::bind(&jobs).expect("a socket for the jobs");
        let host = if way.near == "d" { "h2" } else { "h1" };
        let backend = state.join(format!("{host}.ctl")).display().to_string();
        let mut command = vec![exe.as_str(), "near", &jobs, &control, &address, crew];
        if way.drains {
            command.extend([backend.as_str(), way.near]);
        }
        let near = lab.start(way.verb, way.near, &command);
        let (jobs, _) = listener.accept().expect("the near end connects");
        jobs.set_read_timeout(Some(HANGS)).expect("a time");
        let back = BufReader::new(jobs.try_clone().expect("a duplicate"));
        Running { jobs, back, _near: near, _far: far }
    }

    /// Runs a plan. After a failure both processes are others.
    pub fn run(&mut self, name: &Name) -> Told {
        if self.way.name.starts_with("fabric") && name.plan().orphans {
            return Told::Skipped;
        }
        let running = match self.running.take() {
            Some(running) => self.running.insert(running),
            None => {
                let fresh = self.start();
                self.running.insert(fresh)
            }
        };
        let told = running.run(name);
        if matches!(told, Told::Broke(_)) {
            self.running = None;
        }
        told
    }
}

impl Running {
    fn run(&mut self, name: &Name) -> Told {
        if writeln!(self.jobs, "{name}").is_err() {
            return Told::Broke("the near end has gone".into());
        }
        let (mut story, begun) = (Vec::new(), Instant::now());
        loop {
            let mut line = String::new();
            match self.back.read_line(&mut line) {
                Ok(0) => return Told::Broke("the near end has gone".into()),
                Err(_) => return Told::Broke(format!("hangs for {:?}", begun.elapsed())),
                Ok(_) => {}
            }
            let (kind, rest) = line.trim_end().split_once(' ').unwrap_or_default();
            match kind {
                "|" => story.push(rest.to_owned()),
                "failed" => return Told::Broke(rest.to_owned()),
                _ => {
                    let mut numbers = rest.split(' ').map(|n| n.parse().unwrap_or(0));
                    let moved = std::array::from_fn(|_| numbers.next().unwrap_or(0));
                    return Told::Story(story, moved);
                }
            }
        }
    }
}
