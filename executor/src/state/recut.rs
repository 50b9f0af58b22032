//! Hosting and its consequences: spans come and go, the cut follows, and so do sequences and their handles. Splitting a segment is always
//! possible: sequences have nothing under way inside it. Two segments are joined when no sequence has hidden rows between them and
//! their handles can be paired; until then the old cut stays, and is looked at again later. No byte moves.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ashlar_wire::code::{Code, Retry};

use super::batch::{BatchId, SequenceId};
use super::clock::InFlight;
use super::cost::CostCurve;
use super::engine::Engine;
use super::lane::{Held, Lane, lanes, pages_most};
use super::pages::{ClassIndex, HandleIndex, LineageIndex, StretchIndex};
use super::segments::{BlockIndex, SegmentIndex, cut};
use super::sequence::{Path, PathStep, SpanIndex, StepState};
use super::span::{HostSpan, Span, SpanAttention, SpanPages};

/// Batches after which a cut that was kept is looked at again.
const RECUT_BATCHES: u64 = 32;

/// Two blocks that follow each other in a span.
type Border = (BlockIndex, BlockIndex);

impl Engine {
    /// Starts to host a span whose blocks are on the device. Running sequences go on.
    pub fn handle_host(&mut self, host: HostSpan) -> SpanIndex {
        assert!(!host.blocks.is_empty() && host.blocks.len() == host.lineages.len() && host.blocks.len() == host.kv_shapes.len());
        assert_eq!(host.forms.len(), host.blocks.len(), "a form for each block");
        assert_eq!(host.widths.len(), host.blocks.len() + 1, "a width on either side of each block");
        assert_eq!(host.costs.len(), host.blocks.len(), "a profile, or none, for each block");
        for (block, costs) in std::iter::zip(&host.blocks, &host.costs) {
            // A place may have had another block.
            match costs {
                Some(costs) => drop(self.profiles.insert(*block, Arc::clone(costs))),
                None => drop(self.profiles.remove(block)),
            }
        }
        assert!(host.windows.len() == host.blocks.len() && !host.windows.contains(&Some(0)), "a window has its own token in it");
        let mut attention = Vec::new();
        let mut pages: BTreeMap<ClassIndex, BTreeMap<u32, usize>> = BTreeMap::new();
        let is_whole = host.begins_with_embed && host.ends_with_head;
        for (offset, shape) in host.kv_shapes.iter().enumerate() {
            let Some(shape) = shape else { continue };
            let next = LineageIndex(self.lineages.len() as u32);
            let lineage = *self.lineages.entry(host.lineages[offset]).or_insert(next);
            let class = self.pages.class(*shape);
            let window = host.windows[offset];
            // A chain that is cut over executors has all pages that it may need from its start.
            let most = pages_most(window.filter(|_| is_whole), self.limits.chunk_tokens_max, self.limits.page_tokens);
            *pages.entry(class).or_default().entry(most).or_default() += 1;
            attention.push(SpanAttention { offset: offset as u32, class, lineage, window });
        }
        let path = Path { steps: Vec::new(), begins_with_embed: host.begins_with_embed, ends_with_head: host.ends_with_head };
        self.spans.push(Span {
            host,
            attention,
            pages: pages.into_iter().map(|(class, blocks)| SpanPages { class, blocks: blocks.into_iter().collect() }).collect(),
            path: Arc::new(path),
            hosted: true,
            sequence_count: 0,
            last_batch: (BatchId(0), 0),
        });
        self.recut();
        SpanIndex(self.spans.len() as u32 - 1)
    }

    /// Stops to host a span: its sequences fail with advice to go elsewhere.
    pub fn handle_unhost(&mut self, span: SpanIndex) {
        let ids: Vec<SequenceId> = self.sequences.iter().filter(|s| s.span == span).map(|s| s.id).collect();
        for id in ids {
            self.fail(id, Code::UnknownSpan, "the executor no longer holds this span".to_owned(), Retry::Elsewhere);
        }
        self.spans[span.0 as usize].hosted = false;
        self.recut();
    }

    /// Cuts hosted spans anew and moves sequences, handles and ready queues to the new cut.
    pub(crate) fn recut(&mut self) {
        let hosted: Vec<usize> = (0..self.spans.len()).filter(|&i| self.spans[i].hosted).collect();
        let blocks: Vec<Vec<BlockIndex>> = hosted.iter().map(|&i| self.spans[i].host.blocks.clone()).collect();
        let blocks: Vec<&[BlockIndex]> = blocks.iter().map(Vec::as_slice).collect();
        let parted = self.parted_by_adapters(&hosted);
        let mut fresh = cut(&blocks, &parted);
        let borders: BTreeSet<Border> = (fresh.paths.iter().zip(&blocks))
            .flat_map(|(path, blocks)| path.iter().skip(1).map(|(_, start)| (blocks[*start as usize - 1], blocks[*start as usize])))
            .collect();
        let mut keep = self.borders_to_keep(&hosted, &borders);
        self.recut_after = None;
        if !keep.is_empty() {
            keep.extend(&parted);
            fresh = cut(&blocks, &keep);
            self.recut_after = Some(BatchId(self.latest_batch().0 + RECUT_BATCHES));
        }
        let starts: Vec<Vec<u32>> = fresh.paths.iter().map(|path| path.iter().map(|(_, start)| *start).collect()).collect();
        self.split_steps(&hosted, &starts);
        self.join_steps(&hosted, &starts);
        let names = self.name_segments(fresh.segments);
        let forks = self.forks(&parted);
        for (path, &i) in fresh.paths.iter().zip(&hosted) {
            let span = &mut self.spans[i];
            let mut steps = Vec::with_capacity(path.len());
            for (n, (segment, from)) in path.iter().enumerate() {
                let to = path.get(n + 1).map_or(span.host.blocks.len() as u32, |(_, start)| *start);
                let attention = span.attention_in(*from, to);
                steps.push(PathStep {
                    segment: names[segment.0 as usize],
                    from: *from,
                    attention_from: attention.start as u32,
                    attention_count: attention.len() as u32,
                    lanes: lanes(&span.attention[attention], &mut self.pages),
                    fork: forks.get(&span.host.lineages[to as usize - 1]).copied().filter(|_| span.path.is_whole()),
                });
            }
            span.path = Arc::new(Path { steps, ..(*span.path).clone() });
        }
        self.tie_boundaries(&hosted);
        self.hosts_cut_chains = hosted.iter().any(|&i| !self.spans[i].path.is_whole());
        self.holdings = self.count_holdings();
        self.follow_paths();
        self.count_blocks();
    }

    /// Borders between blocks that whole chains of one lineage run through together, but with other adapters from there on. They are batched
    /// together on both sides; it is their keys and values before the border that they share, so there must be some.
    fn parted_by_adapters(&self, hosted: &[usize]) -> BTreeSet<Border> {
        let spans = || hosted.iter().map(|&i| &self.spans[i]).filter(|span| self.limits.prefix_cache && span.path.is_whole());
        let mut next: BTreeMap<([u8; 32], BlockIndex), BTreeSet<[u8; 32]>> = BTreeMap::new();
        for span in spans() {
            for (pair, block) in span.host.lineages.windows(2).zip(&span.host.blocks[1..]) {
                next.entry((pair[0], *block)).or_default().insert(pair[1]);
            }
        }
        let mut borders = BTreeSet::new();
        for span in spans() {
            let from = span.attention.first().map_or(span.host.blocks.len(), |block| block.offset as usize + 1);
            for i in from..span.host.blocks.len() {
                if next[&(span.host.lineages[i - 1], span.host.blocks[i])].len() > 1 {
                    borders.insert((span.host.blocks[i - 1], span.host.blocks[i]));
                }
            }
        }
        borders
    }

    /// Where whole chains part that had the same lineage: what boundary handles there cover, by that lineage.
    fn forks(&mut self, parted: &BTreeSet<Border>) -> BTreeMap<[u8; 32], StretchIndex> {
        let mut next: BTreeMap<[u8; 32], (BTreeSet<BlockIndex>, BTreeSet<[u8; 32]>, u32)> = BTreeMap::new();
        for span in self.spans.iter().filter(|span| span.hosted && span.path.is_whole()) {
            let widths = &span.host.widths[1..];
            for ((lineages, pair), between) in span.host.lineages.windows(2).zip(span.host.blocks.windows(2)).zip(widths) {
                let (blocks, ways, width) = next.entry(lineages[0]).or_default();
                blocks.insert(pair[1]);
                if parted.contains(&(pair[0], pair[1])) {
                    ways.insert(lineages[1]);
                }
                *width = *between;
            }
        }
        next.retain(|_, (blocks, ways, _)| (blocks.len() > 1 || ways.len() > 1) && self.limits.boundary_bytes > 0);
        let mut forks = BTreeMap::new();
        for (lineage, (.., width)) in next {
            let class = self.pages.hidden_class(width, self.limits.page_tokens);
            let index = LineageIndex(self.lineages.len() as u32);
            let index = *self.lineages.entry(lineage).or_insert(index);
            forks.extend(self.pages.stretch(&[(index, class)]).map(|stretch| (lineage, stretch)));
        }
        forks
    }

    /// Ties boundary handles to the pages of the blocks before their forks. Those of windowed blocks may be gone where later ones are not.
    fn tie_boundaries(&mut self, hosted: &[usize]) {
        let mut forks: BTreeMap<StretchIndex, BTreeSet<StretchIndex>> = BTreeMap::new();
        for &i in hosted {
            let steps = &self.spans[i].path.steps;
            for (s, fork) in steps.iter().enumerate().filter_map(|(s, step)| Some((s, step.fork?))) {
                let lanes = steps[..=s].iter().flat_map(|step| &step.lanes).filter(|lane| lane.window.is_none());
                for lane in lanes {
                    forks.entry(lane.stretch).or_default().insert(fork);
                }
            }
        }
        self.pages.set_forks(forks.into_iter().map(|(stretch, forks)| (stretch, forks.into_iter().collect())).collect());
    }

    /// Borders of the present cut that no chain needs any more but that sequences under way still do.
    fn borders_to_keep(&self, hosted: &[usize], needed: &BTreeSet<Border>) -> BTreeSet<Border> {
        let mut keep = BTreeSet::new();
        let mut pairs: BTreeMap<HandleIndex, HandleIndex> = BTreeMap::new();
        let mut back: BTreeMap<HandleIndex, HandleIndex> = BTreeMap::new();
        let spans = hosted.iter().map(|&i| &self.spans[i]);
        let border = |span: &Span, step: usize| {
            let from = span.path.steps[step].from as usize;
            (span.host.blocks[from - 1], span.host.blocks[from])
        };
        let joined = |span: &Span, step: usize| !needed.contains(&border(span, step));
        if !self.leaving.is_empty() {
            let all = spans.flat_map(|span| (1..span.path.steps.len()).filter(|i| joined(span, *i)).map(|i| border(span, i)));
            return all.collect();
        }
        let behind: BTreeSet<HandleIndex> = self.behind.iter().flat_map(|behind| behind.handles.iter().copied()).collect();
        for sequence in self.sequences.iter() {
            let span = self.span(sequence.span);
            for step in (1..sequence.steps.len()).filter(|i| joined(span, *i)) {
                let (upper, lower) = (|| (0..step).rev(), || step..sequence.steps.len());
                let has_lanes = |i: &usize| !sequence.steps[*i].lanes.is_empty();
                let mut fits = sequence.steps[step - 1].hidden.is_empty();
                if let (Some(upper), Some(lower)) = (upper().find(has_lanes), lower().find(has_lanes)) {
                    fits &= sequence.steps[upper].reserved == sequence.steps[lower].reserved;
                }
                let windows: BTreeSet<_> = sequence.path.steps.iter().flat_map(|step| &step.lanes).map(|lane| lane.window).collect();
                for window in windows {
                    let held = |i| sequence.held(i, window);
                    let (Some(upper), Some(lower)) = (upper().find_map(held), lower().find_map(held)) else { continue };
                    fits &= (upper.from, upper.to()) == (lower.from, lower.to());
                    for (h, rest) in upper.handles.iter().zip(&lower.handles) {
                        fits &= *pairs.entry(*h).or_insert(*rest) == *rest && *back.entry(*rest).or_insert(*h) == *h;
                        // Another sequence has left them behind: one of the two may come back before the other.
                        fits &= !behind.contains(h) && !behind.contains(rest);
                    }
                }
                if !fits {
                    keep.insert(border(span, step));
                }
            }
        }
        keep
    }

    /// Splits steps of present paths where the new cut has a border and the present one has none.
    fn split_steps(&mut self, hosted: &[usize], starts: &[Vec<u32>]) {
        let mut done: BTreeMap<(StretchIndex, usize), BTreeMap<HandleIndex, HandleIndex>> = BTreeMap::new();
        for (&i, starts) in hosted.iter().zip(starts) {
            for &start in starts.iter().rev() {
                let span = &self.spans[i];
                // The last step that begins at or before it.
                let Some(step) = span.path.steps.partition_point(|step| step.from <= start).checked_sub(1) else { continue };
                let whole = span.path.steps[step].clone();
                if whole.from == start {
                    continue;
                }
                let before = span.attention_in(whole.from, start);
                let of_window = |window| self.spans[i].attention[before.clone()].iter().filter(|block| block.window == window).count();
                // How many blocks of each lane lie before the border: some go up, some down, and some are cut.
                let cuts: Vec<(StretchIndex, usize)> = whole.lanes.iter().map(|lane| (lane.stretch, of_window(lane.window))).collect();
                let (mut first, mut second) = (Vec::new(), Vec::new());
                for (lane, cut) in whole.lanes.iter().zip(&cuts) {
                    let (upper, lower) = match cut.1 {
                        0 => (None, Some(lane.stretch)),
                        all if all == self.pages.block_count(lane.stretch) => (Some(lane.stretch), None),
                        at => {
                            if let Entry::Vacant(place) = done.entry(*cut) {
                                let rests = self.pages.split(lane.stretch, at);
                                for leaving in self.leaving.iter_mut().chain(&mut self.behind) {
                                    // The deeper half goes first.
                                    let both = leaving.handles.iter().flat_map(|h| rests.get(h).copied().into_iter().chain([*h]));
                                    leaving.handles = both.collect();
                                }
                                place.insert(rests);
                            }
                            let (upper, lower) = self.pages.halves(lane.stretch, at);
                            (Some(upper), Some(lower))
                        }
                    };
                    first.extend(upper.map(|stretch| Lane { stretch, ..*lane }));
                    second.extend(lower.map(|stretch| Lane { stretch, ..*lane }));
                }
                for sequence in self.sequences.iter_mut().filter(|sequence| sequence.span.0 as usize == i) {
                    let state = &mut sequence.steps[step];
                    let (mut upper, mut lower) = (Vec::new(), Vec::new());
                    for (cut, held) in cuts.iter().zip(std::mem::take(&mut state.lanes)) {
                        match done.get(cut) {
                            Some(rests) => {
                                lower.push(Held { from: held.from, handles: held.handles.iter().map(|handle| rests[handle]).collect() });
                                upper.push(held);
                            }
                            None if cut.1 == 0 => lower.push(held),
                            None => upper.push(held),
                        }
                    }
                    let (hidden, boundary) = (std::mem::take(&mut state.hidden), std::mem::take(&mut state.boundary));
                    let found = std::mem::take(&mut state.found);
                    let lower = StepState { lanes: lower, hidden, found, boundary, ..state.clone() };
                    state.lanes = upper;
                    sequence.steps.insert(step + 1, lower);
                }
                let mut path = (*self.spans[i].path).clone();
                let (attention_from, attention_count) = (before.end as u32, whole.attention_count - before.len() as u32);
                path.steps.insert(step + 1, PathStep { from: start, attention_from, attention_count, lanes: second, ..whole.clone() });
                path.steps[step] = PathStep { attention_count: before.len() as u32, lanes: first, fork: None, ..whole };
                self.spans[i].path = Arc::new(path);
            }
        }
    }

    /// Joins steps of present paths where the new cut has no border.
    fn join_steps(&mut self, hosted: &[usize], starts: &[Vec<u32>]) {
        loop {
            let first_gone = |i: usize, starts: &[u32]| {
                let steps = &self.spans[i].path.steps;
                (1..steps.len()).find(|s| !starts.contains(&steps[*s].from))
            };
            let joining: Vec<(usize, usize)> =
                hosted.iter().zip(starts).filter_map(|(&i, starts)| Some((i, first_gone(i, starts)?))).collect();
            if joining.is_empty() {
                return;
            }
            self.join_once(&joining);
        }
    }

    /// Joins one step of each of these spans to the one before it. Spans that have stretches in common come to every one of them in the same
    /// call, as they had the same borders: handles are joined once, with those that all their sequences hold.
    fn join_once(&mut self, joining: &[(usize, usize)]) {
        let mut done: BTreeSet<(StretchIndex, StretchIndex)> = BTreeSet::new();
        for (n, &(i, step)) in joining.iter().enumerate() {
            let mut path = (*self.spans[i].path).clone();
            let lower = path.steps.remove(step);
            let upper = path.steps[step - 1].clone();
            let windows: BTreeSet<_> = upper.lanes.iter().chain(&lower.lanes).map(|lane| lane.window).collect();
            let mut lanes = Vec::with_capacity(windows.len());
            for window in windows {
                let stretch = |step: &PathStep| step.lane_of(window).map(|lane| step.lanes[lane].stretch);
                let stretch = match (stretch(&upper), stretch(&lower)) {
                    (Some(first), Some(second)) => {
                        if done.insert((first, second)) {
                            let held = self.held_pairs(first, second, &joining[n..]);
                            self.pages.join(first, second, &held);
                        }
                        self.pages.whole(first, second)
                    }
                    (one, other) => one.or(other).expect("one of them has the lane"),
                };
                lanes.push(Lane { window, stretch });
            }
            for sequence in self.sequences.iter_mut().filter(|sequence| sequence.span.0 as usize == i) {
                let mut lower_state = sequence.steps.remove(step);
                let state = &mut sequence.steps[step - 1];
                (state.hidden, state.found) = (lower_state.hidden, lower_state.found);
                // The rows of these were read already: nothing is hidden between steps that are joined.
                let passed = std::mem::replace(&mut state.boundary, lower_state.boundary);
                passed.into_iter().rev().for_each(|kept| self.pages.release(kept.handle));
                // Handles of both have become those of the upper one.
                let mut take = |lane: &Lane| match (upper.lane_of(lane.window), lower.lane_of(lane.window)) {
                    (Some(lane), _) => std::mem::take(&mut state.lanes[lane]),
                    (None, lane) => std::mem::take(&mut lower_state.lanes[lane.expect("one of them has the lane")]),
                };
                state.lanes = lanes.iter().map(&mut take).collect();
                state.published = state.published.min(lower_state.published);
                (state.reserved, state.told) = match (upper.lanes.is_empty(), lower.lanes.is_empty()) {
                    (false, false) => (state.reserved, state.told.min(lower_state.told)),
                    (true, false) => (lower_state.reserved, lower_state.told),
                    (_, true) => (state.reserved, state.told),
                };
            }
            let attention_count = upper.attention_count + lower.attention_count;
            // An upper step without attention blocks begins at those of the lower one.
            path.steps[step - 1] = PathStep { attention_count, lanes, fork: lower.fork, ..upper };
            self.spans[i].path = Arc::new(path);
        }
    }

    /// For each held handle of a stretch the one of the next stretch for the same tokens of the same sequence, where the steps that have them are
    /// joined now: of each of these spans the lower one.
    fn held_pairs(&self, first: StretchIndex, second: StretchIndex, joining: &[(usize, usize)]) -> BTreeMap<HandleIndex, HandleIndex> {
        let joining: BTreeMap<usize, usize> = joining.iter().copied().collect();
        let mut pairs = BTreeMap::new();
        for sequence in self.sequences.iter() {
            let Some(&step) = joining.get(&(sequence.span.0 as usize)) else { continue };
            let held = |step: usize, wanted| {
                let lanes = &self.span(sequence.span).path.steps[step].lanes;
                let mut all = lanes.iter().zip(&sequence.steps[step].lanes);
                all.find(|(lane, _)| lane.stretch == wanted).map(|(_, held)| &held.handles)
            };
            if let (Some(upper), Some(lower)) = (held(step - 1, first), held(step, second)) {
                pairs.extend(upper.iter().copied().zip(lower.iter().copied()));
            }
        }
        pairs
    }

    /// Gives each fresh segment its place: that of a known one with the same blocks, or one that is no longer used.
    fn name_segments(&mut self, fresh: Vec<super::segments::Segment>) -> Vec<SegmentIndex> {
        self.segments.iter_mut().for_each(|segment| segment.span_count = 0);
        let mut names: Vec<Option<SegmentIndex>> = Vec::with_capacity(fresh.len());
        for segment in &fresh {
            let known = self.segments.iter().position(|known| known.blocks == segment.blocks);
            if let Some(known) = known {
                self.segments[known].span_count = segment.span_count;
            }
            names.push(known.map(|known| SegmentIndex(known as u32)));
        }
        let place = |(segment, name): (super::segments::Segment, Option<SegmentIndex>)| {
            name.unwrap_or_else(|| {
                let unused = self.segments.iter().position(|known| known.span_count == 0);
                let place = unused.unwrap_or(self.segments.len());
                // Other blocks, other costs.
                self.costs.resize_with(self.costs.len().max(place + 1), Default::default);
                self.costs[place] = CostCurve::in_turn(segment.blocks.iter().map(|block| self.profiles.get(block).map(|costs| &**costs)));
                let crosses = |batch: &&mut InFlight| batch.parts.iter().any(|(segment, _)| segment.0 as usize == place);
                self.in_flight.iter_mut().filter(crosses).for_each(|batch| batch.is_stale = true);
                if place == self.segments.len() {
                    self.segments.push(segment)
                } else {
                    self.segments[place] = segment
                }
                SegmentIndex(place as u32)
            })
        };
        fresh.into_iter().zip(names).map(place).collect()
    }

    /// Puts sequences on the paths of their spans, and fills the ready queues of the new segments.
    fn follow_paths(&mut self) {
        let mut places: Vec<(usize, usize)> = (0..self.segments.len()).map(|segment| (0, segment)).collect();
        for span in self.spans.iter().filter(|span| span.hosted) {
            let family = places[span.path.steps[0].segment.0 as usize].1;
            for (depth, step) in span.path.steps.iter().enumerate() {
                let place = &mut places[step.segment.0 as usize];
                place.0 = depth.max(place.0);
                let other = place.1;
                places.iter_mut().filter(|place| place.1 == other).for_each(|place| place.1 = family);
            }
        }
        self.ready.reset(&places, &self.forms());
        let ids: Vec<SequenceId> = self.sequences.iter().map(|sequence| sequence.id).collect();
        for id in &ids {
            let sequence = &mut self.sequences[*id];
            sequence.path = Arc::clone(&self.spans[sequence.span.0 as usize].path);
            assert_eq!(sequence.steps.len(), sequence.path.steps.len(), "steps were split and joined as the path was");
            sequence.steps.iter_mut().for_each(|step| step.queued = false);
        }
        self.count_decoding();
        for id in ids {
            (0..self.sequences[id].steps.len()).for_each(|step| self.enqueue(id, step));
        }
    }

    /// For each segment the number of its form: those of equal numbers may run abreast. None for one that has no twin.
    fn forms(&self) -> Vec<Option<usize>> {
        let mut keys = vec![None; self.segments.len()];
        for span in self.spans.iter().filter(|span| span.hosted) {
            let (host, steps) = (&span.host, &span.path.steps);
            for (n, step) in steps.iter().enumerate() {
                let blocks = step.from as usize..steps.get(n + 1).map_or(host.blocks.len(), |next| next.from as usize);
                let widths = &host.widths[blocks.start..=blocks.end];
                let key = (widths, &host.forms[blocks.clone()], &host.kv_shapes[blocks.clone()], &host.windows[blocks]);
                keys[step.segment.0 as usize] = Some(key);
            }
        }
        let mut counts: BTreeMap<_, usize> = BTreeMap::new();
        keys.iter().flatten().for_each(|key| *counts.entry(*key).or_default() += 1);
        let numbers: BTreeMap<_, usize> = counts.into_iter().filter(|(_, count)| *count > 1).map(|(key, _)| key).zip(0..).collect();
        keys.iter().map(|key| numbers.get(key.as_ref()?).copied()).collect()
    }

    /// Shares pages among the hosted blocks, and counts blocks.
    fn count_blocks(&mut self) {
        let mut users: BTreeMap<BlockIndex, usize> = BTreeMap::new();
        let mut weights = vec![0u64; self.pages.class_count()];
        for span in self.spans.iter().filter(|span| span.hosted) {
            // Hidden rows of each width have an equal share of their own budget.
            let steps = &span.path.steps;
            for (n, _) in steps.iter().enumerate().filter(|(_, step)| step.fork.is_some()) {
                let end = steps.get(n + 1).map_or(span.host.blocks.len(), |next| next.from as usize);
                weights[self.pages.hidden_class(span.host.widths[end], self.limits.page_tokens).0 as usize] = 1;
            }
            let blocks = |of_class: &SpanPages| of_class.blocks.iter().map(|(_, count)| *count as u64).sum::<u64>();
            span.pages.iter().for_each(|of_class| weights[of_class.class.0 as usize] += blocks(of_class));
            let distinct: BTreeSet<BlockIndex> = span.host.blocks.iter().copied().collect();
            distinct.into_iter().for_each(|block| *users.entry(block).or_default() += 1);
        }
        self.pages.share(&weights);
        self.block_counts = (users.len(), users.values().filter(|count| **count > 1).count());
    }
}
