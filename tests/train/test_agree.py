"""Two workers: what one of them cannot do is raised on both, at once and with the same words."""

import os
import subprocess
import sys
from pathlib import Path

WORKERS = """
import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from cluster.errors import RayloopError, UnavailableError
from train.agree import on_first, together
from train.checkpoint import save_checkpoint

folder = Path(sys.argv[1])
child = os.fork()  # importing torch twice would take longer than all the rest
rank = 0 if child else 1
said = (folder / f"said-{rank}").open("w")
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))


def tell(name, work):
    try:
        print(name, work(), file=said)
    except RayloopError as error:
        print(name, type(error).__name__, error, file=said)
    except ValueError as error:
        print(name, "own", error, file=said)


def asked():
    if rank == 1:
        raise UnavailableError("the reward model does not answer")
    return "graded"


def broken():
    raise ValueError("odd")


def gather(state):
    rows = [torch.empty_like(state) for _ in range(2)]
    dist.all_gather(rows, state)
    return torch.cat(rows)


trainer = SimpleNamespace(
    state=SimpleNamespace(global_step=3),
    args=SimpleNamespace(world_size=2, device="cpu"),
    accelerator=SimpleNamespace(gather=gather),
)
tell("value", lambda: on_first(lambda: f"of {rank}"))
tell("both", together(lambda: f"own {rank}"))
tell("checkpoint", lambda: save_checkpoint(trainer, folder / "file", "digest"))
tell("grader", together(asked))
tell("library", lambda: on_first(broken))
tell("after", lambda: on_first(lambda: "all is well"))
said.close()
if child:
    os.waitpid(child, 0)
"""


def test_error_of_one_worker_is_raised_on_both(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder of checkpoints should be")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", WORKERS, str(tmp_path)], check=True, timeout=100, env=environment)
    first, second = ((tmp_path / f"said-{rank}").read_text().splitlines() for rank in range(2))
    place = f"out={str(tmp_path / 'file' / 'step-00000003')!r}"
    refused = f"checkpoint InputError {place} cannot be written (File exists); name a folder with free space"
    silent, well = "grader UnavailableError the reward model does not answer", "after all is well"
    assert first == ["value of 0", "both own 0", refused, silent, "library own odd", well]
    other = "library UnavailableError another worker failed: ValueError: odd"
    assert second == ["value of 0", "both own 1", refused, silent, other, well]
