//! What an executor computes with: blocks on the device (`block`), the forward pass over them (`forward`), written once
//! over the op set, and the sampler. It knows rows, pages and logits; it does not know tenants, requests or schedules.
//! Start with `forward`. `alone` runs one sequence the plain way, for tests and as an oracle;
//! `steps` runs many in lockstep, to be measured; `profile` measures a block apart (docs/profile.md); `quality` says what a stored form of a model costs; `calibrate` quantises one with `gptq`
//! (docs/quantize.md), `surrogate` cuts one by what `prune` finds to matter least (docs/surrogate.md); `stitch` fits a map between two chains
//! (docs/stitch.md).

pub mod adapter;
pub mod alone;
pub mod block;
pub mod calibrate;
pub mod forward;
pub mod gptq;
pub mod load;
pub mod outputs;
mod passes;
pub mod philox;
pub mod profile;
mod prune;
pub mod quality;
pub mod rope;
pub mod sampler;
pub mod source;
pub mod steps;
pub mod stitch;
pub mod surrogate;
mod workspace;

#[cfg(test)]
mod testing;
