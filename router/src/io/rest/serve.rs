//! The listener: connections in, bounded in number and in the time that their heads may take; at the end a drain that refuses what is new
//! and lets what runs finish.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use crate::io::backend::Backend;
use crate::io::rest::config::RestConfig;
use crate::io::rest::stall::Stalling;
use crate::io::rest::{Rest, router};

/// Pause after a failed accept, such as when file descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Time for connections to close once no request runs.
const CLOSE_MAX: Duration = Duration::from_secs(1);
/// A client that reads nothing for so long is gone.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// Serves until `shutdown` resolves, then drains: new requests get 503, running ones finish within `limits.drain_ms`, the rest are cut.
///
/// Fails if the listener has no address; failures of single connections are logged.
pub async fn serve(
    listener: TcpListener,
    backend: Arc<dyn Backend>,
    config: RestConfig,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let address = listener.local_addr()?;
    tracing::info!(%address, "REST listens");
    let rest = Arc::new(Rest::new(backend, config));
    let mut server = Server {
        listener,
        room: Arc::new(Semaphore::new(rest.config.limits.connections_max as usize)),
        service: TowerToHyperService::new(router(Arc::clone(&rest))),
        connections: JoinSet::new(),
        graceful: GracefulShutdown::new(),
        header_read: Duration::from_millis(rest.config.limits.header_read_ms),
    };
    tokio::select! {
        () = shutdown => {}
        () = server.accept_all() => {}
    }

    rest.stopping.store(true, Ordering::Relaxed);
    let running = rest.places.borrow().taken();
    let mut places = rest.places.subscribe();
    tracing::info!(running, limit_ms = rest.config.limits.drain_ms, "REST drains; a second signal stops at once");
    let deadline = Instant::now() + Duration::from_millis(rest.config.limits.drain_ms);
    let idle = async {
        tokio::select! {
            _ = places.wait_for(|places| places.taken() == 0) => {} // nothing runs any more
            () = server.accept_all() => {}
        }
    };
    let idle = tokio::time::timeout_at(deadline, idle).await.is_ok();
    let Server { listener, graceful, mut connections, .. } = server;
    drop(listener);
    // What is left has no request that runs: ends of responses, and heads and bodies that may never come.
    let _ = tokio::time::timeout_at(deadline.min(Instant::now() + CLOSE_MAX), graceful.shutdown()).await;
    if !idle {
        tracing::warn!("requests were still running when the time to drain was over; they are cut");
    }
    connections.abort_all();
    while let Some(ended) = connections.join_next().await {
        log_panic(ended);
    }
    Ok(())
}

struct Server {
    listener: TcpListener,
    room: Arc<Semaphore>,
    service: TowerToHyperService<axum::Router>,
    connections: JoinSet<()>,
    graceful: GracefulShutdown,
    header_read: Duration,
}

impl Server {
    /// Takes connections for ever. May be dropped at any await and called again.
    async fn accept_all(&mut self) {
        loop {
            let accept = async {
                let room = Arc::clone(&self.room).acquire_owned().await.expect("the semaphore is never closed");
                (self.listener.accept().await, room)
            };
            tokio::select! {
                Some(ended) = self.connections.join_next() => log_panic(ended),
                (accepted, room) = accept => match accepted {
                    Ok((stream, _)) => self.spawn(stream, room),
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    fn spawn(&mut self, stream: TcpStream, room: tokio::sync::OwnedSemaphorePermit) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(self.header_read).max_buf_size(HEAD_BYTES_MAX);
        let connection = builder.serve_connection(TokioIo::new(Stalling::new(stream, STALL_MAX)), self.service.clone());
        let connection = self.graceful.watch(connection);
        self.connections.spawn(async move {
            let _room = room;
            if let Err(error) = connection.await {
                // The client went away, or what it sent is no HTTP.
                tracing::debug!(%error, "a connection ended early");
            }
        });
    }
}

fn log_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection panicked");
    }
}
