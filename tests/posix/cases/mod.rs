//! The cases, by group. Each names the row of the list of hard problems of interposition that it belongs to.

mod addresses;
mod descriptors;
mod ends;
mod epoll;
mod files;
mod flags;
mod options;
pub mod processes;
mod readiness;
mod rest;
mod signals;
mod stdio;
mod threads;
mod transfer;
mod unseen;

use crate::pair::Pair;

/// What a case begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Setup {
    /// A connected pair.
    Connected,
    /// Nothing: it makes what it needs.
    Apart,
}

/// Where its bytes are to be when it begins on the lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Carried {
    /// On the lane, if it moves any.
    Lane,
    /// Also on TCP, for this reason, which the agent names.
    Tcp(&'static str),
    /// Also on TCP, for a while, because of this.
    Beside(&'static str),
}

/// One case.
pub struct Case {
    /// Family of functions.
    pub group: &'static str,
    /// Row of the list of hard problems, or of the issue.
    pub row: &'static str,
    /// Group, function and behaviour.
    pub name: String,
    /// What it begins with.
    pub setup: Setup,
    /// Where its bytes are to be.
    pub carried: Carried,
    /// Why it is known to differ, if it is.
    pub open: Option<&'static str>,
    /// Why it may differ beside the upgrade, if it may: elsewhere it is the same.
    pub across: Option<&'static str>,
    /// What it does.
    pub run: Box<dyn Fn(&mut Pair)>,
}

impl Case {
    /// Which process runs it: one that makes threads is told apart, as the library treats it otherwise.
    pub fn crew(&self) -> &'static str {
        if self.group == "threads" { "threads" } else { "single" }
    }
}

/// A list of cases of one group in the making.
pub struct Group {
    name: &'static str,
    cases: Vec<Case>,
}

impl Group {
    fn new(name: &'static str) -> Self {
        Self { name, cases: Vec::new() }
    }

    fn case(&mut self, row: &'static str, name: &str, run: impl Fn(&mut Pair) + 'static) -> &mut Case {
        self.cases.push(Case {
            group: self.name,
            row,
            name: format!("{}/{name}", self.name),
            setup: Setup::Connected,
            carried: Carried::Lane,
            open: None,
            across: None,
            run: Box::new(run),
        });
        let at = self.cases.len() - 1;
        &mut self.cases[at]
    }
}

/// All of them.
pub fn all() -> Vec<Case> {
    let groups = [
        transfer::group(),
        flags::group(),
        options::group(),
        ends::group(),
        readiness::group(),
        epoll::group(),
        descriptors::group(),
        processes::group(),
        signals::group(),
        stdio::group(),
        files::group(),
        addresses::group(),
        unseen::group(),
        threads::group(),
        rest::group(),
    ];
    groups.into_iter().flat_map(|g| g.cases).collect()
}

/// Whether a name contains one of the words, or there are none.
pub fn chosen(name: &str, words: &[String]) -> bool {
    words.is_empty() || words.iter().any(|word| name.contains(word.as_str()))
}
