"""Whole certifications of a small model: what they may not depend on, and what they leave behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fdml import data
from fdml.certify.certificate import read
from fdml.certify.command import certify_data
from fdml.certify.ledger import Ledger
from fdml.certify.recheck import recheck
from fdml.errors import InputError, Stopped

ROOT = Path(__file__).parents[2]
DIGITS = data.load("digits")
QUICK: dict[str, Any] = {"n": 2000, "limit": 12, "skip": 3}


def lines(out: Path) -> list[dict[str, Any]]:
    """The certificates without their times."""
    found = [json.loads(line) for line in (out / "certificates.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


@pytest.fixture(scope="module")
def whole(noisy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    certify_data(noisy, DIGITS, out, **QUICK)
    return out


def test_a_model_trained_with_noise_is_smoothed_with_it(whole: Path) -> None:
    header, certificates = read(whole / "certificates.jsonl")
    assert [c.index for c in certificates] == list(range(0, 36, 3))
    assert header["settings"]["sigma"] == 0.25
    assert header["settings"]["radii"] == [0.25, 0.5, 0.75]
    assert all(c.label == int(DIGITS.test.labels[c.index]) for c in certificates)
    report = json.loads((whole / "report.json").read_text())
    shares = [row["certified"] for row in report["table"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[1] > 0.4, "the model is good enough for the test to say something"
    assert all(row["certified"] <= row["stands"] <= report["table"][0]["stands"] for row in report["table"])
    assert any(c.fooled_at for c in certificates)
    for c in certificates:
        assert c.fooled_at is None or c.fooled_at > c.radius, "an attack inside a certified radius"
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png") >= 4
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_kill_loses_nothing_that_was_certified(noisy: Path, whole: Path, tmp_path: Path, after: int) -> None:
    add, seen = Ledger.add, []

    def dying(self: Ledger, certificate: Any, rank: int) -> None:
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(certificate)
        add(self, certificate, rank)

    with patch.object(Ledger, "add", dying), pytest.raises(Stopped, match="--resume"):
        certify_data(noisy, DIGITS, tmp_path, **QUICK)
    part = tmp_path / "state" / "part-0.jsonl"
    if after:
        with part.open("a") as stream:
            stream.write('{"index": 7, "lab')  # as a kill in the middle of a line would leave it
    with pytest.raises(InputError, match="--resume"):
        certify_data(noisy, DIGITS, tmp_path, **QUICK)
    with patch.object(Ledger, "add", lambda *args: (seen.append(args[1]), add(*args))):
        certify_data(noisy, DIGITS, tmp_path, **QUICK, resume=True)
    assert len(seen) == 12, "what was certified is not certified again"
    assert lines(tmp_path) == lines(whole)


def test_other_work_does_not_go_on_in_the_same_folder(noisy: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="settings"):
        certify_data(noisy, DIGITS, whole, **{**QUICK, "n": 3000}, resume=True)
    with pytest.raises(InputError, match="no certificates to go on with"):
        certify_data(noisy, DIGITS, tmp_path, **QUICK, resume=True)


@pytest.mark.slow  # the training has its own in every run
def test_two_processes_write_the_certificates_of_one(noisy: Path, whole: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom fdml import data\nfrom fdml.certify.command import certify_data\n"
        f"certify_data(Path({str(noisy)!r}), data.load('digits'), Path(sys.argv[1]), **{QUICK!r}, device='cpu')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(tmp_path / "out")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(part.name for part in (tmp_path / "out" / "state").glob("part-*")) == ["part-0.jsonl", "part-1.jsonl"]
    assert lines(tmp_path / "out") == lines(whole)


def test_the_published_method_counts_exactly_n(noisy: Path, tmp_path: Path) -> None:
    found = certify_data(noisy, DIGITS, tmp_path, method="cohen", n=500, limit=3, attack=False)
    assert found["samples"] == {"mean": 600, "median": 600, "largest": 600, "total": 1800}
    assert found["table"][0]["stands"] is None


def test_bounds_certify_and_falsify(noisy: Path, tmp_path: Path) -> None:
    from fdml.threat import Threat

    found = certify_data(noisy, DIGITS, tmp_path, method="bounds", threat=Threat("linf", 0.03), limit=12, timeout=5)
    _, certificates = read(tmp_path / "certificates.jsonl")
    assert found["statuses"]["certified"] > 3
    for c in certificates:
        assert (c.status == "certified") == (c.radius == 0.03)
        assert (c.counterexample is None) == (c.status != "falsified")
        assert c.fooled_at is None or c.fooled_at <= 0.03 + 1e-6
    assert recheck(tmp_path / "certificates.jsonl", noisy, DIGITS)["valid"]


def test_a_sigma_that_the_model_never_saw_is_refused_unless_forced(noisy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trained with sigma=0\.25"):
        certify_data(noisy, DIGITS, tmp_path, sigma=0.5, **QUICK)
    certify_data(noisy, DIGITS, tmp_path, sigma=0.5, n=200, limit=2, force=True, attack=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "luck"}, "method"),
        ({"sigma": 0.0}, "sigma=0"),
        ({"sigma": -1.0, "force": True}, "sigma=-1"),
        ({"alpha": 0.0}, "alpha=0"),
        ({"alpha": 1.0}, "alpha=1"),
        ({"n": 50}, "n=50 is below n0=100"),
        ({"n0": 0}, "n0=0"),
        ({"radii": (-1.0,)}, "radius=-1"),
        ({"precision": "fp8"}, "precision"),
        ({"skip": 0}, "--skip 0"),
        ({"method": "bounds", "timeout": 0.0}, "timeout=0"),
    ],
)
def test_values_out_of_range_are_refused(noisy: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        certify_data(noisy, DIGITS, tmp_path, **{"limit": 2, **options})
    assert not list(tmp_path.rglob("*.jsonl"))


def test_labels_outside_the_classes_are_refused(noisy: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from fdml.data.dataset import Arrays

    assert isinstance(DIGITS.test, Arrays)
    wrong = replace(DIGITS, test=Arrays(DIGITS.test.images, torch.full_like(DIGITS.test.labels, 10)))
    with pytest.raises(InputError, match="label 10, but the classes are 0 to 9"):
        certify_data(noisy, wrong, tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_certificates_file_is_checked(noisy: Path, tmp_path: Path, precision: str) -> None:
    certify_data(noisy, DIGITS, tmp_path, n=1000, limit=6, precision=precision, attack=False)
    path = tmp_path / "certificates.jsonl"
    assert recheck(path, noisy, DIGITS) == {"valid": True, "checked": {"lines": 6, "images": 6}, "faults": []}
    text = path.read_text()
    best = max(read(path)[1], key=lambda c: c.radius)

    def faults(changed: str) -> list[str]:
        assert changed != text
        path.write_text(changed)
        return recheck(path, noisy, DIGITS)["faults"]

    assert "another model" in faults(text.replace('"sha256": "', '"sha256": "0'))[0]
    assert "other data" in faults(text.replace('"fingerprint": "', '"fingerprint": "0'))[0]
    assert "certify" in faults(text.replace(f'"radius": {best.radius}', f'"radius": {best.radius + 0.1}'))[0]
    assert "stands twice" in " ".join(faults(text + best.to_json() + "\n"))
    assert "no such image" in faults(text.replace('"index": 0', '"index": 100000', 1))[0]
    # Counts that were made up fit the arithmetic, and not the model.
    path.write_text(text)
    one = min((c for c in read(path)[1] if c.status == "certified"), key=lambda c: (c.hits or 0) / (c.n or 1))
    forged = one.to_json().replace(f'"hits": {one.hits}', f'"hits": {one.n}')
    assert "fresh samples" in faults(text.replace(one.to_json(), _with_radius(forged)))[0]


def _with_radius(line: str) -> str:
    from fdml.sequence import mixture_lower, radius_of

    values = json.loads(line)
    radius = radius_of(mixture_lower(values["hits"], values["n"], values["alpha"]), values["sigma"])
    return json.dumps(values | {"radius": radius})
