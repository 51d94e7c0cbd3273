//! Asking for names as programs do: `kdig` for what a DNS server answers, `getent` for what the C library makes of it with a resolver file of
//! its own.

use std::net::IpAddr;

use anyhow::{Context, Result};

use super::netns::Netns;
use super::process::Finished;

/// What a server answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// `NOERROR`, `NXDOMAIN`, …
    pub status: String,
    /// `qr`, `aa`, …
    pub flags: Vec<String>,
    /// The lines of each section, in its order: owner, time to live, class, type, data.
    pub answers: Vec<String>,
    /// The lines of the section of authority.
    pub authority: Vec<String>,
    /// Everything that `kdig` said.
    pub text: String,
}

impl Answer {
    /// The data of the records of one type.
    #[must_use]
    pub fn data(&self, kind: &str) -> Vec<String> {
        let fields = self.answers.iter().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let of_kind = fields.filter(|fields| fields.get(3) == Some(&kind));
        of_kind.filter_map(|fields| fields.get(4).map(|data| (*data).to_owned())).collect()
    }

    /// What does not differ from one question to the next: everything but names, numbers and times.
    #[must_use]
    pub fn shape(&self) -> (String, Vec<String>, usize, Vec<String>) {
        (self.status.clone(), self.flags.clone(), self.answers.len(), self.authority.clone())
    }
}

/// Asks a server from inside a namespace: `line` is `NAME TYPE` with further words of `kdig`.
///
/// # Errors
/// If there is no answer, or `kdig` is not installed.
pub fn ask(net: &Netns, server: IpAddr, line: &str) -> Result<Answer> {
    let finished = attempt(net, server, line)?;
    parse(&finished.stdout).with_context(|| format!("{line} at {server}: {}{}", finished.stdout, finished.stderr))
}

/// The same, whatever comes of it.
///
/// # Errors
/// If `kdig` is not installed.
pub fn attempt(net: &Netns, server: IpAddr, line: &str) -> Result<Finished> {
    let at = format!("@{server}");
    let mut command = vec!["kdig", &at, "+timeout=2", "+retry=0"];
    command.extend(line.split_whitespace());
    net.run(&command)
}

/// Resolves a name by the C library (`getent DATABASE NAME`), with these resolvers and nothing in its hosts file.
///
/// # Errors
/// If it cannot be run.
pub fn getent(net: &Netns, resolvers: &[IpAddr], database: &str, name: &str) -> Result<Finished> {
    let lines: String = resolvers.iter().map(|address| format!("nameserver {address}\n")).collect();
    let script = "set -e; mount -t tmpfs none /mnt; printf %s \"$0\" >/mnt/resolv.conf; echo '127.0.0.1 localhost' >/mnt/hosts; \
                  echo 'hosts: files dns' >/mnt/nsswitch.conf; \
                  for file in resolv.conf hosts nsswitch.conf; do mount --bind /mnt/$file /etc/$file; done; exec getent \"$@\"";
    let unshare = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", script];
    net.run(&[&unshare[..], &[&lines, database, name]].concat())
}

fn parse(text: &str) -> Option<Answer> {
    let field = |line: &str, name: &str| {
        let (_, rest) = line.split_once(name)?;
        Some(rest.split(';').next().unwrap_or_default().trim().to_owned())
    };
    let status = text.lines().find_map(|line| field(line, "status: "))?;
    let flags = text.lines().find_map(|line| field(line, "Flags: "))?;
    let section = |title: &str| {
        let lines = text.lines().skip_while(move |line| !line.contains(title)).skip(1);
        let lines = lines.take_while(|line| !line.is_empty() && !line.starts_with(";;"));
        lines.filter(|line| !line.starts_with(';')).map(str::to_owned).collect()
    };
    Some(Answer {
        status,
        flags: flags.split_whitespace().map(str::to_owned).collect(),
        answers: section("ANSWER SECTION"),
        authority: section("AUTHORITY SECTION"),
        text: text.to_owned(),
    })
}
