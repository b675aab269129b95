"""What `fdml export` does: from a model file to a bundle with its evidence."""

import hashlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fdml
from fdml.bundle import BOUNDS, PRECISIONS, TEACHER, Precision, write_sums
from fdml.card import Card, read_card
from fdml.checkpoint import load
from fdml.data.dataset import DataSet
from fdml.errors import InputError, Stopped, unknown
from fdml.evaluate.session import Session
from fdml.export.bounds import bounded
from fdml.export.convert import convert, opset, raw
from fdml.export.evidence import gather, most_different_layer
from fdml.export.half import halved
from fdml.export.quantise import quantised
from fdml.export.teacher import Teacher
from fdml.models import Frozen, RobustModel
from fdml.threat import Threat

SMALL = 1_000_000
"""Weights up to which a thousand images make the evidence; beyond it, ``FEW``."""
MANY, FEW = 1000, 128
CALIBRATION = 256
"""Training images whose activations set the ranges of eight bits; half of them adversarial."""
SPEED_BATCH, SPEED_ROUNDS = 64, 9
"""What a reduced precision gains is the median over so many rounds of a batch of this size."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to export: the precision, and whether also for bytes (``raw``), with bounds to certify by (``bounds``), with
    the run's clean teacher beside it (``teacher``), for TensorRT (by which backend, for which batches and compute
    capabilities) and for Triton (into which repository).

    Raises ``InputError`` for an unknown precision, and for bounds of another than fp32.
    """

    precision: Precision = "fp32"
    raw: bool = False
    bounds: bool = False
    teacher: bool = False
    tensorrt: str | None = None
    batches: tuple[int, int, int] = (1, 64, 256)
    targets: tuple[str, ...] = ()
    triton: Path | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.bounds and self.precision != "fp32":
            raise InputError(f"--bounds proves what fp32 answers, not {self.precision}: export one or the other")


def export(
    path: Path,
    data: DataSet,
    out: Path,
    threat: Threat,
    wish: Wish,
    *,
    limit: int | None = None,
    seed: int = 0,
    force: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Exports the model at ``path`` (a ``.safetensors`` file or a run folder) into the bundle ``out``; returns its
    evidence, with ``bundle``, the folder, and ``engines``.

    ``limit`` test images of ``data`` make the evidence. Where that is beyond the tolerance nothing is written, unless
    ``force``, which marks it. The folder appears whole or not at all.

    Raises ``InputError`` for what cannot be exported and for a folder that exists, unless ``overwrite``; ``Stopped``
    where the evidence fails.
    """
    from fdml.export import tensorrt

    say = _Say(console)
    file = path / "student.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise InputError(f"{path}: fdml export takes a .safetensors file or a run folder")
    card = read_card(file)
    _check_out(out, overwrite)
    backend = None if wish.tensorrt is None else tensorrt.choose(wish.tensorrt)
    _check_data(card, data, path)
    model = load(file)
    source = Frozen(model)
    teacher = Teacher(path, card) if wish.teacher else None

    say("converting")
    proto = convert(model, card)
    calibration = _calibration(source, data, threat, seed) if wish.precision == "int8" else []
    made = _reduced(proto, wish, calibration)
    content = made.SerializeToString()
    bounds = bounded(made, hashlib.sha256(content).hexdigest()) if wish.bounds else None
    artefact = Session(content)
    index = torch.arange(min(limit or _images(model), len(data.test)))
    _, x, y = next(iter(data.test.batches([index])))
    found = gather(source, artefact, index, x, y, threat, wish.precision, seed=seed, watch=say)
    found |= {
        "model": {"sha256": _sha256(file), "file": file.name},
        "data": {"name": data.name, "fingerprint": data.fingerprint, "split": "test"},
        "opset": opset(proto),
        "versions": _versions(),
        "seed": seed,
        "speedup": None if made is proto else _speedup(proto.SerializeToString(), content),
    }
    if found["reason"] is not None:
        worst = max((found["clean"], found["adversarial"]), key=lambda parity: parity["largest"] or float("inf"))
        layer, apart = _layer(source, convert(model, card, taps=True), wish, calibration, data, worst["worst_image"])
        found["reason"] += f"; layer {layer} differs most, by {100 * apart:.2g}% of its largest value"
    if teacher is not None:
        found["teacher"] = {"sha256": _sha256(teacher.file), **teacher.evidence(artefact, index, x)}
        if found["reason"] is None and found["teacher"]["reason"] is not None:
            found |= {"passed": False, "reason": found["teacher"]["reason"]}
    say.close()
    if console is not None:
        console.print(evidence_table(found))
    if found["reason"] is not None and not force:
        raise Stopped(f"{found['reason']}; nothing was written (--force writes it, marked as failed)")

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(content)
        if bounds is not None:
            (folder / BOUNDS).write_bytes(bounds.SerializeToString())
        if teacher is not None:
            (folder / TEACHER).write_bytes(teacher.content)
        if wish.raw:
            (folder / "model-raw.onnx").write_bytes(raw(made).SerializeToString())
        (folder / "card.json").write_text(card.to_json() + "\n", encoding="utf-8")
        (folder / "evidence.json").write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        engines: list[dict[str, Any]] = []
        if backend is not None:
            say(f"building engines ({backend})")
            built = tensorrt.build(
                backend,
                folder / "model.onnx",
                folder,
                precision=wish.precision,
                batches=wish.batches,
                targets=wish.targets or None,
                model=model,
            )
            engines = [engine.to_dict() for engine in built]
            (folder / "engines.json").write_text(json.dumps(engines, indent=2) + "\n", encoding="utf-8")
            say.close()
        write_sums(folder)
        if wish.triton is not None:
            from fdml.export import triton

            triton.write_repository(
                folder / "model.onnx",
                card,
                wish.triton,
                name=out.name,
                tensorrt=backend is not None,
                precision=wish.precision,
                overwrite=overwrite,
            )
        _into_place(folder, out)
    return found | {"bundle": str(out), "engines": engines}


def evidence_table(found: dict[str, Any]) -> Table:
    """The evidence as a table for a terminal."""
    threat, robust, accuracy = found["threat"], found["robust_accuracy"], found["accuracy"]
    title = f"{found['precision']}, {found['images']} test images of {found['data']['name']}"
    table = Table("", "before", "after", title=title, title_justify="left", caption_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    table.add_row("accuracy", *(f"{100 * accuracy[name]:.1f}%" for name in ("source", "artefact")))
    within = f"robust, {threat['norm']} {threat['eps']:.4g}"
    table.add_row(within, *(f"{100 * robust[name]:.1f}%" for name in ("source", "artefact")))
    for name in ("clean", "adversarial"):
        parity = found[name]
        largest = "none" if parity["largest"] is None else f"{parity['largest']:.2g}"
        table.add_row(f"{name}: answered alike", "", f"{100 * parity['agreement']:.1f}%")
        table.add_row(f"{name}: largest difference of a logit", "", largest)
    if "teacher" in found:
        largest = found["teacher"]["clean"]["largest"]
        table.add_row("teacher: largest difference of a logit", "", "none" if largest is None else f"{largest:.2g}")
    if found["speedup"] is not None:
        table.add_row(f"batch of {SPEED_BATCH} here, against fp32", "", f"{found['speedup']:.2f}x")
    table.caption = "passed" if found["passed"] else f"failed: {found['reason']}"
    if found["speedup"] is not None and found["speedup"] < 1:
        table.caption += f"; on this machine {found['precision']} is the slower: serve fp32 where it is like this one"
    return table


class _Say:
    """What is being done, on a terminal."""

    def __init__(self, console: Console | None) -> None:
        self._status = console.status("") if console is not None and console.is_terminal else None
        if self._status is not None:
            self._status.start()

    def __call__(self, what: str) -> None:
        if self._status is not None:
            self._status.start()
            self._status.update(what)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists():
        if not overwrite:
            raise InputError(f"{out} exists: give another --out, or --overwrite it")
        if not (out / "SHA256SUMS").exists():
            raise InputError(f"{out} is no bundle: --overwrite replaces bundles only")


def _check_data(card: Card, data: DataSet, path: Path) -> None:
    if card.input != data.input or len(card.classes) != len(data.classes):
        mine, theirs = f"{card.input}, {len(card.classes)} classes", f"{data.input}, {len(data.classes)} classes"
        raise InputError(f"{path} is for images {mine}; {data.name} has {theirs}")
    if not len(data.test):
        raise InputError(f"{data.name} has no test images to make the evidence with")


def _images(model: RobustModel) -> int:
    return MANY if sum(p.numel() for p in model.parameters()) <= SMALL else FEW


def _calibration(source: Frozen, data: DataSet, threat: Threat, seed: int) -> list[Any]:
    from fdml.attacks import pgd

    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(data.train), generator=generator)[: CALIBRATION // 2]
    _, x, y = next(iter(data.train.batches([index])))
    x_adv = pgd(source, x, y, threat, steps=5, keep="best", generator=generator)
    return [part.numpy() for part in torch.cat([x, x_adv]).split(64)]


def _speedup(full: bytes, reduced: bytes) -> float:
    """How many times faster the reduced network answers a batch than the one in fp32 here, in turns on the CPU."""
    sessions = [Session(content, spin=True) for content in (full, reduced)]
    rows = np.random.default_rng(0).random((SPEED_BATCH, *sessions[0].shape), np.float32)
    calls = [session.bare(rows) for session in sessions]
    for call in calls:
        call()
    rounds = [[timeit(call, number=1) for call in calls] for _ in range(SPEED_ROUNDS)]
    return statistics.median(before / after for before, after in rounds)


def _reduced(proto: Any, wish: Wish, calibration: list[Any]) -> Any:
    if wish.precision == "int8":
        return quantised(proto, calibration, tensorrt=wish.tensorrt is not None)
    return halved(proto, "fp16") if wish.precision == "fp16" else proto


def _layer(
    source: Frozen, tapped: Any, wish: Wish, calibration: list[Any], data: DataSet, image: int
) -> tuple[str, float]:
    """The layer that differs most on one test image, by the same conversion with the features as outputs."""
    import onnxruntime

    _, x, _ = next(iter(data.test.batches([torch.tensor([image])])))
    logits, taps = source.outputs(x)
    names = [*taps, "logits"]
    content = _reduced(tapped, wish, calibration).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    rows: Sequence[Any] = session.run(["logits", *taps], {"images": x.numpy()})
    found: dict[str, Tensor] = dict(zip(["logits", *taps], map(torch.from_numpy, rows), strict=True))
    return most_different_layer({name: taps.get(name, logits) for name in names}, found)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    torch_version = torch.__version__.partition("+")[0]
    return {
        "fdml": fdml.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch_version,
    }


def _into_place(folder: Path, out: Path) -> None:
    """The finished folder takes the place of ``out``; what was there goes."""
    old = folder.parent / "old"
    if out.exists():
        out.rename(old)
    folder.chmod(0o755)
    folder.rename(out)
    shutil.rmtree(old, ignore_errors=True)
