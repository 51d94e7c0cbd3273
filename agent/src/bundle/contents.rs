//! What is in the bundle.

use std::fmt::Write as _;
use std::io::{self, Read as _};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use cloison_proto::status::Request;
use serde_json::json;

use super::Entry;
use super::redact::Redactor;
use crate::attach::base_table::BaseTable;
use crate::config::Config;
use crate::doctor;
use crate::state::clock::Moment;
use crate::state::identity::Membership;
use crate::state::view_cache;
use crate::state::{File, StateDir};
use crate::status::ask;

/// What the bundle says of itself.
const README: &str = "\
A bundle of `cloison-agent debug bundle`: what this host's agent knows and does, for whoever helps with it.

  doctor.txt     what is wrong on this host, and what to do about it
  status.json    view, lease, link, components, peers, packets
  flows.json     conversations that pass right now
  denials.json   what was denied lately
  view.json      the view on disk: names, addresses and rules that concern this host, without keys
  config.txt     the settings in force
  state.txt      names, sizes and modes of the files in the state directory
  log.txt        the agent's log of the last fifteen minutes, if the journal has it
  nft.txt        the agent's own table, and the names of the others
  network.txt    interfaces, addresses, routes
  versions.txt   of the agent, the kernel and what the agent runs

Private keys, tokens and credentials are not in it. Names and addresses of this host's peers are: give it to people who may know those.
";

/// Most that is kept of what one program says.
const MAX_OUTPUT: u64 = 4 << 20;

/// How long one program may take.
const MAX_TIME: Duration = Duration::from_secs(10);

/// Programs that show the network, where distributions put them. The environment is not asked: this runs as root.
const PLACES: [&str; 5] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/run/current-system/sw/bin"];

/// What knows this host's secrets.
#[must_use]
pub fn redactor(config: &Config) -> Redactor {
    let dir = StateDir::existing(config.state_dir.clone());
    let secrets: Vec<_> = File::ALL
        .into_iter()
        .filter(|f| f.is_secret())
        .filter_map(|f| dir.read(f).ok().flatten())
        .collect();
    Redactor::new(secrets.iter().map(|secret| secret.as_slice()))
}

/// Everything that goes in.
#[must_use]
pub fn entries(config: &Config) -> Vec<Entry> {
    let entry = |name, text| Entry { name, text };
    let report = doctor::judge::findings(&doctor::gather::facts(config));
    vec![
        entry("README.txt", README.to_owned()),
        entry("doctor.txt", crate::cmd::doctor::text(&report)),
        entry("status.json", asked(config, &Request::Status)),
        entry("flows.json", asked(config, &Request::Flows)),
        entry("denials.json", asked(config, &Request::Denials)),
        entry("view.json", view(config).unwrap_or_else(|why| why)),
        entry("config.txt", settings(config)),
        entry("state.txt", state(config)),
        entry(
            "log.txt",
            run(
                "journalctl",
                &[
                    "-u",
                    "cloison-agent",
                    "--since",
                    "-15min",
                    "-n",
                    "20000",
                    "--no-pager",
                    "-o",
                    "short-iso",
                ],
            ),
        ),
        entry("nft.txt", nft(config)),
        entry("network.txt", network()),
        entry("versions.txt", versions()),
    ]
}

fn asked(config: &Config, request: &Request) -> String {
    match ask(&config.socket, request) {
        Ok(answer) => pretty(&answer),
        Err(error) => error.to_string(),
    }
}

fn pretty(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value).unwrap_or_else(|e| e.to_string())
}

/// The view on disk without keys: what it names and allows.
fn view(config: &Config) -> Result<String, String> {
    let dir = StateDir::existing(config.state_dir.clone());
    let us = Membership::load(&dir)
        .map_err(|e| e.to_string())?
        .ok_or("this host is not enrolled")?;
    let cached = view_cache::load(&dir, &us, &Moment::now()).map_err(|e| e.to_string())?;
    let Some(held) = cached.view else {
        return Err(format!("no view: {:?}", cached.problems));
    };
    let (header, view) = (held.header(), held.content());
    let peers: Vec<_> = view
        .peers
        .values()
        .map(|p| json!({"id": p.id, "name": p.name, "keys": p.wg_keys.len()}))
        .collect();
    let instance = |component: &dyn std::fmt::Display, host: String, addresses: [std::net::IpAddr; 2]| json!({"component": component.to_string(), "host": host, "addresses": addresses});
    let local = view
        .instances
        .values()
        .map(|i| instance(&i.component, view.host.name.to_string(), i.addresses.both()));
    let remote = view
        .remotes
        .iter()
        .map(|r| instance(&r.component, r.host.to_string(), r.addresses.both()));
    let rules: Vec<_> = view
        .rules
        .iter()
        .map(|r| {
            let opens: Vec<_> = r.grants.iter().map(|g| g.ports.to_string()).collect();
            json!({"id": r.id, "from": r.from, "to": r.to, "opens": opens, "expires": r.expires})
        })
        .collect();
    let instances: Vec<_> = local.chain(remote).collect();
    let left = cached.lease.map(|(_, left)| left.as_secs());
    Ok(pretty(&json!({
        "version": header.version,
        "state_hash": header.state_hash.to_string(),
        "lease_left_secs": left,
        "host": {"id": view.host.id, "name": view.host.name},
        "peers": peers,
        "instances": instances,
        "rules": rules,
        "ignored_items": view.ignored,
    })))
}

/// The settings in force, each by its name: what else a configuration file holds stays there.
fn settings(config: &Config) -> String {
    let Config {
        state_dir,
        socket,
        interface,
        listen_port,
        table,
        mtu,
        workers,
        accepted,
        loopback_guard,
        coordinators,
        endpoints,
        hosts_file,
        resolver,
        resolved,
        key_lifetime,
        log,
        log_format,
    } = config;
    format!(
        "state_dir = {state_dir:?}\nsocket = {socket:?}\ninterface = {interface}\nlisten_port = {listen_port}\ntable = {table}\nmtu = {mtu:?}\n\
         workers = {workers}\naccepted = {accepted:?}\nloopback_guard = {loopback_guard}\ncoordinators = {coordinators:?}\nendpoints = {endpoints:?}\nhosts_file = {hosts_file:?}\n\
         resolver = {resolver}\nresolved = {resolved}\nkey_lifetime = {key_lifetime:?}\nlog = {log:?}\nlog_format = {log_format:?}\n"
    )
}

fn state(config: &Config) -> String {
    use std::os::unix::fs::MetadataExt as _;
    let mut text = String::new();
    let Ok(found) = std::fs::read_dir(&config.state_dir) else {
        return format!("cannot read {}", config.state_dir.display());
    };
    for entry in found.flatten() {
        if let Ok(meta) = entry.metadata() {
            let name = entry.file_name();
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{:04o} {:>6} {:>10} {}",
                meta.mode() & 0o7777,
                meta.uid(),
                meta.len(),
                name.display()
            );
        }
    }
    text
}

fn nft(config: &Config) -> String {
    let dir = StateDir::existing(config.state_dir.clone());
    let range = Membership::load(&dir)
        .ok()
        .flatten()
        .and_then(|us| view_cache::overlay(&dir, &us).ok().flatten());
    let own = range.map(|range| BaseTable {
        name: config.table.clone(),
        range,
        tun: config.interface.clone(),
        claims: None,
    });
    let own = own.map_or_else(
        || "no view yet".to_owned(),
        |table| table.listing().unwrap_or_else(|e| e.to_string()),
    );
    format!("{own}\n{}", run("nft", &["list", "tables"]))
}

fn network() -> String {
    let shown = [
        &["-br", "link"][..],
        &["-br", "address"],
        &["-4", "route", "show", "table", "all"],
        &["-6", "route", "show", "table", "all"],
        &["rule"],
    ];
    shown
        .iter()
        .map(|arguments| format!("# ip {}\n{}\n", arguments.join(" "), run("ip", arguments)))
        .collect()
}

fn versions() -> String {
    let kernel = rustix::system::uname();
    format!(
        "cloison-agent {}\nkernel {} {}\n{}{}",
        env!("CARGO_PKG_VERSION"),
        kernel.release().to_string_lossy(),
        kernel.machine().to_string_lossy(),
        run("nft", &["--version"]),
        run("ip", &["-V"]),
    )
}

/// What a program of the system says; or why it says nothing.
fn run(program: &str, arguments: &[&str]) -> String {
    let Some(path) = PLACES
        .iter()
        .map(|place| format!("{place}/{program}"))
        .find(|path| std::path::Path::new(path).exists())
    else {
        return format!("{program} is not installed\n");
    };
    match bounded(Command::new(&path).args(arguments)) {
        Ok(text) => text,
        Err(error) => format!("cannot run {path}: {error}\n"),
    }
}

/// What a command writes, up to [`MAX_OUTPUT`], until it ends or its time is over.
fn bounded(command: &mut Command) -> io::Result<String> {
    let (mut reader, writer) = io::pipe()?;
    command.env_clear().stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn()?;
    // The command keeps the writing ends: the pipe ends with it.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (done, read) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let result = (&mut reader).take(MAX_OUTPUT).read_to_end(&mut bytes).map(|_| bytes);
        // Nobody waits for it any more if the time is over.
        let _ = done.send(result);
    });
    let output = read.recv_timeout(MAX_TIME);
    // It may have more to say than is kept, or hang.
    let _ = child.kill();
    let _ = child.wait();
    match output {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes?).into_owned()),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "it did not end in time")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_says_too_much_is_cut_off_and_one_that_says_something_is_heard() -> io::Result<()> {
        assert_eq!(
            bounded(Command::new("/bin/sh").args(["-c", "echo one; echo two >&2"]))?,
            "one\ntwo\n"
        );
        let endless = bounded(Command::new("/bin/sh").args(["-c", "while :; do echo yes; done"]))?;
        assert_eq!(endless.len() as u64, MAX_OUTPUT);
        Ok(())
    }
}
