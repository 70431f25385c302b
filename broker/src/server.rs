//! The listening socket: takes connections in, and on the way down waits for them to finish.

use crate::broker::Broker;
use crate::connection;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// How long connections may take to finish when the broker stops.
const DRAIN: Duration = Duration::from_secs(10);

/// A pause when the system refuses more descriptors; connections that end meanwhile free some.
const EXHAUSTED: Duration = Duration::from_millis(50);

/// A bound listening socket.
pub struct Server {
    listener: TcpListener,
}

impl Server {
    /// Binds `address`, `HOST:PORT`.
    pub async fn bind(address: &str) -> io::Result<Self> {
        Ok(Self { listener: TcpListener::bind(address).await? })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until the broker stops, then drains.
    pub async fn run(self, broker: Arc<Broker>) {
        let places =
            Arc::new(Semaphore::new((broker.config.max_connections as usize).min(Semaphore::MAX_PERMITS)));
        let mut stopping = broker.stopping();
        let mut connections = JoinSet::new();
        let timers = tokio::spawn(Arc::clone(&broker.groups).run_timers());
        let retention = tokio::spawn(Arc::clone(&broker).enforce_retention());
        if broker.config.log_cleaner_enable {
            // Not waited for: closing the store ends it.
            drop(tokio::spawn(Arc::clone(&broker).compact()));
        }
        if broker.store.keeps_checkpoints() {
            for (of, interval) in broker.config.checkpoints() {
                // Not waited for either: closing the store writes the last one.
                drop(tokio::spawn(Arc::clone(&broker).checkpoint(of, interval)));
            }
        }
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(ended) = connections.join_next() => {
                    if let Err(fault) = ended {
                        tracing::error!(%fault, "a connection's task failed");
                    }
                    continue;
                }
                _ = stopping.wait_for(|stop| *stop) => break,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                        tracing::warn!(%peer, "refused: max.connections are open");
                        continue;
                    };
                    let broker = Arc::clone(&broker);
                    connections.spawn(async move {
                        connection::serve(broker, stream, peer).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(EXHAUSTED).await;
                }
            }
        }
        drop(self.listener);
        let drained = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            tracing::warn!(open = connections.len(), "connections did not finish in time");
        }
        timers.abort();
        // Retention may be in the middle of a change: let it finish.
        if let Err(fault) = retention.await {
            tracing::error!(%fault, "the retention task failed");
        }
    }
}
