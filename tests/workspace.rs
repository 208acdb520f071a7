//! The unsafe code of the workspace stands only where the design allows it.
