//! Raw C arguments into checked Rust values, and answers back into C.

use libc::{c_int, c_void, iovec, size_t, ssize_t};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use std::time::Duration;

/// Most buffers of a gather list (`IOV_MAX`).
const IOV_MAX: c_int = 1024;

/// The application's buffer for a receiving call.
///
/// # Errors
///
/// `FAULT` if it is null.
///
/// # Safety
///
/// `buf` is valid for writes of `len` bytes, or `len` is 0.
pub unsafe fn buffer<'a>(buf: *mut c_void, len: size_t) -> Result<IoSliceMut<'a>, Errno> {
    if len == 0 {
        return Ok(IoSliceMut::new(&mut []));
    }
    if buf.is_null() {
        return Err(Errno::FAULT);
    }
    let len = len.min(isize::MAX as usize);
    // SAFETY: the caller of the C function promises a valid buffer.
    Ok(IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(buf.cast(), len) }))
}

/// The application's bytes for a sending call.
///
/// # Errors
///
/// `FAULT` if they are nowhere.
///
/// # Safety
///
/// `buf` is valid for reads of `len` bytes, or `len` is 0.
pub unsafe fn bytes<'a>(buf: *const c_void, len: size_t) -> Result<IoSlice<'a>, Errno> {
    if len == 0 {
        return Ok(IoSlice::new(&[]));
    }
    if buf.is_null() {
        return Err(Errno::FAULT);
    }
    let len = len.min(isize::MAX as usize);
    // SAFETY: the caller of the C function promises a valid buffer.
    Ok(IoSlice::new(unsafe { std::slice::from_raw_parts(buf.cast(), len) }))
}

/// A gather list.
///
/// # Safety
///
/// `iov` names `count` valid buffers.
pub unsafe fn gather<'a>(iov: *const iovec, count: c_int) -> Result<&'a [IoSlice<'a>], Errno> {
    // SAFETY: the caller's promise.
    if !unsafe { can_be_list(iov, count) }? {
        return Ok(&[]);
    }
    // SAFETY: IoSlice has the layout of an iovec; the caller promises `count` of them with valid buffers.
    Ok(unsafe { std::slice::from_raw_parts(iov.cast(), count as usize) })
}

/// Whether a list has entries.
///
/// # Errors
///
/// `INVAL` if it has too many, `FAULT` if it or one of its buffers is null.
unsafe fn can_be_list(iov: *const iovec, count: c_int) -> Result<bool, Errno> {
    if !(0..=IOV_MAX).contains(&count) {
        return Err(Errno::INVAL);
    }
    if count == 0 {
        return Ok(false);
    }
    if iov.is_null() {
        return Err(Errno::FAULT);
    }
    // SAFETY: the caller promises so many.
    let list = unsafe { std::slice::from_raw_parts(iov, count as usize) };
    if list.iter().any(|one| one.iov_base.is_null() && one.iov_len > 0) {
        Err(Errno::FAULT)
    } else {
        Ok(true)
    }
}

/// The list of a message, of which the kernel says otherwise that it is too long.
pub fn of_message<T>(list: Result<T, Errno>) -> Result<T, Errno> {
    list.map_err(|error| if error == Errno::INVAL { Errno::MSGSIZE } else { error })
}

/// A scatter list.
///
/// # Safety
///
/// `iov` names `count` valid, writable buffers.
pub unsafe fn scatter<'a>(iov: *const iovec, count: c_int) -> Result<&'a mut [IoSliceMut<'a>], Errno> {
    // SAFETY: the caller's promise.
    if !unsafe { can_be_list(iov, count) }? {
        return Ok(&mut []);
    }
    // SAFETY: IoSliceMut has the layout of an iovec; the list itself is not written, only what it names.
    Ok(unsafe { std::slice::from_raw_parts_mut(iov.cast_mut().cast(), count as usize) })
}

/// How many bytes a list names; 0 if it is not one.
///
/// # Safety
///
/// `iov` names `count` buffers.
pub unsafe fn length(iov: *const iovec, count: c_int) -> usize {
    if iov.is_null() || !(1..=IOV_MAX).contains(&count) {
        return 0;
    }
    // SAFETY: the caller promises so many.
    let list = unsafe { std::slice::from_raw_parts(iov, count as usize) };
    list.iter().fold(0, |sum, one| sum.saturating_add(one.iov_len))
}

/// Every descriptor that is in a message's control data (`SCM_RIGHTS`).
///
/// # Safety
///
/// The message's control data are valid for reads.
pub unsafe fn each_passed(msg: *const libc::msghdr, mut f: impl FnMut(c_int)) {
    // SAFETY: headers and descriptors within the control data, as long as the message says that these are.
    unsafe {
        let end = (*msg).msg_control.addr().saturating_add((*msg).msg_controllen);
        let mut head = libc::CMSG_FIRSTHDR(msg);
        while let Some(one) = head.as_ref() {
            if one.cmsg_len > end.saturating_sub(head.addr()) {
                // Longer than what it is in: the kernel refuses such a message.
                return;
            }
            if (one.cmsg_level, one.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let data = libc::CMSG_DATA(head).cast::<c_int>();
                let room = one.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                (0..room / size_of::<c_int>()).for_each(|n| f(data.add(n).read_unaligned()));
            }
            head = libc::CMSG_NXTHDR(msg, head);
        }
    }
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

/// What errno is.
pub fn errno() -> c_int {
    // SAFETY: errno's place in this thread is always valid.
    unsafe { *libc::__errno_location() }
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
    fn descriptors_of_a_message_end_with_its_control_data() {
        let (mut control, mut found) = ([0u64; 8], Vec::new());
        // SAFETY: zero is a message of nothing; the control data outlive it, and have room for a header and 4 descriptors.
        unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            (message.msg_control, message.msg_controllen) =
                (control.as_mut_ptr().cast(), libc::CMSG_LEN(8) as usize);
            let head = libc::CMSG_FIRSTHDR(&raw const message);
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (0..4).for_each(|n| libc::CMSG_DATA(head).cast::<c_int>().add(n).write_unaligned(n as c_int + 5));
            for claimed in [libc::CMSG_LEN(4) as usize, libc::CMSG_LEN(8) as usize, usize::MAX] {
                (*head).cmsg_len = claimed;
                each_passed(&raw const message, |fd| found.push(fd));
            }
        }
        assert_eq!(found, [5, 5, 6], "nothing of one that is longer than the control data");
    }

    #[test]
    fn empty_and_oversized_lists() {
        // SAFETY: nothing is read of a list that is empty or refused.
        unsafe {
            assert_eq!(gather(std::ptr::null(), 0).map(<[_]>::len), Ok(0));
            assert!(gather(std::ptr::null(), 1025).is_err() && gather(std::ptr::null(), 1).is_err());
            assert!(scatter(std::ptr::null(), -1).is_err());
        }
    }
}
