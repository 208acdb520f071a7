//! The token that proves, to the backends of one boot, that it is the same keeper: kept where only root reads it.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Its file, beside the agent's socket: in a directory that does not outlive the boot, as the token does not.
pub fn path(socket: &Path) -> PathBuf {
    socket.with_file_name("keeper.token")
}

/// The token that was kept, or 0: also where others may know it, or have written it.
pub fn read(path: &Path) -> u128 {
    let text = match File::open(path).and_then(text) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return 0,
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "cannot read the token");
            return 0;
        }
    };
    u128::from_str_radix(text.trim(), 16).unwrap_or_else(|error| {
        tracing::warn!(%error, path = %path.display(), "not a token");
        0
    })
}

fn text(mut file: File) -> io::Result<String> {
    let found = file.metadata()?;
    let ours = found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o077 == 0;
    if !ours {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "others may know it"));
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// Keeps a token: whole, or not at all.
///
/// # Errors
///
/// The directory does not let us.
pub fn write(path: &Path, token: u128) -> io::Result<()> {
    let new = path.with_extension("token.new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    writeln!(file, "{token:032x}")?;
    std::fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_token_is_kept_for_root_alone() {
        let dir = std::env::temp_dir().join(format!("vsocket-token-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = path(&dir.join("agent.sock"));
        assert_eq!(read(&path), 0);
        for token in [7, u128::MAX - 1] {
            write(&path, token).unwrap();
            assert_eq!(read(&path), token);
        }
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert_eq!(read(&path), 0, "others know it");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::write(&path, "nonsense").unwrap();
        assert_eq!(read(&path), 0);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
