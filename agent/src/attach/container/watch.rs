//! The watch over one runtime: a thread that knows at any time which container each match of the view means, so that nobody else waits for
//! the runtime.
//!
//! It begins when a view asks for the first container, and connects to nobody before. An event of the runtime, or the end of a process that
//! was found, makes it look again at once, at most [twenty times a second](GAP); a look that finds a change gives a nudge. While events come, it
//! looks once more every [30 s](CALM) all the same. Without them (a runtime that restarts, or that shows none) it looks every [3 s](RESTLESS).
//! Who cannot be asked about keeps the container that was found, for as long as its process lives: a runtime may be restarted or upgraded while its
//! containers run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cloison_proto::policy::{ContainerMatch, Engine};
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant as Moment, sleep_until};

use super::ContainerError;
use super::api::{Api, ApiError, Event, Events};
use super::found::Found;
use super::look::look;
use crate::attach::nudge::Nudge;
use crate::sys::with_causes;

/// Shortest time between two looks.
const GAP: Duration = Duration::from_millis(50);
/// Longest time between two looks while events come.
const CALM: Duration = Duration::from_secs(30);
/// Longest time between two looks without events; the first ones come sooner.
const RESTLESS: Duration = Duration::from_secs(3);
/// After how long the first look without events is repeated; each further pause is twice as long.
const SOON: Duration = Duration::from_millis(200);
/// How long the first answer about a container is waited for. A runtime that is there answers in milliseconds.
const FIRST_ANSWER: Duration = Duration::from_secs(2);

/// Which container it is, or why there is none.
pub type Answer = Result<Arc<Found>, ContainerError>;

/// A watch. It ends when it is dropped.
#[derive(Debug)]
pub struct Watch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    engine: Engine,
    socket: PathBuf,
    asked: Mutex<BTreeMap<ContainerMatch, Asked>>,
    /// An answer changed.
    answered: Condvar,
    /// What is asked for changed, or the watch is to end.
    wake: Notify,
    ending: AtomicBool,
    nudge: Nudge,
}

#[derive(Debug)]
struct Asked {
    since: Instant,
    answer: Option<Answer>,
}

impl Watch {
    /// Begins a watch over the runtime at this socket, which gives `nudge` whenever an answer changes.
    ///
    /// # Errors
    /// The kernel's: no threads, no descriptors.
    pub fn start(engine: Engine, socket: &Path, nudge: Nudge) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            engine,
            socket: socket.into(),
            asked: Mutex::default(),
            answered: Condvar::new(),
            wake: Notify::new(),
            ending: AtomicBool::new(false),
            nudge,
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let watcher = Watcher::new(shared.clone());
        std::thread::Builder::new()
            .name(format!("{engine}-watch"))
            .spawn(move || runtime.block_on(watcher.run()))?;
        Ok(Self(shared))
    }

    /// Asks for these containers from now on, and for no others.
    pub fn ask_for(&self, wanted: &BTreeSet<&ContainerMatch>) {
        let mut asked = self.0.asked.lock();
        asked.retain(|which, _| wanted.contains(which));
        let new = wanted.iter().filter(|which| !asked.contains_key(**which)).count();
        for which in wanted {
            asked.entry((*which).clone()).or_insert_with(Asked::now);
        }
        drop(asked);
        if new > 0 {
            self.0.wake.notify_one();
        }
    }

    /// Which container `which` is. Asks for it if that was not done; the first answer is waited for, for two seconds at most since it was
    /// asked for.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub fn answer(&self, which: &ContainerMatch) -> Answer {
        let mut asked = self.0.asked.lock();
        if !asked.contains_key(which) {
            asked.insert(which.clone(), Asked::now());
            self.0.wake.notify_one();
        }
        loop {
            let known = asked.get(which).map(|known| (known.since, known.answer.clone()));
            match known {
                Some((_, Some(answer))) => return answer,
                Some((since, None)) if !self.0.answered.wait_until(&mut asked, since + FIRST_ANSWER).timed_out() => {}
                Some((_, None)) | None => return Err(self.0.silent(&ApiError::Slow)),
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.ending.store(true, Ordering::Release);
        self.0.wake.notify_one();
    }
}

impl Asked {
    fn now() -> Self {
        Self {
            since: Instant::now(),
            answer: None,
        }
    }
}

impl Shared {
    /// Why a runtime that gives no answer gives none.
    fn silent(&self, error: &ApiError) -> ContainerError {
        let (engine, socket) = (self.engine, self.socket.clone());
        match error {
            ApiError::Connect(e) if e.kind() == std::io::ErrorKind::NotFound => ContainerError::NoSocket { engine, socket },
            ApiError::Connect(_) | ApiError::Broken(_) | ApiError::Slow | ApiError::Status(_) | ApiError::Body(_) | ApiError::Json(_) => {
                ContainerError::Silent {
                    engine,
                    socket,
                    why: with_causes(error),
                }
            }
        }
    }

    /// Takes note of an answer.
    fn take(&self, which: &ContainerMatch, new: Answer) {
        let mut asked = self.asked.lock();
        let Some(known) = asked.get_mut(which) else { return };
        let is_same = match (&known.answer, &new) {
            (Some(Ok(old)), Ok(new)) => Arc::ptr_eq(old, new),
            (Some(Err(old)), Err(new)) => old.to_string() == new.to_string(),
            (None | Some(_), _) => false,
        };
        if is_same {
            return;
        }
        match &new {
            Ok(found) => tracing::info!(container = found.shown(), "found"),
            Err(why) => tracing::info!(%why, "no container"),
        }
        known.answer = Some(new);
        drop(asked);
        self.answered.notify_all();
        self.nudge.give();
    }

    fn known(&self, which: &ContainerMatch) -> Option<Answer> {
        self.asked.lock().get(which).and_then(|known| known.answer.clone())
    }

    fn all_asked(&self) -> Vec<ContainerMatch> {
        self.asked.lock().keys().cloned().collect()
    }

    /// Whether an event may change what one of the answers says. Health checks alone make several a minute in each container.
    fn concerns(&self, event: &Event) -> bool {
        const WITHOUT: [&str; 7] = [
            "exec_create",
            "exec_start",
            "exec_die",
            "exec_detach",
            "health_status",
            "exec",
            "exec_died",
        ];
        let action = event.action.split(':').next().unwrap_or_default();
        if WITHOUT.contains(&action) {
            return false;
        }
        // A name goes over to another container by a renaming; what is not understood may be anything.
        if action == "rename" || event.action.is_empty() {
            return true;
        }
        let said = &event.actor.attributes;
        let is_it = |which: &ContainerMatch| match which {
            ContainerMatch::Name(name) => said.get("name").is_none_or(|said| said == name.as_str()),
            ContainerMatch::Label(key, value) => said.get(key.as_str()).is_some_and(|said| said == value.as_str()),
        };
        self.asked.lock().keys().any(is_it)
    }
}

/// The thread of a watch.
struct Watcher {
    shared: Arc<Shared>,
    api: Api,
    events: Option<Events>,
    /// Processes whose end is waited for, by what they were found for.
    alive: BTreeMap<ContainerMatch, (Arc<Found>, Vigil)>,
    ended: JoinSet<Option<(ContainerMatch, Arc<Found>)>>,
    pause: Duration,
}

/// Ends the waiting for a process.
struct Vigil(AbortHandle);

impl Drop for Vigil {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Watcher {
    fn new(shared: Arc<Shared>) -> Self {
        let api = Api::new(&shared.socket);
        Self {
            shared,
            api,
            events: None,
            alive: BTreeMap::new(),
            ended: JoinSet::new(),
            pause: SOON,
        }
    }

    async fn run(mut self) {
        while !self.shared.ending.load(Ordering::Acquire) {
            let asked = self.shared.all_asked();
            self.alive.retain(|which, _| asked.contains(which));
            if asked.is_empty() {
                self.events = None;
                self.shared.wake.notified().await;
                continue;
            }
            // Before the look, so that nothing falls in between.
            if self.events.is_none() {
                self.events = self.api.events().await.ok();
            }
            let began = Moment::now();
            self.look_for_all(&asked).await;
            self.wait(began).await;
        }
    }

    async fn look_for_all(&mut self, asked: &[ContainerMatch]) {
        for (done, which) in asked.iter().enumerate() {
            let known = self.shared.known(which).and_then(Result::ok);
            match look(&self.api, self.shared.engine, which, known.as_ref()).await {
                Ok(answer) => {
                    self.wait_for_end(which, answer.as_ref().ok());
                    self.shared.take(which, answer);
                }
                Err(error) => {
                    // The others would wait as long, for the same.
                    for which in asked.iter().skip(done) {
                        self.go_without(which, &error);
                    }
                    return;
                }
            }
        }
    }

    /// The runtime does not answer: what was found stays while it lives.
    fn go_without(&mut self, which: &ContainerMatch, error: &ApiError) {
        match self.shared.known(which) {
            Some(Ok(known)) if !known.process().has_ended() => {}
            _ => self.shared.take(which, Err(self.shared.silent(error))),
        }
    }

    /// Waits beside all else for the end of what was found.
    fn wait_for_end(&mut self, which: &ContainerMatch, found: Option<&Arc<Found>>) {
        let Some(found) = found else {
            self.alive.remove(which);
            return;
        };
        if self.alive.get(which).is_some_and(|(known, _)| Arc::ptr_eq(known, found)) {
            return;
        }
        let (of, it) = (which.clone(), found.clone());
        let vigil = self.ended.spawn(async move {
            let end = it.process().clone().end().await;
            // Without a descriptor to wait by, the end is found by the next look.
            end.is_ok().then_some((of, it))
        });
        self.alive.insert(which.clone(), (found.clone(), Vigil(vigil)));
    }

    /// Until there is a reason for another look, which began last at `began`.
    async fn wait(&mut self, began: Moment) {
        let longest = if self.events.is_some() { CALM } else { self.pause };
        self.pause = if self.events.is_some() {
            SOON
        } else {
            (self.pause * 2).min(RESTLESS)
        };
        loop {
            tokio::select! {
                () = self.shared.wake.notified() => return,
                event = next(&mut self.events) => match event {
                    Some(event) if self.shared.concerns(&event) => break,
                    Some(_) => {}
                    None => {
                        self.events = None;
                        // What ended may come back, and a runtime that shows no events is not asked for them without a pause.
                        sleep_until(began + SOON).await;
                        return;
                    }
                },
                Some(ended) = self.ended.join_next() => if let Ok(Some((which, found))) = ended {
                    self.is_over(&which, &found);
                    break;
                },
                () = sleep_until(began + longest) => return,
            }
        }
        sleep_until(began + GAP).await;
    }

    /// A process ended. The runtime may not know yet; the container is gone all the same.
    fn is_over(&mut self, which: &ContainerMatch, found: &Arc<Found>) {
        if let Some(Ok(known)) = self.shared.known(which)
            && Arc::ptr_eq(&known, found)
        {
            let (engine, which) = (self.shared.engine, which.clone());
            self.shared.take(&which.clone(), Err(ContainerError::NoneRuns { engine, which }));
        }
    }
}

/// The next event, if there are events.
async fn next(events: &mut Option<Events>) -> Option<Event> {
    match events {
        Some(events) => events.next().await,
        None => std::future::pending().await,
    }
}
