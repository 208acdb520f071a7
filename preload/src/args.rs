//! Raw C arguments into checked Rust values, and answers back into C.

use libc::{c_int, c_void, iovec, size_t, ssize_t};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use std::time::Duration;

/// Most buffers of a gather list (`IOV_MAX`).
const IOV_MAX: c_int = 1024;

/// The application's buffer for a receiving call.
///
/// # Safety
///
/// `buf` is valid for writes of `len` bytes, or `len` is 0.
pub unsafe fn buffer<'a>(buf: *mut c_void, len: size_t) -> IoSliceMut<'a> {
    if buf.is_null() || len == 0 {
        return IoSliceMut::new(&mut []);
    }
    let len = len.min(isize::MAX as usize);
    // SAFETY: the caller of the C function promises a valid buffer.
    IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(buf.cast(), len) })
}

/// The application's bytes for a sending call.
///
/// # Safety
///
/// `buf` is valid for reads of `len` bytes, or `len` is 0.
pub unsafe fn bytes<'a>(buf: *const c_void, len: size_t) -> IoSlice<'a> {
    if buf.is_null() || len == 0 {
        return IoSlice::new(&[]);
    }
    let len = len.min(isize::MAX as usize);
    // SAFETY: the caller of the C function promises a valid buffer.
    IoSlice::new(unsafe { std::slice::from_raw_parts(buf.cast(), len) })
}

/// A gather list.
///
/// # Safety
///
/// `iov` names `count` valid buffers.
pub unsafe fn gather<'a>(iov: *const iovec, count: c_int) -> Result<&'a [IoSlice<'a>], Errno> {
    if !(0..=IOV_MAX).contains(&count) {
        return Err(Errno::INVAL);
    }
    if count == 0 || iov.is_null() {
        return Ok(&[]);
    }
    // SAFETY: IoSlice has the layout of an iovec; the caller promises `count` of them with valid buffers.
    Ok(unsafe { std::slice::from_raw_parts(iov.cast(), count as usize) })
}

/// A scatter list.
///
/// # Safety
///
/// `iov` names `count` valid, writable buffers.
pub unsafe fn scatter<'a>(iov: *const iovec, count: c_int) -> Result<&'a mut [IoSliceMut<'a>], Errno> {
    if !(0..=IOV_MAX).contains(&count) {
        return Err(Errno::INVAL);
    }
    if count == 0 || iov.is_null() {
        return Ok(&mut []);
    }
    // SAFETY: IoSliceMut has the layout of an iovec; the list itself is not written, only what it names.
    Ok(unsafe { std::slice::from_raw_parts_mut(iov.cast_mut().cast(), count as usize) })
}

/// A result as C wants it: the count, or -1 and errno.
pub fn answer(result: Result<usize, Errno>) -> ssize_t {
    match result {
        Ok(n) => n as ssize_t,
        Err(error) => {
            set_errno(error.raw_os_error());
            -1
        }
    }
}

/// The answer of a sending call, with the signal that a broken pipe brings unless it is unwanted.
pub fn sent(result: Result<usize, Errno>, quiet: bool) -> ssize_t {
    if result == Err(Errno::PIPE) && !quiet {
        // SAFETY: a signal to this very thread, as the kernel would have sent it.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGPIPE) };
    }
    answer(result)
}

/// Sets errno.
pub fn set_errno(value: c_int) {
    // SAFETY: errno's place in this thread is always valid.
    unsafe { *libc::__errno_location() = value };
}

/// What the real call said.
pub fn result(returned: c_int) -> Result<usize, Errno> {
    if returned >= 0 {
        return Ok(returned as usize);
    }
    // SAFETY: errno's place in this thread is always valid.
    Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() }))
}

/// A time-out in milliseconds; negative is none.
pub fn milliseconds(timeout: c_int) -> Option<Duration> {
    u64::try_from(timeout).ok().map(Duration::from_millis)
}

/// A time-out as a timespec; null is none. `Err` if it is not valid.
///
/// # Safety
///
/// `timeout` is null or valid.
pub unsafe fn timespec(timeout: *const libc::timespec) -> Result<Option<Duration>, Errno> {
    // SAFETY: null, or valid by the caller's promise.
    let Some(t) = (unsafe { timeout.as_ref() }) else { return Ok(None) };
    let seconds = u64::try_from(t.tv_sec).map_err(|_| Errno::INVAL)?;
    let nanos = u32::try_from(t.tv_nsec).ok().filter(|n| *n < 1_000_000_000).ok_or(Errno::INVAL)?;
    Ok(Some(Duration::new(seconds, nanos)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_checked() {
        assert_eq!(milliseconds(-1), None);
        assert_eq!(milliseconds(5), Some(Duration::from_millis(5)));
        let bad = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000_000 };
        // SAFETY: a valid timespec, or null.
        unsafe {
            assert_eq!(timespec(&raw const bad), Err(Errno::INVAL));
            assert_eq!(timespec(std::ptr::null()), Ok(None));
        }
    }

    #[test]
    fn empty_and_oversized_lists() {
        // SAFETY: nothing is read of a list that is empty or refused.
        unsafe {
            assert_eq!(gather(std::ptr::null(), 0).map(<[_]>::len), Ok(0));
            assert!(gather(std::ptr::null(), 1025).is_err());
            assert!(scatter(std::ptr::null(), -1).is_err());
        }
    }
}
