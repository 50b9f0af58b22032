//! The router's metrics, by the names of ARCHITECTURE.md, and their exposition. Labels that clients can choose are capped. One
//! registry each for router and executor; `render` joins them and adds the names that dashboards for vLLM know.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::proto::{LabelPair, MetricFamily};
use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};
use tokio::time::Instant;

/// Different values of a label before the rest is `other`.
const LABEL_VALUES_MAX: usize = 200;
/// The label of what is over the cap, or not known.
const OTHER: &str = "other";

/// Our name and the one that vLLM uses; `model` becomes `model_name`.
const ALIASES: &[(&str, &str)] = &[
    ("ashlar_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
    ("ashlar_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"),
    ("ashlar_inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    ("ashlar_request_duration_seconds", "vllm:e2e_request_latency_seconds"),
    ("ashlar_prompt_tokens_total", "vllm:prompt_tokens_total"),
    ("ashlar_generated_tokens_total", "vllm:generation_tokens_total"),
];

const TTFT_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const ITL_BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
const DURATION_BUCKETS: &[f64] =
    &[0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 300.0, 600.0];

/// What the router counts.
pub struct RouterMetrics {
    registry: Registry,
    requests: IntCounterVec,
    time_to_first_token: HistogramVec,
    inter_token_latency: HistogramVec,
    request_duration: HistogramVec,
    prompt_tokens: IntCounterVec,
    generated_tokens: IntCounterVec,
    in_flight: IntGauge,
    models: LabelCap,
    tenants: LabelCap,
}

impl RouterMetrics {
    /// Registers all metrics in a registry of their own.
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name, help, labels: &[&str]| register(&registry, IntCounterVec::new(Opts::new(name, help), labels)?);
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            register(&registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &["model"])?)
        };
        let by_tenant = &["model", "tenant"];
        let metrics = Self {
            requests: counter(
                "ashlar_requests_total",
                "Requests that ended, by code (`ok`, `cancelled` or an error's code).",
                &["model", "tenant", "code"],
            )?,
            time_to_first_token: histogram(
                "ashlar_time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                TTFT_BUCKETS,
            )?,
            inter_token_latency: histogram("ashlar_inter_token_latency_seconds", "From one token of a sequence to its next.", ITL_BUCKETS)?,
            request_duration: histogram("ashlar_request_duration_seconds", "From a request's arrival to its end.", DURATION_BUCKETS)?,
            prompt_tokens: counter("ashlar_prompt_tokens_total", "Tokens of prompts.", by_tenant)?,
            generated_tokens: counter("ashlar_generated_tokens_total", "Tokens generated.", by_tenant)?,
            in_flight: register(&registry, IntGauge::new("ashlar_requests_in_flight", "Requests that have not ended.")?)?,
            models: LabelCap::new(LABEL_VALUES_MAX),
            tenants: LabelCap::new(LABEL_VALUES_MAX),
            registry,
        };
        Ok(Arc::new(metrics))
    }

    /// The registry, for `render` or for a process that shows several.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Begins to count a request.
    pub fn request(self: &Arc<Self>) -> RequestMetrics {
        self.in_flight.inc();
        RequestMetrics {
            metrics: Arc::clone(self),
            arrived: Instant::now(),
            tenant: None,
            labels: None,
            is_timed: false,
            code: "cancelled",
            first_token_seen: false,
        }
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

/// One request on its way. When dropped it counts the request under its code: `cancelled` unless said otherwise.
pub struct RequestMetrics {
    metrics: Arc<RouterMetrics>,
    arrived: Instant,
    /// The label of who asks, once known.
    tenant: Option<String>,
    labels: Option<Labels>,
    /// Its duration counts: it was not refused for what it asks.
    is_timed: bool,
    code: &'static str,
    first_token_seen: bool,
}

/// Handles for one model and tenant, looked up once.
struct Labels {
    model: String,
    tenant: String,
    inter_token_latency: prometheus::Histogram,
    generated_tokens: IntCounter,
}

impl RequestMetrics {
    /// Names the tenant, once it is known to exist.
    pub fn set_tenant(&mut self, tenant: &str) {
        self.tenant = Some(self.metrics.tenants.label(tenant));
    }

    /// Names the model and the tenant, once both are known to exist.
    pub fn set_model(&mut self, model: &str, tenant: &str) {
        let metrics = &self.metrics;
        let (model, tenant) = (metrics.models.label(model), metrics.tenants.label(tenant));
        self.labels = Some(Labels {
            inter_token_latency: metrics.inter_token_latency.with_label_values(&[model.as_str()]),
            generated_tokens: metrics.generated_tokens.with_label_values(&[model.as_str(), tenant.as_str()]),
            model,
            tenant,
        });
    }

    /// Counts prompt tokens.
    pub fn add_prompt_tokens(&self, count: u64) {
        if let Some(labels) = &self.labels {
            self.metrics.prompt_tokens.with_label_values(&[labels.model.as_str(), labels.tenant.as_str()]).inc_by(count);
        }
    }

    /// Counts one token; `previous` is when the sequence's last one came. Returns when this one did.
    pub fn token(&mut self, previous: Option<Instant>) -> Instant {
        let now = Instant::now();
        if let Some(labels) = &self.labels {
            labels.generated_tokens.inc();
            if let Some(previous) = previous {
                labels.inter_token_latency.observe((now - previous).as_secs_f64());
            }
            if !self.first_token_seen {
                self.first_token_seen = true;
                let seconds = (now - self.arrived).as_secs_f64();
                self.metrics.time_to_first_token.with_label_values(&[labels.model.as_str()]).observe(seconds);
            }
        }
        now
    }

    /// The request is one that can run: how long it takes is counted too.
    pub fn set_timed(&mut self) {
        self.is_timed = true;
    }

    /// How the request ended: `ok` or an error's code.
    pub fn set_code(&mut self, code: &'static str) {
        self.code = code;
    }
}

impl Drop for RequestMetrics {
    fn drop(&mut self) {
        self.metrics.in_flight.dec();
        let model = self.labels.as_ref().map_or(OTHER, |labels| &labels.model);
        let tenant = self.labels.as_ref().map(|labels| &labels.tenant).or(self.tenant.as_ref()).map_or(OTHER, String::as_str);
        self.metrics.requests.with_label_values(&[model, tenant, self.code]).inc();
        if self.is_timed {
            self.metrics.request_duration.with_label_values(&[model]).observe(self.arrived.elapsed().as_secs_f64());
        }
    }
}

/// Lets the first so many values of a label through; the rest is `other`.
struct LabelCap {
    values_max: usize,
    seen: Mutex<BTreeSet<String>>,
}

impl LabelCap {
    fn new(values_max: usize) -> Self {
        Self { values_max, seen: Mutex::new(BTreeSet::new()) }
    }

    fn label(&self, value: &str) -> String {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if !seen.contains(value) {
            if seen.len() >= self.values_max {
                return OTHER.to_owned();
            }
            seen.insert(value.to_owned());
        }
        value.to_owned()
    }
}

/// The text exposition of several registries as one: families of one name are joined, aliases added, all sorted by name.
pub fn render(registries: &[Registry]) -> Result<String, prometheus::Error> {
    let mut families: Vec<MetricFamily> = Vec::new();
    for family in registries.iter().flat_map(Registry::gather) {
        match families.iter_mut().find(|known| known.name() == family.name()) {
            Some(known) => known.mut_metric().extend(family.get_metric().iter().cloned()),
            None => families.push(family),
        }
    }
    for (ours, alias) in ALIASES {
        if families.iter().any(|family| family.name() == *alias) {
            continue;
        }
        if let Some(family) = families.iter().find(|family| family.name() == *ours) {
            families.push(renamed(family, alias));
        }
    }
    families.sort_by(|a, b| a.name().cmp(b.name()));
    TextEncoder::new().encode_to_string(&families)
}

fn renamed(family: &MetricFamily, name: &str) -> MetricFamily {
    let mut family = family.clone();
    family.set_name(name.to_owned());
    for metric in family.mut_metric() {
        let labels: Vec<LabelPair> = metric.take_label();
        let rename = |mut label: LabelPair| {
            if label.name() == "model" {
                label.set_name("model_name".to_owned());
            }
            label
        };
        metric.set_label(labels.into_iter().map(rename).collect());
    }
    family
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_capped() {
        let cap = LabelCap::new(2);
        let labels: Vec<String> = ["a", "b", "c", "a"].iter().map(|v| cap.label(v)).collect();
        assert_eq!(labels, ["a", "b", "other", "a"]);
    }

    #[test]
    fn registries_are_joined_and_aliased() {
        let metrics = RouterMetrics::new().unwrap();
        let mut request = metrics.request();
        request.set_model("t/m", "t");
        request.token(None);
        request.set_code("ok");
        drop(request);
        let other = Registry::new();
        register(&other, IntGauge::new("ashlar_sequences_running", "Running.").unwrap()).unwrap();
        let text = render(&[metrics.registry().clone(), other]).unwrap();
        for line in [
            r#"ashlar_requests_total{code="ok",model="t/m",tenant="t"} 1"#,
            r#"ashlar_generated_tokens_total{model="t/m",tenant="t"} 1"#,
            r#"vllm:time_to_first_token_seconds_count{model_name="t/m"} 1"#,
            "ashlar_sequences_running 0",
            "ashlar_requests_in_flight 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
        }
    }
}
