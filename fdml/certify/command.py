"""What `fdml certify` does with a model and a data set: chooses a method, makes its prover and runs the job."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fdml.certify.by_bounds import Bounding, BoundsProver, onnx_source
from fdml.certify.by_smoothing import Sampling, SmoothingProver, check_sigma
from fdml.certify.job import Job, chosen, run, settings_of
from fdml.certify.prove import Prover, classifier
from fdml.data.dataset import DataSet
from fdml.errors import InputError, unknown
from fdml.evaluate.victim import Victim
from fdml.models import Frozen
from fdml.threat import Threat
from fdml.world import World

METHODS = ("smoothing", "cohen", "bounds")
PRECISIONS = ("fp32", "bf16")


def certify_data(
    path: Path,
    data: DataSet,
    out: Path,
    *,
    method: str | None = None,
    sigma: float | None = None,
    radii: Sequence[float] = (),
    alpha: float = 0.001,
    n0: int = 100,
    n: int = 100_000,
    threat: Threat | None = None,
    timeout: float = 30.0,
    limit: int = 1000,
    skip: int = 1,
    seed: int = 0,
    precision: str = "fp32",
    attack: bool = True,
    force: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Certifies test images of ``data`` for the model at ``path`` (a model file, run folder, bundle or ONNX file) and
    writes the certificates and their report into ``out``; returns the report.

    ``method`` is smoothing (``sigma``, ``radii``, ``alpha``, ``n0``, at most ``n`` samples), cohen (exactly ``n``), or
    bounds (``threat``, ``timeout`` seconds an image); None takes smoothing for a model trained with noise or a sigma
    given, else bounds. The rest is as in ``run``. Raises ``InputError`` for what does not fit.
    """
    if method is not None and method not in METHODS:
        raise unknown("method", method, METHODS)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    indices = chosen(data, limit, skip)
    world = World.join(device)
    data = data.to(world.device)
    _, like, _ = next(iter(data.test.batches([torch.tensor(indices[:8])])))
    victim = Victim.read(path, path.stem, world.device, like)
    if victim.card is not None and len(victim.card.classes) != len(data.classes):
        raise InputError(f"{path} tells {len(victim.card.classes)} classes apart, {data.name} has {len(data.classes)}")
    trained = bool(victim.card and victim.card.recipe.get("sigma"))
    method = method or ("smoothing" if sigma is not None or trained else "bounds")
    if method == "bounds":
        asked = Bounding(**asdict(threat or _threat(victim)), timeout=timeout, seed=seed)
        job = _bounding(victim, data, indices, asked, like)
    else:
        sampling = Sampling(
            sigma=check_sigma(victim.card, sigma, force=force),
            radii=tuple(radii) or None,
            alpha=alpha,
            n0=n0,
            n=n,
            sequential=method == "smoothing",
            seed=seed,
        )
        job = _smoothing(victim, data, indices, sampling, like, precision, attack, world.device)
    return run(job, out, world, resume=resume, overwrite=overwrite, console=console)


def _smoothing(
    victim: Victim,
    data: DataSet,
    indices: Sequence[int],
    sampling: Sampling,
    like: torch.Tensor,
    precision: str,
    attack: bool,
    device: torch.device,
) -> Job:
    sampling = replace(sampling, radii=sampling.asked)
    model = victim.model
    classify = classifier(model, like, precision)
    attacked = model if attack and isinstance(model, Frozen) else None
    engine = "ONNX Runtime" if type(classify).__name__ == "Session" else "torch"

    def make(watch: Callable[[int], None]) -> Prover:
        return SmoothingProver(classify, len(data.classes), sampling, attacked=attacked, device=device, watch=watch)

    settings = settings_of(sampling) | {"precision": precision, "engine": engine, "attack": attacked is not None}
    return Job(victim, data, indices, "smoothing" if sampling.sequential else "cohen", settings, make)


def _bounding(victim: Victim, data: DataSet, indices: Sequence[int], asked: Bounding, like: torch.Tensor) -> Job:
    if victim.file is not None and victim.file.suffix == ".onnx":
        source = onnx_source(victim.file, like)
    else:
        assert isinstance(victim.model, Frozen)
        source = onnx_source(victim.model, like)
    # Read at once: what bounds do not cover is refused before the folder is touched.
    BoundsProver(source, asked)
    return Job(victim, data, indices, "bounds", settings_of(asked), lambda watch: BoundsProver(source, asked))


def _threat(victim: Victim) -> Threat:
    trained = victim.card.threat if victim.card is not None else None
    if trained is None:
        raise InputError("the model says of no threat that it was trained against: give --norm and --eps")
    return Threat(**trained)
