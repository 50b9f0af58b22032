//! What each way of setting a key gives, and how what cannot be used is refused.

use super::*;

#[test]
fn a_key_is_set_with_the_type_it_wants() {
    let mut table = toml::Table::new();
    set(&mut table, "executor.threads", "2").unwrap();
    set(&mut table, "executor.id", "7").unwrap();
    set(&mut table, "executor.prefix_cache", "false").unwrap();
    set(&mut table, "router.limits.choices_max", "3").unwrap();
    let config = Config::deserialize(table).unwrap();
    assert_eq!((config.executor.threads, config.executor.id.as_str(), config.executor.prefix_cache), (2, "7", false));
    assert_eq!(config.router.limits.choices_max, 3);
}

#[test]
fn unknown_keys_and_wrong_types_are_named() {
    let mut table = toml::Table::new();
    let error = set(&mut table, "executor.thread", "2").unwrap_err().to_string();
    assert!(error.contains("unknown field `thread`"), "{error}");
    let error = set(&mut table, "executor.threads", "two").unwrap_err().to_string();
    assert!(error.contains("invalid type"), "{error}");
    let error = toml::from_str::<Config>("[zoo]\nrot = 1").unwrap_err().to_string();
    assert!(error.contains("unknown field `rot`"), "{error}");
}

fn load(variables: &[(&str, &str)], sets: &[&str]) -> anyhow::Result<Config> {
    let set = sets.iter().map(|pair| (*pair).to_owned()).collect();
    let args = PlaceArgs { config: None, zoo: None, registry: None, set };
    let variables: Vec<(String, String)> = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    args.load_with(&[], &variables)
}

#[test]
fn variables_reach_nested_keys_and_unknown_ones_are_named() {
    let config = load(&[("ASHLAR_ROUTER_LIMITS_PROMPTS_MAX", "3"), ("ASHLAR_ROUTER_DEADLINE_MS", "7")], &[]).unwrap();
    assert_eq!((config.router.limits.prompts_max, config.router.deadline_ms), (3, 7));
    let error = format!("{:#}", load(&[("ASHLAR_ROUTER_NONE", "3")], &[]).unwrap_err());
    assert!(error.contains("ASHLAR_ROUTER_NONE") && error.contains("unknown field"), "{error}");
}

#[test]
fn a_zoo_may_be_in_a_bucket_and_no_registry_lies_beside_that() {
    let directory = load(&[], &[]).unwrap();
    assert_eq!((directory.registry_url().unwrap().as_str(), directory.zoo.refresh().as_secs()), ("file:zoo-data.registry.json", 2));
    let bucket = load(&[(ZOO_VARIABLE, "s3://models/zoo")], &[]).unwrap();
    assert_eq!((bucket.zoo.root.to_string().as_str(), bucket.zoo.refresh().as_secs()), ("s3://models/zoo", 10));
    assert!(bucket.registry_url().unwrap_err().to_string().contains("name the registry"));
    let named = load(&[(ZOO_VARIABLE, "s3://models/zoo")], &["registry.url=file:here", "zoo.refresh_ms=500"]).unwrap();
    assert_eq!((named.registry_url().unwrap().as_str(), named.zoo.refresh().as_millis()), ("file:here", 500));
    let error = format!("{:#}", load(&[(ZOO_VARIABLE, "gs://models")], &[]).unwrap_err());
    assert!(error.contains("variable ASHLAR_ZOO") && error.contains("gs://"), "{error}");
}

#[test]
fn both_variables_of_the_zoo_mean_its_root_and_may_not_differ() {
    for name in [ZOO_VARIABLE, ZOO_ROOT_VARIABLE] {
        assert_eq!(load(&[(name, "/z")], &[]).unwrap().zoo.root, "/z".parse().unwrap(), "{name}");
        assert_eq!(zoo_of(&[(name.to_owned(), "/z".to_owned())]).unwrap(), Some("/z".parse().unwrap()), "{name}");
    }
    let error = load(&[(ZOO_VARIABLE, "/a"), (ZOO_ROOT_VARIABLE, "/b")], &[]).unwrap_err().to_string();
    assert!(error.contains("ASHLAR_ZOO=/a") && error.contains("ASHLAR_ZOO_ROOT=/b"), "{error}");
}

#[test]
fn values_that_make_no_sense_are_told_with_key_value_and_range() {
    for (pair, expected) in [
        ("placement.replicas=0", "placement.replicas = 0: expected 1 to 1024"),
        ("placement.spans_per_chain=0", "placement.spans_per_chain = 0: expected 1 to 1024"),
        ("executor.threads=9999", "executor.threads = 9999: expected 0 to 1024"),
        ("executor.threads=-1", "executor.threads"),
        ("executor.isa=sse9", "executor.isa = `sse9`: expected auto, avx512-bf16, avx512, avx-vnni, avx2 or scalar"),
        ("executor.kv_bytes=5", "executor.kv_bytes = 5: expected 0 (chosen at start) or at least 65536"),
        ("executor.page_tokens=5", "page_tokens must be a positive multiple of 16"),
        ("executor.page_tokens=1600000000", "page_tokens must be at most 4096"),
        ("executor.step_tokens_max=4294967295", "step_tokens_max must be at most 65536"),
        ("executor.batches_in_flight_max=1000000000", "batches_in_flight_max must be 1 to 16"),
        ("executor.strands_max=0", "strands_max must be 1 to 1024"),
        ("executor.waiting_max=0", "waiting_max must be at least 1"),
        ("executor.device=gpu", "executor.device = `gpu`: expected auto, cpu or cuda:N"),
        ("executor.listen=here", "executor.listen = `here`: expected HOST:PORT"),
        ("router.listen=here", "router.listen = `here`: expected IP:PORT"),
        ("log.format=xml", "log.format = `xml`: expected text or json"),
        ("zoo.refresh_ms=1", "zoo.refresh_ms = 1: expected 10 to"),
    ] {
        let error = load(&[], &[pair]).unwrap_err().to_string();
        assert!(error.contains(expected), "{pair}: {error}");
    }
}

#[test]
fn memory_that_the_machine_lacks_is_told_before_anything_starts() {
    for key in ["kv_bytes", "boundary_bytes"] {
        let config = load(&[], &[&format!("executor.{key}=107374182400")]).unwrap();
        assert!(config.executor.check_memory(1 << 37).is_ok());
        let error = config.executor.check_memory(1 << 30).unwrap_err().to_string();
        assert_eq!(error, format!("use executor.{key} = 107374182400: 1073741824 bytes are available here"));
    }
}

#[test]
fn an_instruction_set_is_read_by_its_name() {
    assert_eq!(load(&[], &[]).unwrap().executor.isa().unwrap(), None);
    for isa in Isa::ALL {
        let config = load(&[("ASHLAR_EXECUTOR_ISA", isa.name())], &[]).unwrap();
        assert_eq!(config.executor.isa().unwrap(), Some(isa));
    }
}

#[test]
fn every_key_is_in_the_document() {
    let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md")).unwrap();
    fn keys(prefix: &str, table: &toml::Table, found: &mut Vec<String>) {
        for (key, value) in table {
            match value {
                toml::Value::Table(inner) => keys(&format!("{prefix}{key}."), inner, found),
                _ => found.push(format!("{prefix}{key}")),
            }
        }
    }
    let mut found = Vec::new();
    keys("", &toml::Table::try_from(Config::default()).unwrap(), &mut found);
    let missing: Vec<&String> = found.iter().filter(|key| !document.contains(&format!("| `{key}` |"))).collect();
    assert!(found.len() > 30 && missing.is_empty(), "docs/configuration.md has no line for {missing:?}");
}

#[test]
fn what_is_printed_reads_back() {
    let printed = toml::to_string(&Config::default()).unwrap();
    assert_eq!(toml::from_str::<Config>(&printed).unwrap(), Config::default());
}

#[test]
fn rows_of_a_batch_go_with_the_threads() {
    let executor = ExecutorConfig::default();
    let rows = [1, 2, 8, 64].map(|threads| executor.limits(1 << 30, 4 << 30, threads).unwrap().step_tokens_max);
    assert_eq!(rows, [96, 96, 384, 1024]);
    let many = ExecutorConfig { sequences_max: 200, ..executor };
    assert_eq!(many.limits(1 << 30, 4 << 30, 2).unwrap().step_tokens_max, 200);
}

#[test]
fn broken_relation_of_limits_is_a_sentence() {
    let executor = ExecutorConfig { sequences_max: 1000, step_tokens_max: 999, ..ExecutorConfig::default() };
    assert!(executor.limits(1 << 30, 4 << 30, 2).unwrap_err().to_string().contains("sequences_max must not exceed step_tokens_max"));
    let executor = ExecutorConfig { kv_bytes: 1 << 20, kv_touch_bytes: Some((1 << 20) + 1), ..ExecutorConfig::default() };
    assert!(executor.limits(1 << 30, 4 << 30, 2).unwrap_err().to_string().contains("kv_touch_bytes must not exceed kv_bytes"));
}
