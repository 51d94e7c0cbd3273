//! The REST API: JSON over TLS under `/v1`, bearer credentials, problem documents.
//!
//! A request passes through limits (size, time), gets a request id, is authorised by [`permit`] (a handler cannot be called without the
//! permit that it names), and ends in a handler of a few lines: read, call the store, map the result. The store judges the actor's scope
//! once more inside the transaction. The OpenAPI document is generated from these handlers and committed.

mod addresses;
mod audit;
mod bounds;
mod change;
mod credentials;
mod deadline;
mod error;
mod explain;
mod health;
mod hosts;
mod live;
mod metrics;
mod permit;
mod policy;
mod rotations;
mod server;
mod status;
mod tokens;

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::response::IntoResponse as _;
use axum::{Json, Router, middleware};
use cloison_proto::api::{MAX_BODY, Problem, ProblemCode};
use tower_http::timeout::TimeoutLayer;
use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use live::Live;
pub use server::{ApiServer, ServeError, stop};

use crate::publish::Policies;
use crate::store::Store;
use crate::trust::Roots;
use error::ApiError;

/// How long a request may take from its headers to its answer: the body's time, a full compile, and a margin.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// What handlers work with.
#[derive(Clone)]
pub struct ApiState {
    /// The mesh's state.
    pub store: Store,
    /// How hosts do right now.
    pub live: Arc<dyn Live>,
    /// What tokens say about the mesh.
    pub token_facts: TokenFacts,
    /// The coordinator's keys.
    pub roots: Arc<Roots>,
    /// The policy in force, read once.
    pub policies: Arc<Policies>,
}

/// What stands in every enrollment token besides its secret.
#[derive(Debug, Clone)]
pub struct TokenFacts {
    /// SHA-256 of the trust root's key.
    pub root_pin: [u8; 32],
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Cloison coordinator", description = "Operate a Cloison mesh: hosts, tokens, the policy, and why a packet passes or not."),
    security(("credential" = [])),
    tags(
        (name = "hosts", description = "Enrolled machines"),
        (name = "tokens", description = "What lets hosts join"),
        (name = "policy", description = "Who may talk to whom"),
        (name = "mesh", description = "The mesh at a glance"),
    )
)]
struct Description;

fn routes() -> (Router<ApiState>, utoipa::openapi::OpenApi) {
    let large = OpenApiRouter::new()
        .routes(routes!(policy::get, policy::put))
        .routes(routes!(policy::check))
        .layer(DefaultBodyLimit::max(cloison_proto::api::MAX_POLICY_BODY));
    let router = OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(hosts::list))
        .routes(routes!(hosts::show))
        .routes(routes!(hosts::label))
        .routes(routes!(hosts::revoke))
        .routes(routes!(hosts::rotate_key))
        .routes(routes!(hosts::components))
        .routes(routes!(hosts::component))
        .routes(routes!(tokens::list, tokens::create))
        .routes(routes!(tokens::revoke))
        .routes(routes!(credentials::list, credentials::create))
        .routes(routes!(credentials::revoke))
        .routes(routes!(credentials::rotate))
        .routes(routes!(addresses::list, addresses::add))
        .routes(routes!(addresses::remove))
        .routes(routes!(rotations::list, rotations::begin))
        .routes(routes!(rotations::verify))
        .routes(routes!(explain::explain))
        .routes(routes!(status::status))
        .routes(routes!(audit::list))
        .routes(routes!(health::healthz))
        .routes(routes!(health::readyz))
        .routes(routes!(metrics::metrics))
        .routes(routes!(document))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .merge(large);
    let (router, mut document) = router.split_for_parts();
    let components = document.components.get_or_insert_default();
    let bearer = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    components.security_schemes.insert("credential".to_owned(), bearer.into());
    (router, document)
}

/// The API as a service.
pub fn router(state: ApiState) -> Router {
    let unknown =
        || async { ApiError::from(Problem::new(ProblemCode::NotFound, "there is no such path").hint("GET /v1/openapi.json lists all")) };
    let method = || async { ApiError::from(Problem::new(ProblemCode::MethodNotAllowed, "this path does not take this method")) };
    let (router, _) = routes();
    router
        .fallback(unknown)
        .method_not_allowed_fallback(method)
        .with_state(state)
        .layer(middleware::from_fn(deadline::bound_body))
        .layer(TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, REQUEST_TIMEOUT))
        .layer(middleware::from_fn(change::name_request))
}

/// The OpenAPI document (3.1) of every endpoint, as committed.
///
/// # Errors
/// If the document cannot be written as JSON.
pub fn openapi() -> Result<String, serde_json::Error> {
    routes().1.to_pretty_json().map(|text| text + "\n")
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "mesh", security(()), responses((status = 200, description = "This document")))]
async fn document() -> axum::response::Response {
    // Made once: anybody may ask for it.
    static DOCUMENT: LazyLock<utoipa::openapi::OpenApi> = LazyLock::new(|| routes().1);
    Json(&*DOCUMENT).into_response()
}
