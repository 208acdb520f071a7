//! A difference, looked into: whether it comes again, and how few of its steps it needs.

use crate::plan::Name;
use crate::way::{Pair, Told};
use std::time::{Duration, Instant};

/// How long one difference may be looked into.
const PATIENCE: Duration = Duration::from_secs(40);

/// What was found of it.
pub struct Found {
    /// The fewest steps that differ.
    pub name: Name,
    /// Both stories of these.
    pub native: Told,
    /// See `native`.
    pub told: Told,
    /// How often of how many times it came again.
    pub again: (usize, usize),
    /// The kernel tells two stories of it: the fuzzer's fault.
    pub unsteady: bool,
}

fn differs(native: &mut Pair<'_>, pair: &mut Pair<'_>, name: &Name, tries: usize) -> Option<(Told, Told)> {
    let want = native.run(name);
    (0..tries).find_map(|_| {
        let told = pair.run(name);
        (!told.agrees(&want)).then(|| (want.clone(), told))
    })
}

/// Looks into it.
pub fn look(native: &mut Pair<'_>, pair: &mut Pair<'_>, name: Name, first: (Told, Told)) -> Found {
    let begun = Instant::now();
    let unsteady = (0..3).any(|_| !native.run(&name).agrees(&first.0));
    let (want, got) = first;
    let mut found = Found { name: name.clone(), native: want, told: got, again: (0, 0), unsteady };
    if unsteady {
        return found;
    }
    while found.again.1 < 5 {
        found.again.1 += 1;
        found.again.0 += usize::from(differs(native, pair, &name, 1).is_some());
    }
    if found.again.0 == 0 {
        return found;
    }
    let tries = if found.again.0 == 5 { 1 } else { 4 };
    let mut kept: Vec<usize> = name.plan().steps.iter().map(|step| step.at).collect();
    let mut size = kept.len().div_ceil(2);
    while size > 0 && begun.elapsed() < PATIENCE {
        let mut from = kept.len();
        while from > 0 && begun.elapsed() < PATIENCE {
            let to = from;
            from = from.saturating_sub(size);
            let fewer = [&kept[..from], &kept[to.min(kept.len())..]].concat();
            let name = Name { seed: name.seed, kept: Some(fewer.clone()) };
            if let Some((native, told)) = differs(native, pair, &name, tries) {
                (found.name, found.native, found.told) = (name, native, told);
                kept = fewer;
            }
        }
        size = if size == 1 { 0 } else { size.div_ceil(2) };
    }
    found
}
