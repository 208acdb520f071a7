//! Pages of known bytes all over a machine's memory, to see whether somebody writes where nothing of his is.
//!
//! A half of them stays in this process, a quarter in files of a directory that lies in memory, and the rest belongs to
//! processes that come and go, for memory that its owner has given up is what a late write would hit. When standard input ends,
//! every byte is looked at; those of a short-lived process before it ends.

use std::io;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const USAGE: &str = "usage: canary MIB PROCESSES DIRECTORY";
const PAGE_WORDS: usize = 512;
const MIB_PAGES: usize = 256;
/// The pages of one file.
const FILE_PAGES: usize = 1024;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["hold", pages, seed, millis] => numbers([pages, seed, millis])
            .and_then(|[pages, seed, millis]| hold(pages as usize, seed, Duration::from_millis(millis))),
        [mib, processes, directory] => numbers([mib, processes])
            .and_then(|[mib, processes]| watch(mib as usize, processes, Path::new(directory))),
        _ => Err(USAGE.to_owned()),
    };
    match result {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("canary: {error}");
            ExitCode::FAILURE
        }
    }
}

fn numbers<const N: usize>(words: [&str; N]) -> Result<[u64; N], String> {
    let mut out = [0; N];
    for (out, word) in out.iter_mut().zip(words) {
        *out = word.parse().map_err(|_| format!("'{word}' is no number"))?;
    }
    Ok(out)
}

/// The word at a place of the pages of a seed: no two pages are alike.
fn word(seed: u64, at: usize) -> u64 {
    let mut z =
        seed.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z ^= z >> 29;
    z | 1
}

fn filled(pages: usize, seed: u64) -> Vec<u64> {
    (0..pages * PAGE_WORDS).map(|at| word(seed, at)).collect()
}

fn verify(found: &[u64], seed: u64, whose: &str) -> Result<usize, String> {
    match found.iter().enumerate().find(|&(at, &found)| found != word(seed, at)) {
        None => Ok(found.len() / PAGE_WORDS),
        Some((at, found)) => Err(format!(
            "CHANGED: {whose}, page {}, byte {}: {found:016x} instead of {:016x}",
            at / PAGE_WORDS,
            at % PAGE_WORDS * 8,
            word(seed, at)
        )),
    }
}

/// A short-lived process.
fn hold(pages: usize, seed: u64, time: Duration) -> Result<String, String> {
    let memory = filled(pages, seed);
    thread::sleep(time);
    verify(&memory, seed, "a short-lived process").map(|pages| format!("{pages} pages"))
}

fn write_file(directory: &Path, seed: u64) -> io::Result<()> {
    let bytes: Vec<u8> = filled(FILE_PAGES, seed).iter().flat_map(|word| word.to_le_bytes()).collect();
    std::fs::write(directory.join(format!("canary-{seed}")), bytes)
}

fn verify_file(directory: &Path, seed: u64) -> Result<usize, String> {
    let path = directory.join(format!("canary-{seed}"));
    let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let _ = std::fs::remove_file(&path);
    let words: Vec<u64> =
        bytes.as_chunks().0.iter().map(|bytes: &[u8; 8]| u64::from_le_bytes(*bytes)).collect();
    verify(&words, seed, "a file")
}

fn watch(mib: usize, processes: u64, directory: &Path) -> Result<String, String> {
    let ended = Arc::new(AtomicBool::new(false));
    let theirs = ended.clone();
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        theirs.store(true, Ordering::Relaxed);
    });
    let own = filled(mib * MIB_PAGES / 2, 0);
    let files = (mib * MIB_PAGES / 4 / FILE_PAGES) as u64;
    for seed in 1..=files {
        write_file(directory, seed).map_err(|e| format!("{}: {e}", directory.display()))?;
    }
    let share = mib * MIB_PAGES / 4 / processes.max(1) as usize;
    let mut seed = files;
    let mut next = || {
        seed += 1;
        // Some stay long enough that what follows a death happens in their time, most of them do not.
        begin(share, seed, 200 + 400 * (seed % 7))
    };
    let mut children = (0..processes).map(|_| next()).collect::<Result<Vec<_>, _>>()?;
    println!(
        "filled {} pages",
        own.len() / PAGE_WORDS + files as usize * FILE_PAGES + share * processes as usize
    );
    let mut short_lived = 0;
    while !children.is_empty() {
        thread::sleep(Duration::from_millis(20));
        let mut alive = Vec::new();
        for mut child in children {
            match child.try_wait().map_err(|e| e.to_string())? {
                None => alive.push(child),
                // It has said what it found.
                Some(status) if !status.success() => return Err(format!("a process ended with {status}")),
                Some(_) => {
                    short_lived += 1;
                    if !ended.load(Ordering::Relaxed) {
                        alive.push(next()?);
                    }
                }
            }
        }
        children = alive;
    }
    let mut pages = verify(&own, 0, "the process that stays")?;
    for seed in 1..=files {
        pages += verify_file(directory, seed)?;
    }
    Ok(format!("whole: {pages} pages, and {} of {short_lived} short-lived processes", short_lived * share))
}

fn begin(pages: usize, seed: u64, millis: u64) -> Result<Child, String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let words = ["hold".to_owned(), pages.to_string(), seed.to_string(), millis.to_string()];
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).spawn().map_err(|e| e.to_string())
}
