//! What the registry's keys hold, as JSON. Unknown fields are ignored, so that processes of neighbouring versions can share a
//! cluster while it is rolled. Every field that came later has a default.

use std::collections::BTreeMap;

use ashlar_wire::id::{ExecutorId, RouterId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{ChainDigest, Entry, RegistryError};

/// Blocks `[from, to)` of a chain: what an executor should hold, or does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SpanAssignment {
    /// The chain.
    pub chain: ChainDigest,
    /// Its first block here.
    pub from: u32,
    /// One past its last block here.
    pub to: u32,
}

impl SpanAssignment {
    /// Whether all blocks of `other` are in this span.
    pub fn covers(&self, other: &Self) -> bool {
        self.chain == other.chain && self.from <= other.from && other.to <= self.to
    }
}

/// `executors/<executor id>`: what an executor is and does. Written by the executor alone, under its lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutorRecord {
    /// Who.
    pub id: ExecutorId,
    /// Where its gRPC service listens: `host:port`.
    pub address: String,
    /// The device, for people.
    pub device: String,
    /// The kind of device by which profiles of blocks are kept (docs/profile.md); empty: none is found.
    #[serde(default)]
    pub profiled_on: String,
    /// Executors of one class give the same bits.
    pub numeric_class: String,
    /// Bytes that weights may take.
    pub memory_bytes: u64,
    /// Bytes that KV pages may take.
    pub kv_bytes: u64,
    /// Threads of its CPU pool.
    pub threads: u32,
    /// Spans that it has loaded and serves now.
    #[serde(default)]
    pub spans: Vec<SpanAssignment>,
    /// The newest plan that it has seen and obeys.
    #[serde(default)]
    pub plan_generation: u64,
    /// It finishes what it has and takes nothing new.
    #[serde(default)]
    pub draining: bool,
    /// Drawn at process start, so that a restart under the same id can be told from the same process.
    pub incarnation: u64,
}

/// `routers/<router id>`: where a router listens. Written by the router alone, under its lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterRecord {
    /// Who.
    pub id: RouterId,
    /// Where its REST service listens: `host:port`.
    pub address: String,
}

/// What placement aims at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanPolicy {
    /// Each chain is cut into this many spans on as many executors, where there are as many. 1: cut only where it must be.
    pub spans_per_chain: u32,
    /// Each span is on this many executors, where there is room.
    pub replicas: u32,
}

impl Default for PlanPolicy {
    fn default() -> Self {
        Self { spans_per_chain: 1, replicas: 1 }
    }
}

/// `plan`: which executor should hold what. Written by the leader alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Grows by one with each change.
    pub generation: u64,
    /// The policy it was made under; a change of it is a reason to cut anew.
    #[serde(default)]
    pub policy: PlanPolicy,
    /// Spans of each executor, in order of (chain, from).
    pub assignments: BTreeMap<ExecutorId, Vec<SpanAssignment>>,
    /// Chains that found no place, and why.
    #[serde(default)]
    pub unplaced: BTreeMap<ChainDigest, String>,
}

/// `tenants/<tenant>`: who may call. Keys are stored as hashes only.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantRecord {
    /// Its keys.
    #[serde(default)]
    pub keys: Vec<KeyRecord>,
    /// What it may take.
    #[serde(default)]
    pub limits: Limits,
    /// Models of other tenants that it may use too, as `tenant/name`.
    #[serde(default)]
    pub models: Vec<String>,
    /// Whether it may load and unload adapters, of any tenant.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub admin: bool,
    /// The common domain within which it shares KV pages with the other tenants that are in it; absent: it shares them with nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_domain: Option<String>,
}

/// One API key of a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// BLAKE3 of the key, 64 hex digits.
    pub hash: String,
    /// Unix time of its making.
    #[serde(default)]
    pub created_ms: u64,
}

/// A tenant's limits. Absent: no limit beyond the server's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Requests at one time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_max: Option<u32>,
    /// Its share of the service while others wait, in proportion to theirs; absent: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
}

/// `deployments/<tenant>/<name>`: how a model is to be served. It stays when the name points to another chain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DeploymentRecord {
    /// Milliseconds from admission to the first token that are wanted; absent: what the executor is set to; 0: no target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft_ms: Option<u32>,
    /// Milliseconds between two tokens that are wanted; absent: what the executor is set to; 0: no target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap_ms: Option<u32>,
    /// Largest mean KL, in nats a token, at which other models' blocks may stand for this one's, as records of equivalence say; absent or 0: none may,
    /// the model is served exactly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equivalent_kl: Option<f64>,
}

impl DeploymentRecord {
    /// The bound of an exchange of blocks, where any is allowed. What is no bound allows none.
    pub fn kl_max(&self) -> Option<f64> {
        self.equivalent_kl.filter(|kl| kl.is_finite() && *kl > 0.0)
    }
}

/// Reads the record that an entry holds.
///
/// # Errors
/// When it holds something else.
pub fn parse<T: DeserializeOwned>(entry: &Entry) -> Result<T, RegistryError> {
    serde_json::from_str(&entry.value).map_err(|source| RegistryError::Record { key: entry.key.clone(), source })
}

/// A record as a value.
pub fn to_value<T: Serialize>(record: &T) -> String {
    serde_json::to_string(record).expect("records have text keys and no failing serializers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_reads_back_and_ignores_what_it_does_not_know() {
        let span = SpanAssignment { chain: ChainDigest([7; 32]), from: 0, to: 4 };
        let plan = Plan {
            generation: 3,
            policy: PlanPolicy { spans_per_chain: 2, replicas: 1 },
            assignments: [(ExecutorId("exe_1".into()), vec![span])].into(),
            unplaced: [(ChainDigest([8; 32]), "too large".to_owned())].into(),
        };
        let entry = |value| Entry { key: "plan".into(), value, revision: crate::Revision(1), lease: None };
        assert_eq!(parse::<Plan>(&entry(to_value(&plan))).unwrap(), plan);
        assert_eq!(parse::<Plan>(&entry(r#"{"generation":1,"assignments":{},"later":[]}"#.into())).unwrap().generation, 1);
        assert!(parse::<Plan>(&entry("{}".into())).is_err());
    }

    #[test]
    fn tenant_of_an_older_process_has_no_common_domain_and_writes_none() {
        let entry = |value: &str| Entry { key: "tenants/acme".into(), value: value.to_owned(), revision: crate::Revision(1), lease: None };
        let old = r#"{"keys":[],"limits":{},"models":["blue/m"]}"#;
        let record: TenantRecord = parse(&entry(old)).unwrap();
        assert_eq!((record.cache_domain.as_deref(), to_value(&record).as_str()), (None, old));
        let common = TenantRecord { cache_domain: Some("legal".to_owned()), ..record };
        assert_eq!(parse::<TenantRecord>(&entry(&to_value(&common))).unwrap(), common);
    }
}
