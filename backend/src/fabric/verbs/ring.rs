//! Room in the send buffer: given out and taken back in the order of the send queue.

#![forbid(unsafe_code)]

/// Messages begin on a cache line.
const LINE: u64 = 64;

/// Free-running positions; a message never wraps.
#[derive(Debug)]
pub struct Ring {
    size: u64,
    head: u64,
    tail: u64,
}

impl Ring {
    /// All of `size` bytes free.
    pub fn new(size: usize) -> Self {
        Self { size: size as u64, head: 0, tail: 0 }
    }

    /// Room for `len` bytes: its offset, and what [`release`](Self::release) is to be told.
    pub fn take(&mut self, len: usize) -> Option<(usize, u64)> {
        let len = (len as u64).div_ceil(LINE).max(1) * LINE;
        let at = self.head % self.size;
        let skip = if at + len > self.size { self.size - at } else { 0 };
        if self.head - self.tail + skip + len > self.size {
            return None;
        }
        let offset = (self.head + skip) % self.size;
        self.head += skip + len;
        Some((offset as usize, self.head))
    }

    /// Everything up to there is free again.
    pub fn release(&mut self, upto: u64) {
        debug_assert!((self.tail..=self.head).contains(&upto));
        self.tail = upto;
    }

    /// Whether at least half is free.
    pub fn is_roomy(&self) -> bool {
        (self.head - self.tail) * 2 <= self.size
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    #[test]
    fn nothing_overlaps_and_nothing_is_lost() {
        const SIZE: usize = 4096;
        let mut ring = Ring::new(SIZE);
        let mut held: VecDeque<(usize, usize, u64)> = VecDeque::new();
        let (mut state, mut given) = (1_u32, 0);
        for _ in 0..10_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let len = (state >> 16) as usize % 1000;
            match ring.take(len) {
                Some((offset, upto)) => {
                    assert!(offset + len <= SIZE && offset % 64 == 0);
                    assert!(held.iter().all(|&(at, n, _)| offset + len <= at || at + n <= offset));
                    held.push_back((offset, len.max(1), upto));
                    given += 1;
                }
                None => {
                    let (.., upto) = held.pop_front().expect("an empty ring has room");
                    ring.release(upto);
                }
            }
        }
        assert!(given > 4000);
        while let Some((.., upto)) = held.pop_front() {
            ring.release(upto);
        }
        assert!(ring.is_roomy() && ring.take(SIZE / 2).is_some());
    }
}
