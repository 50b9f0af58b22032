//! Connections to executors. A connection is made at the first call and again whenever it was lost; pings find peers that are
//! gone without a word.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ashlar_wire::MESSAGE_BYTES_MAX;
use ashlar_wire::id::ExecutorId;
use ashlar_wire::v1::executor_client;
use ashlar_wire::v1::{Admission, SequenceEvent};
use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const PING_INTERVAL: Duration = Duration::from_secs(3);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// An executor answers a call before it computes anything.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Events of one sequence, as its first executor sends them.
pub type RunEvents = BoxStream<'static, Result<SequenceEvent, Status>>;

/// A way to run sequences on one executor: over gRPC, or in the same process.
#[async_trait]
pub trait ExecutorClient: Send + Sync {
    /// Runs, or resumes, one sequence. Dropping the stream cancels it.
    async fn run(&self, admission: Admission) -> Result<RunEvents, Status>;
}

/// Clients of all executors.
pub struct Clients {
    /// Executors in this process, and scripted ones in tests.
    local: BTreeMap<ExecutorId, Arc<dyn ExecutorClient>>,
    /// By address.
    channels: Mutex<BTreeMap<String, Channel>>,
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients").field("local", &self.local.keys()).finish_non_exhaustive()
    }
}

impl Clients {
    /// Clients that call `local` executors directly and all others over gRPC.
    pub fn new(local: impl IntoIterator<Item = (ExecutorId, Arc<dyn ExecutorClient>)>) -> Self {
        Self { local: local.into_iter().collect(), channels: Mutex::default() }
    }

    /// The client of an executor at an address.
    ///
    /// # Errors
    /// When the address is none.
    pub fn client(&self, id: &ExecutorId, address: &str) -> Result<Arc<dyn ExecutorClient>, Status> {
        if let Some(client) = self.local.get(id) {
            return Ok(client.clone());
        }
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(Arc::new(GrpcClient(channel.clone())));
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|_| Status::unavailable(format!("executor {id} is registered with `{address}`, which is no address")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        let channel = endpoint.connect_lazy();
        channels.insert(address.to_owned(), channel.clone());
        Ok(Arc::new(GrpcClient(channel)))
    }

    /// Closes connections to addresses that nobody has any more; sequences that run on them go on.
    pub fn retain(&self, addresses: impl Fn(&str) -> bool) {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner).retain(|address, _| addresses(address));
    }
}

struct GrpcClient(Channel);

#[async_trait]
impl ExecutorClient for GrpcClient {
    async fn run(&self, admission: Admission) -> Result<RunEvents, Status> {
        let client = executor_client::ExecutorClient::new(self.0.clone());
        let mut client = client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX);
        match tokio::time::timeout(ANSWER_TIMEOUT, client.run(admission)).await {
            Ok(reply) => Ok(reply?.into_inner().boxed()),
            Err(_) => Err(Status::unavailable("the executor did not answer in time")),
        }
    }
}
