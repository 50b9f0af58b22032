//! `sweep.json`: which round of which `gc` sweeps a zoo that is no directory. A bucket deletes without conditions, so between `gc`'s look at an
//! object and its delete an `add` may renew it in vain. Rounds are short and numbered: what an `add` renewed before a round began is left by that
//! round and all later ones, and what earlier ones took is missing by then. So an `add` that met a round stores once more when it is over.
//! A directory needs none of this: there `gc` deletes under the lock that `add` renews under.

use std::time::{Duration, SystemTime};

use object_store::path::Path;
use object_store::{GetOptions, PutMode, PutOptions, UpdateVersion};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{StoreError, Zoo};
use crate::canonical;

const KEY: &str = "sweep.json";
/// A round that began so long ago is over before the next delete.
const ROUND: Duration = Duration::from_secs(10);
/// A round this old is a killed `gc`'s: longer than a round and the longest request with the client's retries together.
const DEAD: Duration = Duration::from_secs(120);
/// Between two looks at a round that runs.
const POLL: Duration = Duration::from_millis(500);

/// What `sweep.json` holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// Counts up with every round of every `gc`.
    round: u64,
    /// Whether that round still runs.
    is_running: bool,
}

/// When an `add` began to store, and where the sweeps of the zoo stood then.
#[derive(Debug, Clone, Copy)]
struct Storing {
    began: Instant,
    met: Record,
}

/// A `gc` that may delete.
#[derive(Debug)]
pub(crate) struct Sweep<'a> {
    zoo: &'a Zoo,
    /// `None` where the zoo is a directory.
    round: Option<(Record, UpdateVersion, Instant)>,
}

/// As it lies there.
struct Found {
    record: Record,
    version: UpdateVersion,
    age: Duration,
}

impl Zoo {
    /// Stores what a name is to lead to, and where a `gc` may have swept of it meanwhile stores all once more. Gives what the first run gave.
    ///
    /// # Errors
    /// Those of `store`, or when the store fails.
    pub(crate) async fn storing<T, E, F>(&self, mut store: impl FnMut() -> F) -> Result<T, E>
    where
        E: From<StoreError>,
        F: Future<Output = Result<T, E>>,
    {
        let storing = self.begin_storing().await?;
        let stored = store().await?;
        if self.must_store_again(storing).await? {
            store().await?;
        }
        Ok(stored)
    }

    async fn begin_storing(&self) -> Result<Storing, StoreError> {
        let began = Instant::now();
        let met = match self.inner.root {
            Some(_) => Record::default(),
            None => self.read_sweep().await?.map(|found| found.record).unwrap_or_default(),
        };
        Ok(Storing { began, met })
    }

    /// Whether all must be stored, or be found stored, once more before a name may lead to it: a `gc` swept meanwhile (this returns when its round
    /// is over), or what was found young at first is not by now. Once is enough: whatever is swept from here on is seen to be young.
    async fn must_store_again(&self, before: Storing) -> Result<bool, StoreError> {
        // Untouched are those that are younger than half the grace period; `gc` counts on no more than an eighth until they are named. With no grace at
        // all nothing is young.
        let is_late = before.began.elapsed() > self.inner.grace / 8 && !self.inner.grace.is_zero();
        if self.inner.root.is_some() {
            return Ok(is_late);
        }
        let Some(Found { record: met, mut age, .. }) = self.read_sweep().await? else { return Ok(is_late) };
        if met == before.met && !met.is_running {
            return Ok(is_late);
        }
        let mut now = met;
        if met.is_running {
            tracing::info!(place = self.inner.place, "a gc sweeps the zoo; waiting for the end of its round");
        }
        while now == met && now.is_running && age < self.dead() {
            tokio::time::sleep(POLL).await;
            match self.read_sweep().await? {
                Some(found) => (now, age) = (found.record, found.age),
                None => break,
            }
        }
        Ok(true)
    }

    /// Begins to sweep.
    ///
    /// # Errors
    /// [`StoreError::Sweeping`] while another `gc` does.
    pub(crate) async fn begin_sweep(&self, grace: Duration) -> Result<Sweep<'_>, StoreError> {
        if self.inner.root.is_some() {
            return Ok(Sweep { zoo: self, round: None });
        }
        let (round, mode) = match self.read_sweep().await? {
            None => (1, PutMode::Create),
            // With no grace at all nothing else runs, so whoever is named there is dead.
            Some(Found { record, age, .. }) if record.is_running && age < self.dead().min(grace) => return Err(self.sweeping()),
            Some(Found { record, version, .. }) => (record.round + 1, PutMode::Update(version)),
        };
        let round = self.put_sweep(Record { round, is_running: true }, mode).await?;
        Ok(Sweep { zoo: self, round: Some(round) })
    }

    fn dead(&self) -> Duration {
        DEAD.min(self.inner.grace)
    }

    fn sweeping(&self) -> StoreError {
        StoreError::Sweeping { place: self.inner.place.clone(), dead_s: DEAD.as_secs() }
    }

    async fn read_sweep(&self) -> Result<Option<Found>, StoreError> {
        let read = self.retried(|| async {
            let found = self.inner.store.get_opts(&Path::from(KEY), GetOptions::default()).await?;
            let version = UpdateVersion { e_tag: found.meta.e_tag.clone(), version: found.meta.version.clone() };
            let age = SystemTime::now().duration_since(found.meta.last_modified.into()).unwrap_or_default();
            Ok((found.bytes().await?, version, age))
        });
        match read.await {
            // What cannot be read is a round that nobody runs: the next one is numbered anew, and an `add` sees that it is another.
            Ok((bytes, version, age)) => Ok(Some(Found { record: serde_json::from_slice(&bytes).unwrap_or_default(), version, age })),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(StoreError::Store { action: "read", key: KEY.to_owned(), source }),
        }
    }

    async fn put_sweep(&self, record: Record, mode: PutMode) -> Result<(Record, UpdateVersion, Instant), StoreError> {
        let began = Instant::now();
        let options = PutOptions { mode, ..PutOptions::default() };
        match self.inner.store.put_opts(&Path::from(KEY), canonical::to_bytes(&record).into(), options).await {
            Ok(put) => Ok((record, UpdateVersion { e_tag: put.e_tag, version: put.version }, began)),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Err(self.sweeping()),
            Err(source) => Err(StoreError::Store { action: "write", key: KEY.to_owned(), source }),
        }
    }
}

impl Sweep<'_> {
    /// To be called before each look at an object that is to be deleted: begins the next round where this one has lasted.
    pub(crate) async fn go_on(&mut self) -> Result<(), StoreError> {
        if let Some((record, version, began)) = &self.round
            && began.elapsed() >= ROUND
        {
            let next = Record { round: record.round + 1, is_running: true };
            self.round = Some(self.zoo.put_sweep(next, PutMode::Update(version.clone())).await?);
        }
        Ok(())
    }

    /// Says that nothing more is deleted. A sweep that failed does not come here: its last delete may still happen.
    pub(crate) async fn end(self) -> Result<(), StoreError> {
        let Some((record, version, _)) = self.round else { return Ok(()) };
        let last = Record { is_running: false, ..record };
        self.zoo.put_sweep(last, PutMode::Update(version)).await.map(drop)
    }
}
