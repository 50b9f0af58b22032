//! Stories with pictures (tests/data/placement/*.txt) and the properties that every plan has.

use std::fmt::Write as _;

use proptest::prelude::*;

use super::*;

/// A chain of `(block, bytes)` pairs: an embedding, layers of two blocks, a head; equal names are equal blocks. `block+adapter` has an adapter
/// of an eighth of the bytes.
fn chain(blocks: &[(String, u64)]) -> SizedChain {
    let sized = |(name, bytes): &(String, u64)| {
        let (block, adapter) = name.split_once('+').map_or((name.as_str(), None), |(block, _)| (block, Some(name)));
        let adapter = adapter.map(|both| SizedAdapter { digest: Digest::of(both.as_bytes()), bytes: bytes / 8 });
        SizedBlock { digest: Digest::of(block.as_bytes()), bytes: *bytes, adapter }
    };
    let len = blocks.len() as u32;
    let borders = (3..len.saturating_sub(2)).step_by(2).collect();
    SizedChain { blocks: blocks.iter().map(sized).collect(), borders }
}

/// An executor whose device is known by its class.
fn offer(memory_bytes: u64, class: &str) -> ExecutorOffer {
    ExecutorOffer { memory_bytes, numeric_class: class.to_owned(), profiled_on: format!("{class}-device") }
}

fn digest(name: &str) -> ChainDigest {
    ChainDigest(Digest::of(name.as_bytes()).0)
}

/// Runs one story: each command's effect is drawn under it.
///
/// Commands: `executor NAME BYTES CLASS`, `lose NAME`, `chain NAME BLOCK:BYTES...`, `forget NAME`, `policy SPANS REPLICAS`, `plan`.
fn play(story: &str) -> String {
    let mut inventory = Inventory::default();
    let mut names: BTreeMap<ChainDigest, String> = BTreeMap::new();
    let (mut policy, mut previous) = (PlanPolicy::default(), Plan::default());
    let mut picture = String::new();
    for line in story.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["executor", name, bytes, class] => {
                let offer = offer(bytes.parse().unwrap(), class);
                inventory.executors.insert(ExecutorId((*name).to_owned()), offer);
            }
            ["lose", name] => drop(inventory.executors.remove(&ExecutorId((*name).to_owned())).expect("it is there")),
            ["chain", name, blocks @ ..] => {
                let block = |text: &&str| text.split_once(':').map(|(name, bytes)| (name.to_owned(), bytes.parse().unwrap())).unwrap();
                let blocks: Vec<(String, u64)> = blocks.iter().map(block).collect();
                inventory.chains.insert(digest(name), chain(&blocks));
                names.insert(digest(name), (*name).to_owned());
            }
            ["forget", name] => drop(inventory.chains.remove(&digest(name)).expect("it is there")),
            ["policy", spans, replicas] => {
                policy = PlanPolicy { spans_per_chain: spans.parse().unwrap(), replicas: replicas.parse().unwrap() };
            }
            ["plan"] => {
                let planned = plan(&policy, &inventory, &previous);
                check(&policy, &inventory, &planned.plan);
                picture += &draw(&planned, &inventory, &names);
                previous = planned.plan;
            }
            other => panic!("unknown command {other:?}"),
        }
    }
    picture
}

fn draw(planned: &Planned, inventory: &Inventory, names: &BTreeMap<ChainDigest, String>) -> String {
    let mut out = format!("generation {}\n", planned.plan.generation);
    for (executor, offer) in &inventory.executors {
        let spans = planned.plan.assignments.get(executor).map_or(&[][..], Vec::as_slice);
        let used = used_bytes(inventory, spans);
        let _ = writeln!(out, "  {executor} {used}/{}", offer.memory_bytes);
        let mut lines: Vec<String> =
            spans.iter().map(|span| format!("    {} [{}..{})\n", names[&span.chain], span.from, span.to)).collect();
        lines.sort();
        out.extend(lines);
    }
    let mut lines: Vec<String> =
        planned.plan.unplaced.iter().map(|(chain, reason)| format!("  no place for {}: {reason}\n", names[chain])).collect();
    for line in &planned.explanation {
        let named = names.iter().fold(line.clone(), |line, (digest, name)| line.replace(&digest.short(), name));
        lines.push(format!("  > {named}\n"));
    }
    lines.sort();
    out.extend(lines);
    out
}

fn used_bytes(inventory: &Inventory, spans: &[SpanAssignment]) -> u64 {
    let blocks = spans.iter().flat_map(|span| inventory.chains[&span.chain].span(span.from, span.to));
    blocks.flat_map(SizedBlock::parts).collect::<BTreeMap<_, _>>().values().sum()
}

/// What holds of every plan.
fn check(policy: &PlanPolicy, inventory: &Inventory, plan: &Plan) {
    for (executor, spans) in &plan.assignments {
        let offer = &inventory.executors[executor];
        assert!(used_bytes(inventory, spans) <= offer.memory_bytes, "memory of {executor}");
        let chains: std::collections::BTreeSet<_> = spans.iter().map(|span| span.chain).collect();
        assert_eq!(chains.len(), spans.len(), "one span of a chain for each executor");
    }
    for (digest, chain) in &inventory.chains {
        let holders: Vec<(ExecutorId, (u32, u32))> = plan
            .assignments
            .iter()
            .flat_map(|(id, spans)| spans.iter().filter(|span| span.chain == *digest).map(|span| (id.clone(), (span.from, span.to))))
            .collect();
        if plan.unplaced.contains_key(digest) {
            assert!(holders.is_empty(), "nothing is held of what cannot run");
            continue;
        }
        let pattern = keep::pattern(chain, &holders).expect("no overlaps");
        let mut at = 0;
        for (from, to) in &pattern {
            assert_eq!(*from, at, "contiguous");
            assert!(chain.is_border(*from) && chain.is_border(*to), "cut at borders");
            let of_span: Vec<_> = holders.iter().filter(|(_, span)| span == &(*from, *to)).collect();
            assert!(!of_span.is_empty() && of_span.len() <= policy.replicas as usize, "each span is held, by no more than asked");
            at = *to;
        }
        assert_eq!(at, chain.len(), "covered");
        if pattern.len() > 1 {
            let classes: std::collections::BTreeSet<_> = holders.iter().map(|(id, _)| &inventory.executors[id].numeric_class).collect();
            assert_eq!(classes.len(), 1, "a cut chain is of one class");
        }
    }
    let again = super::plan(policy, inventory, plan);
    assert_eq!(again.plan, *plan, "planning again changes nothing");
}

#[test]
fn stories_end_as_drawn() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/placement");
    let mut count = 0;
    for file in std::fs::read_dir(directory).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let (story, wanted) = text.split_once("----\n").unwrap_or((&text, ""));
        let picture = play(story);
        if std::env::var_os("UPDATE_GOLDENS").is_some() {
            std::fs::write(&path, format!("{story}----\n{picture}")).unwrap();
        } else {
            assert_eq!(picture, wanted, "{} (UPDATE_GOLDENS=1 rewrites)", path.display());
        }
        count += 1;
    }
    assert!(count >= 5, "the stories are there");
}

/// Chains of up to 8 layers whose blocks come from a few bases, so that they share.
fn inventories() -> impl Strategy<Value = Inventory> {
    let executor = (1u64..400, 0u8..2);
    let block = (0u8..4, 1u64..12);
    let chains = prop::collection::vec(prop::collection::vec(block, 1..9), 0..6);
    // Of some chains times on the devices of some classes, as long as the longest chain.
    let times = prop::collection::vec((0usize..6, 0u8..2, prop::collection::vec(0u64..1000, 18)), 0..8);
    (prop::collection::vec(executor, 0..6), chains, times).prop_map(|(executors, chains, times)| {
        let mut inventory = Inventory::default();
        for (index, (memory_bytes, class)) in executors.into_iter().enumerate() {
            let offer = offer(memory_bytes, &format!("class-{class}"));
            inventory.executors.insert(ExecutorId(format!("exe_{index}")), offer);
        }
        for (index, layers) in chains.into_iter().enumerate() {
            let mut blocks = vec![("embed".to_owned(), 10)];
            for (layer, (variant, bytes)) in layers.into_iter().enumerate() {
                // The bytes are part of the name: equal blocks have equal sizes.
                blocks.push((format!("attention-{layer}-{variant}-{bytes}"), bytes));
                blocks.push((format!("feed-forward-{layer}-{variant}-{bytes}"), 2 * bytes));
            }
            blocks.push(("head".to_owned(), 10));
            inventory.chains.insert(digest(&index.to_string()), chain(&blocks));
        }
        for (index, class, mut times) in times {
            let chain = digest(&index.to_string());
            times.truncate(inventory.chains.get(&chain).map_or(0, |chain| chain.blocks.len()));
            inventory.times.entry(chain).or_default().insert(format!("class-{class}-device"), times);
        }
        inventory
    })
}

fn policies() -> impl Strategy<Value = PlanPolicy> {
    (1u32..4, 1u32..4).prop_map(|(spans_per_chain, replicas)| PlanPolicy { spans_per_chain, replicas })
}

/// Spans of `plan` by executor that are not in `other`.
fn moved(plan: &Plan, other: &Plan) -> Vec<(ExecutorId, SpanAssignment)> {
    let all = plan.assignments.iter().flat_map(|(id, spans)| spans.iter().map(|span| (id.clone(), *span)));
    all.filter(|(id, span)| !other.assignments.get(id).is_some_and(|spans| spans.contains(span))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases * 2, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_plan_is_sound_and_stands_when_planned_again(inventory in inventories(), policy in policies()) {
        check(&policy, &inventory, &plan(&policy, &inventory, &Plan::default()).plan);
    }

    #[test]
    fn every_plan_after_a_change_is_sound(one in inventories(), two in inventories(), policies in (policies(), policies())) {
        let first = plan(&policies.0, &one, &Plan::default()).plan;
        check(&policies.1, &two, &plan(&policies.1, &two, &first).plan);
    }

    /// Cut by time, the longest span takes no longer than where the same chain is cut by bytes, but for what one layer takes: a cut falls on the border
    /// that is nearest to an equal share.
    #[test]
    fn spans_take_equally_long_where_all_blocks_were_profiled(layers in prop::collection::vec((1u64..100, 1u64..1000), 2..20), count in 2u32..5) {
        let mut blocks = vec![("embed".to_owned(), 10)];
        blocks.extend(layers.iter().enumerate().flat_map(|(layer, (bytes, _))| ["a", "f"].map(|kind| (format!("{kind}{layer}"), *bytes))));
        blocks.push(("head".to_owned(), 10));
        let mut inventory = Inventory::default();
        inventory.executors.extend((0..count).map(|i| (ExecutorId(format!("exe_{i}")), offer(100_000, "cpu"))));
        inventory.chains.insert(digest("one"), chain(&blocks));
        let policy = PlanPolicy { spans_per_chain: count, replicas: 1 };
        let times: Vec<u64> = [5].into_iter().chain(layers.iter().flat_map(|(_, nanos)| [*nanos; 2])).chain([5]).collect();
        let longest = |inventory: &Inventory| {
            let planned = plan(&policy, inventory, &Plan::default()).plan;
            check(&policy, inventory, &planned);
            let spans = planned.assignments.values().flatten();
            spans.map(|span| times[span.from as usize..span.to as usize].iter().sum::<u64>()).max().unwrap()
        };
        let by_bytes = longest(&inventory);
        // Times on another kind of device say nothing.
        inventory.times.entry(digest("one")).or_default().insert("elsewhere".to_owned(), times.clone());
        prop_assert_eq!(longest(&inventory), by_bytes);
        inventory.times.entry(digest("one")).or_default().insert("cpu-device".to_owned(), times.clone());
        let by_time = longest(&inventory);
        let layer = 2 * layers.iter().map(|(_, nanos)| *nanos).max().unwrap() + 5;
        prop_assert!(by_time <= by_bytes + layer, "{} by time, {} by bytes", by_time, by_bytes);
        let whole: u64 = times.iter().sum();
        let spans = u64::from(count).min(layers.len() as u64);
        prop_assert!(spans < u64::from(count) || by_time <= whole / spans + 2 * layer, "{} of {} in {}", by_time, whole, spans);
    }

    #[test]
    fn executor_that_joins_moves_nothing(inventory in inventories(), memory_bytes in 1u64..400, replicas in 1u32..4) {
        let policy = PlanPolicy { spans_per_chain: 1, replicas };
        let before = plan(&policy, &inventory, &Plan::default()).plan;
        let mut more = inventory.clone();
        more.executors.insert(ExecutorId("exe_new".to_owned()), offer(memory_bytes, "class-0"));
        let after = plan(&policy, &more, &before).plan;
        check(&policy, &more, &after);
        if before.unplaced.is_empty() {
            prop_assert_eq!(moved(&before, &after), vec![]);
        }
    }

    #[test]
    fn loss_replaces_only_what_was_lost(inventory in inventories(), lost in 0usize..6) {
        let policy = PlanPolicy::default();
        let before = plan(&policy, &inventory, &Plan::default()).plan;
        let lost = ExecutorId(format!("exe_{lost}"));
        let mut less = inventory.clone();
        less.executors.remove(&lost);
        let after = plan(&policy, &less, &before).plan;
        check(&policy, &less, &after);
        for (executor, span) in moved(&before, &after) {
            let cut = span.from > 0 || span.to < inventory.chains[&span.chain].len();
            let touched = before.assignments.get(&lost).is_some_and(|spans| spans.iter().any(|other| other.chain == span.chain));
            prop_assert!(executor == lost || (cut && touched), "{} left {}", name(&span), executor);
        }
    }

    #[test]
    fn chains_of_one_family_share_an_executor(count in 1usize..6) {
        let mut inventory = Inventory::default();
        for executor in 0..3 {
            let offer = offer(1000, "cpu");
            inventory.executors.insert(ExecutorId(format!("exe_{executor}")), offer);
        }
        for tune in 0..count {
            let mut blocks: Vec<(String, u64)> = (0..8).map(|block| (format!("base-{block}"), 20)).collect();
            blocks[6].0 = format!("tuned-{tune}");
            inventory.chains.insert(digest(&tune.to_string()), chain(&blocks));
        }
        let planned = plan(&PlanPolicy::default(), &inventory, &Plan::default()).plan;
        prop_assert_eq!(planned.assignments.len(), 1);
        let spans = planned.assignments.values().next().unwrap();
        prop_assert_eq!(used_bytes(&inventory, spans), 140 + 20 * count as u64);
    }
}

/// Four layers of equal bytes, of which the first takes as long as the others together.
#[test]
fn a_chain_is_cut_in_the_middle_of_its_time_and_stays_so() {
    let mut inventory = Inventory::default();
    inventory.executors.extend(["exe_a", "exe_b"].map(|name| (ExecutorId(name.to_owned()), offer(1000, "cpu"))));
    let blocks: Vec<(String, u64)> = (0..10).map(|block| (format!("block-{block}"), 10)).collect();
    inventory.chains.insert(digest("one"), chain(&blocks));
    let policy = PlanPolicy { spans_per_chain: 2, replicas: 1 };
    let spans = |plan: &Plan| {
        let mut spans: Vec<_> = plan.assignments.values().flatten().map(|span| (span.from, span.to)).collect();
        spans.sort_unstable();
        spans
    };
    let by_bytes = plan(&policy, &inventory, &Plan::default()).plan;
    assert_eq!(spans(&by_bytes), [(0, 5), (5, 10)]);
    inventory.times.insert(digest("one"), [("cpu-device".to_owned(), vec![1, 30, 30, 10, 10, 10, 10, 10, 10, 1])].into());
    assert_eq!(spans(&plan(&policy, &inventory, &Plan::default()).plan), [(0, 3), (3, 10)]);
    // What stands is not moved by a profile that comes later.
    assert_eq!(plan(&policy, &inventory, &by_bytes).plan, by_bytes);
    // Two kinds of devices in one class: no time is that of both.
    inventory.executors.get_mut(&ExecutorId("exe_b".to_owned())).unwrap().profiled_on = "other".to_owned();
    assert_eq!(spans(&plan(&policy, &inventory, &Plan::default()).plan), [(0, 5), (5, 10)]);
}
