//! From a request to its handler: one exhaustive match.
//!
//! Everything is done in request order here, but for what waits on others: a fetch's long poll, a join, a sync, and the
//! commit of a produce. Those are left as futures for the connection's writer.

use crate::broker::Broker;
use crate::connection::Pending;
use crate::handlers::{admin, cluster, fetch, groups, logs, offsets, produce, records, topics};
use crate::send::Response;
use crate::wire::{self, EncodeError, Header, Request};
use kafka_protocol::protocol::Encodable;
use std::net::SocketAddr;
use std::sync::Arc;

/// What a handler leaves the connection with.
pub enum Answer {
    /// A response.
    Now(Response),
    /// A response to come.
    Later(Pending),
    /// No response (`acks=0`).
    Nothing,
    /// The connection closes: the only way to say that an unacknowledged produce failed.
    Close,
}

/// What a handler knows of the request besides its body.
#[derive(Clone)]
pub struct Context {
    /// Everything shared.
    pub broker: Arc<Broker>,
    /// API, version, correlation id, client id.
    pub header: Header,
    /// Who asks.
    pub peer: SocketAddr,
}

impl Context {
    /// A framed response to this request.
    pub fn respond<M: Encodable>(&self, body: &M) -> Result<Response, EncodeError> {
        let Header { correlation, api, version, .. } = self.header;
        wire::response(correlation, api, version, body).map(Response::from)
    }

    /// The version of the request.
    #[must_use]
    pub fn version(&self) -> i16 {
        self.header.version
    }
}

/// Handles a request as far as it goes without waiting for other clients.
pub async fn dispatch(
    broker: &Arc<Broker>,
    peer: SocketAddr,
    header: Header,
    request: Request,
) -> Result<Answer, EncodeError> {
    let context = Context { broker: Arc::clone(broker), header, peer };
    let now = |response: Result<Response, EncodeError>| response.map(Answer::Now);
    match request {
        Request::ApiVersions(body) => now(cluster::api_versions(&context, &body)),
        Request::ApiVersionsUnknown => now(cluster::api_versions_unknown(&context)),
        Request::Metadata(body) => now(cluster::metadata(&context, body).await),
        Request::DescribeCluster(body) => now(cluster::describe_cluster(&context, &body)),
        Request::Produce(body) => produce::produce(context, body).await,
        Request::ProduceAncient(topics, acks) => Ok(produce::ancient(&context, &topics, acks)),
        Request::Fetch(body) => Ok(fetch::fetch(context, body)),
        Request::ListOffsets(body) => now(offsets::list(&context, body).await),
        Request::CreateTopics(body) => now(topics::create(&context, body).await),
        Request::DeleteTopics(body) => now(topics::delete(&context, body).await),
        Request::DeleteRecords(body) => now(records::delete(&context, body).await),
        Request::InitProducerId(body) => now(produce::init_producer_id(&context, &body).await),
        Request::FindCoordinator(body) => now(groups::find_coordinator(&context, body).await),
        Request::JoinGroup(body) => groups::join(context, body).await,
        Request::SyncGroup(body) => groups::sync(context, body).await,
        Request::Heartbeat(body) => now(groups::heartbeat(&context, &body)),
        Request::LeaveGroup(body) => now(groups::leave(&context, body).await),
        Request::OffsetCommit(body) => now(offsets::commit(&context, body).await),
        Request::OffsetFetch(body) => now(offsets::fetch(&context, body)),
        Request::ListGroups(body) => now(groups::list(&context, &body)),
        Request::DescribeGroups(body) => now(groups::describe(&context, body)),
        Request::DeleteGroups(body) => now(groups::delete(&context, body).await),
        Request::OffsetForLeaderEpoch(body) => now(logs::offset_for_leader_epoch(&context, body)),
        Request::DescribeProducers(body) => now(logs::describe_producers(&context, body).await),
        Request::DescribeConfigs(body) => now(admin::describe_configs(&context, body)),
    }
}
