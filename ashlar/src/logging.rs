//! Logs to standard error, and traces to an OTLP endpoint where one is set.

use anyhow::Context;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::LogConfig;

/// Sends what is left to send when dropped.
pub struct Guard(Option<SdkTracerProvider>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(provider) = self.0.take() {
            // The process is about to end; there is nobody left to tell.
            let _ = provider.shutdown();
        }
    }
}

/// Starts logging. `role` names the process in traces.
///
/// # Errors
/// When the filter, the format or the endpoint cannot be used.
pub fn start(config: &LogConfig, role: &'static str) -> anyhow::Result<Guard> {
    // The error tells its cause itself; as a source it would be told twice.
    let filter = EnvFilter::try_new(&config.filter).map_err(|error| anyhow::anyhow!("use log.filter `{}`: {error}", config.filter))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    let lines = match config.format.as_str() {
        "text" => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
        "json" => tracing_subscriber::fmt::layer().json().with_writer(std::io::stderr).boxed(),
        other => anyhow::bail!("use log.format `{other}`: expected text or json"),
    };
    let registry = tracing_subscriber::registry().with(lines.with_filter(filter));
    if config.otlp_endpoint.is_empty() {
        registry.try_init().context("start logging")?;
        return Ok(Guard(None));
    }
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(&config.otlp_endpoint)
        .build()
        .with_context(|| format!("use log.otlp_endpoint `{}`", config.otlp_endpoint))?;
    let resource = opentelemetry_sdk::Resource::builder().with_service_name(format!("ashlar-{role}")).build();
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
    let spans = tracing_opentelemetry::layer().with_tracer(provider.tracer("ashlar")).with_filter(EnvFilter::new("info"));
    registry.with(spans).try_init().context("start logging")?;
    Ok(Guard(Some(provider)))
}
