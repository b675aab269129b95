"""The closing table and summary.json, on made-up numbers and on tiny models that learnt nothing."""

import io
import json
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fdml.attacks import CLOSING
from fdml.data.dataset import Arrays, DataSet
from fdml.evaluate import interval
from fdml.models import RobustModel, build
from fdml.recipe import Recipe
from fdml.report import LABELS, closing_table, watched, write_report
from fdml.run import Run
from fdml.threat import Threat

THREAT = Threat("linf", 8 / 255)


def summary(data: str = "digits", roles: tuple[str, ...] = ("teacher", "student")) -> dict:
    shares = {"clean": 1.0, "fgsm": 0.512, "pgd20": 0.25, "pgd50x3": 0.1, "worst": 0.0}
    accuracies = shares | {"intervals": {name: interval(share, 1000) for name, share in shares.items()}}
    return {"data": data, "n": 1000, "threat": {"norm": "linf", "eps": 8 / 255}} | dict.fromkeys(roles, accuracies)


def rendered(summary: dict, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(closing_table(summary))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("data", ["digits", f"folder:/[bold]{'long/' * 30}"], ids=["short", "long"])
def test_two_models_fit_eighty_columns(data: str) -> None:
    lines = rendered(summary(data))
    assert max(map(len, lines)) <= 80
    assert data[:18] in lines[0]


def test_every_number_is_whole_and_below_the_other() -> None:
    lines = [line for line in rendered(summary()) if "%" in line and "(" in line and line.startswith("  ")]
    assert len(lines) == 5
    for sign in ("%", ".", "(", ")", " to "):
        places = {tuple(at for at, _ in enumerate(line) if line.startswith(sign, at)) for line in lines}
        assert len(places) == 1, sign
    assert "51.2%  (48.1 to  54.3)" in lines[1]
    assert [line.split("  ")[1] for line in lines] == ["clean", "FGSM", "PGD-20", "PGD-50x3", "worst of all"]


def test_a_model_alone_and_an_attack_without_a_label() -> None:
    alone = summary(roles=("student",))
    alone["student"] |= {"new": 0.5}
    alone["student"]["intervals"] |= {"new": (0.4, 0.6)}
    lines = rendered(alone)
    assert not any("teacher" in line for line in lines)
    assert any(line.startswith("  new ") and "50.0%" in line for line in lines)


def test_the_bar_names_the_attack() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    seen = []

    def attack(model: object, x: torch.Tensor, y: object, threat: object, *, generator: object = None) -> torch.Tensor:
        seen.append(generator)
        return x

    x = torch.zeros(1, 1, 8, 8)
    with watched({"pgd20": attack}, "student", console) as attacks:  # pyright: ignore[reportArgumentType]
        generator = torch.Generator()
        assert attacks["pgd20"](lambda x: x, x, torch.zeros(1, dtype=torch.int64), THREAT, generator=generator) is x
    assert seen == [generator]
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "attacking the student" in shown
    assert "PGD-20" in shown


def data() -> DataSet:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=generator)
    split = Arrays(images, torch.arange(24) % 3)
    return DataSet("made-up", ("a", "b", "c"), split, split, split, fingerprint="0" * 64)


def untrained(seed: int) -> RobustModel:
    torch.manual_seed(seed)
    return build("cnn", input=(1, 8, 8), classes=3, mean=(0.5,), std=(0.5,), options={"width": 2})


def test_the_summary_holds_what_machines_read(tmp_path: Path) -> None:
    recipe = Recipe(name="fdml", seed=3, test_limit=20)
    console = Console(file=io.StringIO(), width=80)
    models = {"teacher": untrained(1), "student": untrained(2)}
    returned = write_report(Run(tmp_path), recipe, data(), THREAT, models, began=time.monotonic() - 5, console=console)

    written = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert returned == written
    assert written["data"] == "made-up"
    assert written["n"] == 20
    assert written["input"] == [1, 8, 8]
    assert written["threat"] == {"norm": "linf", "eps": 8 / 255}
    assert (written["recipe"], written["seed"]) == ("fdml", 3)
    assert 5 < written["seconds"] < 300
    for role in ("teacher", "student"):
        shares = {name: share for name, share in written[role].items() if name != "intervals"}
        assert set(shares) == {"clean", *CLOSING, "worst"} == set(LABELS)
        assert all(0 <= share <= 1 for share in shares.values())
        assert all(shares["worst"] <= share <= shares["clean"] for share in shares.values())
        for name, (low, high) in written[role]["intervals"].items():
            assert 0 <= low <= shares[name] <= high <= 1

    assert {path.name for path in (tmp_path / "report").iterdir()} == {"summary.json", "curves.png", "examples.png"}
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "worst of all" in said
    assert f"student: {tmp_path}/student.safetensors\n" in said
