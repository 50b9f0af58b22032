//! Text to tokens and back: tokenizer, chat template, streaming detokenizer, stop strings. It knows nothing of HTTP,
//! executors or placement, and does no IO. Start with `tokenizer`, then `detokenizer`.

pub mod cache;
pub mod detokenizer;
pub mod pieces;
pub mod stop;
pub mod template;
pub mod tokenizer;
