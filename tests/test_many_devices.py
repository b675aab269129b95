"""Training under `torchrun`: four processes train the model of one, a killed one leaves a state, one alone writes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser
from typer.main import get_command

from fdml import train as training
from fdml.checkpoint import load_state
from fdml.cli import app
from fdml.data.dataset import Arrays, DataSet
from fdml.errors import InputError
from fdml.recipes import recipe
from fdml.run import Run
from fdml.train import train
from fdml.world import World

ROOT = Path(__file__).parents[1]
TINY = ["width=4", "attack_steps=2", "val_steps=2", "val_limit=40", "test_limit=20", "batch_size=256"]


def command(processes: int, name: str, out: Path, changes: list[str], *options: str) -> list[str]:
    """`fdml train`; `torchrun` starts it unless ``processes`` is 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    words = [word for key in [*TINY, *changes] for word in ("--set", key)]
    return [sys.executable, *launcher, "-m", "fdml", "train", name, *words, "--out", str(out), *options]


def start(words: list[str]) -> subprocess.Popen:
    """A process group of its own, so that a failing test can end all of it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    """Waits; returns what went to standard error."""
    try:
        return process.communicate(timeout=300)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in out.glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more", "apart"),
    [("fdml", (), 1e-4), ("trades", (), 1e-3), ("fdml", ("accumulate=2", "augment=cropshift,cutmix"), 1e-3)],
    ids=["fdml", "trades", "parts"],
)
def test_four_processes_train_the_model_of_one(name: str, more: tuple[str, ...], apart: float, tmp_path: Path) -> None:
    """The same losses to 1e-4, and weights. A few steps at a low rate, for the reason that the test of two gives.

    Where the attack of TRADES begins, the KL that it ascends is all but flat, so that rounding turns its direction: on
    one process alone, other kernels move the weights by 3e-4.
    """
    changes = ["epochs=1", "teacher_epochs=1", "lr=0.02", "teacher_lr=0.02", "positive=student"]
    changes += ["norm=l2", "eps=0.5", "seed=2", *more]
    alone, together = tmp_path / "alone", tmp_path / "together"
    for processes, out in ((1, alone), (4, together)):
        process = start(command(processes, name, out, changes))
        errors = finish(process)
        assert process.returncode == 0, errors
    for one, four in zip(Run(alone).rows(), Run(together).rows(), strict=True):
        assert one["loss"] == pytest.approx(four["loss"], abs=1e-4)
    torch.testing.assert_close(weights(together), weights(alone), atol=apart, rtol=0)


LONG = ["epochs=40", "schedule=constant"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes to the end."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(command(2, "pgd-at", out, LONG))
    errors = finish(process)
    assert process.returncode == 0, errors
    return out


def pid_of(rank: int, parent: int) -> int:
    """The process of this rank that the `torchrun` of process ``parent`` started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, variables = (folder / "status").read_text(), (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile, or is another user's
            continue
        if f"\nPPid:\t{parent}\n" in status and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(("rank", "processes"), [(1, 2), (0, 0)], ids=["together", "alone"])
def test_a_killed_process_leaves_a_state_to_resume(
    rank: int, processes: int, undisturbed: Path, tmp_path: Path
) -> None:
    """Resumed by as many processes the run ends with the weights of one that nothing disturbed; also one alone may
    finish it. Rank 0 is the one that writes, so its death may come in the middle of that."""
    out = tmp_path / "run"
    process = start(command(2, "pgd-at", out, LONG))
    try:
        while process.poll() is None and not (out / "state" / "student.safetensors").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(pid_of(rank, process.pid), signal.SIGKILL)
    finally:
        errors = finish(process)
    assert process.returncode != 0
    assert "SIGKILL" in errors
    assert not (out / "student.safetensors").exists(), "killed too late to show anything"
    done = load_state(out / "state" / "student.safetensors").values["epoch"]
    assert done >= 1
    before = Run(out).rows()[:done]

    resumed = start(command(processes, "pgd-at", out, LONG, "--resume"))
    errors = finish(resumed)
    assert resumed.returncode == 0, errors
    rows = Run(out).rows()
    assert [row["epoch"] for row in rows] == list(range(1, 41))
    assert rows[:done] == before, "epochs that were behind were trained again"
    assert json.loads((out / "report" / "summary.json").read_text())["student"].keys() >= {"clean", "worst"}
    if processes == 2:
        torch.testing.assert_close(weights(out), weights(undisturbed), atol=0, rtol=0)


def test_a_process_that_does_not_lead_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains to the end, leaving no state on the way, and then looks for the model that the first one wrote."""
    monkeypatch.setattr(World, "leads", False)
    monkeypatch.setattr(training, "STATE_SECONDS", 0.0)
    split = Arrays(torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8), torch.arange(16) % 2)
    data = DataSet("made-up", ("a", "b"), split, split, split, fingerprint="0" * 64)
    chosen = replace(recipe("pgd-at"), width=4, epochs=1, attack_steps=1, batch_size=8)
    with pytest.raises(InputError, match="student"):
        train(chosen, data, tmp_path / "run", device="cpu")
    assert not list(tmp_path.iterdir())


def test_the_files_for_clusters_start_the_command_that_there_is() -> None:
    """Every launcher takes its own options, `fdml train` its own, and a restart goes on."""
    yaml = pytest.importorskip("yaml")
    known = {name for each in get_command(app).commands["train"].params for name in each.opts}  # pyright: ignore
    folder = ROOT / "docs" / "deploy"
    _, job = yaml.safe_load_all((folder / "train-job.yaml").read_text(encoding="utf-8"))
    pods = [job["spec"]["template"]]
    replicas = yaml.safe_load((folder / "train-pytorchjob.yaml").read_text(encoding="utf-8"))["spec"]
    pods += [kind["template"] for kind in replicas["pytorchReplicaSpecs"].values()]
    commands = [container["command"] for pod in pods for container in pod["spec"]["containers"]]
    script = (folder / "train.sbatch").read_text(encoding="utf-8").replace("\\\n", "")
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    words = shlex.split(line)
    commands.append(words[words.index("torchrun") :])
    assert len(commands) == 4
    for words in commands:
        assert words[0] == "torchrun"
        launched = get_args_parser().parse_args(words[1:])
        assert (launched.module, launched.training_script, launched.training_script_args[0]) == (True, "fdml", "train")
        options = [word.partition("=")[0] for word in launched.training_script_args if word.startswith("--")]
        assert set(options) <= known
        assert {"--resume", "--out"} <= set(options)
