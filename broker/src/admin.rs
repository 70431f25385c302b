//! Metrics and status over HTTP, for people and their monitoring: `/healthz`, `/metrics`, `/status`; and `POST /log/scrub`,
//! which has all copies of all logs checked in the background, at its configured pace.

use crate::broker::Broker;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use raid::volume::Volume;
use std::io;
use std::sync::Arc;
use tokio::net::TcpListener;

/// What the pages tell about.
#[derive(Clone)]
pub struct Admin {
    /// The broker.
    pub broker: Arc<Broker>,
    /// The volume under it, unless it runs in a directory.
    pub volume: Option<Arc<Volume>>,
}

/// Serves until the broker stops.
pub async fn serve(listener: TcpListener, admin: Admin) -> io::Result<()> {
    let mut stopping = admin.broker.stopping();
    let app = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/log/scrub", post(scrub))
        .with_state(admin);
    let stopped = async move {
        // A sender that is gone means the same.
        drop(stopping.wait_for(|stop| *stop).await);
    };
    axum::serve(listener, app).with_graceful_shutdown(stopped).await
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let store = &admin.broker.store;
    match admin.broker.metrics.page(store.healing(), store.uncleanable()) {
        Ok(page) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], page).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn scrub(State(admin): State<Admin>) -> Response {
    match admin.broker.store.start_scrub() {
        Ok(true) => (StatusCode::ACCEPTED, "the logs are being scrubbed\n").into_response(),
        Ok(false) => (StatusCode::CONFLICT, "a scrub of the logs is running\n").into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    }
}

async fn status(State(admin): State<Admin>) -> Json<serde_json::Value> {
    let broker = &admin.broker;
    let topics = broker.store.topics();
    let healing = broker.store.healing();
    let scrub = match broker.store.scrub_status() {
        Ok(scrub) => serde_json::json!(scrub),
        Err(error) => serde_json::json!({ "error": error.to_string() }),
    };
    let partitions: usize = topics.iter().map(|topic| topic.partitions().len()).sum();
    Json(serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "cluster_id": broker.store.cluster_id(),
        "node_id": broker.config.node_id,
        "advertised": format!("{}:{}", broker.advertised.host, broker.advertised.port),
        "connections": broker.metrics.connections.get(),
        "topics": topics.len(),
        "partitions": partitions,
        "log": {
            "batches_healed": healing.healed,
            "batches_unreadable": healing.unreadable,
            "verified_bytes": healing.verified,
            "uncleanable_partitions": broker.store.uncleanable(),
            "scrub": scrub,
        },
        "groups": broker.groups.describe_all().len(),
        "volume": admin.volume.map(|volume| volume.status()),
    }))
}
