//! A runtime of the tests' own at the other end of a socket.

use std::sync::Mutex;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use ttrpc::proto::{
    Codec as _, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader, Status,
};

use super::*;

/// What it was told, and what it answers.
#[derive(Debug, Default)]
struct Told {
    connected: Mutex<Vec<RuntimeName>>,
    starts: Mutex<Vec<Start>>,
    answer: Option<String>,
    takes: Duration,
}

impl Plugin for Told {
    fn trust(&self, _: u32) -> Result<(), String> {
        Err("nobody is".to_owned())
    }

    fn connected(&self, runtime: &RuntimeName) {
        self.connected.lock().unwrap().push(runtime.clone());
    }

    async fn starts(&self, start: Start, _: Duration) -> Result<(), String> {
        self.starts.lock().unwrap().push(start);
        tokio::time::sleep(self.takes).await;
        self.answer.clone().map_or(Ok(()), Err)
    }
}

/// The runtime's end.
struct Runtime {
    far: DuplexStream,
    stream: u32,
}

impl Runtime {
    async fn piece(&mut self) -> (u32, Vec<u8>) {
        let connection = self.far.read_u32().await.unwrap();
        let mut bytes = vec![0; self.far.read_u32().await.unwrap() as usize];
        self.far.read_exact(&mut bytes).await.unwrap();
        (connection, bytes)
    }

    /// The next message of a connection.
    async fn message(&mut self, connection: u32) -> (MessageHeader, Vec<u8>) {
        let mut bytes = Vec::new();
        loop {
            let (of, piece) = self.piece().await;
            assert_eq!(of, connection);
            bytes.extend(piece);
            if bytes.len() >= 10 {
                let header = MessageHeader::from(&bytes[..10]);
                if bytes.len() == 10 + header.length as usize {
                    return (header, bytes.split_off(10));
                }
            }
        }
    }

    async fn say(&mut self, connection: u32, header: MessageHeader, message: &[u8]) {
        let bytes = [Vec::from(header), message.to_vec()].concat();
        // In two, as runtimes do.
        for part in [&bytes[..10], &bytes[10..]] {
            self.far.write_u32(connection).await.unwrap();
            self.far.write_u32(part.len() as u32).await.unwrap();
            self.far.write_all(part).await.unwrap();
        }
    }

    async fn registered(&mut self) -> RegisterPluginRequest {
        let (header, message) = self.message(2).await;
        let request = Request::decode(message).unwrap();
        assert_eq!(header.type_, MESSAGE_TYPE_REQUEST);
        assert_eq!((request.service(), request.method()), (RUNTIME_SERVICE, "RegisterPlugin"));
        let answer = Response::new().encode().unwrap();
        let header = MessageHeader::new_response(header.stream_id, answer.len() as u32);
        self.say(2, header, &answer).await;
        RegisterPluginRequest::decode(&*request.payload).unwrap()
    }

    async fn call(&mut self, method: &str, payload: Vec<u8>) -> Result<Vec<u8>, Status> {
        self.call_within(method, payload, 0).await
    }

    async fn call_within(
        &mut self,
        method: &str,
        payload: Vec<u8>,
        milliseconds: i64,
    ) -> Result<Vec<u8>, Status> {
        let mut request = Request::new();
        request.set_service(PLUGIN_SERVICE.to_owned());
        request.set_method(method.to_owned());
        request.set_payload(payload);
        request.set_timeout_nano(milliseconds * 1_000_000);
        let bytes = request.encode().unwrap();
        self.stream += 2;
        let header = MessageHeader::new_request(self.stream, bytes.len() as u32);
        self.say(1, header, &bytes).await;
        let (header, message) = self.message(1).await;
        assert_eq!((header.stream_id, header.type_), (self.stream, MESSAGE_TYPE_RESPONSE));
        let response = Response::decode(message).unwrap();
        let status = response.status.into_option().filter(|status| status.code() != Code::OK);
        status.map_or(Ok(response.payload), Err)
    }
}

/// A plugin that is connected, and the runtime it is a plugin of.
async fn connected(told: Told) -> (Arc<Told>, Runtime, tokio::task::JoinHandle<NriError>) {
    let (far, near) = tokio::io::duplex(1 << 20);
    let told = Arc::new(told);
    let plugin = Arc::clone(&told);
    let talks = tokio::spawn(async move {
        let Err(error) = talk(near, plugin).await;
        error
    });
    let mut runtime = Runtime { far, stream: 1 };
    let plugin = runtime.registered().await;
    assert_eq!((plugin.plugin_name.as_str(), plugin.plugin_idx.as_str()), ("agentguard", "10"));
    let configure = ConfigureRequest {
        runtime_name: "containerd".to_owned(),
        runtime_version: "2.1.0".to_owned(),
    };
    let answer = runtime.call("Configure", configure.encode_to_vec()).await.unwrap();
    let asked = ConfigureResponse::decode(&*answer).unwrap();
    assert_eq!(asked.events, 0b10_0001, "a sandbox that runs, and a container that starts");
    (told, runtime, talks)
}

fn pod() -> PodSandbox {
    PodSandbox {
        id: "s".to_owned(),
        name: "researcher-0".to_owned(),
        uid: "5c1a6f0e-7e0e-4b5e-9a52-8a1f0f6f3b11".to_owned(),
        namespace: "agents".to_owned(),
        labels: [("app".to_owned(), "researcher".to_owned())].into(),
        runtime_handler: "runc".to_owned(),
        linux: Some(LinuxPodSandbox {
            namespaces: vec![messages::LinuxNamespace { r#type: "ipc".to_owned() }],
        }),
        pid: 41,
    }
}

fn starting() -> messages::Container {
    messages::Container {
        id: "c".to_owned(),
        pod_sandbox_id: "s".to_owned(),
        name: "agent".to_owned(),
        labels: Labels::new(),
        args: vec!["agent".to_owned(), "--flag".to_owned()],
        env: vec!["PATH=/first".to_owned(), "PATH=/bin".to_owned()],
        pid: 42,
    }
}

#[tokio::test]
async fn a_runtime_is_answered_before_each_start() {
    let (told, mut runtime, talks) = connected(Told::default()).await;
    let part = SynchronizeRequest { more: true }.encode_to_vec();
    let answer = runtime.call("Synchronize", part).await.unwrap();
    assert!(SynchronizeResponse::decode(&*answer).unwrap().more);
    assert_eq!(*told.connected.lock().unwrap(), []);
    runtime.call("Synchronize", Vec::new()).await.unwrap();
    let name = RuntimeName { name: "containerd".to_owned(), version: "2.1.0".to_owned() };
    assert_eq!(*told.connected.lock().unwrap(), [name]);

    let state_change = |event: Event, container| StateChangeEvent {
        event: event as i32,
        pod: Some(pod()),
        container,
    };
    let of_sandbox = state_change(Event::RunPodSandbox, None).encode_to_vec();
    runtime.call("StateChange", of_sandbox).await.unwrap();
    let of_container = state_change(Event::StartContainer, Some(starting())).encode_to_vec();
    runtime.call("StateChange", of_container).await.unwrap();
    let request = StartRequest { pod: Some(pod()), container: None };
    runtime.call("RunPodSandbox", request.encode_to_vec()).await.unwrap();
    let request = StartRequest { pod: Some(pod()), container: Some(starting()) };
    runtime.call("StartContainer", request.encode_to_vec()).await.unwrap();

    let sandbox = Sandbox {
        id: "s".to_owned(),
        pod: Pod {
            uid: PodUid::new("5c1a6f0e-7e0e-4b5e-9a52-8a1f0f6f3b11").unwrap(),
            namespace: "agents".to_owned(),
            name: "researcher-0".to_owned(),
            service_account: None,
            labels: [("app".to_owned(), "researcher".to_owned())].into(),
            host_network: true,
            runtime_class: None,
        },
        handler: "runc".to_owned(),
        cgroup: None,
    };
    let container = StartingContainer {
        id: "c".to_owned(),
        name: "agent".to_owned(),
        labels: Labels::new(),
        command: Some(Command { executable: "agent".to_owned(), search_path: "/bin".to_owned() }),
    };
    let of_sandbox = Start { pid: 41, sandbox: sandbox.clone(), container: None };
    let of_container = Start { pid: 42, sandbox, container: Some(container) };
    let both = [of_sandbox, of_container];
    assert_eq!(*told.starts.lock().unwrap(), [both.clone(), both].concat());

    // Nothing that was not asked for counts, and a sandbox without a process is none of this kernel.
    let other = StateChangeEvent { event: 11, pod: Some(pod()), container: Some(starting()) };
    runtime.call("StateChange", other.encode_to_vec()).await.unwrap();
    let elsewhere = PodSandbox { pid: 0, ..pod() };
    let request = StartRequest { pod: Some(elsewhere), container: None };
    runtime.call("RunPodSandbox", request.encode_to_vec()).await.unwrap();
    assert_eq!(told.starts.lock().unwrap().len(), 4);
    drop(runtime);
    assert!(matches!(talks.await.unwrap(), NriError::Over(FrameError::Closed)));
}

#[tokio::test]
async fn what_is_not_held_is_an_error_that_says_why_and_the_connection_stays() {
    let told = Told { answer: Some("no identity".to_owned()), ..Told::default() };
    let (_told, mut runtime, _talks) = connected(told).await;
    let request = StartRequest { pod: Some(pod()), container: Some(starting()) };
    for _ in 0..3 {
        let refused = runtime.call("StartContainer", request.encode_to_vec()).await.unwrap_err();
        assert_eq!(refused.code(), Code::FAILED_PRECONDITION);
        assert_eq!(refused.message(), "no identity");
    }
}

#[tokio::test]
async fn an_answer_comes_before_the_runtime_gives_up() {
    let told = Told { takes: Duration::from_secs(60), ..Told::default() };
    let (_told, mut runtime, _talks) = connected(told).await;
    let request = StartRequest { pod: Some(pod()), container: Some(starting()) };
    let begin = tokio::time::Instant::now();
    let refused = runtime.call_within("StartContainer", request.encode_to_vec(), 600).await;
    assert!(begin.elapsed() < Duration::from_millis(600), "{:?}", begin.elapsed());
    assert_eq!(refused.unwrap_err().code(), Code::UNAVAILABLE);
}

#[test]
fn what_a_runtime_waits_is_not_used_up() {
    for (told, patience) in [(0, 1600), (2000, 1600), (600, 300), (-5, 1600), (10_000, 9600)] {
        assert_eq!(super::patience(told * 1_000_000), Duration::from_millis(patience), "{told}");
    }
}

#[tokio::test]
async fn what_can_not_be_read_is_refused_by_name() {
    let (told, mut runtime, talks) = connected(Told::default()).await;
    let refused = async |runtime: &mut Runtime, pod, container| {
        let request = StartRequest { pod, container };
        let refused = runtime.call("StartContainer", request.encode_to_vec()).await.unwrap_err();
        assert_eq!(refused.code(), Code::INVALID_ARGUMENT);
        refused.message().to_owned()
    };
    let runtime = &mut runtime;
    assert!(refused(runtime, None, Some(starting())).await.starts_with("pod: is missing"));
    assert!(refused(runtime, Some(pod()), None).await.starts_with("container: is missing"));
    let stray = PodSandbox { namespace: String::new(), ..pod() };
    let why = refused(runtime, Some(stray), Some(starting())).await;
    assert!(why.starts_with("pod.namespace: is missing"), "{why}");
    let stray = PodSandbox { uid: "../x".to_owned(), ..pod() };
    assert!(refused(runtime, Some(stray), Some(starting())).await.starts_with("pod.uid"));
    let stray = messages::Container { pod_sandbox_id: "other".to_owned(), ..starting() };
    let why = refused(runtime, Some(pod()), Some(stray)).await;
    assert!(why.starts_with("container.pod_sandbox_id: \"other\""), "{why}");
    let stray = messages::Container { id: String::new(), ..starting() };
    assert!(refused(runtime, Some(pod()), Some(stray)).await.starts_with("container.id"));
    let refused = runtime.call("RunPodSandbox", Vec::new()).await.unwrap_err();
    assert_eq!(refused.code(), Code::INVALID_ARGUMENT);
    assert!(refused.message().starts_with("pod: is missing"), "{}", refused.message());
    for method in ["Configure", "Synchronize", "StateChange", "RunPodSandbox", "StartContainer"] {
        let refused = runtime.call(method, vec![0xff; 20]).await.unwrap_err();
        assert_eq!(refused.code(), Code::INVALID_ARGUMENT, "{method}");
        assert!(refused.message().contains(method), "{}", refused.message());
    }
    assert_eq!(runtime.call("Unheard", Vec::new()).await.unwrap_err().code(), Code::UNIMPLEMENTED);
    assert_eq!(*told.starts.lock().unwrap(), []);

    // A message that is none is answered too, and one of a connection that is none ends it.
    let header = MessageHeader::new_request(99, 3);
    runtime.say(1, header, &[0xff; 3]).await;
    let (header, message) = runtime.message(1).await;
    assert_eq!(header.stream_id, 99);
    let status = Response::decode(message).unwrap().status.into_option();
    assert_eq!(status.map(|status| status.code()), Some(Code::INVALID_ARGUMENT));
    runtime.say(7, MessageHeader::default(), b"").await;
    let ended = talks.await.unwrap();
    assert!(
        matches!(ended, NriError::Over(FrameError::UnknownConnection { connection: 7 })),
        "{ended}"
    );
}

#[tokio::test]
async fn a_runtime_that_does_not_take_the_plugin_is_named() {
    let (far, near) = tokio::io::duplex(1 << 20);
    let talks = tokio::spawn(talk(near, Arc::new(Told::default())));
    let mut runtime = Runtime { far, stream: 1 };
    let (header, _) = runtime.message(2).await;
    let mut answer = Response::new();
    answer.set_status(ttrpc::get_status(Code::INVALID_ARGUMENT, "invalid plugin name"));
    let answer = answer.encode().unwrap();
    let header = MessageHeader::new_response(header.stream_id, answer.len() as u32);
    runtime.say(2, header, &answer).await;
    let Err(error) = talks.await.unwrap();
    assert!(matches!(&error, NriError::Refused(why) if why.contains("invalid plugin name")));
}

#[tokio::test]
async fn who_is_not_trusted_is_told_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nri.sock");
    let Err(absent) = serve(&socket, Arc::new(Told::default())).await;
    assert!(matches!(absent, NriError::Connect(error) if error.kind() == io::ErrorKind::NotFound));
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let Err(error) = serve(&socket, Arc::new(Told::default())).await;
    assert!(matches!(&error, NriError::Untrusted(why) if why == "nobody is"), "{error}");
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).await.unwrap();
    assert_eq!(said, b"");
}
