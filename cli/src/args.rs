//! What can be typed. The help texts teach: each command says what it does, and the longer help shows how.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use cloison_proto::id::{CredentialId, TokenId};
use cloison_proto::label::{LabelKey, LabelValue};

/// Operate a Cloison mesh: who may talk to whom, and why.
#[derive(Debug, Parser)]
#[command(
    name = "cloison",
    version,
    after_help = "Exit codes: 0 done, 1 error, 2 differences or denied, 3 not authorised.\nStart with `cloison status`; write a policy and try it with `cloison policy check`."
)]
pub(crate) struct Args {
    /// Configuration file: the coordinator's URL, its root certificate and your credential
    #[arg(long, global = true, env = "CLOISON_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Output for people, or JSON with a stable schema
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people; colours only on a terminal
    Table,
    /// For programs
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write the configuration of this command from a credential
    #[command(
        after_help = "The credential is read from a file or from standard input, never from the command line, where other users would see it.\n\nExample:\n  cloison login --url https://10.0.0.5:7443 --root-certificate root.pem --credential-file cred"
    )]
    Login(LoginArgs),
    /// Hosts, components, and on how many hosts the policy is applied
    Status,
    /// Hosts: list, show, label, rotate-key, revoke
    #[command(subcommand)]
    Host(HostCommand),
    /// Components: list, show; where they run, and how they are kept to their own processes
    #[command(subcommand)]
    Component(ComponentCommand),
    /// Enrollment tokens: create, list, revoke
    #[command(subcommand)]
    Token(TokenCommand),
    /// Credentials for this command and for programs: create, list, revoke, rotate
    #[command(subcommand)]
    Credential(CredentialCommand),
    /// Rotate the coordinator's own keys, without an interruption
    ///
    /// The next key is announced to all hosts; when every host trusts it, or after one lease, it is used; a lease later the former is retired. The
    /// trust root stays: tokens and hosts pin it.
    #[command(subcommand)]
    Rotate(RotateCommand),
    /// Prove that what was replaced is dead
    #[command(subcommand)]
    Verify(VerifyCommand),
    /// The coordinator: where hosts find it
    #[command(subcommand)]
    Coordinator(CoordinatorCommand),
    /// The policy: check, apply, show
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Whether FROM may reach TO, by which rule, and whether it works right now
    #[command(
        after_help = "TO is a component and what of it: a service, a port, or everything it declares.\n\nExamples:\n  cloison explain n8n postgres:sql\n  cloison explain n8n postgres:tcp/5433\n  cloison explain n8n 'postgres:*'\n\nExits with 2 if it is denied."
    )]
    Explain(ExplainArgs),
    /// Who changed what, and when
    Audit(AuditArgs),
    /// Print what a shell needs to complete this command; packages install it
    #[command(after_help = "Example:\n  cloison completions bash > ~/.local/share/bash-completion/completions/cloison")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct LoginArgs {
    /// The coordinator's API, like https://10.0.0.5:7443
    #[arg(long, value_name = "URL")]
    pub(crate) url: String,
    /// The mesh's root certificate (PEM), as `cloison-coordinator init` wrote it
    #[arg(long, value_name = "FILE")]
    pub(crate) root_certificate: PathBuf,
    /// File with the credential; standard input if not given
    #[arg(long, value_name = "FILE")]
    pub(crate) credential_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// All hosts
    List,
    /// One host, with its instances and addresses
    Show {
        /// Name or id
        host: String,
    },
    /// Set or remove labels; components with `on: {LABEL: VALUE}` follow
    #[command(after_help = "Example:\n  cloison host label db-1 role=db env-")]
    Label {
        /// Name or id
        host: String,
        /// KEY=VALUE sets, KEY- removes
        #[arg(required = true, value_name = "CHANGE")]
        changes: Vec<LabelChange>,
    },
    /// Have a host change its WireGuard key now; nothing is interrupted
    RotateKey {
        /// Name or id
        host: String,
    },
    /// Cut a host off, for good: its flows end, its keys never come back
    Revoke {
        /// Name or id
        host: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ComponentCommand {
    /// All components of the policy
    List,
    /// One component: its instances, their addresses, how each is enforced, and what was denied last
    Show {
        /// Its name
        component: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token that lets a host join; it is shown once
    #[command(
        after_help = "Examples:\n  cloison token create --host db-1 > token\n  cloison token create --host 'worker-*' --uses 20 --valid-for 24h --label role=worker"
    )]
    Create(TokenCreateArgs),
    /// All tokens, without their secrets
    List,
    /// Make a token useless
    Revoke {
        /// The token's id, like token_0123456789abcdef
        token: TokenId,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct TokenCreateArgs {
    /// The host's name, or a pattern with one `*` that the coordinator fills; without it, the coordinator makes a name
    #[arg(long, value_name = "NAME")]
    pub(crate) host: Option<String>,
    /// A label that the host gets; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    pub(crate) labels: Vec<(LabelKey, LabelValue)>,
    /// How many hosts may join by it
    #[arg(long, default_value_t = 1)]
    pub(crate) uses: u32,
    /// How long it is valid, like 30m or 24h
    #[arg(long, default_value = "1h", value_parser = parse_span, value_name = "TIME")]
    pub(crate) valid_for: u64,
    /// From which addresses it may be used, like 192.0.2.0/24
    #[arg(long, value_name = "CIDR")]
    pub(crate) source: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CredentialCommand {
    /// Make a credential; it is shown once
    #[command(
        after_help = "Examples:\n  cloison credential create --name ci --scope policy > cred\n  cloison credential create --name oncall --scope operate,enroll --valid-for 720h"
    )]
    Create(CredentialCreateArgs),
    /// All credentials, without their secrets
    List,
    /// Make a credential useless, at once
    Revoke {
        /// The credential's id, like cred_0123456789abcdef
        credential: CredentialId,
    },
    /// Make a credential that takes another one's place
    ///
    /// Without an id, this command's own: the new one is written to its configuration and tried, then the former is revoked; whoever is
    /// interrupted has one that works. With an id, the new one is printed, and the former ends after the overlap.
    Rotate {
        /// The credential's id; this command's own if not given
        credential: Option<CredentialId>,
        /// How long the former one stays good, like 10m
        #[arg(long, default_value = "1h", value_parser = parse_span, value_name = "TIME")]
        overlap: u64,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct CredentialCreateArgs {
    /// What it is for
    #[arg(long)]
    pub(crate) name: String,
    /// What it allows: owner, policy, enroll, operate, read
    #[arg(long, required = true, value_delimiter = ',')]
    pub(crate) scope: Vec<String>,
    /// How long it is valid, like 720h
    #[arg(long, default_value = "720h", value_parser = parse_span, value_name = "TIME")]
    pub(crate) valid_for: u64,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum RotateCommand {
    /// The key that signs views and leases
    SigningKey,
    /// The authority for hosts' certificates; linked hosts get a new certificate
    HostIssuer,
    /// The authority for the coordinator's own certificate
    CoordinatorIssuer,
    /// How far the rotations are
    Status,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VerifyCommand {
    /// Former keys, tokens and credentials: each dead, or alive and why
    ///
    /// The coordinator judges used, expired and revoked tokens and credentials by the code that judges joins and calls (it has no secrets, only
    /// hashes, so it cannot show them); looks for retired WireGuard keys, signing keys and issuers in the view that each host acknowledged; and
    /// lists hosts that have not acknowledged theirs while their lease may last. A former credential that you still have is tried for real with
    /// --former. What it cannot prove: copies of a host's own keys that are still current, and certificates of a trusted issuer that were
    /// superseded (the coordinator keeps the serial numbers in use, and refuses all others).
    #[command(
        after_help = "Exits with 2 if anything is alive or unproven.\n\nExample:\n  cloison verify credentials --former old-credential"
    )]
    Credentials {
        /// File with a former credential, to be tried; can be given several times
        #[arg(long, value_name = "FILE")]
        former: Vec<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum CoordinatorCommand {
    /// Where hosts find the coordinator: add, remove, list
    ///
    /// Hosts are told by their views, keep the last addresses on disk, and try all in turn. To move a coordinator: add the new address, wait
    /// until `cloison status` shows that all hosts have it, start it there, and remove the old one.
    #[command(subcommand)]
    Address(AddressCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum AddressCommand {
    /// All addresses that hosts are told
    List,
    /// Add an address
    Add {
        /// HOST:PORT, as hosts reach it
        address: String,
    },
    /// Remove an address; the last one stays
    Remove {
        /// HOST:PORT, as it is listed
        address: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Find all mistakes in a policy, and show what it would open and close
    Check {
        /// The policy file; `-` reads standard input
        file: PathBuf,
    },
    /// Put a policy into force
    Apply {
        /// The policy file; `-` reads standard input
        file: PathBuf,
        /// Wait until every host has it in force
        #[arg(long)]
        wait: bool,
        /// Put it into force even if somebody else changed the policy in between
        #[arg(long)]
        force: bool,
        /// How long to wait, like 30s
        #[arg(long, default_value = "30s", value_parser = parse_span, value_name = "TIME", requires = "wait")]
        timeout: u64,
    },
    /// The policy in force
    Show,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ExplainArgs {
    /// The component that begins
    pub(crate) from: String,
    /// The component that is reached, and on what: SERVICE, tcp/PORT, udp/PORT, icmp or *
    #[arg(value_name = "TO:WHAT")]
    pub(crate) to: String,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct AuditArgs {
    /// Only entries behind this number
    #[arg(long, default_value_t = 0)]
    pub(crate) after: u64,
    /// How many at most; 0 means all
    #[arg(long, default_value_t = 0)]
    pub(crate) limit: u64,
}

/// One change of a host's labels.
#[derive(Debug, Clone)]
pub(crate) enum LabelChange {
    /// KEY=VALUE
    Set(LabelKey, LabelValue),
    /// KEY-
    Remove(LabelKey),
}

impl std::str::FromStr for LabelChange {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_suffix('-').filter(|key| !key.contains('=')) {
            Some(key) => key.parse().map(Self::Remove).map_err(|e| format!("{e}")),
            None => parse_label(text).map(|(key, value)| Self::Set(key, value)),
        }
    }
}

fn parse_label(text: &str) -> Result<(LabelKey, LabelValue), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((
        key.parse().map_err(|e| format!("key: {e}"))?,
        value.parse().map_err(|e| format!("value: {e}"))?,
    ))
}

/// A span like `90s`, `30m` or `1h 30m`, in whole seconds.
fn parse_span(text: &str) -> Result<u64, String> {
    let span: jiff::SignedDuration = text.parse().map_err(|_| "write a time like 90s, 30m or 24h".to_owned())?;
    u64::try_from(span.as_secs())
        .ok()
        .filter(|s| *s > 0)
        .ok_or_else(|| "the time must be at least a second".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_of_the_command_line_holds_together() {
        Args::command().debug_assert();
    }

    #[test]
    fn spans_and_label_changes_are_read_or_refused_with_advice() {
        assert_eq!(parse_span("1h 30m"), Ok(5400));
        assert!(parse_span("0s").is_err() && parse_span("-1h").is_err() && parse_span("soon").is_err());
        assert!(matches!("role=db".parse(), Ok(LabelChange::Set(..))));
        assert!(matches!("role-".parse(), Ok(LabelChange::Remove(_))));
        assert!("role".parse::<LabelChange>().is_err() && "Role=db".parse::<LabelChange>().is_err());
    }
}
