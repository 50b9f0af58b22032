//! An etcd of our own on free ports, with its data in a temporary directory; killed when dropped.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ashlar_registry::{Registry, etcd::Etcd};

pub(crate) struct EtcdServer {
    child: Child,
    data: tempfile::TempDir,
    ports: [u16; 2],
}

impl EtcdServer {
    pub(crate) async fn start() -> Self {
        let data = tempfile::tempdir().expect("a temporary directory");
        let ports = [free_port(), free_port()];
        let child = spawn(&data, ports);
        let server = Self { child, data, ports };
        server.ready().await;
        server
    }

    /// `etcd://` URL with a prefix of its own.
    pub(crate) fn url(&self, prefix: &str) -> String {
        format!("etcd://127.0.0.1:{}/{prefix}", self.ports[0])
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
    }

    /// The same data, the same ports.
    pub(crate) async fn restart(&mut self) {
        self.child = spawn(&self.data, self.ports);
        self.ready().await;
    }

    /// The same ports, no data: as after a disaster.
    pub(crate) async fn restart_empty(&mut self) {
        self.data = tempfile::tempdir().expect("a temporary directory");
        self.restart().await;
    }

    async fn ready(&self) {
        let registry = Etcd::open(&self.url("ready")).await.expect("a valid url");
        for _ in 0..150 {
            if registry.get("x").await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("etcd did not become ready on port {}", self.ports[0]);
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(data: &tempfile::TempDir, ports: [u16; 2]) -> Child {
    let [client, peer] = ports.map(|port| format!("http://127.0.0.1:{port}"));
    let mut command = Command::new("etcd");
    command.arg("--data-dir").arg(data.path()).args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    command.args(["--initial-cluster", &format!("default={peer}"), "--unsafe-no-fsync"]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    match command.spawn() {
        Ok(child) => child,
        Err(error) => panic!("these tests need the `etcd` binary on PATH (Debian: apt-get install etcd-server): {error}"),
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port()
}
