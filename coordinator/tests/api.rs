//! The REST API over a real store: who may do what, and what bad input gets. The publisher is one to whom nobody is linked.

use std::collections::BTreeSet;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use cloison_coordinator::api::{self, ApiState, Live, TokenFacts};
use cloison_coordinator::audit::{Actor, Context};
use cloison_coordinator::clock::{ManualClock, MeshClock};
use cloison_coordinator::credential::Scope;
use cloison_coordinator::entropy::{Environment, SystemEntropy};
use cloison_coordinator::inventory::CoordinatorAddress;
use cloison_coordinator::policy::explain::{HostLive, LiveState};
use cloison_coordinator::store::{CredentialSpec, NewMesh, Redemption, Store, TokenSpec};
use cloison_coordinator::trust::Roots;
use cloison_proto::api::{
    AuditList, ComponentList, ComponentSummary, EnforcementState, Explanation, HostList, MeshStatus, PolicyAnswer, PolicyCheck, Problem,
    ProblemCode, TokenCreated, TokenList,
};
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::{Secret32, SigningKey, WgPrivateKey};
use cloison_proto::label::LabelSet;
use cloison_proto::net::OverlayRange;
use cloison_proto::token::EnrollmentToken;
use cloison_proto::verdict::DropReason;
use cloison_proto::version::{MeshTime, Version};
use cloison_proto::view::Items;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tower::ServiceExt as _;

type Outcome = Result<(), Box<dyn Error>>;

const POLICY: &str = "version: 1
components:
  n8n: {on: app-1, attach: host}
  postgres: {on: db-1, attach: host, services: {sql: tcp/5432}}
allow:
  - n8n -> postgres:sql
";

/// A publisher to whom nobody is linked.
struct NobodyLinked(Store);

impl LiveState for NobodyLinked {
    fn live(&self, _: HostId) -> HostLive {
        HostLive::default()
    }
}

impl Live for NobodyLinked {
    fn published(&self) -> Version {
        self.0.inventory().version
    }

    fn refusal(&self, _: HostId) -> Option<String> {
        None
    }

    fn endpoints(&self, _: HostId) -> Vec<String> {
        Vec::new()
    }

    fn is_cloned(&self, _: HostId) -> bool {
        false
    }

    fn in_force(&self) -> Vec<(HostId, Option<Arc<Items>>)> {
        Vec::new()
    }

    fn wish_for_key(&self, _: HostId) -> bool {
        false
    }
}

struct Api {
    store: Store,
    router: Router,
    owner: String,
}

struct Answer {
    status: StatusCode,
    etag: Option<String>,
    media: String,
    body: Vec<u8>,
}

impl Answer {
    fn json<T: DeserializeOwned>(&self) -> Result<T, Box<dyn Error>> {
        Ok(serde_json::from_slice(&self.body)?)
    }

    fn problem(&self) -> Result<Problem, Box<dyn Error>> {
        assert_eq!(self.media, "application/problem+json", "{}", String::from_utf8_lossy(&self.body));
        let problem: Problem = self.json()?;
        assert_eq!(problem.status, self.status.as_u16());
        Ok(problem)
    }
}

impl Api {
    /// Has a machine become a host of this name.
    async fn join(&self, name: &str, machine: u8) -> Result<HostId, Box<dyn Error>> {
        let spec = TokenSpec {
            uses: 1,
            lifetime: Duration::from_secs(3600),
            name: name.parse()?,
            labels: LabelSet::new(),
            source: None,
        };
        let token = self.store.create_token(Context::of(Actor::Local), spec).await?;
        let attempt = Redemption {
            token: token.id,
            secret: Secret32::from_bytes(*token.secret.expose()),
            wg_key: WgPrivateKey::from_bytes([machine; 32]).public(),
            identity: SigningKey::from_seed(&[machine; 32]).identity(),
            source: [192, 0, 2, 1].into(),
        };
        Ok(self.store.redeem_token(&attempt).await?.host.id)
    }

    async fn new() -> Result<Self, Box<dyn Error>> {
        Self::at(Environment::system()).await
    }

    async fn at(env: Environment) -> Result<Self, Box<dyn Error>> {
        let mesh = NewMesh {
            mesh: MeshId([7; 16]),
            overlay: OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?,
            lease: Duration::from_secs(86_400),
            addresses: vec![CoordinatorAddress {
                address: "192.0.2.1:7443".into(),
                not_before: MeshTime(0),
            }],
        };
        let store = Store::in_memory(env, mesh).await?;
        let state = ApiState {
            store: store.clone(),
            live: Arc::new(NobodyLinked(store.clone())),
            token_facts: TokenFacts { root_pin: [9; 32] },
            roots: Arc::new(Roots::generate(MeshId([7; 16]), &Environment::system())?),
            policies: Arc::default(),
        };
        let mut api = Self {
            store,
            router: api::router(state),
            owner: String::new(),
        };
        api.owner = api.credential(&[Scope::Owner]).await?;
        Ok(api)
    }

    async fn credential(&self, scopes: &[Scope]) -> Result<String, Box<dyn Error>> {
        let scopes: BTreeSet<_> = scopes.iter().copied().collect();
        let spec = CredentialSpec {
            name: "test".into(),
            scopes,
            lifetime: Duration::from_secs(3600),
        };
        Ok(self
            .store
            .create_credential(Context::of(Actor::Local), spec)
            .await?
            .text
            .reveal()
            .to_string())
    }

    async fn send(&self, request: Request<Body>) -> Result<Answer, Box<dyn Error>> {
        let response = self.router.clone().oneshot(request).await?;
        let text = |name| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let (status, etag, media) = (
            response.status(),
            text(header::ETAG),
            text(header::CONTENT_TYPE).unwrap_or_default(),
        );
        let body = axum::body::to_bytes(response.into_body(), 1 << 24).await?.to_vec();
        Ok(Answer { status, etag, media, body })
    }

    async fn call(&self, method: Method, path: &str, bearer: &str, body: Option<Value>) -> Result<Answer, Box<dyn Error>> {
        let request = Request::builder()
            .method(method)
            .uri(format!("/v1/{path}"))
            .header(header::AUTHORIZATION, format!("Bearer {bearer}"));
        let request = request
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::IF_MATCH, "*");
        self.send(request.body(body.map_or_else(Body::empty, |b| Body::from(b.to_string())))?)
            .await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Box<dyn Error>> {
        let answer = self.call(Method::GET, path, &self.owner, None).await?;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", String::from_utf8_lossy(&answer.body));
        answer.json()
    }

    async fn put_policy(&self, text: &str, condition: (header::HeaderName, &str)) -> Result<Answer, Box<dyn Error>> {
        let request = Request::put("/v1/policy").header(header::AUTHORIZATION, format!("Bearer {}", self.owner));
        let request = request
            .header(header::CONTENT_TYPE, "application/json")
            .header(condition.0, condition.1);
        self.send(request.body(Body::from(json!({ "policy": text }).to_string()))?).await
    }
}

/// Every endpoint, and the scopes of which any one opens it; none means that it needs no credential.
const MATRIX: &[(&str, &str, &[Scope])] = &[
    (
        "GET",
        "hosts",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    (
        "GET",
        "hosts/db-1",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    ("POST", "hosts/db-1/labels", &[Scope::Operate, Scope::Owner]),
    ("POST", "hosts/db-1/revoke", &[Scope::Operate, Scope::Owner]),
    ("POST", "hosts/db-1/rotate-key", &[Scope::Operate, Scope::Owner]),
    (
        "GET",
        "components",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    (
        "GET",
        "components/n8n",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    (
        "GET",
        "tokens",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    ("POST", "tokens", &[Scope::Enroll, Scope::Owner]),
    ("DELETE", "tokens/token_0000000000000000", &[Scope::Enroll, Scope::Owner]),
    ("GET", "credentials", &[Scope::Owner]),
    ("POST", "credentials", &[Scope::Owner]),
    ("DELETE", "credentials/cred_0000000000000000", &[Scope::Owner]),
    ("POST", "credentials/cred_0000000000000000/rotate", &[Scope::Owner]),
    (
        "GET",
        "addresses",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    ("POST", "addresses", &[Scope::Owner]),
    (
        "GET",
        "rotations",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    ("POST", "rotations", &[Scope::Owner]),
    (
        "GET",
        "verify/credentials",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    ("DELETE", "addresses/192.0.2.9:7443", &[Scope::Owner]),
    (
        "GET",
        "policy",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    ("PUT", "policy", &[Scope::Policy, Scope::Owner]),
    (
        "POST",
        "policy/check",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    (
        "GET",
        "explain?from=a&to=b:*",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    (
        "GET",
        "status",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    (
        "GET",
        "audit",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    (
        "GET",
        "metrics",
        &[Scope::Read, Scope::Policy, Scope::Enroll, Scope::Operate, Scope::Owner],
    ),
    ("GET", "healthz", &[]),
    ("GET", "readyz", &[]),
    ("GET", "openapi.json", &[]),
];

#[tokio::test]
async fn each_endpoint_opens_to_its_scopes_and_to_no_other() -> Outcome {
    let api = Api::new().await?;
    for scope in Scope::ALL {
        let bearer = api.credential(&[scope]).await?;
        for (method, path, scopes) in MATRIX {
            let answer = api.call(method.parse()?, path, &bearer, Some(json!({}))).await?;
            let refused = matches!(answer.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            assert_eq!(
                refused,
                !scopes.is_empty() && !scopes.contains(&scope),
                "{scope} {method} {path}: {}",
                answer.status
            );
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_matrix_names_every_endpoint_of_the_document() -> Outcome {
    let document: Value = serde_json::from_str(&api::openapi()?)?;
    let mut documented = BTreeSet::new();
    for (path, item) in document["paths"].as_object().ok_or("no paths")? {
        for method in item.as_object().ok_or("no methods")?.keys() {
            documented.insert(format!("{} {}", method.to_uppercase(), path.split('{').next().unwrap_or(path)));
        }
    }
    let named = |(method, path, _): &(&str, &str, &[Scope])| {
        let path = path
            .split('?')
            .next()
            .unwrap_or(path)
            .replace("token_0000000000000000", "")
            .replace("cred_0000000000000000/rotate", "")
            .replace("cred_0000000000000000", "")
            .replace("192.0.2.9:7443", "")
            .replace("components/n8n", "components/")
            .replace("hosts/db-1/labels", "hosts/")
            .replace("hosts/db-1/revoke", "hosts/")
            .replace("hosts/db-1/rotate-key", "hosts/");
        format!("{method} /v1/{}", path.replace("hosts/db-1", "hosts/"))
    };
    assert_eq!(documented, MATRIX.iter().map(named).collect());
    Ok(())
}

#[tokio::test]
async fn every_bad_credential_gets_the_same_answer() -> Outcome {
    let api = Api::new().await?;
    let mut flipped = api.owner.clone().into_bytes();
    let last = flipped.len() - 2;
    flipped[last] ^= 1;
    let mut answers = BTreeSet::new();
    for bearer in ["", "x", "cloison_0000000000000000_AAAA", &String::from_utf8(flipped)?] {
        let answer = api.call(Method::GET, "status", bearer, None).await?;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
        answers.insert(answer.body);
    }
    let none = api.send(Request::get("/v1/status").body(Body::empty())?).await?;
    assert_eq!(none.problem()?.code, ProblemCode::Unauthorised);
    answers.insert(none.body);
    assert_eq!(answers.len(), 1);
    Ok(())
}

#[tokio::test]
async fn an_edit_that_would_overwrite_another_is_refused() -> Outcome {
    let api = Api::new().await?;
    assert_eq!(
        api.put_policy(POLICY, (header::ACCEPT, "*/*")).await?.problem()?.code,
        ProblemCode::PreconditionRequired
    );
    let first = api.put_policy(POLICY, (header::IF_NONE_MATCH, "*")).await?;
    assert_eq!(first.status, StatusCode::OK, "{}", String::from_utf8_lossy(&first.body));
    let change = first.json::<PolicyAnswer>()?.change.ok_or("no change")?;
    assert_eq!((change.opened.len(), change.closed.len()), (1, 0));
    assert_eq!(
        api.put_policy(POLICY, (header::IF_NONE_MATCH, "*")).await?.problem()?.code,
        ProblemCode::PolicyChanged
    );
    let etag = first.etag.ok_or("no etag")?;
    let second = api.put_policy("version: 1\n", (header::IF_MATCH, &etag)).await?;
    assert_eq!(second.status, StatusCode::OK);
    assert_eq!(
        api.put_policy(POLICY, (header::IF_MATCH, &etag)).await?.problem()?.code,
        ProblemCode::PolicyChanged
    );
    assert_eq!(api.get::<PolicyAnswer>("policy").await?.policy, "version: 1\n", "nothing is lost");
    Ok(())
}

#[tokio::test]
async fn a_bad_policy_is_told_with_all_places_and_changes_nothing() -> Outcome {
    let api = Api::new().await?;
    let bad = "version: 1\ncomponents:\n  n8n: {on: app-1, attach: host, colour: red}\nallow:\n  - n8n -> postgress:sql\n";
    let problem = api.put_policy(bad, (header::IF_NONE_MATCH, "*")).await?.problem()?;
    assert_eq!(problem.code, ProblemCode::PolicyInvalid);
    let lines: Vec<_> = problem.diagnostics.iter().map(|d| d.line).collect();
    assert_eq!(lines, [3, 5]);
    assert!(api.store.inventory().policy.is_none());
    let check = api
        .call(Method::POST, "policy/check", &api.owner, Some(json!({ "policy": bad })))
        .await?
        .json::<PolicyCheck>()?;
    assert!(!check.valid && check.diagnostics.len() == 2);
    Ok(())
}

#[tokio::test]
async fn a_token_is_shown_once_and_reads_back() -> Outcome {
    let api = Api::new().await?;
    let answer = api
        .call(
            Method::POST,
            "tokens",
            &api.owner,
            Some(json!({"host": "db-1", "labels": {"role": "db"}})),
        )
        .await?;
    assert_eq!(answer.status, StatusCode::CREATED);
    let created: TokenCreated = answer.json()?;
    let token: EnrollmentToken = created.token.parse()?;
    assert_eq!(
        (token.id, token.root_pin, token.addresses),
        (created.id, [9; 32], vec!["192.0.2.1:7443".to_owned()])
    );
    let list = api.call(Method::GET, "tokens", &api.owner, None).await?;
    assert!(!String::from_utf8_lossy(&list.body).contains(created.token.get(20..40).ok_or("short")?));
    assert_eq!(list.json::<TokenList>()?.tokens.first().map(|t| t.uses_left), Some(1));
    let gone = api
        .call(Method::DELETE, &format!("tokens/{}", created.id), &api.owner, None)
        .await?;
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
    assert!(
        api.get::<TokenList>("tokens")
            .await?
            .tokens
            .first()
            .is_some_and(|t| t.revoked_at.is_some())
    );
    let audit: AuditList = api.get("audit?after=0&limit=500").await?;
    let actions: Vec<_> = audit.entries.iter().map(|e| e.action.as_str()).collect();
    assert!(
        actions.contains(&"token.create") && actions.contains(&"token.revoke"),
        "{actions:?}"
    );
    assert!(
        audit.entries.iter().rev().take(1).all(|e| e.request_id.is_some()),
        "the audit names the request"
    );
    Ok(())
}

#[tokio::test]
async fn bad_input_gets_a_code_and_a_hint_and_repeats_nothing() -> Outcome {
    let api = Api::new().await?;
    let cases = [
        (Method::POST, "tokens", json!({"host": "NOT A NAME-canary"}), ProblemCode::Invalid),
        (Method::POST, "tokens", json!({"hosts": "canary"}), ProblemCode::Invalid),
        (Method::POST, "tokens", json!({"uses": 0}), ProblemCode::Invalid),
        (Method::POST, "tokens", json!({"source": "canary"}), ProblemCode::Invalid),
        (Method::POST, "hosts/canary/revoke", json!({}), ProblemCode::NotFound),
        (
            Method::POST,
            "hosts/db-1/labels",
            json!({"set": {"Canary": "x"}}),
            ProblemCode::Invalid,
        ),
        (Method::GET, "explain?from=a", json!(null), ProblemCode::BadRequest),
        (Method::GET, "explain?from=a&to=b", json!(null), ProblemCode::Invalid),
        (
            Method::GET,
            "explain?from=canary&to=postgres:sql",
            json!(null),
            ProblemCode::NotFound,
        ),
        (Method::GET, "canary", json!(null), ProblemCode::NotFound),
        (Method::DELETE, "status", json!(null), ProblemCode::MethodNotAllowed),
        (Method::DELETE, "tokens/canary", json!(null), ProblemCode::NotFound),
    ];
    for (method, path, body, code) in cases {
        let answer = api.call(method.clone(), path, &api.owner, Some(body)).await?;
        let problem = answer.problem()?;
        assert_eq!(problem.code, code, "{method} {path}");
        assert!(
            problem.hint.is_some() || code != ProblemCode::Invalid,
            "{method} {path} has no hint"
        );
    }
    let large = json!({ "host": "a".repeat(100_000) });
    assert_eq!(
        api.call(Method::POST, "tokens", &api.owner, Some(large)).await?.problem()?.code,
        ProblemCode::TooLarge
    );
    Ok(())
}

#[tokio::test]
async fn explain_and_status_before_anybody_joined_say_so() -> Outcome {
    let api = Api::new().await?;
    assert_eq!(api.get::<MeshStatus>("status").await?.policy_version, 0);
    api.put_policy(POLICY, (header::IF_NONE_MATCH, "*")).await?;
    let explanation: Explanation = api.get("explain?from=n8n&to=postgres:sql").await?;
    assert!(
        explanation.allowed && explanation.pairs.is_empty() && !explanation.notes.is_empty(),
        "{explanation:?}"
    );
    let reverse: Explanation = api.get("explain?from=postgres&to=n8n:tcp/80").await?;
    assert_eq!((reverse.allowed, reverse.reason), (false, Some(DropReason::NoRule)));
    let status: MeshStatus = api.get("status").await?;
    assert_eq!((status.hosts, status.components, status.rules), (0, 2, 1));
    assert!(api.get::<HostList>("hosts").await?.hosts.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_component_is_shown_by_its_name_with_what_is_known_of_its_instances() -> Outcome {
    let api = Api::new().await?;
    let unknown = api.call(Method::GET, "components/n8n", &api.owner, None).await?;
    assert_eq!(unknown.problem()?.code, ProblemCode::NotFound, "there is no policy yet");
    api.put_policy(POLICY, (header::IF_NONE_MATCH, "*")).await?;
    api.join("app-1", 1).await?;
    let shown: ComponentSummary = api.get("components/n8n").await?;
    let [instance] = &*shown.instances else {
        return Err("one instance".into());
    };
    assert_eq!(
        (instance.host.as_str(), instance.enforcement),
        ("app-1", EnforcementState::Unknown),
        "nobody said"
    );
    let all: ComponentList = api.get("components").await?;
    assert_eq!(all.components.first(), Some(&shown));
    for bad in ["n8n-2", "N8N", "%00", "..%2Fhosts"] {
        let answer = api.call(Method::GET, &format!("components/{bad}"), &api.owner, None).await?;
        assert_eq!(answer.problem()?.code, ProblemCode::NotFound, "{bad}");
    }
    Ok(())
}

/// `CLOISON_WRITE_OPENAPI=1 cargo test -p cloison-coordinator --test api` writes it anew.
#[test]
fn the_committed_openapi_document_is_the_generated_one() -> Outcome {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi/v1.json");
    let generated = api::openapi()?;
    if std::env::var_os("CLOISON_WRITE_OPENAPI").is_some() {
        std::fs::create_dir_all(concat!(env!("CARGO_MANIFEST_DIR"), "/openapi"))?;
        std::fs::write(path, &generated)?;
    }
    let committed = std::fs::read_to_string(path)?;
    assert!(
        committed == generated,
        "coordinator/openapi/v1.json is out of date: run `make openapi`"
    );
    Ok(())
}

#[tokio::test]
async fn hosts_without_contact_are_warned_of_at_half_and_more_of_their_lease() -> Outcome {
    let clock = ManualClock::starting_at(MeshTime(1_800_000_000));
    let env = Environment {
        clock: MeshClock::over(clock.clone()),
        entropy: Arc::new(SystemEntropy),
    };
    let mut api = Api::at(env).await?;
    let host = api.join("db-1", 1).await?;
    api.store.record_seen(host, 1).await?;
    // Of a lease of 24 hours: (hours since the last contact, hosts at 50, 80 and 95 %, what the warning says).
    for (hours, counts, says) in [
        (11, [0, 0, 0], None),
        (13, [1, 0, 0], Some("50 %")),
        (23, [1, 1, 1], Some("95 %")),
        (25, [1, 1, 1], Some("longer")),
    ] {
        clock.advance(Duration::from_secs(hours * 3600));
        api.owner = api.credential(&[Scope::Owner]).await?;
        let text = String::from_utf8(api.call(Method::GET, "metrics", &api.owner, None).await?.body)?;
        for (percent, count) in [50, 80, 95].into_iter().zip(counts) {
            let sample = format!("cloison_hosts_lease_used{{at_least_percent=\"{percent}\"}} {count}\n");
            assert!(text.contains(&sample), "after {hours} h: {text}");
        }
        let warnings = api.get::<MeshStatus>("status").await?.warnings;
        let warned = warnings.iter().find(|w| w.contains("db-1 was not in contact"));
        match says {
            Some(says) => assert!(warned.is_some_and(|w| w.contains(says)), "after {hours} h: {warnings:?}"),
            None => assert_eq!(warned, None),
        }
        api.store.record_seen(host, 1).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_wall_clock_that_was_set_back_is_a_warning_and_stops_nothing() -> Outcome {
    let start = MeshTime(1_800_000_000);
    let clock = ManualClock::starting_at(start);
    let env = Environment {
        clock: MeshClock::over(clock.clone()),
        entropy: Arc::new(SystemEntropy),
    };
    let mut api = Api::at(env).await?;
    for (seconds, says) in [(60, None), (0, None), (3 * 3600, None), (0, Some("3h behind"))] {
        clock.set_wall(start.plus(Duration::from_secs(seconds)));
        api.owner = api.credential(&[Scope::Owner]).await?;
        let warnings = api.get::<MeshStatus>("status").await?.warnings;
        let warned = warnings.iter().find(|w| w.contains("wall clock"));
        assert_eq!(warned.is_some(), says.is_some(), "{warnings:?}");
        assert!(
            says.is_none_or(|says| warned.is_some_and(|w| w.contains(says) && w.contains("timedatectl"))),
            "{warnings:?}"
        );
    }
    Ok(())
}
