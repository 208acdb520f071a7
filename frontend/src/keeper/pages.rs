//! What the kernel says of this machine's memory: where pages are, and how much is left.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of a page, as the host counts them.
pub const PAGE: usize = 4096;
/// Entries of the page map that are read at a time.
const CHUNK: usize = 512;
const PRESENT: u64 = 1 << 63;
const NUMBER: u64 = (1 << 55) - 1;

/// Why the numbers of pages are not known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The page map cannot be read.
    #[error("cannot read /proc/self/pagemap")]
    Read(#[from] io::Error),
    /// A pinned page that is not there.
    #[error("page {0} is not in memory")]
    Absent(usize),
    /// The kernel hides them.
    #[error("the kernel shows no page numbers: that needs CAP_SYS_ADMIN")]
    Hidden,
}

/// The numbers of the pages from `address` on, `len` bytes. To be called after they were pinned: pinning may move them.
///
/// # Errors
///
/// [`Error`].
pub fn numbers(address: usize, len: usize) -> Result<Vec<u64>, Error> {
    let map = File::open("/proc/self/pagemap")?;
    let (first, count) = (address / PAGE, len.div_ceil(PAGE));
    let mut numbers = Vec::with_capacity(count);
    let mut bytes = [0; 8 * CHUNK];
    while numbers.len() < count {
        let now = CHUNK.min(count - numbers.len());
        map.read_exact_at(&mut bytes[..8 * now], ((first + numbers.len()) * 8) as u64)?;
        for entry in bytes[..8 * now].chunks_exact(8) {
            numbers.push(number(u64::from_ne_bytes(entry.try_into().unwrap_or_default()), numbers.len())?);
        }
    }
    Ok(numbers)
}

fn number(entry: u64, page: usize) -> Result<u64, Error> {
    match entry & NUMBER {
        _ if entry & PRESENT == 0 => Err(Error::Absent(page)),
        0 => Err(Error::Hidden),
        number => Ok(number),
    }
}

/// A line of `/proc/meminfo`, in bytes or in pieces.
fn memory_line(text: &str, name: &str) -> usize {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let mut words = line.unwrap_or_default().split_ascii_whitespace();
    let n: usize = words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    if words.next().is_some() { n * 1024 } else { n }
}

/// Bytes that the kernel could give without harm to others.
pub fn available() -> usize {
    memory_line(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable")
}

/// How many huge pages are free, and the bytes of each.
pub fn free_huge_pages() -> (usize, usize) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = memory_line(&text, "HugePages_Free").saturating_sub(memory_line(&text, "HugePages_Rsvd"));
    (free, memory_line(&text, "Hugepagesize"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_number_or_a_reason() {
        assert_eq!(number(PRESENT | 7, 0).unwrap(), 7);
        assert_eq!(number(PRESENT | 3 << 55 | 7, 0).unwrap(), 7);
        assert!(matches!(number(7, 4), Err(Error::Absent(4))));
        assert!(matches!(number(PRESENT, 0), Err(Error::Hidden)));
    }

    #[test]
    fn amounts_are_read_with_their_unit() {
        let text = "MemAvailable:   12 kB\nHugePages_Free:        3\nHugepagesize:       2048 kB\n";
        assert_eq!(memory_line(text, "MemAvailable"), 12 << 10);
        assert_eq!(memory_line(text, "HugePages_Free"), 3);
        assert_eq!(memory_line(text, "Hugepagesize"), 2 << 20);
        assert_eq!(memory_line(text, "HugePages"), 0);
    }
}
