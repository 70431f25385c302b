//! NBD under TLS: real clients with and without certificates, over TCP and Unix sockets; and that nothing is told or
//! served to whoever has not come under it.

use raid::nbd::wire::{ClientOption, ExportQuery, Style};
use raid::nbd::{Address, Limits, Security};
use std::path::{Path, PathBuf};
use tests::nbd::{SIZE, Serving};
use tests::process::{Sandbox, Server, assert_refusal, free_port, refuse, run, succeed};
use tests::tls::{Authority, Holder};
use tests::volumes::create;

/// A server under TLS with its clients' certificates.
struct Secured {
    serving: Serving,
    port: u16,
    /// A client's certificates, signed by the server's authority.
    friend: PathBuf,
    /// Those of nobody: they only know whom to trust.
    anonymous: PathBuf,
}

impl Secured {
    fn start(required: bool, verify_peer: bool) -> Self {
        let sandbox = Sandbox::new();
        let authority = Authority::new(&sandbox, "ca");
        let own = authority.issue(&sandbox.join("server"), Holder::Server);
        let friend = authority.issue(&sandbox.join("friend"), Holder::Client);
        let anonymous = authority.issue(&sandbox.join("anonymous"), Holder::Nobody);
        let security = Security::with_certificates(&own, required, verify_peer).expect("just issued");
        let port = free_port();
        let tcp = [Address::Tcp(format!("127.0.0.1:{port}"))];
        let serving = Serving::start_at(sandbox, Limits::standard(), false, &tcp, security);
        Self { serving, port, friend, anonymous }
    }

    /// URIs over both kinds of socket, with the certificates in `dir`.
    fn uris(&self, dir: &Path) -> [String; 2] {
        let (socket, dir) = (self.serving.socket(), dir.display());
        [
            format!("nbds://localhost:{}/vol?tls-certificates={dir}", self.port),
            format!("nbds+unix://localhost/vol?socket={}&tls-certificates={dir}", socket.display()),
        ]
    }

    fn info(&self, uri: &str) -> tests::process::Ended {
        run(self.serving.sandbox.command("nbdinfo").args(["--json", uri]))
    }
}

#[test]
fn libnbds_tools_copy_under_tls_there_and_back() {
    let secured = Secured::start(true, false);
    let sandbox = &secured.serving.sandbox;
    let source = sandbox.join("source");
    tests::volumes::pattern(&source, SIZE, 5);
    for (i, uri) in secured.uris(&secured.anonymous).iter().enumerate() {
        let json: serde_json::Value =
            serde_json::from_str(&succeed(sandbox.command("nbdinfo").args(["--json", uri]))).unwrap();
        assert_eq!(json["TLS"], true);
        assert_eq!(json["structured"], true);
        assert_eq!(json["exports"][0]["export-size"], SIZE);
        let back = sandbox.join(format!("back{i}"));
        let copy = |from: &Path, to: &Path| {
            let mut command = sandbox.command("nbdcopy");
            succeed(command.args(["--connections=2", "--requests=32", "--flush"]).arg(from).arg(to));
        };
        copy(&source, Path::new(uri));
        copy(Path::new(uri), &back);
        assert!(std::fs::read(&source).unwrap() == std::fs::read(&back).unwrap());
        let list = succeed(sandbox.command("nbdinfo").args(["--list", uri]));
        assert!(list.contains("under test"), "{list}");
    }
}

#[test]
fn qemu_speaks_tls_with_a_certificate_of_its_own() {
    let secured = Secured::start(true, true);
    let sandbox = &secured.serving.sandbox;
    let credentials = |dir: &Path| format!("tls-creds-x509,id=t,endpoint=client,dir={}", dir.display());
    let places = [
        format!("server.type=inet,server.host=localhost,server.port={}", secured.port),
        format!("server.type=unix,server.path={},tls-hostname=localhost", secured.serving.socket().display()),
    ];
    for place in &places {
        let image = format!("driver=nbd,{place},export=vol,tls-creds=t");
        let io = |dir: &Path, steps: &[&str]| {
            let mut command = sandbox.command("qemu-io");
            command.args(["--object", &credentials(dir), "--image-opts", &image]);
            for step in steps {
                command.args(["-c", step]);
            }
            run(&mut command)
        };
        let done = io(&secured.friend, &["write -P 7 1M 3M", "read -P 7 1M 3M", "write -z 1M 1M", "flush"]);
        assert!(done.status.success() && !done.stdout.contains("failed"), "{done:?}");
        let refused = io(&secured.anonymous, &["read 0 512"]);
        assert!(!refused.status.success(), "{refused:?}");
    }
    assert!(secured.serving.gate.asked().iter().filter(|asked| asked.starts_with("write")).count() >= 2);
}

#[test]
fn peers_are_told_apart_by_who_signed_their_certificates() {
    let secured = Secured::start(true, true);
    let sandbox = &secured.serving.sandbox;
    let stranger_authority = Authority::new(sandbox, "other-ca");
    let stranger = stranger_authority.issue(&sandbox.join("stranger"), Holder::Client);
    // Trusts our server, but was signed by somebody else.
    std::fs::copy(secured.friend.join("ca-cert.pem"), stranger.join("ca-cert.pem")).unwrap();
    for at in 0..2 {
        let told = secured.info(&secured.uris(&secured.friend)[at]);
        assert!(told.status.success(), "{told:?}");
        for dir in [&stranger, &secured.anonymous] {
            let told = secured.info(&secured.uris(dir)[at]);
            assert!(!told.status.success() && !told.stdout.contains("export"), "{told:?}");
        }
        // In plain text nothing is told either.
        let plain = secured.uris(&secured.friend)[at].replacen("nbds", "nbd", 1);
        let told = secured.info(&plain);
        assert!(!told.status.success() && !told.stdout.contains("export"), "{told:?}");
    }
}

#[test]
fn a_certificate_that_was_revoked_opens_nothing() {
    let sandbox = Sandbox::new();
    let authority = Authority::new(&sandbox, "ca");
    let own = authority.issue(&sandbox.join("server"), Holder::Server);
    let friend = authority.issue(&sandbox.join("friend"), Holder::Client);
    let former = authority.issue(&sandbox.join("former"), Holder::Client);
    authority.revoke(&former, &own.join("ca-crl.pem"));
    let security = Security::with_certificates(&own, true, true).unwrap();
    let serving = Serving::start_at(sandbox, Limits::standard(), false, &[], security);
    let info = |dir: &Path| {
        let socket = serving.socket();
        let uri = format!(
            "nbds+unix://localhost/vol?socket={}&tls-certificates={}",
            socket.display(),
            dir.display()
        );
        run(serving.sandbox.command("nbdinfo").arg(uri))
    };
    assert!(info(&friend).status.success(), "{:?}", info(&friend));
    assert!(!info(&former).status.success());
}

#[test]
fn where_tls_is_offered_plain_text_is_served_too() {
    let secured = Secured::start(false, false);
    for uri in secured.uris(&secured.anonymous) {
        let told = secured.info(&uri);
        assert!(told.status.success() && told.stdout.contains("\"TLS\": true"), "{told:?}");
    }
    secured.serving.assert_alive();
}

#[test]
fn before_tls_a_required_server_says_nothing_and_its_clients_cost_nothing() {
    let secured = Secured::start(true, false);
    let serving = &secured.serving;
    let query = || ExportQuery { name: "vol".into(), information: vec![1, 2, 3] };
    let mut client = serving.connect();
    client.greet(3);
    for option in [
        ClientOption::List,
        ClientOption::Info(query()),
        ClientOption::Go(query()),
        ClientOption::StructuredReply,
        ClientOption::Unknown(99),
    ] {
        client.option(&option);
        let (kind, text) = client.option_reply();
        assert_eq!(kind, (1 << 31) + 5, "{option:?}");
        assert!(!String::from_utf8_lossy(&text).contains("vol"));
    }
    client.option(&ClientOption::ExportName("vol".into()));
    client.assert_closed();
    // What comes in plain text behind STARTTLS, or instead of its first record, ends the session.
    let mut client = serving.connect();
    client.greet(3);
    let mut bytes = Vec::new();
    ClientOption::StartTls.encode(&mut bytes);
    ClientOption::Go(query()).encode(&mut bytes);
    client.put(&bytes);
    assert_eq!(client.option_reply().0, 1);
    client.assert_closed();
    let mut client = serving.connect();
    client.greet(3);
    client.option(&ClientOption::StartTls);
    assert_eq!(client.option_reply().0, 1);
    client.put(&[0x41; 4096]);
    let mut rest = Vec::new();
    // An alert, at most.
    drop(std::io::Read::read_to_end(&mut client.stream, &mut rest));
    assert!(rest.len() < 64, "{} bytes", rest.len());
    // Silence within TLS counts as silence: the same deadline.
    let told = secured.info(&secured.uris(&secured.anonymous)[1]);
    assert!(told.status.success(), "{told:?}");
    // Negotiated before, forgotten with it: a client that asks for chunks before TLS is refused here, and where TLS is
    // offered it starts anew (the handshake's own tests).
    assert_eq!(Style::Simple, serving.connect().style);
}

#[test]
fn the_command_line_takes_what_nbdkits_users_give_it() {
    let sandbox = Sandbox::new();
    let images = sandbox.images(2);
    create(&sandbox, &images, "--size 16M --name vol");
    let authority = Authority::new(&sandbox, "ca");
    let own = authority.issue(&sandbox.join("server"), Holder::Server);
    let friend = authority.issue(&sandbox.join("friend"), Holder::Client);
    let port = free_port();
    let serve = |arguments: &str| {
        let mut command = sandbox.raid10();
        command.arg("serve").args(&images).args(arguments.split_whitespace());
        command
    };
    let (dir, friends) = (own.display(), friend.display());
    // Off loopback it is TLS or in so many words.
    let everywhere = format!("--nbd tcp:0.0.0.0:{port}");
    for tls in [String::new(), format!("--tls on --tls-certificates {dir}")] {
        let said = refuse(&mut serve(&format!("{everywhere} {tls}")), 1);
        assert!(said.contains("--insecure-tcp") && said.contains("--tls-certificates"), "{said}");
    }
    let mut command =
        serve(&format!("{everywhere} --tls require --tls-certificates {dir} --tls-verify-peer"));
    let server = Server::start(&mut command);
    let uri = format!("nbds://localhost:{port}/vol");
    let info = |parameters: String| run(sandbox.command("nbdinfo").arg(format!("{uri}{parameters}")));
    let told = info(format!("?tls-certificates={friends}"));
    assert!(told.status.success() && told.stdout.contains("RAID 10"), "{told:?}");
    let plain = run(sandbox.command("nbdinfo").arg(format!("nbd://localhost:{port}/vol")));
    assert!(!plain.status.success(), "{plain:?}");
    assert!(server.stderr().contains("nbds://"), "{}", server.stderr());
    server.stop();
    // Certificates alone mean that they are required.
    let server = Server::start(&mut serve(&format!("--nbd unix:nbd --tls-certificates {dir}")));
    let plain = run(sandbox.command("nbdinfo").arg("nbd+unix:///vol?socket=nbd"));
    assert!(!plain.status.success(), "{plain:?}");
    server.stop();
    // Wrong usage, and files that do not do: one line that names the file.
    for arguments in
        ["--tls require", "--tls on", &format!("--tls on --tls-certificates {dir} --tls-verify-peer")]
    {
        let ended = run(&mut serve(arguments));
        assert_refusal(arguments, &ended, 2);
    }
    refuse(&mut serve("--tls-verify-peer"), 2);
    let broken = sandbox.join("broken");
    std::fs::create_dir(&broken).unwrap();
    let arguments = format!("--tls-certificates {} --tls-verify-peer", broken.display());
    let said = refuse(&mut serve(&arguments), 1);
    assert!(said.contains("server-cert.pem"), "{said}");
    // What is put there next, from the good directory or in words, and which file is at fault then.
    for (name, from, text, fault) in [
        ("server-cert.pem", None, "nothing", "server-cert.pem"),
        ("server-cert.pem", Some("server-cert.pem"), "", "server-key.pem"),
        ("server-key.pem", None, "nothing", "server-key.pem"),
        ("server-key.pem", Some("server-key.pem"), "", "ca-cert.pem"),
        ("ca-cert.pem", None, "-----BEGIN CERTIFICATE-----\n!\n", "ca-cert.pem"),
        ("ca-cert.pem", Some("server-key.pem"), "", "ca-cert.pem"),
    ] {
        let content = from.map_or(text.into(), |from| std::fs::read(own.join(from)).unwrap());
        std::fs::write(broken.join(name), content).unwrap();
        let said = refuse(&mut serve(&arguments), 1);
        assert!(said.contains(fault), "{said}");
    }
    let status = succeed(sandbox.raid10().args(["status", "--json"]).arg(&images[0]));
    assert!(status.contains("\"clean\""), "{status}");
}
