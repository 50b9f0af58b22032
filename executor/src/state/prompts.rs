//! In which order prompts of several tenants run that have started: on a line of service, as start-time fair queueing has it (Goyal, Vin and Cheng,
//! SIGCOMM 1996). A prompt is as long as its tokens over its tenant's weight, and begins where its tenant's last one ends or at the service that its tenant
//! has had, but no later than the first of the line. For that service counts prompts whole that have only started: who comes new, and is given as much as
//! a tenant that floods has, would otherwise be behind all that the flood has started.

use std::collections::BTreeSet;

use super::batch::SequenceId;
use super::engine::Engine;

/// Prompts that run, have no token yet and never gave way: by priority and place on the virtual line.
#[derive(Debug, Default)]
pub(crate) struct PromptLine {
    prompts: BTreeSet<(i32, u64, SequenceId)>,
}

impl PromptLine {
    /// Where the first prompt of a priority is.
    fn first(&self, priority: i32) -> Option<u64> {
        let all = (priority, 0, SequenceId::LEAST)..=(priority, u64::MAX, SequenceId::MOST);
        self.prompts.range(all).next().map(|(_, rank, _)| *rank)
    }

    /// A prompt is over, or leaves, if it is in the line.
    pub(crate) fn remove(&mut self, priority: i32, rank: u64, id: SequenceId) -> bool {
        self.prompts.remove(&(priority, rank, id))
    }
}

impl Engine {
    /// A sequence starts for the first time, with so many tokens of its prompt to compute.
    pub(crate) fn join_line(&mut self, id: SequenceId, tokens: u32) {
        let (tenant, priority) = (self.sequences[id].tenant, self.sequences[id].priority);
        let rank = self.tenants.place_prompt(tenant, self.clock.line.first(priority), tokens);
        self.clock.line.prompts.insert((priority, rank, id));
        self.sequences[id].rank = rank;
    }

    /// A prompt gets another place on the line.
    pub(crate) fn move_in_line(&mut self, id: SequenceId, rank: u64) {
        let sequence = &mut self.sequences[id];
        let before = std::mem::replace(&mut sequence.rank, rank);
        if self.clock.line.remove(sequence.priority, before, id) {
            self.clock.line.prompts.insert((sequence.priority, rank, id));
        }
    }

    /// Whether all in the line are prompts that run, where they say that they are.
    pub(crate) fn check_line(&self) -> Result<(), String> {
        let is_there = |(priority, rank, id): &&(i32, u64, SequenceId)| {
            let place = self.sequences.get(*id).map(|sequence| (sequence.priority, sequence.rank, sequence.prompt_place()));
            place.is_some_and(|(of, at, place)| (of, at) == (*priority, *rank) && self.clock.prompts.contains(&place))
        };
        match self.clock.line.prompts.iter().find(|entry| !is_there(entry)) {
            Some((_, rank, id)) => Err(format!("sequence {id:?} is in the line of prompts at {rank}, and is no prompt that is there")),
            None => Ok(()),
        }
    }
}
