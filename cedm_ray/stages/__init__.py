"""The only rooms with Ray and MLflow in them: they wire the lower rooms together.

What is started here are the stages, in the order of ``pipeline.py``; below them, each knowing those under it alone:

- ``results``: what a search found: read, printed, logged, exported
- ``checkup``: what a machine or a cluster lacks
- ``budget``: what a search may train, and what that takes
- ``training``: trials, from Tune's decisions down to a worker's steps, and their records
- ``inputs``: images, embeddings, clusterings, detectors and features, made once and kept
- ``context``: what all stages of a search share
- ``cluster``: Ray, its nodes, and how they are divided
- ``tracking``: MLflow
- ``show``: the terminal, and what Ctrl-C does
- ``storage``: whole files, checkpoints, the store, and its copy in a bucket
"""

import os

# Ray reads these when it is imported or when a process of it starts. They spare services that a search has no use for
# (seconds per trial), keep Ray's and Tune's own reports off the terminal, and send no usage statistics.
RAY_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for one another on a busy machine must not spin
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C reaches the search itself, which leaves a resumable run
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
for _name, _value in RAY_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
