"""Certifying the images of a data set: from a model file to certificates and a report."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import fdml
from fdml.certify.certificate import Certificate, dump
from fdml.certify.ledger import Ledger
from fdml.certify.prove import Prover
from fdml.certify.summary import certificate_table, report
from fdml.data.dataset import DataSet
from fdml.errors import InputError, Stopped
from fdml.evaluate.victim import Victim
from fdml.files import write_whole
from fdml.train import INTERRUPTED
from fdml.world import World

CERTIFICATES = "certificates.jsonl"


@dataclass(frozen=True)
class Job:
    """Images to certify: the test images ``indices`` of ``data``, for ``victim``, by the prover that ``make`` builds.

    ``make`` is given a function to tell of work done within an image; ``settings`` are what the prover works by, as
    JSON values.
    """

    victim: Victim
    data: DataSet
    indices: Sequence[int]
    method: str
    settings: Mapping[str, Any]
    make: Callable[[Callable[[int], None]], Prover]

    def header(self) -> dict[str, Any]:
        """The first line of the certificates file: equal headers, equal certificates."""
        return {
            "model": {"name": self.victim.name, "sha256": self.victim.sha256()},
            "data": {
                "name": self.data.name,
                "fingerprint": self.data.fingerprint,
                "classes": list(self.data.classes),
                "input": list(self.data.input),
            },
            "images": {"split": "test", "count": len(self.indices), "first": self.indices[0], "last": self.indices[-1]},
            "method": self.method,
            "settings": dict(self.settings),
            "versions": {"fdml": fdml.__version__, "torch": torch.__version__.partition("+")[0]},
        }


def run(
    job: Job,
    out: Path,
    world: World,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Certifies what the job says and writes ``certificates.jsonl``, ``report.json`` and ``report.html`` into ``out``;
    returns the report. Each certificate is on the disk as soon as it is made; ``resume`` goes on from there.

    Under ``torchrun`` the processes share the images, and the first writes and returns the report, the others nothing.
    Raises ``InputError`` for what cannot be certified, and ``Stopped`` when a signal ends the work.
    """
    console = console if console is not None and world.leads else Console(quiet=True)
    ledger = Ledger(out / "state")
    header = job.header()
    if world.leads:
        ledger.begin(header, resume=resume, overwrite=overwrite)
    world.barrier()
    began = time.monotonic()
    with Watch(console, job.victim.name, len(job.indices)) as watch:
        done = ledger.read()
        watch.resume(list(done.values()))
        try:
            for certificate in _prove(job.make(watch.samples), job, done, ledger, world):
                watch.certified(certificate)
        except KeyboardInterrupt:
            raise Stopped(f"stopped; what is certified is kept: go on with --resume --out {out}", INTERRUPTED) from None
    world.barrier()
    found: dict[str, Any] = {}
    if world.leads:
        certificates = list(ledger.read().values())
        write_whole(out / CERTIFICATES, dump(header, certificates))
        found = report(header, certificates, seconds=time.monotonic() - began)
        write_whole(out / "report.json", json.dumps(found, allow_nan=False) + "\n")
        _write_page(found, certificates, job, out)
        console.print(certificate_table(found))
        where = f"report: {out}/report.html, report.json, {CERTIFICATES}"
        console.print(where, markup=False, highlight=False, soft_wrap=True)
    world.leave()
    return found


def chosen(data: DataSet, limit: int, skip: int) -> list[int]:
    """The places of the test images to certify: every ``skip``-th, at most ``limit``.

    Raises ``InputError`` where a label does not fit the classes, or no image is left.
    """
    if skip < 1 or limit < 1:
        raise InputError(f"--skip {skip} --limit {limit}: both are at least 1 (--skip 20 takes every 20th image)")
    labels: Tensor = data.test.labels
    if not len(labels):
        raise InputError(f"{data.name} has no test images")
    for wrong in (int(labels.min()), int(labels.max())):
        if not 0 <= wrong < len(data.classes):
            raise InputError(f"a test image has the label {wrong}, but the classes are 0 to {len(data.classes) - 1}")
    return list(range(0, len(labels), skip))[:limit]


def _prove(
    prover: Prover, job: Job, done: Mapping[int, Certificate], ledger: Ledger, world: World
) -> Iterator[Certificate]:
    """Certifies this process's share of the images that have no certificate yet, and gives each certificate when it is
    safe on the disk."""
    left = [index for index in job.indices if index not in done][world.rank :: world.size]
    for first in range(0, len(left), prover.together):
        numbers = torch.tensor(left[first : first + prover.together])
        _, x, y = next(iter(job.data.test.batches([numbers])))
        for certificate in prover.prove(numbers, x, y):
            ledger.add(certificate, world.rank)
            yield certificate


def _write_page(found: Mapping[str, Any], certificates: Sequence[Certificate], job: Job, out: Path) -> None:
    from fdml.certify.page import gallery, write_page  # a process that writes no page needs no matplotlib

    write_page(found, out / "report.html", gallery(certificates, job.data))


class Watch:
    """What a person sees: how many images are certified, the samples a second, and the time left."""

    def __init__(self, console: Console, name: str, images: int) -> None:
        self._bar = Progress(
            TextColumn("[bold]certify"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f} of {task.total:.0f}"),
            TextColumn("{task.fields[found]}", style="cyan"),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(name, total=images, found="")
        self._certified = self._seen = self._samples = 0
        self._began = time.monotonic()

    def __enter__(self) -> "Watch":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def resume(self, done: Sequence[Certificate]) -> None:
        """Counts what an earlier process did."""
        for certificate in done:
            self.certified(certificate)

    def samples(self, count: int) -> None:
        """``count`` samples more."""
        self._samples += count

    def certified(self, certificate: Certificate) -> None:
        """An image is done."""
        self._seen += 1
        self._certified += certificate.status == "certified" and certificate.correct
        found = f"{100 * self._certified / self._seen:.1f}% certified"
        if self._samples:
            found += f", {self._samples / (time.monotonic() - self._began):,.0f} samples/s"
        self._bar.update(self._task, advance=1, found=found)


def settings_of(part: object) -> dict[str, Any]:
    """A dataclass of settings as JSON values."""
    return json.loads(json.dumps(asdict(part)))  # pyright: ignore[reportArgumentType]
