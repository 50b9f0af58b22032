//! Places for requests at the door of a router: a bounded number, of which no tenant may keep all from the others. Who asks waits for
//! nothing, and a place that was given is not taken back.

use std::collections::BTreeMap;

use ashlar_wire::id::TenantName;

/// One place in so many is kept for tenants within their share.
const KEPT_ONE_IN: u32 = 4;
/// The weight of whoever comes next: as of a tenant that has none set.
const NEXT_WEIGHT: u64 = 1;

/// What counts of a tenant that asks for a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Its share among those that hold places, in proportion to theirs.
    pub weight: u32,
    /// Nobody else may ask here, so nothing is kept from it.
    pub is_alone: bool,
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoPlace {
    /// The tenant holds its share, and what is left is for those below theirs.
    ShareTaken {
        /// Places that it holds.
        held: u32,
    },
    /// All places are taken.
    AllTaken {
        /// Places that it holds.
        held: u32,
    },
}

/// Places by tenant.
///
/// A tenant's share is `places_max` x its weight / (the weights of all that hold places, its own included, + 1 for whoever comes next), and
/// at least one place. Three quarters of the places go to whoever asks first; a place of the last quarter goes only to a tenant that
/// holds less than its share. So
/// - no tenant has more than three quarters, or its share where that is more, unless nobody else may ask here;
/// - a tenant below its share gets any place that is free, and one that holds none gets one beside the greediest;
/// - where all are taken, those that end go to tenants below their share until less than three quarters are taken. Among these tenants the
///   first to ask has it: shares are for many more places than tenants.
#[derive(Debug)]
pub struct Places {
    places_max: u32,
    /// Sum of all `Held::count`.
    taken: u32,
    /// Tenants that hold any.
    held: BTreeMap<TenantName, Held>,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    count: u32,
    /// When it asked last.
    weight: u32,
}

impl Places {
    /// So many places, none taken.
    pub fn new(places_max: u32) -> Self {
        Self { places_max, taken: 0, held: BTreeMap::new() }
    }

    /// Places that are taken.
    pub fn taken(&self) -> u32 {
        self.taken
    }

    /// Takes a place, which [`Places::leave`] gives back.
    ///
    /// # Errors
    /// When there is none for this tenant now.
    pub fn enter(&mut self, tenant: &TenantName, standing: Standing) -> Result<(), NoPlace> {
        let held = self.held.get(tenant).map_or(0, |held| held.count);
        if self.taken >= self.places_max {
            return Err(NoPlace::AllTaken { held });
        }
        let for_anybody = self.places_max - self.places_max / KEPT_ONE_IN;
        if self.taken >= for_anybody && !standing.is_alone && held >= self.share(tenant, standing.weight) {
            return Err(NoPlace::ShareTaken { held });
        }
        self.taken += 1;
        self.held.insert(tenant.clone(), Held { count: held + 1, weight: standing.weight });
        Ok(())
    }

    /// Gives a place back.
    pub fn leave(&mut self, tenant: &TenantName) {
        let held = self.held.get_mut(tenant).expect("who leaves has entered");
        held.count -= 1;
        self.taken -= 1;
        if held.count == 0 {
            self.held.remove(tenant);
        }
    }

    /// Places that a tenant of this weight may hold while others ask.
    fn share(&self, tenant: &TenantName, weight: u32) -> u32 {
        let others = self.held.iter().filter(|(other, _)| *other != tenant);
        let weights = others.map(|(_, held)| u64::from(held.weight)).sum::<u64>() + u64::from(weight) + NEXT_WEIGHT;
        let share = u64::from(self.places_max) * u64::from(weight) / weights;
        u32::try_from(share).expect("a part of places_max").max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks until refused; how many places were given, and why no more.
    fn fill(places: &mut Places, tenant: &str, weight: u32) -> (u32, NoPlace) {
        let (tenant, standing) = (name(tenant), Standing { weight, is_alone: false });
        (0..).find_map(|given| places.enter(&tenant, standing).err().map(|why| (given, why))).expect("the places are bounded")
    }

    fn name(text: &str) -> TenantName {
        TenantName(text.to_owned())
    }

    #[test]
    fn the_greediest_leaves_room_for_others() {
        let mut places = Places::new(256);
        assert_eq!(fill(&mut places, "a", 1), (192, NoPlace::ShareTaken { held: 192 }));
        // A third each, with who comes next: but for what the first holds already.
        assert_eq!(fill(&mut places, "b", 1), (64, NoPlace::AllTaken { held: 64 }));
        // What the first gives back is not its own again while it is above its share, and the second has the rest of its own.
        for _ in 0..40 {
            places.leave(&name("a"));
        }
        assert_eq!(fill(&mut places, "a", 1), (0, NoPlace::ShareTaken { held: 152 }));
        assert_eq!(fill(&mut places, "b", 1), (21, NoPlace::ShareTaken { held: 85 }));
        assert_eq!(fill(&mut places, "c", 1), (19, NoPlace::AllTaken { held: 19 }));
        assert_eq!(places.taken(), 256);
    }

    #[test]
    fn shares_are_by_weight() {
        let mut places = Places::new(80);
        assert_eq!(fill(&mut places, "light", 1).0, 60);
        assert_eq!(fill(&mut places, "heavy", 6).0, 20);
        for _ in 0..60 {
            places.leave(&name("light"));
            let _ = places.enter(&name("light"), Standing { weight: 1, is_alone: false });
            let _ = places.enter(&name("heavy"), Standing { weight: 6, is_alone: false });
        }
        let held = |tenant: &str| places.held[&name(tenant)].count;
        assert_eq!((held("light"), held("heavy")), (10, 60), "80 / 8 and 80 x 6 / 8; the rest is for who comes next");
    }

    #[test]
    fn whoever_comes_next_gets_a_place_though_all_others_ask_first() {
        for tenants in 1..=32u64 {
            let (mut places, mut dice) = (Places::new(256), tenants);
            // Any one of the requests that run ends, and then all ask for as much as they can get.
            let mut turn = |places: &mut Places| {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let mut ends = (dice >> 33) as u32 % places.taken().max(1);
                let of_it = |(tenant, held): (&TenantName, &Held)| match ends.checked_sub(held.count) {
                    Some(rest) => {
                        ends = rest;
                        None
                    }
                    None => Some(tenant.clone()),
                };
                let ended = places.held.iter().find_map(of_it);
                ended.iter().for_each(|tenant| places.leave(tenant));
                for tenant in 0..tenants {
                    fill(places, &format!("t{tenant}"), 1);
                }
            };
            (0..2_000).for_each(|_| turn(&mut places));
            let standing = Standing { weight: 1, is_alone: false };
            let waited = (0..16).find(|_| {
                turn(&mut places);
                places.enter(&name("next"), standing).is_ok()
            });
            assert!(waited.is_some(), "{tenants} tenants: {places:?}");
        }
    }

    #[test]
    fn who_is_alone_has_all_and_few_places_are_for_whoever_comes_first() {
        let mut places = Places::new(8);
        let alone = Standing { weight: 1, is_alone: true };
        assert!((0..8).all(|_| places.enter(&name("a"), alone).is_ok()));
        assert_eq!(places.enter(&name("a"), alone), Err(NoPlace::AllTaken { held: 8 }));
        // Of three none is a quarter.
        assert_eq!(fill(&mut Places::new(3), "a", 1), (3, NoPlace::AllTaken { held: 3 }));
        assert_eq!(fill(&mut Places::new(4), "a", u32::MAX), (3, NoPlace::ShareTaken { held: 3 }));
    }
}
