//! `dprintf` and `vdprintf`: libc writes by a symbol of its own that nobody can hook, so what is printed to a connection is
//! made here and written by the hook.

use super::transfer;
use crate::hook::Next;
use libc::{c_char, c_int, c_void};
use vsocket_frontend::program::socket;

unsafe extern "C" {
    fn vasprintf(text: *mut *mut c_char, format: *const c_char, arguments: *mut c_void) -> c_int;
    fn __vasprintf_chk(
        text: *mut *mut c_char,
        flag: c_int,
        format: *const c_char,
        arguments: *mut c_void,
    ) -> c_int;
}

static VDPRINTF: Next = Next::new(c"vdprintf");
static VDPRINTF_CHK: Next = Next::new(c"__vdprintf_chk");
type Print = unsafe extern "C-unwind" fn(c_int, *const c_char, *mut c_void) -> c_int;
type Checked = unsafe extern "C-unwind" fn(c_int, c_int, *const c_char, *mut c_void) -> c_int;

/// Writes all of what was made, of `len` bytes, and frees it.
unsafe fn write_all(fd: c_int, text: *mut c_char, len: c_int) -> c_int {
    if len < 0 {
        return len;
    }
    let mut done = 0;
    let failed = loop {
        if done == len as usize {
            break false;
        }
        // SAFETY: libc has made so many bytes.
        let sent = unsafe { transfer::vs_write(fd, text.add(done).cast(), len as usize - done) };
        if sent < 0 {
            break true;
        }
        done += sent as usize;
    };
    let errno = crate::args::errno();
    // SAFETY: made by libc's malloc, and used no more.
    unsafe { libc::free(text.cast()) };
    crate::args::set_errno(errno);
    if failed { -1 } else { len }
}

/// `vdprintf(3)`. A `va_list` is passed by its address, on all processors that this library runs on.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn vdprintf(fd: c_int, format: *const c_char, arguments: *mut c_void) -> c_int {
    // SAFETY: the application's format and arguments, handed on once; the symbol is vdprintf, of this type.
    unsafe {
        if !socket::is_followed(fd) {
            let real: Print = std::mem::transmute(VDPRINTF.get());
            return real(fd, format, arguments);
        }
        let mut text = std::ptr::null_mut();
        let len = vasprintf(&raw mut text, format, arguments);
        write_all(fd, text, len)
    }
}

/// What `vdprintf` is in programs that are built with `_FORTIFY_SOURCE`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn __vdprintf_chk(
    fd: c_int,
    flag: c_int,
    format: *const c_char,
    arguments: *mut c_void,
) -> c_int {
    // SAFETY: as in `vdprintf`.
    unsafe {
        if !socket::is_followed(fd) {
            let real: Checked = std::mem::transmute(VDPRINTF_CHK.get());
            return real(fd, flag, format, arguments);
        }
        let mut text = std::ptr::null_mut();
        let len = __vasprintf_chk(&raw mut text, flag, format, arguments);
        write_all(fd, text, len)
    }
}

/// Makes a `va_list` of the arguments in registers and on the stack, as a compiler does in a variadic function (System V ABI,
/// 3.5.7), and calls the function that takes one. `$named` bytes of registers are arguments with a name.
#[cfg(target_arch = "x86_64")]
macro_rules! variadic {
    ($name:ident, $to:ident, $named:literal, $place:literal) => {
        #[doc = concat!("`", stringify!($name), "(3)`.")]
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name() {
            core::arch::naked_asm!(
                "push rbp",
                "mov rbp, rsp",
                "sub rsp, 208",
                // The registers' save area.
                "mov [rsp], rdi",
                "mov [rsp + 8], rsi",
                "mov [rsp + 16], rdx",
                "mov [rsp + 24], rcx",
                "mov [rsp + 32], r8",
                "mov [rsp + 40], r9",
                "test al, al",
                "je 2f",
                "movaps [rsp + 48], xmm0",
                "movaps [rsp + 64], xmm1",
                "movaps [rsp + 80], xmm2",
                "movaps [rsp + 96], xmm3",
                "movaps [rsp + 112], xmm4",
                "movaps [rsp + 128], xmm5",
                "movaps [rsp + 144], xmm6",
                "movaps [rsp + 160], xmm7",
                "2:",
                // The list: where the next general and the next vector register stand, the stack, the save area.
                "mov dword ptr [rsp + 176], {named}",
                "mov dword ptr [rsp + 180], 48",
                "lea rax, [rbp + 16]",
                "mov [rsp + 184], rax",
                "mov [rsp + 192], rsp",
                concat!("lea ", $place, ", [rsp + 176]"),
                "call {to}",
                "leave",
                "ret",
                named = const $named,
                to = sym $to,
            )
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod variadics {
    use super::{__vdprintf_chk, vdprintf};

    variadic!(dprintf, vdprintf, 16, "rdx");
    variadic!(__dprintf_chk, __vdprintf_chk, 24, "rcx");
}
