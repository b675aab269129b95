"""Training as a user sees it: what a run leaves behind, how it goes on after a kill, how it stops when it must."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import fdml
from fdml.data import load as load_data
from fdml.data.dataset import Arrays, DataSet, Files
from fdml.data.extra import extend
from fdml.data.folder import Paths
from fdml.errors import InputError, Stopped
from fdml.guidance import Guided, Teacher
from fdml.objective import objective
from fdml.recipe import Recipe
from fdml.recipes import RECIPES, recipe
from fdml.run import Run
from fdml.train import fit, new_model, train
from fdml.train_batch import TrainBatch
from fdml.world import World

ROOT = Path(__file__).parents[1]
TINY = ["width=4", "epochs=2", "teacher_epochs=1", "attack_steps=2", "val_steps=2", "test_limit=20", "val_limit=40"]


def tiny(name: str = "fdml", **changes: object) -> Recipe:
    """A recipe that trains in about a second."""
    small = {"width": 4, "epochs": 2, "teacher_epochs": 1, "attack_steps": 2}
    return replace(recipe(name, "digits"), **(small | {"val_steps": 2, "test_limit": 20, "val_limit": 40} | changes))


@pytest.fixture(scope="session")
def digits() -> DataSet:
    return load_data("digits")


@pytest.fixture(scope="session")
def finished(digits: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(tiny(), digits, out)
    return out


def learn(chosen: Recipe, data: DataSet, out: Path) -> list[dict]:
    """The training of ``train`` without its report; returns the lines of ``metrics.jsonl``."""
    run, world = Run(out), World.join("cpu")
    run.begin(chosen, {}, resume=False, overwrite=False)
    guide = None
    if chosen.needs_teacher:
        teacher = fit(chosen.teacher(), data, run, world, "teacher", None, Console(quiet=True))
        guide = Teacher.of(teacher, chosen, data.train)
    fit(chosen, data, run, world, "student", guide, Console(quiet=True))
    return run.rows()


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("student", "student-last", "teacher"):
        a, b = weights(one / f"{name}.safetensors"), weights(other / f"{name}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_a_run_leaves_what_the_design_promises(finished: Path, digits: DataSet) -> None:
    for name in ("student", "student-last", "teacher"):
        card = fdml.read_card(finished / f"{name}.safetensors")
        assert card.data == {"name": "digits", "fingerprint": digits.fingerprint}
        assert card.input == (1, 8, 8)
    assert fdml.read_card(finished / "student.safetensors").threat == {"norm": "linf", "eps": 0.2}
    assert fdml.read_card(finished / "teacher.safetensors").threat is None
    summary = json.loads((finished / "report" / "summary.json").read_text())
    assert summary["n"] == 20
    assert summary["threat"] == {"norm": "linf", "eps": 0.2}
    for role in ("teacher", "student"):
        assert summary[role]["worst"] <= min(summary[role][name] for name in ("clean", "fgsm", "pgd20", "pgd50x3"))
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(row["role"], row["epoch"]) for row in rows] == [("teacher", 1), ("student", 1), ("student", 2)]
    assert {"loss", "ce", "fd", "ml", "active", "d_ap", "d_an", "clean", "pgd", "lr"} <= rows[-2].keys()
    for picture in ("curves.png", "examples.png"):
        assert (finished / "report" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_loaded_model_answers_as_the_trained_one(finished: Path, digits: DataSet) -> None:
    model = fdml.load(finished / "student.safetensors")
    _, x, _ = digits.test.head(16).all()
    assert not model.training
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(image[None]) for image in x])
    assert together.shape == (16, 10)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


TERMS = ("ce", "bce", "kl", "kl_clean", "alp", "helper", "mse", "attention", "triplet", "fd", "ml", "ibp")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_trains(name: str, digits: DataSet, tmp_path: Path) -> None:
    rows = learn(tiny(name, epochs=1), digits, tmp_path / "run")
    assert (rows[0]["role"] == "teacher") == recipe(name).needs_teacher
    row = rows[-1]
    assert row["loss"] == pytest.approx(sum(row[term] for term in TERMS if term in row), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"awp": 0.01, "awp_after": 0.0, "clip": 1.0},
        {"positive": "student", "guidance": "ramp", "schedule": "multi-step", "ema": 0.0},
        {"start": "random", "answer": 0.5, "schedule": "constant", "momentum": 0.0},
        {"start": "random", "teacher_width": 6, "fd_layers": "stage2, stage3"},
        # Narrower than 8, AVX2 kernels of torch 2.13 write past the end of a layer.
        {"architecture": "resnet18", "width": 8, "teacher_width": 8, "preact": True, "fd_layers": "stage4"},
        {"augment": "crop,erase", "norm": "l2", "eps": 0.5},
        {"precision": "bf16"},
        {
            "negative": "adversarial",
            "attack_target": "confused",
            "augment": "cropshift,cutmix",
            "accumulate": 2,
            "sync_norm": False,
        },
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_switch_trains(changes: dict, digits: DataSet, tmp_path: Path) -> None:
    rows = learn(tiny(**changes, epochs=1), digits, tmp_path / "run")
    assert all(row["loss"] == row["loss"] and row["loss"] < 20 for row in rows)


class Own(torch.nn.Module):
    """A user's network, of modules that fdml knows nothing about."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 6, 3, 2, 1), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Conv2d(6, 8, 3, 2, 1)
        )
        self.pool = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        self.head = torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.body(x)))


def test_a_user_s_own_network_trains(digits: DataSet, tmp_path: Path) -> None:
    def make() -> fdml.RobustModel:
        return fdml.wrap(Own(), ["body", "pool"], mean=digits.mean, std=digits.std)

    summary = train(tiny(fd=1.0, ml=1.0, fd_layers="body"), digits, tmp_path / "run", make=make)
    assert {"teacher", "student"} <= summary.keys()
    path = tmp_path / "run" / "student.safetensors"
    with pytest.raises(InputError, match="model="):
        fdml.load(path)
    _, x, _ = digits.test.head(4).all()
    assert fdml.load(path, model=make())(x).shape == (4, 10)


def test_the_cifar10_recipe_runs_on_a_cpu(tmp_path: Path) -> None:
    """`resnet18` at its full width, a few steps; the images are made up, the recipe is not."""
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Arrays(images, torch.arange(4))
    data = DataSet("cifar10", tuple("abcd"), split, split, split, fingerprint="0" * 64)
    short = replace(recipe("fdml", "cifar10"), epochs=1, teacher_epochs=1, batch_size=2, attack_steps=1, val_steps=1)
    rows = learn(short, data, tmp_path / "run")
    assert [row["role"] for row in rows] == ["teacher", "student"]
    assert fdml.read_card(tmp_path / "run" / "student.safetensors").architecture == "resnet18"


def test_images_streamed_from_a_folder_train(digits: DataSet, tmp_path: Path) -> None:
    """What does not fit into memory comes from worker processes, in the same order: the same losses."""
    few = digits.train.head(96)
    names = tuple(f"{index}.png" for index in range(96))
    for name, image in zip(names, few.images, strict=True):
        Image.fromarray(image[0].numpy()).save(tmp_path / name)
    files = Files(Paths(tmp_path, names), few.labels, (1, 8, 8))
    streamed = learn(tiny(batch_size=32), replace(digits, train=files), tmp_path / "streamed")
    held = learn(tiny(batch_size=32), replace(digits, train=few), tmp_path / "held")
    assert [row["loss"] for row in streamed] == pytest.approx([row["loss"] for row in held], rel=1e-5)


def test_training_learns(digits: DataSet, tmp_path: Path) -> None:
    """A few epochs of the real recipe beat chance by far, clean and attacked; an undefended model does not."""
    short = tiny(width=8, epochs=6, teacher_epochs=4, attack_steps=3, test_limit=100)
    summary = train(short, digits, tmp_path / "run")
    assert summary["student"]["clean"] > 0.8
    assert summary["student"]["worst"] > 0.3
    assert summary["teacher"]["worst"] < 0.15


def test_the_same_recipe_gives_the_same_weights(finished: Path, digits: DataSet, tmp_path: Path) -> None:
    learn(tiny(), digits, tmp_path / "again")
    assert_same_weights(finished, tmp_path / "again")
    learn(tiny(seed=1), digits, tmp_path / "other")
    a, b = (weights(path / "student.safetensors") for path in (finished, tmp_path / "other"))
    assert not torch.equal(a["backbone.head.weight"], b["backbone.head.weight"])


def test_a_caller_s_random_state_is_left_alone(digits: DataSet, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train(tiny(epochs=1), digits, tmp_path / "run")
    assert torch.equal(before, torch.get_rng_state())


COMMAND = [sys.executable, "-m", "fdml", "train", *(word for key in TINY for word in ("--set", key))]


def start(out: Path, *options: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "progress", [pytest.param("state/teacher.safetensors", marks=pytest.mark.slow), "state/student-best.safetensors"]
)
def test_a_killed_run_ends_with_the_same_weights(finished: Path, tmp_path: Path, progress: str) -> None:
    out = tmp_path / "killed"
    process = start(out)
    for _ in range(6000):
        if (out / progress).exists() or process.poll() is not None:
            break
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert (out / progress).exists()
    assert not (out / "student.safetensors").exists(), "killed too late to show anything"
    resumed = start(out, "--resume")
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert_same_weights(finished, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["role"], row["epoch"]) for row in rows] == [("teacher", 1), ("student", 1), ("student", 2)]


def test_a_run_stopped_between_two_steps_ends_with_the_same_weights(
    finished: Path, digits: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of an epoch: the state holds the step, the sums and the moving average."""
    from fdml.learner import Learner

    calls = 0
    step = Learner.step

    def interrupted(self: Learner, *arguments, **keywords) -> dict:
        nonlocal calls
        calls += 1
        if calls == 14:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(Learner, "step", interrupted)
    out = tmp_path / "stopped"
    with pytest.raises(Stopped, match=r"--resume") as caught:
        train(tiny(), digits, out)
    assert caught.value.code == 130
    train(tiny(), digits, out, resume=True)
    assert_same_weights(finished, out)
    loss = [json.loads((path / "metrics.jsonl").read_text().splitlines()[1])["loss"] for path in (finished, out)]
    assert loss[0] == loss[1]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(digits: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped, match=r"the loss term ml is not finite after epoch \d of the student") as caught:
        train(tiny(ml=1e300), digits, out)
    assert caught.value.code == 1
    assert (out / "teacher.safetensors").exists()
    for state in out.rglob("*.safetensors"):
        assert all(
            bool(torch.isfinite(tensor).all()) for tensor in load_file(state).values() if tensor.is_floating_point()
        )


def test_a_folder_that_holds_a_run_is_not_touched(finished: Path, digits: DataSet, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(InputError, match=r"already holds a run.*--resume.*--overwrite"):
        train(tiny(), digits, finished)
    with pytest.raises(InputError, match=r"begun with recipe epochs=2, not 3"):
        train(tiny(epochs=3), digits, finished, resume=True)
    few = Arrays(digits.test.head(200).images, digits.test.head(200).labels)
    with pytest.raises(InputError, match="begun with data"):
        train(tiny(), replace(digits, name="other", train=few, fingerprint="0" * 64), finished, resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_overwrite_replaces_the_run_and_nothing_else(digits: DataSet, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    learn(tiny("standard", epochs=1), digits, out)
    train(tiny("standard", epochs=1, seed=5), digits, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert fdml.read_card(out / "student.safetensors").seed == 5


def test_a_finished_run_is_resumed_at_once(finished: Path, digits: DataSet) -> None:
    before = (finished / "student.safetensors").stat().st_mtime_ns
    summary = train(tiny(), digits, finished, resume=True)
    assert "worst" in summary["student"]
    assert (finished / "student.safetensors").stat().st_mtime_ns == before


def test_adapters_are_in_every_loss(digits: DataSet) -> None:
    """Where guidance has faded too: processes that train together wait for the gradient of every weight."""
    chosen, world = tiny(start="random", teacher_width=6, guidance_until=0.5), World.join("cpu")
    guide = Teacher.of(new_model(chosen.teacher(), digits, None, None), chosen, digits.train)
    index, x, y = digits.train.head(32).all()
    guided = Guided(new_model(chosen, digits, guide, None), guide, x[:2])
    terms = objective(chosen, guided, guided, TrainBatch(x, x, y, guide.advise(x, index)), 0.9, world)
    assert float(terms.losses["fd"].detach()) == float(terms.losses["ml"].detach()) == 0
    terms.total().backward()
    assert guided.adapters
    assert all(p.grad is not None for p in guided.parameters())


def test_in_one_pass_the_running_statistics_describe_what_the_student_learnt_by(digits: DataSet) -> None:
    """Clean and adversarial images in one pass are normalised as the model in inference will; by themselves, not."""
    x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    batch = TrainBatch(x, (x + 0.5).clamp(max=1.0), y)
    apart = {}
    for one_pass in (True, False):
        chosen = tiny("trades", one_pass=one_pass)
        model = new_model(chosen, digits, None, None)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None  # the running statistics are the mean over the passes
        guided = Guided(model, None, x[:2])
        found = objective(chosen, guided, guided, batch, 0.0, World(0, 1, torch.device("cpu")))
        model.eval()
        again = objective(chosen, guided, guided, batch, 0.0, World(0, 1, torch.device("cpu")))
        apart[one_pass] = abs(float(found.losses["kl"].detach()) - float(again.losses["kl"].detach()))
    assert apart[True] < 0.05 * apart[False]


def test_a_given_teacher_is_taken(finished: Path, digits: DataSet, tmp_path: Path) -> None:
    train(tiny(), digits, tmp_path / "run", teacher=finished / "teacher.safetensors")
    assert_same_weights(finished, tmp_path / "run")


def test_extra_images_are_learnt_from(digits: DataSet, tmp_path: Path) -> None:
    """Noise with one label: a model that saw much of it knows that label."""
    numbers = np.random.default_rng(0)
    noise = numbers.integers(0, 256, (300, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "extra.npz", image=noise, label=np.full(300, 9))
    more = extend(digits, f"npz:{tmp_path / 'extra.npz'}")
    seen = torch.from_numpy(numbers.integers(0, 256, (100, 1, 8, 8), dtype=np.uint8)).float() / 255
    shares = []
    for data, name in ((digits, "own"), (more, "both")):
        rows = learn(tiny("standard", epochs=4, extra_share=0.5), data, tmp_path / name)
        assert len(rows) == 4
        model = fdml.load(tmp_path / name / "student.safetensors")
        with torch.no_grad():
            shares.append(float((model(seen).argmax(1) == 9).double().mean()))
        assert rows[-1]["clean"] > 0.5
    assert shares[1] > 0.9 > shares[0]
    with pytest.raises(InputError, match="extra_share=0 leaves the 300 extra images unseen"):
        learn(tiny("standard", extra_share=0.0), more, tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 8.0}, r"did you mean 8/255\?"),
        ({"batch_size": 5000}, "batch_size=5000 does not fit"),
        ({"accumulate": 3}, "batch_size=128 does not fit.*accumulate=3"),
        ({"fd_layers": "stage9"}, "unknown layer in fd_layers 'stage9'"),
        ({"architecture": "resnet81"}, "unknown architecture 'resnet81'.*resnet18"),
        ({"augment": "flap"}, "flap.*flip"),
        ({"start": "teacher", "teacher_width": 5}, "start=teacher needs"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict, message: str, digits: DataSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(tiny(**changes), digits, tmp_path / "run")


@pytest.mark.parametrize(
    "name",
    ["fdml", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fdml-smooth", "fdml-ibp", "tla", "lbgat"))],
)
def test_two_processes_train_the_model_of_one(name: str, tmp_path: Path) -> None:
    """`torchrun`, gloo: the same global batches give the same student to 1e-4, and the same losses.

    A few steps at a low rate. The losses have kinks (the sign of a gradient, the hardest negative), where the last bit
    decides about a whole step: in the long run two correct runs drift apart, however many processes they are.
    """
    keys = [*TINY, "epochs=1", "batch_size=256", "lr=0.02", "teacher_lr=0.02", "positive=student"]
    # With this seed no kink is met within the steps; with others one is, on some processors.
    keys += ["eps=0.1", "seed=2"] if name == "fdml-ibp" else ["norm=l2", "eps=0.5", "seed=2"]  # bounds are for linf
    keys += ["lr=0.01"] if name == "lbgat" else []  # a square of logits, whose gradients are larger
    words = [word for key in keys for word in ("--set", key)]
    alone, together = tmp_path / "alone", tmp_path / "together"
    for processes, out in ((1, alone), (2, together)):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
                *("-m", "fdml", "train", name, *words, "--out", str(out)),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    roles = ("student", "student-last", *(["teacher"] if recipe(name).needs_teacher else []))
    for role in roles:
        a, b = weights(alone / f"{role}.safetensors"), weights(together / f"{role}.safetensors")
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    for one, two in zip(Run(alone).rows(), Run(together).rows(), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)


@pytest.mark.slow
def test_a_compiled_run_learns_as_one_that_is_not(finished: Path, tmp_path: Path) -> None:
    """Compiled code may round otherwise: losses agree, bits need not. In a process of its own, for the types that tests
    check at each call can't be compiled."""
    out = tmp_path / "run"
    process = start(out, "--set", "compile=true")
    _, error = process.communicate()
    assert process.returncode == 0, error
    for plain, compiled in zip(Run(finished).rows(), Run(out).rows(), strict=True):
        assert plain["loss"] == pytest.approx(compiled["loss"], rel=5e-3)
