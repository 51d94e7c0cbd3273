//! The wire: a bridge in a namespace of its own, one port for each host, and what may be done to the frames on it.
//!
//! Impairments are rules of one nftables table per namespace, `netdev lab`; no other table is touched, so they can be laid on a host
//! beside the table of its agent. There is no delay and no reordering: `tc netem` is not to be had everywhere.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::host::Host;
use super::netns::Netns;
use super::{Folder, Underlay, wait_for, wire_v4, wire_v6};

const BRIDGE: &str = "wire";
/// How long the kernel may take to end a namespace.
const FREE_LIMIT: Duration = Duration::from_secs(20);
/// The name of every host's interface on the wire.
pub const HOST_PORT: &str = "eth0";

/// The wire. See the module documentation.
#[derive(Debug)]
pub struct Wire {
    net: Netns,
    underlay: Underlay,
    mtu: u32,
}

impl Wire {
    pub(super) fn build(prefix: &str, folder: &Arc<Folder>, underlay: Underlay, mtu: u32) -> Result<Self> {
        let net = Netns::create(prefix, "wire", folder)?;
        // The bridge forwards frames only: it must neither get an address of its own nor filter or learn groups.
        net.set("ipv6/conf/default/disable_ipv6", "1")?;
        net.run(&[
            "ip",
            "link",
            "add",
            BRIDGE,
            "mtu",
            &mtu.to_string(),
            "type",
            "bridge",
            "mcast_snooping",
            "0",
        ])?
        .ok()?;
        net.run(&["ip", "link", "set", "dev", BRIDGE, "up"])?.ok()?;
        Ok(Self { net, underlay, mtu })
    }

    /// The namespace of the bridge: a capture on a port there sees what one host sends and receives.
    #[must_use]
    pub fn net(&self) -> &Netns {
        &self.net
    }

    /// Which families it carries.
    #[must_use]
    pub fn underlay(&self) -> Underlay {
        self.underlay
    }

    /// Waits until no host hangs at this port any more: a namespace goes some time after it was deleted.
    pub(super) fn wait_until_free(&self, port: &str) -> Result<()> {
        wait_for(&format!("port {port} of the wire to be free"), FREE_LIMIT, || {
            let there = self.net.run(&["ip", "link", "show", "dev", port])?.status.success();
            Ok((!there).then_some(()))
        })
    }

    /// Hangs a namespace on the wire under a port name, as host number `number`.
    pub(super) fn attach(&self, net: &Netns, port: &str, number: u8) -> Result<()> {
        self.plug(net, port)?;
        if !self.underlay.has_v6() {
            net.set(&format!("ipv6/conf/{HOST_PORT}/disable_ipv6"), "1")?;
        }
        net.run(&["ip", "link", "set", "dev", HOST_PORT, "up"])?.ok()?;
        if self.underlay.has_v4() {
            net.run(&["ip", "address", "add", &format!("{}/24", wire_v4(number)), "dev", HOST_PORT])?
                .ok()?;
        }
        if self.underlay.has_v6() {
            net.run(&[
                "ip",
                "address",
                "add",
                &format!("{}/64", wire_v6(number)),
                "dev",
                HOST_PORT,
                "nodad",
            ])?
            .ok()?;
        }
        Ok(())
    }

    /// Gives a namespace an interface on the wire that is down and has no address: whoever lives there configures it. A port of that name
    /// that an earlier namespace had goes first.
    pub(crate) fn plug(&self, net: &Netns, port: &str) -> Result<()> {
        ensure!(port.len() <= 15 && port != BRIDGE, "`{port}` cannot be the name of an interface");
        net.set("ipv6/conf/default/accept_ra", "0")?;
        let mtu = self.mtu.to_string();
        let pair = [
            "ip",
            "link",
            "add",
            "name",
            port,
            "mtu",
            &mtu,
            "type",
            "veth",
            "peer",
            "name",
            HOST_PORT,
            "mtu",
            &mtu,
            "netns",
            net.name(),
        ];
        if self.net.run(&["ip", "link", "show", "dev", port])?.status.success() {
            self.net.run(&["ip", "link", "delete", "dev", port])?.ok()?;
        }
        self.net.run(&pair)?.ok()?;
        self.net.run(&["ip", "link", "set", "dev", port, "master", BRIDGE, "up"])?.ok()?;
        Ok(())
    }

    /// Loses this share of all frames that reach the host.
    ///
    /// # Errors
    /// If `nft` refuses.
    pub fn lose(&self, to: &Host, percent: u8) -> Result<()> {
        self.rule_on_arrival(to, &format!("{} drop", by_chance(percent)))
    }

    /// Loses all packets to the host that are longer than `mtu` bytes, silently: a path that swallows what is too big.
    ///
    /// # Errors
    /// If `nft` refuses.
    pub fn lose_longer_than(&self, to: &Host, mtu: u32) -> Result<()> {
        self.rule_on_arrival(to, &format!("meta length > {mtu} drop"))
    }

    /// Loses everything to the host: its cable is cut, in one direction.
    ///
    /// # Errors
    /// If `nft` refuses.
    pub fn cut(&self, to: &Host) -> Result<()> {
        self.rule_on_arrival(to, "drop")
    }

    /// Delivers each UDP datagram from one host to another twice, this often out of a hundred.
    ///
    /// # Errors
    /// If `nft` refuses.
    pub fn duplicate(&self, from: &Host, to: &Host, percent: u8) -> Result<()> {
        let rule = format!("meta l4proto udp {} dup to \"{}\"", by_chance(percent), to.name());
        self.net.nft(&chain(&format!("from_{}", table_name(from)), from.name(), &rule))
    }

    /// Takes all impairments off again.
    ///
    /// # Errors
    /// If `nft` refuses.
    pub fn repair(&self, hosts: &[&Host]) -> Result<()> {
        let reset = "add table netdev lab; delete table netdev lab;";
        self.net.nft(reset)?;
        hosts.iter().try_for_each(|host| host.net().nft(reset))
    }

    /// Sets the MTU of a host's own interface and its port, while everything runs.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_mtu(&self, host: &Host, mtu: u32) -> Result<()> {
        let mtu = mtu.to_string();
        self.net.run(&["ip", "link", "set", "dev", host.name(), "mtu", &mtu])?.ok()?;
        host.net()
            .run(&["ip", "link", "set", "dev", HOST_PORT, "mtu", &mtu])?
            .ok()
            .context("setting the MTU")?;
        Ok(())
    }

    fn rule_on_arrival(&self, to: &Host, rule: &str) -> Result<()> {
        to.net().nft(&chain("arrival", HOST_PORT, rule))
    }
}

/// A chain that sees all frames arriving on an interface, and one more rule in it.
fn chain(name: &str, interface: &str, rule: &str) -> String {
    format!(
        "add table netdev lab; \
         add chain netdev lab {name} {{ type filter hook ingress device \"{interface}\" priority -500; policy accept; }}; \
         add rule netdev lab {name} {rule};"
    )
}

/// The condition that is met by chance, this often out of a hundred; `numgen` cannot be asked for what is always true.
fn by_chance(percent: u8) -> String {
    if percent < 100 {
        format!("numgen random mod 100 < {percent}")
    } else {
        String::new()
    }
}

/// nft names have no `-`.
fn table_name(host: &Host) -> String {
    host.name().replace('-', "_")
}
