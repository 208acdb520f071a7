//! Who may speak: TLS 1.3, both ends with a certificate of the common authority, and each under its configured name.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::ring;
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig,
    ServerConnection,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, DnsName, PrivateKeyDer, ServerName};

use super::Refusal;
use super::message::HostName;
use crate::config;

/// Why TLS cannot be set up from the configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A PEM file cannot be read or has nothing of the kind.
    #[error("cannot read a {what} from {}", file.display())]
    Pem {
        /// What should be there.
        what: &'static str,
        /// Where.
        file: PathBuf,
        /// Why.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// The authority's certificate is not usable.
    #[error("{} is no usable authority", file.display())]
    Authority {
        /// Where.
        file: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Certificate and key are not usable, or not a pair.
    #[error("{} and its key are not usable", file.display())]
    Identity {
        /// The certificate's file.
        file: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The certificate is somebody else's.
    #[error("{} is not a certificate for host {host}", file.display())]
    NotOurs {
        /// The certificate's file.
        file: PathBuf,
        /// This host.
        host: HostName,
    },
    /// A host's name that no certificate can bear.
    #[error("{0} cannot be a certificate's name")]
    Name(HostName),
}

/// Both roles of this host.
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Tls {
    /// Reads the files and checks that they are this host's.
    pub fn load(files: &config::Tls, host: &HostName) -> Result<Self, Error> {
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for cert in certificates(&files.ca)? {
            let added = roots.add(cert);
            added.map_err(|error| Error::Authority { file: files.ca.clone(), source: error.into() })?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&files.cert)?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|source| Error::Pem {
            what: "private key",
            file: files.key.clone(),
            source,
        })?;
        if !chain.first().is_some_and(|cert| bears(cert, host)) {
            return Err(Error::NotOurs { file: files.cert.clone(), host: host.clone() });
        }
        let identity = |source| Error::Identity { file: files.cert.clone(), source };
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| Error::Authority { file: files.ca.clone(), source: error.into() })?;
        // Sessions are not resumed: each connection shows a certificate that is valid now.
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(identity)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(identity)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(identity)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(identity)?;
        client.resumption = Resumption::disabled();
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    /// The dialler's end, which takes no certificate but `peer`'s.
    pub fn dial(&self, peer: &HostName) -> Result<Connection, Refusal> {
        let name = server_name(peer).ok_or(Refusal::WrongName)?;
        let connection = ClientConnection::new(Arc::clone(&self.client), name);
        connection.map(Connection::from).map_err(|error| refusal(&error))
    }

    /// The listener's end.
    pub fn accept(&self) -> Result<Connection, Refusal> {
        let connection = ServerConnection::new(Arc::clone(&self.server));
        connection.map(Connection::from).map_err(|error| refusal(&error))
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let error = |source| Error::Pem { what: "certificate", file: file.to_owned(), source };
    let found: Vec<_> =
        CertificateDer::pem_file_iter(file).map_err(error)?.collect::<Result<_, _>>().map_err(error)?;
    if found.is_empty() { Err(error(rustls_pki_types::pem::Error::NoItemsFound)) } else { Ok(found) }
}

/// The name that a host's certificate must bear. Always a DNS name, also where it looks like an address.
pub fn server_name(host: &HostName) -> Option<ServerName<'static>> {
    DnsName::try_from(host.as_str().to_owned()).ok().map(ServerName::DnsName)
}

/// Whether the certificate's subject alternative name is the host's.
pub fn bears(cert: &CertificateDer<'_>, host: &HostName) -> bool {
    let (Ok(cert), Some(name)) = (ParsedCertificate::try_from(cert), server_name(host)) else { return false };
    verify_server_name(&cert, &name).is_ok()
}

/// What an error of TLS says about the other end.
pub fn refusal(error: &rustls::Error) -> Refusal {
    use CertificateError as C;
    use rustls::Error as E;
    match error {
        E::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => Refusal::WrongAuthority,
        E::InvalidCertificate(C::NotValidForName | C::NotValidForNameContext { .. }) => Refusal::WrongName,
        E::InvalidCertificate(
            C::Expired | C::ExpiredContext { .. } | C::NotValidYet | C::NotValidYetContext { .. },
        ) => Refusal::Expired,
        E::InvalidCertificate(_) => Refusal::BadCertificate,
        E::NoCertificatesPresented => Refusal::NoCertificate,
        E::AlertReceived(_) => Refusal::RejectedByPeer,
        E::PeerIncompatible(_) => Refusal::Incompatible,
        E::InvalidMessage(_) => Refusal::NotTls,
        _ => Refusal::Handshake,
    }
}
