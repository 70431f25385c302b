//! TLS for connections: the server's certificate, and who may be its client.
//!
//! Certificates are X.509 in PEM files of one directory, under the names that nbdkit and qemu give them:
//! `server-cert.pem` (with what leads up to the authority), `server-key.pem`, and to tell clients apart `ca-cert.pem`,
//! which must have signed theirs, and `ca-crl.pem`, if it is there, which must not list them.

use super::handshake::Tls;
use crate::error::{CertificateError, Error, Result};
use rustix::io::Errno;
use std::path::Path;
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ServerConfig, VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{Error as TlsError, RootCertStore, crypto};

/// Whether connections are under TLS.
#[derive(Clone)]
pub struct Security {
    /// `None`: there is no TLS.
    acceptor: Option<TlsAcceptor>,
    required: bool,
}

impl Security {
    /// Plain text only.
    #[must_use]
    pub fn none() -> Self {
        Self { acceptor: None, required: false }
    }

    /// TLS by the certificates in `dir`. `required`: no client without. `verify_peer`: no client without a certificate that
    /// `ca-cert.pem` has signed.
    pub fn with_certificates(dir: &Path, required: bool, verify_peer: bool) -> Result<Self> {
        let chain: Vec<CertificateDer<'static>> = pem_items(&dir.join("server-cert.pem"))?;
        let key_path = dir.join("server-key.pem");
        let key =
            PrivateKeyDer::from_pem_file(&key_path).map_err(|cause| refused(&key_path, pem_error(&cause)))?;
        let provider = Arc::new(crypto::ring::default_provider());
        let of_server = |cause| refused(&dir.join("server-cert.pem"), CertificateError::Rejected(cause));
        let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(of_server)?;
        let config = if verify_peer {
            let authority = dir.join("ca-cert.pem");
            let mut roots = RootCertStore::empty();
            for certificate in pem_items::<CertificateDer<'static>>(&authority)? {
                let added = roots.add(certificate);
                added.map_err(|cause| refused(&authority, CertificateError::Rejected(cause)))?;
            }
            let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let revoked = dir.join("ca-crl.pem");
            if revoked.exists() {
                let lists = pem_items::<CertificateRevocationListDer<'static>>(&revoked)?;
                // Authorities without a list of their own have revoked nothing.
                verifier = verifier.with_crls(lists).allow_unknown_revocation_status();
            }
            let verifier = verifier.build().map_err(|cause| match cause {
                VerifierBuilderError::InvalidCrl(cause) => {
                    let cause = TlsError::InvalidCertRevocationList(cause);
                    refused(&revoked, CertificateError::Rejected(cause))
                }
                // No root was given, or something that does not exist yet.
                _ => refused(&authority, CertificateError::NothingThere),
            })?;
            config.with_client_cert_verifier(verifier)
        } else {
            config.with_no_client_auth()
        };
        let config = config.with_single_cert(chain, key).map_err(of_server)?;
        Ok(Self { acceptor: Some(TlsAcceptor::from(Arc::new(config))), required })
    }

    /// Whether nothing is ever said in plain text but the start of TLS.
    #[must_use]
    pub fn is_required(&self) -> bool {
        self.required
    }

    pub(super) fn offer(&self) -> Tls {
        match (&self.acceptor, self.required) {
            (None, _) => Tls::Off,
            (Some(_), false) => Tls::Offered,
            (Some(_), true) => Tls::Required,
        }
    }

    pub(super) fn acceptor(&self) -> Option<&TlsAcceptor> {
        self.acceptor.as_ref()
    }
}

/// All items of a kind in a file; one at least.
fn pem_items<T: PemObject>(path: &Path) -> Result<Vec<T>> {
    let items = T::pem_file_iter(path).and_then(Iterator::collect::<std::result::Result<Vec<T>, _>>);
    match items {
        Ok(items) if items.is_empty() => Err(refused(path, CertificateError::NothingThere)),
        Ok(items) => Ok(items),
        Err(cause) => Err(refused(path, pem_error(&cause))),
    }
}

fn pem_error(cause: &pem::Error) -> CertificateError {
    match cause {
        pem::Error::Io(error) => {
            CertificateError::Unreadable(Errno::from_io_error(error).unwrap_or(Errno::IO))
        }
        pem::Error::NoItemsFound => CertificateError::NothingThere,
        other => CertificateError::NotPem(other.to_string()),
    }
}

fn refused(path: &Path, cause: CertificateError) -> Error {
    Error::Certificate { path: path.display().to_string(), cause }
}
