//! A zone: what one namespace is told. Entries become names and the way back; the name of a question becomes what is [`Found`] there.
//!
//! A zone holds nothing but what may be told: a name that no rule opens is not in it, so that it cannot be told apart from one that does not
//! exist. Behind its end, nothing is in it any more. No wire format here, and questions never change a zone.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cloison_proto::net::{AddressPair, OverlayRange};
use cloison_proto::version::Timestamp;

use crate::names::{Entry, ZONE};

/// The names of one namespace, and until when they may be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    range: OverlayRange,
    resolver: AddressPair,
    has_ipv6: bool,
    until: Timestamp,
    /// By what stands before [`ZONE`]: `postgres`, `postgres.db-1`. Each in the order in which it is told.
    names: HashMap<Box<str>, Vec<AddressPair>>,
    /// Hosts: there are names below them, and nothing of their own. That is not the same as no name (RFC 8020).
    hosts: HashSet<Box<str>>,
    /// By the address of an instance, its name before [`ZONE`].
    instances: HashMap<IpAddr, Box<str>>,
}

/// What is at a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found<'z> {
    /// The name is none of ours.
    Elsewhere,
    /// It is ours.
    Here {
        /// The head of the zone that it is in.
        head: String,
        /// What is there; `None`: there is no such name.
        content: Option<Content<'z>>,
    },
}

/// What is at a name that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content<'z> {
    /// The head of a zone, and the addresses there.
    Head(&'z [AddressPair]),
    /// Instances, in their order.
    Instances(&'z [AddressPair]),
    /// The name of an address.
    Name(String),
    /// Only other names, below it.
    Nothing,
}

/// The two families of names that lead from addresses to names.
#[derive(Debug, Clone, Copy)]
struct Reverse {
    /// What they end in, before `arpa`.
    suffix: &'static str,
    /// How many bits a label says.
    step: u32,
    /// How many bits an address has.
    whole: u32,
    /// How many bits name a zone of ours.
    zone: u32,
}

impl Zone {
    /// The zone with these entries, which may be told until `until`.
    #[must_use]
    pub fn new(range: OverlayRange, entries: &[Entry], until: Timestamp, has_ipv6: bool) -> Self {
        let mut zone = Self {
            range,
            resolver: range.resolver(),
            has_ipv6,
            until,
            names: HashMap::new(),
            hosts: HashSet::new(),
            instances: HashMap::new(),
        };
        for Entry {
            component,
            host,
            addresses,
        } in entries
        {
            let instance: Box<str> = format!("{component}.{host}").into();
            zone.names.entry(component.as_str().into()).or_default().push(*addresses);
            zone.names.entry(instance.clone()).or_default().push(*addresses);
            zone.hosts.insert(host.as_str().into());
            zone.instances.extend(addresses.both().map(|address| (address, instance.clone())));
        }
        zone
    }

    /// The overlay's ranges.
    #[must_use]
    pub const fn range(&self) -> OverlayRange {
        self.range
    }

    /// How many instances have a name.
    #[must_use]
    pub fn instances(&self) -> usize {
        self.instances.len() / 2
    }

    /// Whether IPv6 addresses are told: a kernel without IPv6 has no way to them.
    #[must_use]
    pub const fn has_ipv6(&self) -> bool {
        self.has_ipv6
    }

    /// What is at the name with these labels at `now`, whatever its letters' case.
    #[must_use]
    pub fn find<'l>(&self, labels: impl IntoIterator<Item = &'l [u8]>, now: Timestamp) -> Found<'_> {
        // What is no text is no name of ours; U+FFFD stands in none of them.
        let text = |label: &[u8]| String::from_utf8_lossy(label).to_ascii_lowercase();
        let labels: Vec<String> = labels.into_iter().map(text).collect();
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let zone: Vec<&str> = ZONE.split('.').collect();
        if let Some(before) = labels.strip_suffix(zone.as_slice()) {
            let content = self.forward(before, now);
            return Found::Here {
                head: ZONE.into(),
                content,
            };
        }
        let v4 = Reverse {
            suffix: "in-addr",
            step: 8,
            whole: 32,
            zone: u32::from(self.range.v4().1).next_multiple_of(8),
        };
        let v6 = Reverse {
            suffix: "ip6",
            step: 4,
            whole: 128,
            zone: u32::from(OverlayRange::V6_LEN),
        };
        [v4, v6]
            .into_iter()
            .find_map(|family| self.backward(family, labels.strip_suffix(&[family.suffix, "arpa"])?, now))
            .unwrap_or(Found::Elsewhere)
    }

    fn forward(&self, before: &[&str], now: Timestamp) -> Option<Content<'_>> {
        if before.is_empty() {
            return Some(Content::Head(std::slice::from_ref(&self.resolver)));
        }
        // A label with a dot in it would pass for two.
        if now >= self.until || before.iter().any(|label| label.contains('.')) {
            return None;
        }
        let name = before.join(".");
        let nothing = || self.hosts.contains(name.as_str()).then_some(Content::Nothing);
        self.names
            .get(name.as_str())
            .map(|found| Content::Instances(found))
            .or_else(nothing)
    }

    /// `None` if the name is none of ours.
    fn backward(&self, family: Reverse, before: &[&str], now: Timestamp) -> Option<Found<'_>> {
        let said: Vec<u128> = before.iter().rev().map_while(|label| family.value(label)).collect();
        let said: Vec<u128> = said.into_iter().take(family.labels(family.whole)).collect();
        let zone = said.get(..family.labels(family.zone))?;
        let network = family.address(zone)?;
        if !self.range.contains(network) {
            return None;
        }
        let head = family.name(zone);
        let whole = said.len() == family.labels(family.whole);
        let content = if said.len() != before.len() {
            None
        } else if said.len() == zone.len() {
            Some(Content::Head(&[]))
        } else if whole {
            self.name_of(family.address(&said)?, now).map(Content::Name)
        } else {
            Some(Content::Nothing)
        };
        Some(Found::Here { head, content })
    }

    fn name_of(&self, address: IpAddr, now: Timestamp) -> Option<String> {
        if self.resolver.both().contains(&address) {
            return Some(ZONE.into());
        }
        let instance = self.instances.get(&address).filter(|_| now < self.until)?;
        Some(format!("{instance}.{ZONE}"))
    }
}

impl Reverse {
    /// How many labels say so many bits.
    fn labels(self, bits: u32) -> usize {
        usize::try_from(bits / self.step).unwrap_or(usize::MAX)
    }

    /// What a label says, if it is written as it should be.
    fn value(self, label: &str) -> Option<u128> {
        if self.step == 8 {
            return label.parse::<u8>().ok().filter(|value| value.to_string() == label).map(u128::from);
        }
        let mut characters = label.chars();
        let digit = characters.next().and_then(|c| c.to_digit(16)).map(u128::from);
        digit.filter(|_| characters.next().is_none())
    }

    /// The address that begins with these values, zeros behind them.
    fn address(self, values: &[u128]) -> Option<IpAddr> {
        let bits = values.iter().fold(0, |bits: u128, value| bits << self.step | value);
        let missing = self.whole - u32::try_from(values.len()).ok()? * self.step;
        let bits = bits.checked_shl(missing).unwrap_or(0);
        match self.whole {
            32 => u32::try_from(bits).ok().map(|bits| Ipv4Addr::from(bits).into()),
            _ => Some(Ipv6Addr::from(bits).into()),
        }
    }

    /// The name that says these values.
    fn name(self, values: &[u128]) -> String {
        let label = |value: &u128| {
            if self.step == 8 {
                format!("{value}.")
            } else {
                format!("{value:x}.")
            }
        };
        let labels: String = values.iter().rev().map(label).collect();
        format!("{labels}{}.arpa", self.suffix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

    fn entry(component: &str, host: &str, range: OverlayRange, number: u32) -> Outcome<Entry> {
        let addresses = range.nth(number).ok_or("an address")?;
        let (component, host) = (component.parse()?, host.parse()?);
        Ok(Entry {
            component,
            host,
            addresses,
        })
    }

    fn zone(v4: [u8; 4], v4_len: u8) -> Outcome<Zone> {
        let range = OverlayRange::new(v4.into(), v4_len, "fd12:3456:789a::".parse()?)?;
        let entries = [
            entry("n8n", "app-1", range, 0)?,
            entry("postgres", "db-2", range, 2)?,
            entry("postgres", "db-1", range, 1)?,
        ];
        Ok(Zone::new(range, &entries, Timestamp(100), true))
    }

    fn find<'z>(zone: &'z Zone, name: &str) -> Found<'z> {
        find_at(zone, name, 99)
    }

    fn find_at<'z>(zone: &'z Zone, name: &str, now: u64) -> Found<'z> {
        zone.find(name.split('.').map(str::as_bytes), Timestamp(now))
    }

    fn content<'z>(found: Found<'z>) -> Option<Content<'z>> {
        match found {
            Found::Here { content, .. } => content,
            Found::Elsewhere => None,
        }
    }

    #[test]
    fn a_component_is_all_its_instances_in_their_order_and_an_instance_is_itself() -> Outcome {
        let zone = zone([10, 77, 0, 0], 16)?;
        let pair = |number| zone.range.nth(number).ok_or("an address");
        let (first, second) = (pair(1)?, pair(2)?);
        for name in ["postgres.cloison.internal", "PostGres.Cloison.INTERNAL"] {
            assert_eq!(content(find(&zone, name)), Some(Content::Instances(&[second, first])));
        }
        assert_eq!(
            content(find(&zone, "postgres.db-1.cloison.internal")),
            Some(Content::Instances(&[first]))
        );
        assert_eq!(content(find(&zone, "db-1.cloison.internal")), Some(Content::Nothing));
        assert_eq!(zone.instances(), 3);
        Ok(())
    }

    #[test]
    fn what_is_not_in_the_zone_is_unknown_and_what_is_outside_is_none_of_ours() -> Outcome {
        let zone = zone([10, 77, 0, 0], 16)?;
        for unknown in [
            "redis.cloison.internal",
            "db-3.cloison.internal",
            "postgres.app-1.cloison.internal",
            "x.postgres.db-1.cloison.internal",
            "*.cloison.internal",
            ".cloison.internal",
            "_sql._tcp.postgres.cloison.internal",
        ] {
            let there = Found::Here {
                head: ZONE.into(),
                content: None,
            };
            assert_eq!(find(&zone, unknown), there, "{unknown}");
        }
        for elsewhere in [
            "internal",
            "example.org",
            "xcloison.internal",
            "cloison.internal.example.org",
            "",
            "arpa",
        ] {
            assert_eq!(find(&zone, elsewhere), Found::Elsewhere, "{elsewhere}");
        }
        let one_label: [&[u8]; 3] = [b"postgres.db-1", b"cloison", b"internal"];
        assert_eq!(content(zone.find(one_label, Timestamp(0))), None, "a dot inside a label");
        let no_text: [&[u8]; 3] = [b"postgres\xff", b"cloison", b"internal"];
        assert_eq!(content(zone.find(no_text, Timestamp(0))), None);
        Ok(())
    }

    #[test]
    fn behind_its_end_a_zone_has_nothing_but_its_head() -> Outcome {
        let zone = zone([10, 77, 0, 0], 16)?;
        for name in [
            "postgres.cloison.internal",
            "n8n.app-1.cloison.internal",
            "db-1.cloison.internal",
            "1.1.77.10.in-addr.arpa",
        ] {
            assert!(content(find_at(&zone, name, 99)).is_some(), "{name}");
            assert_eq!(content(find_at(&zone, name, 100)), None, "{name}");
        }
        assert!(content(find_at(&zone, ZONE, 100)).is_some());
        Ok(())
    }

    #[test]
    fn an_address_leads_back_to_its_instance_and_no_further_than_the_mesh() -> Outcome {
        let zone = zone([10, 77, 0, 0], 16)?;
        let v6 = "a.9.8.7.6.5.4.3.2.1.d.f.ip6.arpa";
        let zeros = "0.".repeat(17);
        let name = |text: &str| Some(Content::Name(text.into()));
        for (asked, wanted) in [
            ("1.1.77.10.in-addr.arpa".to_owned(), name("postgres.db-1.cloison.internal")),
            (format!("1.0.1.{zeros}{v6}"), name("postgres.db-1.cloison.internal")),
            (format!("3.5.0.{zeros}{v6}").to_uppercase(), name(ZONE)),
            ("53.0.77.10.in-addr.arpa".to_owned(), name(ZONE)),
            ("54.0.77.10.in-addr.arpa".to_owned(), None),
            ("01.1.77.10.in-addr.arpa".to_owned(), None),
            ("x.1.1.77.10.in-addr.arpa".to_owned(), None),
            ("1.77.10.in-addr.arpa".to_owned(), Some(Content::Nothing)),
            ("77.10.in-addr.arpa".to_owned(), Some(Content::Head(&[]))),
            (v6.to_owned(), Some(Content::Head(&[]))),
        ] {
            let found = find(&zone, &asked);
            assert_ne!(found, Found::Elsewhere, "{asked}");
            assert_eq!(content(found), wanted, "{asked}");
        }
        for asked in [
            "10.in-addr.arpa",
            "1.1.78.10.in-addr.arpa",
            "1.1.168.192.in-addr.arpa",
            "8.7.6.5.4.3.2.1.d.f.ip6.arpa",
        ] {
            assert_eq!(find(&zone, asked), Found::Elsewhere, "{asked}");
        }
        Ok(())
    }

    #[test]
    fn a_range_that_ends_inside_an_octet_is_many_zones() -> Outcome {
        let zone = zone([10, 77, 16, 0], 20)?;
        let Found::Here { head, content } = find(&zone, "1.17.77.10.in-addr.arpa") else {
            return Err("elsewhere".into());
        };
        assert_eq!(head, "17.77.10.in-addr.arpa");
        assert_eq!(content, Some(Content::Name("postgres.db-1.cloison.internal".into())));
        for asked in ["1.32.77.10.in-addr.arpa", "77.10.in-addr.arpa"] {
            assert_eq!(find(&zone, asked), Found::Elsewhere, "{asked}");
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn whatever_is_asked_is_never_a_panic(labels in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 0..128), arpa: bool) {
            let zone = zone([10, 77, 0, 0], 16).map_err(|e| TestCaseError::fail(e.to_string()))?;
            let suffix: &[&[u8]] = if arpa { &[b"ip6", b"arpa"] } else { &[b"cloison", b"internal"] };
            let labels = labels.iter().map(Vec::as_slice).chain(suffix.iter().copied());
            let _ = zone.find(labels, Timestamp(0));
        }
    }
}
