//! What a component that is a part of its host costs the agent: how long after its cgroup is made the kernel knows it, and how much memory each
//! one takes.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cloison_agent::netlink::monitor::RulesMonitor;
use cloison_tests::lab::cgroup::Cgroup;
use cloison_tests::lab::mesh::Mesh;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use crate::REST;
use crate::machine::resident_kib;
use crate::report::Times;

/// The machine on which all of it is.
pub(crate) const HOST: &str = "many-1";
/// How often a cgroup is made.
const STARTS: usize = 100;
const STARTS_LIMIT: Duration = Duration::from_secs(5);
/// Components of each kind whose memory is taken together.
const CGROUPS: u32 = 100;
const NAMESPACES: u32 = 30;

/// See the module documentation.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Attached {
    /// From a cgroup's making to the change of nftables' sets that names it.
    pub(crate) start: Times,
    /// KiB of the agent for each component that is a cgroup, measured on a hundred.
    pub(crate) cgroup_kib: f64,
    /// KiB for each component in a network namespace of its own, measured on thirty.
    pub(crate) namespace_kib: f64,
}

/// Measures on a host that has no component yet.
pub(crate) fn measure(mesh: &mut Mesh, policy: &str) -> Result<Attached> {
    let host = mesh.host(HOST)?;
    let cgroup = |name: &str| Cgroup::create(host, name);
    let first = cgroup("first")?;
    let path = first.path().to_owned();
    let of_first = format!("  first: {{on: {HOST}, attach: {{cgroup: {path}}}}}\n");
    let net = host.net().clone();
    let many = (0..CGROUPS).map(|n| cgroup(&format!("c{n}"))).collect::<Result<Vec<_>>>()?;
    let spaces = (0..NAMESPACES)
        .map(|n| host.component_namespace(&format!("n{n}")))
        .collect::<Result<Vec<_>>>()?;
    let with = |more: String| policy.replace("allow:", &format!("{of_first}{more}allow:"));
    let of_many: String = (0..)
        .zip(&many)
        .map(|(n, one)| format!("  c{n}: {{on: {HOST}, attach: {{cgroup: {}}}}}\n", one.path()))
        .collect();
    let of_spaces: String = (0..)
        .zip(&spaces)
        .map(|(n, one)| format!("  n{n}: {{on: {HOST}, attach: {{netns: {}}}}}\n", one.path().display()))
        .collect();

    mesh.coordinator.apply_and_wait(&with(String::new()))?;
    let start = starts(mesh, net, first)?;
    let mut at_rest = |policy: &str| -> Result<f64> {
        mesh.coordinator.apply_and_wait(policy)?;
        std::thread::sleep(REST);
        Ok(f64::from(u32::try_from(resident_kib(mesh.agent_mut(HOST)?.process()?.id())?)?))
    };
    let alone = at_rest(&with(String::new()))?;
    let with_cgroups = at_rest(&with(of_many.clone()))?;
    let with_namespaces = at_rest(&with(of_many + &of_spaces))?;
    Ok(Attached {
        start,
        cgroup_kib: (with_cgroups - alone) / f64::from(CGROUPS),
        namespace_kib: (with_namespaces - with_cgroups) / f64::from(NAMESPACES),
    })
}

/// Takes the cgroup away and makes it again, as systemd does when it starts a unit, and waits for the kernel's word that a set has changed.
fn starts(mesh: &Mesh, net: cloison_tests::lab::netns::Netns, mut cgroup: Cgroup) -> Result<Times> {
    let mut monitor = net.enter(|| Ok(RulesMonitor::open()?))?;
    let mut times = Vec::with_capacity(STARTS);
    for _ in 0..STARTS {
        cgroup.remove()?;
        std::thread::sleep(Duration::from_millis(20));
        monitor.look();
        let begun = Instant::now();
        cgroup = Cgroup::create(mesh.host(HOST)?, "first")?;
        let limit = Timespec::try_from(STARTS_LIMIT)?;
        let heard = poll(&mut [PollFd::new(&monitor, PollFlags::IN)], Some(&limit))?;
        ensure!(heard > 0, "the agent did not notice a new cgroup");
        times.push(begun.elapsed().as_secs_f64() * 1e3);
        // What follows of the same change.
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Times::of(times))
}

impl Attached {
    /// A few lines.
    pub(crate) fn table(&self) -> String {
        format!(
            "a cgroup's making to its place in the sets: {}\nmemory of the agent: {:.0} KiB a component that is a cgroup, {:.0} KiB one in a namespace\n",
            self.start.p50_and_p99(),
            self.cgroup_kib,
            self.namespace_kib
        )
    }
}
