"""A JobSet for GKE: a Job of as many pods as a slice has hosts, one Job for each slice."""

from typing import Any

import yaml

from tools.launch.job import USER_MISTAKE, Job, bucket_workdir, image
from tools.tpu import names
from tools.tpu.names import Topology

_SPOT = "cloud.google.com/gke-spot"


def manifest(
  job: Job, topology: Topology, slices: int, container: str, service_account: str, spot: bool
) -> str:
  """The manifest as YAML.

  Args:
    job: its workdir is gs://BUCKET/PATH.
    topology: of one slice.
    slices: how many are joined by the network of the data centre.
    container: image that holds the checkout and its environment.
    service_account: of Kubernetes, with access to the bucket; "" is the namespace's default.
    spot: on nodes that may be taken away.
  """
  command = job.command("python3", bucket_workdir(job.workdir))
  pod: dict[str, Any] = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": job.grace,
    "nodeSelector": {
      "cloud.google.com/gke-tpu-accelerator": topology.generation.gke,
      "cloud.google.com/gke-tpu-topology": topology.shape,
      **({_SPOT: "true"} if spot else {}),
    },
    "containers": [
      {
        "name": "app",
        "image": image(container),
        # SIGTERM reaches the app itself, which ends with code 143 after its checkpoint: no success,
        # so the set begins again.
        "command": [_literal(argument) for argument in command],
        # Without a TPU the app ends and uses no CPU instead. The pods of a new attempt take over
        # the lock of the workdir from the last ones, which are on other nodes, by OV_JOB_ID.
        "env": [
          {"name": "JAX_PLATFORMS", "value": "tpu,cpu"},
          {"name": "OV_JOB_ID", "value": job.name},
        ],
        "resources": {"limits": {"google.com/tpu": topology.chips_per_host}},
      }
    ],
  }
  if spot:
    taint = {"key": _SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    pod["tolerations"] = [taint]
  if service_account:
    pod["serviceAccountName"] = names.name(service_account, "--service_account")
  text = yaml.safe_dump(_jobset(job, topology, slices, pod), sort_keys=False, width=1000)
  return _HEADER + text


_HEADER = """\
# kubectl apply -f FILE; needs JobSet 0.6 or later in the cluster.
# Who the other processes are, GKE writes into the environment of TPU pods; ov_sharding reads it.
"""


def _jobset(job: Job, topology: Topology, slices: int, pod: dict[str, Any]) -> dict[str, Any]:
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
      "name": job.name,
      # A slice is a node pool; no two of them share one.
      "annotations": {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
      },
    },
    "spec": {
      "failurePolicy": {
        "maxRestarts": job.restarts,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
      },
      "replicatedJobs": [
        {
          "name": "slice",
          "replicas": slices,
          "template": {
            "spec": {
              "completionMode": "Indexed",
              "completions": topology.hosts,
              "parallelism": topology.hosts,
              "backoffLimit": 0,  # one pod less, and all begin again together
              "podFailurePolicy": {
                "rules": [
                  {
                    "action": "FailJob",
                    "onExitCodes": {
                      "containerName": "app",
                      "operator": "In",
                      "values": [USER_MISTAKE],
                    },
                  }
                ]
              },
              "template": {
                "spec": pod,
              },
            }
          },
        }
      ],
    },
  }


def _literal(argument: str) -> str:
  """Escape an argument: Kubernetes expands $(NAME), and reads each doubled dollar as one."""
  return argument.replace("$", "$$")
