use super::*;
use cloison_proto::net::OverlayRange;
use hickory_proto::rr::rdata::opt::EdnsOption;
use proptest::prelude::*;

use crate::names::Entry;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// `postgres` on so many hosts, and `n8n` on one.
fn zone(instances: u32) -> Outcome<Zone> {
    let range = OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?;
    let entry = |component: &str, host: String, number| -> Outcome<Entry> {
        let addresses = range.nth(number).ok_or("an address")?;
        let (component, host) = (component.parse()?, host.parse()?);
        Ok(Entry {
            component,
            host,
            addresses,
        })
    };
    let mut entries = vec![entry("n8n", "app-1".into(), 0)?];
    for number in 1..=instances {
        entries.push(entry("postgres", format!("db-{number}"), number)?);
    }
    Ok(Zone::new(range, &entries, Timestamp(100), true))
}

fn question(text: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.queries.push(Query::query(name(text), kind));
    message
}

fn ask_bytes(bytes: &[u8], zone: &Zone, transport: Transport) -> Outcome<(Message, usize)> {
    let bytes = answer(bytes, zone, transport, Timestamp(0)).ok_or("no answer")?;
    Ok((Message::from_vec(&bytes)?, bytes.len()))
}

fn ask(question: &Message, zone: &Zone) -> Outcome<Message> {
    Ok(ask_bytes(&question.to_vec()?, zone, Transport::Udp)?.0)
}

fn told(text: &str, kind: RecordType) -> Outcome<(ResponseCode, Vec<String>)> {
    let reply = ask(&question(text, kind), &zone(2)?)?;
    let data = reply.answers.iter().map(|record| record.data.to_string()).collect();
    Ok((reply.metadata.response_code, data))
}

#[test]
fn a_name_is_answered_with_authority_in_either_family_and_not_for_long() -> Outcome {
    let zone = zone(2)?;
    let reply = ask(&question("Postgres.cloison.internal", RecordType::A), &zone)?;
    let flags = reply.metadata;
    assert!(flags.authoritative && flags.recursion_desired && !flags.recursion_available && !flags.truncation);
    assert_eq!((flags.id, flags.response_code), (7, ResponseCode::NoError));
    assert!(
        reply
            .answers
            .iter()
            .all(|r| r.ttl == TTL && r.name.to_ascii() == "Postgres.cloison.internal.")
    );
    let no_error = |data: &[&str]| (ResponseCode::NoError, data.iter().map(|d| (*d).to_owned()).collect::<Vec<_>>());
    assert_eq!(
        told("postgres.cloison.internal", RecordType::A)?,
        no_error(&["10.77.1.1", "10.77.1.2"])
    );
    let v6 = ["fd12:3456:789a::101", "fd12:3456:789a::102"];
    assert_eq!(told("postgres.cloison.internal", RecordType::AAAA)?, no_error(&v6));
    assert_eq!(
        told("postgres.db-2.cloison.internal", RecordType::ANY)?,
        no_error(&[v6[1], "10.77.1.2"])
    );
    let back = no_error(&["postgres.db-1.cloison.internal."]);
    assert_eq!(told("1.1.77.10.in-addr.arpa", RecordType::PTR)?, back);
    assert_eq!(told("cloison.internal", RecordType::A)?, no_error(&["10.77.0.53"]));
    assert_eq!(told("cloison.internal", RecordType::NS)?, no_error(&["cloison.internal."]));
    assert_eq!(told("cloison.internal", RecordType::SOA)?.1.len(), 1);
    Ok(())
}

#[test]
fn what_does_not_exist_is_told_with_a_head_and_what_has_no_such_record_without_an_error() -> Outcome {
    for (text, kind, code) in [
        ("redis.cloison.internal", RecordType::A, ResponseCode::NXDomain),
        ("9.9.77.10.in-addr.arpa", RecordType::PTR, ResponseCode::NXDomain),
        ("postgres.cloison.internal", RecordType::TXT, ResponseCode::NoError),
        ("postgres.cloison.internal", RecordType::HTTPS, ResponseCode::NoError),
        ("db-1.cloison.internal", RecordType::A, ResponseCode::NoError),
        ("1.1.77.10.in-addr.arpa", RecordType::A, ResponseCode::NoError),
    ] {
        let reply = ask(&question(text, kind), &zone(2)?)?;
        assert_eq!(reply.metadata.response_code, code, "{text} {kind}");
        assert!(reply.answers.is_empty() && reply.metadata.authoritative, "{text} {kind}");
        let [head] = reply.authorities.as_slice() else {
            return Err("no head".into());
        };
        let RData::SOA(soa) = &head.data else {
            return Err("no head".into());
        };
        assert_eq!((head.ttl, soa.minimum), (TTL, TTL));
        assert!(head.name.zone_of(&name(text)), "{} is not above {text}", head.name);
    }
    Ok(())
}

#[test]
fn behind_the_lease_a_name_is_answered_as_one_that_never_was() -> Outcome {
    let zone = zone(2)?;
    let at = |text: &str, now| -> Outcome<Message> {
        let bytes = answer(&question(text, RecordType::A).to_vec()?, &zone, Transport::Udp, Timestamp(now)).ok_or("no answer")?;
        Ok(Message::from_vec(&bytes)?)
    };
    let code = |message: Message| message.metadata.response_code;
    assert_eq!(code(at("postgres.cloison.internal", 99)?), ResponseCode::NoError);
    assert_eq!(code(at("postgres.cloison.internal", 100)?), ResponseCode::NXDomain);
    Ok(())
}

#[test]
fn everything_else_is_refused_so_that_who_asks_goes_on_to_the_next_server() -> Outcome {
    let zone = zone(2)?;
    let mut chaos = question("version.bind", RecordType::TXT);
    chaos.queries.iter_mut().for_each(|q| q.query_class = DNSClass::CH);
    let mut other_class = question("postgres.cloison.internal", RecordType::A);
    other_class.queries.iter_mut().for_each(|q| q.query_class = DNSClass::ANY);
    for refused in [
        question("example.org", RecordType::A),
        question("postgres.cloison.internal.example.org", RecordType::A),
        question("1.1.168.192.in-addr.arpa", RecordType::PTR),
        question("cloison.internal", RecordType::AXFR),
        question("cloison.internal", RecordType::IXFR),
        chaos,
        other_class,
    ] {
        let reply = ask(&refused, &zone)?;
        assert_eq!(reply.metadata.response_code, ResponseCode::Refused, "{refused}");
        assert!(!reply.metadata.authoritative && reply.answers.is_empty() && reply.authorities.is_empty());
    }
    Ok(())
}

#[test]
fn what_is_no_good_question_is_told_so_and_what_is_none_gets_no_answer() -> Outcome {
    let zone = zone(2)?;
    let good = question("postgres.cloison.internal", RecordType::A).to_vec()?;
    let code = |bytes: &[u8]| -> Outcome<ResponseCode> { Ok(ask_bytes(bytes, &zone, Transport::Udp)?.0.metadata.response_code) };
    let with = |index: usize, value: u8| {
        let mut bytes = good.clone();
        bytes.iter_mut().skip(index).take(1).for_each(|byte| *byte = value);
        bytes
    };
    assert_eq!(code(&good)?, ResponseCode::NoError);
    assert_eq!(code(good.get(..good.len() - 3).ok_or("short")?)?, ResponseCode::FormErr, "cut off");
    assert_eq!(code(&with(5, 2))?, ResponseCode::FormErr, "two questions");
    assert_eq!(code(&with(4, 0xff))?, ResponseCode::FormErr, "65,281 questions");
    assert_eq!(code(&with(7, 1))?, ResponseCode::FormErr, "an answer in a question");
    assert_eq!(
        code(&with(12, 0xc0))?,
        ResponseCode::FormErr,
        "a name that points behind the message"
    );
    assert_eq!(code(&with(2, 0x28))?, ResponseCode::NotImp, "an update");
    let mut two = question("postgres.cloison.internal", RecordType::A);
    two.queries.push(Query::query(name("n8n.cloison.internal"), RecordType::A));
    let mut answered = question("postgres.cloison.internal", RecordType::A);
    answered
        .answers
        .push(Record::from_rdata(name(ZONE), 0, RData::A(A([10, 77, 0, 1].into()))));
    for whole in [two, answered] {
        assert_eq!(
            code(&whole.to_vec()?)?,
            ResponseCode::FormErr,
            "well-formed, and no question all the same: {whole}"
        );
    }
    let answers = with(2, 0x80);
    for silent in [&answers[..], b"", b"\0\x01\x02", good.get(..11).ok_or("short")?] {
        assert_eq!(answer(silent, &zone, Transport::Udp, Timestamp(0)), None, "{silent:?}");
    }
    Ok(())
}

#[test]
fn an_answer_is_as_long_as_who_asks_can_take_and_no_longer() -> Outcome {
    let zone = zone(300)?;
    for (kind, each) in [(RecordType::A, 16), (RecordType::AAAA, 28), (RecordType::ANY, 28)] {
        for (says, longest) in [(None, 512), (Some(100), 512), (Some(1232), 1232), (Some(65_535), 4096)] {
            let mut message = question("postgres.cloison.internal", kind);
            message.edns = says.map(|says| {
                let mut edns = Edns::new();
                edns.set_max_payload(says);
                edns
            });
            let bytes = message.to_vec()?;
            let (reply, length) = ask_bytes(&bytes, &zone, Transport::Udp)?;
            assert!(reply.metadata.truncation && length <= longest, "{kind} {says:?}: {length}");
            assert!(length + each > longest, "{kind} {says:?}: {length} of {longest}");
            assert_eq!(reply.edns.is_some(), says.is_some(), "EDNS answers EDNS alone");
            let (whole, length) = ask_bytes(&bytes, &zone, Transport::Tcp)?;
            let wanted = if kind == RecordType::ANY { 600 } else { 300 };
            assert!(!whole.metadata.truncation && whole.answers.len() == wanted && length > 4096);
            assert_eq!(
                reply.answers.as_slice(),
                whole.answers.get(..reply.answers.len()).unwrap_or_default()
            );
        }
    }
    Ok(())
}

#[test]
fn a_component_with_more_instances_than_anybody_tries_still_fits_into_one_message() -> Outcome {
    let bytes = question("postgres.cloison.internal", RecordType::AAAA).to_vec()?;
    let (reply, length) = ask_bytes(&bytes, &zone(5_000)?, Transport::Tcp)?;
    assert_eq!(reply.answers.len(), MOST_RECORDS);
    assert!(length < 32 * 1024, "{length}");
    Ok(())
}

#[test]
fn a_newer_edns_is_told_which_one_is_spoken_and_unknown_options_are_passed_over() -> Outcome {
    let mut message = question("postgres.cloison.internal", RecordType::A);
    let mut edns = Edns::new();
    edns.options_mut().insert(EdnsOption::Unknown(10, vec![1; 8]));
    message.edns = Some(edns.clone());
    let reply = ask(&message, &zone(2)?)?;
    assert_eq!((reply.metadata.response_code, reply.answers.len()), (ResponseCode::NoError, 2));
    assert!(reply.edns.is_some_and(|edns| edns.options().as_ref().is_empty()));
    edns.set_version(1);
    message.edns = Some(edns);
    let reply = ask(&message, &zone(2)?)?;
    // The crate has two names for this number.
    assert_eq!(u16::from(reply.metadata.response_code), u16::from(ResponseCode::BADVERS));
    assert!(reply.answers.is_empty());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whatever_comes_is_no_panic_and_what_goes_out_is_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..300), tcp: bool) {
        check(&bytes, tcp)?;
    }

    #[test]
    fn a_question_that_was_changed_anywhere_is_no_panic_either(changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..6), cut in any::<usize>()) {
        let mut message = question("postgres.db-1.cloison.internal", RecordType::AAAA);
        message.edns = Some(Edns::new());
        let mut bytes = message.to_vec().map_err(|e| TestCaseError::fail(e.to_string()))?;
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = value);
        }
        bytes.truncate(bytes.len() - cut % 4);
        check(&bytes, false)?;
    }
}

fn check(bytes: &[u8], tcp: bool) -> Result<(), TestCaseError> {
    let zone = zone(40).map_err(|e| TestCaseError::fail(e.to_string()))?;
    let (transport, longest) = if tcp { (Transport::Tcp, 65_535) } else { (Transport::Udp, 4096) };
    if let Some(answer) = answer(bytes, &zone, transport, Timestamp(0)) {
        prop_assert!(answer.len() <= longest && answer.get(..2) == bytes.get(..2));
        prop_assert!(answer.get(2).is_some_and(|flags| flags & 0x80 != 0), "an answer is marked as one");
    }
    Ok(())
}
