//! `ashlar tenant`: who may call. It changes the registry's tenant records by compare-and-swap, so that it may run beside a server
//! and beside itself. A key is printed once, to standard output, and only its hash is kept.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use ashlar_registry::record::{self, Limits, TenantRecord};
use ashlar_registry::{Registry, Swap, key};
use ashlar_router::state::tenants::{KeyHash, PUBLIC, new_key};
use ashlar_wire::id::TenantName;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::Place;
use clap::Subcommand;

use crate::{deploy, output};

/// Digits of a hash that name a key to people.
const SHOWN_DIGITS: usize = 12;
/// Shortest beginning of a hash that may name a key.
const PREFIX_DIGITS_MIN: usize = 4;

/// What to do with tenants.
#[derive(Debug, Subcommand)]
pub enum TenantCommand {
    /// Add a tenant, or change its limits
    Add {
        /// The tenant's name: what its models' names begin with
        name: String,
        /// Requests that it may have in flight; 0: no limit
        #[arg(long)]
        requests_max: Option<u32>,
        /// Its share of the service while others wait, in proportion to theirs; 0: 1, as without
        #[arg(long)]
        weight: Option<u32>,
        /// A model of another tenant that it may use too (repeatable)
        #[arg(long = "model", value_name = "TENANT/MODEL")]
        models: Vec<ModelId>,
        /// Let it load and unload adapters, of any tenant, where servers have router.adapters_dir; `--admin=false`: no longer
        #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
        admin: Option<bool>,
        /// Share cached prompts with the other tenants in this domain; '': with nobody again, as without
        ///
        /// A prompt that one of them has sent is not computed again for another. Members can tell from `cached_tokens`, and from how soon
        /// answers begin, whether another of them has sent the same beginning of a prompt: put only those into one that may know.
        #[arg(long, value_name = "DOMAIN")]
        cache_domain: Option<String>,
    },
    /// Make a new API key and print it, this once
    Key {
        /// The tenant's name
        name: String,
    },
    /// List tenants and the hashes of their keys
    List,
    /// Revoke keys; running requests end as they would
    Revoke {
        /// The tenant's name
        name: String,
        /// Only the key whose hash begins so (as `list` shows it); otherwise all keys
        #[arg(long, value_name = "HASH")]
        key: Option<String>,
    },
    /// Print the hash of a key read from standard input, for a keys file
    Hash,
}

/// Does it. A granted model that the zoo at `zoo` does not have is told of, where there is a zoo.
///
/// # Errors
/// A name that is none, a tenant or key that is not there, a registry out of reach.
pub async fn run(command: TenantCommand, registry: Arc<dyn Registry>, zoo: &Place) -> anyhow::Result<()> {
    let text = match command {
        TenantCommand::Hash => {
            let mut key = String::new();
            std::io::stdin().read_line(&mut key).context("read the key")?;
            hash(&key)?
        }
        TenantCommand::Add { name, requests_max, weight, models, admin, cache_domain } => {
            let changes = Changes { limits: Limits { requests_max, weight }, models, admin, cache_domain };
            let text = add(&*registry, &parse(&name)?, &changes).await?;
            for model in &changes.models {
                deploy::note_missing(zoo, model, "the right to use it waits").await;
            }
            text
        }
        TenantCommand::Key { name } => make_key(&*registry, &parse(&name)?).await?,
        TenantCommand::List => list(&*registry).await?,
        TenantCommand::Revoke { name, key } => revoke(&*registry, &parse(&name)?, key.as_deref()).await?,
    };
    Ok(output::text(text)?)
}

/// What `add` changes of a tenant; what it does not name stays.
#[derive(Debug, Default)]
struct Changes {
    limits: Limits,
    models: Vec<ModelId>,
    admin: Option<bool>,
    /// Empty: none.
    cache_domain: Option<String>,
}

fn check_name(name: &str, what: &str) -> anyhow::Result<()> {
    // A tenant's name is the first part of its models' names.
    if ModelId::new(name, "x").is_err() {
        bail!("use `{name}` as {what}'s name: 1 to 96 letters, digits, `.`, `_` or `-`, beginning with a letter or digit");
    }
    Ok(())
}

fn parse(name: &str) -> anyhow::Result<TenantName> {
    check_name(name, "a tenant")?;
    if name == PUBLIC {
        bail!("use `{PUBLIC}` as a tenant's name: it owns the models that everyone may use, and no keys");
    }
    Ok(TenantName(name.to_owned()))
}

fn hash(key: &str) -> anyhow::Result<String> {
    let key = key.trim();
    if key.is_empty() {
        bail!("read the key: standard input is empty");
    }
    Ok(format!("{}\n", KeyHash::of(key)))
}

async fn add(registry: &dyn Registry, name: &TenantName, changes: &Changes) -> anyhow::Result<String> {
    let Changes { limits, models, admin, cache_domain } = changes;
    if let Some(domain) = cache_domain.as_deref().filter(|domain| !domain.is_empty()) {
        check_name(domain, "a cache domain")?;
    }
    let models: Vec<String> = models.iter().map(ModelId::to_string).collect();
    let existed = change(registry, name, true, |record| {
        if let Some(most) = limits.requests_max {
            record.limits.requests_max = (most > 0).then_some(most);
        }
        if let Some(weight) = limits.weight {
            record.limits.weight = (weight > 0).then_some(weight);
        }
        record.admin = admin.unwrap_or(record.admin);
        if let Some(domain) = cache_domain {
            record.cache_domain = (!domain.is_empty()).then(|| domain.clone());
        }
        record.models.extend(models.iter().cloned());
        record.models.sort();
        record.models.dedup();
        Ok(())
    })
    .await?;
    Ok(if existed { format!("tenant {name} changed\n") } else { format!("tenant {name} added; `ashlar tenant key {name}` makes a key\n") })
}

async fn make_key(registry: &dyn Registry, name: &TenantName) -> anyhow::Result<String> {
    let mut random = [0u8; 24];
    getrandom::fill(&mut random).context("draw random numbers")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (key, stored) = new_key(random, u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
    change(registry, name, false, |record| {
        record.keys.push(stored.clone());
        Ok(())
    })
    .await?;
    Ok(format!("{key}\n"))
}

async fn list(registry: &dyn Registry) -> anyhow::Result<String> {
    let mut text = String::new();
    for entry in registry.get_prefix(key::TENANTS).await.context("read the tenants")? {
        let record: TenantRecord = record::parse(&entry)?;
        let name = entry.key.strip_prefix(key::TENANTS).unwrap_or(&entry.key);
        let limit = record.limits.requests_max.map(|most| format!("  at most {most} requests")).unwrap_or_default();
        let weight = record.limits.weight.map(|weight| format!("  weight {weight}")).unwrap_or_default();
        let domain = record.cache_domain.map(|domain| format!("  cache domain {domain}")).unwrap_or_default();
        let admin = if record.admin { "  administrator" } else { "" };
        let models: String = record.models.iter().map(|model| format!("  {model}")).collect();
        text += &format!("{name}  {}{limit}{weight}{admin}{domain}{models}\n", keys(record.keys.len()));
        for key in &record.keys {
            text += &format!("    {}\n", key.hash.get(..SHOWN_DIGITS).unwrap_or(&key.hash));
        }
    }
    if text.is_empty() {
        text.push_str("no tenants yet: ashlar tenant add NAME\n");
    }
    Ok(text)
}

async fn revoke(registry: &dyn Registry, name: &TenantName, prefix: Option<&str>) -> anyhow::Result<String> {
    if prefix.is_some_and(|prefix| prefix.len() < PREFIX_DIGITS_MIN) {
        bail!("find the key: give at least {PREFIX_DIGITS_MIN} digits of its hash");
    }
    let (mut revoked, mut left) = (0, 0);
    change(registry, name, false, |record| {
        let before = record.keys.len();
        record.keys.retain(|key| prefix.is_some_and(|prefix| !key.hash.starts_with(prefix)));
        left = record.keys.len();
        revoked = before - left;
        match (revoked, prefix) {
            (0, Some(prefix)) => bail!("find a key of tenant {name} whose hash begins with {prefix}"),
            (2.., Some(prefix)) => bail!("revoke one key: {revoked} of tenant {name} have hashes that begin with {prefix}"),
            _ => Ok(()),
        }
    })
    .await?;
    let left = match left {
        0 => format!("{name} has no key left: its requests are refused"),
        _ => format!("{name} has {} left", keys(left)),
    };
    Ok(format!("revoked {} of tenant {name}; {left}\n", keys(revoked)))
}

fn keys(count: usize) -> String {
    format!("{count} key{}", if count == 1 { "" } else { "s" })
}

/// Changes a tenant's record, whoever else changes it at the same time. True when it existed before.
async fn change(
    registry: &dyn Registry,
    name: &TenantName,
    create: bool,
    mut change: impl FnMut(&mut TenantRecord) -> anyhow::Result<()>,
) -> anyhow::Result<bool> {
    let key = key::tenant(name);
    loop {
        let entry = registry.get(&key).await.with_context(|| format!("read tenant {name}"))?;
        let mut record: TenantRecord = match &entry {
            Some(entry) => record::parse(entry)?,
            None if create => TenantRecord::default(),
            None => bail!("find tenant {name}: `ashlar tenant add {name}` adds it"),
        };
        change(&mut record)?;
        let expected = entry.as_ref().map(|entry| entry.revision);
        let swap = registry.compare_and_swap(&key, expected, &record::to_value(&record), None).await;
        if let Swap::Done(_) = swap.with_context(|| format!("write tenant {name}"))? {
            return Ok(expected.is_some());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_registry::embedded::Embedded;

    #[tokio::test]
    async fn key_is_shown_once_and_stored_as_hash() {
        let registry = Embedded::in_memory();
        let acme = parse("acme").unwrap();
        assert_eq!(list(&registry).await.unwrap(), "no tenants yet: ashlar tenant add NAME\n");
        assert!(make_key(&registry, &acme).await.unwrap_err().to_string().contains("tenant add acme"));
        let limits = Limits { requests_max: Some(4), weight: None };
        add(&registry, &acme, &Changes { limits, models: vec!["blue/m".parse().unwrap()], admin: None, cache_domain: None }).await.unwrap();
        let key = make_key(&registry, &acme).await.unwrap();
        assert!(key.starts_with("ask_") && key.ends_with('\n'));
        let stored = registry.get("tenants/acme").await.unwrap().unwrap().value;
        assert!(!stored.contains(key.trim()) && stored.contains(&KeyHash::of(key.trim()).to_string()));
        assert_eq!(hash(&key).unwrap().trim(), KeyHash::of(key.trim()).to_string());
        let shown = list(&registry).await.unwrap();
        assert!(shown.starts_with("acme  1 key  at most 4 requests  blue/m\n"), "{shown}");
    }

    #[tokio::test]
    async fn one_key_or_all_are_revoked() {
        let registry = Embedded::in_memory();
        let acme = parse("acme").unwrap();
        add(&registry, &acme, &Changes::default()).await.unwrap();
        let mut hashes = Vec::new();
        for _ in 0..3 {
            hashes.push(KeyHash::of(make_key(&registry, &acme).await.unwrap().trim()).to_string());
        }
        assert!(revoke(&registry, &acme, Some("")).await.is_err());
        assert!(revoke(&registry, &acme, Some("zzzz")).await.is_err());
        assert_eq!(revoke(&registry, &acme, Some(&hashes[0][..12])).await.unwrap(), "revoked 1 key of tenant acme; acme has 2 keys left\n");
        assert!(!list(&registry).await.unwrap().contains(&hashes[0][..12]));
        let told = "revoked 2 keys of tenant acme; acme has no key left: its requests are refused\n";
        assert_eq!(revoke(&registry, &acme, None).await.unwrap(), told);
    }

    #[tokio::test]
    async fn an_administrator_is_made_shown_and_unmade() {
        let registry = Embedded::in_memory();
        let ops = parse("ops").unwrap();
        for (admin, shown) in
            [(Some(true), "ops  0 keys  administrator\n"), (None, "ops  0 keys  administrator\n"), (Some(false), "ops  0 keys\n")]
        {
            add(&registry, &ops, &Changes { admin, ..Changes::default() }).await.unwrap();
            assert_eq!(list(&registry).await.unwrap(), shown);
        }
    }

    #[tokio::test]
    async fn a_common_domain_is_given_kept_shown_and_taken_back() {
        let registry = Embedded::in_memory();
        let acme = parse("acme").unwrap();
        let domain = |text: &str| Changes { cache_domain: Some(text.to_owned()), ..Changes::default() };
        let error = add(&registry, &acme, &domain("a/b")).await.unwrap_err().to_string();
        assert!(error.starts_with("use `a/b` as a cache domain's name: 1 to 96"), "{error}");
        assert!(registry.get("tenants/acme").await.unwrap().is_none(), "nothing was written");

        add(&registry, &acme, &domain("legal")).await.unwrap();
        let limits = Limits { requests_max: None, weight: Some(2) };
        add(&registry, &acme, &Changes { limits, ..Changes::default() }).await.unwrap();
        assert_eq!(list(&registry).await.unwrap(), "acme  0 keys  weight 2  cache domain legal\n");
        add(&registry, &acme, &domain("")).await.unwrap();
        assert_eq!(list(&registry).await.unwrap(), "acme  0 keys  weight 2\n");
        assert!(!registry.get("tenants/acme").await.unwrap().unwrap().value.contains("cache_domain"));
    }

    #[test]
    fn names_are_checked() {
        for bad in ["", "a/b", "../a", "public", "a b"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
