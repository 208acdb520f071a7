//! Notices that a device is being removed.
//!
//! A driver that can, takes the device from its users and reports that. Soft-RoCE cannot: its removal waits until all
//! users have closed it, and tells them nothing. But the first thing that goes, in either case, is the device's node.

#![forbid(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init};

const NODES: &str = "/dev/infiniband";

/// See the module.
pub struct Removal {
    inotify: OwnedFd,
    node: String,
}

impl Removal {
    /// Watches the node of that name; where there are no nodes to watch, only the driver's report is left.
    pub fn watch(node: String) -> Option<Self> {
        Self::watch_in(NODES, node)
    }

    fn watch_in(nodes: &str, node: String) -> Option<Self> {
        let inotify = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok()?;
        add_watch(&inotify, nodes, WatchFlags::DELETE | WatchFlags::MOVED_FROM).ok()?;
        Some(Self { inotify, node })
    }

    /// Whether it is gone: asked when the descriptor is readable.
    pub fn is_gone(&self) -> bool {
        let mut space = [MaybeUninit::uninit(); 1024];
        let mut events = Reader::new(&self.inotify, &mut space);
        let mut gone = false;
        while let Ok(event) = events.next() {
            gone |= event.file_name().is_some_and(|name| name.to_bytes() == self.node.as_bytes());
        }
        gone
    }
}

impl AsFd for Removal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_node_counts() {
        let root = std::env::temp_dir().join(format!("vsocket-removal-{}", std::process::id()));
        std::fs::create_dir_all(&root).unwrap();
        for node in ["uverbs0", "uverbs1"] {
            std::fs::write(root.join(node), "").unwrap();
        }
        let removal = Removal::watch_in(root.to_str().unwrap(), "uverbs1".to_owned()).unwrap();
        assert!(!removal.is_gone());
        std::fs::remove_file(root.join("uverbs0")).unwrap();
        assert!(!removal.is_gone());
        std::fs::remove_file(root.join("uverbs1")).unwrap();
        assert!(removal.is_gone());
        std::fs::remove_dir_all(&root).unwrap();
        assert!(Removal::watch_in("/nonexistent", String::new()).is_none());
    }
}
