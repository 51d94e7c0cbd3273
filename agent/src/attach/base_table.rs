//! The base table: nftables rules that keep overlay addresses on the mesh's TUN (I14). Ours alone, replaced as a whole in one transaction;
//! no other table is read or touched.
//!
//! What it drops, each with a counter: an overlay source or destination arriving on another interface than the TUN or loopback; the same
//! leaving by another interface; anything forwarded from or to the TUN. Arrival is judged before and after address translation, leaving too,
//! so that no redirection of somebody else's table leads around it. Where components share the host's namespace, it also says which sockets
//! are whose ([`super::claim_table`]); and everywhere, what the resolver's addresses are for ([`resolver_table`]). A second table, of the family `arp`, keeps the kernel from telling
//! neighbours which overlay addresses this host has; a kernel without that family has to do without it.
//!
//! It is loaded before any overlay address is configured, stays when the agent stops, and goes at `leave`. Each function works in the
//! network namespace of the calling thread.

use std::fmt;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::str::FromStr;

use cloison_proto::net::OverlayRange;

use super::claim_table::ClaimTable;
use super::resolver_table;
use crate::sys::InterfaceName;

/// Where distributions put `nft`. The environment is not asked: the agent runs as root.
const NFT_PLACES: [&str; 5] = [
    "/usr/sbin/nft",
    "/sbin/nft",
    "/usr/bin/nft",
    "/usr/local/sbin/nft",
    "/run/current-system/sw/bin/nft",
];

/// Why the base table is not in force.
#[derive(Debug, thiserror::Error)]
pub enum BaseTableError {
    /// `nft` is not installed.
    #[error("cannot load the base table: `nft` is missing; install the package `nftables`")]
    NftMissing,
    /// `nft` could not be run.
    #[error("cannot load the base table: running {0} failed")]
    Run(&'static str, #[source] io::Error),
    /// The agent lacks a privilege.
    #[error(
        "cannot change the table `inet {0}`: not permitted; the agent needs CAP_NET_ADMIN (run it as root, or grant that capability in its unit)"
    )]
    NotPermitted(TableName),
    /// The kernel or `nft` refused.
    #[error("cannot change the table `inet {table}`: {answer}; check that the kernel has nf_tables (`modprobe nf_tables`)")]
    Refused {
        /// Which table.
        table: TableName,
        /// The first line of what `nft` said.
        answer: String,
    },
}

/// The name of an nftables table: 1 to 31 characters of `[a-z0-9_]`, beginning with a letter.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableName(Box<str>);

/// A text that is no table name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` cannot name an nftables table: use 1 to 31 characters of a-z, 0-9 and `_`, beginning with a letter")]
pub struct TableNameError(String);

impl FromStr for TableName {
    type Err = TableNameError;
    fn from_str(text: &str) -> Result<Self, TableNameError> {
        let good = text.len() < 32
            && text.bytes().next().is_some_and(|b| b.is_ascii_lowercase())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if good {
            Ok(Self(text.into()))
        } else {
            Err(TableNameError(text.into()))
        }
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// What the table of one namespace says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseTable {
    /// Its name.
    pub name: TableName,
    /// The overlay ranges.
    pub range: OverlayRange,
    /// The TUN of the namespace, made or not.
    pub tun: InterfaceName,
    /// Components that share the namespace, if there are any.
    pub claims: Option<ClaimTable>,
}

impl BaseTable {
    /// Loads the table, in place of any of that name, in one transaction.
    ///
    /// # Errors
    /// [`BaseTableError`]; what was loaded before is still in force then.
    pub fn load(&self) -> Result<(), BaseTableError> {
        run_nft(&self.name, &["-f", "-"], &self.text())?;
        if let Err(error) = run_nft(&self.name, &["-f", "-"], &self.arp_text()) {
            tracing::warn!(%error, "neighbours can find out by ARP which overlay addresses this host has");
        }
        Ok(())
    }

    /// Whether a table of that name is there.
    ///
    /// # Errors
    /// [`BaseTableError`].
    pub fn is_loaded(&self) -> Result<bool, BaseTableError> {
        let tables = run_nft(&self.name, &["list", "tables", "inet"], "")?;
        let ours = format!("table inet {}", self.name);
        Ok(tables.lines().any(|line| line.trim() == ours))
    }

    /// The table as `nft` shows it, without counters and without what is in its sets.
    ///
    /// # Errors
    /// [`BaseTableError`]; also if there is none.
    pub fn listing(&self) -> Result<String, BaseTableError> {
        listing(&self.name)
    }

    /// The transaction for the table of the family `arp`. IPv6 answers only for addresses of the interface that is asked.
    fn arp_text(&self) -> String {
        let Self { name, range, .. } = self;
        let (v4, v4_len) = range.v4();
        format!(
            r#"table arp {name}
delete table arp {name}
table arp {name} {{
  chain output {{
    type filter hook output priority 0; policy accept;
    arp saddr ip {v4}/{v4_len} counter drop comment "overlay address told to neighbours"
  }}
}}
"#
        )
    }

    /// The transaction.
    fn text(&self) -> String {
        let Self { name, range, tun, claims } = self;
        let definitions = claims.as_ref().map(ClaimTable::definitions).unwrap_or_default();
        let speaking = claims.as_ref().map(|claims| claims.output(tun, *range)).unwrap_or_default();
        let hearing = claims.as_ref().map(|claims| claims.input(tun, *range)).unwrap_or_default();
        let definitions = definitions + &resolver_table::definitions(*range);
        let (asking, asked) = (resolver_table::jumps("oifname", *range), resolver_table::jumps("iifname", *range));
        let ((v4, v4_len), (v6, v6_len)) = (range.v4(), range.v6());
        format!(
            r#"table inet {name}
delete table inet {name}
table inet {name} {{
{definitions}  chain arriving {{
    iifname {{ "lo", "{tun}" }} return
    ip saddr {v4}/{v4_len} counter drop comment "overlay source from elsewhere"
    ip daddr {v4}/{v4_len} counter drop comment "overlay destination from elsewhere"
    ip6 saddr {v6}/{v6_len} counter drop comment "overlay source from elsewhere"
    ip6 daddr {v6}/{v6_len} counter drop comment "overlay destination from elsewhere"
  }}
  chain leaving {{
    oifname {{ "lo", "{tun}" }} return
    ip saddr {v4}/{v4_len} counter drop comment "overlay source to elsewhere"
    ip daddr {v4}/{v4_len} counter drop comment "overlay destination to elsewhere"
    ip6 saddr {v6}/{v6_len} counter drop comment "overlay source to elsewhere"
    ip6 daddr {v6}/{v6_len} counter drop comment "overlay destination to elsewhere"
  }}
  chain prerouting {{
    type filter hook prerouting priority -300; policy accept;
    jump arriving
  }}
  chain input {{
    type filter hook input priority 0; policy accept;
{asked}{hearing}    jump arriving
  }}
  chain forward {{
    type filter hook forward priority 0; policy accept;
    iifname "{tun}" counter drop comment "forwarded from the mesh"
    oifname "{tun}" counter drop comment "forwarded to the mesh"
    jump arriving
    jump leaving
  }}
  chain output {{
    type filter hook output priority 0; policy accept;
{asking}{speaking}    jump leaving
  }}
  chain postrouting {{
    type filter hook postrouting priority 300; policy accept;
    jump leaving
  }}
}}
"#
        )
    }
}

/// Whether the table of that name is there and says whose sockets are whose.
///
/// # Errors
/// [`BaseTableError`].
pub fn has_claims(name: &TableName) -> Result<bool, BaseTableError> {
    let chains = run_nft(name, &["-s", "-t", "list", "chains", "inet"], "")?;
    let ours = format!("table inet {name} {{");
    let mut lines = chains.lines().skip_while(|line| line.trim() != ours).skip(1);
    Ok(lines
        .by_ref()
        .take_while(|line| *line != "}")
        .any(|line| line.trim() == "chain speaking {"))
}

fn listing(name: &TableName) -> Result<String, BaseTableError> {
    run_nft(name, &["-s", "-t", "list", "table", "inet", &name.0], "")
}

/// Takes the table of that name away; there may be none.
///
/// # Errors
/// [`BaseTableError`].
pub fn remove(name: &TableName) -> Result<(), BaseTableError> {
    // Naming the table first makes one if there is none, so that deleting cannot fail for that.
    let removal = |family| format!("table {family} {name}\ndelete table {family} {name}\n");
    run_nft(name, &["-f", "-"], &removal("inet"))?;
    // Where the kernel lacks the family there is none.
    let _ = run_nft(name, &["-f", "-"], &removal("arp"));
    Ok(())
}

pub(super) fn run_nft(table: &TableName, arguments: &[&str], input: &str) -> Result<String, BaseTableError> {
    let nft = NFT_PLACES
        .into_iter()
        .find(|place| Path::new(place).exists())
        .ok_or(BaseTableError::NftMissing)?;
    let run = || {
        let mut child = Command::new(nft)
            .args(arguments)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    };
    let output = run().map_err(|e| BaseTableError::Run(nft, e))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let answer = String::from_utf8_lossy(&output.stderr);
    if answer.contains("Operation not permitted") {
        return Err(BaseTableError::NotPermitted(table.clone()));
    }
    let first = answer.lines().next().unwrap_or("no answer").to_owned();
    Err(BaseTableError::Refused {
        table: table.clone(),
        answer: first,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_names_that_would_need_quoting_are_refused() {
        for bad in ["", "1a", "a b", "a;b", "a{", "A", "a-b", "\"", "abcdefghijklmnopqrstuvwxyz012345"] {
            assert!(bad.parse::<TableName>().is_err(), "{bad:?}");
        }
        assert!("cloison_2".parse::<TableName>().is_ok());
    }
}
