//! What is made of assets (tokenizers, templates), kept by digest. Concurrent callers of one digest wait for one making; the least
//! recently used value goes when there are too many. Failures are not kept.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use ashlar_zoo::digest::Digest;
use tokio::sync::OnceCell;

/// Values by digest, at most `count_max`.
pub struct Cache<T> {
    count_max: usize,
    entries: Mutex<Entries<T>>,
}

struct Entries<T> {
    /// Grows with each use.
    tick: u64,
    by_digest: HashMap<Digest, (u64, Arc<OnceCell<Arc<T>>>)>,
}

impl<T> Cache<T> {
    /// An empty cache that holds at least one value.
    pub fn new(count_max: usize) -> Self {
        Self { count_max: count_max.max(1), entries: Mutex::new(Entries { tick: 0, by_digest: HashMap::new() }) }
    }

    /// The value of `digest`, made by `make` where it is not at hand.
    pub async fn get<E, F: Future<Output = Result<T, E>>>(&self, digest: &Digest, make: impl FnOnce() -> F) -> Result<Arc<T>, E> {
        let cell = self.cell(digest);
        cell.get_or_try_init(|| async { make().await.map(Arc::new) }).await.cloned()
    }

    fn cell(&self, digest: &Digest) -> Arc<OnceCell<Arc<T>>> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.tick += 1;
        let tick = entries.tick;
        if let Some((used, cell)) = entries.by_digest.get_mut(digest) {
            *used = tick;
            return Arc::clone(cell);
        }
        if entries.by_digest.len() >= self.count_max {
            let oldest = entries.by_digest.iter().min_by_key(|(_, (used, _))| *used).map(|(digest, _)| *digest);
            if let Some(oldest) = oldest {
                entries.by_digest.remove(&oldest);
            }
        }
        let cell = Arc::new(OnceCell::new());
        entries.by_digest.insert(*digest, (tick, Arc::clone(&cell)));
        cell
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn oldest_value_goes_and_failures_are_not_kept() {
        let cache = Cache::new(2);
        let digest = |n: u8| Digest([n; 32]);
        let made = std::cell::Cell::new(0);
        let made = &made;
        let make = |n: u8| async move {
            made.set(made.get() + 1);
            Ok::<u8, ()>(n)
        };
        for n in [1, 2, 1, 3, 1] {
            assert_eq!(*cache.get(&digest(n), || make(n)).await.unwrap(), n);
        }
        assert_eq!(made.get(), 3);
        cache.get(&digest(2), || make(2)).await.unwrap();
        assert_eq!(made.get(), 4);
        assert!(cache.get(&digest(9), || async { Err::<u8, ()>(()) }).await.is_err());
        assert!(cache.get(&digest(9), || make(9)).await.is_ok());
    }
}
