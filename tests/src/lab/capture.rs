//! Captures: tcpdump writes, [`Recording`] reads the file and answers what was in it.
//!
//! A recording that lost packets proves nothing, so a loss reported by the kernel is an error.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use rustix::process::Signal;

use super::Folder;
use super::netns::Netns;
use super::process::Process;

const START_LIMIT: Duration = Duration::from_secs(10);
/// Magic of a capture file with microseconds, in the byte order of this machine.
const MAGIC_MICROSECONDS: u32 = 0xa1b2_c3d4;
/// Magic of a capture file with nanoseconds.
const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
/// Link type of interfaces that carry bare IP packets (TUN).
const LINK_RAW: u32 = 101;
/// Link type of Ethernet.
const LINK_ETHERNET: u32 = 1;
/// Link type of tcpdump's `any`.
const LINK_COOKED2: u32 = 276;
/// Length of its header.
const COOKED2_HEADER: usize = 20;

/// A capture that is running.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    path: PathBuf,
}

/// What a capture saw.
#[derive(Debug)]
pub struct Recording {
    frames: Vec<Frame>,
}

/// One frame of a recording.
#[derive(Debug)]
pub struct Frame {
    /// When it passed.
    pub at: SystemTime,
    /// All its bytes, from the link header on.
    pub bytes: Vec<u8>,
    link: u32,
}

/// The addresses and ports of a packet; ports are 0 where there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// Source address.
    pub from: IpAddr,
    /// Destination address.
    pub to: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Source port.
    pub from_port: u16,
    /// Destination port.
    pub to_port: u16,
    /// Bytes behind the transport header.
    pub payload: usize,
}

impl Capture {
    /// Starts recording, and returns when tcpdump listens.
    ///
    /// # Errors
    /// If tcpdump cannot be started.
    pub fn start(net: &Netns, interface: &str, folder: &Arc<Folder>) -> Result<Self> {
        let path = folder.log_path(&format!("{interface}.pcap"))?;
        // Without --immediate-mode a short capture comes out empty; -Z root keeps the right to write into the lab's folder. In that mode a packet
        // takes as much of the buffer as the longest one could: 64 MiB are a thousand packets, which is how long tcpdump may not get its turn.
        let mut command = net.command("tcpdump");
        command
            .args([
                "--immediate-mode",
                "-U",
                "-n",
                "-s",
                "65535",
                "-B",
                "65536",
                "-Z",
                "root",
                "--nano",
                "-i",
                interface,
                "-w",
            ])
            .arg(&path);
        let mut process = net.start("tcpdump", command)?;
        process.wait_for_line("listening on", START_LIMIT)?;
        Ok(Self { process, path })
    }

    /// What was recorded up to this moment; recording goes on. Frames that tcpdump has not written yet are not in it.
    ///
    /// # Errors
    /// If the file is not a capture.
    pub fn so_far(&self) -> Result<Recording> {
        Recording::read(&std::fs::read(&self.path)?)
    }

    /// Stops, and reads what was recorded.
    ///
    /// # Errors
    /// If the kernel dropped packets on the way, or the file is not a capture.
    pub fn stop(mut self) -> Result<Recording> {
        // What just passed may still be on its way to tcpdump.
        std::thread::sleep(Duration::from_millis(200));
        self.process.stop_by(Signal::INT)?;
        let log = self.process.log();
        ensure!(
            log.contains("\n0 packets dropped by kernel"),
            "the capture lost packets, and proves nothing:\n{log}"
        );
        self.so_far()
    }
}

impl Recording {
    /// Reads a capture file; a last frame that is not complete is left out.
    fn read(bytes: &[u8]) -> Result<Self> {
        let word = |at: usize| -> Option<u32> { Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?)) };
        let magic = word(0).context("an empty capture file")?;
        let nanoseconds_a_tick = match magic {
            MAGIC_NANOSECONDS => 1,
            MAGIC_MICROSECONDS => 1000,
            _ => anyhow::bail!("{magic:#x} does not begin a capture file"),
        };
        let link = word(20).context("a capture file without its header")?;
        let mut frames = Vec::new();
        let mut at = 24;
        while let (Some(seconds), Some(ticks), Some(length)) = (word(at), word(at + 4), word(at + 8)) {
            let length = usize::try_from(length)?;
            let Some(frame) = bytes.get(at + 16..at + 16 + length) else { break };
            let since = Duration::new(u64::from(seconds), ticks * nanoseconds_a_tick);
            frames.push(Frame {
                at: SystemTime::UNIX_EPOCH + since,
                bytes: frame.to_vec(),
                link,
            });
            at += 16 + length;
        }
        Ok(Self { frames })
    }

    /// All frames.
    #[must_use]
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// How many frames contain these bytes anywhere.
    #[must_use]
    pub fn containing(&self, needle: &[u8]) -> usize {
        self.frames.iter().filter(|f| f.contains(needle)).count()
    }

    /// The frames whose addresses `wanted` accepts.
    pub fn matching(&self, wanted: impl Fn(&Addresses) -> bool) -> Vec<&Frame> {
        self.frames.iter().filter(|f| f.addresses().is_some_and(|a| wanted(&a))).collect()
    }

    /// How many IP packets have this address as source or destination.
    #[must_use]
    pub fn with_address(&self, address: IpAddr) -> usize {
        self.matching(|a| a.from == address || a.to == address).len()
    }

    /// Whether the bytes of this address occur anywhere in any frame, in whatever header or payload.
    #[must_use]
    pub fn mentions(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => self.containing(&a.octets()) > 0,
            IpAddr::V6(a) => self.containing(&a.octets()) > 0,
        }
    }
}

impl Frame {
    /// Whether these bytes occur anywhere in it.
    #[must_use]
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.bytes.windows(needle.len().max(1)).any(|w| w == needle)
    }

    /// The packet's addresses; none if it is not IP.
    #[must_use]
    pub fn addresses(&self) -> Option<Addresses> {
        let packet = match self.link {
            LINK_ETHERNET => SlicedPacket::from_ethernet(&self.bytes).ok()?,
            LINK_RAW => SlicedPacket::from_ip(&self.bytes).ok()?,
            LINK_COOKED2 => SlicedPacket::from_ip(self.bytes.get(COOKED2_HEADER..)?).ok()?,
            _ => return None,
        };
        let (from, to) = match packet.net? {
            NetSlice::Ipv4(ip) => (IpAddr::V4(ip.header().source_addr()), IpAddr::V4(ip.header().destination_addr())),
            NetSlice::Ipv6(ip) => (IpAddr::V6(ip.header().source_addr()), IpAddr::V6(ip.header().destination_addr())),
            NetSlice::Arp(_) => return None,
        };
        let (protocol, from_port, to_port, payload) = match packet.transport {
            Some(TransportSlice::Tcp(tcp)) => (6, tcp.source_port(), tcp.destination_port(), tcp.payload().len()),
            Some(TransportSlice::Udp(udp)) => (17, udp.source_port(), udp.destination_port(), udp.payload().len()),
            Some(TransportSlice::Icmpv4(icmp)) => (1, 0, 0, icmp.payload().len()),
            Some(TransportSlice::Icmpv6(icmp)) => (58, 0, 0, icmp.payload().len()),
            Some(TransportSlice::Igmp(igmp)) => (2, 0, 0, igmp.payload().len()),
            None => (0, 0, 0, 0),
        };
        Some(Addresses {
            from,
            to,
            protocol,
            from_port,
            to_port,
            payload,
        })
    }
}
