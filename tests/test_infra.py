"""Clusters: what infra/ says is what axonym, Kubernetes and bash accept; a real cluster gives the same tables.

The manifests are held against KubeRay's own definitions (a folder of its CRDs, named by AXONYM_CRDS) where they are at
hand. The cluster is Ray's own processes: a head that does no parts and nodes that come and die, with a token, the job
server, and no table shared but on S3. Each node has a network namespace and an address of its own where this process
may make them; elsewhere they are on loopback.
"""

import http.server
import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import ClassVar
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import jsonschema
import psutil
import pytest
import yaml
from moto.server import ThreadedMotoServer

from flows.config import compose
from flows.sweep import Sweep
from tasks.store import SECRET, Store, StoreSettings
from tests import samples
from tests.local import free_port, serving, tree

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
MANIFESTS = ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "kuberay/schedule.yaml")
SCRIPTS = [*INFRA.rglob("*.sbatch"), ROOT / ".ci/run"]
CRDS = Path(os.environ.get("AXONYM_CRDS", samples.DATA / "kuberay"))
DIRECT = build_opener(ProxyHandler({}))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def documents(name):
    return list(yaml.safe_load_all((INFRA / name).read_text()))


def found(name, kind):
    return next(d for d in documents(name) if d["kind"] == kind)


def nested(value, key):
    """Every value of that key at any depth."""
    if isinstance(value, dict):
        yield from ([value[key]] if key in value else [])
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from nested(item, key)


def pods():
    """Every pod that the manifests make."""
    cluster = found("kuberay/raycluster.yaml", "RayCluster")["spec"]
    cron = found("kuberay/schedule.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]
    return [
        cluster["headGroupSpec"]["template"]["spec"],
        *(group["template"]["spec"] for group in cluster["workerGroupSpecs"]),
        cron["template"]["spec"],
    ]


@cache
def definition(kind):
    """Schema of a CRD as Kubernetes applies it: unknown fields are refused."""
    texts = [path.read_text() for path in CRDS.glob("*.yaml")]
    text = next((text for text in texts if f"    kind: {kind}\n" in text), None)
    if text is None:
        pytest.skip(f"AXONYM_CRDS names no folder with KubeRay's definition of {kind}")
    versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
    return strict(next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"])


def strict(schema):
    schema = dict(schema)
    if "properties" in schema:
        schema["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = strict(schema[key])
    if schema.get("x-kubernetes-int-or-string"):
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return schema


@pytest.mark.parametrize(("name", "kind"), [(MANIFESTS[0], "RayCluster"), (MANIFESTS[1], "RayJob")])
def test_manifest_is_what_the_crd_says(name, kind):
    jsonschema.validate(found(name, kind), definition(kind))


def test_pod_of_the_cron_job_is_what_the_crd_says_of_pods():
    spec = definition("RayCluster")["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
    cron = found("kuberay/schedule.yaml", "CronJob")
    jsonschema.validate(cron["spec"]["jobTemplate"]["spec"]["template"], spec)


@pytest.mark.parametrize(
    ("path", "value"),
    [("authOptions.token", "x"), ("headGroupSpec.template.spec.image", "x"), ("rayVersion", 2)],
)
def test_crd_refuses_what_is_not_in_it(path, value):
    cluster = found(MANIFESTS[0], "RayCluster")
    *steps, last = path.split(".")
    place = cluster["spec"]
    for step in steps:
        place = place[step]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, definition("RayCluster"))


def commands():
    """Every sweep that infra/ starts or tells to start, by where it stands."""
    script = (INFRA / "slurm/sweep.sbatch").read_text()
    fixed = re.search(r'axonym (sweep .*) "\$@"', script)[1]
    yield "rayjob.yaml", found(MANIFESTS[1], "RayJob")["spec"]["entrypoint"].removeprefix("axonym ")
    readme = (INFRA / "README.md").read_text().replace("\\\n", " ")
    for name, text in (("sweep.sbatch", script), ("README.md", readme)):
        for number, line in enumerate(re.findall(r"sbatch infra/slurm/sweep\.sbatch (.*)", text)):
            yield f"{name}, sbatch {number}", f"{fixed} {line}"
    for number, line in enumerate(re.findall(r"-- axonym (sweep .*)", readme)):
        yield f"README.md, ray job submit {number}", line


def test_commands_are_found():
    assert len(dict(commands())) == 4


@pytest.mark.parametrize(("place", "command"), list(commands()), ids=lambda text: text[:20])
def test_command_is_one_that_axonym_accepts(place, command):
    assert re.fullmatch(r"[\w=.:/ -]+", command), f"{place}: a shell would read more than words here"
    word, *overrides = shlex.split(command)
    config = compose(overrides)
    assert word == "sweep"
    assert config.cluster.ray
    assert config.cluster.address == "auto"
    assert config.store.root.startswith("s3://")
    assert all(uri.startswith(("s3://", "/")) for uri in config.probing.uris)


def test_sweep_asks_for_as_many_workers_as_the_cluster_may_have():
    job = found(MANIFESTS[1], "RayJob")["spec"]
    config = compose(shlex.split(job["entrypoint"])[2:])
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.cluster.default.workers == group["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert group["minReplicas"] < group["maxReplicas"]
    assert config.cluster.wait > 0
    for stage in config.cluster.stages:
        need = config.cluster.resources(stage)
        assert need.num_gpus <= int(limits["nvidia.com/gpu"])
        assert need.num_cpus <= int(limits["cpu"])


def test_a_dead_cluster_is_followed_by_the_same_command():
    job = found(MANIFESTS[1], "RayJob")["spec"]
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"]
    assert job["ttlSecondsAfterFinished"] > 0
    assert job["rayClusterSpec"] == found(MANIFESTS[0], "RayCluster")["spec"]


def test_head_does_no_parts_and_everyone_needs_the_token():
    cluster = found(MANIFESTS[0], "RayCluster")["spec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token"}
    for text in ((INFRA / "slurm/sweep.sbatch").read_text(), (INFRA / "README.md").read_text().partition("By hand")[2]):
        assert 0 < text.index("export RAY_AUTH_MODE=token") < text.index("ray start")


def test_pods_have_no_rights_and_known_sizes():
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["restartPolicy"] == "Never"
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]) & set(container["resources"]["limits"])
            assert all(mount["readOnly"] for mount in container["volumeMounts"])


def test_no_secret_is_written_down():
    for name in MANIFESTS:
        whole = documents(name)
        assert "Secret" not in [d["kind"] for d in whole]
        for variables in nested(whole, "env"):
            assert [v["name"] for v in variables if "value" in v and re.fullmatch(SECRET, v["name"], re.I)] == []
    for pod in pods()[:-1]:
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "axonym-s3"}}]
    for path in [*INFRA.rglob("*.yaml"), *SCRIPTS, INFRA / "Dockerfile", INFRA / "README.md"]:
        given = re.findall(r"(?i)(?:token|secret|password|access_key)\w*=(?!\$)\S+", path.read_text())
        assert given == [], path


def test_images_are_pinned_and_one_version_of_ray_is_everywhere():
    (locked,) = re.findall(r"(?m)^ray==(\S+)", (INFRA / "requirements-gpu.txt").read_text())
    (base,) = re.findall(r"(?m)^FROM (\S+)", (INFRA / "Dockerfile").read_text())
    assert base.startswith(f"rayproject/ray:{locked}-py311-")
    assert found(MANIFESTS[0], "RayCluster")["spec"]["rayVersion"] == locked
    images = {image for name in MANIFESTS for image in nested(documents(name), "image")}
    assert all(re.search(r":\d+\.\d+\.\d+", image) for image in images)
    (own,) = [image for image in images if "axonym" in image]
    assert own.endswith(f":{VERSION}")
    assert f"IMAGE ?= {own}\n" in (ROOT / "Makefile").read_text()


def test_dockerfile_copies_what_is_there_and_installs_by_hash():
    lines = (INFRA / "Dockerfile").read_text().splitlines()
    sources = [w for line in lines if line.startswith("COPY") for w in line.split()[1:-1] if not w.startswith("--")]
    assert [name for name in sources if not (ROOT / name).exists()] == []
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {p.partition(".")[0] for p in packages} | {"infra/requirements-gpu.txt", "pyproject.toml"} <= set(sources)
    assert sum("pip install" in line and "--require-hashes" in line for line in lines) == 1
    assert all("--no-deps" in line for line in lines if "pip install" in line)
    (user,) = [number for number, line in enumerate(lines) if line == "USER 1000:100"]
    assert [line for line in lines[user + 1 :] if line.startswith("USER")] == []
    copies = [line for line in lines[user:] if line.startswith("COPY")]  # also the first: it makes the folder
    assert [line for line in copies if not line.startswith("COPY --chown=1000:100 ")] == []
    locked = re.split(r"(?m)^(?=\S+==)", (INFRA / "requirements-gpu.txt").read_text())[1:]
    assert [text.split()[0] for text in locked if "--hash=sha256:" not in text] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_is_bash(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(path):
    assert subprocess.run(["shellcheck", path], capture_output=True, text=True).stdout == ""


def test_slurm_goes_on_after_the_limit():
    script = (INFRA / "slurm/sweep.sbatch").read_text()
    assert "#SBATCH --requeue\n" in script
    name = re.search(r"#SBATCH --signal=B:(\w+)@\d+\n", script)[1]
    assert re.search(rf"(?m)^trap '.*' {name}$", script)
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script


def test_schedule_never_has_two_and_may_do_little():
    cron = found("kuberay/schedule.yaml", "CronJob")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    pod = cron["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "/schedule/submit.py"]
    assert "args" not in container
    (rule,) = found("kuberay/schedule.yaml", "Role")["rules"]
    assert rule == {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    account = found("kuberay/schedule.yaml", "ServiceAccount")["metadata"]["name"]
    binding = found("kuberay/schedule.yaml", "RoleBinding")
    assert binding["roleRef"]["name"] == found("kuberay/schedule.yaml", "Role")["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [account] == [pod["serviceAccountName"]]
    (kustomization,) = documents("kuberay/kustomization.yaml")
    (generated,) = kustomization["configMapGenerator"]
    assert generated == {"name": pod["volumes"][0]["configMap"]["name"], "files": ["rayjob.yaml", "submit.py"]}
    assert kustomization["resources"] == ["schedule.yaml"]


@pytest.fixture
def submit():
    """kuberay/submit.py as a module."""
    spec = importlib.util.spec_from_file_location("submit", INFRA / "kuberay/submit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("job", "run"),
    [
        ("axonym-29700180", "2026-06-21-0300"),
        ("now-031500", "now-031500"),
        ("sweep-20261129", "sweep-20261129"),  # a date is no number of minutes
        ("axonym-2", "axonym-2"),
    ],
)
def test_run_is_named_by_the_time_of_its_schedule(submit, job, run):
    assert submit.run_name(job) == run
    assert found("kuberay/schedule.yaml", "CronJob")["metadata"]["name"] == "axonym"
    made = yaml.safe_load(submit.manifest(run))
    assert made["metadata"]["name"] == f"axonym-{run}"
    assert compose(shlex.split(made["spec"]["entrypoint"])[2:]).run == run
    assert made["spec"]["rayClusterSpec"] == found(MANIFESTS[1], "RayJob")["spec"]["rayClusterSpec"]


@pytest.fixture
def kubernetes(submit, tmp_path, monkeypatch):
    """A server that speaks as much of Kubernetes' API as is needed: TLS, token, create, get, conflict.

    `jobs`: by name the states that a RayJob shows one after the other, the last for ever; `states`: those of a new one;
    `seen`: what was asked.
    """
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make a certificate")

    class Api(http.server.BaseHTTPRequestHandler):
        jobs: ClassVar[dict] = {}
        states: ClassVar[list] = []
        seen: ClassVar[list] = []

        def answer(self, status, body):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_POST(self):
            job = yaml.safe_load(self.rfile.read(int(self.headers["Content-Length"])))
            name = job["metadata"]["name"]
            self.seen.append(("create", self.path, self.headers["Authorization"], self.headers["Content-Type"]))
            if name in self.jobs:
                return self.answer(409, {"reason": "AlreadyExists"})
            self.jobs[name] = self.states[:]
            return self.answer(201, job)

        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            self.seen.append(("get", folder, self.headers["Authorization"]))
            if len(self.seen) == 3:
                return self.answer(503, {})
            states = self.jobs[name]
            return self.answer(200, {"status": states.pop(0) if len(states) > 1 else states[0]})

        def log_message(self, *args):
            pass

    certificate, key = tmp_path / "ca.crt", tmp_path / "key"
    request = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=api -keyout {key} -out {certificate}"
    made = [*request.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(made, check=True, capture_output=True)
    (tmp_path / "namespace").write_text("axonym")
    (tmp_path / "token").write_text("pod")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(Api, context) as port:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(submit, "ACCOUNT", tmp_path)
        monkeypatch.setattr(submit, "PAUSE", 0.01)
        yield Api


RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
ENDS = {
    "SUCCEEDED": {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
    "FAILED": {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"},
}


@pytest.mark.parametrize(("ends", "code"), [("SUCCEEDED", 0), ("FAILED", 2)])
def test_submit_creates_once_and_waits_for_the_end(submit, kubernetes, monkeypatch, ends, code):
    monkeypatch.setenv("JOB", "axonym-29700180")
    kubernetes.states = [{}, RUNNING, ENDS[ends]]
    assert submit.main() == code
    assert submit.main() == code  # another try of the same Job
    assert list(kubernetes.jobs) == ["axonym-2026-06-21-0300"]
    path, seen = "/apis/ray.io/v1/namespaces/axonym/rayjobs", kubernetes.seen
    assert seen[0] == ("create", path, "Bearer pod", "application/yaml")
    assert {s[1:3] for s in seen} == {(path, "Bearer pod")}


@pytest.mark.parametrize("ends", ENDS)
def test_submit_by_hand_says_that_the_sweep_of_that_name_has_ended(submit, kubernetes, monkeypatch, capsys, ends):
    """Nothing would be computed; a sweep of that name that still runs is waited for."""
    monkeypatch.setenv("JOB", "now")
    kubernetes.jobs = {"axonym-now": [ENDS[ends]]}
    assert submit.main() == 2
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("nothing was run: ")
    assert line.endswith("kubectl -n axonym delete rayjob axonym-now")
    kubernetes.jobs = {"axonym-now": [RUNNING, RUNNING, ENDS[ends]]}
    assert submit.main() == (0 if ends == "SUCCEEDED" else 2)
    assert "nothing was run" not in capsys.readouterr().out


class Network:
    """Where nodes live: each behind a cable of its own to a bridge, which leads nowhere else; or all on loopback."""

    def __init__(self):
        self.name = f"ax{secrets.token_hex(3)}"  # not of the process: others of that number may have left theirs
        self.subnet, self.nodes = f"10.{200 + secrets.randbelow(56)}.{secrets.randbelow(256)}", 0
        self.apart = shutil.which("ip") is not None and os.geteuid() == 0 and self.ip("netns", "add", self.name) == ""

    def lay(self):
        if self.apart:
            self.must("link", "add", self.name, "type", "bridge")
            self.must("addr", "add", f"{self.subnet}.1/24", "dev", self.name)
            self.must("link", "set", self.name, "up")

    def ip(self, *words):
        """What `ip` says where it fails."""
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        return done.stderr or f"status {done.returncode}" if done.returncode else ""

    def must(self, *words):
        reason = self.ip(*words)
        if reason:
            pytest.fail(f"network namespaces may be made here, but not this: ip {' '.join(words)}: {reason}")

    def join(self):
        """How to start a command on a new node, and the node's address."""
        if not self.apart:
            return [], "127.0.0.2"  # for 127.0.0.1 ray start takes the machine's address in the network
        self.nodes += 1
        space, cable, address = (
            f"{self.name}-{self.nodes}",
            f"{self.name}v{self.nodes}",
            f"{self.subnet}.{self.nodes + 1}",
        )
        self.must("netns", "add", space)
        self.must("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        self.must("link", "set", cable, "master", self.name, "up")
        self.must("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            self.must("-n", space, "link", "set", device, "up")
        return ["ip", "netns", "exec", space], address

    def close(self):
        if self.apart:
            for space in (self.name, *(f"{self.name}-{number + 1}" for number in range(self.nodes))):
                self.ip("netns", "del", space)
            self.ip("link", "del", self.name)


class Cluster:
    """A Ray cluster, each node a `ray start` of its own: a head that does no parts, nodes added later."""

    def __init__(self, network, s3):
        self.network, (self.inside, self.address) = network, network.join()
        self.home = self.address if network.apart else "127.0.0.1"
        self.temp = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: sockets' names have at most 107 bytes
        self.gcs, self.dashboard = free_port(), free_port()
        near = ",".join(["127.0.0.1", *(f"{network.subnet}.{number}" for number in range(1, 10))])
        self.environment = os.environ | {
            "AWS_ENDPOINT_URL": s3,
            "NO_PROXY": near,
            "no_proxy": near,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "1000",  # a dead node is known to be dead in seconds
            "RAY_health_check_failure_threshold": "3",
            "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "120",  # a slow machine is no failure
            "PYTHONPATH": str(ROOT),
        }
        for name in ("RAY_ADDRESS", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
            self.environment.pop(name, None)  # the last two axonym sets on every node itself
        self.started, self.nodes = [], []
        head = ["--head", f"--port={self.gcs}", f"--dashboard-host={self.home}", f"--dashboard-port={self.dashboard}"]
        self.start([(self.inside, self.address)], *head, "--num-cpus=0")

    def ray(self, *words):
        return [sys.executable, "-m", "ray.scripts.scripts", *words]

    def start(self, places, *options):
        """Start a node in each place, all at once."""
        nodes = {}
        for inside, address in places:
            folder = self.temp / str(len(self.started))  # in one folder two that start at once take the same sockets
            log = folder.with_suffix(".log")
            where = [f"--node-ip-address={address}", f"--temp-dir={folder}", "--dashboard-agent-listen-port=0"]
            sizes = ["--num-gpus=0", "--object-store-memory=80000000"]
            with log.open("wb") as out:
                command = [*inside, *self.ray("start", "--block", *where, *sizes, *options)]
                node = subprocess.Popen(command, cwd="/", env=self.environment, stdout=out, stderr=out)
            self.started.append(node)
            nodes[node] = log

        def said():
            return "\n".join(log.read_text() for log in nodes.values())

        until(lambda: all("Ray runtime started" in log.read_text() or node.poll() for node, log in nodes.items()), said)
        assert [node.poll() for node in nodes] == [None] * len(nodes), said()
        return list(nodes)

    def grow(self, count):
        places = [self.network.join() for _ in range(count - len(self.nodes))]
        self.nodes += self.start(places, f"--address={self.address}:{self.gcs}", "--num-cpus=1")

    def shrink(self):
        """Leave the head alone."""
        while self.nodes:
            self.lose_one()

    def lose_one(self):
        """Kill a node's raylet, as the kernel would, and wait until the cluster knows."""
        before = self.states().count("DEAD")
        (raylet,) = [p for p in tree(self.nodes.pop().pid) if p.name() == "raylet"]
        raylet.kill()
        until(lambda: self.states().count("DEAD") > before, self.states)

    def states(self):
        """What the cluster knows of each node that it ever had: ALIVE or DEAD."""
        request = Request(f"http://{self.home}:{self.dashboard}/api/v0/nodes")
        request.add_header("Authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        with DIRECT.open(request, timeout=30) as answer:
            return [node["state"] for node in json.load(answer)["data"]["result"]["result"]]

    @contextmanager
    def standing(self):
        """The driver of a sweep stands still meanwhile."""
        drivers = [p for p in tree(self.started[0].pid) if {"flows.cli", "sweep"} <= set(p.cmdline())]
        assert drivers, "the sweep has ended before"
        for driver in drivers:
            driver.suspend()
        try:
            yield
        finally:
            for driver in drivers:
                driver.resume()

    def submit(self, *overrides):
        """A sweep handed to the job server."""
        command = [*self.inside, *self.ray("job", "submit", f"--address=http://{self.home}:{self.dashboard}", "--")]
        command += [sys.executable, "-m", "flows.cli", "sweep", "cluster=join", *overrides]
        return Job(command, self.environment)

    def stop(self):
        ours = [process for node in self.started for process in tree(node.pid)]
        for process in ours:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(ours, timeout=3)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.temp, ignore_errors=True)


class Job:
    """A submitted sweep, whose output is collected while it runs."""

    def __init__(self, command, environment):
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process, self.lines = subprocess.Popen(command, cwd="/", env=environment, **pipe), []
        self.thread = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self.thread.start()

    @property
    def output(self):
        return "".join(self.lines)

    def running(self):
        return self.process.poll() is None

    def finish(self):
        code = self.process.wait(timeout=200)
        self.thread.join()
        assert code == 0, self.output
        return self.output


def until(true, state, pause=0.5):
    """Wait for it; what `state` says is what was there instead."""
    end = time.monotonic() + 100
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"waited too long: {state()}")
        time.sleep(pause)


@pytest.fixture(scope="module")
def cluster(s3):
    network, made = Network(), None
    server = ThreadedMotoServer(f"{network.subnet}.1", port=0, verbose=False) if network.apart else None
    try:
        network.lay()
        if server:  # the same buckets, where the nodes can reach them
            server.start()
        host, port = server.get_host_and_port() if server else (None, None)
        made = Cluster(network, f"http://{host}:{port}" if server else os.environ["AWS_ENDPOINT_URL"])
        yield made
    finally:
        if made:
            made.stop()
        if server:
            server.stop()
        network.close()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return samples.sweep_arguments(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def reference(drawn, tmp_path_factory):
    """Tables of the sweep in this process."""
    root = tmp_path_factory.mktemp("reference")
    Sweep(compose([*drawn, "cluster=none", f"store.root={root}"])).run()
    return samples.stored_tables(root)


def objects(root):
    """Names below a root on S3 and when each was written."""
    store = Store(StoreSettings(root))
    store.fs.invalidate_cache()
    written = store.fs.find(store.root, detail=True)
    files = {name: facts for name, facts in written.items() if facts["type"] == "file"}  # one may appear meanwhile
    return {name[len(store.root) + 1 :]: facts["LastModified"] for name, facts in files.items()}


def tables(root):
    store = Store(StoreSettings(root))
    return {name: store.get(name) for name in objects(root) if name.endswith(".parquet")}


def test_job_server_refuses_who_has_no_token(cluster):
    with pytest.raises(HTTPError, match="401"):
        DIRECT.open(f"http://{cluster.home}:{cluster.dashboard}/api/jobs/", timeout=30)


@pytest.mark.timeout(900)
def test_two_sweeps_at_once_wait_for_nodes_and_give_the_same_tables(cluster, drawn, reference, s3):
    """The same run twice, to a head that has no nodes yet, as where a cluster grows; then a node for each."""
    cluster.shrink()
    root = f"{s3}/grown"
    more = ["store=s3", f"store.root={root}", "cluster.wait=100", "cluster.default.workers=1"]
    jobs = [cluster.submit(*drawn, *more) for _ in range(2)]
    until(lambda: objects(root) or not jobs[0].running(), lambda: jobs[0].output)
    assert {name.partition("/")[0] for name in tables(root)} <= {"listing"}  # which is the driver's own
    cluster.grow(2)
    for job in jobs:
        job.finish()
    assert tables(root) == reference


@pytest.mark.timeout(900)
def test_sweep_survives_a_node_and_is_not_done_twice(cluster, drawn, reference, s3):
    root = f"{s3}/lost"
    more = ["store=s3", f"store.root={root}", "cluster.default.workers=2"]
    cluster.grow(2)
    job = cluster.submit(*drawn, *more)
    until(lambda: any("candidates" in name for name in objects(root)) or not job.running(), lambda: job.output, 0.05)
    with cluster.standing():  # else it might have ended before the node is known to be dead
        cluster.lose_one()
    assert "a worker died" in job.finish()
    assert tables(root) == reference
    before = objects(root)
    again = cluster.submit(*drawn, *more).finish()
    assert "everything was done already; nothing was computed" in again
    after = objects(root)
    assert {name for name in after if before.get(name) != after[name]} == {"runs/drawn/run.json"}
