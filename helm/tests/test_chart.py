"""The chart renders for every case of ci/ to objects that Kubernetes knows, and refuses wrong values with a sentence."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import CASES, CHART, Rendered, run, template

# The oldest release that the chart allows, one in the middle, the newest known to the validator.
KUBERNETES = ["1.30", "1.33", "1.37"]
OPERATOR_KINDS = {"ServiceMonitor", "PrometheusRule"}
DATA = Path(__file__).parent / "data"
ALL_CASES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem.removesuffix("-values"))


@ALL_CASES
def test_lints(case):
    result = run("helm", "lint", "--strict", CHART, "-f", case)
    assert result.returncode == 0, result.stdout + result.stderr


@ALL_CASES
def test_rendered_objects_fit_kubernetes(case, tmp_path):
    result = template("-f", case)
    assert result.returncode == 0, result.stderr
    rendered = tmp_path / "rendered.yaml"
    builtin = [one for one in Rendered(result.stdout).objects if one["kind"] not in OPERATOR_KINDS]
    rendered.write_text(yaml.safe_dump_all(builtin))
    for version in KUBERNETES:
        checked = run("kubernetes-validate", "--strict", "-k", version, rendered)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_operator_objects_fit_their_schema(render):
    schemas = json.loads((DATA / "operator.schema.json").read_text())
    objects = [one for one in render("monitoring").objects if one["kind"] in OPERATOR_KINDS]
    assert sorted(one["kind"] for one in objects) == ["PrometheusRule", "ServiceMonitor", "ServiceMonitor"]
    for one in objects:
        jsonschema.validate(one, schemas[one["kind"]])


def test_validator_refuses_an_unknown_field(render, tmp_path):
    deployment = render("minimal").one("Deployment", "demo-ashlar-router")
    deployment["spec"]["replicaCount"] = 2
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(deployment))
    assert run("kubernetes-validate", "--strict", "-k", KUBERNETES[0], wrong).returncode != 0


def test_every_value_is_described_and_in_the_schema():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(values, schema, path):
        properties = schema.get("properties")
        if not isinstance(values, dict) or properties is None:
            return
        assert schema["additionalProperties"] is False, f"{path} takes unknown keys"
        assert values.keys() <= properties.keys(), f"{path}: {values.keys() - properties.keys()} is not in the schema"
        missing = properties.keys() - values.keys() - {"global"}
        assert not missing, f"{path}: values.yaml does not show {missing}"
        for key, value in values.items():
            compare(value, properties[key], f"{path}.{key}")

    compare(values, schema, "values")


@pytest.mark.parametrize(
    "setting",
    [
        "router.replica=3",
        "executor.isa=sse9",
        "executor.kvFormat=f16",
        "executor.bf16Compute=int8",
        "executor.kvByte=1",
        "etcd.bundle=false",
        "router.replicas=many",
        "zoo.size=50 GB",
        "zoo.accessModes[0]=ReadWriteEverywhere",
        "zoo.place=gs://models",
        "zoo.place=s3://key:secret@models",
        "router.service.port=70000",
        "log.format=xml",
        "etcd.endpoints[0]=http://etcd:2379",
    ],
)
def test_schema_refuses(setting):
    result = template("-f", CHART / "ci/minimal-values.yaml", "--set", setting)
    assert result.returncode != 0
    assert "values don't meet the specifications of the schema" in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["image.repository="], "image.repository is empty: build the Containerfile"),
        (["keys.content="], "No keys: set keys.existingSecret"),
        (["keys.anonymous=true"], "exclude each other"),
        (["etcd.bundled=false"], "No registry: with etcd.bundled=false set etcd.endpoints"),
        (["etcd.endpoints[0]=etcd:2379"], "etcd.endpoints is set while etcd.bundled is true"),
        (["zoo.singleNode=false"], "zoo.accessModes lacks ReadWriteMany"),
        (["zoo.place=s3://models", "zoo.existingClaim=mine"], "zoo.place and zoo.existingClaim exclude each other"),
        (["zoo.credentialsSecret=mine"], "zoo.credentialsSecret opens a bucket, and zoo.place names none"),
        (["serviceAccount.create=false"], "serviceAccount.name is empty"),
        (["executor.autoscaling.enabled=true", "executor.autoscaling.minReplicas=9"], "is below minReplicas (9)"),
        (["router.terminationGracePeriodSeconds=5"], "leaves no time to drain"),
    ],
)
def test_missing_requirement_is_a_sentence(settings, sentence):
    arguments = [part for setting in settings for part in ("--set", setting)]
    result = template("-f", CHART / "ci/minimal-values.yaml", *arguments)
    assert result.returncode != 0
    assert sentence in result.stderr, result.stderr


def test_bare_defaults_tell_what_is_missing():
    result = template()
    assert result.returncode != 0
    assert "image.repository is empty" in result.stderr or "No keys:" in result.stderr, result.stderr


def test_settings_reach_the_configuration(render):
    config = render("external-etcd").one("ConfigMap", "demo-ashlar")["data"]["ashlar.toml"]
    assert tomllib.loads(config) == {
        "registry": {"url": "etcd://etcd-0.etcd:2379,etcd-1.etcd:2379,etcd-2.etcd:2379"},
        "zoo": {"root": "/var/lib/ashlar/zoo"},
        "router": {"listen": "0.0.0.0:8080", "keys_file": "/etc/ashlar/keys/keys.txt"},
        "executor": {
            "listen": "0.0.0.0:8090",
            "metrics_listen": "0.0.0.0:8091",
            "device": "cpu",
            "threads": 16,
            "kv_bytes": 8589934592,
            "memory_bytes": 25769803776,
            "page_tokens": 16,
            "step_tokens_max": 512,
            "sequences_max": 64,
            "isa": "avx512",
            "kv_format": "int8",
            "bf16_compute": "bf16",
        },
        "log": {"filter": "info", "format": "json"},
        "placement": {"spans_per_chain": 2},
    }


def test_defaults_leave_the_binary_its_own(render):
    config = tomllib.loads(render("minimal").one("ConfigMap", "demo-ashlar")["data"]["ashlar.toml"])
    assert config["registry"]["url"] == "etcd://demo-ashlar-etcd:2379"
    assert config["executor"].keys() == {"listen", "metrics_listen", "device"}


def test_changed_settings_are_new_pods(render):
    before = render("minimal").one("Deployment", "demo-ashlar-router")
    after = render("minimal", "log.filter=debug").one("Deployment", "demo-ashlar-router")
    assert before["spec"]["template"] != after["spec"]["template"]


@ALL_CASES
def test_pods_have_no_privileges(case):
    for pod in Rendered(template("-f", case).stdout).pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        # Kubernetes would add ASHLAR_* variables for the Services, and the binary refuses unknown settings.
        assert pod["enableServiceLinks"] is False
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}


@ALL_CASES
def test_selectors_find_the_pods(case):
    """Services, budgets, monitors and policies select exactly the labels that pods and Services bear."""
    rendered = Rendered(template("-f", case).stdout)
    pods = [one["spec"]["template"]["metadata"]["labels"] for one in rendered.objects if one["kind"] in ("Deployment", "StatefulSet")]
    services = [one["metadata"]["labels"] for one in rendered.of("Service")]

    def found(selector, among):
        return sum(selector.items() <= labels.items() for labels in among)

    for service in rendered.of("Service"):
        assert found(service["spec"]["selector"], pods) == 1
    for one in rendered.of("PodDisruptionBudget"):
        assert found(one["spec"]["selector"]["matchLabels"], pods) == 1
    for one in rendered.of("ServiceMonitor"):
        assert found(one["spec"]["selector"]["matchLabels"], services) == 1
    for one in rendered.of("NetworkPolicy"):
        assert found(one["spec"]["podSelector"]["matchLabels"], pods) == 1


def test_zoo_is_read_only_for_routers(render):
    rendered = render("minimal")

    def mount(kind, name):
        container = rendered.one(kind, name)["spec"]["template"]["spec"]["containers"][0]
        return next(mount for mount in container["volumeMounts"] if mount["name"] == "zoo")

    assert mount("Deployment", "demo-ashlar-router")["readOnly"] is True
    assert "readOnly" not in mount("StatefulSet", "demo-ashlar-executor")
    assert rendered.one("PersistentVolumeClaim", "demo-ashlar-zoo")["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_zoo_in_a_bucket_needs_no_volume_and_executors_keep_what_they_read(render):
    rendered = render("bucket")
    zoo = tomllib.loads(rendered.one("ConfigMap", "demo-ashlar")["data"]["ashlar.toml"])["zoo"]
    assert zoo == {"root": "s3://models/zoos/main", "cache": "/var/cache/ashlar", "cache_bytes": 100 << 30}
    assert [one["metadata"]["name"] for one in rendered.of("PersistentVolumeClaim") if "zoo" in one["metadata"]["name"]] == []
    router, executor = (rendered.one(*one)["spec"]["template"]["spec"] for one in [("Deployment", "demo-ashlar-router"), ("StatefulSet", "demo-ashlar-executor")])
    for pod in (router, executor):
        container = pod["containers"][0]
        assert container["envFrom"] == [{"secretRef": {"name": "bucket-credentials"}}]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert "zoo" not in {volume["name"] for volume in pod["volumes"]}
    # The cache is told to stay below the limit at which its pod would be evicted.
    cache = next(volume for volume in executor["volumes"] if volume["name"] == "cache")
    assert int(cache["emptyDir"]["sizeLimit"]) > zoo["cache_bytes"]
    assert "cache" not in {volume["name"] for volume in router["volumes"]}
    bare = render("bucket", "zoo.cacheBytes=0", "zoo.credentialsSecret=").one("StatefulSet", "demo-ashlar-executor")["spec"]["template"]["spec"]
    assert "envFrom" not in bare["containers"][0] and "cache" not in {volume["name"] for volume in bare["volumes"]}


def test_secrets_are_made_only_of_given_content(render):
    assert [one["metadata"]["name"] for one in render("minimal").of("Secret")] == ["demo-ashlar-keys"]
    external = render("external-etcd")
    assert external.of("Secret") == []
    volumes = external.one("Deployment", "demo-ashlar-router")["spec"]["template"]["spec"]["volumes"]
    assert {"name": "keys", "secret": {"secretName": "tenant-keys", "defaultMode": 0o440}} in volumes


def test_existing_parts_are_not_made_again(render):
    kinds = {one["kind"] for one in render("external-etcd").objects}
    assert not kinds & {"PersistentVolumeClaim", "ServiceAccount", "Secret"}
    assert len(render("external-etcd").of("StatefulSet")) == 1


def test_autoscaled_executors_have_no_fixed_count(render):
    rendered = render("monitoring")
    assert "replicas" not in rendered.one("StatefulSet", "demo-ashlar-executor")["spec"]
    assert rendered.one("HorizontalPodAutoscaler", "demo-ashlar-executor")["spec"]["maxReplicas"] == 8


def test_streams_have_time_to_finish(render):
    for pod in render("minimal").pods()[:2]:
        container = pod["containers"][0]
        if container["name"] != "etcd":
            assert pod["terminationGracePeriodSeconds"] == 180
            assert container["lifecycle"]["preStop"]["sleep"]["seconds"] == 5


def test_notes_name_the_objects():
    result = run("helm", "install", "demo", CHART, "--dry-run=client", "--namespace", "prod", "-f", CHART / "ci/minimal-values.yaml")
    assert result.returncode == 0, result.stderr
    assert "service/demo-ashlar-router 8080:80" in result.stdout
