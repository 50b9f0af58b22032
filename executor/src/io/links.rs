//! Links to executors downstream: one bidirectional stream an address, opened when first needed, shared by all sequences.

use std::collections::BTreeMap;

use ashlar_wire::v1::executor_client::ExecutorClient;
use ashlar_wire::{MESSAGE_BYTES_MAX, v1};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::attach::FrameSender;
use super::executor::Event;

/// Time to connect to another executor.
const CONNECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// Open links, by address.
#[derive(Debug)]
pub struct Links {
    events: mpsc::UnboundedSender<Event>,
    open: BTreeMap<String, FrameSender>,
}

impl Links {
    /// No links yet; what comes back over them goes to `events`.
    pub fn new(events: mpsc::UnboundedSender<Event>) -> Self {
        Self { events, open: BTreeMap::new() }
    }

    /// Frames to the executor at `address`; connects if need be. A link that fails is told as `Event::DownstreamLost`.
    pub fn to(&mut self, address: &str) -> FrameSender {
        if let Some(frames) = self.open.get(address).filter(|frames| !frames.is_closed()) {
            return frames.clone();
        }
        let (frames, outgoing) = mpsc::unbounded_channel();
        self.open.insert(address.to_owned(), frames.clone());
        let (events, address) = (self.events.clone(), address.to_owned());
        tokio::spawn(async move {
            let reason = match run(&address, outgoing, &events).await {
                Ok(()) => "the link was closed".to_owned(),
                Err(error) => error.to_string(),
            };
            // The engine task may have ended; then nobody needs to know.
            let _ = events.send(Event::DownstreamLost { address, reason });
        });
        frames
    }

    /// Forgets a link that failed.
    pub fn forget(&mut self, address: &str) {
        self.open.remove(address);
    }
}

async fn run(
    address: &str,
    outgoing: mpsc::UnboundedReceiver<v1::LinkFrame>,
    events: &mpsc::UnboundedSender<Event>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(std::time::Duration::from_secs(5))
        .keep_alive_timeout(std::time::Duration::from_secs(5));
    let channel = endpoint.connect().await?;
    let mut client = ExecutorClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX);
    let mut incoming = client.link(UnboundedReceiverStream::new(outgoing)).await?.into_inner();
    while let Some(frame) = incoming.next().await {
        if events.send(Event::FromDownstream(frame?)).is_err() {
            return Ok(());
        }
    }
    Ok(())
}
