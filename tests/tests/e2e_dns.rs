//! Names over DNS: what real clients are told in the namespaces of a host, and what they are not.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::dns::{ask, getent};
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::netns::Netns;

/// The resolver's addresses, by the lab's ranges.
fn resolver(mesh: &Mesh) -> Result<[IpAddr; 2]> {
    let status = mesh.agent("app-1")?.status()?;
    let address =
        |index: usize| Ok::<IpAddr, anyhow::Error>(status["resolver"]["addresses"][index].as_str().context("an address")?.parse()?);
    Ok([address(0)?, address(1)?])
}

/// A mesh in which `front` and `other` live in namespaces of app-1, and may reach different components of the hosts db-1 and db-2.
fn start(name: &str) -> Result<(Mesh, Netns, Netns, String)> {
    let mut mesh = Mesh::builder(name, &["app-1", "db-1", "db-2"]).start()?;
    let app = mesh.host("app-1")?;
    let (front, other) = (app.component_namespace("front")?, app.component_namespace("other")?);
    let policy = format!(
        "version: 1\ncomponents:\n  \
           front:    {{on: app-1, attach: {{netns: {}}}, services: {{web: tcp/80}}}}\n  \
           other:    {{on: app-1, attach: {{netns: {}}}}}\n  \
           local:    {{on: app-1, attach: host}}\n  \
           postgres: {{on: [db-1, db-2], attach: host, services: {{sql: tcp/5432}}}}\n  \
           redis:    {{on: db-1, attach: {{netns: /run/netns/nowhere}}, services: {{store: tcp/6379}}}}\n  \
           secret:   {{on: db-2, attach: {{netns: /run/netns/nowhere}}, services: {{api: tcp/1}}}}\n\
         allow:\n  - front -> postgres:sql\n  - other -> redis:store\n  - local -> secret:api\n",
        front.path().display(),
        other.path().display(),
    );
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(&policy)?;
    Ok((mesh, front, other, policy))
}

#[test]
fn a_component_in_a_namespace_finds_what_it_may_reach_and_itself() -> Result<()> {
    let (mesh, front, _other, _) = start("e2e-dns")?;
    let [v4, v6] = resolver(&mesh)?;
    let answer = ask(&front, v4, "postgres.cloison.internal A")?;
    let (one, two) = (mesh.instance("postgres", "db-1")?, mesh.instance("postgres", "db-2")?);
    let mut told = answer.data("A");
    told.sort();
    let mut wanted = [one.v4.to_string(), two.v4.to_string()];
    wanted.sort();
    ensure!(
        told == wanted && answer.status == "NOERROR" && answer.flags == ["qr", "aa", "rd"],
        "{}",
        answer.text
    );
    let _ = (v6, getent, Duration::ZERO);
    mesh.finish()
}
