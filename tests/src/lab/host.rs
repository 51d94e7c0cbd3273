//! A machine of the lab: a namespace on the wire, a private folder, a hosts file, and namespaces for components inside it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::capture::Capture;
use super::netns::Netns;
use super::wire::{HOST_PORT, Wire};
use super::{Folder, Underlay, wire_v4, wire_v6};

/// A machine's hosts file to begin with.
pub const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n";

/// A machine. See the module documentation.
#[derive(Debug)]
pub struct Host {
    name: String,
    number: u8,
    prefix: String,
    net: Netns,
    underlay: Underlay,
    folder: Arc<Folder>,
}

impl Host {
    pub(super) fn build(prefix: &str, folder: &Arc<Folder>, wire: &Wire, name: &str, number: u8) -> Result<Self> {
        let net = Netns::create(prefix, name, folder).with_context(|| format!("making host {name}"))?;
        wire.attach(&net, name, number)
            .with_context(|| format!("hanging host {name} on the wire"))?;
        let own = folder.path().join(name);
        std::fs::DirBuilder::new().mode(0o711).create(&own)?;
        std::fs::write(own.join("hosts"), HOSTS)?;
        Ok(Self {
            name: name.to_owned(),
            number,
            prefix: prefix.to_owned(),
            net: net.with_hosts(own.join("hosts")),
            underlay: wire.underlay(),
            folder: Arc::clone(folder),
        })
    }

    /// Takes the machine away with everything in its namespace, and puts it back with the same name and addresses: what is left of it is
    /// its folder. No program may be running in it.
    pub(super) fn reboot(&self, wire: &Wire) -> Result<()> {
        super::netns::delete(self.net.name())?;
        wire.wait_until_free(&self.name)?;
        let net = Netns::create(&self.prefix, &self.name, &self.folder)?;
        wire.attach(&net, &self.name, self.number)
    }

    /// Its name, which is also that of its port in the wire's namespace.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its network namespace, where programs run.
    #[must_use]
    pub fn net(&self) -> &Netns {
        &self.net
    }

    /// Its own folder, for the state of its programs. Every user may pass through it; what is inside protects itself.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }

    /// Its hosts file: what all programs that run on it see as `/etc/hosts`.
    #[must_use]
    pub fn hosts_file(&self) -> PathBuf {
        self.folder().join("hosts")
    }

    /// Its IPv4 address on the wire.
    ///
    /// # Errors
    /// If the wire carries no IPv4.
    pub fn v4(&self) -> Result<Ipv4Addr> {
        self.underlay
            .has_v4()
            .then(|| wire_v4(self.number))
            .context("this wire carries no IPv4")
    }

    /// Its IPv6 address on the wire.
    ///
    /// # Errors
    /// If the wire carries no IPv6.
    pub fn v6(&self) -> Result<Ipv6Addr> {
        self.underlay
            .has_v6()
            .then(|| wire_v6(self.number))
            .context("this wire carries no IPv6")
    }

    /// Its addresses on the wire, IPv4 first.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.v4().map(IpAddr::V4).into_iter().chain(self.v6().map(IpAddr::V6)).collect()
    }

    /// Makes a namespace inside this machine for a component: a loopback interface and nothing else.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn component_namespace(&self, component: &str) -> Result<Netns> {
        Ok(Netns::create(&self.prefix, &format!("{}.{component}", self.name), &self.folder)?.with_hosts(self.hosts_file()))
    }

    /// Records what passes this machine's interface on the wire.
    ///
    /// # Errors
    /// If tcpdump cannot be started.
    pub fn capture_wire(&self) -> Result<Capture> {
        Capture::start(&self.net, HOST_PORT, &self.folder)
    }

    /// Records what passes one of this machine's interfaces (`any` for all).
    ///
    /// # Errors
    /// If tcpdump cannot be started.
    pub fn capture(&self, interface: &str) -> Result<Capture> {
        Capture::start(&self.net, interface, &self.folder)
    }
}
