//! Forks, executed programs, and descriptors that travel to other processes.

use super::Group;
use crate::far::FROM_NEAR;
use crate::pair::Pair;
use crate::sys::{self, Ret, ret};
use libc::c_int;

/// Runs in a child, which ends with what it returns; its exit status.
pub(super) fn forked(f: impl FnOnce() -> c_int) -> c_int {
    // SAFETY: the child makes calls and ends; this program has one thread.
    unsafe {
        match libc::fork() {
            0 => {
                let code = f();
                libc::_exit(code)
            }
            child => ended(child),
        }
    }
}

/// The exit status of a child, which is killed if it does not come to its end.
pub(super) fn ended(child: c_int) -> c_int {
    let mut status = 0;
    let done = sys::soon(|| {
        // SAFETY: a child of ours, or one that was waited for already.
        unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) != 0 }
    });
    if !done {
        // SAFETY: a child of ours.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, &raw mut status, 0);
        }
        return -2;
    }
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -libc::WTERMSIG(status) }
}

/// What `posix child` does with a connection: `send N` bytes, or `recv N`, or `echo 0`, which returns what comes until the end. It
/// is descriptor 0, or comes over descriptor 0 if there is a third word `passed`, or that is its number.
pub fn child(words: &[String]) {
    let n: usize = words[1].parse().expect("a number");
    let fd = match words.get(2).map(String::as_str) {
        None => 0,
        Some("passed") => taken(0),
        Some(number) => number.parse().expect("a number"),
    };
    if words[0] == "echo" {
        std::process::exit(echo(fd));
    }
    let got = if words[0] == "send" {
        sys::send(fd, &sys::pattern(FROM_NEAR, 0, n), 0)
    } else {
        sys::recv(fd, &mut vec![0; n], libc::MSG_WAITALL)
    };
    std::process::exit(if got.0 == n as isize { 0 } else { 1 + got.1 });
}

/// Returns what comes, until the end.
fn echo(fd: c_int) -> c_int {
    let mut room = vec![0; 1 << 16];
    loop {
        match sys::recv(fd, &mut room, 0) {
            Ret(0, _) => return 0,
            Ret(n, _) if n > 0 && sys::send(fd, &room[..n as usize], libc::MSG_NOSIGNAL).0 == n => {}
            other => return 1 + other.1,
        }
    }
}

/// A process that has the connection as a descriptor which is no standard stream's, or as several, and returns what comes.
fn echoing(p: &Pair, numbers: usize) -> std::process::Child {
    let more: Vec<Ret> = (1..numbers).map(|_| sys::fcntl(p.near, libc::F_DUPFD, 100)).collect();
    let twin = sys::fcntl(p.near, libc::F_DUPFD, 100).0 as c_int;
    let exe = std::env::current_exe().expect("a program knows where it is");
    let child = std::process::Command::new(exe).args(["child", "echo", "0", &twin.to_string()]).spawn();
    sys::close(twin);
    more.iter().for_each(|fd| {
        sys::close(fd.0 as c_int);
    });
    child.expect("this program runs")
}

/// Another process has the connection now, and returns what the far end sends; whether it comes to a lane with that, for as
/// long as it may. Nothing of that is written down where there are no lanes.
fn goes_on_there(p: &mut Pair, child: std::process::Child, to_lane: bool) {
    p.far("option", &[libc::IPPROTO_TCP.into(), libc::TCP_NODELAY.into(), 1]);
    let (mut rounds, mut last) = (0, String::new());
    let came = sys::soon(|| {
        p.far("send", &[1, 0]);
        p.far("take", &[1]);
        rounds += 1;
        last = p.far("lanes", &[]);
        let fast = last.starts_with("direct direct") || last.starts_with("fabric fabric");
        fast || rounds > 200 && (last.is_empty() || !to_lane)
    });
    if !came || !last.is_empty() && to_lane == last.starts_with("tcp") {
        p.note(format_args!("lanes after {rounds} rounds: {last}"));
    }
    p.far("again", &[]);
    for n in [9, 3000, 100_000] {
        p.far_says("send", &[n, 0]);
        p.far_says("take", &[n]);
    }
    p.far_says("shutdown", &[libc::SHUT_WR.into()]);
    p.note(ended(child.id() as c_int));
}

/// This process had it all the while.
fn goes_on_here(p: &mut Pair) {
    p.send(10, 0);
    p.far_says("take", &[10]);
    p.take(1);
}

/// Executes this program as a child with the connection as its descriptor 0, by `posix_spawn`.
fn spawned(p: &Pair, what: &str, n: usize) -> c_int {
    let twin = sys::fcntl(p.near, libc::F_DUPFD_CLOEXEC, 500).0 as c_int;
    // SAFETY: the descriptor is this function's.
    let stdin = unsafe { <std::process::Stdio as std::os::fd::FromRawFd>::from_raw_fd(twin) };
    let exe = std::env::current_exe().expect("a program knows where it is");
    let spawned = std::process::Command::new(exe).args(["child", what, &n.to_string()]).stdin(stdin).spawn();
    match spawned {
        Ok(child) => ended(child.id() as c_int),
        Err(error) => -error.raw_os_error().unwrap_or(1),
    }
}

type Executes = unsafe extern "C" fn(*const libc::c_char, *const *const libc::c_char) -> c_int;

/// Executes this program in this process; returns only if that fails.
fn executes(call: Executes, what: &str, n: usize) -> c_int {
    let text = |s: &str| std::ffi::CString::new(s).expect("no zero in it");
    let exe = text(&std::env::current_exe().expect("a program knows where it is").display().to_string());
    let words = [text("posix"), text("child"), text(what), text(&n.to_string())];
    let list: Vec<_> = words.iter().map(|w| w.as_ptr()).chain([std::ptr::null()]).collect();
    // SAFETY: strings and a list that outlive the call.
    unsafe { call(exe.as_ptr(), list.as_ptr()) }
}

fn forked_executes(p: &Pair, call: Executes, what: &str, n: usize) -> c_int {
    let fd = p.near;
    forked(|| {
        // SAFETY: numbers.
        unsafe { libc::dup2(fd, 0) };
        executes(call, what, n)
    })
}

fn by_execv(p: &Pair, what: &str, n: usize) -> c_int {
    forked_executes(p, libc::execv, what, n)
}

fn by_execl(p: &Pair, what: &str, n: usize) -> c_int {
    unsafe extern "C" fn call(path: *const libc::c_char, list: *const *const libc::c_char) -> c_int {
        // SAFETY: the list has four strings, and what follows the first is passed one by one.
        unsafe {
            let word = |n| *list.add(n);
            libc::execl(path, word(0), word(1), word(2), word(3), std::ptr::null::<libc::c_char>())
        }
    }
    forked_executes(p, call, what, n)
}

fn by_vfork(p: &Pair, what: &str, n: usize) -> c_int {
    let text = |s: &str| std::ffi::CString::new(s).expect("no zero in it");
    let exe = text(&std::env::current_exe().expect("a program knows where it is").display().to_string());
    let words = [text("posix"), text("child"), text(what), text(&n.to_string())];
    let list: Vec<_> = words.iter().map(|w| w.as_ptr()).chain([std::ptr::null()]).collect();
    // SAFETY: the child makes two calls on what was made before, and this function does not return in it.
    #[allow(deprecated)]
    let child = unsafe {
        match libc::vfork() {
            0 => {
                libc::dup2(p.near, 0);
                libc::execv(exe.as_ptr(), list.as_ptr());
                libc::_exit(99)
            }
            child => child,
        }
    };
    ended(child)
}

/// The ways to execute a program.
const HOW: [(&str, fn(&Pair, &str, usize) -> c_int); 4] = [
    ("posix_spawn", spawned),
    ("fork and execv", by_execv),
    ("fork and execl", by_execl),
    ("vfork", by_vfork),
];

/// The descriptor stays open in an executed program.
fn keep(fd: c_int) {
    sys::fcntl(fd, libc::F_SETFD, 0);
}

/// The case's connection goes back to TCP.
fn inherits(case: &mut super::Case) {
    case.carried = super::Carried::Tcp("inherited");
}

/// Messages of a byte, and room for a descriptor beside it.
struct Passing {
    byte: [u8; 1],
    control: [u64; 8],
}

impl Passing {
    /// Makes a call on a message.
    fn with<T>(&mut self, fd: Option<c_int>, call: impl FnOnce(*mut libc::msghdr) -> T) -> T {
        let mut list = [libc::iovec { iov_base: self.byte.as_mut_ptr().cast(), iov_len: 1 }];
        let mut message = super::transfer::message(&mut list);
        (message.msg_control, message.msg_controllen) =
            (self.control.as_mut_ptr().cast(), size_of_val(&self.control));
        if let Some(fd) = fd {
            // SAFETY: the control buffer is large and aligned enough for a header and a descriptor.
            unsafe {
                message.msg_controllen = libc::CMSG_SPACE(4) as usize;
                let head = libc::CMSG_FIRSTHDR(&raw const message);
                (*head).cmsg_level = libc::SOL_SOCKET;
                (*head).cmsg_type = libc::SCM_RIGHTS;
                (*head).cmsg_len = libc::CMSG_LEN(4) as usize;
                libc::CMSG_DATA(head).cast::<c_int>().write_unaligned(fd);
            }
        }
        call(&raw mut message)
    }

    fn new() -> Self {
        Self { byte: [b'x'], control: [0; 8] }
    }
}

/// Passes a descriptor over a UNIX socket.
fn pass(socket: c_int, fd: c_int) -> Ret {
    // SAFETY: a message that outlives the call.
    Passing::new().with(Some(fd), |message| ret(unsafe { libc::sendmsg(socket, message, 0) } as c_int))
}

/// The same, by `sendmmsg`.
fn pass_many(socket: c_int, fd: c_int) -> Ret {
    Passing::new().with(Some(fd), |message| {
        // SAFETY: a message that outlives the call.
        let mut list = unsafe { [libc::mmsghdr { msg_hdr: *message, msg_len: 0 }] };
        // SAFETY: the same.
        ret(unsafe { libc::sendmmsg(socket, list.as_mut_ptr(), 1, 0) })
    })
}

/// Receives a descriptor.
fn taken(socket: c_int) -> c_int {
    // SAFETY: a message that outlives the calls.
    Passing::new().with(None, |message| unsafe {
        libc::recvmsg(socket, message, 0);
        let head = libc::CMSG_FIRSTHDR(message);
        if head.is_null() { -1 } else { libc::CMSG_DATA(head).cast::<c_int>().read_unaligned() }
    })
}

fn unix_pair() -> [c_int; 2] {
    let mut ends = [0; 2];
    // SAFETY: room for two numbers.
    unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) };
    ends
}

/// Sends a descriptor over a UNIX socket and receives it again, in this process.
fn travelled(fd: c_int) -> c_int {
    let ends = unix_pair();
    pass(ends[0], fd);
    let got = taken(ends[1]);
    ends.iter().for_each(|fd| {
        sys::close(*fd);
    });
    got
}

/// The same, over a UNIX connection that was accepted.
fn travelled_over_accepted(fd: c_int) -> c_int {
    let path = std::env::temp_dir().join(format!("posix-passing-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a UNIX socket");
    let near = std::os::unix::net::UnixStream::connect(&path).expect("somebody listens");
    let far = listener.accept().expect("somebody connects").0;
    let _ = std::fs::remove_file(&path);
    // As often as it takes for it to be worth a lane, were it TCP.
    for _ in 0..40 {
        let one = sys::pipe();
        pass(raw(&near), one[0]);
        let got = taken(raw(&far));
        pass(raw(&far), got);
        let back = taken(raw(&near));
        [one[0], one[1], got, back].into_iter().for_each(|fd| {
            sys::close(fd);
        });
        if got < 0 || back < 0 {
            return -1;
        }
    }
    pass(raw(&near), fd);
    taken(raw(&far))
}

fn raw(stream: &impl std::os::fd::AsRawFd) -> c_int {
    stream.as_raw_fd()
}

/// A process that a connection is passed to; it has the library, or not.
struct Receiver {
    child: std::process::Child,
    socket: c_int,
}

impl Receiver {
    fn begin(library: bool, what: &str, n: usize) -> Self {
        let [socket, other] = unix_pair();
        // SAFETY: the descriptor is this function's.
        let stdin = unsafe { <std::process::Stdio as std::os::fd::FromRawFd>::from_raw_fd(other) };
        let exe = std::env::current_exe().expect("a program knows where it is");
        let mut command = std::process::Command::new(exe);
        command.args(["child", what, &n.to_string(), "passed"]).stdin(stdin);
        if !library {
            command.env_remove("LD_PRELOAD");
        }
        Self { child: command.spawn().expect("this program runs"), socket }
    }

    fn take(self, p: &mut Pair, call: fn(c_int, c_int) -> Ret) {
        p.call("pass", call(self.socket, p.near));
        let code = ended(self.child.id() as c_int);
        p.note(format_args!("it ends with {code}"));
        sys::close(self.socket);
    }
}

/// Cases of connections that go to another process.
fn passes(group: &mut Group) {
    let mut case = |name: &str, run: Box<dyn Fn(&mut Pair)>| {
        group.case("7.19", &format!("SCM_RIGHTS/{name}"), run).carried = super::Carried::Tcp("passed");
    };
    for (library, to) in [(true, "with the library"), (false, "without the library")] {
        let sends = move |p: &mut Pair| {
            p.receives(15);
            p.send(12, 0);
            Receiver::begin(library, "send", 20).take(p, pass);
            p.taken(Ret(20, 0));
            p.far_says("take", &[12]);
            p.recv(20, 0);
            p.far("take", &[20]);
            exchange(p);
        };
        case(&format!("to a process {to}, which sends"), Box::new(sends));
        let receives = move |p: &mut Pair| {
            p.send(2000, 0);
            p.receives(3000);
            p.recv(700, 0);
            Receiver::begin(library, "recv", 1200).take(p, pass);
            p.take(1100);
            p.far_says("take", &[2000]);
            exchange(p);
        };
        case(&format!("to a process {to}, which receives"), Box::new(receives));
        let much = move |p: &mut Pair| {
            p.receives(20_000);
            p.recv(1000, 0);
            Receiver::begin(library, "recv", 15_000).take(p, pass_many);
            p.take(4000);
            p.far_says("shutdown", &[1]);
            p.take(1);
            p.send(9, 0);
            p.far_says("take", &[9]);
        };
        case(&format!("by sendmmsg to a process {to}, much is unread"), Box::new(much));
        let last = move |p: &mut Pair| {
            p.receives(10);
            let receiver = Receiver::begin(library, "recv", 30);
            p.call("pass", pass(receiver.socket, p.near));
            p.call("close", sys::close(p.near));
            p.near = -1;
            p.far_says("send", &[20, 0]);
            let code = ended(receiver.child.id() as c_int);
            p.note(format_args!("it ends with {code}"));
            sys::close(receiver.socket);
            p.far_says("take", &[1]);
        };
        case(&format!("to a process {to}, which has the last descriptor"), Box::new(last));
    }
    case(
        "to a process with the library, and this one goes on as well",
        Box::new(|p: &mut Pair| {
            let receiver = Receiver::begin(true, "echo", 0);
            p.call("pass", pass(receiver.socket, p.near));
            sys::close(receiver.socket);
            goes_on_there(p, receiver.child, false);
            goes_on_here(p);
        }),
    );
    for (name, travel) in [
        ("within the process", travelled as fn(c_int) -> c_int),
        ("over an accepted socket", travelled_over_accepted),
    ] {
        let run = move |p: &mut Pair| {
            p.receives(11);
            let got = travel(p.near);
            sys::close(p.near);
            p.near = got;
            p.recv(20, 0);
            exchange(p);
            p.far_says("shutdown", &[1]);
            p.take(1);
        };
        case(name, Box::new(run));
    }
}

pub(super) fn exchange(p: &mut Pair) {
    p.send(10, 0);
    p.far_says("take", &[10]);
    p.receives(10);
    p.recv(20, 0);
}

pub fn group() -> Group {
    let mut group = Group::new("processes");
    group.case("7.13", "fork/the child sends, the parent goes on", |p| {
        let data = p.next(20);
        let fd = p.near;
        let code = forked(|| (sys::send(fd, &data, 0).0 != 20).into());
        p.taken(Ret(20, 0));
        p.note(code);
        p.far_says("take", &[20]);
        exchange(p);
    });
    group.case("7.13", "fork/the child receives, the parent goes on", |p| {
        p.receives(20);
        let fd = p.near;
        p.note(forked(|| sys::recv(fd, &mut [0; 12], 0).0 as c_int));
        p.recv(20, 0);
        exchange(p);
    });
    group.case("7.13", "fork/the child waits for what comes later", |p| {
        let fd = p.near;
        p.far("later send", &[9, 0]);
        p.note(forked(|| sys::recv(fd, &mut [0; 12], 0).0 as c_int));
        exchange(p);
    });
    group.case("7.13", "fork/the child closes, the parent goes on", |p| {
        let fd = p.near;
        p.note(forked(|| sys::close(fd).0 as c_int));
        exchange(p);
        p.far_says("shutdown", &[1]);
        p.take(1);
    });
    group.case("7.13", "fork/the parent closes, the child goes on", |p| {
        let fd = p.near;
        let go = sys::pipe();
        let data = p.next(15);
        // SAFETY: the child makes calls and ends; this program has one thread.
        let child = unsafe { libc::fork() };
        if child == 0 {
            sys::close(go[1]);
            // SAFETY: a byte of our own.
            unsafe { libc::read(go[0], [0u8].as_mut_ptr().cast(), 1) };
            let sent = sys::send(fd, &data, 0);
            // SAFETY: ends the child.
            unsafe { libc::_exit((sent.0 != 15).into()) };
        }
        p.call("close", sys::close(fd));
        p.near = -1;
        go.iter().for_each(|fd| {
            sys::close(*fd);
        });
        p.note(ended(child));
        p.far_says("take", &[16]);
    });
    group.case("7.13", "fork/the child shuts, both hear", |p| {
        let fd = p.near;
        p.note(forked(|| sys::shutdown(fd, libc::SHUT_WR).0 as c_int));
        p.far_says("take", &[1]);
        p.send(5, libc::MSG_NOSIGNAL);
        p.receives(5);
        p.recv(9, 0);
    });
    group.case("7.13", "fork/the child polls and waits in a set", |p| {
        let fd = p.near;
        let set = super::epoll::Set::of(fd, libc::EPOLLIN as u32);
        let number = set.0;
        p.far("later send", &[5, 0]);
        let code = forked(|| {
            let polled = sys::poll(fd, libc::POLLIN, 4000).1;
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: an event of our own.
            let got = unsafe { libc::epoll_wait(number, &raw mut event, 1, 4000) };
            c_int::from(polled) * 10 + got
        });
        p.note(code);
        p.note(set.wait(4, 0));
        p.recv(9, 0);
    });
    group.case("7.49", "kill -9/the child has the last descriptor", |p| {
        let fd = p.near;
        let data = p.next(15);
        p.note(forked(|| {
            sys::send(fd, &data, 0);
            // SAFETY: itself.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) }
        }));
        p.far_says("take", &[15]);
        sys::close(p.near);
        p.near = -1;
        p.far_says("take", &[1]);
    });
    group.case("7.14", "vfork/the child closes its copies and executes", |p| {
        let status = std::process::Command::new("/bin/true").status();
        p.note(format_args!("{:?}", status.map(|s| s.code())));
        exchange(p);
    });
    group.case("7.14", "system/beside the connection", |p| {
        // SAFETY: a command in a C string.
        p.note(unsafe { libc::system(c"exit 3".as_ptr()) });
        exchange(p);
    });
    for (name, how) in HOW {
        inherits(group.case("7.16", &format!("exec/{name}, the new program sends"), move |p| {
            p.note(how(p, "send", 20));
            p.taken(Ret(20, 0));
            p.far_says("take", &[20]);
            exchange(p);
        }));
        inherits(group.case("7.16", &format!("exec/{name}, the new program receives"), move |p| {
            p.receives(30);
            p.note(how(p, "recv", 12));
            p.recv(40, 0);
            exchange(p);
        }));
    }
    inherits(group.case("7.16", "exec/much is unread", |p| {
        p.receives(20_000);
        p.recv(700, 0);
        p.note(spawned(p, "recv", 10_000));
        p.receives(500);
        p.take(9800);
        exchange(p);
    }));
    inherits(group.case("7.16", "exec/what comes later", |p| {
        p.far("later send", &[9, 0]);
        p.note(spawned(p, "recv", 9));
        exchange(p);
        p.far_says("shutdown", &[1]);
        p.take(1);
    }));
    inherits(group.case("7.16", "exec/the new program has the last descriptor", |p| {
        let go = sys::pipe();
        let fd = p.near;
        // SAFETY: the child makes calls and ends; this program has one thread.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: a byte of our own, and numbers.
            unsafe {
                libc::close(go[1]);
                libc::read(go[0], [0u8].as_mut_ptr().cast(), 1);
                libc::dup2(fd, 0);
            }
            executes(libc::execv, "send", 20);
        }
        p.call("close", sys::close(fd));
        p.near = -1;
        go.iter().for_each(|fd| {
            sys::close(*fd);
        });
        p.note(ended(child));
        p.far_says("take", &[21]);
    }));
    inherits(group.case("7.16", "exec/there is no such program", |p| {
        let fd = p.near;
        let data = p.next(10);
        p.note(forked(|| {
            keep(fd);
            let none = [std::ptr::null()];
            // SAFETY: strings and a list that outlive the call.
            let got = ret(unsafe { libc::execv(c"/no/such/program".as_ptr(), none.as_ptr()) });
            c_int::from(sys::send(fd, &data, 0).0 != 10) * 100 + got.1
        }));
        p.taken(Ret(10, 0));
        p.far_says("take", &[10]);
        exchange(p);
    }));
    inherits(group.case("7.16", "system/the command inherits the connection", |p| {
        keep(p.near);
        p.receives(7);
        // SAFETY: a command in a C string.
        p.note(unsafe { libc::system(c"exit 3".as_ptr()) });
        p.recv(20, 0);
        exchange(p);
    }));
    group.case("7.14", "exec/the child has closed its descriptor before", |p| {
        keep(p.near);
        let fd = p.near;
        p.note(forked(|| {
            sys::close(fd);
            let none = [c"true".as_ptr(), std::ptr::null()];
            // SAFETY: strings and a list that outlive the call.
            unsafe { libc::execv(c"/bin/true".as_ptr(), none.as_ptr()) }
        }));
        exchange(p);
    });
    group.case("7.16", "exec/the new program alone comes to a lane", |p| {
        let child = echoing(p, 1);
        p.call("close", sys::close(p.near));
        p.near = -1;
        goes_on_there(p, child, true);
    });
    inherits(group.case("7.16", "exec/the new program has it under two numbers", |p| {
        let child = echoing(p, 2);
        p.call("close", sys::close(p.near));
        p.near = -1;
        goes_on_there(p, child, false);
    }));
    inherits(group.case("7.16", "exec/the new program and this one go on", |p| {
        let child = echoing(p, 1);
        goes_on_there(p, child, false);
        goes_on_here(p);
    }));
    group.case("7.19", "SCM_RIGHTS/the process that has it alone comes to a lane", |p| {
        let receiver = Receiver::begin(true, "echo", 0);
        p.call("pass", pass(receiver.socket, p.near));
        p.call("close", sys::close(p.near));
        p.near = -1;
        sys::close(receiver.socket);
        goes_on_there(p, receiver.child, true);
    });
    passes(&mut group);
    group.case("7.14", "daemon/the child goes on", |p| {
        let fd = p.near;
        let data = p.next(10);
        p.note(forked(|| {
            // SAFETY: in a child of our own.
            let got = ret(unsafe { libc::daemon(1, 1) });
            if got.0 != 0 {
                return 9;
            }
            sys::send(fd, &data, 0);
            0
        }));
        p.taken(Ret(10, 0));
        p.far_says("take", &[10]);
        exchange(p);
    });
    group.case("7.46", "setuid/in a child", |p| {
        let fd = p.near;
        let data = p.next(10);
        p.note(forked(|| {
            // SAFETY: in a child of our own.
            let got = ret(unsafe { libc::setuid(65534) });
            (got.0 != 0 || sys::send(fd, &data, 0).0 != 10).into()
        }));
        p.far_says("take", &[10]);
    });
    group
}
