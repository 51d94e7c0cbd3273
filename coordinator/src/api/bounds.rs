//! Bounds of the API's connections, before TLS costs anything: how many there are at once, how many from one network, and how long one may
//! be silent. Who is beyond them is closed without a word.

use std::collections::HashMap;
use std::future::{self, Future as _, Ready};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum_server::accept::Accept;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::control::limit::network;

/// Most connections at once: below the 1,024 open files that a process has at the least, with room for links and the database.
const MAX_CONNECTIONS: usize = 512;

/// Most of them from one network.
const MAX_PER_NETWORK: usize = 64;

/// How long a connection may move nothing: longer than any request takes.
const IDLE: Duration = Duration::from_secs(60);

/// Accepts connections within the bounds. All clones count together.
#[derive(Debug, Clone, Default)]
pub(super) struct Bounds(Arc<Mutex<Open>>);

#[derive(Debug, Default)]
struct Open {
    all: usize,
    from: HashMap<IpAddr, usize>,
}

impl Bounds {
    /// A place for one more connection from `source`, if there is one.
    fn place(&self, source: IpAddr) -> Option<Place> {
        let (mut open, network) = (self.0.lock(), network(source));
        if open.all >= MAX_CONNECTIONS || open.from.get(&network).is_some_and(|from| *from >= MAX_PER_NETWORK) {
            return None;
        }
        open.all += 1;
        *open.from.entry(network).or_default() += 1;
        Some(Place {
            bounds: self.clone(),
            network,
        })
    }
}

/// One connection's place; free again when it is dropped.
#[derive(Debug)]
struct Place {
    bounds: Bounds,
    network: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.bounds.0.lock();
        open.all = open.all.saturating_sub(1);
        if let Some(from) = open.from.get_mut(&self.network) {
            *from = from.saturating_sub(1);
            if *from == 0 {
                open.from.remove(&self.network);
            }
        }
    }
}

impl<S> Accept<TcpStream, S> for Bounds {
    type Stream = Bounded<TcpStream>;
    type Service = S;
    type Future = Ready<io::Result<(Self::Stream, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let place = stream.peer_addr().map(|peer| self.place(peer.ip()));
        future::ready(place.and_then(|place| match place {
            Some(place) => Ok((Bounded::new(stream, place), service)),
            None => Err(io::Error::other("too many connections")),
        }))
    }
}

/// A connection with its place. It fails when nothing moved on it for [`IDLE`].
#[derive(Debug)]
pub(super) struct Bounded<T> {
    stream: T,
    idle: Pin<Box<Sleep>>,
    _place: Place,
}

impl<T> Bounded<T> {
    fn new(stream: T, place: Place) -> Self {
        Self {
            stream,
            idle: Box::pin(sleep(IDLE)),
            _place: place,
        }
    }

    /// What moved something puts the end off; what waits, waits for the end too.
    fn within<R>(&mut self, moved: Poll<io::Result<R>>, cx: &mut Context<'_>) -> Poll<io::Result<R>> {
        if moved.is_ready() {
            self.idle.as_mut().reset(Instant::now() + IDLE);
            return moved;
        }
        ready!(self.idle.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Bounded<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let moved = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.within(moved, cx)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Bounded<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let moved = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.within(moved, cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let moved = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.within(moved, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn one_network_cannot_take_every_place_and_places_come_back() {
        let bounds = Bounds::default();
        let from = |n: u16| IpAddr::from([0x2001, 0xdb8, 0, n, 0, 0, 0, 1]);
        let places: Vec<_> = std::iter::repeat_with(|| bounds.place(from(0))).take(100).flatten().collect();
        assert_eq!(places.len(), MAX_PER_NETWORK);
        let others: Vec<_> = (1..1_000).filter_map(|n| bounds.place(from(n))).collect();
        assert_eq!(places.len() + others.len(), MAX_CONNECTIONS);
        drop(places);
        assert!(bounds.place(from(0)).is_some());
        drop(others);
        assert!(bounds.0.lock().from.is_empty() && bounds.0.lock().all == 0);
    }

    #[tokio::test]
    async fn a_silent_connection_ends_and_one_that_moves_does_not() -> Result<(), Box<dyn std::error::Error>> {
        let place = Bounds::default().place([192, 0, 2, 1].into()).ok_or("no place")?;
        let (near, mut far) = tokio::io::duplex(8);
        let mut near = Bounded::new(near, place);
        near.idle.as_mut().reset(Instant::now() + Duration::from_millis(50));
        far.write_all(b"x").await?;
        assert_eq!(near.read_u8().await?, b'x');
        let left = near.idle.deadline().saturating_duration_since(Instant::now());
        assert!(left > Duration::from_secs(50), "what moves puts the end off");
        near.idle.as_mut().reset(Instant::now() + Duration::from_millis(50));
        let ended = near.read_u8().await.map_err(|error| error.kind());
        assert_eq!(ended, Err(io::ErrorKind::TimedOut));
        Ok(())
    }
}
