//! What blocks were profiled to take, for placement: read from the zoo for chains that are still to be cut, where the policy asks for several spans,
//! and for the kinds of devices that are there. A profile is a hint: what cannot be read is as if nobody had measured it.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_registry::ChainDigest;
use ashlar_registry::record::{Plan, PlanPolicy};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::profiles::DeviceKey;
use ashlar_zoo::store::{StoreError, Zoo};
use futures::{StreamExt, stream};

use crate::state::placement::{Inventory, SizedChain};

/// Rows of the batch that blocks are compared by: some sequences that decode.
const ROWS: u32 = 16;
/// Records that are read at one time.
const READS_AT_ONCE: usize = 16;

/// Nanoseconds of each block of a chain, by kind of device.
type OfChain = BTreeMap<String, Vec<u64>>;

/// What was read of the chains that are still to be cut.
pub(super) struct Times {
    zoo: Zoo,
    /// With the kinds of devices that were looked for.
    known: BTreeMap<ChainDigest, (BTreeSet<DeviceKey>, OfChain)>,
}

impl Times {
    pub(super) fn new(zoo: Zoo) -> Self {
        Self { zoo, known: BTreeMap::new() }
    }

    /// Brings the times of chains that are in fewer spans than the policy asks for. What stands is cut already, and is read anew should it lose its place.
    pub(super) async fn read(&mut self, policy: &PlanPolicy, inventory: &mut Inventory, previous: &Plan) {
        let mut spans: BTreeMap<ChainDigest, BTreeSet<(u32, u32)>> = BTreeMap::new();
        for span in previous.assignments.values().flatten() {
            spans.entry(span.chain).or_default().insert((span.from, span.to));
        }
        let is_open = |chain: &ChainDigest| spans.get(chain).map_or(0, BTreeSet::len) < policy.spans_per_chain as usize;
        self.known.retain(|chain, _| inventory.chains.contains_key(chain) && is_open(chain));
        let devices: BTreeSet<DeviceKey> = inventory.executors.values().filter_map(|offer| offer.profiled_on.parse().ok()).collect();
        if policy.spans_per_chain < 2 || devices.is_empty() {
            return;
        }
        for (digest, chain) in inventory.chains.iter().filter(|(chain, _)| is_open(chain)) {
            if self.known.get(digest).is_none_or(|(looked_for, _)| *looked_for != devices) {
                let times = self.of_chain(chain, &devices).await;
                self.known.insert(*digest, (devices.clone(), times));
            }
        }
        inventory.times = self.known.iter().map(|(chain, (_, times))| (*chain, times.clone())).collect();
    }

    /// Of the devices on which all blocks were profiled.
    async fn of_chain(&self, chain: &SizedChain, devices: &BTreeSet<DeviceKey>) -> OfChain {
        let mut times = OfChain::new();
        for device in devices {
            let blocks: Vec<Digest> = chain.blocks.iter().map(|block| block.digest).collect();
            let nanos = stream::iter(blocks).map(|block| self.nanos(block, device)).buffered(READS_AT_ONCE);
            let nanos: Vec<Option<u64>> = nanos.collect().await;
            if let Some(nanos) = nanos.into_iter().collect() {
                times.insert(device.to_string(), nanos);
            }
        }
        times
    }

    async fn nanos(&self, block: Digest, device: &DeviceKey) -> Option<u64> {
        match self.zoo.read_profile(block, device).await {
            // A checked profile has no time beyond hours.
            Ok(profile) => Some((profile.micros(ROWS) * 1e3) as u64),
            Err(StoreError::Missing { .. }) => None,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(block = %block, error, "leaving a block's profile out; chains with it are cut by bytes");
                None
            }
        }
    }
}
