//! etcd stops, and comes back with its data or without: sessions, watches and elections heal by themselves.

use std::sync::Arc;
use std::time::Duration;

use ashlar_registry::record::RouterRecord;
use ashlar_registry::{Election, Registry, RegistryError, Session, SessionState, Watch};
use ashlar_wire::id::RouterId;

const TTL: Duration = Duration::from_secs(2);
const WAIT_MAX: Duration = Duration::from_secs(30);

#[tokio::test]
async fn everything_heals_when_etcd_returns() {
    let mut server = crate::etcd_server::EtcdServer::start().await;
    let registry: Arc<dyn Registry> = ashlar_registry::open(&server.url("outage")).await.unwrap();
    let record = RouterRecord { id: RouterId("rtr_1".to_owned()), address: "a:1".to_owned() };
    let session = Session::start(registry.clone(), "routers/rtr_1".to_owned(), record, TTL);
    let election = Election::start(registry.clone(), "leader", "one".to_owned(), TTL);
    let mut leading = election.leading();
    limit(leading.wait_for(Option::is_some)).await.unwrap();
    limit(session.registered()).await;
    registry.put("plan", "lasting", None).await.unwrap();
    let mut watch = registry.watch_prefix("").await.unwrap();
    assert_eq!(watch.entries().len(), 3);

    server.kill();
    assert!(matches!(limit(registry.get("plan")).await, Err(RegistryError::Unreachable { .. })), "an error, no hang");
    limit(leading.wait_for(Option::is_none)).await.unwrap();
    limit(session.state().wait_for(|state| *state == SessionState::Lost)).await.unwrap();
    assert_eq!(watch.entries().len(), 3, "what was known stays known");
    session.update(|record| record.address = "b:2".to_owned());

    server.restart().await;
    limit(leading.wait_for(Option::is_some)).await.unwrap();
    until(&mut watch, |watch| watch.entries().get("routers/rtr_1").is_some_and(|entry| entry.value.contains("b:2"))).await;
    assert_eq!(watch.entries()["plan"].value, "lasting");

    server.kill();
    server.restart_empty().await;
    until(&mut watch, |watch| !watch.entries().contains_key("plan")).await;
    until(&mut watch, |watch| watch.entries().contains_key("routers/rtr_1") && watch.entries().contains_key("leader")).await;
    registry.put("plan", "new", None).await.unwrap();
    until(&mut watch, |watch| watch.entries().get("plan").is_some_and(|entry| entry.value == "new")).await;
}

async fn limit<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(WAIT_MAX, work).await.expect("in time")
}

async fn until(watch: &mut Watch, holds: impl Fn(&Watch) -> bool) {
    while !holds(watch) {
        limit(watch.next()).await.expect("the registry lives");
    }
}
