"""Injection into a whole cluster: the policies' CEL is evaluated, its patches are applied to pods, the pods validated.

What only a cluster can show (that the API server takes the policy, and its limits on the cost of an expression) is not
shown here.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import pytest
import yaml
from pod_security import problems_under_restricted

cel = pytest.importorskip("cel_expr_python.cel", reason="no CEL for this Python (it has wheels from 3.11 on)")
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, struct_pb2  # noqa: E402

CLUSTER = Path(__file__).parents[2] / "docker" / "kubernetes" / "cluster"
FOLDER = "/autoteardown/autoteardown/_inject"
ADMISSION, BINDING = yaml.safe_load_all((CLUSTER / "admission.yaml").read_text())
KYVERNO = yaml.safe_load((CLUSTER / "kyverno.yaml").read_text())
POLICIES = pytest.mark.parametrize("policy", [ADMISSION, KYVERNO], ids=["admission", "kyverno"])

Pod = dict[str, Any]


def _environment() -> Any:
    """CEL as an API server has it: the type JSONPatch, and indexOf for lists."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="k8s.proto", syntax="proto3", dependency=["google/protobuf/struct.proto"]
    )
    message = file.message_type.add(name="JSONPatch")
    for number, name in enumerate(("op", "path", "from"), 1):
        message.field.add(name=name, number=number, label=1, type=9)
    message.field.add(name="value", number=4, label=1, type=11, type_name=".google.protobuf.Value")
    pool.Add(file)
    index_of = cel.Overload(
        "list_index_of",
        cel.Type.INT,
        [cel.Type.List(cel.Type.DYN), cel.Type.DYN],
        True,
        lambda items, item: list(items).index(item) if item in list(items) else -1,
    )
    lists = cel.CelExtension("kubernetes.lists", [cel.FunctionDecl("indexOf", [index_of])])
    types = {"object": cel.Type.DYN, "variables": cel.Type.DYN}
    return cel.NewEnv(pool, variables=types, extensions=[lists])


CEL = _environment()


def evaluate(expression: str, pod: Pod, variables: dict[str, Any]) -> Any:
    """What an expression comes to; every error is raised."""
    result = CEL.compile(expression).eval(data={"object": pod, "variables": variables})
    assert result.type().name() != "ERROR", result.value()
    return result.plain_value()


def selected(policy: Pod, pod: Pod) -> bool:
    """Whether the policy is for this pod."""
    wanted = policy["spec"]["matchConstraints"]["objectSelector"]["matchLabels"].items()
    if not wanted <= pod["metadata"].get("labels", {}).items():
        return False
    return all(evaluate(each["expression"], pod, {}) is True for each in policy["spec"]["matchConditions"])


def mutated(policy: Pod, pod: Pod) -> Pod:
    """The pod as the policy leaves it, which is what the next mutation sees."""
    pod = copy.deepcopy(pod)
    if not selected(policy, pod):
        return pod
    variables: dict[str, Any] = {}
    for variable in policy["spec"]["variables"]:
        variables[variable["name"]] = evaluate(variable["expression"], pod, variables)
    for mutation in policy["spec"]["mutations"]:
        assert mutation["patchType"] == "JSONPatch"
        patches = evaluate(mutation["jsonPatch"]["expression"], pod, variables)
        operations = [json_format.MessageToDict(patch) for patch in patches]
        pod = jsonpatch.apply_patch(pod, operations)
    return pod


def pod_of(
    *containers: Pod, labels: dict[str, str] | None = None, annotations: Any = None, **spec: Any
) -> Pod:
    """A pod as the API server has it when policies see it: with its defaults."""
    secure = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    made = [
        {"name": f"c{number}", "image": "x/y:1", "securityContext": secure, **container}
        for number, container in enumerate(containers or ({},))
    ]
    metadata: Pod = {"name": "train-0", "labels": {"autoteardown/inject": "true", **(labels or {})}}
    if annotations:
        metadata["annotations"] = annotations
    spec = {"terminationGracePeriodSeconds": 30, **spec, "containers": made}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def variables_of(container: Pod) -> dict[str, Any]:
    return {each["name"]: each.get("value") for each in container["env"]}


# -- the objects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.36", "1.37"])
@pytest.mark.parametrize("document", [ADMISSION, BINDING], ids=["policy", "binding"])
def test_the_admission_policy_fits_its_schema(document: Pod, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)
    broken = copy.deepcopy(document)
    broken["spec"]["matchConstraintz"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_kyverno_gets_the_same_expressions() -> None:
    same = ("matchConditions", "variables", "mutations", "failurePolicy", "reinvocationPolicy")
    assert {name: KYVERNO["spec"][name] for name in same} == {name: ADMISSION["spec"][name] for name in same}
    assert (KYVERNO["apiVersion"], KYVERNO["kind"]) == ("policies.kyverno.io/v1", "MutatingPolicy")
    constraints = copy.deepcopy(KYVERNO["spec"]["matchConstraints"])
    assert constraints.pop("namespaceSelector") == BINDING["spec"]["matchResources"]["namespaceSelector"]
    assert constraints == ADMISSION["spec"]["matchConstraints"]


@POLICIES
def test_the_expressions_have_the_types_that_an_api_server_asks_for(policy: Pod) -> None:
    """Checked when a policy is created: a list of patches, and truth or falsehood, not something dynamic."""
    for mutation in policy["spec"]["mutations"]:
        found = CEL.compile(mutation["jsonPatch"]["expression"]).return_type()
        assert found == cel.Type.List(cel.Type("JSONPatch")), found.name()
    for condition in policy["spec"]["matchConditions"]:
        assert CEL.compile(condition["expression"]).return_type() == cel.Type.BOOL


@POLICIES
def test_a_failure_of_the_policy_costs_no_job(policy: Pod) -> None:
    assert policy["spec"]["failurePolicy"] == "Ignore"


# -- what it makes of pods -----------------------------------------------------------------------------------------

PODS = {
    "bare": pod_of(),
    "with an env": pod_of({"env": [{"name": "LR", "value": "0.1"}]}),
    "with a PYTHONPATH": pod_of({"env": [{"name": "PYTHONPATH", "value": "/opt/a:/opt/b"}]}),
    "several containers": pod_of(
        {"env": [{"name": "A", "value": "1"}]},
        {"volumeMounts": [{"name": "data", "mountPath": "/data"}]},
        {},
        volumes=[{"name": "data", "emptyDir": {}}],
    ),
    "with init containers": pod_of(
        initContainers=[{"name": "first", "image": "x/z:1"}], volumes=[{"name": "v", "emptyDir": {}}]
    ),
    "with a field reference": pod_of(
        {
            "env": [
                {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1"}}},
            ]
        }
    ),
    "a JobSet's": pod_of(labels={"jobset.sigs.k8s.io/jobset-name": "llama", "batch.kubernetes.io/job-name": "llama-0"}),
}  # fmt: skip
CASES = pytest.mark.parametrize("name", PODS)


@POLICIES
@CASES
def test_the_agent_is_in_every_container(policy: Pod, name: str) -> None:
    before, after = PODS[name], mutated(policy, PODS[name])
    kubernetes_validate.validate(after, "1.36", strict=True)
    spec = after["spec"]
    assert {"name": "autoteardown", "emptyDir": {"sizeLimit": "32Mi"}} in spec["volumes"]
    assert spec["initContainers"][-1]["name"] == "autoteardown"
    for was, container in zip(before["spec"]["containers"], spec["containers"]):
        variables = variables_of(container)
        assert variables["AUTOTEARDOWN"] == "1"
        assert variables["AUTOTEARDOWN_GRACE"] == "25"
        assert variables["PYTHONPATH"].split(":")[0] == FOLDER
        mount = {"name": "autoteardown", "mountPath": "/autoteardown", "readOnly": True}
        assert container["volumeMounts"] == [*was.get("volumeMounts", []), mount]
        kept = [each for each in was.get("env", []) if each["name"] != "PYTHONPATH"]
        assert [each for each in container["env"] if each in kept] == kept
        names = [each["name"] for each in container["env"]]
        assert len(names) == len(set(names))
    kept = [each for each in spec["initContainers"] if each["name"] != "autoteardown"]
    assert kept == before["spec"].get("initContainers", [])


@POLICIES
@CASES
def test_once_is_enough(policy: Pod, name: str) -> None:
    """Policies are invoked again after others have changed the pod, and templates may have the agent already."""
    once = mutated(policy, PODS[name])
    assert mutated(policy, once) == once


@POLICIES
def test_a_container_that_comes_later_gets_it_too(policy: Pod) -> None:
    once = mutated(policy, pod_of())
    once["spec"]["containers"].append({"name": "late", "image": "x/y:1"})
    twice = mutated(policy, once)
    assert variables_of(twice["spec"]["containers"][1])["PYTHONPATH"] == FOLDER
    assert twice["spec"]["containers"][0] == once["spec"]["containers"][0]
    assert len(twice["spec"]["initContainers"]) == 1


@POLICIES
def test_the_folder_goes_in_front_of_a_pythonpath(policy: Pod) -> None:
    (container,) = mutated(policy, PODS["with a PYTHONPATH"])["spec"]["containers"]
    assert variables_of(container)["PYTHONPATH"] == f"{FOLDER}:/opt/a:/opt/b"


@POLICIES
def test_a_pythonpath_that_cannot_be_seen(policy: Pod) -> None:
    """From a ConfigMap: left alone. From the image or envFrom: the annotation names it."""
    from_map = {"name": "PYTHONPATH", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}}
    (container,) = mutated(policy, pod_of({"env": [from_map]}))["spec"]["containers"]
    assert [each for each in container["env"] if each["name"] == "PYTHONPATH"] == [from_map]
    (container,) = mutated(policy, pod_of(annotations={"autoteardown/pythonpath": "/app"}))["spec"][
        "containers"
    ]
    assert variables_of(container)["PYTHONPATH"] == f"{FOLDER}:/app"


@POLICIES
@pytest.mark.parametrize(("period", "grace"), [(30, "25"), (120, "115"), (7, "2"), (None, "25")])
def test_the_grace_period_is_the_pods_own(policy: Pod, period: int | None, grace: str) -> None:
    pod = pod_of(terminationGracePeriodSeconds=period)
    if period is None:
        del pod["spec"]["terminationGracePeriodSeconds"]
    variables = variables_of(mutated(policy, pod)["spec"]["containers"][0])
    assert variables["AUTOTEARDOWN_GRACE"] == grace
    assert variables["TERMINATION_GRACE_PERIOD_SECONDS"] == str(period or 30)  # doctor compares the two


@POLICIES
def test_what_a_container_says_itself_stands(policy: Pod) -> None:
    own = [{"name": "AUTOTEARDOWN", "value": "0"}, {"name": "AUTOTEARDOWN_GRACE", "value": "10"}]
    (container,) = mutated(policy, pod_of({"env": own}))["spec"]["containers"]
    assert container["env"][:2] == own
    assert [each["name"] for each in container["env"]].count("AUTOTEARDOWN") == 1


@POLICIES
@pytest.mark.parametrize(
    ("labels", "job"),
    [
        ({"jobset.sigs.k8s.io/jobset-name": "llama", "batch.kubernetes.io/job-name": "llama-0"}, "llama"),
        ({"batch.kubernetes.io/job-name": "train"}, "train"),
        ({"volcano.sh/job-name": "v"}, "v"),
        ({"ray.io/cluster": "r"}, "r"),
        ({}, None),
    ],
)
def test_the_job_is_named_by_the_controller_that_made_the_pod(
    policy: Pod, labels: dict[str, str], job: str | None
) -> None:
    (container,) = mutated(policy, pod_of(labels=labels))["spec"]["containers"]
    assert variables_of(container).get("AUTOTEARDOWN_JOB") == job


@POLICIES
@pytest.mark.parametrize(
    "pod",
    [
        pod_of(annotations={"autoteardown/skip": "true"}),
        pod_of(labels={"autoteardown/inject": "false"}),
        pod_of(terminationGracePeriodSeconds=5),
    ],
    ids=["opted out", "without the label", "no time"],
)
def test_pods_that_are_left_alone(policy: Pod, pod: Pod) -> None:
    assert mutated(policy, pod) == pod


@POLICIES
@CASES
def test_the_restricted_profile_admits_what_comes_out(policy: Pod, name: str) -> None:
    before, after = PODS[name], mutated(policy, PODS[name])
    assert problems_under_restricted(after["spec"]) == problems_under_restricted(before["spec"])
    (injected,) = (each for each in after["spec"]["initContainers"] if each["name"] == "autoteardown")
    assert injected["securityContext"]["readOnlyRootFilesystem"] is True
    for kind in ("requests", "limits"):  # a namespace with a quota asks for both
        assert set(injected["resources"][kind]) == {"cpu", "memory"}


def test_the_check_of_the_profile_can_fail() -> None:
    spec = copy.deepcopy(mutated(ADMISSION, pod_of())["spec"])
    assert problems_under_restricted(spec) == []
    del spec["initContainers"][0]["securityContext"]["capabilities"]
    assert problems_under_restricted(spec) == ["autoteardown: capabilities"]


@POLICIES
def test_the_folder_is_where_the_image_puts_it(policy: Pod) -> None:
    """What PYTHONPATH names is the folder of a sitecustomize once /agent has been copied to the volume."""
    dockerfile = (CLUSTER.parents[1] / "Dockerfile.inject").read_text()
    assert "/agent/." in dockerfile and '"/autoteardown/"' in dockerfile
    sources = (CLUSTER.parents[2] / "pyproject.toml").read_text()
    assert '"sitecustomize" = "autoteardown/_inject"' in sources
    assert FOLDER == "/autoteardown/" + "autoteardown/_inject"


# -- kustomize -----------------------------------------------------------------------------------------------------


def merged(base: Any, patch: Any) -> Any:
    """A strategic merge patch as kustomize applies it to the kinds of Kubernetes: lists of named things by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in patch.items()}}
    if isinstance(base, list) and isinstance(patch, list) and all("name" in each for each in [*base, *patch]):
        known = {each["name"]: each for each in base}
        known.update({each["name"]: merged(known.get(each["name"]), each) for each in patch})
        return list(known.values())
    return patch


def test_the_component() -> None:
    component = yaml.safe_load((CLUSTER / "component" / "kustomization.yaml").read_text())
    assert component["kind"] == "Component"
    job = yaml.safe_load_all((CLUSTER.parent / "job.yaml").read_text())
    job = next(each for each in job if each["kind"] == "Job")
    template = job["spec"]["template"]["spec"]
    template["initContainers"] = [{"name": "first", "image": "x/z:1"}]
    container = template["containers"][0]
    container["env"] = [each for each in container["env"] if each["name"] != "AUTOTEARDOWN"]
    before = copy.deepcopy(job)
    first, second = (yaml.safe_load(each["patch"]) for each in component["patches"])
    assert all(each["target"]["labelSelector"] == "autoteardown/inject=true" for each in component["patches"])
    del first["metadata"]
    after = jsonpatch.apply_patch(merged(job, first), second)
    kubernetes_validate.validate(after, "1.36", strict=True)
    spec, was = after["spec"]["template"]["spec"], before["spec"]["template"]["spec"]
    assert [each["name"] for each in spec["initContainers"]] == ["first", "autoteardown"]
    assert spec["volumes"][: len(was["volumes"])] == was["volumes"]
    assert variables_of(spec["containers"][0]).items() >= {"AUTOTEARDOWN": "1", "PYTHONPATH": FOLDER}.items()
    injected = mutated(ADMISSION, pod_of())["spec"]["initContainers"][0]
    assert spec["initContainers"][1] == injected, "the same as the policies' init container"
    bare = copy.deepcopy(before)
    del bare["spec"]["template"]["spec"]["containers"][0]["env"]
    with pytest.raises(jsonpatch.JsonPointerException):  # said at the build, not found out in the cluster
        jsonpatch.apply_patch(bare, second)
