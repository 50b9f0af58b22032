//! Errors as clients see them: OpenAI's error object, with the status of the code.

use ashlar_wire::code::Code;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::io::backend::ApiError;

/// The body of an error response, and of an error inside a stream.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorObject<'a>,
}

#[derive(Debug, Serialize)]
struct ErrorObject<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'a str>,
    code: &'static str,
}

impl<'a> ErrorBody<'a> {
    pub(crate) fn of(error: &'a ApiError) -> Self {
        let object = ErrorObject {
            message: &error.message,
            kind: error.code.error_type(),
            param: error.param.as_deref(),
            code: error.code.as_str(),
        };
        Self { error: object }
    }
}

/// Logs a failure where it meets the client. Failures of the world were logged by the backend, which knows their causes; what is left
/// to log is our own fault.
pub(crate) fn log(error: &ApiError) {
    match error.code {
        Code::Internal => tracing::error!(code = %error.code, "a request failed by our own fault: {}", error.message),
        _ => tracing::debug!(code = %error.code, param = error.param.as_deref(), "a request failed: {}", error.message),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        log(&self);
        let status = StatusCode::from_u16(self.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(ErrorBody::of(&self))).into_response();
        let headers = response.headers_mut();
        match self.code {
            Code::InvalidApiKey => drop(headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            Code::TooManyRequests | Code::ModelNotReady | Code::Unavailable => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            // The rest of the body is not read, or nothing more is wanted on this connection.
            Code::Draining | Code::RequestTimeout | Code::BodyTooLarge | Code::UnsupportedMediaType => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}
