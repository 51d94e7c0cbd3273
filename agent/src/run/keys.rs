//! The change of the WireGuard key, step by step: make and keep the next key, take handshakes for it, prove it to the coordinator, use it once
//! the view names it, and forget the former one when the view names that no more. Which step is due follows from the disk and the view
//! ([`WgKeys::step`]) and from nothing else, so that an agent that is killed anywhere goes on where it was.

use std::sync::Arc;
use std::time::Duration;

use cloison_agent_core::wg::LocalKey as _;
use cloison_agent_core::wg::boringtun::BoringKey;
use cloison_proto::control::rotate::{Facts, KeyChallenge, prove};
use cloison_proto::key::{WgPrivateKey, WgPublicKey};
use cloison_proto::status::{Answer, KeyStage, KeyStatus};
use cloison_proto::version::Timestamp;
use cloison_proto::view::View;

use super::{Agent, blocking};
use crate::control::link::KeyNews;
use crate::dataplane::InForce;
use crate::state::keys::KeysError;
use crate::state::wg_keys::{Step, WgKeys};
use crate::status::problem;
use crate::sys::clock;

/// How long to wait for a view that names an offered key before it is offered again.
const OFFER_AGAIN: Duration = Duration::from_secs(30);

/// How long to wait after a refusal that a later offer may not meet.
const AFTER_REFUSAL: Duration = Duration::from_secs(600);

/// What is remembered of a change under way, and lost without harm.
#[derive(Debug, Default)]
pub(super) struct Rotation {
    /// When the next key may be offered.
    offer_from: Timestamp,
    /// Why the last offer was refused.
    refused: Option<String>,
}

/// The keys of the data plane under a view, the one for new handshakes first.
pub(super) fn local_keys(keys: &WgKeys, view: Option<&View>, held: &[Arc<BoringKey>]) -> Vec<Arc<BoringKey>> {
    let one = |key: &WgPrivateKey| {
        let public = key.public();
        let known = held.iter().find(|held| *held.public() == public);
        known.cloned().unwrap_or_else(|| Arc::new(BoringKey::new(key)))
    };
    keys.in_use(named(view)).into_iter().map(one).collect()
}

/// The keys of this host that a view names.
fn named(view: Option<&View>) -> &[WgPublicKey] {
    view.map_or(&[], |view| &view.host.wg_keys)
}

impl Agent {
    /// Takes the steps that are due.
    pub(super) async fn rotate(&mut self) {
        if let Err(error) = self.take_steps().await {
            tracing::error!(%error, "the change of the WireGuard key waits: trying again");
        }
    }

    async fn take_steps(&mut self) -> Result<(), KeysError> {
        let now = clock::now();
        let view = self.link.installed_content().cloned();
        let step = self.wg.step(named(view.as_deref()));
        match step {
            Step::Rest if self.is_key_old(now)? => {
                tracing::info!("the WireGuard key is old: changing it");
                self.wg.make_next(&self.dir)?;
            }
            Step::Rest => return Ok(()),
            Step::Make => {
                tracing::warn!("the mesh works with a WireGuard key that is not in the state directory: making another one");
                self.wg.make_next(&self.dir)?;
            }
            Step::Overlap => self.rotation.refused = None,
            Step::Offer | Step::Promote => {}
        }
        // Handshakes for a key are taken before anybody can hear of it.
        if !self.use_keys(view).await {
            return Ok(());
        }
        if step == Step::Promote {
            self.wg.promote(&self.dir, self.link.mesh_time(now))?;
            tracing::info!(key = %self.wg.current().public(), "the former WireGuard key is forgotten");
        } else if step == Step::Offer && now >= self.rotation.offer_from {
            let outputs = self.link.offer_key();
            if !outputs.is_empty() {
                self.rotation.offer_from = now + OFFER_AGAIN;
                // What is sent here causes no further change of keys: the box only tells the compiler that this ends.
                Box::pin(self.carry_out(outputs)).await;
            }
        }
        Ok(())
    }

    /// Has the data plane use the keys that the view and the disk ask for; whether it does.
    async fn use_keys(&mut self, view: Option<Arc<View>>) -> bool {
        let wanted = local_keys(&self.wg, view.as_deref(), &self.local_keys);
        let publics = |keys: &[Arc<BoringKey>]| keys.iter().map(|key| *key.public()).collect::<Vec<_>>();
        if publics(&wanted) == publics(&self.local_keys) {
            return true;
        }
        let Some(view) = view else {
            self.local_keys = wanted;
            return true;
        };
        let in_force = InForce {
            view,
            keys: wanted.clone(),
            lease: self.lease_term(clock::now()),
        };
        let dataplane = self.dataplane.clone();
        match blocking(move || dataplane.lock().apply(in_force)).await {
            Ok(Ok(_)) => {
                self.local_keys = wanted;
                true
            }
            Ok(Err(conflict)) => {
                tracing::error!(%conflict, "the data plane did not take the WireGuard keys: trying again");
                false
            }
            Err(error) => {
                tracing::error!(%error, "the data plane did not take the WireGuard keys: trying again");
                false
            }
        }
    }

    /// Whether the present key has been in use for as long as it may. From its first view on its age counts.
    fn is_key_old(&mut self, now: Timestamp) -> Result<bool, KeysError> {
        let (Some(lifetime), true) = (self.config.key_lifetime, self.link.view().is_some()) else {
            return Ok(false);
        };
        let mesh = self.link.mesh_time(now);
        match self.wg.since() {
            None => {
                self.wg.note_since(&self.dir, mesh)?;
                Ok(false)
            }
            Some(since) => Ok(mesh >= since.plus(jittered(lifetime, &self.wg.current().public()))),
        }
    }

    /// What the coordinator says about the change.
    pub(super) async fn key_news(&mut self, news: KeyNews) {
        match news {
            KeyNews::Asked => {
                tracing::info!("an operator asks for a new WireGuard key");
                if let Err(error) = self.wg.make_next(&self.dir) {
                    tracing::error!(%error, "no new WireGuard key could be made");
                }
                Box::pin(self.rotate()).await;
            }
            KeyNews::Challenge(challenge) => self.prove_next(challenge).await,
            KeyNews::Denied(denied) if self.wg.next().is_some_and(|next| next.public() == denied.wg_key) => {
                tracing::warn!(code = denied.code, "the coordinator does not take the new WireGuard key");
                let in_view = named(self.link.installed_content().map(|view| &**view)).contains(&denied.wg_key);
                if denied.code == "key_known" && !in_view {
                    // It stood in a view once, and never will again.
                    if let Err(error) = self.wg.drop_next(&self.dir) {
                        tracing::error!(%error, "the refused key could not be removed");
                    }
                }
                self.rotation.offer_from = clock::now() + AFTER_REFUSAL;
                self.rotation.refused = Some(denied.code);
            }
            KeyNews::Denied(_) => {}
        }
    }

    async fn prove_next(&mut self, challenge: KeyChallenge) {
        let (Some(next), Some(frames)) = (self.wg.next(), self.session.frames()) else {
            return;
        };
        let exporter = match frames.exporter() {
            Ok(exporter) => exporter,
            Err(error) => return tracing::error!(%error, "the new WireGuard key cannot be proven on this link"),
        };
        let facts = Facts {
            exporter: &exporter,
            host: self.us.host,
            ephemeral: &challenge.ephemeral,
            alone: self.wg.is_alone(named(self.link.installed_content().map(|view| &**view))),
        };
        let outputs = self.link.prove_key(prove(facts, &self.identity, next));
        Box::pin(self.carry_out(outputs)).await;
    }

    /// A link begins: what the last one refused, this one may take.
    pub(super) fn key_link_begins(&mut self) {
        self.rotation = Rotation::default();
    }

    /// Answers the command: a next key is made and kept at once, and offered at the next tick.
    pub(super) fn rotate_by_command(&mut self) -> Answer {
        match self.wg.make_next(&self.dir) {
            Ok(()) => {
                self.rotation = Rotation::default();
                self.duties.soon();
                Answer::RotateKey(self.key_status())
            }
            Err(error) => problem(
                "no_key",
                &format!("no new key could be made: {error}"),
                "check the disk of the state directory",
            ),
        }
    }

    /// How far a change is.
    pub(super) fn key_status(&self) -> KeyStatus {
        let now = self.link.mesh_time(clock::now());
        let current = self.wg.current().public();
        let stage = match self.wg.step(named(self.link.installed_content().map(|view| &**view))) {
            Step::Rest => KeyStage::Settled,
            Step::Make | Step::Offer => KeyStage::Offered,
            Step::Overlap | Step::Promote => KeyStage::Overlap,
        };
        let due = self.config.key_lifetime.zip(self.wg.since());
        KeyStatus {
            current,
            next: self.wg.next().map(WgPrivateKey::public),
            stage,
            changes_in_secs: due.map(|(lifetime, since)| since.plus(jittered(lifetime, &current)).0.saturating_sub(now.0)),
            refused: self.rotation.refused.clone(),
        }
    }
}

/// Nine to eleven tenths of the lifetime, by the key, so that hosts that joined together do not change together.
fn jittered(lifetime: Duration, key: &WgPublicKey) -> Duration {
    let [share, ..] = *key.as_bytes();
    lifetime / 10 * 9 + lifetime / 5 * u32::from(share) / 255
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_are_spread_by_a_tenth_to_either_side() {
        let lifetime = Duration::from_secs(1_000);
        let all: Vec<_> = (1..=64u8)
            .map(|seed| jittered(lifetime, &WgPrivateKey::from_bytes([seed; 32]).public()))
            .collect();
        assert!(all.iter().all(|l| (900..=1_100).contains(&l.as_secs())), "{all:?}");
        assert!(all.iter().max() > all.iter().min());
    }
}
