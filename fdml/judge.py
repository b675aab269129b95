"""An evaluation from model files to a report folder."""

import json
import re
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fdml.data.dataset import DataSet
from fdml.errors import InputError, Stopped
from fdml.evaluate.assess import Plan, Source, assess
from fdml.evaluate.leaderboard import leaderboard
from fdml.evaluate.live import Live
from fdml.evaluate.store import Store
from fdml.evaluate.suites import DEFAULT_PROTOCOLS, entries
from fdml.evaluate.summary import examples, report, write_adversarial
from fdml.evaluate.table import report_table
from fdml.evaluate.victim import Victim
from fdml.files import write_whole
from fdml.surrogates import surrogate_files
from fdml.threat import Threat
from fdml.train import INTERRUPTED
from fdml.world import World


def judge(
    models: Sequence[Path],
    data: DataSet,
    threat: Threat,
    out: Path,
    *,
    suite: str = "standard",
    protocols: Collection[str] = (),
    attacks: Collection[str] = (),
    limit: int = 1000,
    seed: int = 0,
    rng: str = "image",
    given: Mapping[str, Path] | None = None,
    cache: Path | None = None,
    adversarial: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Attacks every model of ``models`` (files of fdml or ONNX, bundles, run folders) on the first ``limit`` test
    images and writes ``report.json``, ``report.html`` and ``leaderboard.json`` into ``out``; returns the report.

    ``suite`` is quick, standard or full; ``protocols`` or ``attacks`` name what to run instead of its own choice.
    ``given`` are surrogates by name; those that a protocol needs beside them are trained and cached. Work that is done
    lies in ``out/state``: ``resume`` goes on with it. ``adversarial`` also writes ``adversarial-MODEL.npz``. Under
    ``torchrun`` the processes share the images and the first writes and returns the report, the others nothing.

    Raises ``InputError`` for what cannot be evaluated, and ``Stopped`` when a signal ends the work.
    """
    began = time.monotonic()
    for option, asked in (("--protocol", protocols), ("--surrogate", given or ())):
        if attacks and asked:
            raise InputError(
                f"--attack {next(iter(attacks))} and {option} {next(iter(asked))} exclude each other:"
                " named attacks are run alone, on the models themselves"
            )
    world = World.join(device)
    console = console if console is not None and world.leads else Console(quiet=True)
    data = data.to(world.device)
    names = _names(models)
    chosen = () if attacks else tuple(dict.fromkeys(protocols)) or DEFAULT_PROTOCOLS.get(suite, ())
    plan = Plan(data, threat, suite, chosen, tuple(attacks), limit, seed, rng)
    entries(suite, chosen, attacks, {}, norm=threat.norm)  # refuses a wrong name before anything is loaded
    _, like, _ = next(iter(data.test.batches([torch.arange(min(8, plan.count))])))
    victims = [Victim.read(path, name, world.device, like) for name, path in zip(names, models, strict=True)]
    attackers = {} if attacks else _surrogates(victims, data, chosen, given or {}, cache, world, console)
    store = Store(out / "state")
    if world.leads:
        store.begin(plan.identity(victims, attackers), resume=resume, overwrite=overwrite)
    world.barrier()
    try:
        with _stoppable(), Live(console, names, plan.count) as live:
            assess(plan, victims, store, world, surrogates=attackers, watch=live)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; what is done is kept: go on with --resume --out {out}", INTERRUPTED) from None
    found: dict[str, Any] = {}
    if world.leads:
        found = report(plan, victims, store, world, attackers, seconds=time.monotonic() - began)
        write(found, plan, victims, store, out, adversarial=adversarial)
        console.print(report_table(found))
        console.print(f"report: {out}/report.html, report.json", markup=False, highlight=False, soft_wrap=True)
    world.barrier()
    world.leave()
    return found


def write(
    found: dict[str, Any], plan: Plan, victims: Sequence[Victim], store: Store, out: Path, *, adversarial: bool
) -> None:
    """Writes the files of a report, the numbers first."""
    from fdml.evaluate.page import write_page  # a process that writes no page needs no matplotlib

    write_whole(out / "report.json", json.dumps(found, allow_nan=False) + "\n")
    boards = {victim.name: leaderboard(found, victim.name) for victim in victims}
    write_whole(out / "leaderboard.json", json.dumps(boards, indent=2) + "\n")
    if adversarial:
        for victim in victims:
            write_adversarial(plan, victim, store, out / f"adversarial-{victim.name}.npz", write_whole)
    pictures = {victim.name: shown for victim in victims if (shown := examples(plan, victim, store)) is not None}
    write_page(found, out / "report.html", pictures)


def _surrogates(
    victims: Sequence[Victim],
    data: DataSet,
    protocols: Collection[str],
    given: Mapping[str, Path],
    cache: Path | None,
    world: World,
    console: Console,
) -> dict[str, Source]:
    wanted = {"gray" if name == "gray" else "black" for name in protocols if name in ("gray", "black", "transfer")}
    if not wanted:
        if given:
            raise InputError(
                f"--surrogate {next(iter(given))}: no protocol asks for it: add --protocol gray or transfer"
            )
        return {}
    first = next((victim for victim in victims if victim.card is not None), None)
    if first is None or first.card is None or first.file is None:
        raise InputError("gray and transfer need a model file of fdml beside the others, which says what to train")
    files = surrogate_files(
        first.card, first.file, data, wanted, given=given, cache=cache, world=world, console=console
    )
    return {
        name: Source("gray" if name.startswith("gray") else "black", Victim.read(file, name, world.device))
        for name, file in files.items()
    }


def _names(paths: Sequence[Path]) -> list[str]:
    """A short name for each model, all different, that a folder may have."""
    stems = [path.stem if path.suffix else path.name for path in paths]
    if len(set(stems)) < len(stems):
        stems = [f"{path.resolve().parent.name}-{stem}" for path, stem in zip(paths, stems, strict=True)]
    names: list[str] = []
    for stem in stems:
        name = re.sub(r"[^\w.+-]", "-", stem) or "model"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: what is done lies on the disk already."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = None
    with suppress(ValueError):  # not the main thread: whoever runs it there decides about signals
        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
