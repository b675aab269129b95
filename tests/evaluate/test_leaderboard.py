"""The leaderboard's fields, against those of entries that are on it."""

import json

import pytest
from test_page import made_up

from fdml.errors import InputError
from fdml.evaluate.leaderboard import leaderboard

# The fields of model_info/cifar10/Linf/Bartoldson2024Adversarial_WRN-94-16.json, in their order.
FIELDS = [
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture",
    "eps", "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable",
]  # fmt: skip


def autoattack(report: dict, model: int = 0) -> dict:
    (found,) = [attack for attack in report["models"][model]["attacks"] if attack["name"] == "autoattack"]
    return found


def test_what_the_report_knows() -> None:
    report = made_up(200)
    report["threat"]["eps"] = 8 / 255
    report["models"][0]["clean"]["accuracy"], autoattack(report)["accuracy"] = 0.9368, 0.7371
    report["models"][0]["worst"]["accuracy"] = 0.7371
    entry = leaderboard(report, "student")
    assert list(entry) == FIELDS
    known = {name: value for name, value in entry.items() if value is not None}
    assert known == {
        "name": "student", "number_forward_passes": 1, "dataset": "fashion-mnist", "architecture": "cnn",
        "eps": "8/255", "clean_acc": "93.68", "autoattack_acc": "73.71", "unreliable": False,
        "footnote": "Evaluated by fdml 0.1.0 on 200 test images, seed 0.",
    }  # fmt: skip
    assert json.loads(json.dumps(entry)) == entry
    assert leaderboard(report, "teacher")["unreliable"] is True


def test_a_lower_worst_case_is_given_beside_autoattack() -> None:
    report = made_up(200)
    report["models"][0]["worst"]["accuracy"] = autoattack(report)["accuracy"] - 0.02
    entry = leaderboard(report, "student")
    assert list(entry) == [*FIELDS, "external"]
    assert float(entry["external"]) == pytest.approx(float(entry["autoattack_acc"]) - 2, abs=0.011)


@pytest.mark.parametrize("change", [{"name": "fast"}, {"source": "clone"}, {"outcomes": ". x"}])
def test_only_autoattack_on_every_image_is_autoattack(change: dict) -> None:
    report = made_up(200)
    autoattack(report).update(change)
    assert leaderboard(report, "student")["autoattack_acc"] is None
    assert "external" not in leaderboard(report, "student")


def test_a_file_without_a_card_and_a_name_that_is_not_there() -> None:
    report = made_up(50)
    report["models"][0]["card"] = None
    entry = leaderboard(report, "student")
    assert entry["architecture"] is entry["number_forward_passes"] is None
    with pytest.raises(InputError, match="unknown model 'studnet': did you mean 'student'"):
        leaderboard(report, "studnet")
