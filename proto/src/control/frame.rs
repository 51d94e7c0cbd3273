//! The frame codec: a length, a kind, a body. Total over any bytes, bounded before anything is allocated.

use minicbor::{Decode, Encode};

use crate::wire;

/// Largest frame, in bytes behind the length. Longer content goes as a sequence of frames.
pub const MAX_FRAME: usize = 256 * 1024;

/// Most bytes of items that one frame of a view carries, so that it stays below [`MAX_FRAME`] with everything around them.
pub const MAX_VIEW_CHUNK: usize = 128 * 1024;

/// One message: its kind says how to read its body.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Frame {
    /// What it is.
    #[n(0)]
    pub kind: u16,
    /// A map with numbered fields.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub body: Vec<u8>,
}

/// A stream that is not made of frames; it is closed.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME`].
    #[error("a frame of {0} bytes, but the limit is {MAX_FRAME}")]
    TooLong(usize),
    /// The bytes are no frame, or a body is not what its kind asks for.
    #[error("a frame that cannot be read")]
    Malformed(#[from] minicbor::decode::Error),
}

/// A kind of message: its number, and the type of its body.
pub trait Message: Encode<()> + for<'b> Decode<'b, ()> {
    /// The frame's kind.
    const KIND: u16;

    /// The message as a frame.
    fn to_frame(&self) -> Frame {
        Frame {
            kind: Self::KIND,
            body: wire::encode(self),
        }
    }

    /// The message in a frame of this kind.
    ///
    /// # Errors
    /// [`FrameError::Malformed`].
    fn from_frame(frame: &Frame) -> Result<Self, FrameError> {
        Ok(wire::decode_all(&frame.body)?)
    }
}

impl Frame {
    /// The frame as it stands on the stream: four bytes of length (big-endian), then the map.
    ///
    /// # Errors
    /// [`FrameError::TooLong`]: the sender must split its content.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FrameError> {
        let content = wire::encode(self);
        let len = u32::try_from(content.len()).ok().filter(|_| content.len() <= MAX_FRAME);
        let len = len.ok_or(FrameError::TooLong(content.len()))?;
        Ok([&len.to_be_bytes()[..], &content].concat())
    }
}

/// Takes frames out of a stream of bytes.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
}

impl FrameBuffer {
    /// Appends bytes as they came. The caller takes frames out before it appends more, so that the buffer holds at most one frame and what
    /// one read brought.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame; `None` if more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`]; the stream cannot be used any further.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some((head, rest)) = self.bytes.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes(*head)).unwrap_or(usize::MAX);
        if len > MAX_FRAME {
            return Err(FrameError::TooLong(len));
        }
        let Some(content) = rest.get(..len) else { return Ok(None) };
        let frame = wire::decode_all(content)?;
        self.bytes.drain(..len.saturating_add(4));
        Ok(Some(frame))
    }

    /// Whether bytes of an unfinished frame are left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// The body of the fuzz target: any bytes, in any pieces, give the same frames or the same refusal, and every frame reads back.
#[doc(hidden)]
#[must_use]
pub fn fuzz_frames(data: &[u8]) -> bool {
    let read = |piece: usize| {
        let mut buffer = FrameBuffer::default();
        let mut frames = Vec::new();
        for bytes in data.chunks(piece) {
            buffer.push(bytes);
            loop {
                match buffer.next_frame() {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(_) => return (frames, true),
                }
            }
        }
        (frames, false)
    };
    let (whole, refused) = read(data.len().max(1));
    for frame in &whole {
        let known =
            super::agent::AgentMessage::from_frame(frame).is_ok() | super::coordinator::CoordinatorMessage::from_frame(frame).is_ok();
        let _ = known;
    }
    let again = whole.iter().all(|frame| {
        let mut buffer = FrameBuffer::default();
        frame.to_bytes().is_ok_and(|bytes| {
            buffer.push(&bytes);
            buffer.next_frame().is_ok_and(|f| f.as_ref() == Some(frame))
        })
    });
    again && read(1) == (whole, refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_survive_any_cutting(frames in proptest::collection::vec((any::<u16>(), proptest::collection::vec(any::<u8>(), 0..300)), 0..5), piece in 1usize..40) {
            let frames: Vec<Frame> = frames.into_iter().map(|(kind, body)| Frame { kind, body }).collect();
            let mut stream = Vec::new();
            for frame in &frames {
                stream.extend(frame.to_bytes().map_err(|e| TestCaseError::fail(e.to_string()))?);
            }
            let mut buffer = FrameBuffer::default();
            let mut read = Vec::new();
            for bytes in stream.chunks(piece) {
                buffer.push(bytes);
                while let Some(frame) = buffer.next_frame().map_err(|e| TestCaseError::fail(e.to_string()))? {
                    read.push(frame);
                }
            }
            prop_assert_eq!(read, frames);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn any_bytes_are_read_or_refused(data in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(fuzz_frames(&data));
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_content_comes() {
        let mut buffer = FrameBuffer::default();
        buffer.push(&[0x7f, 0xff, 0xff, 0xff]);
        assert!(matches!(buffer.next_frame(), Err(FrameError::TooLong(_))));
        let long = Frame {
            kind: 1,
            body: vec![0; MAX_FRAME],
        };
        assert!(matches!(long.to_bytes(), Err(FrameError::TooLong(_))));
    }
}
