//! The two processes: the near end connects, and tells the runner what happened; the far end listens.

use crate::end::End;
use crate::lanes::{self, Lanes};
use crate::plan::{Moment, Name, Plan};
use crate::side::{Side, round, rounds};
use crate::sys;
use libc::c_int;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Instant;
use vsocket_channel::message::Message;
use vsocket_frontend::carrier::Carrier;

type Story = Vec<(usize, String)>;

/// The library treats a program that has never made a thread otherwise.
fn be(crew: &str) {
    if crew == "threads" {
        let idle = || {
            loop {
                std::thread::park();
            }
        };
        std::thread::spawn(idle);
    }
}

fn on(fd: c_int) {
    sys::set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
}

/// `fuzzer far CONTROL ADDRESS CREW`: serves one near end after the other.
pub fn far(words: &[String]) {
    be(&words[2]);
    let listener = sys::listener(&words[1], 64);
    let _ = std::fs::remove_file(&words[0]);
    let control = UnixListener::bind(&words[0]).expect("a control socket");
    let end = End::shared();
    println!("ready");
    for near in control.incoming().flatten() {
        while let Some(name) = line(&near) {
            let told = match far_story(end, &name, listener, &near) {
                Ok(story) => story.iter().map(|(at, said)| format!("{at} {said}\n")).collect(),
                Err(why) => format!("failed {why}\n"),
            };
            let size = told.len() as u64;
            if (&near).write_all(&size.to_ne_bytes()).is_err() || (&near).write_all(told.as_bytes()).is_err()
            {
                break;
            }
        }
    }
}

/// A line, and not a byte more.
fn line(mut from: &UnixStream) -> Option<String> {
    let mut text = Vec::new();
    let mut byte = [0];
    loop {
        from.read_exact(&mut byte).ok()?;
        if byte[0] == b'\n' {
            return String::from_utf8(text).ok();
        }
        text.push(byte[0]);
    }
}

fn far_story(end: &'static End, name: &str, listener: c_int, near: &UnixStream) -> Result<Story, String> {
    let plan = name.parse::<Name>().map_err(|e| e.to_string())?.plan();
    sys::poll(listener, libc::POLLIN, 4000);
    let got = sys::accept(listener, libc::SOCK_CLOEXEC);
    if got.0 < 0 {
        return Err(format!("accept: {got}"));
    }
    let fd = got.0 as c_int;
    on(fd);
    if plan.moment != Moment::Fresh {
        rounds(fd).inspect_err(|_| {
            sys::close(fd);
        })?;
    }
    let mut side = Side::new(1, end, (plan, fd), near, &|_| {});
    let done = side.run();
    let story = side.over();
    done.map(|()| story).map_err(|e| e.to_string())
}

/// Who takes lanes away, and gives them back.
struct Operator {
    carrier: Carrier,
    vport: u32,
}

impl Operator {
    fn find(control: &str, name: &str) -> Self {
        let carrier = Carrier::connect(&PathBuf::from(control)).expect("the backend serves");
        carrier.send(&Message::Query { what: 0 }, &[]).expect("the backend listens");
        let begun = Instant::now();
        let packet = loop {
            match carrier.recv() {
                Ok(packet) => break packet.expect("an answer"),
                Err(_) => assert!(begun.elapsed().as_secs() < 5, "no answer of the backend"),
            }
        };
        let Ok(Message::Reply { len, .. }) = packet.message else { panic!("another answer") };
        let mut text = vec![0; len as usize];
        rustix::io::pread(&packet.fds[0], &mut text[..], 0).expect("the answer's text");
        let totals: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        let vports = totals["vports"].as_array().expect("vports");
        let vport = vports.iter().position(|v| v["name"] == name).expect("the vport") as u32;
        Self { carrier, vport }
    }

    /// Is not waited for: it happens beside what comes next.
    fn drain(&self, on: bool) {
        while self.carrier.recv().is_ok() {}
        let _ = self.carrier.send(&Message::Drain { vport: self.vport, on }, &[]);
    }
}

/// The near end.
struct Near {
    end: &'static End,
    control: UnixStream,
    address: String,
    lanes: Option<Lanes>,
    operator: Option<Operator>,
}

/// `fuzzer near JOBS CONTROL ADDRESS CREW [BACKEND VPORT]`: runs the plans that it is told.
pub fn near(words: &[String]) {
    be(&words[3]);
    let jobs = UnixStream::connect(&words[0]).expect("the runner listens");
    let mut near = Near {
        end: End::shared(),
        control: UnixStream::connect(&words[1]).expect("the far end serves"),
        address: words[2].clone(),
        lanes: lanes::agent(),
        operator: words.get(4).map(|control| Operator::find(control, &words[5])),
    };
    let mut back = jobs.try_clone().expect("a duplicate");
    for name in BufReader::new(jobs).lines().map_while(Result::ok) {
        let told = near.story(&name).unwrap_or_else(|why| format!("failed {why}\n"));
        if back.write_all(told.as_bytes()).is_err() {
            return;
        }
    }
}

impl Near {
    fn story(&mut self, text: &str) -> Result<String, String> {
        let name: Name = text.parse().map_err(|_| "no name of a plan".to_owned())?;
        let plan = name.plan();
        let fd = self.connected(&name, &plan)?;
        let ours = self.through(plan.clone(), fd)?;
        let theirs = self.theirs()?;
        let moved = self.lanes.as_mut().map(Lanes::moved).unwrap_or_default();
        let lines: String = merge(&plan, [ours, theirs]).iter().map(|line| format!("| {line}\n")).collect();
        Ok(format!("{lines}moved {} {}\n", moved.fast, moved.tcp))
    }

    fn undrain(&self) {
        if let Some(operator) = &self.operator {
            operator.drain(false);
        }
    }

    /// One that the agents lost sight of for a moment stays on TCP; the next comes to its lane.
    fn connected(&mut self, name: &Name, plan: &Plan) -> Result<c_int, String> {
        let mut last = String::new();
        for _ in 0..3 {
            // Once more: another pair may have drained it last, and go on with that while it waits for its next plan.
            self.undrain();
            writeln!(self.control, "{name}").map_err(|e| e.to_string())?;
            match self.connect(plan) {
                Ok(fd) => return Ok(fd),
                Err(why) => last = why,
            }
            // The far end tells that it was left.
            let _ = self.theirs();
        }
        Err(last)
    }

    fn connect(&mut self, plan: &Plan) -> Result<c_int, String> {
        let fd = sys::socket(&self.address, libc::SOCK_CLOEXEC);
        let got = sys::connect(fd, &self.address);
        if got.0 != 0 {
            sys::close(fd);
            return Err(format!("connect: {got}"));
        }
        on(fd);
        if let Some(lanes) = &mut self.lanes {
            lanes.begin();
        }
        let warm = match plan.moment {
            Moment::Fresh => Ok(()),
            Moment::Across => (0..10).try_for_each(|_| round(fd, 1)).and_then(|()| round(fd, 2)),
            Moment::Lane => self.reach_lane(fd),
        };
        warm.map(|()| fd).inspect_err(|_| {
            sys::close(fd);
        })
    }

    fn reach_lane(&mut self, fd: c_int) -> Result<(), String> {
        (0..10).try_for_each(|_| round(fd, 1))?;
        let [local, peer] = [sys::name(fd, false), sys::name(fd, true)];
        let begun = Instant::now();
        while let Some(lanes) = &mut self.lanes {
            let where_to = lanes.of(&local, &peer);
            if lanes::is_fast(&where_to) {
                lanes.begin();
                break;
            }
            if begun.elapsed().as_millis() > 3000 {
                return Err(format!("does not come to its lane: {where_to} {}", lanes.declined()));
            }
            round(fd, 1)?;
        }
        round(fd, 2)
    }

    fn through(&self, plan: Plan, fd: c_int) -> Result<Story, String> {
        let drain = |on| {
            if let Some(operator) = &self.operator {
                operator.drain(on);
            }
        };
        let mut side = Side::new(0, self.end, (plan, fd), &self.control, &drain);
        let done = side.run();
        let story = side.over();
        done.map(|()| story).map_err(|e| format!("the far end: {e}"))
    }

    fn theirs(&mut self) -> Result<Story, String> {
        let mut size = [0; 8];
        self.control.read_exact(&mut size).map_err(|e| e.to_string())?;
        let mut text = vec![0; u64::from_ne_bytes(size) as usize];
        self.control.read_exact(&mut text).map_err(|e| e.to_string())?;
        let text = String::from_utf8(text).map_err(|e| e.to_string())?;
        if let Some(why) = text.strip_prefix("failed ") {
            return Err(format!("the far end: {why}"));
        }
        let pair = |line: &str| {
            let (at, said) = line.split_once(' ')?;
            Some((at.parse().ok()?, said.to_owned()))
        };
        Ok(text.lines().filter_map(pair).collect())
    }
}

/// Both stories in the order of the plan.
fn merge(plan: &Plan, stories: [Story; 2]) -> Vec<String> {
    let mut lines = Vec::new();
    for step in &plan.steps {
        for side in [step.side, 1 - step.side] {
            if let Some((_, said)) = stories[side].iter().find(|(at, _)| *at == step.at) {
                let end = ["near", "far"][side];
                lines.push(format!("{} {end} {} {:?} -> {said}", step.at, step.actor, step.call));
            }
        }
    }
    lines
}
