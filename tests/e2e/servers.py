"""Starts and stops the real programs: ashlar in its three ways of serving, and etcd. Every process gets free ports, a log file,
and is stopped by its own id. Knows nothing of the API's content."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
BINARY = Path(os.environ.get("ASHLAR_BIN", ROOT / "target/debug/ashlar"))
START_SECONDS_MAX = 90
STOP_SECONDS_MAX = 40

sys.path.insert(0, str(ROOT / "helm/tests"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url: str, body: dict | None = None) -> tuple[int, str]:
    """Status and body; status 0 where nothing answers. With a body it is a POST of JSON."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (urllib.error.URLError, OSError):
        return 0, ""


def wait_until(what: str, holds, seconds: float, failed=lambda: None):
    """Polls until `holds()` is true; `failed()` returns why it never will be."""
    deadline = time.monotonic() + seconds
    while not holds():
        if reason := failed():
            raise AssertionError(f"{what}: {reason}")
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def emulated_card(folder: Path, fault: str = "") -> dict[str, str]:
    """The environment of a process that finds a card which is none: a driver and NVRTC that the build made, and a folder for compiled kernels."""
    built = [path.parent.parent for path in BINARY.parent.glob("build/ashlar-cuda-emulated-*/out/driver/libcuda.so.1")]
    assert built, f"no emulated driver under {BINARY.parent}/build: cargo build --workspace --tests"
    libraries = max(built, key=lambda out: (out / "driver/libcuda.so.1").stat().st_mtime)
    return {
        "LD_LIBRARY_PATH": f"{libraries}/driver:{libraries}/compiler",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "EMULATED_CARD_FAULT": fault,
    }


def ashlar(*words) -> subprocess.CompletedProcess:
    """A command of the binary that ends by itself."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ASHLAR_")}
    return subprocess.run(list(map(str, [BINARY, *words])), capture_output=True, text=True, timeout=60, env=environment)


class Program:
    """A running program with its log in a file."""

    def __init__(self, command: list, log: Path, environment: dict[str, str] | None = None):
        self.command, self.log, self.environment = command, log, environment or {}
        self.log_file = log.open("w")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ASHLAR_")} | {"NO_COLOR": "1"} | self.environment
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=self.log_file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )

    def why_dead(self) -> str | None:
        if self.process.poll() is None:
            return None
        return f"ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}"

    def wait_for(self, url: str):
        wait_until(url, lambda: get(url)[0] == 200, START_SECONDS_MAX, self.why_dead)

    def terminate(self) -> int:
        """Asks it to stop, and returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        try:
            return self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"did not stop within {STOP_SECONDS_MAX} s:\n{self.log.read_text()[-3000:]}") from None
        finally:
            self.log_file.close()

    def complaints(self, *expected: str) -> list[str]:
        """WARN and ERROR lines of the log that match none of the expected patterns."""
        lines = [line for line in self.log.read_text().splitlines() if re.search(r"\b(WARN|ERROR)\b|panicked at", line)]
        return [line for line in lines if not any(re.search(pattern, line) for pattern in expected)]


class Api:
    """What a test needs of a running REST server."""

    def __init__(self, address: str, metrics_addresses: list[str]):
        self.url = f"http://{address}"
        self.metrics_urls = [f"http://{one}/metrics" for one in metrics_addresses]

    def metrics(self) -> str:
        return "\n".join(get(url)[1] for url in self.metrics_urls)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples with this name and these labels."""
        total = 0.0
        for line in self.metrics().splitlines():
            if sample := re.match(rf"{re.escape(name)}(?:\{{(.*)\}})?\s+(\S+)", line):
                if all(f'{key}="{value}"' in (sample[1] or "") for key, value in labels.items()):
                    total += float(sample[2])
        return total


    def wait_for_models(self, models: list[str]):
        """`/ready` says that some model can be served; this waits for all."""
        for model in models:
            question = {"model": model, "prompt": "A", "max_tokens": 1}
            wait_until(model, lambda: get(f"{self.url}/v1/completions", question)[0] == 200, START_SECONDS_MAX)


def make_zoo(folder: Path) -> list[str]:
    """A zoo with the demo family; returns its models' names."""
    assert BINARY.is_file(), f"{BINARY} is missing: cargo build -p ashlar, or set ASHLAR_BIN"
    done = subprocess.run([ROOT / "scripts/add-demo.sh", BINARY, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return demo_models()


def demo_models() -> list[str]:
    """Names of the demo family's models, adapters among them."""
    kinds = ["*/config.json", "*/adapter_config.json"]
    return sorted(f"demo/{path.parent.name}" for kind in kinds for path in DEMO.glob(kind))


class Serve(Program):
    """`ashlar serve`: everything in one process."""

    def __init__(self, zoo: Path, log: Path, *flags: str, registry: str = "memory:", environment: dict[str, str] | None = None):
        self.registry = registry
        address = f"127.0.0.1:{free_port()}"
        super().__init__([BINARY, "serve", "--zoo", zoo, "--registry", registry, "--listen", address, *flags], log, environment)
        self.api = Api(address, [address])
        self.wait_for(f"{self.api.url}/ready")


class Etcd(Program):
    """A single etcd with an empty registry."""

    def __init__(self, folder: Path):
        client, peer = free_port(), free_port()
        self.url = f"etcd://127.0.0.1:{client}"
        urls = {"client": f"http://127.0.0.1:{client}", "peer": f"http://127.0.0.1:{peer}"}
        command = ["etcd", "--data-dir", folder / "etcd", "--listen-client-urls", urls["client"], "--advertise-client-urls", urls["client"]]
        command += ["--listen-peer-urls", urls["peer"], "--initial-advertise-peer-urls", urls["peer"]]
        command += ["--initial-cluster", f"default={urls['peer']}"]
        super().__init__(command, folder / "etcd.log")
        self.wait_for(f"{urls['client']}/health")


class Cluster:
    """etcd, one router and some executors as processes of their own. `cards` has the environment of each executor that computes on one, by index."""

    def __init__(self, zoo: Path, folder: Path, executor_count: int, settings: str, router_settings: str = "", cards: dict[int, dict[str, str]] | None = None):
        self.programs: list[Program] = []
        try:
            etcd = self._started(Etcd(folder))
            self.registry = etcd.url
            common = f'[registry]\nurl = "{etcd.url}"\n[zoo]\nroot = "{zoo}"\n{settings}\n'
            metrics = []
            for index in range(executor_count):
                rpc, health = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
                card = (cards or {}).get(index)
                own = f'[executor]\nlisten = "{rpc}"\nadvertise = "{rpc}"\nmetrics_listen = "{health}"\ndevice = "{"cuda:0" if card else "cpu"}"\n'
                self._started(self._ashlar("executor", f"executor-{index}", folder, common + own, card))
                metrics.append(health)
            address = f"127.0.0.1:{free_port()}"
            router = self._started(self._ashlar("router", "router", folder, common + f'[router]\nlisten = "{address}"\n{router_settings}\n'))
            self.api = Api(address, [address, *metrics])
            self.executors = [Api(one, [one]) for one in metrics]
            for one in self.executors:
                router.wait_for(f"{one.url}/ready")
            router.wait_for(f"{self.api.url}/ready")
        except BaseException:
            self.stop()
            raise

    def _ashlar(self, command: str, name: str, folder: Path, config: str, environment: dict[str, str] | None = None) -> Program:
        file = folder / f"{name}.toml"
        file.write_text(config)
        return Program([BINARY, command, "--config", file], folder / f"{name}.log", environment)

    def _started(self, program):
        self.programs.append(program)
        return program

    def restart(self, ended: Program) -> Program:
        """The same program again, in the place of one that ended."""
        ended.wait()
        again = Program(ended.command, ended.log.with_suffix(".again.log"), ended.environment)
        self.programs[self.programs.index(ended)] = again
        return again

    def stop(self) -> list[int]:
        """Stops all, the router first, and returns their exit statuses in order of their start."""
        return [program.terminate() for program in reversed(self.programs)][::-1]
