//! Who calls, and whether they may: a handler that changes something takes a [`Permit`] of its scope, and cannot be called without.
//!
//! A missing, malformed, unknown, expired or revoked credential gets one and the same answer.

use std::marker::PhantomData;

use axum::extract::FromRequestParts;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use cloison_proto::api::{Problem, ProblemCode};

use super::ApiState;
use super::error::ApiError;
use crate::audit::{Actor, Context, RequestId};
use crate::credential::{Principal, Scope};

/// A scope as a type.
pub(super) trait Needs {
    /// The scope.
    const SCOPE: Scope;
}

macro_rules! scopes {
    ($($name:ident)*) => {$(
        /// The scope of this name.
        pub(super) struct $name;
        impl Needs for $name {
            const SCOPE: Scope = Scope::$name;
        }
    )*};
}

scopes!(Owner Policy Enroll Operate Read);

/// The caller's credential allows `S`.
pub(super) struct Permit<S> {
    /// Who calls.
    pub(super) principal: Principal,
    /// Which request it is.
    pub(super) request: Option<RequestId>,
    scope: PhantomData<S>,
}

impl<S> Permit<S> {
    /// What the audit is told.
    pub(super) fn context(&self) -> Context {
        Context {
            actor: Actor::Credential(self.principal.id),
            request: self.request,
        }
    }
}

impl<S: Needs> FromRequestParts<ApiState> for Permit<S> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, ApiError> {
        let refused = || {
            Problem::new(ProblemCode::Unauthorised, "no valid credential")
                .hint("send `Authorization: Bearer ..`; `cloison-coordinator credential` on the coordinator's machine makes a new one")
        };
        let header = parts.headers.get(AUTHORIZATION).and_then(|h| h.to_str().ok());
        let bearer = header
            .and_then(|h| h.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let (_, bearer) = bearer.ok_or_else(refused)?;
        let principal = state.store.authenticate(bearer.trim()).await?.ok_or_else(refused)?;
        if !principal.may(S::SCOPE) {
            let detail = format!("this needs the scope `{}`, which the credential does not have", S::SCOPE);
            return Err(Problem::new(ProblemCode::Forbidden, detail).into());
        }
        let request = parts.extensions.get::<RequestId>().copied();
        Ok(Self {
            principal,
            request,
            scope: PhantomData,
        })
    }
}
