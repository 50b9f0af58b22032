//! Starting processes: `serve` is router and executor over an embedded registry, `router` and `executor` are the same code apart.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use ashlar_executor::io::executor::{self, ExecutorHandle, Identity};
use ashlar_executor::io::hosting::Hosting;
use ashlar_executor::io::metrics::ExecutorMetrics;
use ashlar_executor::io::service::{Operator, Service};
use ashlar_executor::state::limits::Limits;
use ashlar_kernels::ops::Ops;
use ashlar_registry::record::{ExecutorRecord, PlanPolicy, RouterRecord};
use ashlar_registry::{Registry, Session, key};
use ashlar_router::io::backend::Administration;
use ashlar_router::io::catalog::Catalog;
use ashlar_router::io::cluster::{Cluster, ClusterOptions};
use ashlar_router::io::dispatch::{Adapters, Dispatch, DispatchOptions};
use ashlar_router::io::grpc::{Clients, ExecutorClient, RunEvents};
use ashlar_router::io::keys_file::KeysFile;
use ashlar_router::io::metrics::RouterMetrics;
use ashlar_router::io::planner::{Planner, PlannerOptions};
use ashlar_router::io::rest::config::RestConfig;
use ashlar_router::state::tenants::may_open;
use ashlar_wire::id::{ExecutorId, RouterId};
use ashlar_wire::{MESSAGE_BYTES_MAX, v1};
use ashlar_zoo::ingest::AdaptersDir;
use ashlar_zoo::store::{Cache, Zoo};
use tokio::net::TcpListener;
use tokio_stream::StreamExt;

use crate::config::{Config, ConfigArgs, ExecutorConfig};
use crate::device::{self, Opened};
use crate::devices::device_key;
use crate::process::{random_bits, stop_signal};
use crate::serving::Serving;
use crate::{health, logging, output};

/// How long a record outlives its process.
const LEASE: Duration = Duration::from_secs(5);

/// Address of an executor that is called without a network.
pub const IN_PROCESS: &str = "in-process";

/// Which parts run in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Router, executor, embedded registry.
    Serve,
    /// A router.
    Router,
    /// An executor.
    Executor,
}

/// Runs until the process is asked to stop, then drains.
///
/// # Errors
/// What could not be started.
pub async fn run(role: Role, args: ConfigArgs) -> anyhow::Result<()> {
    let (name, listener) = match role {
        Role::Serve => ("serve", "router"),
        Role::Router => ("router", "router"),
        Role::Executor => ("executor", "executor"),
    };
    let config = args.load_for(listener)?;
    if args.print_config {
        output::text(toml::to_string(&config).context("print the configuration")?)?;
        return Ok(());
    }
    let _guard = logging::start(&config.log, name)?;
    if role != Role::Executor {
        // Before anything starts: without the keys it was told of a server must not run.
        keys_file(&config)?;
    }
    let root = &config.zoo.root;
    let zoo = Zoo::open_place(root)
        .await
        .with_context(|| format!("open the zoo in {root} (`ashlar zoo add PATH --name TENANT/MODEL --zoo PLACE` makes one)"))?;
    let zoo = match role {
        // Routers read no tensors.
        Role::Serve | Role::Executor if !config.zoo.cache.as_os_str().is_empty() => {
            let cache = Cache::open(&config.zoo.cache, config.zoo.cache_bytes).context("open the cache of the zoo (zoo.cache)")?;
            zoo.with_cache(cache)
        }
        Role::Serve | Role::Executor if root.directory().is_none() => {
            tracing::warn!(place = %root, "no zoo.cache is set: every start downloads all weights from the bucket anew");
            zoo
        }
        _ => zoo,
    };
    let registry = open_registry(&config, role).await?;
    match role {
        Role::Serve => serve(config, zoo, registry).await,
        Role::Router => route(config, zoo, registry, Vec::new(), Vec::new()).await,
        Role::Executor => execute(config, zoo, registry).await,
    }
}

/// Opens the registry that the configuration names.
///
/// # Errors
/// When it cannot be opened, or separate processes are told to share an embedded one.
pub async fn open_registry(config: &Config, role: Role) -> anyhow::Result<Arc<dyn Registry>> {
    let url = &config.registry.url;
    let embedded = !url.starts_with("etcd://");
    if role != Role::Serve && embedded {
        let given = if url.is_empty() { "none is named, and".to_owned() } else { format!("`{url}` is for one process, and") };
        bail!("use a registry: {given} separate processes find each other through etcd (--registry etcd://HOST:PORT)");
    }
    let url = config.registry_url()?;
    ashlar_registry::open(&url).await.with_context(|| format!("open registry {url}"))
}

/// Opens the registry for a command that changes or reads it (`purpose`) and ends.
///
/// # Errors
/// As [`open_registry`], and when what is changed would be lost or is nobody's.
pub async fn open_lasting_registry(config: &Config, purpose: &str) -> anyhow::Result<Arc<dyn Registry>> {
    let url = &config.registry.url;
    if url == "memory:" {
        bail!("{purpose} the registry: one in memory ends with this command; name that of the servers (etcd://HOST:PORT or file:PATH)");
    }
    let root = &config.zoo.root;
    if url.is_empty() && root.directory().is_some_and(|root| !root.is_dir()) {
        bail!("{purpose} the registry beside zoo {root}: there is no such zoo; name one by --zoo, or a registry by --registry");
    }
    open_registry(config, Role::Serve).await
}

/// An executor in this process, called without a network.
struct Local(ExecutorHandle);

#[async_trait::async_trait]
impl ExecutorClient for Local {
    async fn run(&self, admission: v1::Admission) -> Result<RunEvents, tonic::Status> {
        Ok(Box::pin(self.0.run(admission).map(|event| Ok(v1::SequenceEvent { event: Some(event) }))))
    }
}

/// A started executor.
struct Started {
    id: ExecutorId,
    handle: ExecutorHandle,
    session: Arc<Session<ExecutorRecord>>,
    metrics: prometheus::Registry,
}

/// Pages of a machine's memory unless more is asked for; a card's memory is for nothing else.
const KV_BYTES_MAX: u64 = 4 << 30;
/// A card is as wide as a CPU of so many threads, as far as rows of a batch are concerned.
const CARD_THREADS: usize = 64;

async fn start_executor(config: &Config, zoo: Zoo, registry: Arc<dyn Registry>, address: String) -> anyhow::Result<Started> {
    let settings = &config.executor;
    let all = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = if settings.threads > 0 { settings.threads } else { all };
    // A card's kernels may have to be compiled, which takes a while.
    let opening = settings.clone();
    let opened = tokio::task::spawn_blocking(move || device::open(&opening, threads)).await??;
    let available = opened.free_bytes();
    settings.check_memory(available)?;
    match opened {
        Opened::Cpu(ops) => {
            let limits = settings.limits(available, KV_BYTES_MAX, threads)?;
            start_on(settings, ops, threads, available, limits, zoo, registry, address).await
        }
        Opened::Cuda(ops, _) => {
            let limits = settings.limits(available, u64::MAX, CARD_THREADS)?;
            start_on(settings, ops, threads, available, limits, zoo, registry, address).await
        }
    }
}

async fn start_on<B: Ops>(
    settings: &ExecutorConfig,
    ops: Arc<B>,
    threads: usize,
    available: u64,
    limits: Limits,
    zoo: Zoo,
    registry: Arc<dyn Registry>,
    address: String,
) -> anyhow::Result<Started> {
    let (device, profiled_on) = (ops.describe(), device_key(&*ops));
    let memory_bytes = if settings.memory_bytes > 0 { settings.memory_bytes } else { available / 10 * 7 };
    let id = ExecutorId(if settings.id.is_empty() { ExecutorId::from_bits(random_bits()).0 } else { settings.id.clone() });
    let identity = Identity {
        executor_id: id.0.clone(),
        device: device.clone(),
        numeric_class: limits.numeric_class(settings.bf16_compute.cpu_class()),
    };
    let metric_registry = prometheus::Registry::new();
    let metrics = ExecutorMetrics::new(&metric_registry).context("register metrics")?;
    let (handle, commands) = executor::start(Arc::clone(&ops), limits.clone(), &identity, metrics.clone())
        .map_err(|error| anyhow::anyhow!("start the device: {error}"))?;
    tracing::info!(
        executor = %id, device, threads, weight_mib_max = memory_bytes >> 20, kv_mib_max = limits.kv_bytes >> 20,
        page_tokens = limits.page_tokens, kv_format = limits.kv_format.name(), bf16_compute = settings.bf16_compute.name(),
        "executor starts"
    );
    let record = ExecutorRecord {
        id: id.clone(),
        address,
        device,
        profiled_on: profiled_on.to_string(),
        numeric_class: identity.numeric_class.clone(),
        memory_bytes,
        kv_bytes: limits.kv_bytes,
        threads: threads as u32,
        spans: Vec::new(),
        plan_generation: 0,
        draining: false,
        incarnation: random_bits(),
    };
    let session = Arc::new(Session::start(Arc::clone(&registry), key::executor(&id), record, LEASE));
    let hosting = Hosting::new(ops, zoo, commands, handle.events(), metrics, memory_bytes, limits.pages()).profiled_on(profiled_on);
    let follower = Arc::clone(&session);
    tokio::spawn(async move {
        let mut hosting = hosting;
        loop {
            match hosting.follow(Arc::clone(&registry), Arc::clone(&follower)).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "failed to watch the plan; trying on");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    });
    Ok(Started { id, handle, session, metrics: metric_registry })
}

async fn serve(config: Config, zoo: Zoo, registry: Arc<dyn Registry>) -> anyhow::Result<()> {
    let mut serving = Serving::hold(&config)?;
    let started = start_executor(&config, zoo.clone(), Arc::clone(&registry), IN_PROCESS.to_owned()).await?;
    if let Err(error) = answer_operators(&started, serving.as_mut()).await {
        tracing::warn!(%error, "`ashlar check` cannot ask this server");
    }
    let local: Arc<dyn ExecutorClient> = Arc::new(Local(started.handle.clone()));
    let outcome = route(config, zoo, registry, vec![(started.id.clone(), local)], vec![started.metrics.clone()]).await;
    close(started.session).await;
    outcome
}

/// Answers operators, and nobody who would run sequences, on a port of this machine alone.
async fn answer_operators(started: &Started, serving: Option<&mut Serving>) -> std::io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    if let Some(serving) = serving {
        serving.tell(&started.id, address)?;
    }
    let service = v1::operator_server::OperatorServer::new(Operator::new(started.handle.clone()));
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    // It ends with the process.
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    tracing::info!(executor = %started.id, %address, "executor answers `ashlar check`");
    Ok(())
}

async fn close(session: Arc<Session<ExecutorRecord>>) {
    // The follower of the plan holds the session too; marking it is what others look at.
    session.update(|record| record.draining = true);
    if let Some(session) = Arc::into_inner(session) {
        // The registry being gone is no reason not to stop.
        let _ = session.close().await;
    }
}

fn keys_file(config: &Config) -> anyhow::Result<Option<KeysFile>> {
    let path = &config.router.keys_file;
    if path.is_empty() {
        return Ok(None);
    }
    KeysFile::open(Path::new(path)).map(Some).context("use router.keys_file")
}

fn adapters_dir(config: &Config) -> anyhow::Result<Option<AdaptersDir>> {
    let path = &config.router.adapters_dir;
    if path.is_empty() {
        return Ok(None);
    }
    AdaptersDir::at(Path::new(path)).map(Some).with_context(|| format!("use router.adapters_dir `{path}`"))
}

async fn route(
    config: Config,
    zoo: Zoo,
    registry: Arc<dyn Registry>,
    local: Vec<(ExecutorId, Arc<dyn ExecutorClient>)>,
    mut metric_registries: Vec<prometheus::Registry>,
) -> anyhow::Result<()> {
    let listen: SocketAddr = config.router.listen.parse().with_context(|| format!("use router.listen `{}`", config.router.listen))?;
    let without = match may_open(&config.router.listen, listen.ip().is_loopback(), config.router.insecure_open) {
        Ok(without) => without,
        Err(refused) => {
            if config.router.keys_file.is_empty() {
                tracing::warn!(%refused, "only callers with a key are served");
            }
            ashlar_router::state::tenants::Without::Closed
        }
    };
    let adapters_dir = adapters_dir(&config)?;
    let listener = TcpListener::bind(listen).await.with_context(|| format!("listen on {listen}"))?;
    let router = RouterId::from_bits(random_bits());
    let keys_file = keys_file(&config)?;
    let cluster = Cluster::start(Arc::clone(&registry), ClusterOptions { without, keys_file, ..ClusterOptions::default() });
    let catalog = Catalog::start(zoo, config.zoo.refresh(), &cluster).await;
    let policy = PlanPolicy { spans_per_chain: config.placement.spans_per_chain.max(1), replicas: config.placement.replicas.max(1) };
    let mut options = PlannerOptions { policy, ..PlannerOptions::default() };
    if !local.is_empty() {
        // One process: an executor that an older plan names ended with the process that it was in, and will not return.
        options.return_wait = Duration::ZERO;
    }
    let planner = Planner::start(Arc::clone(&registry), Arc::clone(&cluster), Arc::clone(&catalog), &router, options);
    let record = RouterRecord { id: router.clone(), address: listener.local_addr().context("listen")?.to_string() };
    let session = Session::start(registry, key::router(&router), record, LEASE);
    let metrics = RouterMetrics::new().context("register metrics")?;
    let deadline = (config.router.deadline_ms > 0).then(|| Duration::from_millis(config.router.deadline_ms));
    let options = DispatchOptions { deadline, ..DispatchOptions::default() };
    let dispatch = Dispatch::new(router, cluster, catalog, Clients::new(local), options, metrics.registry()).context("register metrics")?;
    metric_registries.push(process_metrics()?);
    let administration = adapters_dir.map(|folder| Arc::new(Adapters::new(&dispatch, folder)) as Arc<dyn Administration>);
    let rest = RestConfig { limits: config.router.limits, metrics, registries: metric_registries, administration };
    let draining = dispatch.clone();
    let (first, was_asked) = tokio::sync::oneshot::channel::<()>();
    let shutdown = async move {
        if let Err(error) = stop_signal().await {
            tracing::error!(%error, "signals cannot be awaited; stopping");
        }
        draining.drain();
        // Nobody waits for it where serving has ended.
        let _ = first.send(());
    };
    let second = async move {
        if was_asked.await.is_err() || stop_signal().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        served = ashlar_router::io::rest::serve(listener, Arc::new(dispatch), rest, shutdown) => served.context("serve REST")?,
        () = second => tracing::warn!("asked again to stop: what runs is cut"),
    }
    // Leases run out by themselves if the registry is gone.
    let _ = planner.resign().await;
    let _ = session.close().await;
    tracing::info!("router stopped");
    Ok(())
}

async fn execute(config: Config, zoo: Zoo, registry: Arc<dyn Registry>) -> anyhow::Result<()> {
    let listen = &config.executor.listen;
    let listener = TcpListener::bind(listen).await.with_context(|| format!("listen on {listen}"))?;
    let local = listener.local_addr().context("listen")?;
    let address = if config.executor.advertise.is_empty() { local.to_string() } else { config.executor.advertise.clone() };
    let health_listener = TcpListener::bind(&config.executor.metrics_listen)
        .await
        .with_context(|| format!("listen on {}", config.executor.metrics_listen))?;
    let started = start_executor(&config, zoo, registry, address).await?;
    let state = started.session.state();
    let ready: health::Ready = Arc::new(move || match *state.borrow() {
        ashlar_registry::SessionState::Registered => Ok(()),
        _ => Err("not registered yet".to_owned()),
    });
    let registries = vec![started.metrics.clone(), process_metrics()?];
    tokio::spawn(async move {
        if let Err(error) = health::serve(health_listener, registries, ready).await {
            tracing::error!(%error, "the health endpoint failed");
        }
    });
    let service = v1::executor_server::ExecutorServer::new(Service::new(started.handle.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    // The server's own `tcp_nodelay` is for sockets that it binds itself; without it here a token of a cut chain waits 40 ms.
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = tokio::spawn(
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .add_service(service)
            .add_service(v1::operator_server::OperatorServer::new(Operator::new(started.handle.clone())))
            .serve_with_incoming_shutdown(incoming, async {
                // A dropped sender stops the server too.
                let _ = stopped.await;
            }),
    );
    tracing::info!(address = %local, "executor listens");
    stop_signal().await?;
    drain(&started, Duration::from_millis(config.executor.drain_ms)).await;
    drop(stop);
    // Links that others keep open would hold the server; the sequences are done.
    let _ = tokio::time::timeout(Duration::from_secs(2), server).await;
    close(started.session).await;
    tracing::info!("executor stopped");
    Ok(())
}

/// Takes nothing new and lets what runs finish.
async fn drain(started: &Started, most: Duration) {
    started.session.update(|record| record.draining = true);
    tracing::info!("executor drains");
    let deadline = tokio::time::Instant::now() + most;
    // Routers learn of it through the registry, so the first look is not too early.
    tokio::time::sleep(Duration::from_millis(300)).await;
    loop {
        let status = started.handle.status();
        if (status.running == 0 && status.waiting == 0) || tokio::time::Instant::now() > deadline {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn process_metrics() -> anyhow::Result<prometheus::Registry> {
    let registry = prometheus::Registry::new();
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self())).context("register metrics")?;
    Ok(registry)
}
