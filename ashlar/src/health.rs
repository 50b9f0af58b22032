//! `/health`, `/ready` and `/metrics` of an executor process.

use std::sync::Arc;

use ashlar_router::io::metrics;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;

/// Whether the executor is registered and obeys a plan; the sentence says what is missing.
pub type Ready = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Serves until the process ends.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: tokio::net::TcpListener, registries: Vec<prometheus::Registry>, ready: Ready) -> std::io::Result<()> {
    let app = Router::<()>::new()
        .route("/health", get(async || "ok\n"))
        .route(
            "/ready",
            get(async move || match ready() {
                Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
                Err(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("{missing}\n")),
            }),
        )
        .route(
            "/metrics",
            get(async move || match metrics::render(&registries) {
                Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
                Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
            }),
        );
    axum::serve(listener, app).await
}
