//! What surrounds every request: its id and span, the refusal while draining, the catch of a panic; and the answers where there is no
//! route.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use ashlar_wire::code::Code;
use ashlar_wire::id::RequestId;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use tracing::Instrument;
use tracing::field::Empty;

use crate::io::backend::ApiError;
use crate::io::rest::Rest;
use crate::io::rest::generation::random_bits;

/// Paths that answer while draining.
const PROBES: &[&str] = &["/health", "/ready", "/metrics"];

/// The outermost layer.
pub(crate) async fn envelope(State(rest): State<Arc<Rest>>, mut request: Request, next: Next) -> Response {
    let id = RequestId::from_bits(random_bits());
    let span = tracing::info_span!("request", request.id = %id, tenant.id = Empty, model = Empty, path = %request.uri().path());
    request.extensions_mut().insert(id.clone());
    let refused = rest.draining() && !PROBES.contains(&request.uri().path());
    let answered = async {
        if refused {
            return ApiError::new(Code::Draining, "the server is shutting down").into_response();
        }
        match AssertUnwindSafe(next.run(request)).catch_unwind().await {
            Ok(response) => response,
            Err(panic) => {
                let what = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
                tracing::error!(panic = what.unwrap_or("of another type"), "a request panicked");
                ApiError::new(Code::Internal, "a defect of the server; it is logged").into_response()
            }
        }
    };
    let mut response = answered.instrument(span).await;
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

/// No such path.
pub(crate) async fn not_found(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    ApiError::new(Code::NotFound, format!("there is no route `{path}`"))
}

/// The path exists, the verb does not.
pub(crate) async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    ApiError::new(Code::MethodNotAllowed, format!("`{path}` does not take {method}"))
}
