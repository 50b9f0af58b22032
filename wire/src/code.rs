//! Stable error codes: one list for what a caller may see. Each has a test that provokes it.

use std::fmt;

/// Advice to the caller after a failure of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It will fail again.
    Never,
    /// The same call may succeed later.
    Same,
    /// Another executor may succeed now.
    Elsewhere,
}

macro_rules! codes {
    ($($variant:ident $text:literal $status:literal $kind:literal $doc:literal;)*) => {
        /// A stable error code.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $(#[doc = $doc] $variant,)* }

        impl Code {
            /// All codes, for documentation and tests.
            pub const ALL: &[Code] = &[$(Code::$variant,)*];

            /// The stable text, as in `error.code`.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }

            /// HTTP status.
            pub fn http_status(self) -> u16 {
                match self { $(Code::$variant => $status,)* }
            }

            /// OpenAI's `error.type`.
            pub fn error_type(self) -> &'static str {
                match self { $(Code::$variant => $kind,)* }
            }

            /// The code with this text, if there is one.
            pub fn parse(text: &str) -> Option<Code> {
                match text { $($text => Some(Code::$variant),)* _ => None }
            }
        }
    };
}

codes! {
    InvalidJson "invalid_json" 400 "invalid_request_error" "The body is no JSON, or nests too deeply.";
    InvalidValue "invalid_value" 400 "invalid_request_error" "A parameter has a wrong type or is out of range; `param` names it.";
    UnsupportedParameter "unsupported_parameter" 400 "invalid_request_error" "A parameter is unknown or not supported; `param` names it.";
    ContextLengthExceeded "context_length_exceeded" 400 "invalid_request_error" "Prompt plus tokens asked for do not fit the model's context.";
    NeverFits "never_fits" 400 "invalid_request_error" "The sequence would need more KV pages than the executor has.";
    AdapterRefused "adapter_refused" 400 "invalid_request_error" "The adapter cannot be served; the message says why.";
    ModelExists "model_exists" 400 "invalid_request_error" "A model of this name is there already, and is another.";
    NotLoaded "not_loaded" 400 "invalid_request_error" "The model was added to the zoo, not loaded, and so is not unloaded.";
    TemplateFailed "template_failed" 400 "invalid_request_error" "The chat template refused the messages.";
    NoChatTemplate "no_chat_template" 400 "invalid_request_error" "The model has no chat template; use /v1/completions.";
    InvalidApiKey "invalid_api_key" 401 "authentication_error" "No key, or an unknown one.";
    Forbidden "forbidden" 403 "permission_error" "The key is good, but what was asked is for administrators.";
    ModelNotFound "model_not_found" 404 "invalid_request_error" "No such model for this tenant.";
    NotFound "not_found" 404 "invalid_request_error" "No such route.";
    MethodNotAllowed "method_not_allowed" 405 "invalid_request_error" "The route exists, the verb does not.";
    RequestTimeout "request_timeout" 408 "invalid_request_error" "The body did not arrive in time.";
    BodyTooLarge "body_too_large" 413 "invalid_request_error" "The body is over the limit.";
    UnsupportedMediaType "unsupported_media_type" 415 "invalid_request_error" "The body is not application/json.";
    ModelFailed "model_failed" 422 "invalid_request_error" "The model gives no token: its numbers overflow, or it is broken.";
    TooManyRequests "too_many_requests" 429 "rate_limit_error" "The limit of concurrent requests is reached.";
    Internal "internal_error" 500 "server_error" "A defect of the server; it is logged.";
    ModelNotReady "model_not_ready" 503 "server_error" "No executor holds the model's chain yet.";
    Unavailable "unavailable" 503 "server_error" "An executor was lost and no other could take over.";
    Draining "draining" 503 "server_error" "The server is shutting down.";
    StalePlan "stale_plan" 409 "server_error" "The message names an older plan than the executor obeys.";
    UnknownSpan "unknown_span" 409 "server_error" "The executor does not hold the span named.";
    NumericClass "numeric_class_mismatch" 409 "server_error" "The executor is of another numeric class than the sequence is pinned to.";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_parses_back() {
        for code in Code::ALL {
            assert_eq!(Code::parse(code.as_str()), Some(*code));
        }
    }
}
