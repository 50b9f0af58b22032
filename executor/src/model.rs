//! What an executor computes with: blocks on the device (`block`), the forward pass over them (`forward`), written once
//! over the op set, and the sampler. It knows rows, pages and logits; it does not know tenants, requests or schedules.
//! Start with `forward`. `alone` runs one sequence the plain way, for tests and as an oracle;
//! `steps` runs many in lockstep, to be measured; `profile` measures a block apart (docs/profile.md); `quality` says what a stored form of a model costs; `calibrate` quantises one with `gptq`
//! (docs/quantize.md).

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
pub mod quality;
pub mod rope;
pub mod sampler;
pub mod source;
pub mod steps;
mod workspace;

#[cfg(test)]
mod testing;
