//! The `broker` command: opens a home for the log, serves Kafka clients from it, and closes it in order.

use broker::admin::Admin;
use broker::cli::{Cli, Command, Serve};
use broker::config::ConfigError;
use broker::log::{Log, LogError};
use broker::server::Server;
use broker::volume::{self, OpenError, Opened};
use broker::{Broker, Config, Endpoint, admin};
use clap::Parser;
use logstore::{Home, Store, StoreOptions};
use raid::control::{self, ControlServer, Handles, OnEvent, Program, StopHandle, read_write};
use raid::device::{Caching, Device};
use raid::runtime::{Runtime, TokioRuntime};
use raid::status::Status;
use raid::volume::Volume;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Why the broker does not run, or did not end well.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{0}: write it as HOST:PORT")]
    Address(String),
    #[error("--listen {0} is no address that clients can connect to: add --advertise HOST:PORT")]
    Unadvertised(String),
    #[error(
        "cannot listen on {address}: it is in use; stop what listens there, or choose another with {option} HOST:PORT"
    )]
    AddressInUse { address: String, option: &'static str },
    #[error("cannot listen on {address}: {cause}; choose another with {option} HOST:PORT")]
    Listen { address: String, cause: io::Error, option: &'static str },
    #[error(transparent)]
    Volume(#[from] OpenError),
    #[error("--data-dir {0} is a file: name a directory, or use --volume for members of an array")]
    NotDirectory(String),
    #[error(transparent)]
    OnEvent(raid::Error),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("cannot open the log: {0}")]
    Store(#[from] logstore::Error),
    #[error("the log did not close cleanly, the next start will check it: {0}")]
    Close(logstore::Error),
    #[error("the volume did not stop cleanly, the next start will resync it: {0}")]
    Stop(raid::Error),
    #[error("{doing}: {cause}")]
    System { doing: &'static str, cause: io::Error },
}

fn main() -> ExitCode {
    let command = Cli::parse().command();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    let outcome = match &command {
        Command::Serve(serve) => start(serve),
        Command::Log(log) => look(log),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("broker: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn look(log: &Log) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(raid::device::BLOCKING_THREADS)
        .enable_all()
        .build()
        .map_err(|cause| Failure::System { doing: "cannot start threads", cause })?;
    Ok(runtime.block_on(broker::log::run(log))?)
}

fn start(serve: &Serve) -> Result<(), Failure> {
    let config = Config::load(serve.config.as_deref(), &serve.set)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.network_threads as usize)
        .max_blocking_threads(raid::device::BLOCKING_THREADS)
        .thread_name("broker")
        .enable_all()
        .build()
        .map_err(|cause| Failure::System { doing: "cannot start threads", cause })?;
    let outcome = runtime.block_on(run(serve, config));
    // Everything is closed: whatever still blocks is of no consequence.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn run(serve: &Serve, config: Config) -> Result<(), Failure> {
    // Signals and sockets first: a port that is taken must not cost a recovery of the log.
    let system = |cause| Failure::System { doing: "cannot handle signals", cause };
    let mut terminate = signal(SignalKind::terminate()).map_err(system)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system)?;
    let server = Server::bind(&serve.listen).await.map_err(cannot_listen(&serve.listen, "--listen"))?;
    let pages = TcpListener::bind(&serve.admin).await.map_err(cannot_listen(&serve.admin, "--admin"))?;
    let listening = server
        .local_addr()
        .map_err(|cause| Failure::System { doing: "cannot tell the listening address", cause })?;
    let advertised = endpoint(serve, listening.port())?;
    let program = serve.on_event.as_deref().map(Program::find).transpose().map_err(Failure::OnEvent)?;

    let engine: Arc<dyn Runtime> = Arc::new(TokioRuntime::current());
    let (home, volume) = open_home(serve, &engine).await?;
    let on_event = program
        .zip(volume.as_ref())
        .map(|(program, volume)| OnEvent::start(program, volume.name(), volume.uuid(), volume.events()));
    let stop = StopHandle::new();
    let control = match &volume {
        Some(volume) => open_control(volume, &stop).await,
        None => None,
    };
    let asked = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = stop.requested() => {}
        }
    };
    let sockets = Sockets { server, pages, listening, advertised };
    let outcome = serve_log(home, volume.clone(), sockets, config, engine, asked).await;
    // The volume is stopped whether or not all went well with the log: its state is its own.
    if let Some(volume) = volume {
        let stopped = volume.stop().await;
        stop.report(&stopped);
        if let Some(control) = control {
            control.close().await;
        }
        if let Some(on_event) = on_event {
            on_event.close().await;
        }
        stopped.map_err(Failure::Stop)?;
    }
    outcome
}

/// A sentence for an address that cannot be bound.
fn cannot_listen(address: &str, option: &'static str) -> impl FnOnce(io::Error) -> Failure {
    let address = address.to_owned();
    move |cause| match cause.kind() {
        io::ErrorKind::AddrInUse => Failure::AddressInUse { address, option },
        io::ErrorKind::InvalidInput => Failure::Address(format!("{option} {address}")),
        _ => Failure::Listen { address, cause, option },
    }
}

/// What was bound before anything was opened.
struct Sockets {
    server: Server,
    pages: TcpListener,
    listening: SocketAddr,
    advertised: Endpoint,
}

/// Serves the log at `home` until `asked` to stop, and closes it.
async fn serve_log(
    home: Home,
    volume: Option<Arc<Volume>>,
    sockets: Sockets,
    config: Config,
    engine: Arc<dyn Runtime>,
    asked: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let options = StoreOptions {
        topic_defaults: config.topic_defaults()?,
        producer_expiration: Duration::from_millis(config.producer_id_expiration_ms as u64),
        commit_linger: Duration::from_millis(config.log_commit_linger_ms as u64),
        verify_interval: config.verify_interval(),
        scrub: config.scrub(),
        cleaner: config.cleaner(),
    };
    let directory = match &home {
        Home::Directory(directory) => Some(directory.display().to_string()),
        Home::Volume(_) => None,
    };
    let store = Store::open(home, options, Arc::clone(&engine)).await?;
    if let Some(volume) = &volume {
        // Recovery has chosen the good ones among copies that differ of what it read.
        let (volume, store) = (Arc::downgrade(volume), Arc::downgrade(&store));
        engine.spawn(Box::pin(volume::resync_when_settled(volume, store, Arc::clone(&engine))));
    }
    // Said once it is true: a start that fails says one line.
    if let Some(directory) = directory {
        eprintln!("broker: log in {directory}");
    }
    let broker = match Broker::new(config, Arc::clone(&store), sockets.advertised, engine).await {
        Ok(broker) => broker,
        Err(error) => {
            store.close().await.map_err(Failure::Close)?;
            return Err(error.into());
        }
    };
    let admin_address = sockets
        .pages
        .local_addr()
        .map_err(|cause| Failure::System { doing: "cannot tell the address of metrics and status", cause })?;
    eprintln!("broker: listening on {}, metrics and status on http://{admin_address}", sockets.listening);
    let pages = Admin { broker: Arc::clone(&broker), volume };
    let admin = tokio::spawn(admin::serve(sockets.pages, pages));
    let serving = tokio::spawn(sockets.server.run(Arc::clone(&broker)));
    if let Err(cause) = ready() {
        // Nobody reads what we say: a closed pipe is no reason to go.
        tracing::warn!(%cause, "cannot write to stdout");
    }
    asked.await;
    broker.stop();
    for task in [serving.await.map(Ok), admin.await] {
        match task {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => tracing::warn!(%fault, "a server ended badly"),
            Err(fault) => tracing::error!(%fault, "a server's task failed"),
        }
    }
    store.close().await.map_err(Failure::Close)
}

/// Lets `raid10` find the volume. Clients are served without it, too.
async fn open_control(volume: &Arc<Volume>, stop: &StopHandle) -> Option<ControlServer> {
    let handles = Handles { stop: stop.clone(), open: read_write(Caching::PageCache), attach: None };
    match control::serve(Arc::clone(volume), handles).await {
        Ok(control) => Some(control),
        Err(error) => {
            eprintln!(
                "broker: `raid10 status`, `raid10 stop` and the like will not see this volume: {error}"
            );
            None
        }
    }
}

async fn open_home(serve: &Serve, engine: &Arc<dyn Runtime>) -> Result<(Home, Option<Arc<Volume>>), Failure> {
    if let Some(directory) = &serve.data_dir {
        if directory.exists() && !directory.is_dir() {
            return Err(Failure::NotDirectory(directory.display().to_string()));
        }
        return Ok((Home::Directory(directory.clone()), None));
    }
    let opened = volume::open(&serve.volume, serve.create_size, Arc::clone(engine)).await?;
    introduce(&opened);
    let device: Arc<dyn Device> = opened.volume.clone();
    Ok((Home::Volume(device), Some(opened.volume)))
}

/// One line about the volume, and one more if something is missing.
fn introduce(opened: &Opened) {
    let status = opened.volume.status();
    let how = if opened.created { ", made just now" } else { "" };
    let gib = status.size as f64 / f64::from(1u32 << 30);
    eprintln!(
        "broker: array {} ({}), {}, {gib:.1} GiB on {} members{how}",
        status.name,
        status.uuid,
        status.state,
        status.members.len()
    );
    if let Some(line) = missing(opened, &status) {
        eprintln!("broker: {line}");
    }
}

/// What is missing, what that means, and what to do.
fn missing(opened: &Opened, status: &Status) -> Option<String> {
    let paths: Vec<String> = opened.missing.iter().map(|p| p.display().to_string()).collect();
    (!paths.is_empty()).then(|| {
        format!(
            "running degraded, without {}: all data is served from the mirrors, and one more loss may end that; \
             `raid10 add {} PATH` puts a new file or device in its place",
            paths.join(", "),
            status.name
        )
    })
}

/// What clients are told to connect to.
fn endpoint(serve: &Serve, port: u16) -> Result<Endpoint, Failure> {
    let address = serve.advertise.as_deref().unwrap_or(&serve.listen);
    let (host, wanted) = address.rsplit_once(':').ok_or_else(|| Failure::Address(address.to_owned()))?;
    let wanted: u16 = wanted.parse().map_err(|_| Failure::Address(address.to_owned()))?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    if serve.advertise.is_some() {
        if host.is_empty() || wanted == 0 {
            return Err(Failure::Address(address.to_owned()));
        }
        return Ok(Endpoint { host, port: wanted });
    }
    if matches!(host.as_str(), "" | "0.0.0.0" | "::") {
        return Err(Failure::Unadvertised(serve.listen.clone()));
    }
    Ok(Endpoint { host, port })
}

fn ready() -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "ready")?;
    out.flush()
}
