"""Ray Train's `TorchTrainer`, without the actors that a run has no use for.

Ray Train starts a process for each duty around the workers. Every one imports for seconds, and on a small machine it
does so while the worker wants to import too. Importing this module loads torch.
"""

import contextlib
import os
from typing import Any

import ray.train.torch
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

POLL_S = 0.25  # how often Ray Train looks at its workers


class WorkerGroupTrainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]  # Ray is untyped here
    """Starts the manager of Ray datasets only where there are some, and no cleaner of placement groups.

    The cleaner serves drivers that outlive many trainings. Ours closes its session after each, also before it tries
    again, and with a session Ray removes what its actors had reserved.
    """

    controller: Any = None
    """The actor that runs the workers, once `fit` has started it from the main thread."""

    def stop(self) -> None:
        """End the workers, from another thread; `fit` then raises."""
        if self.controller is not None:
            with contextlib.suppress(ray.exceptions.RayActorError):  # it ends itself before it answers
                ray.get(self.controller.abort.remote())

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's handler ends this process as if all were well; Ctrl-C stays an interruption, which ends the session."""
        self.controller = controller

    def _create_default_callbacks(self) -> list[Any]:
        idle = (PlacementGroupCleanerCallback,) if self.datasets else (PlacementGroupCleanerCallback, DatasetsCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]


def configure(nodes: int) -> None:
    """Set what Ray Train reads from the environment.

    By default it looks at its workers every two seconds, so that a finished training waits for as long. It also
    watches for nodes that are about to leave; where there is one, this command would leave with it.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
    if nodes == 1:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
