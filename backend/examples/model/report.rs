//! The tables of `docs/performance.md`.

use std::fmt::Write;

use crate::costs::{self, COUNT, Costs, MEASURED, Measure, PUBLISHED, ROWS, SOFT_BYTE_CACHED, Stage};
use crate::{MESSAGE, Outcome, RING, Setting, Work, simulate};

/// How long one run is measured, in ns of the virtual clock.
const LONG: f64 = 8e6;
/// A pause, in ns, in which everybody falls asleep.
const PAUSE: f64 = 500_000.0;

/// The RNIC, with a processor for each thread.
pub const RNIC: Setting = Setting { costs: costs::RNIC, processors: 4, spinning: true, ring: RING };
/// This machine, with two processors and `soft`.
pub const SOFT: Setting = Setting { costs: costs::SOFT, processors: 2, spinning: true, ring: RING };

/// One request at a time.
pub const ONE: Work = Work::Ask { connections: 1, pause: 0.0 };
const SELDOM: Work = Work::Ask { connections: 1, pause: PAUSE };
const WRITE_64K: Work = Work::Stream { write: 64 << 10 };
const WRITE_1M: Work = Work::Stream { write: 1 << 20 };

/// Redis GET with so many connections.
pub fn redis(setting: Setting, connections: usize) -> (Setting, Work) {
    let mut setting = setting;
    let program = costs::redis(connections);
    (setting.costs[Stage::Client as usize], setting.costs[Stage::Server as usize]) = (program, program);
    (setting, Work::Ask { connections, pause: 0.0 })
}

pub fn run(setting: Setting, work: Work) -> Outcome {
    simulate(setting, work, LONG)
}

/// How often a round trip passes each stage when nobody waits for anybody.
pub fn path(setting: &Setting) -> Costs {
    let mut times = [0.0; COUNT];
    let wire = if MESSAGE + 74 > crate::INLINE { Stage::WireLarge } else { Stage::WireSmall };
    for (stage, count) in [
        (Stage::Send, 2),
        (Stage::SendByte, 2 * MESSAGE),
        (Stage::Transfer, 4),
        (Stage::Look, 2),
        (Stage::Pump, 2),
        (Stage::Post, 2),
        (Stage::Turn, 2),
        (Stage::Flush, 2),
        (wire, 2),
        (Stage::WireByte, 2 * (MESSAGE + 74)),
        (Stage::Read, 2),
        (Stage::Poll, 2),
        (Stage::Hear, 2),
        (Stage::InByte, 2 * MESSAGE),
        (Stage::Recv, 2),
        (Stage::RecvByte, 2 * MESSAGE),
        (Stage::Client, 1),
        (Stage::Server, 1),
    ] {
        times[stage as usize] = count as f64 * setting.costs[stage as usize];
    }
    times
}

fn us(ns: f64) -> String {
    format!("{:.2}", ns / 1000.0)
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

fn thousands(rate: f64) -> String {
    format!("{:.0} k/s", rate / 1000.0)
}

/// A change; one that rounds to nothing has no sign.
fn signed(percent: f64) -> String {
    if percent.abs() < 0.5 { "0 %".to_owned() } else { format!("{percent:+.0} %") }
}

/// The whole of what the document quotes.
pub fn text() -> String {
    let mut out = String::new();
    inputs(&mut out);
    trips(&mut out);
    streams(&mut out);
    requests(&mut out);
    sensitivity(&mut out);
    published(&mut out);
    validation(&mut out);
    out
}

/// Writing to a string does not fail.
macro_rules! line {
    ($out:expr, $($arg:tt)*) => {{ let _ = writeln!($out, $($arg)*); }};
}

fn inputs(out: &mut String) {
    line!(out, "### What each stage takes, in ns\n");
    line!(out, "| stage | RNIC | from | `soft` here | from |");
    line!(out, "|---|---:|---|---:|---|");
    for (_, name, rnic, from, soft, soft_from) in ROWS {
        line!(out, "| {name} | {} | {from} | {} | {soft_from} |", figure(rnic), figure(soft));
    }
}

/// Three digits, however small.
fn figure(ns: f64) -> String {
    if ns >= 10.0 || ns == 0.0 { format!("{ns:.0}") } else { format!("{ns:.3}") }
}

fn trips(out: &mut String) {
    let slow = Setting { spinning: false, ..RNIC };
    let (polled, asleep) = (run(RNIC, ONE), run(slow, SELDOM));
    line!(out, "\n### A round trip of 64 B, stage by stage, in µs\n");
    line!(out, "| stage | polled | with sleeping ends |");
    line!(out, "|---|---:|---:|");
    let sum = path(&RNIC);
    for (stage, name, ..) in ROWS.iter().filter(|row| sum[row.0 as usize] > 0.0) {
        let time = us(sum[*stage as usize]);
        line!(out, "| {name} | {time} | {time} |");
    }
    let total: f64 = sum.iter().sum();
    line!(out, "| **sum when nobody waits** | **{}** | **{0}** |", us(total));
    // Four sleep when they are needed: the second program, both backends, and the first program again; the backend that
    // has asked still polls when the answer comes. The first wakes by its own clock. Three are rung, one is interrupted.
    let [program, backend, bell] =
        [Stage::WakeNear, Stage::Wake, Stage::Bell].map(|at| RNIC.costs[at as usize]);
    let woken = 2.0 * program + 2.0 * backend + 3.0 * bell;
    line!(out, "| doorbells and wake-ups | 0.00 | {} |", us(woken));
    let rest = asleep.trip - total - woken;
    line!(out, "| a turn under way when something comes | {} | {} |", us(polled.trip - total), us(rest));
    line!(out, "| **round trip, simulated** | **{}** | **{}** |", us(polled.trip), us(asleep.trip));
}

fn streams(out: &mut String) {
    line!(out, "\n### One stream\n");
    line!(out, "| | Gbit/s | sender busy | its backend | wire | other backend | receiver | most in flight |");
    line!(out, "|---|---:|---:|---:|---:|---:|---:|---:|");
    let mut far = RNIC;
    [Stage::WireSmall, Stage::WireLarge].iter().for_each(|stage| far.costs[*stage as usize] += 10_000.0);
    for (name, setting, work) in [
        ("writes of 64 KiB", RNIC, WRITE_64K),
        ("writes of 1 MiB", RNIC, WRITE_1M),
        ("writes of 64 KiB, 10 µs of network each way", far, WRITE_64K),
    ] {
        let Outcome { gbits, busy, flight, .. } = run(setting, work);
        let [a, b, near, away, wire] = busy.map(percent);
        line!(out, "| {name} | {gbits:.1} | {a} | {near} | {wire} | {away} | {b} | {} KiB |", flight >> 10);
    }
}

fn requests(out: &mut String) {
    line!(out, "\n### Redis GET\n");
    line!(
        out,
        "| connections | requests | trip, µs | redis per request, µs | client busy | redis | its backend | other backend |"
    );
    line!(out, "|---:|---:|---:|---:|---:|---:|---:|---:|");
    for connections in [1, 10, 40] {
        let (setting, work) = redis(RNIC, connections);
        let o = run(setting, work);
        let [client, server, near, far, _] = o.busy.map(percent);
        let own = us(costs::redis(connections));
        line!(
            out,
            "| {connections} | {} | {} | {own} | {client} | {server} | {far} | {near} |",
            thousands(o.rate),
            us(o.trip)
        );
    }
}

/// The four figures that the sensitivity table compares.
fn figures(change: impl Fn(&mut Setting)) -> [f64; 4] {
    let changed = |mut setting: Setting| {
        change(&mut setting);
        setting
    };
    let ask = |connections| {
        let (setting, work) = redis(RNIC, connections);
        run(changed(setting), work).rate
    };
    [run(changed(RNIC), ONE).trip, run(changed(RNIC), WRITE_64K).gbits, ask(1), ask(10)]
}

fn sensitivity(out: &mut String) {
    line!(out, "\n### What a change of one stage would bring\n");
    line!(out, "| change | round trip | one stream | redis, 1 | redis, 10 |");
    line!(out, "|---|---:|---:|---:|---:|");
    let base = figures(|_| ());
    let mut row = |name: String, figures: [f64; 4]| {
        let change: Vec<f64> = figures.iter().zip(base).map(|(new, old)| (new / old - 1.0) * 100.0).collect();
        if change.iter().any(|percent| percent.abs() >= 2.0) {
            let cells: Vec<String> = change.iter().map(|percent| signed(*percent)).collect();
            line!(out, "| {name} | {} |", cells.join(" | "));
        }
    };
    for (stage, name, ..) in ROWS {
        row(format!("half: {name}"), figures(|setting| setting.costs[stage as usize] /= 2.0));
    }
    let ours = ROWS.iter().filter(|row| row.3.is_ours()).map(|row| row.0 as usize).collect::<Vec<_>>();
    let slower = |setting: &mut Setting| {
        for at in ours.iter().copied().chain([Stage::Client as usize, Stage::Server as usize]) {
            setting.costs[at] *= 2.0;
        }
    };
    row("twice: all that was measured here (a slower processor)".to_owned(), figures(slower));
    let switch = |setting: &mut Setting| {
        [Stage::WireSmall, Stage::WireLarge].iter().for_each(|at| setting.costs[*at as usize] += 500.0);
    };
    row("0.5 µs more of network each way (a switch, a longer cable)".to_owned(), figures(switch));
}

fn published(out: &mut String) {
    line!(out, "\n### Beside what others published\n");
    line!(out, "| | vsocket, predicted | vSocket, VEE 2019 | others |");
    line!(out, "|---|---:|---:|---|");
    let ask = |connections| {
        let (setting, work) = redis(RNIC, connections);
        thousands(run(setting, work).rate)
    };
    let values = [
        format!("{} µs", us(run(RNIC, ONE).trip)),
        format!("{:.1} Gbit/s", run(RNIC, WRITE_64K).gbits),
        ask(1),
        ask(10),
        ask(40),
    ];
    for ((name, theirs, others), ours) in PUBLISHED.iter().zip(values) {
        line!(out, "| {name} | {ours} | {theirs} | {others} |");
    }
}

fn validation(out: &mut String) {
    line!(out, "\n### How wrong the model is where it can be measured: `soft`, two processors\n");
    line!(out, "| | model | measured | model is | measured by |");
    line!(out, "|---|---:|---:|---:|---|");
    for (name, measure, measured, by) in MEASURED {
        let (model, unit) = predict(measure);
        let error = signed((model / measured - 1.0) * 100.0);
        line!(out, "| {name} | {model:.1} {unit} | {measured:.1} {unit} | {error} | {by} |");
    }
}

fn predict(measure: Measure) -> (f64, &'static str) {
    match measure {
        Measure::OneWay(spinning) => (run(Setting { spinning, ..SOFT }, ONE).trip / 2000.0, "µs"),
        Measure::Stream(write, ring, cached) => {
            let mut setting = Setting { ring, ..SOFT };
            if cached {
                for (stage, cost) in [Stage::OutByte, Stage::InByte].into_iter().zip(SOFT_BYTE_CACHED) {
                    setting.costs[stage as usize] = cost;
                }
            }
            (run(setting, Work::Stream { write }).gbits, "Gbit/s")
        }
        Measure::Redis(connections) => {
            // Where a processor is shared, a program that waits sleeps at once.
            let (setting, work) = redis(Setting { spinning: false, ..SOFT }, connections);
            (run(setting, work).rate / 1000.0, "k/s")
        }
    }
}
