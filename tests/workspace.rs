//! The unsafe code of the workspace stands only where the design allows it, and the preloaded library overrides exactly
//! the functions it is meant to.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where unsafe code may stand, and why it must.
const UNSAFE: &[(&str, &str)] = &[
    (
        "backend/src/fabric/memory.rs",
        "registered memory: a NIC, or the kernel, reads and writes it by address",
    ),
    ("backend/src/fabric/verbs/completion.rs", "libibverbs: completion queues"),
    ("backend/src/fabric/verbs/device.rs", "libibverbs: devices, ports, reports"),
    ("backend/src/fabric/verbs/memory.rs", "libibverbs: memory that a device reads and writes by address"),
    ("backend/src/fabric/verbs/queue_pair.rs", "libibverbs: queue pairs"),
    ("backend/src/fabric/verbs/receive.rs", "reads what a device has written"),
    ("backend/src/slab/memory.rs", "maps slabs, and lays the contract's structures over the mapping"),
    ("backend/src/slice.rs", "sched_setattr, which no safe crate has"),
    ("channel/src/bell.rs", "a full barrier that is cheaper than the fence"),
    ("channel/src/layout.rs", "promises that the shared structures hold for any bit pattern"),
    ("channel/src/ring.rs", "copies to and from memory that the other side may write"),
    ("frontend/src/agent/slice.rs", "sched_setattr, for the agent"),
    ("frontend/src/keeper/memory.rs", "memory that the host writes: mapped, pinned, registered"),
    ("frontend/src/kernel.rs", "TCP_INFO and TIOCOUTQ, which no safe crate has"),
    ("frontend/src/memory.rs", "maps what agent and backend hand out"),
    ("frontend/src/record.rs", "robust locks and records in memory shared by program and agent"),
    ("frontend/src/program/cancel.rs", "pthread_setcancelstate, which no safe crate has"),
    ("frontend/src/program/client.rs", "descriptors that the application must not see and may close"),
    ("frontend/src/program/client/tracking.rs", "descriptors that belong to the application"),
    ("frontend/src/program/conn.rs", "a connection's objects outlive the descriptors that name them"),
    ("frontend/src/program/epoll.rs", "C structures of epoll, and descriptors of the application"),
    ("frontend/src/program/epoll/nested.rs", "sets in sets, by the application's descriptors"),
    ("frontend/src/program/epoll/tests.rs", "real sets for the same calls"),
    ("frontend/src/program/exec.rs", "descriptors that a new program inherits"),
    ("frontend/src/program/fork.rs", "pthread_atfork"),
    ("frontend/src/program/found.rs", "descriptors that belong to the application"),
    ("frontend/src/program/kin.rs", "memory that a process shares with its children"),
    ("frontend/src/program/pipes.rs", "descriptors that belong to the application"),
    ("frontend/src/program/poll.rs", "C structures of poll and select"),
    ("frontend/src/program/socket.rs", "descriptors that belong to the application"),
    ("frontend/src/program/table.rs", "a table that is read without a lock"),
    ("frontend/src/program/unseen.rs", "a ring for its test"),
    ("frontend/src/signal.rs", "signalfd and the signal mask, which no safe crate has"),
    ("frontend/tests/machine/host.rs", "maps what a keeper has made, as the host does"),
    ("preload/src/args.rs", "raw C arguments become checked Rust values here"),
    ("preload/src/exports/control.rs", "C entry points of variadic functions"),
    ("preload/src/exports/exec.rs", "C entry points, some of them variadic"),
    ("preload/src/exports/lifetime.rs", "C entry points"),
    ("preload/src/exports/number.rs", "C entry points, by number"),
    ("preload/src/exports/print.rs", "C entry points, variadic ones and their argument lists"),
    ("preload/src/exports/readiness.rs", "C entry points"),
    ("preload/src/exports/stdio.rs", "C entry points, and glibc's streams"),
    ("preload/src/exports/thread.rs", "C entry points"),
    ("preload/src/exports/transfer.rs", "C entry points"),
    ("preload/src/exports/unseen.rs", "C entry points, and control blocks of asynchronous I/O"),
    ("preload/src/hook.rs", "C entry points, and the functions that they stand before"),
];

/// Crate roots whose whole crate is free of it, so that the compiler sees to it.
const FORBIDDING: &[&str] = &["vxlan/src/lib.rs", "frontend/src/main.rs", "backend/src/main.rs"];

/// What `libvsocket.so` overrides, and what for.
const HOOKS: &[(&str, &str)] = &[
    // Where descriptors come from and go to.
    ("accept", "a connection appears"),
    ("accept4", "a connection appears"),
    ("close", "what is still under way must arrive"),
    ("close_range", "close, of many"),
    ("closefrom", "close, of many; from glibc 2.34 on"),
    ("connect", "a connection appears"),
    ("dup", "another number for the same connection"),
    ("dup2", "the same, and an implied close"),
    ("dup3", "the same, and an implied close"),
    ("epoll_create", "a set that may hold connections"),
    ("epoll_create1", "a set that may hold connections"),
    ("fcntl", "O_NONBLOCK, F_DUPFD"),
    ("fcntl64", "the name of fcntl in programs with large files"),
    ("fdopen", "stdio reads and writes by symbols that nobody can hook"),
    ("getsockopt", "SO_ERROR after a reset on the lane"),
    ("ioctl", "FIONREAD, FIONBIO"),
    ("prctl", "a sandbox, from which no agent can be asked"),
    ("setsockopt", "SO_RCVLOWAT"),
    ("shutdown", "the end of one direction, behind its last byte"),
    // Programs that inherit connections.
    ("execl", "an executed program knows of no lane"),
    ("execle", "an executed program knows of no lane"),
    ("execlp", "an executed program knows of no lane"),
    ("execv", "an executed program knows of no lane"),
    ("execve", "an executed program knows of no lane"),
    ("execveat", "an executed program knows of no lane; from glibc 2.34 on"),
    ("execvp", "an executed program knows of no lane"),
    ("execvpe", "an executed program knows of no lane"),
    ("fexecve", "an executed program knows of no lane"),
    ("popen", "executes a shell"),
    ("posix_spawn", "executes, after its file actions"),
    ("posix_spawn_file_actions_addclose", "a number that is not inherited"),
    ("posix_spawn_file_actions_addclosefrom_np", "numbers that are not inherited; from glibc 2.34 on"),
    ("posix_spawn_file_actions_adddup2", "a number that is inherited"),
    ("posix_spawn_file_actions_destroy", "a list of these is no more"),
    ("posix_spawn_file_actions_init", "a list of these begins"),
    ("posix_spawnp", "executes, after its file actions"),
    ("system", "executes a shell"),
    // Receiving.
    ("__read_chk", "read, from programs built with _FORTIFY_SOURCE"),
    ("__recv_chk", "recv, likewise"),
    ("__recvfrom_chk", "recvfrom, likewise"),
    ("preadv2", "receives, where it has no offset"),
    ("preadv64v2", "the name of preadv2 in programs with large files"),
    ("read", "receives"),
    ("readv", "receives"),
    ("recv", "receives"),
    ("recvfrom", "receives"),
    ("recvmmsg", "receives"),
    ("recvmsg", "receives"),
    // Sending.
    ("__dprintf_chk", "dprintf, from programs built with _FORTIFY_SOURCE"),
    ("__vdprintf_chk", "vdprintf, likewise"),
    ("dprintf", "sends, by a symbol of libc's own"),
    ("pwritev2", "sends, where it has no offset"),
    ("pwritev64v2", "the name of pwritev2 in programs with large files"),
    ("send", "sends"),
    ("sendfile", "sends from a file"),
    ("sendfile64", "the name of sendfile in programs with large files"),
    ("sendmmsg", "sends"),
    ("sendmsg", "sends"),
    ("sendto", "sends"),
    ("splice", "receives into a pipe, sends from one"),
    ("vdprintf", "sends, by a symbol of libc's own"),
    ("write", "sends"),
    ("writev", "sends"),
    // Threads.
    ("pthread_cancel", "who waits in a served call is to end"),
    ("pthread_setcanceltype", "a thread may be to end in the middle of anything"),
    // What no hook sees.
    ("aio_read", "glibc reads by a symbol of its own, in another thread"),
    ("aio_read64", "the name of aio_read in programs with large files"),
    ("aio_write", "glibc writes by a symbol of its own, in another thread"),
    ("aio_write64", "the name of aio_write in programs with large files"),
    ("io_submit", "the kernel reads and writes; of libaio, not of glibc"),
    ("lio_listio", "several of aio_read and aio_write"),
    ("lio_listio64", "the name of lio_listio in programs with large files"),
    // All of these by number.
    ("syscall", "libuv and others make calls by number"),
    // Waiting.
    ("__poll_chk", "poll, from programs built with _FORTIFY_SOURCE"),
    ("__ppoll_chk", "ppoll, likewise"),
    ("epoll_ctl", "who waits for what"),
    ("epoll_pwait", "waits"),
    ("epoll_pwait2", "waits"),
    ("epoll_wait", "waits"),
    ("poll", "waits"),
    ("ppoll", "waits"),
    ("pselect", "waits"),
    ("select", "waits"),
];

/// Data that the linker or the runtime exports and nobody calls.
const NO_HOOKS: &[&str] = &[];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories: Vec<_> =
        ["channel", "vxlan", "frontend", "preload", "backend"].map(|c| root().join(c)).into();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                directories.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found
}

/// The keyword, outside comments and not as part of a lint's name.
fn uses_unsafe(text: &str) -> bool {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let word = |c: char| !c.is_alphanumeric() && c != '_';
    code.flat_map(|line| line.split(word)).any(|word| word == "unsafe")
}

fn named(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned()
}

#[test]
fn unsafe_code_stands_only_in_the_listed_files() {
    let sources = sources();
    assert!(sources.len() > UNSAFE.len(), "{sources:?}");
    let found: BTreeSet<_> = sources
        .iter()
        .filter(|path| uses_unsafe(&fs::read_to_string(path).unwrap()))
        .map(|p| named(p))
        .collect();
    let listed: BTreeSet<_> = UNSAFE.iter().map(|(file, _)| (*file).to_owned()).collect();
    let unlisted: Vec<_> = found.difference(&listed).collect();
    assert!(unlisted.is_empty(), "unsafe code where none is allowed: {unlisted:?}");
    let needless: Vec<_> = listed.difference(&found).collect();
    assert!(needless.is_empty(), "listed, and without unsafe code: {needless:?}");
}

#[test]
fn crates_without_unsafe_code_forbid_it() {
    for file in FORBIDDING {
        let text = fs::read_to_string(root().join(file)).unwrap();
        assert!(text.lines().any(|line| line == "#![forbid(unsafe_code)]"), "{file}");
    }
    // And each list is whole: a crate's root is either there, or its crate has a listed file.
    let roots = ["lib.rs", "main.rs"].map(|root| format!("/src/{root}"));
    for file in sources().iter().map(|path| named(path)) {
        let Some(root) = roots.iter().find(|root| file.ends_with(*root)) else { continue };
        let source = format!("{}/src/", file.trim_end_matches(root.as_str()));
        let library = root == "/src/lib.rs";
        let unsafe_inside = library && UNSAFE.iter().any(|(listed, _)| listed.starts_with(&source));
        assert!(unsafe_inside || FORBIDDING.contains(&file.as_str()), "{file} forbids no unsafe code");
    }
}

#[test]
fn the_preload_library_exports_exactly_its_hooks() {
    let exe = std::env::current_exe().unwrap();
    let profile = exe.ancestors().nth(2).unwrap();
    let bin = std::env::var_os("VSOCKET_BIN").map_or_else(|| profile.to_owned(), PathBuf::from);
    let library = bin.join("libvsocket.so");
    assert!(library.exists(), "{} is missing: cargo build --release --workspace", library.display());
    let output = Command::new("nm").args(["-D", "--defined-only", "--format=posix"]).arg(&library).output();
    let output = output.expect("nm of binutils");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let symbols = text.lines().filter_map(|line| line.split(' ').next());
    // Without a version: `name@@VERSION`.
    let symbols = symbols.map(|name| name.split('@').next().unwrap_or(name));
    let exported: BTreeSet<_> = symbols.filter(|name| !NO_HOOKS.contains(name)).collect();
    let hooks: BTreeSet<_> = HOOKS.iter().map(|(name, _)| *name).collect();
    assert_eq!(hooks.len(), HOOKS.len(), "a hook is listed twice");
    let surprising: Vec<_> = exported.difference(&hooks).collect();
    assert!(surprising.is_empty(), "exported and not listed: {surprising:?}");
    let missing: Vec<_> = hooks.difference(&exported).collect();
    assert!(missing.is_empty(), "listed and not exported: {missing:?}");
}
