//! `docs/compatibility.md`: what the suite shows, function by function.

use crate::cases::{Carried, Case};
use std::fmt::Write;
use std::path::PathBuf;

/// Set, the page is written instead of compared.
const WRITES: &str = "POSIX_WRITES";

const HEAD: &str = "# Compatibility

Each line is a case of `tests/posix`, run over kernel TCP and accelerated, on one host and across two, right after the
handshake, beside the upgrade, and on the lane: every answer, errno, byte and readiness was compared. This page is
generated (`POSIX_WRITES=1 cargo test --release --test posix`), and a test holds it against the cases.

- **same**: the story is the kernel's, and the bytes went over the lane where there were any.
- **on tcp**: the story is the kernel's; the connection goes back to kernel TCP first, for the reason shown.
- **differs**: it is known to differ, for the reason shown.

Rows of the list of hard problems that are shown elsewhere: 7.5, calls that meet no library, by `tests/real` (Go, a static
binary); 7.17 and 7.18, programs that get no library, by the cases of 7.16 and by `tests/real` (sshd); 7.47, the library's own
start, by every accelerated run; 7.48, others' preloads, by `frontend/tests/agent.rs`; 7.50, idle processors, by
`tests/idle.rs`. Sequences of calls are compared by `tests/fuzzer`.
";

fn page(cases: &[&Case]) -> String {
    let mut text = HEAD.to_owned();
    let mut group = "";
    for case in cases {
        if case.group != group {
            group = case.group;
            let _ = write!(text, "\n## {group}\n\n| function | behaviour | row | |\n|---|---|---|---|\n");
        }
        let rest = case.name.strip_prefix(group).unwrap_or(&case.name).trim_start_matches('/');
        let (function, behaviour) = rest.split_once('/').unwrap_or((rest, ""));
        let cell = |text: &str| text.replace('|', "\\|");
        let verdict = match (case.open, case.carried) {
            (Some(why), _) => format!("differs: {why}"),
            (None, Carried::Tcp(reason) | Carried::Beside(reason)) => format!("on tcp: {reason}"),
            (None, Carried::Lane) => {
                case.across.map_or_else(|| "same".into(), |why| format!("same; beside the upgrade {why}"))
            }
        };
        let _ = writeln!(text, "| {} | {} | {} | {verdict} |", cell(function), cell(behaviour), case.row);
    }
    text
}

/// Holds the page against the cases, or writes it.
pub fn check(cases: &[&Case]) -> Result<(), String> {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/compatibility.md");
    let page = page(cases);
    if std::env::var_os(WRITES).is_some() {
        return std::fs::write(&file, page).map_err(|e| format!("{}: {e}", file.display()));
    }
    let there = std::fs::read_to_string(&file).unwrap_or_default();
    if there == page { Ok(()) } else { Err(format!("is not up to date: {WRITES}=1 cargo test --test posix")) }
}
