//! `vsocketd`, the host's daemon. All sense is in the library.

fn main() {}
