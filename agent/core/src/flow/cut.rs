//! Cutting a TCP flow that is no longer allowed: one RST to the local socket, so that an idle application learns too.
//!
//! The segment seems to come from the remote end, and carries what the socket expects, to the byte (RFC 5961 section 3.2): the last ACK number
//! that the local side sent. If data was delivered that the socket has not acknowledged yet, the number is a little old: the socket then sends
//! a challenge ACK, which is denied like any segment of the flow, and answered by a RST with exactly the number it asks for
//! ([`reply::reset`](crate::packet::reply::reset)).
//!
//! UDP has no socket state to end: its next datagram is answered by [`reply::prohibited`](crate::packet::reply::prohibited).

use crate::packet::reply::Reset;

use super::entry::Entry;
use super::key::FlowKind;

/// Writes the segment that ends the local side of a flow into `out`; its length in bytes. `None` if the flow is not TCP, or its
/// local side has sent nothing that tells what it expects (then it is answered when it speaks), or if `out` is too short.
pub fn reset(entry: &Entry, out: &mut [u8]) -> Option<usize> {
    let key = entry.key();
    if key.kind != FlowKind::Tcp {
        return None;
    }
    let (seq, ack) = match (entry.local_ack(), entry.local_syn()) {
        (Some(expected), _) => (expected, None),
        // SYN sent and nothing more: a RST counts if it acknowledges the SYN (RFC 9293 section 3.10.7.3).
        (None, Some(syn)) => (0, Some(syn.wrapping_add(1))),
        (None, None) => return None,
    };
    let reset = Reset {
        src: key.remote,
        dst: key.local,
        src_port: key.remote_port,
        dst_port: key.local_port,
        seq,
        ack,
    };
    reset.write(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{FlowKey, Grant, InstancePair, Opener};
    use crate::packet::build::{address, ip, tcp, udp};
    use crate::packet::{Direction, TcpFlags, Transport, parse, reply};
    use cloison_proto::verdict::DropReason;
    use cloison_proto::version::{MeshTime, Timestamp};

    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;

    /// A flow from instance 1 (here) to instance 2, after these segments: direction, flags, seq, ack.
    fn flow(v6: bool, segments: &[(Direction, u8, u32, u32)]) -> Result<Option<Entry>, DropReason> {
        let mut flow: Option<Entry> = None;
        for (direction, flags, seq, ack) in segments {
            let (src, dst, ports) = match direction {
                Direction::Outbound => (1, 2, (40_000, 5_432)),
                Direction::Inbound => (2, 1, (5_432, 40_000)),
            };
            let parsed = parse(&ip(address(v6, src), address(v6, dst), 6, &tcp(ports, *flags, *seq, *ack, &[])))?;
            let grant = Grant {
                rule: 0,
                pair: InstancePair { local: 0, remote: 0 },
                stamp: 0,
                valid_until: MeshTime::NEVER,
            };
            let entry =
                flow.get_or_insert_with(|| Entry::new(FlowKey::of(&parsed, *direction), Opener::by(*direction), grant, Timestamp(0)));
            entry.note(*direction, &parsed.transport, Timestamp(0));
        }
        Ok(flow)
    }

    /// The flags, sequence and ACK number of the segment that cuts the flow.
    fn cut(v6: bool, segments: &[(Direction, u8, u32, u32)]) -> Result<Option<(TcpFlags, u32, u32)>, DropReason> {
        let mut out = [0; reply::MAX_LEN];
        let Some(len) = flow(v6, segments)?.and_then(|entry| reset(&entry, &mut out)) else {
            return Ok(None);
        };
        let parsed = parse(&out[..len])?;
        assert_eq!((parsed.src, parsed.dst), (address(v6, 2), address(v6, 1)), "to the local socket");
        let Transport::Tcp {
            src_port: 5_432,
            dst_port: 40_000,
            flags,
            seq,
            ack,
            payload_len: 0,
        } = parsed.transport
        else {
            panic!("{parsed:?}");
        };
        Ok(Some((flags, seq, ack)))
    }

    #[test]
    fn an_established_flow_is_cut_with_the_number_that_its_socket_expects() -> Result<(), DropReason> {
        let (here, there) = (Direction::Outbound, Direction::Inbound);
        for v6 in [false, true] {
            let opened_here = [
                (here, SYN, 100, 0),
                (there, SYN | ACK, 900, 101),
                (here, ACK, 101, 901),
                (here, ACK, 150, 955),
            ];
            assert_eq!(cut(v6, &opened_here)?, Some((TcpFlags::RST, 955, 0)));
            let opened_there = [(there, SYN, 900, 0), (here, SYN | ACK, 100, 901)];
            assert_eq!(cut(v6, &opened_there)?, Some((TcpFlags::RST, 901, 0)));
        }
        Ok(())
    }

    #[test]
    fn numbers_seen_out_of_order_and_across_the_wrap_do_not_go_back() -> Result<(), DropReason> {
        let here = Direction::Outbound;
        let segments = [(here, ACK, 1, u32::MAX - 5), (here, ACK, 1, 10), (here, ACK, 1, u32::MAX - 1)];
        assert_eq!(cut(false, &segments)?, Some((TcpFlags::RST, 10, 0)));
        Ok(())
    }

    #[test]
    fn a_flow_that_only_sent_a_syn_is_refused_as_a_closed_port_would() -> Result<(), DropReason> {
        let here = Direction::Outbound;
        assert_eq!(
            cut(false, &[(here, SYN, u32::MAX, 0)])?,
            Some((TcpFlags::RST.with(TcpFlags::ACK), 0, 0)),
            "the SYN counts as one"
        );
        let reused = [(here, SYN, 1, 0), (here, ACK, 2, 800), (here, SYN, 70, 0)];
        assert_eq!(
            cut(false, &reused)?,
            Some((TcpFlags::RST.with(TcpFlags::ACK), 0, 71)),
            "a new connection on the same ports"
        );
        Ok(())
    }

    #[test]
    fn nothing_is_sent_where_nothing_is_known() -> Result<(), DropReason> {
        let (here, there) = (Direction::Outbound, Direction::Inbound);
        assert_eq!(cut(false, &[(there, SYN, 900, 0)])?, None, "the local side has not spoken");
        let datagram = parse(&ip(address(false, 1), address(false, 2), 17, &udp((1, 2), &[])))?;
        let grant = Grant {
            rule: 0,
            pair: InstancePair { local: 0, remote: 0 },
            stamp: 0,
            valid_until: MeshTime::NEVER,
        };
        let flow = Entry::new(FlowKey::of(&datagram, here), Opener::Here, grant, Timestamp(0));
        assert_eq!(reset(&flow, &mut [0; reply::MAX_LEN]), None);
        Ok(())
    }
}
