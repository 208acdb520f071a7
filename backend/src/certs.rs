//! A certificate authority and host certificates for a lab: `vsocketd certs --out DIR HOST…`.
//!
//! Not a way to run a site's authority: the CA's key lies beside what it signed. Keys are readable by their owner
//! only, and nothing that exists is overwritten.

#![forbid(unsafe_code)]

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::peer::message::HostName;

/// Certificates are valid this long: a lab should not outlive it.
const VALIDITY: Duration = Duration::from_secs(825 * 24 * 3600);

/// Clocks of a lab may differ by this.
const SKEW: Duration = Duration::from_secs(24 * 3600);

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No host was named.
    #[error("name at least one host")]
    NoHosts,
    /// A name that cannot be a host's, or is the CA's own file name.
    #[error("{0:?} cannot be a host's name")]
    HostName(String),
    /// A host was named twice.
    #[error("{0} is named twice")]
    Twice(HostName),
    /// What exists is not overwritten.
    #[error("{} exists already; nothing was written", .0.display())]
    Exists(PathBuf),
    /// The file system.
    #[error("cannot write {}", file.display())]
    Write {
        /// Which file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The cryptography.
    #[error("cannot make a certificate for {name}")]
    Certificate {
        /// For whom.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
}

/// Makes `ca.pem`, `ca.key` and for each host `HOST.pem` and `HOST.key`; gives the paths.
pub fn create(out: &Path, hosts: &[String]) -> Result<Vec<PathBuf>, Error> {
    let hosts = checked(hosts)?;
    let mut files = Vec::new();
    let (ca_cert, ca) = authority()?;
    files.push((out.join("ca.pem"), ca_cert, 0o644));
    files.push((out.join("ca.key"), ca.key().serialize_pem(), 0o600));
    for host in &hosts {
        let (cert, key) = sign(&ca, host.as_str())?;
        files.push((out.join(format!("{host}.pem")), cert, 0o644));
        files.push((out.join(format!("{host}.key")), key, 0o600));
    }
    if let Some((path, ..)) = files.iter().find(|(path, ..)| path.exists()) {
        return Err(Error::Exists(path.clone()));
    }
    fs::create_dir_all(out).map_err(|source| Error::Write { file: out.to_owned(), source })?;
    for (path, text, mode) in &files {
        write(path, text, *mode)?;
    }
    Ok(files.into_iter().map(|(path, ..)| path).collect())
}

fn checked(hosts: &[String]) -> Result<Vec<HostName>, Error> {
    let mut names: Vec<HostName> = Vec::with_capacity(hosts.len());
    for host in hosts {
        let name = HostName::new(host).filter(|name| name.as_str() != "ca" && !host.starts_with('.'));
        let name = name.ok_or_else(|| Error::HostName(host.clone()))?;
        if names.contains(&name) {
            return Err(Error::Twice(name));
        }
        names.push(name);
    }
    if names.is_empty() { Err(Error::NoHosts) } else { Ok(names) }
}

fn params(name: &str, sans: Vec<String>) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::new(sans).map_err(|source| failed(name, source))?;
    params.distinguished_name.push(DnType::CommonName, name);
    let now = SystemTime::now();
    params.not_before = (now - SKEW).into();
    params.not_after = (now + VALIDITY).into();
    Ok(params)
}

fn failed(name: &str, source: rcgen::Error) -> Error {
    Error::Certificate { name: name.to_owned(), source }
}

fn authority() -> Result<(String, Issuer<'static, KeyPair>), Error> {
    const NAME: &str = "vsocket lab CA";
    let mut params = params(NAME, Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(|source| failed(NAME, source))?;
    let cert = params.self_signed(&key).map_err(|source| failed(NAME, source))?;
    Ok((cert.pem(), Issuer::new(params, key)))
}

/// A backend is client and server in turn.
fn sign(ca: &Issuer<'_, KeyPair>, host: &str) -> Result<(String, String), Error> {
    let mut params = params(host, vec![host.to_owned()])?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().map_err(|source| failed(host, source))?;
    let cert = params.signed_by(&key, ca).map_err(|source| failed(host, source))?;
    Ok((cert.pem(), key.serialize_pem()))
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), Error> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists(path.to_owned()),
        _ => Error::Write { file: path.to_owned(), source },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(hosts: &[&str]) -> Vec<String> {
        hosts.iter().map(|host| host.to_string()).collect()
    }

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vsocket-certs-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn keys_are_private_and_nothing_is_overwritten() {
        let out = directory("new");
        let files = create(&out, &names(&["h1", "h2"])).unwrap();
        assert_eq!(files.len(), 6);
        for file in &files {
            let mode = fs::metadata(file).unwrap().permissions().mode() & 0o777;
            let expected = if file.extension().is_some_and(|ext| ext == "key") { 0o600 } else { 0o644 };
            assert_eq!(mode & !0o022, expected & !0o022, "{}", file.display());
            assert!(expected == 0o644 || mode == 0o600);
        }
        let before = fs::read(out.join("h2.key")).unwrap();
        assert!(
            matches!(create(&out, &names(&["h3"])), Err(Error::Exists(path)) if path == out.join("ca.pem"))
        );
        assert!(!out.join("h3.pem").exists());
        assert_eq!(fs::read(out.join("h2.key")).unwrap(), before);
        fs::remove_dir_all(out).unwrap();
    }

    #[test]
    fn names_are_checked_before_anything_is_written() {
        let out = directory("names");
        assert!(matches!(create(&out, &[]), Err(Error::NoHosts)));
        assert!(matches!(create(&out, &names(&["h1", "../h2"])), Err(Error::HostName(_))));
        assert!(matches!(create(&out, &names(&["ca"])), Err(Error::HostName(_))));
        assert!(matches!(create(&out, &names(&["h1", "h1"])), Err(Error::Twice(_))));
        assert!(!out.exists());
    }
}
