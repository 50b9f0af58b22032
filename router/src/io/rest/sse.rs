//! Server-sent events: a running request as the body of a response. Chunks are typed structs written straight into one buffer;
//! what is ready at the same time goes out as one piece.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use futures::Stream;
use serde::Serialize;
use tokio::time::{Instant, Sleep};
use tracing::Span;

use crate::io::rest::choice::{Choice, ChoiceState};
use crate::io::rest::error::{self, ErrorBody};
use crate::io::rest::run::{Run, Usage};

/// Events that are ready are joined up to about this size.
const PIECE_BYTES: usize = 16 << 10;

/// How a route writes its chunks.
pub(crate) trait Chunks: Send + Unpin + 'static {
    /// The chunk that opens a choice, if there is one.
    fn write_opening(&self, out: &mut Events, index: usize);
    /// Text and log probabilities.
    fn write_delta(&mut self, out: &mut Events, index: usize, choice: &Choice);
    /// The end of a choice.
    fn write_end(&self, out: &mut Events, index: usize, reason: &'static str);
    /// The last chunk, with the usage.
    fn write_usage(&self, out: &mut Events, usage: Usage);
}

/// Framed events, ready to be sent.
#[derive(Default)]
pub(crate) struct Events {
    buffer: BytesMut,
}

impl Events {
    /// Adds one event.
    pub(crate) fn push(&mut self, chunk: &impl Serialize) {
        self.buffer.put_slice(b"data: ");
        serde_json::to_writer((&mut self.buffer).writer(), chunk).expect("chunks have text keys only, and memory takes any length");
        self.buffer.put_slice(b"\n\n");
    }

    fn push_line(&mut self, line: &'static [u8]) {
        self.buffer.put_slice(line);
    }

    fn take(&mut self) -> Bytes {
        self.buffer.split().freeze()
    }
}

/// The response that streams a run.
pub(crate) fn response<C: Chunks>(run: Run, chunks: C, include_usage: bool, keep_alive: Duration) -> Response {
    let body = EventStream {
        ended: vec![false; run.choices.len()],
        run: Some(run),
        chunks,
        events: Events::default(),
        include_usage,
        opened: false,
        keep_alive,
        timer: Box::pin(tokio::time::sleep(keep_alive)),
        span: Span::current(),
    };
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct EventStream<C> {
    /// `None` once the stream has ended.
    run: Option<Run>,
    chunks: C,
    events: Events,
    /// Choices whose end is written.
    ended: Vec<bool>,
    include_usage: bool,
    opened: bool,
    keep_alive: Duration,
    timer: Pin<Box<Sleep>>,
    span: Span,
}

impl<C: Chunks> EventStream<C> {
    /// Writes what a choice has to show.
    fn write_news(&mut self, index: usize) {
        let Some(run) = &mut self.run else { return };
        let choice = &mut run.choices[index];
        if choice.has_news() {
            self.chunks.write_delta(&mut self.events, index, choice);
            choice.clear_shown();
        }
        if let (false, Some(reason)) = (self.ended[index], choice.finish_reason()) {
            debug_assert_ne!(choice.state, ChoiceState::Running);
            self.chunks.write_end(&mut self.events, index, reason);
            self.ended[index] = true;
        }
    }

    /// Openings, and what came before the status was sent.
    fn write_opening(&mut self) {
        self.opened = true;
        for index in 0..self.ended.len() {
            self.chunks.write_opening(&mut self.events, index);
        }
        for index in 0..self.ended.len() {
            self.write_news(index);
        }
    }
}

impl<C: Chunks> Stream for EventStream<C> {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let span = this.span.clone();
        let _entered = span.enter();
        if this.run.is_some() && !this.opened {
            this.write_opening();
        }
        while let Some(run) = &mut this.run
            && this.events.buffer.len() < PIECE_BYTES
        {
            match run.poll_event(context) {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(index))) => this.write_news(index),
                Poll::Ready(Some(Err(failure))) => {
                    error::log(&failure);
                    this.events.push(&ErrorBody::of(&failure));
                    this.events.push_line(b"data: [DONE]\n\n");
                    this.run = None;
                }
                Poll::Ready(None) => {
                    if this.include_usage {
                        let usage = run.usage();
                        this.chunks.write_usage(&mut this.events, usage);
                    }
                    this.events.push_line(b"data: [DONE]\n\n");
                    this.run = None;
                }
            }
        }
        if this.events.buffer.is_empty() {
            if this.run.is_none() {
                return Poll::Ready(None);
            }
            if this.timer.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            this.events.push_line(b": keep-alive\n\n");
            // The new deadline wakes the task only if it is polled.
            this.timer.as_mut().reset(Instant::now() + this.keep_alive);
            let _ = this.timer.as_mut().poll(context);
        } else {
            this.timer.as_mut().reset(Instant::now() + this.keep_alive);
        }
        Poll::Ready(Some(Ok(this.events.take())))
    }
}
