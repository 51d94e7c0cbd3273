//! Debian's `wireguard-go` and `wg` on a host of the lab: the other implementation, and a paired host that obeys no rules.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::host::Host;
use super::netns::Netns;
use super::process::Process;
use super::wait_for;

const START_LIMIT: Duration = Duration::from_secs(10);

/// A running `wireguard-go` with one interface.
#[derive(Debug)]
pub struct WireGuard {
    process: Process,
    net: Netns,
    interface: String,
}

/// The other side, as `wg set` takes it.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its public key.
    pub key: [u8; 32],
    /// Where it is; it must come by itself, if that is not known.
    pub endpoint: Option<SocketAddr>,
    /// Addresses that it may use, and that are routed to it.
    pub addresses: Vec<IpAddr>,
}

impl WireGuard {
    /// Starts an interface with these addresses and one peer on a host.
    ///
    /// # Errors
    /// If `wireguard-go` or `wg` is missing, or refuses.
    pub fn start(host: &Host, private_key: &[u8; 32], port: u16, addresses: &[IpAddr], peer: &Peer) -> Result<Self> {
        let (net, interface) = (host.net().clone(), fresh_name());
        let mut command = net.command("wireguard-go");
        command
            .args(["-f", &interface])
            .env("WG_PROCESS_FOREGROUND", "1")
            .env("LOG_LEVEL", "verbose");
        let mut process = net.start("wireguard-go", command)?;
        wait_for("wireguard-go's interface", START_LIMIT, || {
            let shown = net.run(&["wg", "show", &interface])?;
            anyhow::ensure!(process.ended()?.is_none(), "wireguard-go ended:\n{}", process.log());
            Ok(shown.ok().ok())
        })?;
        let wireguard = Self { process, net, interface };
        wireguard.configure(host, private_key, port, addresses, peer)?;
        Ok(wireguard)
    }

    /// The name of its interface.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// When the last handshake was complete, if there was one.
    ///
    /// # Errors
    /// If `wg` fails.
    pub fn latest_handshake(&self) -> Result<Option<SystemTime>> {
        let shown = self.net.run(&["wg", "show", &self.interface, "latest-handshakes"])?.ok()?.stdout;
        let second: u64 = shown.split_whitespace().nth(1).context("wg shows no peer")?.parse()?;
        Ok((second > 0).then(|| SystemTime::UNIX_EPOCH + Duration::from_secs(second)))
    }

    /// Stops it; its interface goes with it.
    ///
    /// # Errors
    /// If it had to be killed.
    pub fn stop(&mut self) -> Result<()> {
        self.process.stop().map(drop)
    }

    fn configure(&self, host: &Host, private_key: &[u8; 32], port: u16, addresses: &[IpAddr], peer: &Peer) -> Result<()> {
        let file = host.folder().join(format!("{}.conf", self.interface));
        let mut text = format!("[Interface]\nPrivateKey = {}\nListenPort = {port}\n", BASE64.encode(private_key));
        let allowed: Vec<String> = peer.addresses.iter().map(|a| format!("{a}/{}", full_length(*a))).collect();
        write!(
            text,
            "[Peer]\nPublicKey = {}\nAllowedIPs = {}\n",
            BASE64.encode(peer.key),
            allowed.join(", ")
        )?;
        if let Some(endpoint) = peer.endpoint {
            writeln!(text, "Endpoint = {endpoint}")?;
        }
        let mut out = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file)?;
        std::io::Write::write_all(&mut out, text.as_bytes())?;
        self.net
            .run(&["wg", "setconf", &self.interface, &file.display().to_string()])?
            .ok()?;
        self.net
            .run(&["ip", "link", "set", "dev", &self.interface, "mtu", "1420", "up"])?
            .ok()?;
        for address in addresses {
            let address = format!("{address}/{}", full_length(*address));
            self.net
                .run(&["ip", "address", "replace", &address, "dev", &self.interface, "nodad"])?
                .ok()?;
        }
        for route in allowed {
            self.net.run(&["ip", "route", "replace", &route, "dev", &self.interface])?.ok()?;
        }
        Ok(())
    }
}

fn full_length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Control sockets are named after interfaces in a folder that all namespaces share, so no two labs may use the same name.
fn fresh_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("wg{:x}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
