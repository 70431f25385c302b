//! Certificates for tests, made by OpenSSL: an authority, and directories with what it has issued, under the names that
//! nbdkit, libnbd and qemu look for.

use crate::process::{Sandbox, succeed};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What an authority has issued to whom.
#[derive(Debug, Clone, Copy)]
pub enum Holder {
    /// `server-cert.pem` and `server-key.pem`, for `localhost`.
    Server,
    /// `client-cert.pem` and `client-key.pem`.
    Client,
    /// Only the authority's certificate.
    Nobody,
}

/// A certificate authority of a test.
#[derive(Debug)]
pub struct Authority {
    dir: PathBuf,
}

impl Authority {
    /// A new one in a directory of the sandbox.
    #[must_use]
    pub fn new(sandbox: &Sandbox, name: &str) -> Self {
        let dir = sandbox.join(name);
        std::fs::create_dir(&dir).expect("the sandbox can be written");
        std::fs::write(dir.join("index.txt"), "").expect("the sandbox can be written");
        std::fs::write(dir.join("crlnumber"), "01\n").expect("the sandbox can be written");
        let config = "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\ndefault_md=sha256\ndefault_crl_days=2\n\
                      crlnumber=crlnumber\ncrl_extensions=list\n[list]\nauthorityKeyIdentifier=keyid:always\n\
                      [req]\ndistinguished_name=n\n[n]\n\
                      [authority]\nbasicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign,cRLSign\n\
                      subjectKeyIdentifier=hash\n\
                      [server]\nbasicConstraints=CA:false\nkeyUsage=critical,digitalSignature\n\
                      extendedKeyUsage=serverAuth\nsubjectAltName=DNS:localhost,IP:127.0.0.1\n\
                      [client]\nbasicConstraints=CA:false\nkeyUsage=critical,digitalSignature\n\
                      extendedKeyUsage=clientAuth\nsubjectAltName=DNS:client\n";
        std::fs::write(dir.join("openssl.cnf"), config).expect("the sandbox can be written");
        let authority = Self { dir };
        authority.key("ca-key.pem");
        authority.openssl(&format!(
            "req -x509 -config openssl.cnf -extensions authority -key ca-key.pem -subj /CN={name} -days 2 -out ca-cert.pem"
        ));
        authority
    }

    fn openssl(&self, arguments: &str) {
        succeed(Command::new("openssl").current_dir(&self.dir).args(arguments.split_whitespace()));
    }

    fn key(&self, path: &str) {
        self.openssl(&format!("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {path}"));
    }

    /// Makes a directory with the authority's certificate and what `holder` gets.
    #[must_use]
    pub fn issue(&self, to: &Path, holder: Holder) -> PathBuf {
        std::fs::create_dir(to).expect("the sandbox can be written");
        std::fs::copy(self.dir.join("ca-cert.pem"), to.join("ca-cert.pem")).expect("just made");
        let name = match holder {
            Holder::Server => "server",
            Holder::Client => "client",
            Holder::Nobody => return to.to_owned(),
        };
        let (key, certificate) = (to.join(format!("{name}-key.pem")), to.join(format!("{name}-cert.pem")));
        let (key, certificate) = (key.display(), certificate.display());
        self.key(&key.to_string());
        self.openssl(&format!("req -new -config openssl.cnf -key {key} -subj /CN={name} -out request.pem"));
        self.openssl(&format!(
            "x509 -req -in request.pem -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 \
             -extfile openssl.cnf -extensions {name} -out {certificate}"
        ));
        to.to_owned()
    }

    /// Writes a list to `to` that revokes the client's certificate in the directory `of`.
    pub fn revoke(&self, of: &Path, to: &Path) {
        let certificate = of.join("client-cert.pem");
        let signed = "-config openssl.cnf -cert ca-cert.pem -keyfile ca-key.pem";
        self.openssl(&format!("ca {signed} -revoke {}", certificate.display()));
        self.openssl(&format!("ca {signed} -gencrl -out {}", to.display()));
    }
}
