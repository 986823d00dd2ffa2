//! Several connections over one socket, as NRI has them: each piece is sent with the number of its
//! connection and its length (containerd/nri, `pkg/net/multiplex`).
//!
//! Its one job is to carry bytes between the socket and the connections. Nothing is kept: a piece is
//! handed on as it arrives, so that what the other side says to come takes no memory here.

use std::convert::Infallible;
use std::io;

use tokio::io::{
    AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadHalf,
    WriteHalf, split,
};

/// The connection on which the runtime calls the plugin, and that on which the plugin calls it.
const PLUGIN: u32 = 1;
const RUNTIME: u32 = 2;
/// Number and length, four bytes each.
const HEADER: usize = 8;
/// The longest piece that a runtime may send: a message of ttrpc with its header.
const LONGEST: u32 = (4 << 20) + 10;
/// The longest that is sent: the other side reads a piece whole, into a buffer of this size, and
/// breaks off when it does not fit.
const OURS: usize = 4096;
/// What waits in a connection at most, in each direction.
const WAITING: usize = 64 << 10;

/// Why nothing is carried any more.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("it closed the connection")]
    Closed,
    #[error("it broke off within a piece of {wanted} bytes")]
    Truncated { wanted: usize },
    #[error("it sent {length} bytes for connection {connection}, and at most {LONGEST} are taken")]
    TooLong { connection: u32, length: u32 },
    #[error("it sent something for connection {connection}, and there are {PLUGIN} and {RUNTIME}")]
    UnknownConnection { connection: u32 },
    #[error("what was said on connection {connection} was not taken, since it is over here")]
    Over { connection: u32 },
    #[error("the connection failed: {0}")]
    Failed(#[from] io::Error),
}

/// The near ends of the connections that are carried.
pub(super) struct Ends {
    pub(super) plugin: DuplexStream,
    pub(super) runtime: DuplexStream,
}

/// The connections, as the carrier has them.
pub(super) struct Carried {
    plugin: DuplexStream,
    runtime: DuplexStream,
}

/// Both connections, and what is to be carried for them.
pub(super) fn connections() -> (Ends, Carried) {
    let (plugin, carried_plugin) = tokio::io::duplex(WAITING);
    let (runtime, carried_runtime) = tokio::io::duplex(WAITING);
    (Ends { plugin, runtime }, Carried { plugin: carried_plugin, runtime: carried_runtime })
}

/// Carries until it can not.
pub(super) async fn carry(
    socket: impl AsyncRead + AsyncWrite + Unpin,
    carried: Carried,
) -> FrameError {
    let (mut incoming, mut outgoing) = split(socket);
    let (mut from_plugin, mut to_plugin) = split(carried.plugin);
    let (mut from_runtime, mut to_runtime) = split(carried.runtime);
    let received = receive(&mut incoming, &mut to_plugin, &mut to_runtime);
    let sent = send(&mut outgoing, &mut from_plugin, &mut from_runtime);
    let ended = tokio::select! {
        ended = received => ended,
        ended = sent => ended,
    };
    let Err(error) = ended;
    error
}

async fn receive(
    incoming: &mut (impl AsyncRead + Unpin),
    to_plugin: &mut WriteHalf<DuplexStream>,
    to_runtime: &mut WriteHalf<DuplexStream>,
) -> Result<Infallible, FrameError> {
    let mut buffer = vec![0; OURS];
    loop {
        let header = header(incoming).await?;
        let [connection, length] = header;
        let to = match connection {
            PLUGIN => &mut *to_plugin,
            RUNTIME => &mut *to_runtime,
            connection => return Err(FrameError::UnknownConnection { connection }),
        };
        if length > LONGEST {
            return Err(FrameError::TooLong { connection, length });
        }
        let wanted = length as usize;
        let mut rest = wanted;
        while rest > 0 {
            let part = &mut buffer[..rest.min(OURS)];
            whole(incoming.read_exact(part).await.map(drop), wanted)?;
            to.write_all(part).await.map_err(|_closed| FrameError::Over { connection })?;
            rest -= part.len();
        }
    }
}

/// Number and length of the next piece.
async fn header(incoming: &mut (impl AsyncRead + Unpin)) -> Result<[u32; 2], FrameError> {
    let mut header = [0; HEADER];
    // Between two pieces it may end.
    let begun = incoming.read(&mut header).await?;
    if begun == 0 {
        return Err(FrameError::Closed);
    }
    whole(incoming.read_exact(&mut header[begun..]).await.map(drop), HEADER)?;
    let [a, b, c, d, e, f, g, h] = header;
    Ok([u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h])])
}

fn whole(read: io::Result<()>, wanted: usize) -> Result<(), FrameError> {
    read.map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            FrameError::Truncated { wanted }
        } else {
            FrameError::Failed(error)
        }
    })
}

async fn send(
    outgoing: &mut (impl AsyncWrite + Unpin),
    from_plugin: &mut ReadHalf<DuplexStream>,
    from_runtime: &mut ReadHalf<DuplexStream>,
) -> Result<Infallible, FrameError> {
    let mut of_plugin = vec![0; HEADER + OURS];
    let mut of_runtime = of_plugin.clone();
    loop {
        // A read that is given up has taken nothing.
        let (connection, piece, length) = tokio::select! {
            read = from_plugin.read(&mut of_plugin[HEADER..]) => (PLUGIN, &mut of_plugin, read?),
            read = from_runtime.read(&mut of_runtime[HEADER..]) => (RUNTIME, &mut of_runtime, read?),
        };
        if length == 0 {
            return Err(FrameError::Over { connection });
        }
        piece[..4].copy_from_slice(&connection.to_be_bytes());
        // At most `OURS`.
        piece[4..HEADER].copy_from_slice(&(length as u32).to_be_bytes());
        outgoing.write_all(&piece[..HEADER + length]).await?;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    /// A socket whose other side sends `bytes` and then, if `ends`, is closed.
    async fn after(bytes: &[u8]) -> (FrameError, Vec<u8>, Vec<u8>) {
        let (far, near) = tokio::io::duplex(1 << 20);
        let (mut ends, carried) = connections();
        let sent = bytes.to_vec();
        let (mut reads, mut writes) = split(far);
        let talk = async move {
            // It may be closed before all is said.
            let _refused = writes.write_all(&sent).await;
            let _closed = writes.shutdown().await;
            let mut rest = Vec::new();
            let _ended = reads.read_to_end(&mut rest).await;
        };
        let (mut plugin, mut runtime) = (Vec::new(), Vec::new());
        let take = async {
            let plugins = ends.plugin.read_to_end(&mut plugin);
            let runtimes = ends.runtime.read_to_end(&mut runtime);
            let _both = tokio::join!(plugins, runtimes);
        };
        let all = async { tokio::join!(carry(near, carried), talk, take) };
        let (error, (), ()) = timeout(Duration::from_secs(10), all).await.expect("it ends");
        (error, plugin, runtime)
    }

    fn piece(connection: u32, bytes: &[u8]) -> Vec<u8> {
        let length = u32::try_from(bytes.len()).unwrap();
        [&connection.to_be_bytes()[..], &length.to_be_bytes()[..], bytes].concat()
    }

    #[tokio::test]
    async fn pieces_reach_their_connections_in_order() {
        let long = vec![7; 3 * OURS + 1];
        let sent = [
            piece(PLUGIN, b"one"),
            piece(RUNTIME, b"other"),
            piece(PLUGIN, b""),
            piece(PLUGIN, &long),
        ];
        let (error, plugin, runtime) = after(&sent.concat()).await;
        assert!(matches!(error, FrameError::Closed), "{error}");
        assert_eq!(plugin, [&b"one"[..], &long].concat());
        assert_eq!(runtime, b"other");
    }

    #[tokio::test]
    async fn each_malformed_piece_has_an_error_of_its_own() {
        let (error, plugin, _) = after(&[piece(PLUGIN, b"one"), piece(3, b"two")].concat()).await;
        assert!(matches!(error, FrameError::UnknownConnection { connection: 3 }), "{error}");
        assert_eq!(plugin, b"one", "what came before was handed on");
        let (error, ..) = after(&piece(0, b"")).await;
        assert!(matches!(error, FrameError::UnknownConnection { connection: 0 }), "{error}");
        let (error, ..) = after(&[0, 0, 0]).await;
        assert!(matches!(error, FrameError::Truncated { wanted: HEADER }), "{error}");
        let cut = &piece(RUNTIME, b"four")[..HEADER + 3];
        let (error, _, runtime) = after(cut).await;
        assert!(matches!(error, FrameError::Truncated { wanted: 4 }), "{error}");
        assert_eq!(runtime, b"");
        let mut longer = piece(PLUGIN, b"");
        longer[4..].copy_from_slice(&(LONGEST + 1).to_be_bytes());
        let (error, ..) = after(&longer).await;
        assert!(matches!(error, FrameError::TooLong { connection: 1, .. }), "{error}");
        longer[4..].copy_from_slice(&u32::MAX.to_be_bytes());
        let (error, ..) = after(&longer).await;
        assert!(matches!(error, FrameError::TooLong { length: u32::MAX, .. }), "{error}");
    }

    #[tokio::test]
    async fn any_bytes_end_in_an_error_and_never_in_a_panic() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..300 {
            let bytes: Vec<u8> = (0..round)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    // Mostly small numbers, so that some of it is well formed.
                    if seed & 0x300 == 0 { (seed >> 32) as u8 } else { (seed >> 32) as u8 & 2 }
                })
                .collect();
            let _some_error = after(&bytes).await;
        }
    }

    #[tokio::test]
    async fn what_is_sent_fits_the_buffer_of_the_other_side() {
        let (far, near) = tokio::io::duplex(1 << 20);
        let (mut ends, carried) = connections();
        let carried = tokio::spawn(carry(near, carried));
        let message = vec![9; 2 * OURS + 1];
        ends.plugin.write_all(&message).await.unwrap();
        ends.runtime.write_all(b"register").await.unwrap();
        let (mut reads, writes) = split(far);
        let mut received = [Vec::new(), Vec::new()];
        while received[0].len() < message.len() || received[1].len() < 8 {
            let [connection, length] = header(&mut reads).await.unwrap();
            assert!((1..=OURS).contains(&(length as usize)), "{length}");
            let mut bytes = vec![0; length as usize];
            reads.read_exact(&mut bytes).await.unwrap();
            received[connection as usize - 1].extend(bytes);
        }
        assert_eq!(received, [message, b"register".to_vec()]);
        drop((reads, writes));
        assert!(matches!(carried.await.unwrap(), FrameError::Closed));
    }

    #[tokio::test]
    async fn a_piece_that_nobody_takes_waits_and_is_not_kept() {
        let (mut far, near) = tokio::io::duplex(1 << 20);
        let (ends, carried) = connections();
        let carried = tokio::spawn(carry(near, carried));
        let mut begin = piece(PLUGIN, b"");
        begin[4..].copy_from_slice(&LONGEST.to_be_bytes());
        far.write_all(&begin).await.unwrap();
        // The socket's own buffer, the connection's, and one part: no more is taken in.
        let mut sent = 0;
        let part = [1; OURS];
        while let Ok(written) = timeout(Duration::from_millis(200), far.write(&part)).await {
            sent += written.unwrap();
        }
        assert!(sent <= (1 << 20) + WAITING + 2 * OURS, "{sent}");
        let Ends { plugin, runtime: _open } = ends;
        drop(plugin);
        let ended = carried.await.unwrap();
        assert!(matches!(ended, FrameError::Over { connection: PLUGIN }), "{ended}");
    }
}
