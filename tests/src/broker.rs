//! A broker in this process, and a client that speaks the protocol message by message.

use broker::server::Server;
use broker::volume::{self, Opened};
use broker::{Broker, Config, Endpoint};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use kafka_protocol::messages::{ApiKey, RequestHeader, ResponseHeader};
use kafka_protocol::protocol::{Decodable, Encodable, Request, StrBytes};
use kafka_protocol::records::{Compression, Record, RecordBatchEncoder, RecordEncodeOptions, TimestampType};
use logstore::{Home, Store, StoreOptions};
use raid::runtime::TokioRuntime;
use raid::volume::Volume;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// No answer takes longer than this; a test that waits for one fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the log lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Under {
    /// In a directory.
    Directory,
    /// On a volume of four images.
    Volume,
}

/// A broker that is running in this process.
pub struct Running {
    /// Where it listens.
    pub address: SocketAddr,
    /// The broker.
    pub broker: Arc<Broker>,
    store: Arc<Store>,
    volume: Option<Arc<Volume>>,
    serving: JoinHandle<()>,
    settling: Option<JoinHandle<()>>,
    place: Arc<TempDir>,
    under: Under,
}

impl Running {
    /// Starts one on a fresh home. `settings` are `KEY=VALUE`.
    pub async fn start(under: Under, settings: &[&str]) -> Self {
        let place = Arc::new(tempfile::tempdir().expect("a temporary directory"));
        Self::start_in(place, under, settings).await
    }

    /// The four images of a broker on a volume.
    #[must_use]
    pub fn images(place: &Path) -> Vec<PathBuf> {
        (0..4).map(|n| place.join(format!("disk{n}.img"))).collect()
    }

    /// Starts one where another has been.
    pub async fn start_in(place: Arc<TempDir>, under: Under, settings: &[&str]) -> Self {
        let mut pairs: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        // Tests of groups say so when they want to wait.
        pairs.insert(0, "group.initial.rebalance.delay.ms=0".to_owned());
        let config = Config::load(None, &pairs).expect("a valid configuration");
        let runtime = Arc::new(TokioRuntime::current());
        let (home, volume) = match under {
            Under::Directory => (Home::Directory(place.path().join("log")), None),
            Under::Volume => {
                let images = Self::images(place.path());
                let opened = volume::open(&images, Some(256 << 20), runtime.clone()).await;
                let Opened { volume, .. } = opened.expect("a volume");
                (Home::Volume(volume.clone()), Some(volume))
            }
        };
        let options = StoreOptions {
            topic_defaults: config.topic_defaults().expect("valid defaults"),
            verify_interval: config.verify_interval(),
            scrub: config.scrub(),
            cleaner: config.cleaner(),
            ..StoreOptions::default()
        };
        let store = Store::open(home, options, runtime.clone()).await.expect("a store");
        let settling = volume.as_ref().map(|volume| {
            let (volume, store) = (Arc::downgrade(volume), Arc::downgrade(&store));
            tokio::spawn(volume::resync_when_settled(volume, store, runtime.clone()))
        });
        let server = Server::bind("127.0.0.1:0").await.expect("a free port");
        let address = server.local_addr().expect("an address");
        let advertised = Endpoint { host: "127.0.0.1".to_owned(), port: address.port() };
        let broker = Broker::new(config, store.clone(), advertised, runtime).await.expect("a broker");
        let serving = tokio::spawn(server.run(broker.clone()));
        Self { address, broker, store, volume, serving, settling, place, under }
    }

    /// Stops it in order.
    pub async fn stop(self) -> (Arc<TempDir>, Under) {
        self.broker.stop();
        self.serving.await.expect("the server ends");
        self.store.close().await.expect("the store closes");
        drop((self.broker, self.store));
        if let Some(settling) = self.settling {
            settling.await.expect("copies are settled");
        }
        if let Some(volume) = self.volume {
            volume.stop().await.expect("the volume stops");
        }
        (self.place, self.under)
    }

    /// Stops it and starts it again.
    pub async fn restart(self, settings: &[&str]) -> Self {
        let (place, under) = self.stop().await;
        Self::start_in(place, under, settings).await
    }

    /// Connects a client.
    pub async fn client(&self) -> Client {
        Client::connect(self.address).await
    }
}

/// A connection that sends and receives one message at a time.
pub struct Client {
    stream: TcpStream,
    correlation: i32,
}

impl Client {
    /// Connects.
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("a connection");
        stream.set_nodelay(true).expect("no delay");
        Self { stream, correlation: 0 }
    }

    /// Sends a request and returns its answer.
    pub async fn ask<R: Request>(&mut self, version: i16, request: &R) -> R::Response {
        self.send(version, request).await;
        self.receive::<R>(version).await
    }

    /// Sends a request; returns its correlation id.
    pub async fn send<R: Request>(&mut self, version: i16, request: &R) -> i32 {
        self.correlation += 1;
        let frame = frame::<R>(self.correlation, version, request);
        self.write(&frame).await;
        self.correlation
    }

    /// The next response, which must be one to `R`. Its correlation id is checked by [`Self::receive_as`].
    pub async fn receive<R: Request>(&mut self, version: i16) -> R::Response {
        let (_, response) = self.receive_any::<R>(version).await;
        response
    }

    /// The next response, which must be the one to `correlation`.
    pub async fn receive_as<R: Request>(&mut self, version: i16, correlation: i32) -> R::Response {
        let (got, response) = self.receive_any::<R>(version).await;
        assert_eq!(got, correlation, "responses come in request order");
        response
    }

    async fn receive_any<R: Request>(&mut self, version: i16) -> (i32, R::Response) {
        let mut frame = self.read_frame().await.expect("a response");
        let api = ApiKey::try_from(R::KEY).expect("a known API");
        let header =
            ResponseHeader::decode(&mut frame, api.response_header_version(version)).expect("a header");
        let response = R::Response::decode(&mut frame, version)
            .unwrap_or_else(|e| panic!("the response of {api:?} version {version} does not decode: {e:#}"));
        assert!(!frame.has_remaining(), "{api:?} version {version}: {} bytes too many", frame.len());
        (header.correlation_id, response)
    }

    /// Sends bytes as they are.
    pub async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("sent");
    }

    /// Sends bytes as they are; the peer may have closed already.
    pub async fn try_write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Stops sending.
    pub async fn finish(&mut self) {
        self.stream.shutdown().await.expect("shut down");
    }

    /// The next frame without its length; `None` if the broker closed the connection.
    pub async fn read_frame(&mut self) -> Option<Bytes> {
        let read = async {
            let mut length = [0; 4];
            self.stream.read_exact(&mut length).await.ok()?;
            let mut frame = vec![0; u32::from_be_bytes(length) as usize];
            self.stream.read_exact(&mut frame).await.ok()?;
            Some(Bytes::from(frame))
        };
        tokio::time::timeout(PATIENCE, read).await.expect("an answer in time")
    }

    /// Whether nothing arrives for `time`.
    pub async fn is_silent_for(&mut self, time: Duration) -> bool {
        let mut byte = [0];
        tokio::time::timeout(time, self.stream.peek(&mut byte)).await.is_err()
    }
}

/// A request, framed.
#[must_use]
pub fn frame<R: Request>(correlation: i32, version: i16, request: &R) -> Bytes {
    let api = ApiKey::try_from(R::KEY).expect("a known API");
    let header = RequestHeader::default()
        .with_request_api_key(R::KEY)
        .with_request_api_version(version)
        .with_correlation_id(correlation)
        .with_client_id(Some(StrBytes::from_static_str("tests")));
    let mut out = BytesMut::new();
    out.put_i32(0);
    header.encode(&mut out, api.request_header_version(version)).expect("a header");
    request
        .encode(&mut out, version)
        .unwrap_or_else(|e| panic!("the request of {api:?} version {version} does not encode: {e:#}"));
    let length = out.len() as u32 - 4;
    out[..4].copy_from_slice(&length.to_be_bytes());
    out.freeze()
}

/// A plain batch of records with these values; timestamps count up from `timestamp`.
#[must_use]
pub fn batch(values: &[&[u8]], timestamp: i64) -> Bytes {
    batch_of(values, timestamp, -1, -1, -1)
}

/// The same from an idempotent producer.
#[must_use]
pub fn batch_of(values: &[&[u8]], timestamp: i64, producer_id: i64, epoch: i16, sequence: i32) -> Bytes {
    encoded(values.iter().map(|value| (None, *value)), timestamp, (producer_id, epoch, sequence))
}

/// A plain batch of records with these keys and values; timestamps count up from `timestamp`.
#[must_use]
pub fn keyed_batch(records: &[(&str, &[u8])], timestamp: i64) -> Bytes {
    encoded(records.iter().map(|(key, value)| (Some(*key), *value)), timestamp, (-1, -1, -1))
}

/// A batch by a producer's id, epoch and first sequence number.
fn encoded<'a>(
    records: impl Iterator<Item = (Option<&'a str>, &'a [u8])>,
    timestamp: i64,
    (producer_id, producer_epoch, sequence): (i64, i16, i32),
) -> Bytes {
    let records: Vec<Record> = records
        .enumerate()
        .map(|(n, (key, value))| Record {
            transactional: false,
            control: false,
            delete_horizon: false,
            partition_leader_epoch: -1,
            producer_id,
            producer_epoch,
            timestamp_type: TimestampType::Creation,
            offset: n as i64,
            // Consecutive even without a producer: the encoder begins a batch wherever they are not.
            sequence: sequence + n as i32,
            timestamp: timestamp + n as i64,
            key: key.map(|key| Bytes::copy_from_slice(key.as_bytes())),
            value: Some(Bytes::copy_from_slice(value)),
            headers: std::iter::empty().collect(),
        })
        .collect();
    let mut out = BytesMut::new();
    let options = RecordEncodeOptions { version: 2, compression: Compression::None };
    RecordBatchEncoder::encode(&mut out, &records, &options).expect("a batch");
    out.freeze()
}
