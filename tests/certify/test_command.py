"""`fdml certify MODEL` as a command."""

import json
import subprocess
import sys
from pathlib import Path


def fdml(*words: object, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fdml", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_certify_and_check_from_the_command_line(noisy: Path, tmp_path: Path) -> None:
    done = fdml("certify", noisy, "--limit", 4, "--n", 500, "--no-attack", "--out", "found", "--json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "found" / "report.json").read_text())
    assert report["n"] == 4
    file = tmp_path / "found" / "certificates.jsonl"
    checked = fdml("certify", noisy, "--verify", file, folder=tmp_path)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "valid" in checked.stdout
    file.write_text(file.read_text().replace('"alpha": 0.001', '"alpha": 0.0000001'))
    checked = fdml("certify", noisy, "--verify", file, "--json", folder=tmp_path)
    assert checked.returncode == 1
    assert json.loads(checked.stdout)["valid"] is False

    again = fdml("certify", noisy, "--limit", 4, "--n", 500, "--no-attack", "--out", "found", folder=tmp_path)
    assert again.returncode == 2
    assert again.stderr == "fdml: found holds certificates: go on with --resume, or --overwrite them\n"
    both = fdml("certify", noisy, "--resume", "--overwrite", folder=tmp_path)
    assert both.returncode == 2
    assert "exclude each other" in both.stderr
    short = fdml("certify", noisy, "--n", 50, folder=tmp_path)
    assert short.returncode == 2
    assert short.stderr.startswith("fdml: n=50 is below n0=100")
    assert short.stderr.count("\n") == 1
