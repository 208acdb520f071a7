//! Can this file be accelerated: what the dynamic linker will make of it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Scripts whose interpreter is a script, and so on: the kernel's bound.
const MOST_INTERPRETERS: usize = 5;
const PT_INTERP: u32 = 3;

/// Why a program will stay on TCP.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Obstacle {
    /// No dynamic linker, so no preloading.
    #[error("{0} is statically linked")]
    Static(String),
    /// The dynamic linker ignores `LD_PRELOAD`.
    #[error("{0} is set-user-ID, set-group-ID or has file capabilities")]
    Privileged(String),
    /// Of another architecture than the library.
    #[error("{0} is built for another architecture")]
    Foreign(String),
}

/// What stands in the way, if anything. What cannot be read is left to the kernel to judge.
pub fn obstacle(program: &Path) -> Option<Obstacle> {
    let mut path = program.to_owned();
    for _ in 0..MOST_INTERPRETERS {
        let name = path.display().to_string();
        if privileged(&path) {
            return Some(Obstacle::Privileged(name));
        }
        let file = File::open(&path).ok()?;
        let mut head = [0; 256];
        let n = (&file).read(&mut head).ok()?;
        match interpreter(&head[..n]) {
            Some(interpreter) => path = interpreter,
            None => return judge(&file, &head[..n], name),
        }
    }
    None
}

/// Whether running it changes what the process may do: then the dynamic linker distrusts its environment.
fn privileged(path: &Path) -> bool {
    let Ok(meta) = std::fs::metadata(path) else { return false };
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let user = meta.mode() & 0o4000 != 0 && meta.uid() != uid;
    let group = meta.mode() & 0o2010 == 0o2010 && meta.gid() != gid;
    let mut value = [0u8; 64];
    let capable = uid != 0 && rustix::fs::getxattr(path, "security.capability", &mut value[..]).is_ok();
    user || group || capable
}

/// The interpreter of a script.
fn interpreter(head: &[u8]) -> Option<PathBuf> {
    let line = head.strip_prefix(b"#!")?.split(|b| *b == b'\n').next()?;
    let word = line.split(u8::is_ascii_whitespace).find(|w| !w.is_empty())?;
    Some(PathBuf::from(OsStr::from_bytes(word)))
}

fn judge(file: &File, head: &[u8], name: String) -> Option<Obstacle> {
    let ident = head.strip_prefix(b"\x7fELF")?;
    // This program is built as the library is.
    let own = File::open("/proc/self/exe").ok().and_then(|own| {
        let mut ours = [0; 20];
        own.read_exact_at(&mut ours, 0).ok()?;
        Some(ours)
    })?;
    let same = |range: std::ops::Range<usize>| head.get(range.clone()) == own.get(range);
    if !same(4..6) || !same(18..20) {
        return Some(Obstacle::Foreign(name));
    }
    let wide = ident.first() == Some(&2);
    let offset = if wide { word::<8>(head, 32)? } else { word::<4>(head, 28)? };
    let at = if wide { 54 } else { 42 };
    let (size, count) = (word::<2>(head, at)?, word::<2>(head, at + 2)?);
    for n in 0..count {
        let mut kind = [0; 4];
        file.read_exact_at(&mut kind, offset.checked_add(n * size)?).ok()?;
        if u32::from_ne_bytes(kind) == PT_INTERP {
            return None;
        }
    }
    Some(Obstacle::Static(name))
}

/// An integer of `N` bytes, in this machine's order: the file is of this machine.
fn word<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let mut wide = [0; 8];
    let part = bytes.get(at..at + N)?;
    if cfg!(target_endian = "big") {
        wide[8 - N..].copy_from_slice(part);
    } else {
        wide[..N].copy_from_slice(part);
    }
    Some(u64::from_ne_bytes(wide))
}

/// Where a shell would find a command.
///
/// # Errors
///
/// The exit status that `env(1)` gives: 127 if it is nowhere, 126 if it is there and may not be run.
pub fn find(command: &OsStr) -> Result<PathBuf, u8> {
    let runnable = |path: &Path| -> Option<Result<PathBuf, u8>> {
        let meta = std::fs::metadata(path).ok()?;
        let may = rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
        Some(if meta.is_file() && may { Ok(path.to_owned()) } else { Err(126) })
    };
    if command.as_bytes().contains(&b'/') {
        return runnable(Path::new(command)).unwrap_or(Err(127));
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    let mut worst = 127;
    for dir in std::env::split_paths(&path) {
        match runnable(&dir.join(command)) {
            Some(Ok(found)) => return Ok(found),
            Some(Err(status)) => worst = status,
            None => {}
        }
    }
    Err(worst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str, content: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("vsocket-elf-{}-{name}", std::process::id()));
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn a_dynamic_program_is_fine_and_so_is_its_script() {
        let own = std::fs::canonicalize("/proc/self/exe").unwrap();
        assert_eq!(obstacle(&own), None);
        let script = Scratch::new("script", format!("#! {}  -x\nexit\n", own.display()).as_bytes());
        assert_eq!(obstacle(&script.0), None);
    }

    #[test]
    fn a_static_program_is_named_also_behind_a_script() {
        let mut image = std::fs::read("/proc/self/exe").unwrap();
        image.truncate(4096);
        image[56..58].fill(0);
        let program = Scratch::new("static", &image);
        let name = program.0.display().to_string();
        assert_eq!(obstacle(&program.0), Some(Obstacle::Static(name.clone())));
        let script = Scratch::new("behind", format!("#!{name}\n").as_bytes());
        assert_eq!(obstacle(&script.0), Some(Obstacle::Static(name)));
    }

    #[test]
    fn another_architecture_is_named() {
        let mut image = std::fs::read("/proc/self/exe").unwrap();
        image.truncate(4096);
        image[18] ^= 0xff;
        let program = Scratch::new("foreign", &image);
        assert!(matches!(obstacle(&program.0), Some(Obstacle::Foreign(_))));
    }

    #[test]
    fn a_cut_file_is_left_to_the_kernel() {
        let program = Scratch::new("cut", b"\x7fELF");
        let _ = obstacle(&program.0);
        assert_eq!(obstacle(Path::new("/nonexistent")), None);
    }

    #[test]
    fn commands_are_found_as_a_shell_finds_them() {
        assert_eq!(find(OsStr::new("no-such-command-here")), Err(127));
        assert_eq!(find(OsStr::new("/nonexistent/x")), Err(127));
        assert_eq!(find(OsStr::new("/etc/passwd")), Err(126));
        assert!(find(OsStr::new("sh")).is_ok());
    }
}
