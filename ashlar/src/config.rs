//! Configuration: one typed struct from a file, then `ASHLAR_<SECTION>_<KEY>` variables, then flags. Unknown keys are
//! errors; `--print-config` prints what is in force.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use ashlar_executor::state::limits::Limits;
use ashlar_kernels::cpu::Isa;
use ashlar_kernels::ops::{Bf16Compute, KvFormat};
use ashlar_router::io::rest::config::RestLimits;
use ashlar_zoo::store::Place;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::device::Wanted;
use crate::status::Misused;

/// Variables with our prefix that are not configuration keys: flags of single commands, and knobs of scripts and tests.
const OTHER_VARIABLES: &[&str] = &[
    ZOO_VARIABLE,
    "ASHLAR_API_KEY",
    "ASHLAR_URL",
    "ASHLAR_MODELS",
    "ASHLAR_DOWNLOADS",
    "ASHLAR_FUZZ_SECONDS",
    "ASHLAR_BIN",
    "ASHLAR_NVRTC",
    "ASHLAR_CARD",
];

/// Short for `ASHLAR_ZOO_ROOT`.
const ZOO_VARIABLE: &str = "ASHLAR_ZOO";
const ZOO_ROOT_VARIABLE: &str = "ASHLAR_ZOO_ROOT";
/// Most threads of a CPU pool: beyond any machine, and below what a slip of the hand asks for.
const THREADS_MAX: usize = 1024;
/// Least bytes of KV pages: one page of a small model.
const KV_BYTES_MIN: u64 = 64 << 10;
/// Most spans of a chain, and most replicas of a span.
const PLACEMENT_MAX: u32 = 1024;
/// Least time between two looks at the zoo's names.
const REFRESH_MS_MIN: u64 = 10;

/// Everything that can be configured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// REST and tenants.
    pub router: RouterConfig,
    /// Device, memory and engine.
    pub executor: ExecutorConfig,
    /// Where the cluster's facts are.
    pub registry: RegistryConfig,
    /// Where models are.
    pub zoo: ZooConfig,
    /// What placement aims at.
    pub placement: PlacementConfig,
    /// Logs and traces.
    pub log: LogConfig,
}

/// `[router]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterConfig {
    /// Address of the REST server.
    pub listen: String,
    /// File of tenants' key hashes, beside those in the registry; empty: none.
    pub keys_file: String,
    /// Serve without keys even where others than this machine can reach the server.
    pub insecure_open: bool,
    /// Folder of PEFT adapters that administrators may load by `POST /v1/load_lora_adapter`; empty: none.
    pub adapters_dir: String,
    /// A sequence must end within so many milliseconds; 0: no limit.
    pub deadline_ms: u64,
    /// Bounds of requests.
    pub limits: RestLimits,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".to_owned(),
            keys_file: String::new(),
            insecure_open: false,
            adapters_dir: String::new(),
            deadline_ms: 0,
            limits: RestLimits::default(),
        }
    }
}

/// `[executor]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExecutorConfig {
    /// Id in the registry; empty: drawn at start.
    pub id: String,
    /// Address of the gRPC service.
    pub listen: String,
    /// Address under which others reach it; empty: the one it listens on.
    pub advertise: String,
    /// Address of `/health`, `/ready` and `/metrics`.
    pub metrics_listen: String,
    /// `auto`, `cpu` or `cuda:N`.
    pub device: String,
    /// Threads of the CPU pool; 0: all.
    pub threads: usize,
    /// Instruction set of the CPU's kernels: `auto`, or one of [`Isa`]'s names.
    pub isa: String,
    /// Bytes for weights; 0: 70% of the memory that is available at start.
    pub memory_bytes: u64,
    /// Bytes for KV pages; 0: a quarter of the memory that is available at start, of a machine's at most 4 GiB.
    pub kv_bytes: u64,
    /// Bytes of KV pages for which memory is taken while the device is idle, not when they are first used; `None`: a sixteenth of all.
    pub kv_touch_bytes: Option<u64>,
    /// Tokens of one KV page; a multiple of 16.
    pub page_tokens: u32,
    /// How keys and values are stored: `f32`, `bf16` or `int8`.
    pub kv_format: KvFormat,
    /// What layers with bf16 weights are computed from: `f32`, or activations rounded to `bf16`.
    pub bf16_compute: Bf16Compute,
    /// Rows of one batch; 0: 48 for each thread, from 96 to 1024.
    pub step_tokens_max: u32,
    /// Rows of one sequence in one batch; 0: as `step_tokens_max`.
    pub chunk_tokens_max: u32,
    /// Milliseconds wanted between two tokens of a sequence: prompts are computed in the slack; 0: no target.
    pub gap_ms: u32,
    /// Milliseconds wanted from admission to the first token; 0: no target.
    pub ttft_ms: u32,
    /// Milliseconds that one batch may be expected to take; 0: any.
    pub batch_ms_max: u32,
    /// Milliseconds that a ready row lets others go first, at most.
    pub row_wait_ms: u32,
    /// Milliseconds that a ready row lets others go first, at most, so that models that share its segment run it together, and never longer than
    /// a pass and a half; 0: rows do not wait.
    pub regroup_wait_ms: u32,
    /// Segments of models that are alike in all but their weights, and run abreast in one batch, at most; 1: none do.
    pub strands_max: u32,
    /// Batches that the device has at one time: one that it computes, the others next.
    pub batches_in_flight_max: u32,
    /// Sequences that hold pages at one time.
    pub sequences_max: u32,
    /// Sequences that wait.
    pub waiting_max: u32,
    /// Bytes of hidden rows kept where chains part, for other models; 0: none.
    pub boundary_bytes: u64,
    /// Whether full pages are kept for later sequences.
    pub prefix_cache: bool,
    /// Time for running sequences to end after SIGTERM, in milliseconds.
    pub drain_ms: u64,
}

impl Default for ExecutorConfig {
    fn default() -> Self {
        let limits = Limits::default();
        Self {
            id: String::new(),
            listen: "127.0.0.1:8090".to_owned(),
            advertise: String::new(),
            metrics_listen: "127.0.0.1:8091".to_owned(),
            device: "auto".to_owned(),
            threads: 0,
            isa: "auto".to_owned(),
            memory_bytes: 0,
            kv_bytes: 0,
            kv_touch_bytes: None,
            page_tokens: limits.page_tokens,
            kv_format: limits.kv_format,
            bf16_compute: Bf16Compute::default(),
            step_tokens_max: 0,
            chunk_tokens_max: 0,
            gap_ms: limits.gap_ms,
            ttft_ms: limits.ttft_ms,
            batch_ms_max: limits.batch_ms_max,
            row_wait_ms: limits.row_wait_ms,
            regroup_wait_ms: limits.regroup_wait_ms,
            strands_max: limits.strands_max,
            batches_in_flight_max: limits.batches_in_flight_max,
            sequences_max: limits.sequences_max,
            waiting_max: limits.waiting_max,
            boundary_bytes: limits.boundary_bytes,
            prefix_cache: limits.prefix_cache,
            drain_ms: 120_000,
        }
    }
}

impl ExecutorConfig {
    /// The instruction set that is asked for, on this machine or not; `None`: the best that the machine has.
    ///
    /// # Errors
    /// When the name means none.
    pub fn isa(&self) -> anyhow::Result<Option<Isa>> {
        if self.isa == "auto" {
            return Ok(None);
        }
        let isa = self.isa.parse().ok();
        ensure!(isa.is_some(), "use executor.isa = `{}`: expected auto, avx512-bf16, avx512, avx-vnni, avx2 or scalar", self.isa);
        Ok(isa)
    }

    /// The engine's limits on a device of so many threads, checked. Pages take at most `kv_bytes_max` unless they are told to take more.
    ///
    /// # Errors
    /// The relation of limits that does not hold.
    pub fn limits(&self, available_bytes: u64, kv_bytes_max: u64, threads: usize) -> anyhow::Result<Limits> {
        let kv_bytes = if self.kv_bytes > 0 { self.kv_bytes } else { (available_bytes / 4).min(kv_bytes_max) };
        // A step of so many rows is bound by arithmetic, not by reading weights; more rows only make whoever decodes wait longer.
        let rows_of_threads = u32::try_from(threads).unwrap_or(u32::MAX).saturating_mul(48).clamp(96, 1024);
        let step_tokens_max = if self.step_tokens_max > 0 { self.step_tokens_max } else { rows_of_threads.max(self.sequences_max) };
        let chunk_tokens_max = if self.chunk_tokens_max > 0 { self.chunk_tokens_max } else { step_tokens_max };
        let limits = Limits {
            page_tokens: self.page_tokens,
            kv_format: self.kv_format,
            step_tokens_max,
            chunk_tokens_max,
            gap_ms: self.gap_ms,
            ttft_ms: self.ttft_ms,
            batch_ms_max: self.batch_ms_max,
            row_wait_ms: self.row_wait_ms,
            regroup_wait_ms: self.regroup_wait_ms,
            strands_max: self.strands_max,
            batches_in_flight_max: self.batches_in_flight_max,
            sequences_max: self.sequences_max,
            waiting_max: self.waiting_max,
            hidden_rows_max: step_tokens_max.saturating_mul(4),
            link_rows_max: step_tokens_max.saturating_mul(2),
            kv_bytes,
            kv_touch_bytes: self.kv_touch_bytes.unwrap_or(kv_bytes / 16),
            boundary_bytes: self.boundary_bytes,
            prefix_cache: self.prefix_cache,
        };
        limits.check().map_err(|sentence| anyhow::anyhow!("use section [executor]: {sentence}"))?;
        Ok(limits)
    }

    /// Checks that the memory asked for is there, before anything listens.
    ///
    /// # Errors
    /// The key that asks for more than is available to this process.
    pub fn check_memory(&self, available_bytes: u64) -> anyhow::Result<()> {
        for (key, bytes) in [("kv_bytes", self.kv_bytes), ("boundary_bytes", self.boundary_bytes)] {
            ensure!(bytes <= available_bytes, "use executor.{key} = {bytes}: {available_bytes} bytes are available here");
        }
        Ok(())
    }
}

impl Config {
    /// Checks what types cannot, before anything starts.
    ///
    /// # Errors
    /// The first key whose value cannot be used, with the range that can.
    fn check(&self) -> anyhow::Result<()> {
        let within = |key: &str, value: u64, least: u64, most: u64| {
            ensure!((least..=most).contains(&value), "use {key} = {value}: expected {least} to {most}");
            Ok(())
        };
        let threads = u64::try_from(self.executor.threads).unwrap_or(u64::MAX);
        within("executor.threads", threads, 0, THREADS_MAX as u64)?;
        within("placement.spans_per_chain", self.placement.spans_per_chain.into(), 1, PLACEMENT_MAX.into())?;
        within("placement.replicas", self.placement.replicas.into(), 1, PLACEMENT_MAX.into())?;
        if self.zoo.refresh_ms != 0 {
            within("zoo.refresh_ms", self.zoo.refresh_ms, REFRESH_MS_MIN, 86_400_000)?;
        }
        let kv_bytes = self.executor.kv_bytes;
        ensure!(
            kv_bytes == 0 || kv_bytes >= KV_BYTES_MIN,
            "use executor.kv_bytes = {kv_bytes}: expected 0 (chosen at start) or at least {KV_BYTES_MIN}"
        );
        let listen = &self.router.listen;
        ensure!(listen.parse::<SocketAddr>().is_ok(), "use router.listen = `{listen}`: expected IP:PORT, as 127.0.0.1:8080");
        for (key, listen) in [("executor.listen", &self.executor.listen), ("executor.metrics_listen", &self.executor.metrics_listen)] {
            let parts = listen.rsplit_once(':').filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
            ensure!(parts.is_some(), "use {key} = `{listen}`: expected HOST:PORT, as 0.0.0.0:8090");
        }
        let (device, format) = (&self.executor.device, &self.log.format);
        ensure!(device.parse::<Wanted>().is_ok(), "use executor.device = `{device}`: expected auto, cpu or cuda:N");
        self.executor.isa()?;
        ensure!(["text", "json"].contains(&format.as_str()), "use log.format = `{format}`: expected text or json");
        // Memory decides no relation, so that any amount of it serves.
        self.executor.limits(1 << 30, 1 << 30, self.executor.threads).map(drop)
    }
}

/// The zoo that variables name, for commands that read no configuration.
///
/// # Errors
/// When two variables name two zoos, or one names no place.
pub fn zoo_of_environment() -> anyhow::Result<Option<Place>> {
    zoo_of(&our_variables()).map_err(misused)
}

fn zoo_of(variables: &[(String, String)]) -> anyhow::Result<Option<Place>> {
    let value = |wanted: &str| variables.iter().find(|(name, value)| name == wanted && !value.is_empty()).map(|(_, value)| value);
    let (short, long) = (value(ZOO_VARIABLE), value(ZOO_ROOT_VARIABLE));
    if let (Some(short), Some(long)) = (short, long)
        && short != long
    {
        bail!("use {ZOO_VARIABLE}={short} and {ZOO_ROOT_VARIABLE}={long}: both mean zoo.root, so set one of them");
    }
    let name = if short.is_some() { ZOO_VARIABLE } else { ZOO_ROOT_VARIABLE };
    short.or(long).map(|place| place.parse().with_context(|| format!("use variable {name}"))).transpose()
}

/// Variables with our prefix, in order of name.
fn our_variables() -> Vec<(String, String)> {
    let mut variables: Vec<(String, String)> = std::env::vars().filter(|(name, _)| name.starts_with("ASHLAR_")).collect();
    variables.sort();
    variables
}

/// The key that a variable's name means, without the prefix and in lower case: the one whose parts, joined by `_`, are the name. Names
/// of keys hold `_` too, so the default configuration tells where a section ends.
fn key_of(name: &str, table: &toml::Table) -> Option<String> {
    table.iter().find_map(|(key, value)| {
        if key == name {
            return Some(key.clone());
        }
        let inner = name.strip_prefix(key.as_str())?.strip_prefix('_')?;
        Some(format!("{key}.{}", key_of(inner, value.as_table()?)?))
    })
}

/// `[registry]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// `etcd://host:port,host:port[/prefix]`, `file:PATH` or `memory:`; empty: a file beside the zoo's directory (`serve` only).
    pub url: String,
}

/// `[zoo]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ZooConfig {
    /// Where the zoo is: a directory, or `s3://BUCKET[/PREFIX]`.
    pub root: Place,
    /// How often names are looked at again, in milliseconds; 0: 2 seconds in a directory, 10 in a bucket, where each look costs a request.
    pub refresh_ms: u64,
    /// Directory where tensors are kept, decoded, from one start to the next; empty: they are decoded anew, and of a bucket downloaded anew.
    pub cache: PathBuf,
    /// Bytes of that directory, at most.
    pub cache_bytes: u64,
}

impl Default for ZooConfig {
    fn default() -> Self {
        Self { root: Place::Directory(PathBuf::from("zoo-data")), refresh_ms: 0, cache: PathBuf::new(), cache_bytes: 64 << 30 }
    }
}

impl ZooConfig {
    /// How often names are looked at again.
    pub fn refresh(&self) -> Duration {
        Duration::from_millis(match (self.refresh_ms, &self.root) {
            (0, Place::Directory(_)) => 2_000,
            (0, Place::Bucket { .. }) => 10_000,
            (chosen, _) => chosen,
        })
    }
}

impl Config {
    /// The URL of the registry: the one that is named, or else a file beside the zoo.
    ///
    /// # Errors
    /// When none is named and the zoo is in a bucket.
    pub fn registry_url(&self) -> anyhow::Result<String> {
        match (self.registry.url.as_str(), self.zoo.root.directory()) {
            ("", Some(root)) => Ok(format!("file:{}.registry.json", root.display())),
            ("", None) => bail!(
                "use zoo {}: no file lies beside a bucket, so name the registry (--registry file:PATH or etcd://HOST:PORT)",
                self.zoo.root
            ),
            (url, _) => Ok(url.to_owned()),
        }
    }
}

/// `[placement]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlacementConfig {
    /// Each chain is cut into so many spans on as many executors; 1: cut only where it must be.
    pub spans_per_chain: u32,
    /// Each span is on so many executors, where there is room.
    pub replicas: u32,
}

impl Default for PlacementConfig {
    fn default() -> Self {
        Self { spans_per_chain: 1, replicas: 1 }
    }
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// What is logged, as `level` or `target=level,...`.
    pub filter: String,
    /// `text` or `json`.
    pub format: String,
    /// Where traces go, as `http://host:4317` (OTLP over gRPC); empty: nowhere.
    pub otlp_endpoint: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "info".to_owned(), format: "text".to_owned(), otlp_endpoint: String::new() }
    }
}

/// Flags of commands that need to know where the zoo and the registry are.
#[derive(Debug, Args)]
pub struct PlaceArgs {
    /// Configuration file (TOML)
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    /// Directory of the zoo, or s3://BUCKET[/PREFIX] [env: ASHLAR_ZOO]
    #[arg(long, global = true, value_name = "PLACE")]
    zoo: Option<Place>,
    /// Registry: etcd://HOST:PORT[,HOST:PORT][/PREFIX], file:PATH or memory:
    #[arg(long, global = true)]
    registry: Option<String>,
    /// Any key: SECTION.KEY=VALUE
    #[arg(long = "set", global = true, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

/// Flags of servers.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    #[command(flatten)]
    places: PlaceArgs,
    /// Address to listen on: REST for serve and router, gRPC for executor
    #[arg(long)]
    listen: Option<String>,
    /// What an executor computes on: auto, cpu or cuda:N (`ashlar devices` lists what there is)
    #[arg(long)]
    device: Option<String>,
    /// Print the configuration in force and exit
    #[arg(long)]
    pub print_config: bool,
}

impl ConfigArgs {
    /// The configuration in force; `--listen` is the address of `listener` (`router` or `executor`).
    ///
    /// # Errors
    /// Which file, variable or flag is wrong, and how.
    pub fn load_for(&self, listener: &str) -> anyhow::Result<Config> {
        let listen = self.listen.as_deref().map(|address| (format!("{listener}.listen"), address));
        let device = self.device.as_deref().map(|device| ("executor.device".to_owned(), device));
        let given: Vec<(String, &str)> = listen.into_iter().chain(device).collect();
        self.places.load_with(&given, &our_variables()).map_err(misused)
    }
}

impl PlaceArgs {
    /// The configuration in force.
    ///
    /// # Errors
    /// Which file, variable or flag is wrong, and how.
    pub fn load(&self) -> anyhow::Result<Config> {
        self.load_with(&[], &our_variables()).map_err(misused)
    }

    /// `given` are keys and values of other flags.
    fn load_with(&self, given: &[(String, &str)], variables: &[(String, String)]) -> anyhow::Result<Config> {
        let mut table = match &self.config {
            None => toml::Table::new(),
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("read configuration {}", path.display()))?;
                // Read alone first, so that an unknown key is blamed on the file and its line.
                toml::from_str::<Config>(&text).with_context(|| format!("read configuration {}", path.display()))?;
                toml::from_str(&text).with_context(|| format!("read configuration {}", path.display()))?
            }
        };
        let known = toml::Table::try_from(Config::default()).context("read the default configuration")?;
        for (name, value) in variables {
            if OTHER_VARIABLES.contains(&name.as_str()) {
                continue;
            }
            let key = name["ASHLAR_".len()..].to_ascii_lowercase();
            let Some((section, rest)) = key.split_once('_') else { bail!("use variable {name}: expected ASHLAR_<SECTION>_<KEY>") };
            // A name that no key has is told with the words of the section.
            let key = key_of(&key, &known).unwrap_or_else(|| format!("{section}.{rest}"));
            set(&mut table, &key, value).with_context(|| format!("use variable {name}"))?;
        }
        if let Some(zoo) = self.zoo.clone().or(zoo_of(variables)?) {
            set(&mut table, "zoo.root", &zoo.to_string())?;
        }
        if let Some(registry) = &self.registry {
            set(&mut table, "registry.url", registry)?;
        }
        for (key, value) in given {
            set(&mut table, key, value)?;
        }
        for pair in &self.set {
            let (key, value) = pair.split_once('=').with_context(|| format!("use --set {pair}: expected SECTION.KEY=VALUE"))?;
            set(&mut table, key, value).with_context(|| format!("use --set {pair}"))?;
        }
        let config = Config::deserialize(table).context("read the configuration")?;
        config.check()?;
        Ok(config)
    }
}

fn misused(error: anyhow::Error) -> anyhow::Error {
    Misused(error).into()
}

/// Sets `section.key[.key]` and checks at once that the whole still makes sense.
fn set(table: &mut toml::Table, key: &str, value: &str) -> anyhow::Result<()> {
    let plain = toml::Value::String(value.to_owned());
    // A value that reads as a number or truth is one, unless the key wants text.
    let typed = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .ok()
        .and_then(|mut parsed| parsed.remove("v"))
        .unwrap_or_else(|| plain.clone());
    let mut changed = table.clone();
    insert(&mut changed, key, typed)?;
    match Config::deserialize(changed.clone()) {
        Ok(_) => *table = changed,
        Err(error) => {
            let mut textual = table.clone();
            insert(&mut textual, key, plain)?;
            if Config::deserialize(textual.clone()).is_err() {
                // There is no file whose lines it could show: what is wrong and where, on one line.
                let lines: Vec<&str> = error.message().lines().map(str::trim).collect();
                bail!("{} in `{key}`", lines.join(" "));
            }
            *table = textual;
        }
    }
    Ok(())
}

fn insert(table: &mut toml::Table, key: &str, value: toml::Value) -> anyhow::Result<()> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
            Ok(())
        }
        Some((section, rest)) => {
            let inner = table.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            let toml::Value::Table(inner) = inner else { bail!("`{section}` is no section") };
            insert(inner, rest, value)
        }
    }
}

#[cfg(test)]
mod tests;
