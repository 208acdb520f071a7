//! `vsocket doctor`: what would stop a program here from being accelerated, and how to mend it.

mod machine;

use super::guest::{self, Neighbour};
use super::{ask, chain, elf, print, run};
use crate::agent::report::Stat;
use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// Descriptors that a program needs beside its own: control socket, bells, slabs.
const DESCRIPTORS: u64 = 1024;

/// One thing that was looked at.
enum Finding {
    /// Nothing stands in the way.
    Fine(String),
    /// Not ideal, and how to mend it.
    Notice(String, String),
    /// Nothing is accelerated, and how to mend it.
    Stop(String, String),
}

/// Prints the findings; fails if one of them would stop acceleration.
pub fn doctor(agent: &Path, command: &[OsString]) -> ExitCode {
    let mut findings = reach(agent);
    findings.extend(library());
    findings.push(descriptors());
    if let Some(name) = command.first() {
        findings.push(program(name));
    }
    let mut stopped = false;
    for finding in &findings {
        match finding {
            Finding::Fine(what) => print(&format!("ok    {what}")),
            Finding::Notice(what, mend) => print(&format!("note  {what}\n      → {mend}")),
            Finding::Stop(what, mend) => {
                stopped = true;
                print(&format!("STOP  {what}\n      → {mend}"));
            }
        }
    }
    ExitCode::from(u8::from(stopped))
}

fn reach(agent: &Path) -> Vec<Finding> {
    let stat: Stat = match ask::ask(agent, 0) {
        Ok(stat) => stat,
        Err(error @ ask::Error::Unreachable { .. }) => return unreachable(agent, &error),
        Err(error) => {
            return vec![Finding::Stop(chain(&error), "restart the agent, in this program's version".into())];
        }
    };
    let mut findings = vec![Finding::Fine(format!("agent at {}", agent.display()))];
    findings.extend(stat.keeper.iter().flat_map(machine::kept));
    findings.push(backend(&stat));
    let declined = stat.declined.iter().map(|(reason, n)| format!("{n} {reason}")).collect::<Vec<_>>();
    if !declined.is_empty() {
        let what = format!("connections that were on TCP for a reason: {}", declined.join(", "));
        findings.push(Finding::Notice(what, "vsocket ss shows which".into()));
    }
    findings
}

/// There is no agent: how to start one, in the kind of guest that this is.
fn unreachable(agent: &Path, error: &ask::Error) -> Vec<Finding> {
    let command = format!("vsocket agent --socket {}", agent.display());
    let stop = |mend| Finding::Stop(chain(error), mend);
    match guest::find(None, None) {
        Ok(Neighbour::Host(_) | Neighbour::Keeper(_)) => {
            let mend = format!("start it: {command} as root, or in a container with --vport SOCKET");
            let mut findings = vec![stop(mend)];
            findings.extend(machine::missing());
            findings
        }
        Ok(Neighbour::Vport(_)) => vec![stop(format!("start it: {command}"))],
        Err(nowhere) => {
            vec![stop(format!("start it: {command}, once there is something to reach: {nowhere}"))]
        }
    }
}

fn backend(stat: &Stat) -> Finding {
    if stat.backend.connected {
        return Finding::Fine(format!("backend, VNI {}", stat.backend.vni));
    }
    let mend = match &stat.keeper {
        None => "start vsocketd on the host, and check that the agent's --vport names this guest's vport",
        Some(_) => "start vsocketd on the host, with this machine's vport",
    };
    Finding::Stop("the agent has no backend".into(), mend.into())
}

fn library() -> Vec<Finding> {
    let library = match run::library() {
        Ok(library) => library,
        Err(places) => {
            let places: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
            let what = format!("no library at {}", places.join(" or "));
            let mend = format!("install libvsocket.so there, or name it in {}", run::LIBRARY_VARIABLE);
            return vec![Finding::Stop(what, mend)];
        }
    };
    let shown = library.display();
    if !run::can_be_listed(&library) {
        let what = format!("{shown}: a path with a space or a colon cannot be preloaded");
        return vec![Finding::Stop(what, "move the library".into())];
    }
    // Into this very program, which does nothing else: the dynamic linker says on standard error what it thinks.
    let own = std::env::current_exe().map(|own| {
        Command::new(own)
            .arg("--version")
            .env("LD_PRELOAD", &library)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .output()
    });
    let loaded = match own {
        Ok(Ok(out)) if out.status.success() && out.stderr.is_empty() => {
            Finding::Fine(format!("library {shown}"))
        }
        Ok(Ok(out)) => {
            let said = String::from_utf8_lossy(&out.stderr).lines().next().unwrap_or_default().to_owned();
            let what = format!("{shown} cannot be preloaded: {said}");
            Finding::Stop(what, "build it anew for this machine (cargo build --release)".into())
        }
        Ok(Err(error)) | Err(error) => Finding::Notice(
            format!("cannot try to preload {shown}: {error}"),
            "run this program from a place where it may be executed".into(),
        ),
    };
    vec![loaded]
}

fn descriptors() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    match limit {
        Some(n) if n < DESCRIPTORS => Finding::Notice(
            format!("only {n} open files are allowed: connections beyond what fits stay on TCP"),
            format!("ulimit -n {DESCRIPTORS}, or more"),
        ),
        Some(n) => Finding::Fine(format!("{n} open files allowed")),
        None => Finding::Fine("any number of open files allowed".into()),
    }
}

fn program(name: &OsString) -> Finding {
    let shown = name.display();
    match elf::find(name) {
        Err(127) => Finding::Stop(format!("{shown}: no such command"), "check its name and PATH".into()),
        Err(_) => Finding::Stop(format!("{shown} is not executable"), "chmod +x, or check its path".into()),
        Ok(path) => match elf::obstacle(&path) {
            None => Finding::Fine(format!("{} can be accelerated", path.display())),
            Some(obstacle) => {
                let mend = match obstacle {
                    elf::Obstacle::Static(_) => "use a dynamically linked build of it",
                    elf::Obstacle::Privileged(_) => {
                        "run it as the user it would become, without those bits or capabilities"
                    }
                    elf::Obstacle::Foreign(_) => "use a build of it for this machine's own architecture",
                };
                Finding::Stop(format!("{obstacle}"), mend.into())
            }
        },
    }
}
