//! Calls of the REST API: one place that authorises, sends, and turns a refusal into a [`CliError`].

use std::time::Duration;

use cloison_proto::api::{PROBLEM_JSON, Problem, ProblemCode};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, RequestBuilder, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::Config;
use crate::error::CliError;
use crate::tls;

/// How long a call may take, from connecting to the last byte: a large policy over a slow line, and a margin.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// The API of one coordinator.
pub(crate) struct Client {
    http: reqwest::Client,
    url: String,
}

impl Client {
    /// A client of the coordinator that the configuration names.
    pub(crate) fn new(config: &Config) -> Result<Self, CliError> {
        let wrong = |why: String| CliError::Config {
            path: "the configuration".into(),
            why,
        };
        let tls = tls::client_config(&config.root_certificate).map_err(|e| wrong(e.to_string()))?;
        let mut bearer =
            HeaderValue::from_str(&format!("Bearer {}", config.credential)).map_err(|_| wrong("`credential` is no credential".into()))?;
        bearer.set_sensitive(true);
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .https_only(true)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(CALL_TIMEOUT)
            .connect_timeout(Duration::from_secs(5))
            .default_headers(HeaderMap::from_iter([(AUTHORIZATION, bearer)]))
            .build()
            .map_err(|e| wrong(e.to_string()))?;
        Ok(Self {
            http,
            url: config.url.trim_end_matches('/').to_owned(),
        })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}/v1/{path}", self.url))
    }

    /// `GET /v1/path`.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.call(self.request(Method::GET, path)).await
    }

    /// `GET /v1/path?query`.
    pub(crate) async fn query<T: DeserializeOwned>(&self, path: &str, query: &[(&str, &str)]) -> Result<T, CliError> {
        let pairs = query.iter().map(|(key, value)| format!("{key}={}", percent_encoded(value)));
        self.get(&format!("{path}?{}", pairs.collect::<Vec<_>>().join("&"))).await
    }

    /// `POST /v1/path` with a JSON body.
    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, CliError> {
        self.call(self.request(Method::POST, path).json(body)).await
    }

    /// `PUT /v1/path` with a JSON body and one condition, which keeps two edits from overwriting each other.
    pub(crate) async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        condition: (HeaderName, String),
        body: &impl Serialize,
    ) -> Result<T, CliError> {
        self.call(self.request(Method::PUT, path).header(condition.0, condition.1).json(body))
            .await
    }

    /// `DELETE /v1/path`.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), CliError> {
        self.send(self.request(Method::DELETE, path)).await.map(drop)
    }

    /// `DELETE /v1/path`, with an answer.
    pub(crate) async fn delete_for<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.call(self.request(Method::DELETE, path)).await
    }

    async fn call<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, CliError> {
        let answer = self.send(request).await?;
        answer.json().await.map_err(|e| CliError::Answer(e.into()))
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, CliError> {
        let unreachable = |e: reqwest::Error| CliError::Unreachable {
            url: self.url.clone(),
            source: e.without_url().into(),
        };
        let answer = request.send().await.map_err(unreachable)?;
        if answer.status().is_success() {
            Ok(answer)
        } else {
            Err(CliError::Refused(Box::new(problem(answer).await)))
        }
    }
}

async fn problem(answer: Response) -> Problem {
    let status = answer.status();
    let is_problem = answer
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|t| t.as_bytes().starts_with(PROBLEM_JSON.as_bytes()));
    match answer.json::<Problem>().await {
        Ok(problem) if is_problem => problem,
        Ok(_) | Err(_) => Problem::new(ProblemCode::Unknown, format!("the coordinator answered {status}")),
    }
}

/// The text with everything but unreserved characters as `%XX` (RFC 3986 section 2.1), for a path segment or a query's value.
pub(crate) fn percent_encoded(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
        out
    })
}
