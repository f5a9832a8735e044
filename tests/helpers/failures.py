"""What Ray and its trainings raise when processes die."""

import ray.exceptions
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

GONE = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
"""What a worker raises when another one is dead."""


def dead() -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError())


def group(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("several", dict(enumerate(errors)))
