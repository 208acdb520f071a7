//! What a virtual machine needs: a vsock device with its driver, a host that answers, rights, and a way to pin memory.

use super::Finding;
use crate::agent::report::Keeper;
use crate::cli::chain;
use crate::host::{DEVICE, Host};
use crate::keeper::memory;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::path::{Path, PathBuf};

/// How long a host may take to answer; the kernel gives up after two seconds.
const PATIENCE: Timespec = Timespec { tv_sec: 3, tv_nsec: 0 };
/// The number of vsock among virtio's devices.
const VSOCK: &str = "0x0013";
/// Rights that a keeper needs: their names, bits, and what for.
const RIGHTS: [(&str, u32, &str); 2] = [
    ("CAP_NET_BIND_SERVICE", 10, "to register from a privileged port"),
    ("CAP_SYS_ADMIN", 21, "to read the numbers of its pages"),
];

/// What an agent with a keeper says of it, and what stands in its way.
pub fn kept(keeper: &Keeper) -> Vec<Finding> {
    let Keeper { host, registered, slabs, pinned } = keeper;
    if *registered {
        let what = format!("keeper registered at {host}, {slabs} slabs, {pinned} bytes pinned");
        return vec![Finding::Fine(what)];
    }
    let what = format!("the keeper is not registered at {host}");
    let mut findings = vec![Finding::Stop(what, "see below, and its log".into())];
    findings.extend(missing());
    if let Ok(host) = host.parse() {
        findings.push(answers(&host));
    }
    findings
}

/// What of this machine would stop a keeper; the host is not bothered.
pub fn missing() -> Vec<Finding> {
    vec![device(Path::new("/sys/bus/virtio/devices")), rights(), pinning()]
}

fn device(devices: &Path) -> Finding {
    let entries = std::fs::read_dir(devices).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_vsock = |path: &PathBuf| {
        std::fs::read_to_string(path.join("device")).is_ok_and(|number| number.trim() == VSOCK)
    };
    let Some(found) = entries.into_iter().find(is_vsock) else {
        return Finding::Stop(
            "this machine has no vsock device".into(),
            "give it one (-device vhost-user-vsock-pci, docs/qemu.md), or load virtio_pci".into(),
        );
    };
    let driver = "modprobe vmw_vsock_virtio_transport".to_owned();
    if !found.join("driver").exists() {
        return Finding::Stop("the vsock device has no driver".into(), driver);
    }
    if !Path::new(DEVICE).exists() {
        return Finding::Stop(format!("there is no {DEVICE}"), driver);
    }
    Finding::Fine("vsock device".into())
}

fn rights() -> Finding {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let lacking: Vec<String> = lacking(&status).iter().map(|(name, why)| format!("{name} ({why})")).collect();
    if lacking.is_empty() {
        return Finding::Fine("the rights that a keeper needs".into());
    }
    let what = format!("this user has not {}", lacking.join(", nor "));
    Finding::Notice(what, "the agent must run as root; run doctor as root too, to see what it sees".into())
}

fn lacking(status: &str) -> Vec<(&'static str, &'static str)> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let have = line.and_then(|line| u64::from_str_radix(line.trim(), 16).ok()).unwrap_or(0);
    let lacks =
        |(name, bit, why): (&'static str, u32, &'static str)| (have & (1 << bit) == 0).then_some((name, why));
    RIGHTS.into_iter().filter_map(lacks).collect()
}

fn pinning() -> Finding {
    match memory::probe() {
        Ok(memory::FIRST_WAY) => Finding::Fine(format!("{} pins memory", memory::FIRST_WAY)),
        Ok(way) => Finding::Notice(
            format!("{} cannot pin memory here: {way} does instead", memory::FIRST_WAY),
            "sysctl kernel.io_uring_disabled=0, unless that is as it should be".into(),
        ),
        Err(error) => Finding::Stop(
            chain(&error),
            "sysctl kernel.io_uring_disabled=0, or reserve huge pages (sysctl vm.nr_hugepages)".into(),
        ),
    }
}

fn answers(host: &Host) -> Finding {
    match reach(host) {
        Ok(()) => Finding::Stop(
            format!("{host} answers, and does not let the keeper register"),
            "look at vsocketd's log on the host: does another keeper hold this boot's registration?".into(),
        ),
        Err(error) => {
            let mend = match error.raw_os_error() {
                Some(libc::ENODEV | libc::EAFNOSUPPORT) => {
                    "give the machine a vsock device, and load its driver"
                }
                _ => {
                    "on the host: is vsocketd running, with this machine's vport, and does `port` there agree?"
                }
            };
            Finding::Stop(format!("nobody answers at {host}: {error}"), mend.into())
        }
    }
}

fn reach(host: &Host) -> io::Result<()> {
    let mut stream = host.connect(false)?;
    if poll(&mut [PollFd::new(&stream, PollFlags::OUT)], Some(&PATIENCE))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    stream.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_read_from_the_kernels_mask() {
        let lacks = |mask: &str| lacking(&format!("Name:\tx\nCapEff:\t{mask}\n")).len();
        assert_eq!(["000001ffffffffff", "0000000000000400", "0"].map(lacks), [0, 1, 2]);
    }

    #[test]
    fn each_step_to_a_device_has_its_own_name() {
        let dir = std::env::temp_dir().join(format!("vsocket-doctor-{}", std::process::id()));
        let says = |finding| match finding {
            Finding::Stop(what, _) => what,
            Finding::Fine(what) | Finding::Notice(what, _) => what,
        };
        assert!(says(device(&dir)).contains("no vsock device"));
        std::fs::create_dir_all(dir.join("virtio3")).unwrap();
        std::fs::write(dir.join("virtio3/device"), "0x0013\n").unwrap();
        assert!(says(device(&dir)).contains("no driver"));
        std::fs::create_dir(dir.join("virtio3/driver")).unwrap();
        assert!(!says(device(&dir)).contains("driver"));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_host_that_is_not_there_is_named() {
        let host = Host::Unix("/nonexistent/host".into());
        let Finding::Stop(what, _) = answers(&host) else { panic!("it answers") };
        assert!(what.contains("/nonexistent/host"), "{what}");
    }
}
