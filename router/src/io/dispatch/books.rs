//! What dispatch counts: sequences on each executor, requests of each tenant, executors that failed a moment ago. Entries are
//! guards; dropping one undoes it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ashlar_wire::id::{ExecutorId, RequestId, TenantName};
use tokio::time::Instant;

/// A count that survives a panic elsewhere: counts are whole after each statement.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sequences that run on each executor.
#[derive(Debug, Default)]
pub(super) struct Loads(Mutex<BTreeMap<ExecutorId, u32>>);

/// One sequence's share of the load of its route.
#[derive(Debug)]
pub(super) struct Load {
    loads: Arc<Loads>,
    executors: Vec<ExecutorId>,
}

impl Loads {
    pub(super) fn now(&self) -> BTreeMap<ExecutorId, u32> {
        held(&self.0).clone()
    }

    pub(super) fn add(loads: &Arc<Self>, executors: Vec<ExecutorId>) -> Load {
        for executor in &executors {
            *held(&loads.0).entry(executor.clone()).or_default() += 1;
        }
        Load { loads: loads.clone(), executors }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let mut loads = held(&self.loads.0);
        for executor in &self.executors {
            if let Some(count) = loads.get_mut(executor) {
                *count -= 1;
                if *count == 0 {
                    loads.remove(executor);
                }
            }
        }
    }
}

/// Sequences of each request, by tenant.
#[derive(Debug, Default)]
pub(super) struct Requests(Mutex<BTreeMap<TenantName, BTreeMap<RequestId, u32>>>);

/// One sequence's place among its tenant's requests.
#[derive(Debug)]
pub(super) struct Place {
    requests: Arc<Requests>,
    tenant: TenantName,
    request: RequestId,
}

impl Requests {
    /// Takes a place; `None` when it would be one request too many. Sequences of one request count once.
    pub(super) fn enter(requests: &Arc<Self>, tenant: &TenantName, request: &RequestId, requests_max: Option<u32>) -> Option<Place> {
        let mut all = held(&requests.0);
        let of_tenant = all.entry(tenant.clone()).or_default();
        let full = requests_max.is_some_and(|most| of_tenant.len() >= most as usize);
        if full && !of_tenant.contains_key(request) {
            return None;
        }
        *of_tenant.entry(request.clone()).or_default() += 1;
        Some(Place { requests: requests.clone(), tenant: tenant.clone(), request: request.clone() })
    }

    pub(super) fn sequence_count(&self) -> u32 {
        held(&self.0).values().flat_map(BTreeMap::values).sum()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = held(&self.requests.0);
        let Some(of_tenant) = all.get_mut(&self.tenant) else { return };
        if let Some(count) = of_tenant.get_mut(&self.request) {
            *count -= 1;
            if *count == 0 {
                of_tenant.remove(&self.request);
            }
        }
        if of_tenant.is_empty() {
            all.remove(&self.tenant);
        }
    }
}

/// Executors that failed a moment ago, for all sequences of this router.
#[derive(Debug)]
pub(super) struct Suspects {
    until: Mutex<BTreeMap<ExecutorId, Instant>>,
    suspect_for: Duration,
}

impl Suspects {
    pub(super) fn new(suspect_for: Duration) -> Self {
        Self { until: Mutex::default(), suspect_for }
    }

    pub(super) fn add(&self, executors: impl IntoIterator<Item = ExecutorId>) {
        let until = Instant::now() + self.suspect_for;
        held(&self.until).extend(executors.into_iter().map(|executor| (executor, until)));
    }

    pub(super) fn now(&self) -> BTreeSet<ExecutorId> {
        let now = Instant::now();
        let mut until = held(&self.until);
        until.retain(|_, until| now < *until);
        until.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_of_one_request_count_once() {
        let requests = Arc::new(Requests::default());
        let (tenant, [one, two]) = (TenantName("acme".into()), [1, 2].map(RequestId::from_bits));
        let first = Requests::enter(&requests, &tenant, &one, Some(1)).unwrap();
        let second = Requests::enter(&requests, &tenant, &one, Some(1)).unwrap();
        assert!(Requests::enter(&requests, &tenant, &two, Some(1)).is_none());
        drop(first);
        assert!(Requests::enter(&requests, &tenant, &two, Some(1)).is_none());
        assert_eq!(requests.sequence_count(), 1);
        drop(second);
        assert!(Requests::enter(&requests, &tenant, &two, Some(1)).is_some());
        assert_eq!(requests.sequence_count(), 0);
    }

    #[test]
    fn load_is_given_back() {
        let loads = Arc::new(Loads::default());
        let [a, b] = ["a", "b"].map(|name| ExecutorId(name.into()));
        let load = Loads::add(&loads, vec![a.clone(), b]);
        let other = Loads::add(&loads, vec![a.clone()]);
        assert_eq!(loads.now()[&a], 2);
        drop(load);
        assert_eq!(loads.now(), [(a, 1)].into());
        drop(other);
        assert!(loads.now().is_empty());
    }
}
