"""The report on a terminal: widths, order, and names that a terminal must not obey."""

import ast
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_page import CASCADE, example, made_up

from fdml.evaluate import table


def rendered(report: dict[str, Any], width: int, *, terminal: bool = False) -> list[str]:
    console = Console(
        width=width, file=io.StringIO(), force_terminal=terminal, color_system="standard" if terminal else None
    )
    console.print(table.report_table(report))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def with_long_names(models: int) -> dict[str, Any]:
    report = made_up(300, models, gradients=False)
    report["data"]["name"] = f"folder:/[bold]{'long/' * 30}"
    for number, model in enumerate(report["models"]):
        model["name"] = f"{number} [red] a model of a very long name, {'W' * 40}"
        for attack in model["attacks"]:
            attack["label"] += " with a very long label"
        for flag in model["flags"]:
            flag["page"] = "https://example.org/" + "page/" * 40
    return report


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("models", [1, 2, 3, 5, 8, 9])
def test_fits(models: int, long: bool) -> None:
    width = 80 if models <= 2 else 120
    report = with_long_names(models) if long else made_up(300, models)
    lines = rendered(report, width)
    assert max(map(len, lines)) <= width
    # No number was cut or broken: each model has its clean and worst accuracy in full.
    for model in report["models"]:
        for key in ("clean", "worst"):
            assert any(f"{100 * model[key]['accuracy']:.1f}%" in line for line in lines)
            low, high = model[key]["interval"]
            interval = f"({100 * low:4.1f} to {100 * high:5.1f})"
            assert any(interval in line for line in lines) == (models <= 3)
    assert sum("worst of all" in line for line in lines) == (2 if models == 9 else 1)
    assert not any("…" in line for line in lines)


def test_the_order_of_the_lines() -> None:
    lines = [line for line in rendered(made_up(300), 80) if line]
    names = [line[:25].rstrip() for line in lines[3 : lines.index(next(line for line in lines if "share" in line))]]
    assert names == [
        "  clean", "  white-box", "  FGSM", "  PGD-20", "  feature space, CE", "  AutoAttack",
        *(f"    {label}" for label in CASCADE.values()), "  worst of white-box",
        "  gray-box", "  PGD-20 from gray-clone", "  black-box", "  Square, 5,000 queries", "  HopSkipJump",
        "  worst of black-box", "  controls", "  uniform noise", "  worst of all",
    ]  # fmt: skip


def test_points_stand_below_points() -> None:
    report = made_up(300)
    report["models"][0]["clean"] |= {"accuracy": 1.0, "interval": [0.9874, 1.0]}
    report["models"][1]["worst"] |= {"accuracy": 0.0, "interval": [0.0, 0.0126]}
    lines = [line for line in rendered(report, 80) if "%" in line and "(95%" not in line]
    for sign in ("%", "(", ")"):
        places = {tuple(at for at, letter in enumerate(line) if letter == sign) for line in lines if sign in line}
        assert len(places) == 1, sign
    assert "100.0%  (98.7 to 100.0)" in lines[0]
    assert "  0.0%  ( 0.0 to   1.3)" in lines[-1]


def test_flags_stand_below_with_meaning_and_page() -> None:
    report = made_up(300)
    text = "\n".join(rendered(report, 120, terminal=True))
    plain = "\n".join(rendered(report, 120))
    for flag in report["models"][1]["flags"]:
        assert flag["meaning"] in plain
        assert flag["page"] in plain
    assert (
        plain.index("worst of all") < plain.index("FAIL gap 11.3  teacher") < plain.index("WARN huge-eps 0.14  teacher")
    )
    assert "\x1b[1;31mFAIL" in text
    assert "\x1b[1;33mWARN" in text
    assert "no gradients were used" not in plain


def test_no_gradients_is_said_and_what_was_not_run_is_a_dash() -> None:
    lines = rendered(made_up(300, 2, gradients=False), 80)
    assert any("teacher: no gradients were used: only query and transfer attacks were run" in line for line in lines)
    (fgsm,) = [line for line in lines if line.startswith("  FGSM")]
    assert fgsm.endswith(" -")
    assert all(any(line.startswith(f"  {name}") for line in lines) for name in ("black-box", "white-box"))


def test_a_terminal_does_not_obey_names() -> None:
    report = made_up(100, 1)
    (model,) = report["models"]
    report["data"]["name"] = model["name"] = "\x1b]0;gone\x07\x1b[2J[bold]a\u202eb"
    model["attacks"][0]["label"] = "\x1b[31m[/bold]label"
    model["flags"] = [{"name": "\x1b[0m", "level": "fail", "figure": 1.0, "meaning": "\x1b[1m", "page": "\r\x1b[5m"}]
    text = "\n".join(rendered(report, 120))
    assert not any(letter in text for letter in "\x1b\x07\r\u202e")
    assert "[bold]a�b" in text
    assert "[/bold]label" in text


def test_the_documented_example() -> None:
    lines = rendered(example(), 80)
    (autoattack,) = [line for line in lines if line.startswith("  AutoAttack")]
    assert "50.0%  (15.0 to  85.0)" in autoattack
    assert not any("worst of white-box" in line for line in lines)


def test_sections_keep_attacks_of_one_name_apart_by_their_source() -> None:
    report = made_up(100, 2)
    extra = report["models"][1]["attacks"][4] | {"source": "gray-teacher"}
    report["models"][1]["attacks"].append(extra)
    (gray,) = [section for section in table.sections(report["models"]) if section.name == "gray-box"]
    assert [row.label for row in gray.rows] == ["PGD-20 from gray-clone", "PGD-20 from gray-teacher"]
    assert gray.rows[1].cells == [None, extra]


def test_it_needs_no_torch_itself() -> None:
    tree = ast.parse(Path(table.__file__).read_text("utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {str(name).split(".")[0] for name in names} <= {"collections", "dataclasses", "typing", "rich", "fdml"}
    assert {name for name in names if str(name).startswith("fdml")} == {"fdml.card"}
