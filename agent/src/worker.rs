//! Packet workers: plain threads that carry packets between TUNs, the engine and the WireGuard sockets, each in both directions.
//!
//! A worker waits in epoll for its TUNs, its sockets and its waker. What is ready is served in turn, a bounded batch each: read a packet,
//! give it to the engine, hand the results to the kernel. A round is one batch of the engine: it begins behind the wait, and ends when every
//! result is sent, so that an install never waits for a worker that sleeps and no result outlives the view that it was judged by (I6).
//!
//! Each worker has WireGuard sockets of its own on the shared port, and reads every so-many-th TUN; it *writes* to all of them. TUNs come
//! and go by [`Workers::set_tuns`]: workers follow when they are woken.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use cloison_agent_core::TunId;
use cloison_agent_core::engine::{Engine, Meta};
use cloison_agent_core::offload::VnetHeader;
use cloison_agent_core::path_policy::PathPolicy;
use cloison_agent_core::timer::TICK;
use cloison_agent_core::wg::LocalKey;
use cloison_proto::version::Timestamp;

use crate::attach::nudge::Nudge;
use crate::attach::owners;
use crate::denials::notebook::{Notebook, Scribe};
use crate::sys::clock;
use crate::sys::poll::{Poller, Ready, Waker};
use crate::sys::tun::{Tun, VNET_HEADER_LEN};
use crate::udp::{Family, Path, Receiver, Sender, Udp};
use crate::witness::{HostTun, HostWitness, Sockets};

/// Most packets read from one TUN before the other directions have their turn.
const TUN_BATCH: usize = 64;

/// Room for one packet from a TUN: the longest IP packet.
const PACKET_BUFFER: usize = 65_535;

/// How long a worker that does not tick waits when nothing comes.
const IDLE: Duration = Duration::from_secs(60);

/// The TUNs of a host, by number.
pub type Tuns = BTreeMap<TunId, Arc<Tun>>;

/// Tokens of a worker's epoll set beside the numbers of its TUNs.
mod token {
    pub(super) const WAKER: u64 = 1 << 32;
    pub(super) const UDP_V4: u64 = WAKER + 1;
    pub(super) const UDP_V6: u64 = WAKER + 2;
}

/// What the kernel made of the results that all workers handed to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KernelCounts {
    /// Datagrams that it did not take: its queue was full, or there is no way to the endpoint.
    pub udp_refused: u64,
    /// Datagrams longer than the underlay's MTU, of which it made fragments.
    pub udp_fragmented: u64,
    /// Packets that a TUN did not take: it was down or gone.
    pub tun_refused: u64,
    /// Questions about sockets that it did not answer.
    pub sockets_unanswered: u64,
}

/// The running workers. They stop when this value is dropped.
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<(Arc<Waker>, Option<JoinHandle<()>>)>,
    port: u16,
}

/// What the workers and their owner both see.
#[derive(Default)]
struct Shared {
    tuns: ArcSwap<Tuns>,
    /// Rounds that each worker has ended.
    rounds: Box<[AtomicU64]>,
    /// Whether the engine wants to be ticked without waiting for its time.
    tick_soon: AtomicBool,
    sockets: Arc<Sockets>,
    notebook: Arc<Notebook>,
    /// Given when a TUN is gone.
    nudge: Nudge,
    underlay_mtu: AtomicUsize,
    stopping: AtomicBool,
    udp_refused: AtomicU64,
    udp_fragmented: AtomicU64,
    tun_refused: AtomicU64,
}

impl Workers {
    /// Starts a worker for each of `sockets`, without any TUN. They ask about sockets in the namespace of the calling thread, which is to be
    /// the host's own, and go by `owners`; a TUN that goes gives `nudge`.
    ///
    /// # Errors
    /// The kernel's: too many threads or open files.
    pub fn start<P: PathPolicy, K: LocalKey>(
        engine: &Arc<Engine<P, K>>,
        sockets: Vec<Udp>,
        owners: owners::Shared,
        nudge: Nudge,
    ) -> io::Result<Self> {
        let port = sockets.first().map_or(0, Udp::port);
        let count = sockets.len();
        let shared = Shared {
            rounds: (0..count).map(|_| AtomicU64::new(0)).collect(),
            sockets: Arc::new(Sockets::new(owners)),
            nudge,
            ..Shared::default()
        };
        let mut workers = Self {
            shared: Arc::new(shared),
            threads: Vec::new(),
            port,
        };
        for (position, udp) in sockets.into_iter().enumerate() {
            let waker = Arc::new(Waker::new()?);
            let thread = Thread::new(engine.clone(), udp, waker.clone(), workers.shared.clone(), (position, count))?;
            let handle = std::thread::Builder::new()
                .name(format!("packets-{position}"))
                .spawn(move || thread.run())?;
            workers.threads.push((waker, Some(handle)));
        }
        Ok(workers)
    }

    /// The WireGuard port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Makes `tuns` the TUNs that packets are read from and written to. A worker lets go of those that are not among them as soon as it wakes.
    pub fn set_tuns(&self, tuns: Tuns) {
        self.shared.tuns.store(Arc::new(tuns));
        self.wake();
    }

    /// Tells which TUN is the host's own. To be told before a view is installed that uses it.
    pub fn set_host_tun(&self, tun: Option<(TunId, &Tun)>) {
        let tun = tun.map(|(id, tun)| HostTun {
            id,
            interface: tun.index(),
        });
        self.shared.sockets.tun.store(tun.map(Arc::new));
    }

    /// What is known of the sockets on it.
    #[must_use]
    pub fn host_sockets(&self) -> &Sockets {
        &self.shared.sockets
    }

    /// What the workers noted of what they refused.
    #[must_use]
    pub fn notebook(&self) -> &Notebook {
        &self.shared.notebook
    }

    /// Tells the MTU of the underlay in bytes, by which fragmented datagrams are counted.
    pub fn set_underlay_mtu(&self, bytes: usize) {
        self.shared.underlay_mtu.store(bytes, Ordering::Relaxed);
    }

    /// What the kernel made of the workers' results so far.
    #[must_use]
    pub fn counts(&self) -> KernelCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        KernelCounts {
            udp_refused: read(&self.shared.udp_refused),
            udp_fragmented: read(&self.shared.udp_fragmented),
            tun_refused: read(&self.shared.tun_refused),
            sockets_unanswered: self.shared.sockets.unanswered(),
        }
    }

    /// Whether a worker ended by itself: the data plane is then to be started anew.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.threads
            .iter()
            .any(|(_, thread)| thread.as_ref().is_none_or(JoinHandle::is_finished))
    }

    /// How many rounds each worker has ended so far; one that is woken ends one soon, unless it is stuck.
    #[must_use]
    pub fn rounds(&self) -> Vec<u64> {
        self.shared.rounds.iter().map(|rounds| rounds.load(Ordering::Acquire)).collect()
    }

    /// Has the engine ticked now: handshakes that are wanted go out at once.
    pub fn tick_soon(&self) {
        self.shared.tick_soon.store(true, Ordering::Release);
        self.wake();
    }

    /// Has every worker run a round.
    pub fn wake(&self) {
        for (waker, _) in &self.threads {
            waker.wake();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.wake();
        for (_, thread) in &mut self.threads {
            if let Some(Err(_)) = thread.take().map(JoinHandle::join) {
                tracing::error!("a packet worker panicked");
            }
        }
    }
}

/// One worker, on its own thread.
struct Thread<P: PathPolicy, K: LocalKey> {
    poller: Poller,
    waker: Arc<Waker>,
    /// Whether this worker tells the engine that time passes; one does.
    ticks: bool,
    /// This worker reads the TUNs whose number is `position` modulo `count`.
    share: (usize, usize),
    /// The TUNs that it reads.
    reading: Tuns,
    carrier: Carrier<P, K>,
    receiver: Receiver,
    packet: Box<[u8]>,
}

/// What carries a packet through the engine and the results to the kernel.
struct Carrier<P: PathPolicy, K: LocalKey> {
    engine: Arc<Engine<P, K>>,
    worker: cloison_agent_core::worker::Worker<P, K>,
    udp: Udp,
    sender: Sender,
    scribe: Scribe,
    tuns: Arc<Tuns>,
    shared: Arc<Shared>,
    now: Timestamp,
}

impl<P: PathPolicy, K: LocalKey> Thread<P, K> {
    fn new(engine: Arc<Engine<P, K>>, udp: Udp, waker: Arc<Waker>, shared: Arc<Shared>, share: (usize, usize)) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(&waker, token::WAKER)?;
        for (family, socket) in udp.sockets() {
            poller.add(socket, if family == Family::V4 { token::UDP_V4 } else { token::UDP_V6 })?;
        }
        let carrier = Carrier {
            worker: engine.worker().with_witness(Box::new(HostWitness::new(shared.sockets.clone()))),
            engine,
            udp,
            sender: Sender::default(),
            scribe: Scribe::new(shared.notebook.clone(), shared.sockets.clone()),
            tuns: Arc::default(),
            shared,
            now: clock::now(),
        };
        Ok(Self {
            poller,
            waker,
            ticks: share.0 == 0,
            share,
            reading: Tuns::new(),
            carrier,
            receiver: Receiver::default(),
            packet: vec![0; PACKET_BUFFER].into(),
        })
    }

    fn run(mut self) {
        let mut ready: Vec<Ready> = Vec::new();
        let mut next_tick = clock::now();
        loop {
            let timeout = if self.ticks { next_tick.since(clock::now()) } else { IDLE };
            if let Err(error) = self.poller.wait(&mut ready, timeout) {
                return tracing::error!(%error, "a packet worker cannot wait for packets, and ends");
            }
            if self.carrier.shared.stopping.load(Ordering::Acquire) {
                return;
            }
            self.carrier.begin();
            for event in &ready {
                self.serve(*event);
            }
            if self.ticks && (self.carrier.now >= next_tick || self.carrier.shared.tick_soon.swap(false, Ordering::AcqRel)) {
                self.carrier.tick();
                next_tick = self.carrier.now + TICK;
            }
            self.carrier.end();
            if let Some(rounds) = self.carrier.shared.rounds.get(self.share.0) {
                rounds.fetch_add(1, Ordering::Release);
            }
        }
    }

    fn serve(&mut self, Ready { token, broken }: Ready) {
        match token {
            token::WAKER => {
                self.waker.clear();
                self.follow();
            }
            token::UDP_V4 => self.serve_udp(Family::V4),
            token::UDP_V6 => self.serve_udp(Family::V6),
            number => self.serve_tun(number, broken),
        }
    }

    /// Takes up TUNs that are new, and lets go of those that are gone.
    fn follow(&mut self) {
        let tuns = self.carrier.shared.tuns.load_full();
        let (position, count) = self.share;
        let is_ours = |id: &TunId| usize::try_from(id.0).is_ok_and(|number| number % count.max(1) == position);
        let wanted: Tuns = tuns
            .iter()
            .filter(|(id, _)| is_ours(id))
            .map(|(id, tun)| (*id, tun.clone()))
            .collect();
        for (id, tun) in &self.reading {
            if !wanted.contains_key(id) {
                let _was_broken = self.poller.remove(tun);
            }
        }
        for (id, tun) in &wanted {
            if !self.reading.contains_key(id)
                && let Err(error) = self.poller.add(tun, u64::from(id.0))
            {
                tracing::error!(?tun, %error, "cannot wait for packets of this TUN");
            }
        }
        (self.reading, self.carrier.tuns) = (wanted, tuns);
    }

    fn serve_udp(&mut self, family: Family) {
        let Self { carrier, receiver, .. } = self;
        if let Err(error) = receiver.receive(&carrier.udp, family) {
            tracing::warn!(%error, ?family, "cannot receive datagrams");
        }
        for (datagrams, segment, path) in receiver.received() {
            carrier.on_udp(datagrams, segment, path);
        }
    }

    fn serve_tun(&mut self, number: u64, broken: bool) {
        let Some((id, tun)) = u32::try_from(number).ok().map(TunId).and_then(|id| self.reading.get_key_value(&id)) else {
            return;
        };
        let mut header = [0; VNET_HEADER_LEN];
        for _ in 0..TUN_BATCH {
            match tun.read(&mut header, &mut self.packet) {
                Ok(length) => {
                    let Some(packet) = self.packet.get_mut(..length) else { continue };
                    self.carrier.on_tun(*id, packet, &header);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && !broken => return,
                Err(error) => {
                    // Its owner makes another one; until then it must not be reported again and again.
                    tracing::warn!(?tun, %error, "a TUN is gone");
                    let _ = self.poller.remove(tun);
                    self.carrier.shared.nudge.give();
                    return;
                }
            }
        }
    }
}

impl<P: PathPolicy, K: LocalKey> Carrier<P, K> {
    fn begin(&mut self) {
        self.now = clock::now();
        self.sender.set_underlay_mtu(self.shared.underlay_mtu.load(Ordering::Relaxed));
        self.worker.begin(&self.engine);
    }

    fn on_tun(&mut self, from: TunId, packet: &mut [u8], header: &[u8; VNET_HEADER_LEN]) {
        let Some(header) = VnetHeader::parse(header) else { return };
        self.engine.on_tun(&mut self.worker, from, packet, header, self.now);
        self.make_room();
    }

    fn on_udp(&mut self, datagrams: &mut [u8], segment: usize, path: Path) {
        let meta = Meta {
            from: path.remote,
            local: path.local,
            ecn: path.ecn,
        };
        self.engine.on_udp(&mut self.worker, datagrams, segment, meta, self.now);
        self.make_room();
    }

    fn tick(&mut self) {
        self.engine.on_tick(&mut self.worker, self.now);
    }

    fn make_room(&mut self) {
        if !self.worker.has_room() {
            self.hand_over();
        }
    }

    /// Gives the results to the kernel.
    fn hand_over(&mut self) {
        self.scribe.note(self.worker.denials(), self.now);
        for (datagram, to) in self.worker.udp() {
            let path = Path {
                remote: to.remote,
                local: to.local,
                ecn: to.ecn,
            };
            self.sender.push(&self.udp, datagram, path);
        }
        self.sender.flush(&self.udp);
        for (packet, to) in self.worker.tun() {
            let written = self
                .tuns
                .get(&to)
                .is_some_and(|tun| tun.write(&[0; VNET_HEADER_LEN], packet).is_ok());
            if !written {
                self.shared.tun_refused.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.worker.clear();
        let counts = self.sender.take_counts();
        self.shared.udp_refused.fetch_add(counts.refused, Ordering::Relaxed);
        self.shared.udp_fragmented.fetch_add(counts.fragmented, Ordering::Relaxed);
    }

    fn end(&mut self) {
        self.hand_over();
        self.worker.end();
    }
}
