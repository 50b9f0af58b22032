//! The names of keys (ARCHITECTURE.md, "Registry keys"). Nothing else in the workspace spells one.

use ashlar_wire::id::{ExecutorId, RouterId, TenantName};

/// All executors.
pub const EXECUTORS: &str = "executors/";
/// All routers.
pub const ROUTERS: &str = "routers/";
/// All tenants.
pub const TENANTS: &str = "tenants/";
/// All deployments.
pub const DEPLOYMENTS: &str = "deployments/";
/// The router that plans.
pub const LEADER: &str = "leader";
/// The plan in force.
pub const PLAN: &str = "plan";
/// What only routers know: the secret that cache domains are derived from.
pub const SECRET: &str = "secret";

/// An executor's record.
pub fn executor(id: &ExecutorId) -> String {
    format!("{EXECUTORS}{id}")
}

/// A router's record.
pub fn router(id: &RouterId) -> String {
    format!("{ROUTERS}{id}")
}

/// How a model, named `tenant/name`, is deployed.
pub fn deployment(model: &str) -> String {
    format!("{DEPLOYMENTS}{model}")
}

/// A tenant's record.
pub fn tenant(name: &TenantName) -> String {
    format!("{TENANTS}{name}")
}
