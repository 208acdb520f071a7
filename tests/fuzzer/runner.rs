//! Runs plans every way, and holds the stories against the kernel's.

use crate::common::Lab;
use crate::plan::Name;
use crate::shrink::{self, Found};
use crate::way::{NATIVE, Pair, TWICE, Told, WAYS, Way};
use std::process::ExitCode;
use std::time::Instant;

/// Plans that are run between two comparisons.
const BATCH: u64 = 64;
/// Differences of one way that are looked into.
const MOST: usize = 12;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn chosen() -> Vec<Way> {
    let Ok(names) = std::env::var("FUZZ_WAYS") else { return WAYS.to_vec() };
    WAYS.into_iter().chain([TWICE]).filter(|way| names.split(',').any(|name| name == way.name)).collect()
}

/// The pairs of one way: single-threaded, and with threads.
type Pairs<'a> = [Pair<'a>; 2];

fn pairs(labs: &[Lab; 2], way: Way) -> Pairs<'_> {
    [false, true].map(|threaded| Pair::new(&labs[usize::from(way.drains)], way, threaded))
}

fn of<'p, 'a>(pairs: &'p mut Pairs<'a>, name: &Name) -> &'p mut Pair<'a> {
    &mut pairs[usize::from(name.is_threaded())]
}

/// What a way has come to.
#[derive(Default)]
struct Tally {
    calls: u64,
    moved: [u64; 2],
    differences: usize,
    unsteady: usize,
}

/// Runs what the environment asks for.
pub fn run() -> ExitCode {
    let labs = [Lab::up("fuzzer"), Lab::up("fuzzer-drains")];
    let seed = std::env::var("FUZZ_SEED").unwrap_or_else(|_| "1".into());
    let (mut native, mut ways) = (pairs(&labs, NATIVE), Vec::new());
    ways.extend(chosen().into_iter().map(|way| (pairs(&labs, way), Tally::default())));
    if seed.contains(':') {
        return tell(&mut native, &mut ways, &seed.trim_end_matches(':').parse().expect("SEED:STEP,STEP…"));
    }
    let first: u64 = seed.parse().expect("a number");
    let (calls, begun) = (number("FUZZ_CALLS", 400_000), Instant::now());
    let mut next = first;
    while ways.iter().map(|(_, tally)| tally.calls).sum::<u64>() < calls {
        batch(&mut native, &mut ways, next);
        next += BATCH;
        if ways.iter().all(|(_, tally)| tally.differences >= MOST) {
            break;
        }
    }
    judge(&ways, (first, next), begun)
}

/// Both stories of one plan, run `FUZZ_TIMES` times, or until they differ.
fn tell(native: &mut Pairs<'_>, ways: &mut [(Pairs<'_>, Tally)], name: &Name) -> ExitCode {
    let want = of(native, name).run(name);
    let mut same = true;
    for (pairs, _) in ways {
        let pair = of(pairs, name);
        let mut told = pair.run(name);
        for _ in 1..number("FUZZ_TIMES", 1) {
            if !told.agrees(&want) {
                break;
            }
            told = pair.run(name);
        }
        same &= told.agrees(&want);
        println!("{}: {}", pair.way.name, if told.agrees(&want) { "the same" } else { "DIFFERS" });
        show(&want, &told, usize::MAX);
    }
    if same { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The plans of the seeds from `first` on: all ways beside each other.
fn batch(native: &mut Pairs<'_>, ways: &mut [(Pairs<'_>, Tally)], first: u64) {
    let names: Vec<Name> = (first..first + BATCH).map(Name::whole).collect();
    let all = |pairs: &mut Pairs<'_>| -> Vec<Told> {
        let [single, threads] = pairs;
        let told = std::thread::scope(|scope| {
            let runs = [(single, false), (threads, true)].map(|(pair, threaded)| {
                let mine = names.iter().filter(move |name| name.is_threaded() == threaded);
                scope.spawn(move || mine.map(|name| pair.run(name)).collect::<Vec<_>>())
            });
            runs.map(|run| run.join().expect("a run that was read").into_iter())
        });
        let [mut single, mut threads] = told;
        let next = |name: &Name| if name.is_threaded() { threads.next() } else { single.next() };
        names
            .iter()
            .filter_map({
                let mut next = next;
                move |name| next(name)
            })
            .collect()
    };
    let (want, told) = std::thread::scope(|scope| {
        let oracle = scope.spawn(|| all(native));
        let runs: Vec<_> = ways.iter_mut().map(|(pairs, _)| scope.spawn(|| all(pairs))).collect();
        let told: Vec<_> = runs.into_iter().map(|run| run.join().expect("a run that was read")).collect();
        (oracle.join().expect("a run that was read"), told)
    });
    for ((pairs, tally), told) in ways.iter_mut().zip(told) {
        for ((name, want), told) in names.iter().zip(&want).zip(told) {
            if told == Told::Skipped {
                continue;
            }
            let Told::Story(lines, _) = want else {
                println!("{name} natively: {want:?}");
                tally.unsteady += 1;
                continue;
            };
            tally.calls += lines.len() as u64;
            if lines.iter().any(|line| line.contains(" ! ")) {
                println!("{name} does not settle natively: {:?}", lines.iter().find(|l| l.contains(" ! ")));
                tally.unsteady += 1;
            }
            if let Told::Story(_, moved) = &told {
                tally.moved.iter_mut().zip(moved).for_each(|(sum, n)| *sum += n);
            }
            if told.agrees(want) {
                continue;
            }
            if tally.differences >= MOST {
                tally.differences += 1;
                continue;
            }
            let found = shrink::look(of(native, name), of(pairs, name), name.clone(), (want.clone(), told));
            report(&found, pairs[0].way, tally);
        }
    }
}

fn report(found: &Found, way: Way, tally: &mut Tally) {
    let Found { name, native, told, again, unsteady } = found;
    if *unsteady {
        tally.unsteady += 1;
        println!("seed {}: {} differs, and the kernel from itself", name, way.name);
    } else {
        tally.differences += 1;
        println!("FUZZ_SEED={name} FUZZ_WAYS={}: differs, {} of {} times", way.name, again.0, again.1);
    }
    show(native, told, 14);
}

/// The first line that differs, and so many before it.
fn show(want: &Told, told: &Told, before: usize) {
    let (want, have) = (want.lines(), told.lines());
    let same = want.iter().zip(&have).take_while(|(a, b)| a == b).count();
    want[same.saturating_sub(before)..same].iter().for_each(|line| println!("      {line}"));
    let none = "(nothing)".to_owned();
    for i in same..(same + 3).min(want.len().max(have.len())) {
        let (a, b) = (want.get(i).unwrap_or(&none), have.get(i).unwrap_or(&none));
        if a == b {
            println!("      {a}");
        } else {
            println!("    k {a}\n    v {b}");
        }
    }
}

fn judge(ways: &[(Pairs<'_>, Tally)], seeds: (u64, u64), begun: Instant) -> ExitCode {
    let (mut passed, mut failed) = (0, 0);
    let seconds = begun.elapsed().as_secs_f64();
    for (pairs, tally) in ways {
        let Tally { calls, moved: [fast, tcp], differences, unsteady } = tally;
        let good = *differences == 0 && *unsteady == 0 && (fast > tcp || pairs[0].way == TWICE);
        *(if good { &mut passed } else { &mut failed }) += 1;
        println!(
            "test {} ... {}: seeds {}..{}, {calls} calls, {differences} differences, {unsteady} unsteady, {fast} bytes \
             over lanes, {tcp} over TCP",
            pairs[0].way.name,
            if good { "ok" } else { "FAILED" },
            seeds.0,
            seeds.1
        );
    }
    let calls: u64 = ways.iter().map(|(_, tally)| tally.calls).sum();
    println!("{calls} calls in {seconds:.0} s, {:.0} a second", calls as f64 / seconds);
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
