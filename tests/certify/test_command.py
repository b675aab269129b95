"""`fdml certify MODEL` as a command."""

import json
from pathlib import Path

import pytest
from command_line import call


def test_certify_and_check_from_the_command_line(noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["certify", noisy, "--limit", 4, "--n", 500, "--no-attack", "--out", "found"]
    code, out, err = call(*quick, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads((tmp_path / "found" / "report.json").read_text())
    assert report["n"] == 4
    file = tmp_path / "found" / "certificates.jsonl"
    code, out, err = call("certify", noisy, "--verify", file)
    assert (code, err) == (0, "")
    assert "valid" in out
    file.write_text(file.read_text().replace('"alpha": 0.001', '"alpha": 0.0000001'))
    code, out, _ = call("certify", noisy, "--verify", file, "--json")
    assert code == 1
    assert json.loads(out)["valid"] is False

    assert call(*quick) == (2, "", "fdml: found holds certificates: go on with --resume, or --overwrite them\n")
    code, _, err = call("certify", noisy, "--resume", "--overwrite")
    assert code == 2
    assert "exclude each other" in err
    code, _, err = call("certify", noisy, "--n", 50)
    assert code == 2
    assert err.startswith("fdml: n=50 is below n0=100")
    assert err.count("\n") == 1
