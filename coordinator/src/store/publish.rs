//! What the publisher needs beside the notes of `contact`.

use super::Store;
use super::change::{Reach, Urgency};
use super::error::StoreError;
use crate::audit::{Action, Actor, Context, Object};

impl Store {
    /// Raises the revision although nothing in the store changed, and returns it: for views that change by themselves, because another
    /// program compiles them.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn raise_revision(&self) -> Result<u64, StoreError> {
        match self.try_raise_revision().await {
            Err(StoreError::StorageFull) if self.make_room() => self.try_raise_revision().await,
            done => done,
        }
    }

    async fn try_raise_revision(&self) -> Result<u64, StoreError> {
        let change = self.begin_unjudged(Context::of(Actor::Coordinator), Urgency::Urgent).await?;
        change.finish(Reach::Revision, Action::MeshSet, &[Object::Mesh]).await
    }
}
