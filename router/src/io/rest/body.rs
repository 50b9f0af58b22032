//! The reading of a request's body: JSON by its header, bounded in bytes and in time.

use std::time::Duration;

use ashlar_wire::code::Code;
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};

use crate::io::backend::ApiError;
use crate::io::rest::config::RestLimits;

/// The whole body.
pub(crate) async fn read(request: Request, limits: &RestLimits) -> Result<Bytes, ApiError> {
    check_media_type(request.headers())?;
    let too_large = || ApiError::new(Code::BodyTooLarge, format!("the body is over the limit of {} bytes", limits.body_bytes_max));
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limits.body_bytes_max as u64) {
        return Err(too_large());
    }
    let body = Limited::new(request.into_body(), limits.body_bytes_max).collect();
    match tokio::time::timeout(Duration::from_millis(limits.body_read_ms), body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(ApiError::new(Code::InvalidJson, format!("the body could not be read: {error}"))),
        Err(_) => Err(ApiError::new(Code::RequestTimeout, format!("the body did not arrive within {} ms", limits.body_read_ms))),
    }
}

/// No header counts as JSON; any other type is refused.
fn check_media_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let kind = value.to_str().unwrap_or("").split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json")) {
        return Ok(());
    }
    Err(ApiError::new(Code::UnsupportedMediaType, "the body must have `Content-Type: application/json`"))
}
