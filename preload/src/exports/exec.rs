//! Executing programs: those that inherit a connection find it on TCP.

use crate::args;
use crate::hook::ours;
use libc::{FILE, c_char, c_int, pid_t, posix_spawn_file_actions_t, posix_spawnattr_t};
use std::sync::Mutex;
use vsocket_frontend::program::exec::{self, Action};

// SAFETY, for every hook of this file: the arguments are the application's own and are only handed on.

type List = *const *const c_char;
type Actions = posix_spawn_file_actions_t;

/// Errno is the execution's, if that fails.
fn before(actions: &[Action]) {
    let errno = args::errno();
    ours(|| exec::before(actions));
    args::set_errno(errno);
}

hook! { unsafe fn execve(path: *const c_char, argv: List, envp: List) -> c_int => vs_execve {
    before(&[]);
    // SAFETY: see above.
    unsafe { real!(execve)(path, argv, envp) }
} }

hook! { unsafe fn execv(path: *const c_char, argv: List) -> c_int => vs_execv {
    before(&[]);
    // SAFETY: see above.
    unsafe { real!(execv)(path, argv) }
} }

hook! { unsafe fn execvp(file: *const c_char, argv: List) -> c_int => vs_execvp {
    before(&[]);
    // SAFETY: see above.
    unsafe { real!(execvp)(file, argv) }
} }

hook! { unsafe fn execvpe(file: *const c_char, argv: List, envp: List) -> c_int => vs_execvpe {
    before(&[]);
    // SAFETY: see above.
    unsafe { real!(execvpe)(file, argv, envp) }
} }

hook! { unsafe fn fexecve(fd: c_int, argv: List, envp: List) -> c_int => vs_fexecve {
    before(&[]);
    // SAFETY: see above.
    unsafe { real!(fexecve)(fd, argv, envp) }
} }

hook! { unsafe fn execveat(dir: c_int, path: *const c_char, argv: List, envp: List, flags: c_int) -> c_int => vs_execveat {
    before(&[]);
    // SAFETY: see above.
    unsafe { real!(execveat)(dir, path, argv, envp, flags) }
} }

hook! { unsafe fn system(command: *const c_char) -> c_int => vs_system {
    if !command.is_null() {
        before(&[]);
    }
    // SAFETY: see above.
    unsafe { real!(system)(command) }
} }

hook! { unsafe fn popen(command: *const c_char, mode: *const c_char) -> *mut FILE => vs_popen {
    before(&[]);
    // SAFETY: see above.
    unsafe { real!(popen)(command, mode) }
} }

// ---- the variadic ones: their arguments are whatever stands in registers and on the stack, so they are left there ---------

#[cfg(target_arch = "x86_64")]
mod variadics {
    use super::before;
    use crate::hook::Next;
    use libc::c_int;

    static EXECL: Next = Next::new(c"execl");
    static EXECLP: Next = Next::new(c"execlp");
    static EXECLE: Next = Next::new(c"execle");

    /// Which of them, in the order below; where the real one is.
    extern "C" fn before_variadic(which: c_int) -> *mut libc::c_void {
        before(&[]);
        [&EXECL, &EXECLP, &EXECLE][which as usize % 3].get()
    }

    /// Calls [`before_variadic`] with every argument register kept, and goes on in the real function as if it had been called.
    macro_rules! variadic {
        ($name:ident, $which:literal) => {
            #[doc = concat!("`", stringify!($name), "(3)`.")]
            #[unsafe(naked)]
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name() {
                core::arch::naked_asm!(
                    "push rbp",
                    "mov rbp, rsp",
                    "push rdi",
                    "push rsi",
                    "push rdx",
                    "push rcx",
                    "push r8",
                    "push r9",
                    "mov edi, {which}",
                    "call {before}",
                    "mov r11, rax",
                    "pop r9",
                    "pop r8",
                    "pop rcx",
                    "pop rdx",
                    "pop rsi",
                    "pop rdi",
                    "pop rbp",
                    "xor eax, eax",
                    "jmp r11",
                    which = const $which,
                    before = sym before_variadic,
                )
            }
        };
    }

    variadic!(execl, 0);
    variadic!(execlp, 1);
    variadic!(execle, 2);
}

// ---- posix_spawn: what its file actions do is noted when they are made ---------------------------------------------------

/// Most lists of actions that are remembered; more are not in use at a time.
const LISTS: usize = 256;
static MADE: Mutex<Vec<(usize, Vec<Action>)>> = Mutex::new(Vec::new());

fn of(list: *const Actions) -> Vec<Action> {
    let Ok(made) = MADE.lock() else { return Vec::new() };
    made.iter().find(|(of, _)| *of == list.addr()).map(|(_, actions)| actions.clone()).unwrap_or_default()
}

fn forget(list: *const Actions) {
    if let Ok(mut made) = MADE.lock() {
        made.retain(|(of, _)| *of != list.addr());
    }
}

fn note(list: *const Actions, action: Action) {
    let Ok(mut made) = MADE.lock() else { return };
    if let Some((_, actions)) = made.iter_mut().find(|(of, _)| *of == list.addr()) {
        return actions.push(action);
    }
    if made.len() >= LISTS {
        made.remove(0);
    }
    made.push((list.addr(), vec![action]));
}

hook! { unsafe fn posix_spawn_file_actions_init(list: *mut Actions) -> c_int => vs_actions_init {
    forget(list);
    // SAFETY: see above.
    unsafe { real!(posix_spawn_file_actions_init)(list) }
} }

hook! { unsafe fn posix_spawn_file_actions_destroy(list: *mut Actions) -> c_int => vs_actions_destroy {
    forget(list);
    // SAFETY: see above.
    unsafe { real!(posix_spawn_file_actions_destroy)(list) }
} }

hook! { unsafe fn posix_spawn_file_actions_adddup2(list: *mut Actions, from: c_int, to: c_int) -> c_int => vs_actions_dup {
    // SAFETY: see above.
    let got = unsafe { real!(posix_spawn_file_actions_adddup2)(list, from, to) };
    if got == 0 {
        note(list, Action::Dup(from, to));
    }
    got
} }

hook! { unsafe fn posix_spawn_file_actions_addclose(list: *mut Actions, fd: c_int) -> c_int => vs_actions_close {
    // SAFETY: see above.
    let got = unsafe { real!(posix_spawn_file_actions_addclose)(list, fd) };
    if got == 0 {
        note(list, Action::Close(fd));
    }
    got
} }

hook! { unsafe fn posix_spawn_file_actions_addclosefrom_np(list: *mut Actions, first: c_int) -> c_int => vs_actions_closefrom {
    // SAFETY: see above.
    let got = unsafe { real!(posix_spawn_file_actions_addclosefrom_np)(list, first) };
    if got == 0 {
        note(list, Action::CloseFrom(first));
    }
    got
} }

hook! { unsafe fn posix_spawn(pid: *mut pid_t, path: *const c_char, list: *const Actions, attr: *const posix_spawnattr_t, argv: List, envp: List) -> c_int => vs_posix_spawn {
    before(&of(list));
    // SAFETY: see above.
    unsafe { real!(posix_spawn)(pid, path, list, attr, argv, envp) }
} }

hook! { unsafe fn posix_spawnp(pid: *mut pid_t, file: *const c_char, list: *const Actions, attr: *const posix_spawnattr_t, argv: List, envp: List) -> c_int => vs_posix_spawnp {
    before(&of(list));
    // SAFETY: see above.
    unsafe { real!(posix_spawnp)(pid, file, list, attr, argv, envp) }
} }
