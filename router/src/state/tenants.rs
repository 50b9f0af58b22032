//! Tenants: whose key it is, which models they see, in which domain their pages may be shared. Keys come in as text and are
//! compared by hash, in constant time over all that are known; they are never stored or shown.

use std::collections::BTreeMap;

use ashlar_registry::record::{KeyRecord, TenantRecord};
use ashlar_wire::id::TenantName;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

/// The tenant whose models everyone may use.
pub const PUBLIC: &str = "public";
/// What every key begins with, so that scanners for leaked keys find it.
pub const KEY_PREFIX: &str = "ask_";

/// BLAKE3 of a key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyHash([u8; 32]);

/// The text is no key hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a key hash is 64 lower-case hex digits")]
pub struct ParseKeyHashError;

/// Without keys everyone would be let in, and the server is not on loopback.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no API key is configured and {listen} is not a loopback address: make a key with `ashlar tenant add NAME` and `ashlar tenant key NAME`, \
     name a file of keys in router.keys_file, or serve everyone with --set router.insecure_open=true"
)]
pub struct OpenRefused {
    /// Where the server would listen.
    pub listen: String,
}

/// The key is missing or unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no or unknown API key")]
pub struct Denied;

/// Whether a server without tenants serves everyone. Decided at start, by [`may_open`]; a server that may not refuses all instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Without {
    /// No tenants: everyone is the public tenant and sees all models.
    Open,
    /// No tenants: nobody.
    Closed,
}

/// All tenants at one moment.
#[derive(Clone)]
pub struct Tenants {
    records: BTreeMap<TenantName, TenantRecord>,
    keys: Vec<(KeyHash, TenantName)>,
    without: Without,
    secret: [u8; 32],
}

impl std::fmt::Debug for Tenants {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tenants").field("names", &self.records.keys()).field("without", &self.without).finish_non_exhaustive()
    }
}

impl KeyHash {
    /// Of a key as a client sends it.
    pub fn of(key: &str) -> Self {
        Self(*blake3::hash(key.as_bytes()).as_bytes())
    }
}

impl std::fmt::Display for KeyHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_string()[..8])
    }
}

impl std::str::FromStr for KeyHash {
    type Err = ParseKeyHashError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digest: ashlar_zoo::digest::Digest = text.parse().map_err(|_| ParseKeyHashError)?;
        Ok(Self(digest.0))
    }
}

/// A new key from 192 random bits, and what is stored of it.
pub fn new_key(random: [u8; 24], now_ms: u64) -> (String, KeyRecord) {
    const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut key = KEY_PREFIX.to_owned();
    // Five bytes are eight digits; the last four bytes stand for the whole's rest.
    for chunk in random.chunks(5) {
        let mut bytes = [0u8; 8];
        bytes[3..3 + chunk.len()].copy_from_slice(chunk);
        let bits = u64::from_be_bytes(bytes);
        key.extend((0..(chunk.len() * 8).div_ceil(5)).map(|digit| char::from(DIGITS[(bits >> (35 - 5 * digit)) as usize & 31])));
    }
    let hash = KeyHash::of(&key).to_string();
    (key, KeyRecord { hash, created_ms: now_ms })
}

/// Whether a server at `listen` may serve without keys.
///
/// # Errors
/// When others than this machine could reach it and nobody said that this is wanted.
pub fn may_open(listen: &str, is_loopback: bool, insecure_open: bool) -> Result<Without, OpenRefused> {
    if is_loopback || insecure_open { Ok(Without::Open) } else { Err(OpenRefused { listen: listen.to_owned() }) }
}

impl Tenants {
    /// Of records and the cluster's secret. Hashes that are none are left out: they match no key.
    pub fn new(records: BTreeMap<TenantName, TenantRecord>, without: Without, secret: [u8; 32]) -> Self {
        let hash = |name: &TenantName, key: &KeyRecord| Some((key.hash.parse().ok()?, name.clone()));
        let keys = records.iter().flat_map(|(name, record)| record.keys.iter().filter_map(move |key| hash(name, key))).collect();
        Self { records, keys, without, secret }
    }

    /// Whether no key is configured.
    pub fn has_no_keys(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether everyone is let in: only where no tenant is known at all. A tenant whose last key was revoked stays known, so that
    /// a revocation closes a door and never opens one.
    pub fn is_open(&self) -> bool {
        self.records.is_empty() && self.without == Without::Open
    }

    /// Whether a tenant was seen: who asks for keys once goes on asking.
    pub fn is_any(&self) -> bool {
        !self.records.is_empty()
    }

    /// Whose key it is. All hashes are compared whatever the key, so that time tells nothing.
    ///
    /// # Errors
    /// When there is no such key.
    pub fn authenticate(&self, key: Option<&str>) -> Result<TenantName, Denied> {
        if self.is_open() {
            return Ok(TenantName(PUBLIC.to_owned()));
        }
        let hash = KeyHash::of(key.unwrap_or_default());
        let (mut found, mut index) = (Choice::from(0), 0u32);
        for (at, (known, _)) in (0u32..).zip(&self.keys) {
            let equal = known.0.ct_eq(&hash.0);
            found |= equal;
            index.conditional_assign(&at, equal);
        }
        match key {
            Some(_) if bool::from(found) => Ok(self.keys[index as usize].1.clone()),
            _ => Err(Denied),
        }
    }

    /// Whether a tenant may use `owner/name`.
    pub fn may_use(&self, tenant: &TenantName, owner: &str, name: &str) -> bool {
        if self.is_open() || owner == tenant.0 || owner == PUBLIC {
            return true;
        }
        let granted = |model: &String| model.split_once('/') == Some((owner, name));
        self.records.get(tenant).is_some_and(|record| record.models.iter().any(granted))
    }

    /// Whether a tenant may change what is served. Where everyone is let in, everyone may.
    pub fn may_administer(&self, tenant: &TenantName) -> bool {
        self.is_open() || self.records.get(tenant).is_some_and(|record| record.admin)
    }

    /// Requests that a tenant may have in flight; `None`: no limit of its own.
    pub fn requests_max(&self, tenant: &TenantName) -> Option<u32> {
        self.records.get(tenant)?.limits.requests_max
    }

    /// A tenant's share of the service among others.
    pub fn weight(&self, tenant: &TenantName) -> u32 {
        self.records.get(tenant).and_then(|record| record.limits.weight).unwrap_or(1)
    }

    /// Whether no other tenant can ask: nobody else has a key, or needs one.
    pub fn is_alone(&self, tenant: &TenantName) -> bool {
        self.keys.iter().all(|(_, other)| other == tenant)
    }

    /// The domain within which a tenant's KV pages are shared: with no other tenant but those that an operator put into one common domain
    /// with it, and not to be guessed from a name. Domains of tenants and common ones have labels of their own, so that none is another's,
    /// whatever they are called.
    pub fn cache_domain(&self, tenant: &TenantName) -> [u8; 32] {
        let common = self.records.get(tenant).and_then(|record| record.cache_domain.as_deref()).filter(|domain| !domain.is_empty());
        let (label, name) = match common {
            Some(domain) => (&b"ashlar-common-cache-domain-1\0"[..], domain),
            None => (&b"ashlar-cache-domain-1\0"[..], tenant.0.as_str()),
        };
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(label).update(name.as_bytes());
        *hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenants(names: &[(&str, &[&str], &[&str])], without: Without) -> Tenants {
        let record = |keys: &[&str], models: &[&str]| TenantRecord {
            keys: keys.iter().map(|key| KeyRecord { hash: KeyHash::of(key).to_string(), created_ms: 0 }).collect(),
            models: models.iter().map(|model| (*model).to_owned()).collect(),
            ..TenantRecord::default()
        };
        let records = names.iter().map(|(name, keys, models)| (TenantName((*name).to_owned()), record(keys, models))).collect();
        Tenants::new(records, without, [9; 32])
    }

    fn name(text: &str) -> TenantName {
        TenantName(text.to_owned())
    }

    #[test]
    fn keys_lead_to_their_tenant_and_nothing_else_does() {
        let tenants = tenants(&[("acme", &["ask_a", "ask_b"], &[]), ("blue", &["ask_c"], &[]), ("none", &[], &[])], Without::Open);
        assert_eq!(tenants.authenticate(Some("ask_b")), Ok(name("acme")));
        assert_eq!(tenants.authenticate(Some("ask_c")), Ok(name("blue")));
        for key in [None, Some(""), Some("ask_d"), Some(KeyHash::of("ask_a").to_string().as_str())] {
            assert_eq!(tenants.authenticate(key), Err(Denied));
        }
    }

    #[test]
    fn tenants_see_their_own_the_public_and_what_is_granted() {
        let tenants = tenants(&[("acme", &["ask_a"], &["blue/shown"]), ("blue", &["ask_c"], &[])], Without::Open);
        for (owner, model, seen) in [("acme", "x", true), ("public", "x", true), ("blue", "shown", true), ("blue", "x", false)] {
            assert_eq!(tenants.may_use(&name("acme"), owner, model), seen, "{owner}/{model}");
        }
        assert!(!tenants.may_use(&name("blue"), "acme", "x"));
    }

    #[test]
    fn administrators_are_those_who_are_made_so_and_everyone_where_all_are_let_in() {
        assert!(tenants(&[], Without::Open).may_administer(&name("public")));
        assert!(!tenants(&[], Without::Closed).may_administer(&name("public")));
        let mut tenants = tenants(&[("ops", &["ask_a"], &[]), ("blue", &["ask_c"], &[])], Without::Open);
        tenants.records.get_mut(&name("ops")).unwrap().admin = true;
        let may: Vec<_> = ["ops", "blue", "public"].into_iter().filter(|tenant| tenants.may_administer(&name(tenant))).collect();
        assert_eq!(may, ["ops"]);
    }

    #[test]
    fn without_keys_a_server_is_open_on_loopback_only() {
        assert_eq!(may_open("127.0.0.1:80", true, false), Ok(Without::Open));
        assert_eq!(may_open("0.0.0.0:80", false, true), Ok(Without::Open));
        assert!(may_open("0.0.0.0:80", false, false).unwrap_err().to_string().contains("--set router.insecure_open=true"));

        let open = tenants(&[], Without::Open);
        assert_eq!(open.authenticate(None), Ok(name("public")));
        assert_eq!(open.authenticate(Some("anything")), Ok(name("public")));
        assert!(open.may_use(&name("public"), "acme", "x"));
        assert_eq!(tenants(&[], Without::Closed).authenticate(Some("x")), Err(Denied));
    }

    #[test]
    fn tenant_without_keys_opens_nothing() {
        let revoked = tenants(&[("acme", &[], &[])], Without::Open);
        for key in [None, Some(""), Some("ask_revoked")] {
            assert_eq!(revoked.authenticate(key), Err(Denied), "{key:?}");
        }
        assert!(!revoked.may_use(&name("blue"), "acme", "x"));
    }

    #[test]
    fn cache_domains_differ_by_tenant_and_by_cluster() {
        let (one, mut two) = (tenants(&[], Without::Open), tenants(&[], Without::Open));
        two.secret = [8; 32];
        assert_ne!(one.cache_domain(&name("a")), one.cache_domain(&name("b")));
        assert_ne!(one.cache_domain(&name("a")), two.cache_domain(&name("a")));
        assert_eq!(one.cache_domain(&name("a")), one.cache_domain(&name("a")));
    }

    #[test]
    fn common_domains_are_those_of_their_members_alone() {
        let mut tenants = tenants(&[("a", &[], &[]), ("b", &[], &[]), ("c", &[], &[]), ("d", &[], &[])], Without::Closed);
        let of_own = ["a", "b", "c", "d"].map(|tenant| tenants.cache_domain(&name(tenant)));
        for (tenant, domain) in [("a", "d"), ("b", "d"), ("c", "")] {
            tenants.records.get_mut(&name(tenant)).unwrap().cache_domain = Some(domain.to_owned());
        }
        let [a, b, c, d] = ["a", "b", "c", "d"].map(|tenant| tenants.cache_domain(&name(tenant)));
        assert_eq!(a, b);
        assert!(!of_own.contains(&a), "a common domain that is called as a tenant is not that tenant's");
        assert_eq!((c, d), (of_own[2], of_own[3]));
        tenants.secret = [8; 32];
        assert_ne!(tenants.cache_domain(&name("a")), a);
    }

    #[test]
    fn new_keys_hold_all_their_bits_and_are_stored_as_hashes() {
        let (key, record) = new_key([0xff; 24], 5);
        assert_eq!(key.len(), KEY_PREFIX.len() + 39);
        assert_eq!(record.hash.parse(), Ok(KeyHash::of(&key)));
        assert!(!record.hash.contains(&key[4..]));
        for bit in 0..192 {
            let mut other = [0xff; 24];
            other[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(new_key(other, 5).0, key, "bit {bit}");
        }
    }
}
