//! `POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`, with the parameters that vLLM has. For administrators, where the server has a
//! folder of adapters.

use std::sync::Arc;

use ashlar_wire::code::Code;
use ashlar_wire::id::TenantName;
use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::io::backend::{Administration, ApiError, NewAdapter};
use crate::io::rest::Rest;
use crate::io::rest::fields::{Fields, Off};
use crate::io::rest::models::Model;

const LOAD: &[&str] = &["lora_name", "lora_path", "base_model_name", "load_inplace"];
const UNLOAD: &[&str] = &["lora_name"];
/// Adapters have names here, and no numbers.
const OFF_UNLOAD: &[Off] = &[("lora_int_id", &[])];

/// As OpenAI answers when a model is deleted.
#[derive(Serialize)]
struct Unloaded {
    id: String,
    object: &'static str,
    deleted: bool,
}

/// The route; answers with the model.
pub(crate) async fn load(State(rest): State<Arc<Rest>>, request: Request) -> Result<Response, ApiError> {
    let call = rest.open(request, None).await?;
    let administration = administration(&rest, &call.tenant)?;
    let mut fields = Fields::of_body(&call.body, LOAD, &[])?;
    let adapter = NewAdapter {
        name: fields.require("lora_name", "a string")?,
        path: fields.require("lora_path", "a string")?,
        base: fields.take("base_model_name", "a string")?,
        replaces: fields.take_flag("load_inplace")?.unwrap_or(false),
    };
    fields.finish();
    let view = administration.load_adapter(&call.tenant, adapter).await?;
    Ok(Json(Model::of(&view)).into_response())
}

/// The route.
pub(crate) async fn unload(State(rest): State<Arc<Rest>>, request: Request) -> Result<Response, ApiError> {
    let call = rest.open(request, None).await?;
    let administration = administration(&rest, &call.tenant)?;
    let mut fields = Fields::of_body(&call.body, UNLOAD, OFF_UNLOAD)?;
    let name: String = fields.require("lora_name", "a string")?;
    fields.finish();
    let id = administration.unload_adapter(&call.tenant, &name).await?;
    Ok(Json(Unloaded { id, object: "model", deleted: true }).into_response())
}

/// Who changes what is served, where the tenant may ask for it.
fn administration<'a>(rest: &'a Rest, tenant: &TenantName) -> Result<&'a dyn Administration, ApiError> {
    let nobody = || ApiError::new(Code::NotFound, "this server loads no adapters: it was started without router.adapters_dir");
    let administration = rest.config.administration.as_deref().ok_or_else(nobody)?;
    administration.admit(tenant)?;
    Ok(administration)
}
