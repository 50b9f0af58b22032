//! Who may wait while as many sequences wait as may: the tenant with the longest line for its weight has its latest give up its place (Suter,
//! Lakshman, Stiliadis and Choudhury, "Design considerations for supporting TCP with per-flow queueing", 1998), so nobody is kept out by one that floods.

use ashlar_wire::code::{Code, Retry};

use super::batch::SequenceId;
use super::engine::Engine;
use super::sequence::{Sequence, Status};
use super::tenants::TenantIndex;

impl Engine {
    /// Makes room for one more sequence of a tenant in the line. Who loses its place never ran, is of no higher priority, and of a tenant whose line is
    /// longer for its weight even without it.
    ///
    /// # Errors
    /// When nobody has to make room for it.
    pub(crate) fn make_room_to_wait(&mut self, tenant: TenantIndex, priority: i32) -> Result<(), (Code, String, Retry)> {
        if self.tenants.waiting_count() < self.limits.waiting_max as usize {
            return Ok(());
        }
        let Some(latest) = self.latest_of_longest_line(tenant, priority) else {
            return Err(self.too_many_wait());
        };
        let (code, message, retry) = self.too_many_wait();
        self.fail(latest, code, message, retry);
        Ok(())
    }

    /// Whether no more wait that never ran than may.
    pub(crate) fn check_waiting(&self) -> Result<(), String> {
        let is_new = |sequence: &&Sequence| sequence.status == Status::Waiting && !sequence.has_begun();
        let (count, most) = (self.sequences.iter().filter(is_new).count(), self.limits.waiting_max);
        if count > most as usize { Err(format!("{count} sequences wait that never ran, {most} may")) } else { Ok(()) }
    }

    fn too_many_wait(&self) -> (Code, String, Retry) {
        let most = self.limits.waiting_max;
        let message = format!("{most} sequences wait already, as many as may (executor.waiting_max); try again when they have begun");
        (Code::TooManyRequests, message, Retry::Elsewhere)
    }

    fn latest_of_longest_line(&self, asks: TenantIndex, priority: i32) -> Option<SequenceId> {
        let with_one_more = self.tenants.line_length(asks, 1);
        let may_give = |of: &TenantIndex| *of != asks && self.tenants.line_length(*of, -1) >= with_one_more;
        let latest = |of: TenantIndex| {
            let gives = |turn: &(i32, _, SequenceId)| turn.0 >= priority && !self.sequences[turn.2].has_begun();
            self.tenants
                .waiting(of)
                .rev()
                .take_while(|turn| turn.0 >= priority)
                .find(gives)
                .map(|turn| (self.tenants.line_length(of, 0), turn.2))
        };
        self.tenants.all_waiting().filter(may_give).filter_map(latest).max().map(|(_, latest)| latest)
    }
}
