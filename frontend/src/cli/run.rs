//! `vsocket run`: execs a program with the library preloaded.

use super::elf;
use crate::program::client::AGENT_VARIABLE;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Names the library, for whoever keeps it elsewhere.
pub const LIBRARY_VARIABLE: &str = "VSOCKET_LIB";
const LIBRARY: &str = "libvsocket.so";
/// As `env(1)`: the failure is ours, not the program's.
const OURS: u8 = 125;

/// Where the library is; else where it was looked for.
pub fn library() -> Result<PathBuf, Vec<PathBuf>> {
    if let Some(named) = std::env::var_os(LIBRARY_VARIABLE) {
        let path = std::path::absolute(&named).unwrap_or_else(|_| PathBuf::from(&named));
        return if path.is_file() { Ok(path) } else { Err(vec![path]) };
    }
    let exe = std::env::current_exe().unwrap_or_default();
    let beside = exe.parent().unwrap_or(Path::new("/")).to_owned();
    let places = vec![beside.join(LIBRARY), beside.join("../lib").join(LIBRARY)];
    let found = places.iter().find(|p| p.is_file()).and_then(|p| std::fs::canonicalize(p).ok());
    found.ok_or(places)
}

/// The list for `LD_PRELOAD`: the library, then what was there.
fn preload(library: &Path, before: Option<&OsStr>) -> OsString {
    let mut list = library.as_os_str().to_owned();
    let rest = before.unwrap_or_default().as_bytes();
    let others = rest.split(|b| matches!(b, b':' | b' ')).filter(|p| !p.is_empty());
    for other in others.filter(|p| *p != library.as_os_str().as_bytes()) {
        list.push(":");
        list.push(OsStr::from_bytes(other));
    }
    list
}

/// Whether a path can stand in `LD_PRELOAD`, which knows no quotes.
pub fn can_be_listed(library: &Path) -> bool {
    !library.as_os_str().as_bytes().iter().any(|b| matches!(b, b':' | b' '))
}

/// Runs a command in place of this process.
pub fn run(agent: &Path, command: &[OsString]) -> ExitCode {
    let Some((name, args)) = command.split_first() else { return OURS.into() };
    let say = |text: &str| eprintln!("vsocket run: {text}");
    let program = match elf::find(name) {
        Ok(program) => program,
        Err(status) => {
            let what = if status == 127 { "no such command" } else { "not executable" };
            say(&format!("{}: {what}", name.display()));
            return status.into();
        }
    };
    let library = match library() {
        Ok(library) => library,
        Err(places) => {
            let places: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
            say(&format!("no library at {} ({LIBRARY_VARIABLE} can name it)", places.join(" or ")));
            return OURS.into();
        }
    };
    if !can_be_listed(&library) {
        say(&format!(
            "{}: a path with a space or a colon cannot be preloaded; move the library",
            library.display()
        ));
        return OURS.into();
    }
    if let Some(obstacle) = elf::obstacle(&program) {
        say(&format!("{obstacle}, so it will stay on TCP"));
    }
    let list = preload(&library, std::env::var_os("LD_PRELOAD").as_deref());
    let mut command = Command::new(&program);
    command.arg0(name).args(args).env("LD_PRELOAD", list).env(AGENT_VARIABLE, agent);
    let error = command.exec();
    say(&format!("{}: {error}", name.display()));
    if error.kind() == std::io::ErrorKind::NotFound { 127.into() } else { 126.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_preloaded_stays() {
        let lib = Path::new("/l/libvsocket.so");
        assert_eq!(preload(lib, None), "/l/libvsocket.so");
        assert_eq!(preload(lib, Some(OsStr::new("/a.so /b.so"))), "/l/libvsocket.so:/a.so:/b.so");
        assert_eq!(preload(lib, Some(OsStr::new("/l/libvsocket.so:/a.so"))), "/l/libvsocket.so:/a.so");
        assert!(can_be_listed(lib) && !can_be_listed(Path::new("/my lib.so")));
    }
}
