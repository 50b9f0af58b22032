//! One suite for all registries: what `Registry` promises, proven on the embedded one in memory and in a file, and on a real etcd.

use std::sync::Arc;
use std::time::Duration;

use ashlar_registry::embedded::Embedded;
use ashlar_registry::record::RouterRecord;
use ashlar_registry::{Change, Election, Registry, RegistryError, Session, Swap, Watch};
use ashlar_wire::id::RouterId;

type Shared = Arc<dyn Registry>;

const TTL: Duration = Duration::from_secs(2);
/// etcd looks for ended leases twice a second, and grants no less than two seconds.
const WAIT_MAX: Duration = Duration::from_secs(12);

async fn keys_are_put_read_and_deleted(registry: Shared) {
    assert_eq!(registry.get("a").await.unwrap(), None);
    let first = registry.put("a/1", "one", None).await.unwrap();
    let second = registry.put("a/2", "two", None).await.unwrap();
    registry.put("b/1", "other", None).await.unwrap();
    assert!(first < second);
    let entry = registry.get("a/1").await.unwrap().unwrap();
    assert_eq!((entry.key.as_str(), entry.value.as_str(), entry.revision, entry.lease), ("a/1", "one", first, None));
    let keys: Vec<String> = registry.get_prefix("a/").await.unwrap().into_iter().map(|entry| entry.key).collect();
    assert_eq!(keys, ["a/1", "a/2"]);
    assert!(registry.delete("a/1").await.unwrap());
    assert!(!registry.delete("a/1").await.unwrap());
    assert_eq!(registry.get("a/1").await.unwrap(), None);
    assert_eq!(registry.get_prefix("a/").await.unwrap().len(), 1);
}

async fn swap_needs_the_expected_revision(registry: Shared) {
    let Swap::Done(first) = registry.compare_and_swap("k", None, "1", None).await.unwrap() else { panic!("created") };
    let Swap::Conflict(Some(held)) = registry.compare_and_swap("k", None, "2", None).await.unwrap() else { panic!("exists") };
    assert_eq!((held.value.as_str(), held.revision), ("1", first));
    let Swap::Done(second) = registry.compare_and_swap("k", Some(first), "2", None).await.unwrap() else { panic!("matches") };
    assert!(second > first);
    assert!(matches!(registry.compare_and_swap("k", Some(first), "3", None).await.unwrap(), Swap::Conflict(Some(_))));
    assert_eq!(registry.compare_and_swap("none", Some(first), "3", None).await.unwrap(), Swap::Conflict(None));
    registry.delete("k").await.unwrap();
    let Swap::Done(third) = registry.compare_and_swap("k", None, "4", None).await.unwrap() else { panic!("was deleted") };
    assert!(third > second, "a key made anew never has an old revision");
}

async fn swaps_at_once_lose_no_update(registry: Shared) {
    registry.put("count", "0", None).await.unwrap();
    let add = |registry: Shared| async move {
        for _ in 0..5 {
            loop {
                let entry = registry.get("count").await.unwrap().unwrap();
                let next = (entry.value.parse::<u32>().unwrap() + 1).to_string();
                if let Swap::Done(_) = registry.compare_and_swap("count", Some(entry.revision), &next, None).await.unwrap() {
                    break;
                }
            }
        }
    };
    tokio::join!(add(registry.clone()), add(registry.clone()), add(registry.clone()));
    assert_eq!(registry.get("count").await.unwrap().unwrap().value, "15");
}

async fn key_lives_as_long_as_its_lease(registry: Shared) {
    let lease = registry.grant(TTL).await.unwrap();
    registry.put("leased", "x", Some(lease)).await.unwrap();
    assert_eq!(registry.get("leased").await.unwrap().unwrap().lease, Some(lease));
    for _ in 0..4 {
        tokio::time::sleep(TTL / 2).await;
        registry.keep_alive(lease).await.unwrap();
        assert!(registry.get("leased").await.unwrap().is_some());
    }
    let mut watch = registry.watch_prefix("leased").await.unwrap();
    assert_eq!(next(&mut watch).await, Change::Delete { key: "leased".to_owned() });
    assert!(matches!(registry.keep_alive(lease).await, Err(RegistryError::LeaseLost(lost)) if lost == lease));
    assert!(matches!(registry.put("leased", "x", Some(lease)).await, Err(RegistryError::LeaseLost(_))));
    assert!(matches!(registry.compare_and_swap("leased", None, "x", Some(lease)).await, Err(RegistryError::LeaseLost(_))));
    registry.revoke(lease).await.unwrap();
}

async fn key_put_anew_leaves_its_old_lease(registry: Shared) {
    let [old, new] = [registry.grant(TTL).await.unwrap(), registry.grant(TTL).await.unwrap()];
    assert_ne!(old, new);
    registry.put("moved", "1", Some(old)).await.unwrap();
    registry.put("moved", "2", Some(new)).await.unwrap();
    registry.put("settled", "1", Some(old)).await.unwrap();
    registry.put("settled", "2", None).await.unwrap();
    registry.revoke(old).await.unwrap();
    assert_eq!(registry.get("moved").await.unwrap().unwrap().value, "2");
    assert_eq!(registry.get("settled").await.unwrap().unwrap().value, "2");
    registry.revoke(new).await.unwrap();
    assert_eq!(registry.get("moved").await.unwrap(), None);
    assert!(registry.get("settled").await.unwrap().is_some());
}

async fn watch_begins_with_what_is_there_and_follows_in_order(registry: Shared) {
    registry.put("w/a", "1", None).await.unwrap();
    registry.put("other", "1", None).await.unwrap();
    let mut watch = registry.watch_prefix("w/").await.unwrap();
    assert_eq!(watch.entries().keys().collect::<Vec<_>>(), ["w/a"]);
    registry.put("other", "2", None).await.unwrap();
    for number in 0..100 {
        registry.put("w/b", &number.to_string(), None).await.unwrap();
    }
    registry.delete("w/a").await.unwrap();
    let mut last = None;
    loop {
        match next(&mut watch).await {
            Change::Put(entry) => {
                assert_eq!(entry.key, "w/b");
                assert!(last < Some(entry.revision), "in order of revision");
                last = Some(entry.revision);
            }
            Change::Delete { key } => {
                assert_eq!(key, "w/a");
                break;
            }
        }
    }
    while watch.entries().get("w/b").is_none_or(|entry| entry.value != "99") {
        next(&mut watch).await;
    }
    assert_eq!(watch.entries().keys().collect::<Vec<_>>(), ["w/b"]);
}

async fn one_candidate_leads_and_the_next_follows(registry: Shared) {
    let [one, two] = ["one", "two"].map(|name| Election::start(registry.clone(), "leader", name.to_owned(), TTL));
    let [mut one_leads, mut two_leads] = [one.leading(), two.leading()];
    tokio::select! {
        led = one_leads.wait_for(Option::is_some) => drop(led.unwrap()),
        led = two_leads.wait_for(Option::is_some) => drop(led.unwrap()),
    }
    let (first, leader, follower) = if one_leads.borrow().is_some() { ("one", one, two) } else { ("two", two, one) };
    let term = leader.leading().borrow().unwrap().term;
    tokio::time::sleep(TTL * 2).await;
    assert_eq!(leader.leading().borrow().unwrap().term, term, "it renews");
    assert!(follower.leading().borrow().is_none(), "only one leads");
    assert_eq!(registry.get("leader").await.unwrap().unwrap().value, first);

    leader.resign().await.unwrap();
    let mut leads = follower.leading();
    let second = limit(leads.wait_for(Option::is_some)).await.unwrap().unwrap();
    assert!(second.term > term);
    assert_ne!(registry.get("leader").await.unwrap().unwrap().value, first);

    registry.delete("leader").await.unwrap();
    limit(leads.wait_for(|leading| leading.is_none_or(|leading| leading != second))).await.unwrap();
    let third = limit(leads.wait_for(Option::is_some)).await.unwrap().unwrap();
    assert!(third.term > second.term, "deposed, then elected again");
}

async fn session_keeps_its_record_and_follows_its_owner(registry: Shared) {
    let id = RouterId("rtr_1".to_owned());
    let record = RouterRecord { id, address: "a:1".to_owned() };
    let session = Session::start(registry.clone(), "routers/rtr_1".to_owned(), record, TTL);
    limit(session.registered()).await;
    let mut watch = registry.watch_prefix("routers/").await.unwrap();
    session.update(|record| record.address = "b:2".to_owned());
    assert!(matches!(next(&mut watch).await, Change::Put(entry) if entry.value.contains("b:2")));
    tokio::time::sleep(TTL * 2).await;
    let entry = registry.get("routers/rtr_1").await.unwrap().expect("renewed");

    registry.delete("routers/rtr_1").await.unwrap();
    until(&mut watch, |watch| watch.entries().get("routers/rtr_1").is_some_and(|new| new.revision > entry.revision)).await;

    registry.revoke(entry.lease.unwrap()).await.unwrap();
    until(&mut watch, |watch| watch.entries().get("routers/rtr_1").is_some_and(|new| new.lease != entry.lease)).await;

    limit(session.registered()).await;
    session.close().await.unwrap();
    until(&mut watch, |watch| watch.entries().is_empty()).await;
}

/// All of it, each case on a registry of its own, at the same time.
async fn conforms<F: AsyncFn(&'static str) -> Shared>(open: F) {
    tokio::join!(
        keys_are_put_read_and_deleted(open("keys").await),
        swap_needs_the_expected_revision(open("swap").await),
        swaps_at_once_lose_no_update(open("swaps").await),
        key_lives_as_long_as_its_lease(open("lease").await),
        key_put_anew_leaves_its_old_lease(open("anew").await),
        watch_begins_with_what_is_there_and_follows_in_order(open("watch").await),
        one_candidate_leads_and_the_next_follows(open("election").await),
        session_keeps_its_record_and_follows_its_owner(open("session").await),
    );
}

#[tokio::test(start_paused = true)]
async fn embedded_in_memory_conforms() {
    conforms(async |_| Arc::new(Embedded::in_memory()) as Shared).await;
}

#[tokio::test]
async fn embedded_in_a_file_conforms() {
    let directory = tempfile::tempdir().unwrap();
    conforms(async |name| Arc::new(Embedded::open(&directory.path().join(name)).await.unwrap()) as Shared).await;
}

#[tokio::test]
async fn etcd_conforms() {
    let server = crate::etcd_server::EtcdServer::start().await;
    conforms(async |name| ashlar_registry::open(&server.url(name)).await.unwrap()).await;
}

async fn limit<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(WAIT_MAX, work).await.expect("in time")
}

async fn next(watch: &mut Watch) -> Change {
    limit(watch.next()).await.expect("the registry lives")
}

async fn until(watch: &mut Watch, holds: impl Fn(&Watch) -> bool) {
    while !holds(watch) {
        next(watch).await;
    }
}
