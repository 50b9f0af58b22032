//! The embedded registry's file: it outlives the process, is shared by processes, and is never half written.

use std::time::Duration;

use ashlar_registry::embedded::Embedded;
use ashlar_registry::{Registry, RegistryError, Swap};

#[tokio::test]
async fn lasting_keys_outlive_the_process_and_leased_keys_do_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("deep/registry.json");
    let first = Embedded::open(&path).await.unwrap();
    let revision = first.put("plan", "{\"generation\":1}", None).await.unwrap();
    let lease = first.grant(Duration::from_secs(60)).await.unwrap();
    first.put("executors/exe_1", "{}", Some(lease)).await.unwrap();
    drop(first);

    let second = Embedded::open(&path).await.unwrap();
    assert_eq!(second.get("plan").await.unwrap().unwrap().revision, revision);
    assert_eq!(second.get_prefix("").await.unwrap().len(), 1);
    assert!(second.put("plan", "2", None).await.unwrap() > revision);
}

#[tokio::test]
async fn two_processes_see_and_respect_each_others_changes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("registry.json");
    let [server, tool] = [Embedded::open(&path).await.unwrap(), Embedded::open(&path).await.unwrap()];
    let mut watch = server.watch_prefix("tenants/").await.unwrap();
    server.put("plan", "1", None).await.unwrap();
    tool.put("tenants/acme", "{}", None).await.unwrap();
    assert_eq!(tool.get_prefix("").await.unwrap().len(), 2, "a write begins with a read of the file");
    tokio::time::timeout(Duration::from_secs(5), watch.next()).await.unwrap();
    assert!(watch.entries().contains_key("tenants/acme"));

    let held = server.get("plan").await.unwrap().unwrap();
    tool.put("plan", "2", None).await.unwrap();
    let swap = server.compare_and_swap("plan", Some(held.revision), "3", None).await.unwrap();
    assert!(matches!(swap, Swap::Conflict(Some(entry)) if entry.value == "2"));
}

#[tokio::test]
async fn file_that_is_none_of_ours_is_refused_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("registry.json");
    for text in ["{\"format\":\"ashlar-registry-1\",\"revision\":1,\"entr", "{\"format\":2,\"revision\":1,\"entries\":{}}", ""] {
        std::fs::write(&path, text).unwrap();
        assert!(matches!(Embedded::open(&path).await, Err(RegistryError::Format { .. })), "{text}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}

#[tokio::test]
async fn urls_are_checked_at_the_door() {
    for url in ["etcd://", "etcd:///x", "http://a:1", ""] {
        assert!(matches!(ashlar_registry::open(url).await, Err(RegistryError::Url { .. })), "{url}");
    }
    assert!(ashlar_registry::open("memory:").await.is_ok());
    assert!(ashlar_registry::open("etcd://127.0.0.1:1,127.0.0.1:2/x").await.is_ok(), "it connects later");
}

#[cfg(unix)]
#[tokio::test]
async fn file_is_one_by_whatever_symbolic_link_it_is_opened() {
    use std::os::unix::fs::symlink;

    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::create_dir(at("real")).unwrap();
    Embedded::open(&at("real/registry.json")).await.unwrap().put("plan", "1", None).await.unwrap();
    symlink("real/registry.json", at("link.json")).unwrap();
    let [through, direct] = [Embedded::open(&at("link.json")).await.unwrap(), Embedded::open(&at("real/registry.json")).await.unwrap()];
    through.put("a", "1", None).await.unwrap();
    direct.put("b", "1", None).await.unwrap();
    through.put("c", "1", None).await.unwrap();
    assert!(at("link.json").symlink_metadata().unwrap().is_symlink(), "the link is not replaced");
    assert_eq!(Embedded::open(&at("real/registry.json")).await.unwrap().get_prefix("").await.unwrap().len(), 4);
    assert!(at("real/registry.json.lock").exists() && !at("link.json.lock").exists());

    symlink("nowhere.json", at("dangling.json")).unwrap();
    let error = Embedded::open(&at("dangling.json")).await.unwrap_err();
    assert!(error.to_string().starts_with("failed to follow ") && !at("nowhere.json").exists(), "{error}");
}

#[cfg(unix)]
#[tokio::test]
async fn file_of_several_hard_links_is_refused_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let [one, two] = ["one.json", "two.json"].map(|name| directory.path().join(name));
    Embedded::open(&one).await.unwrap().put("plan", "1", None).await.unwrap();
    std::fs::hard_link(&one, &two).unwrap();
    for path in [&one, &two] {
        let RegistryError::File { action: "use", source, .. } = Embedded::open(path).await.unwrap_err() else { panic!() };
        assert!(source.to_string().contains("2 names (hard links)"), "{source}");
    }
    std::fs::remove_file(&two).unwrap();
    assert_eq!(Embedded::open(&one).await.unwrap().get("plan").await.unwrap().unwrap().value, "1");
}

#[tokio::test]
async fn file_that_vanished_is_not_taken_for_an_empty_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("registry.json");
    let registry = Embedded::open(&path).await.unwrap();
    registry.put("tenants/acme", "{}", None).await.unwrap();
    std::fs::rename(&path, directory.path().join("elsewhere")).unwrap();
    // A write begins with a look at the file, as the poll does; deleting what is not there writes nothing.
    assert!(!registry.delete("no-such-key").await.unwrap());
    assert!(registry.get("tenants/acme").await.unwrap().is_some());
    assert!(!path.exists());

    registry.put("plan", "1", None).await.unwrap();
    let again = Embedded::open(&path).await.unwrap();
    assert!(again.get("tenants/acme").await.unwrap().is_some(), "the next write makes the file again, with all keys");
}

#[tokio::test]
async fn lease_outlives_its_holders_wait_for_a_slow_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("registry.json");
    let registry = std::sync::Arc::new(Embedded::open(&path).await.unwrap());
    let disk = std::fs::File::create(directory.path().join("registry.json.lock")).unwrap();
    disk.lock().unwrap();
    let slow = registry.clone();
    let write = tokio::spawn(async move { slow.put("plan", "1", None).await });
    // It holds the writer now, and waits for the file.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let lease = registry.grant(Duration::from_millis(400)).await.unwrap();
    let leased = registry.clone();
    let put = tokio::spawn(async move { leased.put("executors/exe_1", "{}", Some(lease)).await });
    tokio::time::sleep(Duration::from_millis(800)).await;
    disk.unlock().unwrap();
    write.await.unwrap().unwrap();
    put.await.unwrap().unwrap();
    assert!(registry.keep_alive(lease).await.is_ok());
}
