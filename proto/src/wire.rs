//! How the project's types stand on the wire: minicbor maps with numbered fields, ids and keys as byte strings of fixed length.

/// Implements the minicbor traits for a newtype over `[u8; N]`: a byte string of exactly that length.
macro_rules! bytes_codec {
    ($name:ident, $len:expr) => {
        impl<C> minicbor::Encode<C> for $name {
            fn encode<W: minicbor::encode::Write>(
                &self,
                e: &mut minicbor::Encoder<W>,
                _: &mut C,
            ) -> Result<(), minicbor::encode::Error<W::Error>> {
                e.bytes(&self.0)?.ok()
            }
        }

        impl<'b, C> minicbor::Decode<'b, C> for $name {
            fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
                let bytes = d.bytes()?;
                <[u8; $len]>::try_from(bytes)
                    .map(Self)
                    .map_err(|_| minicbor::decode::Error::message("byte string of the wrong length"))
            }
        }
    };
}

/// Implements the minicbor traits for a type that has `Display` and `FromStr`: a text string that must parse.
macro_rules! text_codec {
    ($name:ident) => {
        impl<C> minicbor::Encode<C> for $name {
            fn encode<W: minicbor::encode::Write>(
                &self,
                e: &mut minicbor::Encoder<W>,
                _: &mut C,
            ) -> Result<(), minicbor::encode::Error<W::Error>> {
                e.str(&self.to_string())?.ok()
            }
        }

        impl<'b, C> minicbor::Decode<'b, C> for $name {
            fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
                d.str()?.parse().map_err(minicbor::decode::Error::message)
            }
        }
    };
}

pub(crate) use {bytes_codec, text_codec};

/// Decodes a whole byte string as `T`: trailing bytes are an error.
pub(crate) fn decode_all<'b, T: minicbor::Decode<'b, ()>>(bytes: &'b [u8]) -> Result<T, minicbor::decode::Error> {
    let mut decoder = minicbor::Decoder::new(bytes);
    let value = decoder.decode()?;
    if decoder.position() == bytes.len() {
        Ok(value)
    } else {
        Err(minicbor::decode::Error::message("trailing bytes"))
    }
}

/// Encodes `value`; the project's types have no encoding that can fail, and a `Vec` takes every byte.
pub(crate) fn encode<T: minicbor::Encode<()>>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    match minicbor::encode(value, &mut out) {
        Ok(()) => out,
        // An empty byte string decodes as nothing: fail closed.
        Err(_) => Vec::new(),
    }
}

/// Whether the map in `bytes` has a field numbered `known` or higher, or one that is no number: a field of a later protocol.
pub(crate) fn has_later_fields(bytes: &[u8], known: u32) -> Result<bool, minicbor::decode::Error> {
    let mut decoder = minicbor::Decoder::new(bytes);
    let Some(fields) = decoder.map()? else {
        return Err(minicbor::decode::Error::message("maps have a stated length here"));
    };
    for _ in 0..fields {
        if decoder.datatype()? != minicbor::data::Type::U8 || u32::from(decoder.u8()?) >= known {
            return Ok(true);
        }
        decoder.skip()?;
    }
    Ok(false)
}
