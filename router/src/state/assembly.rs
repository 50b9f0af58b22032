//! Assembly: from a chain to a route. It walks the spans that executors report to hold, of one numeric class, from the first block to
//! the last, and takes the route that is least suspect, most in line with the plan, shortest, and least loaded. No IO, no clock:
//! what is suspect and what is loaded are arguments.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_registry::ChainDigest;
use ashlar_registry::record::{ExecutorRecord, Plan, SpanAssignment};
use ashlar_wire::id::ExecutorId;
use ashlar_wire::v1;
use ashlar_zoo::digest::{Digest, lineages};
use ashlar_zoo::manifest::Chain;

/// What assembly needs to know of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainPath {
    digest: ChainDigest,
    /// Lineage through each block.
    lineages: Vec<Digest>,
}

/// What assembly needs to know of the cluster at this moment.
#[derive(Debug, Clone, Copy)]
pub struct Scene<'a> {
    /// Executors as they report themselves.
    pub executors: &'a BTreeMap<ExecutorId, ExecutorRecord>,
    /// The plan in force.
    pub plan: &'a Plan,
    /// Sequences that run on each now, by this router's count.
    pub load: &'a BTreeMap<ExecutorId, u32>,
    /// Executors that failed a moment ago: taken only where nothing else leads to the end.
    pub suspects: &'a BTreeSet<ExecutorId>,
}

/// Where one sequence runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Ordered spans with their executors; covers the chain.
    pub hops: Vec<v1::Hop>,
    /// The class of all of them.
    pub numeric_class: String,
    /// The newest plan that router or executors have seen.
    pub plan_generation: u64,
}

/// No route leads to the chain's end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct ModelNotReady {
    /// What is missing, for people.
    pub reason: String,
}

impl ChainPath {
    /// Of a chain of the zoo.
    pub fn new(digest: Digest, chain: &Chain) -> Self {
        let adapters: Vec<(u32, Digest)> = chain.adapters.iter().map(|adapter| (adapter.block_index, adapter.digest)).collect();
        Self { digest: ChainDigest(digest.0), lineages: lineages(&chain.blocks, &adapters) }
    }

    /// Of the chain.
    pub fn digest(&self) -> ChainDigest {
        self.digest
    }

    fn len(&self) -> u32 {
        u32::try_from(self.lineages.len()).expect("chains are short")
    }

    fn span(&self, from: u32, to: u32) -> v1::Span {
        let lineage = |through: u32| self.lineages[through as usize - 1].0.to_vec();
        let lineage_from = if from == 0 { Vec::new() } else { lineage(from) };
        v1::Span { chain: self.digest.0.to_vec(), from, to, lineage_from, lineage_to: lineage(to) }
    }
}

impl Route {
    /// The executors, in order of their spans.
    pub fn executors(&self) -> impl Iterator<Item = ExecutorId> {
        self.hops.iter().map(|hop| ExecutorId(hop.executor_id.clone()))
    }
}

/// Finds the best route; `numeric_class` pins it to a class, as a sequence that already has tokens is.
///
/// # Errors
/// When executors that take work do not hold the whole chain within one class.
pub fn assemble(chain: &ChainPath, scene: Scene<'_>, numeric_class: Option<&str>) -> Result<Route, ModelNotReady> {
    let holders = holders(chain, scene);
    let classes: BTreeSet<&str> = holders.iter().map(|(record, _)| record.numeric_class.as_str()).collect();
    let wanted = |class: &&str| numeric_class.is_none_or(|pinned| pinned == *class);
    let routes = classes.into_iter().filter(wanted).filter_map(|class| {
        let of_class: Vec<Holder<'_>> = holders.iter().filter(|(record, _)| record.numeric_class == class).copied().collect();
        best(chain, scene, &of_class)
    });
    match routes.min_by(|a, b| a.cost.cmp(&b.cost)) {
        Some(walk) => Ok(route(chain, scene, &walk)),
        None => Err(ModelNotReady { reason: missing(chain, scene, &holders, numeric_class) }),
    }
}

/// An executor and a span that it holds.
type Holder<'a> = (&'a ExecutorRecord, SpanAssignment);

/// Compared from the left. Ids make it total, so that equal scenes give equal routes.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    suspect_count: u32,
    unplanned_count: u32,
    hop_count: u32,
    load: u32,
    ids: Vec<ExecutorId>,
}

/// A way from the first block to some border.
#[derive(Debug, Clone, Default)]
struct Walk<'a> {
    cost: Cost,
    hops: Vec<Holder<'a>>,
}

fn holders<'a>(chain: &ChainPath, scene: Scene<'a>) -> Vec<Holder<'a>> {
    let takes_work = scene.executors.values().filter(|record| !record.draining);
    let of_chain = |span: &SpanAssignment| span.chain == chain.digest && span.from < span.to && span.to <= chain.len();
    takes_work.flat_map(|record| record.spans.iter().filter(|span| of_chain(span)).map(move |span| (record, *span))).collect()
}

/// The cheapest walk to the end. Spans only lead forward, so borders are settled in ascending order.
fn best<'a>(chain: &ChainPath, scene: Scene<'a>, holders: &[Holder<'a>]) -> Option<Walk<'a>> {
    let mut reached: BTreeMap<u32, Walk<'a>> = [(0, Walk::default())].into();
    while let Some((from, walk)) = reached.pop_first() {
        if from == chain.len() {
            return Some(walk);
        }
        for holder in holders.iter().filter(|(record, span)| span.from == from && !walk.cost.ids.contains(&record.id)) {
            let longer = extended(&walk, *holder, scene);
            if reached.get(&holder.1.to).is_none_or(|known| longer.cost < known.cost) {
                reached.insert(holder.1.to, longer);
            }
        }
    }
    None
}

fn extended<'a>(walk: &Walk<'a>, holder: Holder<'a>, scene: Scene<'_>) -> Walk<'a> {
    let (record, span) = holder;
    let mut longer = walk.clone();
    let planned = scene.plan.assignments.get(&record.id).is_some_and(|spans| spans.contains(&span));
    longer.cost.suspect_count += u32::from(scene.suspects.contains(&record.id));
    longer.cost.unplanned_count += u32::from(!planned);
    longer.cost.hop_count += 1;
    longer.cost.load += scene.load.get(&record.id).copied().unwrap_or(0);
    longer.cost.ids.push(record.id.clone());
    longer.hops.push(holder);
    longer
}

fn route(chain: &ChainPath, scene: Scene<'_>, walk: &Walk<'_>) -> Route {
    let hop = |(record, span): &Holder<'_>| v1::Hop {
        span: Some(chain.span(span.from, span.to)),
        executor_id: record.id.0.clone(),
        address: record.address.clone(),
    };
    let seen = walk.hops.iter().map(|(record, _)| record.plan_generation).max().unwrap_or(0);
    Route {
        hops: walk.hops.iter().map(hop).collect(),
        numeric_class: walk.hops[0].0.numeric_class.clone(),
        plan_generation: seen.max(scene.plan.generation),
    }
}

fn missing(chain: &ChainPath, scene: Scene<'_>, holders: &[Holder<'_>], numeric_class: Option<&str>) -> String {
    if let Some(reason) = scene.plan.unplaced.get(&chain.digest) {
        return format!("no executor has room for the model: {reason}");
    }
    if scene.executors.values().all(|record| record.draining) {
        return "no executor is registered".to_owned();
    }
    if holders.is_empty() {
        return "no executor has loaded the model yet".to_owned();
    }
    match numeric_class {
        Some(class) => format!("executors of class {class} do not hold the whole model"),
        None => "executors hold a part of the model only".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAIN: ChainDigest = ChainDigest([1; 32]);

    fn path(len: usize) -> ChainPath {
        ChainPath { digest: CHAIN, lineages: (0..len).map(|index| Digest([index as u8; 32])).collect() }
    }

    fn record(name: &str, class: &str, spans: &[(u32, u32)]) -> ExecutorRecord {
        ExecutorRecord {
            id: ExecutorId(name.to_owned()),
            address: format!("{name}:1"),
            device: "test".to_owned(),
            profiled_on: String::new(),
            numeric_class: class.to_owned(),
            memory_bytes: 0,
            kv_bytes: 0,
            threads: 1,
            spans: spans.iter().map(|(from, to)| SpanAssignment { chain: CHAIN, from: *from, to: *to }).collect(),
            plan_generation: 4,
            draining: false,
            incarnation: 1,
        }
    }

    #[derive(Default)]
    struct Stage {
        executors: BTreeMap<ExecutorId, ExecutorRecord>,
        plan: Plan,
        load: BTreeMap<ExecutorId, u32>,
        suspects: BTreeSet<ExecutorId>,
    }

    impl Stage {
        /// All hold what the plan says.
        fn of(records: Vec<ExecutorRecord>) -> Self {
            let mut stage = Self::default();
            for record in records {
                stage.plan.assignments.insert(record.id.clone(), record.spans.clone());
                stage.executors.insert(record.id.clone(), record);
            }
            stage
        }

        fn route(&self, len: usize, class: Option<&str>) -> Result<String, ModelNotReady> {
            let scene = Scene { executors: &self.executors, plan: &self.plan, load: &self.load, suspects: &self.suspects };
            let route = assemble(&path(len), scene, class)?;
            Ok(route.executors().map(|id| id.0).collect::<Vec<_>>().join(" "))
        }
    }

    #[test]
    fn least_loaded_replica_is_taken() {
        let mut stage = Stage::of(vec![record("a", "cpu", &[(0, 6)]), record("b", "cpu", &[(0, 6)])]);
        assert_eq!(stage.route(6, None).unwrap(), "a");
        stage.load.insert(ExecutorId("a".into()), 1);
        assert_eq!(stage.route(6, None).unwrap(), "b");
    }

    #[test]
    fn suspects_and_leftovers_are_last_resorts() {
        let mut stage = Stage::of(vec![record("a", "cpu", &[(0, 6)]), record("b", "cpu", &[(0, 6)])]);
        stage.suspects.insert(ExecutorId("a".into()));
        assert_eq!(stage.route(6, None).unwrap(), "b");
        stage.suspects.insert(ExecutorId("b".into()));
        assert_eq!(stage.route(6, None).unwrap(), "a", "better than none");
        stage.suspects.clear();
        stage.plan.assignments.remove(&ExecutorId("a".into()));
        assert_eq!(stage.route(6, None).unwrap(), "b", "a will unload it");
        stage.executors.get_mut(&ExecutorId("b".into())).unwrap().draining = true;
        assert_eq!(stage.route(6, None).unwrap(), "a");
    }

    #[test]
    fn route_of_a_cut_chain_has_lineages_at_both_ends() {
        let stage = Stage::of(vec![record("a", "cpu", &[(0, 3)]), record("b", "cpu", &[(3, 5)]), record("c", "cpu", &[(5, 8)])]);
        assert_eq!(stage.route(8, Some("cpu")).unwrap(), "a b c");
        let scene = Scene { executors: &stage.executors, plan: &stage.plan, load: &stage.load, suspects: &stage.suspects };
        let route = assemble(&path(8), scene, None).unwrap();
        let spans: Vec<&v1::Span> = route.hops.iter().map(|hop| hop.span.as_ref().unwrap()).collect();
        assert!(spans[0].lineage_from.is_empty());
        assert_eq!(spans[2].lineage_to, [7; 32]);
        for pair in spans.windows(2) {
            assert_eq!((pair[0].to, &pair[0].lineage_to), (pair[1].from, &pair[1].lineage_from));
        }
        assert_eq!(spans[1].lineage_from, [2; 32]);
        assert_eq!((route.plan_generation, route.numeric_class.as_str()), (4, "cpu"));
    }

    #[test]
    fn whole_replica_beats_a_cut_one_and_detours_are_found() {
        let stage = Stage::of(vec![record("a", "cpu", &[(0, 3)]), record("b", "cpu", &[(3, 6)]), record("z", "cpu", &[(0, 6)])]);
        assert_eq!(stage.route(6, None).unwrap(), "z");
        let mut stage = Stage::of(vec![record("a", "cpu", &[(0, 5)]), record("b", "cpu", &[(0, 3)]), record("c", "cpu", &[(3, 6)])]);
        assert_eq!(stage.route(6, None).unwrap(), "b c", "a leads nowhere");
        stage.suspects.insert(ExecutorId("c".into()));
        stage.executors.insert(ExecutorId("d".into()), record("d", "cpu", &[(5, 6)]));
        assert_eq!(stage.route(6, None).unwrap(), "a d");
    }

    #[test]
    fn classes_do_not_mix() {
        let mut stage = Stage::of(vec![record("a", "cpu", &[(0, 3)]), record("b", "gpu", &[(3, 6)])]);
        assert!(stage.route(6, None).unwrap_err().reason.contains("a part"));
        stage.executors.insert(ExecutorId("c".into()), record("c", "gpu", &[(0, 6)]));
        assert_eq!(stage.route(6, None).unwrap(), "c");
        assert!(stage.route(6, Some("cpu")).unwrap_err().reason.contains("class cpu"));
    }

    #[test]
    fn what_is_missing_is_said() {
        let mut stage = Stage::default();
        assert_eq!(stage.route(6, None).unwrap_err().reason, "no executor is registered");
        stage.executors.insert(ExecutorId("a".into()), record("a", "cpu", &[]));
        assert_eq!(stage.route(6, None).unwrap_err().reason, "no executor has loaded the model yet");
        stage.plan.unplaced.insert(CHAIN, "too large".to_owned());
        assert!(stage.route(6, None).unwrap_err().reason.ends_with("too large"));
    }
}
