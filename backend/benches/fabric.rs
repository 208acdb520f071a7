//! Speed of the soft fabric.

fn main() {}
