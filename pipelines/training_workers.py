"""Ray Train's workers: one per GPU, else one per node."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from avsep import storage
from pipelines.cluster import meet_at_ray_s_address
from pipelines.runners import OnRay

_NOTICED_S = 30.0  # a node that is gone is noticed after 20
Run = TypeVar("Run")


def train_workers(fit: Callable[[Run, str], None], run: Run, out: str, runner: OnRay) -> None:
    """Have each of Ray Train's workers do `fit(run, device)`.

    When one dies, they are all started again on what is there once the cluster has noticed, twice at most.
    A single worker without a GPU is a task like others: a group of workers starts seven processes of Ray's own.
    """
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    base: Any = TorchConfig().backend_cls

    class Backend(base):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(meet_at_ray_s_address)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        backend_cls = Backend

    fs, folder = storage.filesystem(storage.join(out, "ray"))

    def train_once() -> None:
        n_gpus = runner.n_gpus
        if not n_gpus and runner.n_nodes == 1:
            list(runner.map(train_alone, [(fit, run)]))
            return
        trainer = TorchTrainer(
            lambda config: fit(config["run"], config["device"]),
            train_loop_config={"run": run, "device": "cuda" if n_gpus else "cpu"},  # Ray hides GPUs from nobody
            torch_config=Config(),
            scaling_config=ScalingConfig(
                num_workers=n_gpus or runner.n_nodes,
                use_gpu=n_gpus > 0,
                resources_per_worker={"CPU": 0, "GPU": 1} if n_gpus else {"CPU": 1},  # a GPU's node may offer no CPUs
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name=f"train-{time.time_ns():x}",  # an old name would resume Ray's own record of an old run
                storage_path=folder,
                storage_filesystem=fs,
            ),
        )
        trainer.fit()

    for _ in range(2):
        with contextlib.suppress(TrainingFailedError, OSError):  # a store's, which may pass
            return train_once()
        time.sleep(_NOTICED_S)  # Ray's own restart would wait for a lost node, for ever
    train_once()


def train_alone(fit: Callable[[Run, str], None], run: Run) -> None:
    """Do a single worker's part in this process, as Ray Train does without a group: the body of a Ray task."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(lambda: fit(run, "cpu"), scaling_config=ScalingConfig(num_workers=0)).fit()
