//! What the engine asks its caller to do.

use ashlar_wire::code::{Code, Retry};

use crate::state::Now;
use crate::state::batch::{Batch, SampledToken, SequenceId};
use crate::state::sequence::Reason;

/// What the caller must do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Have the device compute a batch, in order.
    RunBatch(Batch),
    /// Tell the router that the sequence left the queue.
    EmitStarted {
        /// Which.
        sequence: SequenceId,
        /// Time in the queue.
        waited: Now,
        /// Prompt tokens whose compute was avoided.
        cached_tokens: u32,
    },
    /// Give a token to the router.
    EmitToken {
        /// Which.
        sequence: SequenceId,
        /// 0 for the first generated token.
        index: u32,
        /// The token.
        token: SampledToken,
    },
    /// Tell the router that the sequence ended well. The engine has forgotten it.
    EmitFinished {
        /// Which.
        sequence: SequenceId,
        /// Why.
        reason: Reason,
    },
    /// Tell the router that the sequence failed. The engine has forgotten it.
    EmitFailed {
        /// Which.
        sequence: SequenceId,
        /// Stable code.
        code: Code,
        /// A sentence.
        message: String,
        /// Advice.
        retry: Retry,
    },
    /// Give a sampled token to the executor upstream.
    SendToken {
        /// Which.
        sequence: SequenceId,
        /// Position of the token.
        position: u32,
        /// The token.
        token: SampledToken,
    },
    /// Tell the executor upstream that rows below `position` were taken.
    SendConsumed {
        /// Which.
        sequence: SequenceId,
        /// First position not taken.
        position: u32,
    },
    /// Forget the sequence on the device (sampler, inbox) and on the executor downstream.
    Release(SequenceId),
}
