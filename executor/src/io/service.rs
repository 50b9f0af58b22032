//! The gRPC services: `Run` for routers, `Link` for executors upstream, `Status` for anyone who asks; and `Check` for operators, which
//! is a service of its own so that a process can answer it where nobody may run sequences.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};

use ashlar_wire::v1;
use ashlar_wire::v1::executor_server::Executor as ExecutorService;
use ashlar_wire::v1::operator_server::Operator as OperatorService;
use futures::Stream;
use tokio::sync::{Mutex, mpsc};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::attach::LinkId;
use super::executor::{Event, ExecutorHandle};

/// Serves one executor.
#[derive(Debug)]
pub struct Service {
    executor: ExecutorHandle,
    next_link: AtomicU64,
}

impl Service {
    /// A service over a running executor.
    pub fn new(executor: ExecutorHandle) -> Self {
        Self { executor, next_link: AtomicU64::new(1) }
    }
}

/// Answers operators of one executor.
#[derive(Debug)]
pub struct Operator {
    executor: ExecutorHandle,
    /// Held by a check: the engine plans nothing meanwhile, so however many ask, one goes at a time.
    checking: Mutex<()>,
}

impl Operator {
    /// A service over a running executor.
    pub fn new(executor: ExecutorHandle) -> Self {
        Self { executor, checking: Mutex::new(()) }
    }
}

type Frames<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl ExecutorService for Service {
    type RunStream = Frames<v1::SequenceEvent>;
    type LinkStream = Frames<v1::LinkFrame>;

    async fn run(&self, request: Request<v1::Admission>) -> Result<Response<Self::RunStream>, Status> {
        let events = self.executor.run(request.into_inner());
        Ok(Response::new(Box::pin(events.map(|event| Ok(v1::SequenceEvent { event: Some(event) })))))
    }

    async fn link(&self, request: Request<Streaming<v1::LinkFrame>>) -> Result<Response<Self::LinkStream>, Status> {
        let link = LinkId(self.next_link.fetch_add(1, Ordering::Relaxed));
        let mut incoming = request.into_inner();
        let (frames, outgoing) = mpsc::unbounded_channel();
        let events = self.executor.events();
        tokio::spawn(async move {
            while let Some(Ok(frame)) = incoming.next().await {
                if events.send(Event::FromUpstream { link, frame, back: frames.clone() }).is_err() {
                    return;
                }
            }
            let _ = events.send(Event::UpstreamLost(link));
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(outgoing).map(Ok))))
    }

    async fn status(&self, _request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        Ok(Response::new(self.executor.status()))
    }
}

#[tonic::async_trait]
impl OperatorService for Operator {
    async fn check(&self, _request: Request<v1::CheckRequest>) -> Result<Response<v1::CheckReply>, Status> {
        let _one = self.checking.lock().await;
        self.executor.check().await.map(Response::new).ok_or_else(|| Status::internal("the engine task has ended"))
    }
}
