//! The near end's process: runs cases one after the other and prints their traces.
//!
//! Its output, for the runner: `case NAME`, then `| ` and each line of the trace, then `moved FAST TCP REASON` or `failed WHY`.

use crate::cases::{self, Carried, Case, Setup};
use crate::lanes::Moved;
use crate::pair::{Moment, Pair, Place};
use std::io::Write;

/// `posix near MOMENT CONTROL FAR4 FAR6 NEAR4 NEAR6 CREW SKIP WORD…`
pub fn run(words: &[String]) {
    let moment = Moment::ALL.iter().find(|(_, name)| *name == words[0]).expect("a moment").0;
    let place = Place {
        control: words[1].clone(),
        far: [words[2].clone(), words[3].clone()],
        near: [words[4].clone(), words[5].clone()],
    };
    let skip: usize = words[7].parse().expect("a number");
    let chosen =
        cases::all().into_iter().filter(|c| c.crew() == words[6] && cases::chosen(&c.name, &words[8..]));
    for case in chosen.skip(skip) {
        say(&format!("case {}", case.name));
        match story(&case, &place, moment) {
            Err(why) => say(&format!("failed {why}")),
            Ok((trace, moved, why)) => {
                let lines: String = trace.iter().map(|line| format!("| {line}\n")).collect();
                say(&format!("{lines}moved {} {} {why}", moved.fast, moved.tcp));
            }
        }
    }
    say("done");
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}

/// What a case tells, and why its connection is on TCP at the end, if it is. One that falls back to TCP beside its beginning, as it may on a machine too busy for liveness, is told
/// again on another connection.
fn story(case: &Case, place: &Place, moment: Moment) -> Result<(Vec<String>, Moved, String), String> {
    let mut last = Err("not told".into());
    for _ in 0..3 {
        let mut pair = match case.setup {
            Setup::Connected => connected(place, moment)?,
            Setup::Apart => Pair::apart(place, moment),
        };
        (case.run)(&mut pair);
        let why = if case.carried == Carried::Lane { String::new() } else { pair.reason() };
        let (trace, moved) = pair.end();
        let moved = moved.unwrap_or_default();
        last = Ok((trace, moved, why));
        if moved.fast > 0 || moved.tcp == 0 || case.carried != Carried::Lane {
            break;
        }
    }
    last
}

/// One that the agent lost sight of for a moment stays on TCP; the next comes to its lane.
fn connected(place: &Place, moment: Moment) -> Result<Pair, String> {
    Pair::connect(place, moment)
        .or_else(|_| Pair::connect(place, moment))
        .or_else(|_| Pair::connect(place, moment))
}
