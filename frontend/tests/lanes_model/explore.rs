//! The explorer: breadth first over all states, so that a trace is a shortest one; then backwards from the ends, so
//! that a state without a way out is found.
//!
//! A visited state is kept as 64 bits, with its parent and which of the parent's moves led to it; a trace is replayed
//! from the first state.

use crate::world::{Config, Kind, Move, World};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// More states than this are a mistake in the bounds.
const MOST: usize = 80_000_000;

/// What an exploration without a finding saw.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub states: usize,
    pub moves: usize,
    pub ends: usize,
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} states, {} moves, {} ends", self.states, self.moves, self.ends)
    }
}

/// A finding: what is wrong, and the shortest way there.
#[derive(Debug)]
pub struct Finding {
    pub what: String,
    pub trace: Vec<String>,
    pub states: usize,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for line in &self.trace {
            writeln!(f, "    {line}")?;
        }
        write!(f, "    => {} ({} states seen)", self.what, self.states)
    }
}

/// Multiplies and folds each word; quick without optimisation, and good enough for some 10⁷ states.
#[derive(Default)]
struct Fold(u64);

impl Fold {
    fn word(&mut self, word: u64) {
        let wide = u128::from(self.0 ^ word ^ 0x9e37_79b9_7f4a_7c15) * 0xa076_1d64_78bd_642f;
        self.0 = (wide as u64).rotate_left(23) ^ (wide >> 64) as u64;
    }
}

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
    }
    fn write_u8(&mut self, n: u8) {
        self.word(n.into());
    }
    fn write_u32(&mut self, n: u32) {
        self.word(n.into());
    }
    fn write_u64(&mut self, n: u64) {
        self.word(n);
    }
    fn write_usize(&mut self, n: usize) {
        self.word(n as u64);
    }
    fn write_isize(&mut self, n: isize) {
        self.word(n as u64);
    }
}

/// The key is a hash already.
#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 keys");
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = n;
    }
}

fn fingerprint(world: &World) -> u64 {
    let mut fold = Fold::default();
    world.hash(&mut fold);
    fold.finish()
}

#[derive(Default)]
struct Graph {
    parents: Vec<(u32, u16)>,
    /// Moves that the endpoints make of themselves.
    duty: Vec<(u32, u32)>,
    /// Moves of the applications.
    applications: Vec<(u32, u32)>,
    ended: Vec<u32>,
    caught_up: Vec<u32>,
}

impl Graph {
    fn note(&mut self, index: u32, world: &World) {
        if world.ended() {
            self.ended.push(index);
        }
        if world.caught_up() {
            self.caught_up.push(index);
        }
    }

    /// The moves from the first state to this one.
    fn way_to(&self, mut index: u32) -> Vec<u16> {
        let mut ordinals = Vec::new();
        while index != 0 {
            let (parent, ordinal) = self.parents[index as usize];
            ordinals.push(ordinal);
            index = parent;
        }
        ordinals.reverse();
        ordinals
    }

    fn finding(&self, config: &Config, index: u32, last: Option<String>, what: String) -> Finding {
        let mut world = World::new(config);
        let mut trace = Vec::new();
        for ordinal in self.way_to(index) {
            let Move { what, n, to, .. } = world.moves(config).swap_remove(ordinal.into());
            world = to.expect("a move that was made before");
            trace.push(format!("{what} {n}  [{}]", world.summary()));
        }
        trace.extend(last);
        Finding { what, trace, states: self.parents.len() }
    }

    /// The first state from which no goal can be reached by these moves.
    fn stuck(&self, goals: &[u32], moves: &[&[(u32, u32)]]) -> Option<u32> {
        let states = self.parents.len();
        let mut first = vec![0u32; states + 2];
        for (_, to) in moves.iter().copied().flatten() {
            first[*to as usize + 2] += 1;
        }
        for i in 2..first.len() {
            first[i] += first[i - 1];
        }
        let mut from = vec![0u32; first[states + 1] as usize];
        for (source, to) in moves.iter().copied().flatten() {
            let place = &mut first[*to as usize + 1];
            from[*place as usize] = *source;
            *place += 1;
        }
        let mut reaches = vec![false; states];
        let mut open = goals.to_vec();
        for goal in goals {
            reaches[*goal as usize] = true;
        }
        while let Some(state) = open.pop() {
            for source in &from[first[state as usize] as usize..first[state as usize + 1] as usize] {
                if !std::mem::replace(&mut reaches[*source as usize], true) {
                    open.push(*source);
                }
            }
        }
        reaches.iter().position(|reached| !reached).map(|state| state as u32)
    }
}

/// Visits every state.
pub fn explore(config: &Config) -> Result<Seen, Box<Finding>> {
    let mut graph = Graph::default();
    let mut seen: HashMap<u64, u32, BuildHasherDefault<Same>> = HashMap::default();
    let first = World::new(config);
    let mut open = VecDeque::from([first]);
    seen.insert(fingerprint(&first), 0);
    graph.parents.push((0, 0));
    graph.note(0, &first);
    let mut index = 0;
    let mut moves = 0;
    while let Some(world) = open.pop_front() {
        assert!(graph.parents.len() < MOST, "more than {MOST} states: the bounds are too wide");
        for (ordinal, Move { kind, what, n, to }) in world.moves(config).into_iter().enumerate() {
            moves += 1;
            let to = match to.and_then(|to| to.check(config).map(|()| to)) {
                Ok(to) => to,
                Err(broken) => {
                    return Err(Box::new(graph.finding(
                        config,
                        index,
                        Some(format!("{what} {n}")),
                        broken.0,
                    )));
                }
            };
            let next = graph.parents.len() as u32;
            let target = *seen.entry(fingerprint(&to)).or_insert(next);
            if target == next {
                graph.parents.push((index, ordinal as u16));
                graph.note(next, &to);
                open.push_back(to);
            }
            match kind {
                Kind::Duty => graph.duty.push((index, target)),
                Kind::Application => graph.applications.push((index, target)),
                Kind::Environment => {}
            }
        }
        index += 1;
    }
    if let Some(state) = graph.stuck(&graph.caught_up, &[&graph.duty]) {
        return Err(Box::new(graph.finding(config, state, None, "accepted bytes have no way".into())));
    }
    if let Some(state) = graph.stuck(&graph.ended, &[&graph.duty, &graph.applications]) {
        return Err(Box::new(graph.finding(config, state, None, "no way to an end".into())));
    }
    Ok(Seen { states: graph.parents.len(), moves, ends: graph.ended.len() })
}
