//! A question becomes an answer: bytes in, bytes out, for one zone at one moment. Wire format by `hickory-proto` (RFC 1035, RFC 6891).
//!
//! Names of the zone are answered with authority; unknown ones do not exist (NXDOMAIN), and so do those that may not be told, also when
//! nothing may be told at all. SERVFAIL would send the stub resolver of the C library on to its next server, and whoever runs that could say
//! where a component is. Everything else is REFUSED, which means just that: glibc, musl, systemd-resolved, Go and container engines go on to the
//! next server, while NXDOMAIN would end the search. There is no recursion, no transfer, and no state.

use std::net::IpAddr;

use cloison_proto::net::AddressPair;
use cloison_proto::version::Timestamp;
use hickory_proto::ProtoError;
use hickory_proto::op::{Edns, Header, HeaderCounts, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, NS, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable as _, BinDecoder, BinEncodable as _, BinEncoder};

use tracing::Dispatch;
use tracing::dispatcher::with_default;

use super::zone::{Content, Found, Zone};
use crate::names::ZONE;

/// How long an answer may be kept, in seconds, also one that says that there is nothing (RFC 2308): a name that was withdrawn is gone from
/// caches within this time, and a program that opens a connection for each request asks a few times a minute.
pub const TTL: u32 = 5;

/// The longest answer over UDP to who does not say more, in bytes (RFC 1035 section 4.2.1).
const PLAIN_UDP: u16 = 512;

/// The longest answer over UDP, in bytes. Answers never leave the machine, where nothing is fragmented; this is what common clients take at
/// most.
const LONGEST_UDP: u16 = 4096;

/// Most addresses in one answer: 1,024 of 28 bytes (RFC 3596) are far from the 65,535 bytes that a message over TCP may have, and far more
/// than anybody tries. They are the first in the host's order.
const MOST_RECORDS: usize = 1024;

/// A pointer to the name behind the header's twelve bytes (RFC 1035 section 4.1.4).
const NAME_IN_QUESTION: u16 = 0xc000 | 12;

/// Most additional records in a question: EDNS and a signature.
const MOST_ADDITIONAL: u16 = 2;

/// How the question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// Over a stream.
    Tcp,
}

/// The answer to `question` at `now`; `None` if it gets none, being no question.
#[must_use]
pub fn answer(question: &[u8], zone: &Zone, transport: Transport, now: Timestamp) -> Option<Vec<u8>> {
    let header = Header::read(&mut BinDecoder::new(question)).ok()?;
    if header.metadata.message_type != MessageType::Query {
        return None;
    }
    let mut reply = Message::response(header.metadata.id, header.metadata.op_code);
    reply.metadata.recursion_desired = header.metadata.recursion_desired;
    reply.metadata.checking_disabled = header.metadata.checking_disabled;
    let asked = match read(question, &header) {
        Ok(asked) => asked,
        Err(code) => {
            reply.metadata.response_code = code;
            return reply.to_vec().ok();
        }
    };
    let longest = match (transport, &asked.edns) {
        (Transport::Tcp, _) => u16::MAX,
        (Transport::Udp, None) => PLAIN_UDP,
        (Transport::Udp, Some(edns)) => edns.max_payload().clamp(PLAIN_UDP, LONGEST_UDP),
    };
    reply.queries.push(asked.query.clone());
    if let Some(edns) = &asked.edns {
        let mut ours = Edns::new();
        ours.set_max_payload(LONGEST_UDP).set_dnssec_ok(edns.flags().dnssec_ok);
        reply.edns = Some(ours);
        if edns.version() > 0 {
            reply.metadata.response_code = ResponseCode::BADVERS;
            return reply.to_vec().ok();
        }
    }
    let instances = fill(&mut reply, &asked.query, zone, now);
    encode(&reply, &instances, longest).ok()
}

/// What was asked.
struct Asked {
    query: Query,
    edns: Option<Edns>,
}

fn read(question: &[u8], header: &Header) -> Result<Asked, ResponseCode> {
    if header.metadata.op_code != OpCode::Query {
        return Err(ResponseCode::NotImp);
    }
    let counts = &header.counts;
    // Looked at before anything is allocated by them.
    if (counts.queries, counts.answers, counts.authorities) != (1, 0, 0) || counts.additionals > MOST_ADDITIONAL {
        return Err(ResponseCode::FormErr);
    }
    // The crate warns of odd options, once for each question: whoever may ask could fill the log.
    let parsed = with_default(&Dispatch::none(), || Message::from_vec(question));
    let mut message = parsed.map_err(|_| ResponseCode::FormErr)?;
    let edns = message.edns.take();
    let query = message.queries.pop().ok_or(ResponseCode::FormErr)?;
    Ok(Asked { query, edns })
}

/// Gives the answer its code and its records, but for those of instances, of which there may be many: they are returned.
fn fill(reply: &mut Message, query: &Query, zone: &Zone, now: Timestamp) -> Vec<IpAddr> {
    let refused = query.query_class != DNSClass::IN || matches!(query.query_type, RecordType::AXFR | RecordType::IXFR);
    let found = if refused {
        Found::Elsewhere
    } else {
        zone.find(query.name.iter(), now)
    };
    let Found::Here { head, content } = found else {
        reply.metadata.response_code = ResponseCode::Refused;
        return Vec::new();
    };
    reply.metadata.authoritative = true;
    let wants = |kind| query.query_type == kind || query.query_type == RecordType::ANY;
    let mut instances = Vec::new();
    let data: Vec<RData> = match &content {
        None => {
            reply.metadata.response_code = ResponseCode::NXDomain;
            Vec::new()
        }
        Some(Content::Head(pairs)) => {
            let soa = wants(RecordType::SOA).then(|| RData::SOA(soa(&head)));
            let ns = wants(RecordType::NS).then(|| RData::NS(NS(name(ZONE))));
            let addresses = addresses(pairs, zone, wants).map(|address| match address {
                IpAddr::V4(address) => RData::A(A(address)),
                IpAddr::V6(address) => RData::AAAA(AAAA(address)),
            });
            soa.into_iter().chain(ns).chain(addresses).collect()
        }
        Some(Content::Instances(pairs)) => {
            instances = addresses(pairs, zone, wants).take(MOST_RECORDS).collect();
            Vec::new()
        }
        Some(Content::Name(text)) => wants(RecordType::PTR).then(|| RData::PTR(PTR(name(text)))).into_iter().collect(),
        Some(Content::Nothing) => Vec::new(),
    };
    let owner = |data| Record::from_rdata(query.name.clone(), TTL, data);
    reply.answers = data.into_iter().map(owner).collect();
    if reply.answers.is_empty() && instances.is_empty() {
        reply.authorities.push(Record::from_rdata(name(&head), TTL, RData::SOA(soa(&head))));
    }
    instances
}

/// The addresses of the wanted families, of each instance IPv6 first, as in the hosts file.
fn addresses(pairs: &[AddressPair], zone: &Zone, wants: impl Fn(RecordType) -> bool) -> impl Iterator<Item = IpAddr> {
    let (v4, v6) = (wants(RecordType::A), wants(RecordType::AAAA) && zone.has_ipv6());
    let both = pairs.iter().flat_map(|pair| [IpAddr::V6(pair.v6), IpAddr::V4(pair.v4)]);
    both.filter(move |address| if address.is_ipv4() { v4 } else { v6 })
}

/// The head of a zone. Nobody copies it: its times mean nothing but the last, how long it is remembered that there is no such name.
fn soa(head: &str) -> SOA {
    let time = i32::try_from(TTL).unwrap_or(i32::MAX);
    SOA::new(name(head), name("nobody.invalid"), 1, time, time, time, TTL)
}

/// A name that is known to be one: at most two labels of 63 bytes before [`ZONE`], or digits before `arpa`.
fn name(text: &str) -> Name {
    Name::from_labels(text.split('.').map(str::as_bytes)).unwrap_or_else(|_| Name::root())
}

/// The bytes. Of the instances, as many as fit; what is left out has to be asked for over TCP.
///
/// Their records are written here, with a pointer for a name: the crate writes it out in full from some dozens on. Everything else is shorter
/// than what everybody can take: a name has at most 255 bytes.
fn encode(reply: &Message, instances: &[IpAddr], longest: u16) -> Result<Vec<u8>, ProtoError> {
    let rest = reply.to_vec()?;
    let mut room = usize::from(longest).saturating_sub(rest.len());
    let fitting = instances.iter().take_while(|address| {
        let left = room.checked_sub(if address.is_ipv4() { 16 } else { 28 });
        room = left.unwrap_or(0);
        left.is_some()
    });
    let fitting: Vec<_> = fitting.collect();
    if fitting.is_empty() && instances.is_empty() {
        return Ok(rest);
    }
    let mut metadata = reply.metadata;
    metadata.truncation = fitting.len() < instances.len();
    let counts = HeaderCounts {
        queries: 1,
        answers: u16::try_from(fitting.len()).unwrap_or(0),
        authorities: 0,
        additionals: reply.edns.is_some().into(),
    };
    let mut bytes = Vec::with_capacity(rest.len() + 28 * fitting.len());
    let mut encoder = BinEncoder::new(&mut bytes);
    Header { metadata, counts }.emit(&mut encoder)?;
    encoder.emit_all(reply.queries.iter())?;
    fitting.into_iter().try_for_each(|address| write_address(&mut encoder, *address))?;
    if let Some(edns) = &reply.edns {
        edns.emit(&mut encoder)?;
    }
    Ok(bytes)
}

/// A record of the name in the question (RFC 1035 sections 3.2.1 and 4.1.4, RFC 3596 section 2.2).
fn write_address(encoder: &mut BinEncoder<'_>, address: IpAddr) -> Result<(), ProtoError> {
    let (kind, data) = match address {
        IpAddr::V4(address) => (RecordType::A, address.octets().to_vec()),
        IpAddr::V6(address) => (RecordType::AAAA, address.octets().to_vec()),
    };
    encoder.emit_u16(NAME_IN_QUESTION)?;
    kind.emit(encoder)?;
    DNSClass::IN.emit(encoder)?;
    encoder.emit_u32(TTL)?;
    encoder.emit_u16(u16::try_from(data.len()).unwrap_or(0))?;
    encoder.emit_vec(&data)
}

#[cfg(test)]
mod tests;
