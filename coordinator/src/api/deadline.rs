//! The time that a request's body has: all of it, however steadily it dribbles.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use cloison_proto::api::{Problem, ProblemCode};
use http_body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep};

use super::error::ApiError;

/// How long a request's body may take, from the end of the headers.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Ends the body of a request when its time is over, and answers for it.
pub(super) async fn bound_body(request: Request, next: Next) -> Response {
    let late = Arc::new(AtomicBool::new(false));
    let bounded = request.map(|body| {
        Body::new(Deadline {
            body,
            end: Box::pin(sleep(BODY_TIMEOUT)),
            late: Arc::clone(&late),
        })
    });
    let response = next.run(bounded).await;
    if late.load(Ordering::Relaxed) {
        let problem = Problem::new(ProblemCode::Timeout, "the body took too long to arrive");
        return ApiError::from(problem.hint(format!("a body has {} s", BODY_TIMEOUT.as_secs()))).into_response();
    }
    response
}

/// A body that fails after `end`.
struct Deadline {
    body: Body,
    end: Pin<Box<Sleep>>,
    late: Arc<AtomicBool>,
}

impl HttpBody for Deadline {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.end.as_mut().poll(cx).is_ready() {
            self.late.store(true, Ordering::Relaxed);
            return Poll::Ready(Some(Err(axum::Error::new("the body took too long to arrive"))));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
