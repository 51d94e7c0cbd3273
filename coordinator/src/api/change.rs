//! The request id: drawn for each request, kept with the audit entry of a change, and told in the answer's header, so that answer, log and
//! audit can be brought together.

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument as _;

use crate::audit::RequestId;

/// Header of the answer.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Names the request, for the handlers behind it and for the caller. Without randomness it stays nameless.
pub(super) async fn name_request(mut request: Request, next: Next) -> Response {
    let mut bytes = [0; 8];
    let id = getrandom::fill(&mut bytes).ok().map(|()| RequestId(bytes));
    let span =
        tracing::debug_span!("request", id = id.map(tracing::field::display), method = %request.method(), path = request.uri().path());
    if let Some(id) = id {
        request.extensions_mut().insert(id);
    }
    let mut response = next.run(request).instrument(span).await;
    if let Some(value) = id.and_then(|id| HeaderValue::from_str(&id.to_string()).ok()) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}
