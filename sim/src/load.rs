//! Load: requests in virtual time. Generated here from a seed (Poisson arrivals, heavy-tailed lengths, turns that share their
//! beginnings, tenants that flood); `trace` makes the same of recorded traffic.

use crate::Micros;
use crate::dice::{Dice, mix};
use crate::models::VOCAB;

/// A run of tokens of a prompt: equal seeds are equal tokens, as far as the shorter one goes.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Which tokens.
    pub seed: u64,
    /// How many.
    pub tokens: u32,
}

/// One request, or one turn of a conversation.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// When it comes; None: some time after the turn before it has ended.
    pub at: Option<Micros>,
    /// Whose it is.
    pub tenant: usize,
    /// Draws its model among those that have a name then; turns of a conversation have the same.
    pub model: u64,
    /// Its prompt; of a later turn, what follows the answer before.
    pub prompt: Vec<Part>,
    /// Tokens asked for.
    pub generated_tokens_max: u32,
    /// Generation ends after any of these.
    pub stop_tokens: Vec<u32>,
    /// Of sampling.
    pub seed: u64,
    /// Lower runs first.
    pub priority: i32,
    /// The client hangs up so long after it came.
    pub hang_up: Option<Micros>,
    /// The next turn, and the pause before it.
    pub next: Option<(usize, Micros)>,
}

/// Requests, in order of arrival.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// All of them.
    pub arrivals: Vec<Arrival>,
    /// Weight of each tenant.
    pub weights: Vec<u32>,
}

impl Part {
    /// Its tokens.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = u32> + '_ {
        (0..u64::from(self.tokens)).map(|at| (mix(&[self.seed, at]) % u64::from(VOCAB)) as u32)
    }
}

impl Load {
    /// Tokens of the longest sequence that there may be, turns counted together.
    pub(crate) fn longest(&self) -> u32 {
        let own = |arrival: &Arrival| arrival.prompt.iter().map(|part| part.tokens).sum::<u32>() + arrival.generated_tokens_max;
        let mut lengths: Vec<u32> = self.arrivals.iter().map(own).collect();
        for (i, arrival) in self.arrivals.iter().enumerate() {
            if let Some((next, _)) = arrival.next {
                lengths[next] += lengths[i];
            }
        }
        lengths.into_iter().max().unwrap_or(1)
    }

    /// When the last request comes that waits for nobody.
    pub(crate) fn last(&self) -> Micros {
        self.arrivals.iter().filter_map(|arrival| arrival.at).max().unwrap_or(0)
    }
}

/// Draws a load. It begins at `from`.
pub(crate) fn draw(dice: &mut Dice, from: Micros) -> Load {
    let tenants = dice.within(1..=4) as usize;
    let weights: Vec<u32> = (0..tenants).map(|_| if dice.chance(70) { 1 } else { 3 }).collect();
    let floods = tenants > 1 && dice.chance(30);
    let count = dice.heavy(25, 160) as usize;
    let mean = dice.pick(&[500, 5_000, 30_000, 100_000, 400_000]);
    let longest = dice.pick(&[40, 120, 300]);
    let answers = dice.pick(&[6, 20, 60]);
    let has_priorities = dice.chance(25);
    let stops: Vec<u32> = if dice.chance(50) { (0..dice.within(1..=8) as u32).collect() } else { Vec::new() };
    let mut load = Load { arrivals: Vec::new(), weights };
    let mut at = from;
    while load.arrivals.len() < count {
        at += dice.wait(mean);
        let tenant = if floods && dice.chance(80) { 0 } else { dice.within(0..=tenants as u64 - 1) as usize };
        // A system prompt of the tenant's, or one that all write.
        let opening = Part { seed: dice.pick(&[tenant as u64, 99]), tokens: dice.pick(&[0, 16, 33, 64]).min(longest) as u32 };
        let (model, mut priority) = (dice.next() % 64, 0);
        if has_priorities && dice.chance(20) {
            priority = 1;
        }
        let turns = if dice.chance(25) { dice.within(2..=4) } else { 1 };
        for turn in 0..turns {
            let own = Part { seed: dice.next() | 1 << 40, tokens: dice.heavy(3, longest) as u32 };
            let mut arrival = Arrival {
                at: (turn == 0).then_some(at),
                tenant,
                model,
                prompt: if turn == 0 { vec![opening, own] } else { vec![own] },
                generated_tokens_max: dice.heavy(2, answers) as u32,
                stop_tokens: stops.clone(),
                seed: dice.next(),
                priority,
                hang_up: dice.chance(8).then(|| dice.wait(300_000)),
                next: None,
            };
            if turn + 1 < turns {
                arrival.next = Some((load.arrivals.len() + 1, dice.wait(200_000)));
            }
            load.arrivals.push(arrival);
        }
    }
    load
}
