//! Flags about TLS, under the names that nbdkit gives them.

use super::wrong_usage;
use crate::error::Result;
use crate::nbd::Security;
use std::path::PathBuf;

/// Whether clients use TLS, as the command line writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Tls {
    Off,
    On,
    Require,
}

/// The flags.
#[derive(Debug, clap::Args)]
pub(super) struct TlsFlags {
    /// Whether NBD clients use TLS.
    ///
    /// off: none; on: those that like; require: nobody is served or told anything without. Default: require with
    /// --tls-certificates, else off.
    #[arg(long, value_enum, value_name = "WHEN")]
    tls: Option<Tls>,
    /// Directory with server-cert.pem and server-key.pem; for --tls-verify-peer ca-cert.pem, and ca-crl.pem if there is one.
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// Serve only clients with a certificate that ca-cert.pem has signed.
    #[arg(long, requires = "tls_certificates")]
    tls_verify_peer: bool,
}

impl TlsFlags {
    /// What `--tls` and its companions mean together.
    pub(super) fn security(&self) -> Result<Security> {
        let default = if self.tls_certificates.is_some() { Tls::Require } else { Tls::Off };
        let tls = self.tls.unwrap_or(default);
        if self.tls_verify_peer && tls != Tls::Require {
            // Whoever has no certificate would just speak plain text.
            wrong_usage("--tls-verify-peer keeps nobody out without --tls require");
        }
        match (&self.tls_certificates, tls) {
            (_, Tls::Off) => Ok(Security::none()),
            (None, _) => wrong_usage("--tls needs --tls-certificates DIR"),
            (Some(dir), _) => Security::with_certificates(dir, tls == Tls::Require, self.tls_verify_peer),
        }
    }
}
