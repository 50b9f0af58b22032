//! The sequences of one request while they run: started together, their events merged, each dropped (and so cancelled) as soon as
//! its choice has ended. Dropping the run cancels all of them.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use ashlar_wire::code::Code;
use ashlar_wire::id::{RequestId, TenantName};
use ashlar_wire::v1;
use ashlar_wire::v1::sequence_event::Event;
use futures::StreamExt;

use crate::io::backend::{ApiError, Backend, ModelView, NewSequence, SequenceEvents};
use crate::io::metrics::RequestMetrics;
use crate::io::rest::Place;
use crate::io::rest::choice::{Choice, ChoiceState};
use crate::io::rest::generation::Generation;
use crate::text::tokenizer::Tokenizer;

/// All that a run needs to begin.
pub(crate) struct NewRun {
    pub(crate) request_id: RequestId,
    pub(crate) tenant: TenantName,
    pub(crate) model: Arc<ModelView>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// Each prompt with the tokens that may follow it.
    pub(crate) prompts: Vec<(Arc<[u32]>, u32)>,
    pub(crate) generation: Generation,
    pub(crate) metrics: RequestMetrics,
    pub(crate) place: Place,
}

/// A running request.
pub(crate) struct Run {
    /// Prompt by prompt, `choices_count` each.
    pub(crate) choices: Vec<Choice>,
    streams: Vec<Option<SequenceEvents>>,
    /// Where the next poll begins, so that no choice starves the others.
    next: usize,
    choices_count: usize,
    prompt_tokens: u64,
    metrics: RequestMetrics,
    _place: Place,
}

/// Tokens of a request, as OpenAI counts them.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, serde::Serialize)]
struct PromptTokensDetails {
    cached_tokens: u64,
}

impl Run {
    /// Starts all sequences, or none.
    pub(crate) async fn start(backend: &dyn Backend, new: NewRun) -> Result<Self, ApiError> {
        let NewRun { request_id, tenant, model, tokenizer, prompts, generation, mut metrics, place } = new;
        let stop_tokens: Arc<[u32]> = generation.stop_tokens.clone().into();
        let (mut choices, mut sequences) = (Vec::new(), Vec::new());
        for (prompt, generated_tokens_max) in &prompts {
            for choice_index in 0..generation.choices_count {
                let (stops, logprobs) = (Arc::clone(&generation.stops), generation.sampling.logprobs);
                choices.push(Choice::new(Arc::clone(&tokenizer), prompt, stops, Arc::clone(&stop_tokens), logprobs));
                sequences.push(NewSequence {
                    request_id: request_id.clone(),
                    tenant: tenant.clone(),
                    model: Arc::clone(&model),
                    prompt: Arc::clone(prompt),
                    generated_tokens_max: *generated_tokens_max,
                    stop_tokens: generation.stop_tokens.clone(),
                    sampling: generation.sampling.clone(),
                    seed: generation.seed,
                    choice_index,
                    priority: 0,
                });
            }
        }
        let started = futures::future::try_join_all(sequences.into_iter().map(|sequence| backend.start(sequence))).await;
        let streams = match started {
            Ok(streams) => streams.into_iter().map(Some).collect(),
            Err(error) => {
                metrics.set_code(error.code.as_str());
                return Err(error);
            }
        };
        let prompt_tokens = prompts.iter().map(|(prompt, _)| prompt.len() as u64).sum();
        metrics.add_prompt_tokens(prompt_tokens);
        let choices_count = generation.choices_count as usize;
        Ok(Self { choices, streams, next: 0, choices_count, prompt_tokens, metrics, _place: place })
    }

    /// Takes one event of any sequence. Returns the index of the choice that it belongs to, or `None` once all have ended.
    pub(crate) fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<usize, ApiError>>> {
        let count = self.streams.len();
        let mut running = false;
        for offset in 0..count {
            let index = (self.next + offset) % count;
            let Some(stream) = &mut self.streams[index] else { continue };
            running = true;
            if let Poll::Ready(event) = stream.poll_next_unpin(context) {
                self.next = (index + 1) % count;
                return Poll::Ready(Some(self.handle_event(index, event).map(|()| index)));
            }
        }
        if running {
            return Poll::Pending;
        }
        self.metrics.set_code("ok");
        Poll::Ready(None)
    }

    fn handle_event(&mut self, index: usize, event: Option<Result<Event, ApiError>>) -> Result<(), ApiError> {
        let choice = &mut self.choices[index];
        let outcome = match event {
            Some(Ok(Event::Started(started))) => {
                choice.cached_tokens = started.cached_tokens;
                Ok(())
            }
            Some(Ok(Event::Token(token))) if token.index == choice.generated_tokens => {
                choice.last_token_at = Some(self.metrics.token(choice.last_token_at));
                choice.handle_token(token);
                Ok(())
            }
            Some(Ok(Event::Token(token))) => {
                let message = format!("token {} came where {} was due", token.index, choice.generated_tokens);
                Err(ApiError::new(Code::Internal, message))
            }
            Some(Ok(Event::Finished(finished))) => {
                choice.handle_finished(finished.reason());
                Ok(())
            }
            Some(Ok(Event::Failed(failed))) => Err(of_failed(failed)),
            Some(Err(error)) => Err(error),
            None => Err(ApiError::new(Code::Internal, "the sequence ended without a reason")),
        };
        if choice.state != ChoiceState::Running {
            self.streams[index] = None;
        }
        if let Err(error) = &outcome {
            self.metrics.set_code(error.code.as_str());
            self.streams.iter_mut().for_each(|stream| *stream = None);
        }
        outcome
    }

    /// Waits a while for the first token, so that an early failure is the response and not a part of its stream.
    pub(crate) async fn first_token(&mut self, wait: Duration) -> Result<(), ApiError> {
        let first = async {
            while let Some(event) = poll_fn(|context| self.poll_event(context)).await {
                if self.choices[event?].generated_tokens > 0 {
                    break;
                }
            }
            Ok(())
        };
        tokio::time::timeout(wait, first).await.unwrap_or(Ok(()))
    }

    /// Runs to the end.
    pub(crate) async fn complete(&mut self) -> Result<(), ApiError> {
        while let Some(event) = poll_fn(|context| self.poll_event(context)).await {
            event?;
        }
        Ok(())
    }

    /// Tokens so far. Prompts count once, however many choices each has.
    pub(crate) fn usage(&self) -> Usage {
        let completion_tokens = self.choices.iter().map(|choice| u64::from(choice.generated_tokens)).sum();
        let cached_tokens = self.choices.iter().step_by(self.choices_count).map(|choice| u64::from(choice.cached_tokens)).sum();
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens,
            total_tokens: self.prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

fn of_failed(failed: v1::Failed) -> ApiError {
    let code = Code::parse(&failed.code).unwrap_or(Code::Internal);
    ApiError::new(code, failed.message)
}
