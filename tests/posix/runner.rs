//! Runs every case natively and accelerated, and holds the stories against each other.

use crate::cases::{self, Carried, Case};
use crate::common::{Lab, Program, v4, v6};
use crate::lanes::Moved;
use crate::report;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A case that says nothing for so long hangs: longer than the waits of three tries at three connections each, on a machine
/// that is busy with other things.
const HANGS: Duration = Duration::from_secs(45);

/// What a run of a case came to.
#[derive(Clone, Debug)]
pub enum Told {
    /// Its trace, the bytes that moved, and why the connection was on TCP at the end, if it was.
    Story(Vec<String>, Moved, String),
    /// It did not come to its end.
    Broke(String),
}

type Stories = BTreeMap<String, Told>;

/// Which way a run goes.
#[derive(Clone, Copy)]
struct Way {
    verb: &'static str,
    near: &'static str,
    port: u16,
}

/// The guest of the far end, for all.
const FAR: &str = "b";
/// Natively.
const ORACLE: Way = Way { verb: "exec", near: "a", port: 7001 };
/// Accelerated, on one host and across two.
const WAYS: [Way; 2] =
    [Way { verb: "run", near: "a", port: 7011 }, Way { verb: "run", near: "c", port: 7021 }];

fn control(lab: &Lab, way: Way) -> String {
    lab.state().join(format!("posix-{}", way.port)).display().to_string()
}

fn this_program() -> String {
    std::env::current_exe().expect("a test knows where it is").display().to_string()
}

fn far(lab: &Lab, way: Way) -> Program {
    let addresses = [v4(FAR, way.port), v6(FAR, way.port + 1)].map(|a| a.to_string());
    let exe = this_program();
    let command = [exe.as_str(), "far", &control(lab, way), &addresses[0], &addresses[1]];
    let mut far = lab.start(way.verb, FAR, &command);
    far.prints("ready");
    far
}

/// All cases of a crew at one moment.
fn stories(lab: &Lab, way: Way, moment: &str, crew: &str, words: &[String]) -> Stories {
    let mut told = Stories::new();
    loop {
        let skip = told.len().to_string();
        let addresses = [v4(FAR, way.port), v6(FAR, way.port + 1)].map(|a| a.to_string());
        let near = [v4(way.near, 1).ip().to_string(), format!("[{}]", v6(way.near, 1).ip())];
        let (exe, control) = (this_program(), control(lab, way));
        let command =
            [&exe, "near", moment, &control, &addresses[0], &addresses[1], &near[0], &near[1], crew, &skip];
        let command: Vec<&str> = command.into_iter().chain(words.iter().map(String::as_str)).collect();
        let mut program = lab.start(way.verb, way.near, &command);
        let (done, why) = until_it_ends(&mut program);
        let text = program.out();
        read(&text, &why, &mut told);
        if done || told.len().to_string() == skip {
            return told;
        }
    }
}

/// Whether it came to its end; else what was wrong.
fn until_it_ends(program: &mut Program) -> (bool, String) {
    let mut last = (program.out().len(), Instant::now());
    loop {
        let runs = program.runs();
        let text = program.out();
        if text.ends_with("done\n") {
            return (true, String::new());
        }
        if !runs {
            return (false, format!("the program ended: {}", program.err()));
        }
        if text.len() != last.0 {
            last = (text.len(), Instant::now());
        } else if last.1.elapsed() > HANGS {
            program.kill();
            return (false, "hangs".into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read(text: &str, why: &str, told: &mut Stories) {
    let mut case = None;
    let mut trace = Vec::new();
    for line in text.lines() {
        let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
        match kind {
            "case" => (case, trace) = (Some(rest.to_owned()), Vec::new()),
            "|" => trace.push(rest.to_owned()),
            "moved" => {
                let mut words = rest.splitn(3, ' ');
                let mut next = || words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
                let moved = Moved { fast: next(), tcp: next() };
                let why = words.next().unwrap_or_default().to_owned();
                if let Some(name) = case.take() {
                    told.insert(name, Told::Story(std::mem::take(&mut trace), moved, why));
                }
            }
            "failed" => {
                if let Some(name) = case.take() {
                    told.insert(name, Told::Broke(rest.to_owned()));
                }
            }
            _ => {}
        }
    }
    if let Some(name) = case {
        told.insert(name, Told::Broke(why.to_owned()));
    }
}

/// What is wrong with an accelerated run, if anything.
fn difference(case: &Case, native: Option<&Told>, got: Option<&Told>, lane: bool) -> Option<String> {
    let (Some(native), Some(got)) = (native, got) else { return Some("was not run".into()) };
    let (Told::Story(want, ..), Told::Story(have, moved, why)) = (native, got) else {
        return match (native, got) {
            (Told::Broke(why), _) => Some(format!("natively: {why}")),
            (_, Told::Broke(why)) => Some(why.clone()),
            _ => None,
        };
    };
    if want != have {
        return Some(compare(want, have));
    }
    if let (true, Carried::Tcp(reason)) = (lane && !why.is_empty(), case.carried)
        && why != reason
    {
        return Some(format!("on TCP because of `{why}`, and not of `{reason}`"));
    }
    let silent = lane && case.carried == Carried::Lane && moved.fast == 0 && moved.tcp > 0;
    silent.then(|| format!("its bytes went over TCP: {moved:?}"))
}

fn compare(want: &[String], have: &[String]) -> String {
    let lines = want.len().max(have.len());
    let line = |list: &[String], i: usize| list.get(i).cloned().unwrap_or_else(|| "(nothing)".into());
    let differing = (0..lines).filter(|i| line(want, *i) != line(have, *i)).take(4);
    let text: Vec<String> = differing
        .map(|i| format!("line {}: kernel `{}`, accelerated `{}`", i + 1, line(want, i), line(have, i)))
        .collect();
    text.join("\n      ")
}

/// The run that begins there.
const FRESH: &str = "right after the handshake";

/// An accelerated run.
struct Run {
    name: &'static str,
    lane: bool,
}

/// Every accelerated run, with the native one that it is held against. Natively a connection that has no lane is at the
/// same moment beside the upgrade and after it.
fn runs(lab: &Lab, words: &[String]) -> [(Run, Stories, Stories); 4] {
    let both = |way, moment| {
        let crews = ["single", "threads"].into_iter();
        crews.flat_map(|crew| stories(lab, way, moment, crew, words)).collect::<Stories>()
    };
    // Beside each other: each near end has an agent of its own, whose counters it reads.
    let [native, same, cross] = std::thread::scope(|scope| {
        let moments: [(Way, &[&str]); 3] =
            [(ORACLE, &["fresh", "across"]), (WAYS[0], &["fresh", "across", "lane"]), (WAYS[1], &["lane"])];
        let runs = moments.map(|(way, moments)| {
            scope.spawn(move || moments.iter().map(|moment| both(way, *moment)).collect::<Vec<Stories>>())
        });
        runs.map(|run| run.join().expect("a run that was read").into_iter())
    });
    let ([fresh, warm], [a, b, c], [d]) = (list(native), list(same), list(cross));
    [
        (Run { name: FRESH, lane: false }, fresh, a),
        (Run { name: "beside the upgrade", lane: false }, warm.clone(), b),
        (Run { name: "on the direct lane", lane: true }, warm.clone(), c),
        (Run { name: "on the fabric lane", lane: true }, warm, d),
    ]
}

fn list<const N: usize>(told: impl Iterator<Item = Stories>) -> [Stories; N] {
    let told: Vec<Stories> = told.collect();
    told.try_into().unwrap_or_else(|_| unreachable!("as many as were asked for"))
}

/// Runs the cases that are chosen.
pub fn run(words: &[String]) -> ExitCode {
    // Options of cargo's own harness, which scripts hand to every test.
    let words: Vec<String> = words.iter().filter(|w| !w.starts_with("--")).cloned().collect();
    let lab = Lab::up("posix");
    let ways = [ORACLE, WAYS[0], WAYS[1]];
    let _fars: Vec<Program> = ways.into_iter().map(|way| far(&lab, way)).collect();

    let all = cases::all();
    let chosen: Vec<&Case> = all.iter().filter(|c| cases::chosen(&c.name, &words)).collect();
    let mut wrong: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (run, want, have) in runs(&lab, &words) {
        for case in &chosen {
            if case.across.is_some() && !run.lane && run.name != FRESH {
                continue;
            }
            let what = difference(case, want.get(&case.name), have.get(&case.name), run.lane);
            if let Some(what) = what {
                wrong.entry(&case.name).or_default().push(format!("{}: {what}", run.name));
            }
        }
    }
    judge(&chosen, &wrong, words.is_empty())
}

fn judge(chosen: &[&Case], wrong: &BTreeMap<&str, Vec<String>>, whole: bool) -> ExitCode {
    let (mut passed, mut failed) = (0, 0);
    for case in chosen {
        let found = wrong.get(case.name.as_str()).map(Vec::as_slice).unwrap_or_default();
        match (case.open, found) {
            (None, []) | (Some(_), [_, ..]) => passed += 1,
            // Some differ only now and then.
            (Some(_), []) => {
                println!("{} is listed as open, and was the same", case.name);
                passed += 1;
            }
            (None, found) => {
                failed += 1;
                println!("test {} ... FAILED\n    row {}", case.name, case.row);
                found.iter().for_each(|line| println!("    {line}"));
            }
        }
    }
    if whole {
        match report::check(chosen) {
            Ok(()) => passed += 1,
            Err(why) => {
                failed += 1;
                println!("test docs/compatibility.md ... FAILED\n    {why}");
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
