//! Server-sent events out of bytes that arrive in any pieces: an event may be split anywhere, also inside a character. It
//! knows lines and fields, not what an event says.

/// Bytes of one event and of one line at most; a server that sends more is not streaming.
pub(crate) const EVENT_BYTES_MAX: usize = 4 << 20;

/// The stream broke the rules of the format, or its bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SseError {
    /// An event is longer than `EVENT_BYTES_MAX`.
    #[error("an event of the stream is longer than {EVENT_BYTES_MAX} bytes")]
    TooLong,
    /// An event's data is no UTF-8.
    #[error("an event of the stream is not UTF-8")]
    NotUtf8,
}

/// The state between two pieces.
#[derive(Debug, Default)]
pub(crate) struct SseParser {
    /// The line that has begun, without its end.
    line: Vec<u8>,
    /// Data lines of the event that has begun, joined by line ends.
    data: Vec<u8>,
    /// Whether the event has a data line, which may be empty.
    has_data: bool,
}

impl SseParser {
    /// Takes the next bytes and hands over the data of every event that they complete.
    pub(crate) fn push(&mut self, mut bytes: &[u8], mut on_data: impl FnMut(&str)) -> Result<(), SseError> {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.extend_line(&bytes[..end])?;
            bytes = &bytes[end + 1..];
            let mut line = std::mem::take(&mut self.line);
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if !line.is_empty() {
                self.take_field(&line)?;
            } else if std::mem::take(&mut self.has_data) {
                on_data(std::str::from_utf8(&self.data).map_err(|_| SseError::NotUtf8)?);
                self.data.clear();
            }
            line.clear();
            self.line = line;
        }
        self.extend_line(bytes)
    }

    fn extend_line(&mut self, bytes: &[u8]) -> Result<(), SseError> {
        if self.line.len() + bytes.len() > EVENT_BYTES_MAX {
            return Err(SseError::TooLong);
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    /// Comments and fields other than `data` are passed over.
    fn take_field(&mut self, line: &[u8]) -> Result<(), SseError> {
        let value = match line.strip_prefix(b"data") {
            Some([]) => &[],
            Some([b':', b' ', value @ ..] | [b':', value @ ..]) => value,
            _ => return Ok(()),
        };
        if self.data.len() + value.len() >= EVENT_BYTES_MAX {
            return Err(SseError::TooLong);
        }
        if std::mem::replace(&mut self.has_data, true) {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of `text`, sent in pieces of `piece_bytes`.
    fn events(text: &[u8], piece_bytes: usize) -> Result<Vec<String>, SseError> {
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        for piece in text.chunks(piece_bytes) {
            parser.push(piece, |data| events.push(data.to_owned()))?;
        }
        Ok(events)
    }

    #[test]
    fn events_are_the_same_however_packets_split_them() {
        let text =
            ": keep-alive\n\ndata: {\"a\":\"héllo 🧱\"}\r\n\r\nevent: x\ndata:one\ndata: two\nid: 1\n\ndata\n\ndata: [DONE]\n\n".as_bytes();
        let expected = ["{\"a\":\"héllo 🧱\"}", "one\ntwo", "", "[DONE]"];
        for piece_bytes in 1..=text.len() {
            assert_eq!(events(text, piece_bytes).expect("valid events"), expected, "in pieces of {piece_bytes} bytes");
        }
    }

    #[test]
    fn event_without_its_empty_line_is_not_handed_over() {
        assert_eq!(events(b"data: one\n\ndata: two\n", 5), Ok(vec!["one".to_owned()]));
    }

    #[test]
    fn endless_and_broken_events_are_refused() {
        let mut endless = b"data: ".to_vec();
        endless.resize(EVENT_BYTES_MAX + 1, b'x');
        assert_eq!(events(&endless, 1 << 16), Err(SseError::TooLong));
        let many = b"data: 0123456789012345678901234567890123456789\n".repeat(EVENT_BYTES_MAX / 32);
        assert_eq!(events(&many, 1 << 16), Err(SseError::TooLong));
        assert_eq!(events(b"data: \xff\n\n", 3), Err(SseError::NotUtf8));
    }
}
