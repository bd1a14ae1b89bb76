"""A sweep on Kubernetes: the manifests of its runs, for kubectl to apply.

A run is an Indexed Job, or a JobSet with one, both around the same pod; on a TPU, the pod asks for
one host of a slice of GKE's. Several nodes find one another as jax does by itself there, which
needs a headless Service and an account that may read pods and jobs.
"""

import argparse
import hashlib
import math
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml

from launch import resources, status
from resflax.errors import UserError
from resflax.process.arguments import path_option

if TYPE_CHECKING:
    from launch.runs import Run

Manifest = dict[str, Any]

KINDS = ("job", "jobset")

# The exit code of resflax.main for bad input: to try again would not help.
_BAD_INPUT = 2
# Of a run that SIGINT or SIGTERM stopped: it goes on from its checkpoint.
_STOPPED = (130, 143)

# The longest name that a pod's and a JobSet's additions leave within 63 characters.
_NAME_LENGTH = 40


class KubernetesError(UserError):
    """There is no manifest for this; the message says why."""


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """The options of this executor."""
    resources.add_arguments(parser)
    parser.add_argument("--image", required=True, help="such as launch/Dockerfile makes")
    parser.add_argument(
        "--claim", required=True, help="the PersistentVolumeClaim that the runs' directories are on"
    )
    parser.add_argument(
        "--mount",
        type=pathlib.PurePosixPath,
        default=pathlib.PurePosixPath("/runs"),
        help="where it is mounted; --workdir is in it; default: /runs",
    )
    parser.add_argument("--kind", choices=KINDS, default="job", help="default: job")
    parser.add_argument("--tpu", metavar="ACCELERATOR", help="of GKE, such as tpu-v5-lite-podslice")
    parser.add_argument("--topology", help="of the TPU slice, in chips, such as 4x4")
    parser.add_argument(
        "--chips", type=resources.positive, default=4, help="of each TPU host; default: 4"
    )
    parser.add_argument(
        "--grace",
        type=resources.positive,
        default=300,
        help="seconds that a run gets to save itself; default: 300",
    )
    parser.add_argument(
        "--restarts",
        type=resources.positive,
        default=10,
        help="after failures other than bad input; default: 10",
    )
    parser.add_argument(
        "--queue", help="Kueue's LocalQueue, which starts the runs as there is room"
    )
    parser.add_argument(
        "--manifests",
        type=path_option,
        metavar="DIR",
        help="where the manifests are written; default: they are printed",
    )


def submit(runs: Sequence["Run"], options: argparse.Namespace) -> int:
    """Prints, or writes, the manifests of the runs that are not finished.

    Args:
      runs: of one sweep.
      options: see add_arguments.

    Returns:
      0.

    Raises:
      KubernetesError: if the options do not fit one another, or the files cannot be written.
    """
    left = [run for run in runs if status.result(run.workdir) is None]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are done", file=sys.stderr)
    if not left:
        return 0
    texts = {
        f"{name}.yaml": yaml.safe_dump_all(objects, sort_keys=False)
        for name, objects in manifests(left, options).items()
    }
    if options.manifests is None:
        print("---\n".join(texts.values()), end="")
        target = "-"
    else:
        target = str(options.manifests)
        try:
            options.manifests.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                (options.manifests / name).write_text(text)
        except OSError as error:
            raise KubernetesError(
                f"--manifests: {error.filename} cannot be written: {error.strerror}."
            ) from None
    print(f"kubectl apply -f {target} starts the others", file=sys.stderr)
    return 0


def manifests(runs: Sequence["Run"], options: argparse.Namespace) -> dict[str, list[Manifest]]:
    """The objects of each run, by its name there, and those that all share, by the sweep's.

    Args:
      runs: of one sweep.
      options: see submit.

    Raises:
      KubernetesError: if the options do not fit one another.
    """
    _check(runs, options)
    sweep = name_of(runs[0].workdir.parent.name)
    shared = _access(sweep) if _uses_api(options) else []
    if _num_nodes(options) > 1 and options.kind == "job":  # a JobSet brings its own
        shared.append(_service(sweep))
    objects = {sweep: shared} if shared else {}
    for run in runs:
        name = name_of(run.name, sweep)
        objects[name] = [_workload(run, name, sweep, options)]
    return objects


def name_of(text: str, sweep: str = "") -> str:
    """A name that Kubernetes takes for a Service, a Job and its pods: [a-z0-9-], a letter first.

    Args:
      text: a run's name, or that of a sweep.
      sweep: of the run; runs of another one, or of a name that differs by case, stay apart.
    """
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    words = words if words[:1].isalpha() else f"run-{words}"
    mark = hashlib.sha256(f"{sweep}/{text}".encode()).hexdigest()[:6]
    return f"{words[: _NAME_LENGTH - len(mark) - 1].rstrip('-')}-{mark}"


def _check(runs: Sequence["Run"], options: argparse.Namespace) -> None:
    for run in runs:
        if pathlib.PurePath(run.config).is_absolute():
            raise KubernetesError(
                f"--config {run.config}: name it as it is in the image, such as configs/X.py."
            )
        if not run.workdir.is_relative_to(options.mount):
            raise KubernetesError(
                f"--workdir {run.workdir.parent} is not in {options.mount}, where the volume is "
                "mounted; --mount names another directory."
            )
    if bool(options.tpu) != bool(options.topology):
        raise KubernetesError("--tpu and --topology belong together.")
    if not options.tpu:
        return
    if options.gpus or options.nodes > 1:
        raise KubernetesError("--tpu: the topology says how many nodes there are; without --gpus.")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", options.topology):
        raise KubernetesError(f"--topology {options.topology}: such as 4x4, or 2x2x4.")
    if _num_chips(options) % options.chips:
        raise KubernetesError(
            f"--topology {options.topology} has {_num_chips(options)} chips, which hosts of "
            f"{options.chips} do not share; see --chips."
        )


def _num_chips(options: argparse.Namespace) -> int:
    return math.prod(map(int, options.topology.split("x")))


def _num_nodes(options: argparse.Namespace) -> int:
    return _num_chips(options) // options.chips if options.tpu else options.nodes


def _uses_api(options: argparse.Namespace) -> bool:
    """Whether jax asks Kubernetes where the other nodes are; those of a TPU, GKE tells it."""
    return _num_nodes(options) > 1 and not options.tpu


def _access(sweep: str) -> list[Manifest]:
    metadata = {"name": sweep, "labels": {"app.kubernetes.io/part-of": sweep}}
    group = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {
            "apiVersion": f"{group}/v1",
            "kind": "Role",
            "metadata": metadata,
            "rules": [
                {"apiGroups": [""], "resources": ["pods", "services"], "verbs": ["get", "list"]},
                {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list"]},
            ],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "subjects": [{"kind": "ServiceAccount", "name": sweep}],
            "roleRef": {"apiGroup": group, "kind": "Role", "name": sweep},
        },
    ]


def _service(sweep: str) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": sweep, "labels": {"app.kubernetes.io/part-of": sweep}},
        "spec": {
            "clusterIP": "None",
            # Pods look for the first one while it is starting.
            "publishNotReadyAddresses": True,
            "selector": {"app.kubernetes.io/part-of": sweep},
        },
    }


def _workload(run: "Run", name: str, sweep: str, options: argparse.Namespace) -> Manifest:
    """The run's Job or JobSet."""
    labels = {"app.kubernetes.io/part-of": sweep}
    if options.queue:
        labels["kueue.x-k8s.io/queue-name"] = options.queue
    metadata = {"name": name, "labels": labels, "annotations": {"resflax/run": run.name}}
    job = _job_spec(run, sweep, options)
    suspend = {"suspend": True} if options.queue else {}  # Kueue lets it go
    if options.kind == "job":
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata,
            "spec": suspend | job,
        }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            **suspend,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "rules": [
                    {
                        "name": "badInput",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "run", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _job_spec(run: "Run", sweep: str, options: argparse.Namespace) -> Manifest:
    num_nodes = _num_nodes(options)
    rules: list[Manifest] = [
        {
            "action": "FailJob",
            "onExitCodes": {"operator": "In", "values": [_BAD_INPUT]},
        }
    ]
    if options.kind == "job":
        # Neither a node that is taken away nor a run that was asked to stop is a failure. A JobSet
        # starts all of its pods again whatever it was.
        rules += [
            {
                "action": "Ignore",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            },
            {"action": "Ignore", "onExitCodes": {"operator": "In", "values": list(_STOPPED)}},
        ]
    return {
        "completionMode": "Indexed",
        "completions": num_nodes,
        "parallelism": num_nodes,
        # Where one process of a run fails, all do.
        "backoffLimit": options.restarts * num_nodes if options.kind == "job" else 0,
        "podFailurePolicy": {"rules": rules},
        "template": {
            "metadata": {"labels": {"app.kubernetes.io/part-of": sweep}},
            "spec": _pod_spec(run, sweep, options),
        },
    }


def _pod_spec(run: "Run", sweep: str, options: argparse.Namespace) -> Manifest:
    volumes: list[Manifest] = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}}
    ]
    mounts = [{"name": "runs", "mountPath": str(options.mount)}]
    if options.gpus:
        # NCCL's shared memory: a container's own is 64 MiB.
        volumes.append({"name": "memory", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "memory", "mountPath": "/dev/shm"})
    pod: Manifest = {
        "restartPolicy": "Never",  # a Job with a podFailurePolicy takes no other
        "terminationGracePeriodSeconds": options.grace,
        # Otherwise the run is process 1, which ignores SIGTERM until Python has a handler for it.
        "shareProcessNamespace": True,
    }
    if _num_nodes(options) > 1 and options.kind == "job":
        pod["subdomain"] = sweep
    if _uses_api(options):
        pod["serviceAccountName"] = sweep
    else:
        pod["automountServiceAccountToken"] = False
    if options.tpu:
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": options.tpu,
            "cloud.google.com/gke-tpu-topology": options.topology,
        }
    pod["containers"] = [
        {
            "name": "run",
            "image": options.image,
            "command": _command(run, options),
            "env": [
                {"name": "PYTHONUNBUFFERED", "value": "1"},
                # Compiled programs are kept for the other runs.
                {"name": "XDG_CACHE_HOME", "value": str(options.mount / ".cache")},
            ],
            "resources": _resources(options),
            "volumeMounts": mounts,
            # `kubectl describe pod` shows what a run that failed said last.
            "terminationMessagePolicy": "FallbackToLogsOnError",
        }
    ]
    pod["volumes"] = volumes
    return pod


def _command(run: "Run", options: argparse.Namespace) -> list[str]:
    # This machine's interpreter is not the image's.
    command = ["python", *run.command[1:]]
    if _num_nodes(options) > 1:
        command += ["--processes", "auto"]
    if options.gpus:  # to train on some of them, or on none, is worse than to stop
        command += ["--expect_devices", str(options.nodes * options.gpus)]
    return command


def _resources(options: argparse.Namespace) -> Manifest:
    wanted = resources.of(options)
    requests: Manifest = {}
    if wanted.cpus:
        requests["cpu"] = str(wanted.cpus)
    if wanted.memory:
        requests["memory"] = f"{wanted.memory}Gi"
    limits: Manifest = {}
    if wanted.gpus:
        limits["nvidia.com/gpu"] = str(wanted.gpus)
    if options.tpu:
        limits["google.com/tpu"] = str(options.chips)
    return {name: value for name, value in (("requests", requests), ("limits", limits)) if value}
