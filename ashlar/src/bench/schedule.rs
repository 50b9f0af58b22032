//! What is sent when: a pure function of a seed and a specification, drawn whole before the first request, so that two servers
//! get the same load and a report can name it by its hash. It does no IO and knows no clock.

use std::str::FromStr;
use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Requests of one run.
pub(crate) const REQUESTS_MAX: usize = 200_000;
/// Models of one run.
pub(crate) const MODELS_MAX: usize = 1024;
/// Tokens of one prompt or one answer.
pub(crate) const TOKENS_MAX: u32 = 1 << 20;
/// Tokens that all answers together may ask for: each leaves a gap in memory until the report.
pub(crate) const OUTPUT_TOKENS_TOTAL_MAX: u64 = 100_000_000;
/// Seconds of one run.
pub(crate) const DURATION_S_MAX: f64 = 86_400.0;
/// Requests a second.
pub(crate) const RATE_MAX: f64 = 10_000.0;

/// A length, drawn evenly from both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenRange {
    /// The shortest.
    pub(crate) min: u32,
    /// The longest.
    pub(crate) max: u32,
}

impl FromStr for TokenRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once("..").unwrap_or((text, text));
        let number = |text: &str| {
            text.trim_start_matches('=').parse::<u32>().map_err(|_| format!("`{text}` is no number of tokens; write 128 or 64..512"))
        };
        let range = Self { min: number(min)?, max: number(max)? };
        match range {
            Self { min: 0, .. } => Err("must be at least 1".into()),
            Self { max, .. } if max > TOKENS_MAX => Err(format!("must be at most {TOKENS_MAX}")),
            Self { min, max } if min > max => Err("must end no lower than it begins".into()),
            range => Ok(range),
        }
    }
}

/// A model and its share of the requests.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct WeightedModel {
    /// As the endpoint knows it.
    pub(crate) name: String,
    /// Against the other models' weights.
    pub(crate) weight: f64,
}

impl FromStr for WeightedModel {
    type Err = String;

    /// `name` or `name:weight`; a colon before anything but a number belongs to the name.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, weight) = match text.rsplit_once(':') {
            Some((name, weight)) => weight.parse().map_or((text, 1.0), |weight: f64| (name, weight)),
            None => (text, 1.0),
        };
        if name.is_empty() {
            return Err("a model needs a name".into());
        }
        if !(weight.is_finite() && weight > 0.0) {
            return Err("a weight must be above 0".into());
        }
        Ok(Self { name: name.to_owned(), weight })
    }
}

/// A model and the endpoint that serves it alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// As that endpoint knows it.
    pub(crate) model: String,
    /// Where it is.
    pub(crate) url: String,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((model, url)) if !model.is_empty() && !url.is_empty() => Ok(Self { model: model.to_owned(), url: url.to_owned() }),
            _ => Err("expected MODEL=URL".into()),
        }
    }
}

/// When requests start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Arrivals {
    /// Open loop: at the times of a Poisson process, whatever the server does.
    Poisson {
        /// Requests a second.
        rate: f64,
    },
    /// Closed loop: each of so many clients sends its next request when it has its answer.
    Closed {
        /// Clients.
        concurrency: usize,
    },
}

/// What to draw a schedule from.
#[derive(Debug, Clone)]
pub(crate) struct ScheduleSpec {
    /// Of every draw.
    pub(crate) seed: u64,
    /// When requests start.
    pub(crate) arrivals: Arrivals,
    /// At least one.
    pub(crate) models: Vec<WeightedModel>,
    /// Each model after the other, whatever the weights.
    pub(crate) in_turn: bool,
    /// Length of prompts.
    pub(crate) prompt_tokens: TokenRange,
    /// Length of answers.
    pub(crate) output_tokens: TokenRange,
    /// Requests at most.
    pub(crate) requests_max: usize,
    /// No request starts later.
    pub(crate) duration: Option<Duration>,
}

/// One request of a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Planned {
    /// Its place in the schedule; names its prompt too.
    pub(crate) index: u32,
    /// Since the start of the run; zero in a closed loop.
    pub(crate) at: Duration,
    /// Of `ScheduleSpec::models`.
    pub(crate) model: usize,
    /// Length of its prompt, if that is generated.
    pub(crate) prompt_tokens: u32,
    /// Length of its answer at most.
    pub(crate) output_tokens: u32,
}

/// The requests of `spec`, in the order of their start.
pub(crate) fn draw(spec: &ScheduleSpec) -> Vec<Planned> {
    assert!(!spec.models.is_empty() && spec.requests_max <= REQUESTS_MAX, "checked when the arguments were read");
    let mut rng = ChaCha8Rng::seed_from_u64(spec.seed);
    let mut at_s = 0.0;
    let mut requests = Vec::new();
    while requests.len() < spec.requests_max {
        // Every request takes the same draws in both loops, so that they differ in their times alone.
        let gap = -(1.0 - uniform(&mut rng)).ln();
        let drawn = weighted(&spec.models, uniform(&mut rng));
        let model = if spec.in_turn { requests.len() % spec.models.len() } else { drawn };
        let prompt_tokens = even(spec.prompt_tokens, uniform(&mut rng));
        let output_tokens = even(spec.output_tokens, uniform(&mut rng));
        if let Arrivals::Poisson { rate } = spec.arrivals {
            at_s += gap / rate;
        }
        // Whole microseconds hide the last bit of `ln`, which is the platform's.
        let at = Duration::from_micros((at_s * 1e6) as u64);
        if spec.duration.is_some_and(|duration| at >= duration) {
            break;
        }
        requests.push(Planned { index: requests.len() as u32, at, model, prompt_tokens, output_tokens });
    }
    requests
}

/// A name for everything that a schedule says, in hexadecimal.
pub(crate) fn hash(models: &[WeightedModel], requests: &[Planned]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"ashlar bench schedule 1\n");
    for request in requests {
        hasher.update(&(request.at.as_micros() as u64).to_le_bytes());
        hasher.update(models[request.model].name.as_bytes());
        hasher.update(&[0]);
        hasher.update(&request.prompt_tokens.to_le_bytes());
        hasher.update(&request.output_tokens.to_le_bytes());
    }
    hasher.finalize().to_hex()[..HASH_CHARS].to_owned()
}

/// Hexadecimal digits of the hashes in reports: enough to tell runs apart, short enough to read.
pub(crate) const HASH_CHARS: usize = 32;

/// From `[0, 1)`, of 53 bits.
pub(crate) fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

fn even(range: TokenRange, draw: f64) -> u32 {
    range.min + (draw * f64::from(range.max - range.min + 1)) as u32
}

fn weighted(models: &[WeightedModel], draw: f64) -> usize {
    let mut left = draw * models.iter().map(|model| model.weight).sum::<f64>();
    models
        .iter()
        .position(|model| {
            left -= model.weight;
            left < 0.0
        })
        .unwrap_or(models.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> ScheduleSpec {
        ScheduleSpec {
            seed: 7,
            arrivals: Arrivals::Poisson { rate: 20.0 },
            models: ["a:3", "b"].map(|text| text.parse().expect("a model")).to_vec(),
            in_turn: false,
            prompt_tokens: "64..512".parse().expect("a range"),
            output_tokens: "16".parse().expect("a range"),
            requests_max: 2000,
            duration: None,
        }
    }

    #[test]
    fn schedule_is_a_pure_function_of_its_seed() {
        let (one, two) = (draw(&spec()), draw(&spec()));
        assert_eq!(one, two);
        assert_eq!(hash(&spec().models, &one), "ccd795672b9ecf674764b5697b02119f");
        let other = draw(&ScheduleSpec { seed: 8, ..spec() });
        assert_ne!(hash(&spec().models, &one), hash(&spec().models, &other));
    }

    #[test]
    fn draws_have_the_rate_the_weights_and_the_lengths_asked_for() {
        let requests = draw(&spec());
        let rate = requests.len() as f64 / requests.last().expect("not empty").at.as_secs_f64();
        assert!((18.0..22.0).contains(&rate), "{rate}");
        let share = requests.iter().filter(|request| request.model == 0).count() as f64 / requests.len() as f64;
        assert!((0.71..0.79).contains(&share), "{share}");
        let lengths = || requests.iter().map(|request| request.prompt_tokens);
        assert!(lengths().min() < Some(70) && lengths().min() >= Some(64) && lengths().max() > Some(506) && lengths().max() <= Some(512));
        assert!(requests.iter().all(|request| request.output_tokens == 16));
        assert!(requests.is_sorted_by_key(|request| request.at));
    }

    #[test]
    fn closed_loop_has_the_same_requests_at_time_zero() {
        let open = draw(&spec());
        let closed = draw(&ScheduleSpec { arrivals: Arrivals::Closed { concurrency: 4 }, ..spec() });
        assert!(open.iter().zip(&closed).all(|(open, closed)| *closed == Planned { at: Duration::ZERO, ..*open }));
    }

    #[test]
    fn models_in_turn_change_nothing_else() {
        let (drawn, turned) = (draw(&spec()), draw(&ScheduleSpec { in_turn: true, ..spec() }));
        for (place, (drawn, turned)) in drawn.iter().zip(&turned).enumerate() {
            assert_eq!(*turned, Planned { model: place % 2, ..*drawn });
        }
    }

    #[test]
    fn duration_and_count_both_bound_a_schedule() {
        let short = draw(&ScheduleSpec { duration: Some(Duration::from_secs(2)), ..spec() });
        assert!((20..70).contains(&short.len()) && short.iter().all(|request| request.at < Duration::from_secs(2)));
        assert_eq!(draw(&ScheduleSpec { requests_max: 3, ..spec() }).len(), 3);
    }

    #[test]
    fn lengths_and_models_are_read() {
        assert_eq!("128".parse(), Ok(TokenRange { min: 128, max: 128 }));
        assert_eq!("1..=2".parse(), Ok(TokenRange { min: 1, max: 2 }));
        for bad in ["0", "a", "4..2", "1..", "..", "9999999", "-1"] {
            assert!(bad.parse::<TokenRange>().is_err(), "{bad}");
        }
        let model = |name: &str, weight| Ok(WeightedModel { name: name.into(), weight });
        assert_eq!("t/m:0.5".parse(), model("t/m", 0.5));
        assert_eq!("llama3:8b".parse(), model("llama3:8b", 1.0));
        assert_eq!("a:b=http://c".parse(), Ok(Target { model: "a:b".into(), url: "http://c".into() }));
        assert!(["a", "=b", "a="].iter().all(|bad| bad.parse::<Target>().is_err()));
        for bad in ["", ":2", "a:0", "a:-1", "a:inf", "a:nan"] {
            assert!(bad.parse::<WeightedModel>().is_err(), "{bad}");
        }
    }
}
