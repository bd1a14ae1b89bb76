"""Manifests, against the schemas that Kubernetes publishes; nothing here needs a cluster."""

import argparse
import dataclasses
import pathlib

import pytest
import yaml

from launch import kubernetes

validate = pytest.importorskip("kubernetes_validate").validate

# Versions whose schemas are checked: an old one in use, and the newest.
VERSIONS = ("1.31", "1.34")

RESULT = '{"eval/top1": 0.5, "best/top1": 0.5, "seconds": 1.0}'


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    workdir: pathlib.Path
    config: str = "configs/resnet.py"

    @property
    def command(self):
        command = ["/here/python", "-m", "resflax.main", "--config", self.config]
        return [*command, "--workdir", str(self.workdir)]


def runs(*names):
    return [Run(name, pathlib.Path("/runs/depth") / name) for name in names]


def options(*arguments):
    parser = argparse.ArgumentParser()
    kubernetes.add_arguments(parser)
    return parser.parse_args(["--image", "me/resflax", "--claim", "disk", *arguments])


def render(*arguments, names=("depth=20", "depth=32")):
    """All objects, after a round through YAML."""
    rendered = kubernetes.manifests(runs(*names), options(*arguments))
    text = yaml.safe_dump_all([o for objects in rendered.values() for o in objects])
    return list(yaml.safe_load_all(text))


def job_spec(manifest):
    if manifest["kind"] == "JobSet":
        return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return manifest["spec"]


def pod(manifest):
    return job_spec(manifest)["template"]["spec"]


VARIANTS = [
    (),
    ("--gpus", "4", "--cpus", "16", "--memory", "64"),
    ("--nodes", "2", "--gpus", "8", "--queue", "team"),
    ("--tpu", "tpu-v5-lite-podslice", "--topology", "2x2"),
    ("--tpu", "tpu-v5-lite-podslice", "--topology", "4x4"),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("arguments", VARIANTS, ids=" ".join)
def test_what_is_rendered_fits_the_published_schemas(arguments, version):
    for manifest in render(*arguments):
        validate(manifest, version, strict=True)


# Fields of the custom resource jobset.x-k8s.io/v1alpha2, which the published schemas do not have.
JOB_SET = {
    "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": str},
    "failurePolicy": {"maxRestarts": int, "rules": list, "restartStrategy": str},
    "replicatedJobs": list,
    "suspend": bool,
}
RULE = {"name": str, "action": str, "onJobFailureReasons": list, "targetReplicatedJobs": list}
ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")


def check(value, schema):
    if isinstance(schema, dict):
        assert value.keys() <= schema.keys()
        for name, item in value.items():
            check(item, schema[name])
    else:
        assert type(value) is schema


@pytest.mark.parametrize("arguments", VARIANTS, ids=" ".join)
def test_a_job_set_has_the_fields_of_its_resource(arguments):
    for manifest in render("--kind", "jobset", *arguments):
        if manifest["kind"] != "JobSet":
            validate(manifest, VERSIONS[0], strict=True)
            continue
        assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
        spec = manifest["spec"]
        check(spec, JOB_SET)
        for rule in spec["failurePolicy"]["rules"]:
            check(rule, RULE)
            assert rule["action"] in ACTIONS
        for replicated in spec["replicatedJobs"]:
            check(replicated, {"name": str, "replicas": int, "template": {"spec": dict}})
            # What it makes of its template is a Job.
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
            validate(job | replicated["template"], VERSIONS[0], strict=True)


def test_several_nodes_find_one_another():
    account, role, binding, service, *jobs = render("--nodes", "2", "--gpus", "8")
    # What jax reads: the pods' own job, and its pods; see jax's K8sCluster.
    assert {(r, v) for rule in role["rules"] for r in rule["resources"] for v in rule["verbs"]} >= {
        ("pods", "list"),
        ("jobs", "get"),
    }
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"][0]["name"] == account["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    for job in jobs:
        assert job["metadata"]["labels"]  # jax looks for a JobSet's among them
        spec = job["spec"]
        assert spec["completionMode"] == "Indexed"
        assert spec["completions"] == spec["parallelism"] == 2
        assert pod(job)["subdomain"] == service["metadata"]["name"]
        assert pod(job)["serviceAccountName"] == account["metadata"]["name"]
        assert spec["template"]["metadata"]["labels"].items() >= service["spec"]["selector"].items()
        command = pod(job)["containers"][0]["command"]
        assert command[0] == "python"
        assert command[-4:] == ["--processes", "auto", "--expect_devices", "16"]


def test_a_node_alone_asks_nobody():
    jobs = render("--gpus", "4")
    assert [job["kind"] for job in jobs] == ["Job", "Job"]
    assert "--processes" not in pod(jobs[0])["containers"][0]["command"]
    assert pod(jobs[0])["containers"][0]["command"][-2:] == ["--expect_devices", "4"]
    assert pod(jobs[0])["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": "4"}}


def test_a_job_set_brings_its_own_service():
    kinds = [manifest["kind"] for manifest in render("--kind", "jobset", "--nodes", "2")]
    assert kinds == ["ServiceAccount", "Role", "RoleBinding", "JobSet", "JobSet"]


def test_a_tpu_slice_has_a_pod_on_each_of_its_hosts():
    service, job, _ = render("--tpu", "tpu-v5-lite-podslice", "--topology", "4x8")
    assert service["kind"] == "Service"
    assert job["spec"]["completions"] == 8
    assert pod(job)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    (container,) = pod(job)["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert container["command"][-2:] == ["--processes", "auto"]


@pytest.mark.parametrize("kind", kubernetes.KINDS)
def test_bad_input_is_final_and_a_stop_is_not(kind):
    manifest = render("--kind", kind, "--grace", "600")[-1]
    rules = job_spec(manifest)["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    stopped = {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [130, 143]}}
    assert (stopped in rules) == (kind == "job")
    assert pod(manifest)["terminationGracePeriodSeconds"] == 600


@pytest.mark.parametrize("nodes", [1, 2])
def test_each_node_may_fail_as_often_as_its_run(nodes):
    (*_, job) = render("--nodes", str(nodes), "--restarts", "5")
    # Kubernetes counts the pods that failed.
    assert job["spec"]["backoffLimit"] == 5 * nodes


def test_names_are_labels_that_stay_apart():
    names = ["shortcut=A", "shortcut=a", "depth=1" * 30, "2_x", "é", "lr=0.1,", "lr=0.1"]
    made = [kubernetes.name_of(name, "sweep") for name in names]
    made += [kubernetes.name_of(name) for name in names]
    assert len(set(made)) == len(made)
    for name in made:
        assert name.isascii()
        assert name == name.lower()
        assert name[0].isalpha()
        assert name[-1].isalnum()
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        # The longest that is made of it: the host name of a JobSet's pod.
        assert len(f"{name}-run-0-99999") <= 63


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (("--mount", "/data"), "is not in /data"),
        (("--tpu", "tpu-v5p-slice"), "belong together"),
        (("--topology", "4x4"), "belong together"),
        (("--tpu", "tpu-v5p-slice", "--topology", "four"), "such as 4x4"),
        (("--tpu", "tpu-v5p-slice", "--topology", "3x3"), "9 chips"),
        (("--tpu", "tpu-v5p-slice", "--topology", "4x4", "--gpus", "1"), "without --gpus"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, right):
    with pytest.raises(kubernetes.KubernetesError, match=right):
        render(*arguments)


def test_a_config_that_the_image_does_not_have_is_refused():
    run = dataclasses.replace(runs("depth=20")[0], config="/home/me/resnet.py:digits")
    with pytest.raises(kubernetes.KubernetesError, match="as it is in the image"):
        kubernetes.manifests([run], options())


def test_unfinished_runs_are_printed(tmp_path, capsys):
    both = [Run("depth=20", tmp_path / "depth=20"), Run("depth=32", tmp_path / "depth=32")]
    both[0].workdir.mkdir()
    (both[0].workdir / "result.json").write_text(RESULT)
    assert kubernetes.submit(both, options("--mount", str(tmp_path))) == 0
    output, errors = capsys.readouterr()
    (job,) = yaml.safe_load_all(output)
    assert job["metadata"]["annotations"]["resflax/run"] == "depth=32"
    assert "1 of 2 runs are done" in errors
    assert "kubectl apply -f -" in errors
    # With nothing left there is nothing to apply.
    assert kubernetes.submit(both[:1], options("--mount", str(tmp_path))) == 0
    output, errors = capsys.readouterr()
    assert not output
    assert "kubectl" not in errors


def test_manifests_are_written_to_a_directory(tmp_path, capsys):
    arguments = ("--nodes", "2", "--manifests", str(tmp_path / "new" / "manifests"))
    assert kubernetes.submit(runs("depth=20", "depth=32"), options(*arguments)) == 0
    files = sorted((tmp_path / "new" / "manifests").iterdir())
    assert len(files) == 3
    kinds = [[m["kind"] for m in yaml.safe_load_all(file.read_text())] for file in files]
    assert sorted(kinds) == [["Job"], ["Job"], ["ServiceAccount", "Role", "RoleBinding", "Service"]]
    assert f"kubectl apply -f {tmp_path}" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(kubernetes.KubernetesError, match="cannot be written"):
        kubernetes.submit(runs("depth=20"), options("--manifests", str(tmp_path / "file")))
