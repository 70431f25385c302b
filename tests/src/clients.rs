//! Real Kafka clients as tests use them (kcat, kafka-python, confluent-kafka, Java's tools), the broker they talk to,
//! and the text they send.
//!
//! The peers' software lies where `tests/run` put it. With `DECALOG_TEST_BROKER=kafka` a [`Broker`] is Apache Kafka
//! itself, so that a test of ours is first shown to be right about Kafka: tests that need what only our broker has (a
//! volume) ask [`Broker::is_kafka`].

use crate::process::{Ended, Sandbox, Server, binary, free_port, left_out, run_within, succeed};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Where `tests/run` puts the peers' software.
#[must_use]
pub fn peers() -> PathBuf {
    if let Some(dir) = std::env::var_os("DECALOG_PEERS") {
        return dir.into();
    }
    let me = binary("broker");
    me.ancestors().nth(2).expect("a binary lies in target/PROFILE").join("peers")
}

fn peer(path: &str) -> PathBuf {
    let path = peers().join(path);
    assert!(path.exists(), "{} is not there: run tests/run, which fetches it", path.display());
    path
}

/// Lines of real text, written to `path`: Debian's package index without its empty lines (kcat sends none), over a
/// million lines and some 50 MB, or its first `most` lines. Gives the number of lines.
// It is called for the file; not every caller wants the count.
#[allow(clippy::must_use_candidate)]
pub fn text(path: &Path, most: usize) -> usize {
    let mut index = Command::new("apt-cache")
        .arg("dumpavail")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("apt-cache: {e}"));
    let lines = BufReader::new(index.stdout.take().expect("stdout was asked for as a pipe")).split(b'\n');
    let mut out = BufWriter::new(std::fs::File::create(path).expect("the sandbox can be written"));
    let mut count = 0;
    for line in
        lines.map(|line| line.expect("the index can be read")).filter(|line| !line.is_empty()).take(most)
    {
        out.write_all(&line).and_then(|()| out.write_all(b"\n")).expect("the sandbox has room");
        count += 1;
    }
    out.flush().expect("the sandbox has room");
    // It may still be writing, when only the first lines were wanted: its status says nothing then.
    drop(index.kill());
    drop(index.wait());
    assert!(count >= most.min(1_000_000), "the package index has only {count} lines: run `apt-get update`");
    count
}

/// How many lines a test that wants all of [`text`] takes: all, or in a quick run a part.
#[must_use]
pub fn all_lines() -> usize {
    if left_out("all of the text but its first 50,000 lines") { 50_000 } else { usize::MAX }
}

/// How a [`Broker`] keeps its logs.
#[derive(Debug, Clone)]
pub enum Logs {
    /// On a volume of these members; absent ones are made with this size, in the notation of the command line.
    Volume(Vec<PathBuf>, &'static str),
    /// In a directory.
    Directory(PathBuf),
}

/// A broker under test; killed when dropped.
#[derive(Debug)]
pub struct Broker {
    /// The process.
    pub server: Server,
    port: u16,
    settings: Vec<String>,
    logs: Logs,
}

impl Broker {
    /// Whether the broker under test is Apache Kafka, to calibrate a test.
    #[must_use]
    pub fn is_kafka() -> bool {
        std::env::var_os("DECALOG_TEST_BROKER").is_some_and(|name| name == "kafka")
    }

    /// One on a new volume of four members, with Kafka's settings `KEY=VALUE`.
    #[must_use]
    pub fn start(sandbox: &Sandbox, settings: &[&str]) -> Self {
        // Sparse: a test pays for what it writes.
        Self::start_on(sandbox, Logs::Volume(sandbox.images(4), "1G"), settings)
    }

    /// One on the given logs, new or not.
    #[must_use]
    pub fn start_on(sandbox: &Sandbox, logs: Logs, settings: &[&str]) -> Self {
        let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
        let port = free_port();
        let server = launch(sandbox, &logs, &settings, port);
        Self { server, port, settings, logs }
    }

    /// Apache Kafka itself, with the given log directory.
    #[must_use]
    pub fn kafka(sandbox: &Sandbox, logs: &Path, settings: &[&str]) -> Self {
        // Of two lines with one key, the last one counts.
        let log_dirs = format!("log.dirs={}", logs.display());
        let settings =
            settings.iter().map(|&setting| setting.to_owned()).chain([log_dirs]).collect::<Vec<_>>();
        let port = free_port();
        let server = launch_kafka(sandbox, &settings, port);
        Self { server, port, settings, logs: Logs::Directory(logs.to_owned()) }
    }

    /// Apache Kafka itself on a log directory that is formatted and full already, in the cluster with this id. `topics` are
    /// batches of `KRaft`'s metadata records that tell it which topics there are.
    #[must_use]
    pub fn kafka_on(sandbox: &Sandbox, logs: &Path, cluster: &str, topics: &[u8]) -> Self {
        let (meta, port) = (sandbox.join("kafka-meta"), free_port());
        let settings =
            vec![format!("log.dirs={}", logs.display()), format!("metadata.log.dir={}", meta.display())];
        let properties = sandbox.join("server.properties");
        write_properties(sandbox, &properties, &settings, port);
        succeed(&mut kafka_format(sandbox, &properties, cluster));
        // What a controller begins its metadata log with.
        let bootstrap = std::fs::File::options().append(true).open(meta.join("bootstrap.checkpoint"));
        bootstrap.expect("Kafka's format writes it").write_all(topics).expect("the sandbox has room");
        let server = start_kafka(sandbox, &properties, port);
        Self { server, port, settings, logs: Logs::Directory(logs.to_owned()) }
    }

    /// The process again on the same port and logs, after `end` has ended it.
    #[must_use]
    pub fn restarted(self, sandbox: &Sandbox, end: impl FnOnce(Server)) -> Self {
        let Self { server, port, settings, logs } = self;
        end(server);
        let server = launch(sandbox, &logs, &settings, port);
        Self { server, port, settings, logs }
    }

    /// SIGTERM; it must end in order.
    pub fn stop(self) {
        orderly(self.server);
    }

    /// The address for clients.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The port for clients.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// kcat with this broker and the given arguments, separated by white space.
    #[must_use]
    pub fn kcat(&self, sandbox: &Sandbox, arguments: &str) -> Command {
        let mut command = sandbox.command("kcat");
        command.args(["-b", &self.address()]).args(arguments.split_whitespace());
        command
    }

    /// `tests/peers/client.py ACTION LIBRARY` with this broker and the further arguments.
    #[must_use]
    pub fn python(&self, sandbox: &Sandbox, action: &str, library: &str, arguments: &[&str]) -> Command {
        let mut command = sandbox.command(peer("venv/bin/python"));
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/client.py"));
        command.args([action, library, &self.address()]).args(arguments);
        command
    }

    /// One of Kafka's own tools with this broker: the class under `org.apache.kafka.tools`, then its arguments,
    /// separated by white space.
    #[must_use]
    pub fn java(&self, sandbox: &Sandbox, class: &str, arguments: &str) -> Command {
        let mut command = java(sandbox);
        command.arg(format!("org.apache.kafka.tools.{class}"));
        command.args(["--bootstrap-server", &self.address()]).args(arguments.split_whitespace());
        command
    }
}

/// One of Kafka's tools that needs no broker: the class under `org.apache.kafka.tools`, and its arguments.
#[must_use]
pub fn kafka_tool(sandbox: &Sandbox, class: &str, arguments: &[&str]) -> Command {
    let mut command = java(sandbox);
    command.arg(format!("org.apache.kafka.tools.{class}")).args(arguments);
    command
}

/// SIGTERM, and an orderly end: status 0 from ours; the JVM says 143 for Kafka.
pub fn orderly(server: Server) {
    if Broker::is_kafka() {
        drop(server.terminate());
    } else {
        server.stop();
    }
}

/// The arguments of `broker serve` for these logs, settings and port.
#[must_use]
pub fn serve(sandbox: &Sandbox, logs: &Logs, settings: &[&str], port: u16) -> Command {
    let mut command = sandbox.broker();
    command.arg("serve");
    match logs {
        Logs::Volume(members, size) => command.arg("--volume").args(members).args(["--create-size", size]),
        Logs::Directory(dir) => command.arg("--data-dir").arg(dir),
    };
    command.args([
        "--listen",
        &format!("127.0.0.1:{port}"),
        "--admin",
        &format!("127.0.0.1:{}", free_port()),
    ]);
    for setting in settings {
        command.args(["--set", setting]);
    }
    command
}

fn launch(sandbox: &Sandbox, logs: &Logs, settings: &[String], port: u16) -> Server {
    if Broker::is_kafka() {
        return launch_kafka(sandbox, settings, port);
    }
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    Server::start(&mut serve(sandbox, logs, &settings, port))
}

/// A JVM that starts fast and stays small: many run at once here, on few cores.
fn java(sandbox: &Sandbox) -> Command {
    let mut command = sandbox.command("java");
    command.args(["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-cp"]);
    command.arg(peer("kafka").join("*"));
    command
}

fn launch_kafka(sandbox: &Sandbox, settings: &[String], port: u16) -> Server {
    let properties = sandbox.join("server.properties");
    if !properties.exists() {
        write_properties(sandbox, &properties, settings, port);
        succeed(&mut kafka_format(sandbox, &properties, "MkU3OEVBNTcwNTJENDM2Qg"));
    }
    start_kafka(sandbox, &properties, port)
}

fn write_properties(sandbox: &Sandbox, properties: &Path, settings: &[String], port: u16) {
    let controller = free_port();
    let logs = sandbox.join("kafka-logs");
    let mut text = format!(
        "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:{controller}\n\
         listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
         controller.listener.names=CONTROLLER\ninter.broker.listener.name=PLAINTEXT\nlog.dirs={}\n\
         offsets.topic.replication.factor=1\ntransaction.state.log.replication.factor=1\n\
         transaction.state.log.min.isr=1\n",
        logs.display()
    );
    for setting in settings {
        text.push_str(setting);
        text.push('\n');
    }
    std::fs::write(properties, text).expect("the sandbox can be written");
}

/// Kafka's own formatting of what is not formatted yet.
fn kafka_format(sandbox: &Sandbox, properties: &Path, cluster: &str) -> Command {
    let mut format = java(sandbox);
    format
        .args(["kafka.tools.StorageTool", "format", "--ignore-formatted", "-t", cluster, "-c"])
        .arg(properties);
    format
}

fn start_kafka(sandbox: &Sandbox, properties: &Path, port: u16) -> Server {
    // Kafka logs nothing here without a logging backend: ready is when it takes connections.
    let server = Server::spawn(java(sandbox).arg("kafka.Kafka").arg(properties));
    crate::process::eventually("Kafka to listen", crate::process::PATIENCE, || {
        std::net::TcpStream::connect(("127.0.0.1", port)).ok()
    });
    server
}

/// Runs a client that must succeed within a time that only a hung one needs; panics with all it said.
pub fn client(command: &mut Command) -> String {
    let ended = client_ended(command);
    assert!(
        ended.status.success(),
        "{command:?}: {}\nstdout: {}\nstderr: {}",
        ended.status,
        tail(&ended.stdout),
        tail(&ended.stderr)
    );
    ended.stdout
}

/// Runs a client to its end, whatever that is.
#[must_use]
pub fn client_ended(command: &mut Command) -> Ended {
    run_within(command, Duration::from_secs(300))
}

fn tail(text: &str) -> &str {
    let from = text.len().saturating_sub(4000);
    let from = (from..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
    &text[from..]
}

/// One record as `client.py` reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Its value, as text.
    pub value: String,
}

/// The records of a file that `client.py consume` wrote, in order of arrival.
#[must_use]
pub fn records_of(path: &Path) -> Vec<Record> {
    let file = std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let lines = BufReader::new(file).lines().map(|line| line.expect("the text is UTF-8"));
    lines.map(|line| record_of(&line).unwrap_or_else(|| panic!("not a record: {line}"))).collect()
}

/// A record from its line `PARTITION OFFSET VALUE`.
#[must_use]
pub fn record_of(line: &str) -> Option<Record> {
    let mut parts = line.splitn(3, ' ');
    let partition = parts.next()?.parse().ok()?;
    let offset = parts.next()?.parse().ok()?;
    Some(Record { partition, offset, value: parts.next()?.to_owned() })
}

/// What the broker acknowledged, from the file that `client.py produce` wrote: (line number, partition, offset).
/// A last line that is not whole, of a client that was killed, is left out.
#[must_use]
pub fn acked_of(path: &Path) -> Vec<(usize, i32, i64)> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let parse = |line: &str| {
        let mut parts = line.split(' ');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    whole
        .lines()
        .map(|line| parse(line).unwrap_or_else(|| panic!("not an acknowledgement: {line}")))
        .collect()
}

/// The lines of a text file.
#[must_use]
pub fn lines_of(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines().map(str::to_owned).collect()
}
