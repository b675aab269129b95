import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from small_bundle import card, make

from fdml import bundle
from fdml.bundle import BundleError
from fdml.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "bundle")


def fault(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        bundle.read(folder)
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_bundle_is_read_with_all_that_it_holds(folder: Path) -> None:
    (folder / "engines.json").write_text("[]", encoding="utf-8")
    sums = bundle.write_sums(folder)
    found = bundle.read(folder)
    assert found.card == card()
    assert found.evidence == {"passed": True, "precision": "fp32"}
    assert found.passed
    assert found.model == folder / "model.onnx"
    assert found.files == sums
    assert list(sums) == ["card.json", "engines.json", "evidence.json", "model.onnx"]
    assert sums["card.json"] == hashlib.sha256((folder / "card.json").read_bytes()).hexdigest()
    assert bundle.read(str(folder)) == found


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not here")
def test_sha256sum_reads_the_sums_and_writes_the_same(folder: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    written = subprocess.run(["sha256sum", *names], cwd=folder, check=True, capture_output=True, text=True).stdout
    assert (folder / "SHA256SUMS").read_text(encoding="utf-8") == written
    written = subprocess.run(["sha256sum", "-b", *names[::-1]], cwd=folder, check=True, capture_output=True, text=True)
    (folder / "SHA256SUMS").write_text(written.stdout, encoding="utf-8")
    assert bundle.read(folder).card == card()


@pytest.mark.parametrize("name", ["model.onnx", "card.json", "evidence.json"])
def test_a_changed_file_is_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert "damaged" in fault(folder)
    assert str(folder / name) in fault(folder)


@pytest.mark.parametrize("name", ["model.onnx", "card.json", "evidence.json", "SHA256SUMS"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in fault(folder)
    if name != "SHA256SUMS":
        bundle.write_sums(folder)
        assert f"does not list {name}" in fault(folder)


def test_the_folder_itself_must_be_one(tmp_path: Path, folder: Path) -> None:
    assert "no such folder" in fault(tmp_path / "nowhere")
    assert "is no folder" in fault(folder / "card.json")


def sums(edit: Callable[[str], str]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "SHA256SUMS"
        path.write_bytes(edit(path.read_text(encoding="utf-8")).encode("utf-8", "surrogateescape"))

    return change


NOTHING = "0" * 64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "notes.txt").write_text("x"), "notes.txt: is not listed"),
        (lambda folder: (folder / "inner").mkdir(), "inner: is no regular file"),
        (lambda folder: (folder / "link").symlink_to(folder / "card.json"), "link: is a link"),
        (sums(lambda text: text + f"{NOTHING}  ../card.json\n"), "'../card.json' is not allowed"),
        (sums(lambda text: text + f"{NOTHING}  C:\\card.json\n"), "is not allowed"),
        (sums(lambda text: text + f"{NOTHING}  ..\n"), "is not allowed"),
        (sums(lambda text: text + f"{NOTHING}  /etc/passwd\n"), "'/etc/passwd' is not allowed"),
        (sums(lambda text: text + f"{NOTHING}  gone.engine\n"), "gone.engine: is missing"),
        (sums(lambda text: text + text), "line 4 lists 'card.json'"),
        (sums(lambda text: text + f"{NOTHING}  SHA256SUMS\n"), "lists 'SHA256SUMS'"),
        (sums(lambda text: text.upper()), "line 1 is not"),
        (sums(lambda text: text + "\n"), "line 4 is not"),
        (sums(lambda text: "\udcff" + text), "is not UTF-8"),
        (sums(lambda text: text + " " * bundle.SUMS_LIMIT), "more than"),
        (sums(lambda text: ""), "does not list model.onnx"),
    ],
)
def test_what_does_not_belong_is_refused(folder: Path, change: Callable[[Path], None], said: str) -> None:
    change(folder)
    assert said in fault(folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("card.json", "{}", "lacks the field"),
        ("card.json", "[", "is not JSON"),
        ("card.json", " " * ((1 << 20) + 1), "more than the 1048576 bytes"),
        ("evidence.json", "{}", "must say `passed`"),
        ("evidence.json", '{"passed": "yes", "precision": "fp32"}', "must say `passed`"),
        ("evidence.json", '{"passed": true}', "must say `precision`"),
        ("evidence.json", '{"passed": true, "precision": ["fp32"]}', "must say `precision`"),
        ("evidence.json", '{"passed": true, "passed": false, "precision": "fp32"}', "has a key twice"),
        ("evidence.json", '{"passed": true, "precision": NaN}', "has the number NaN"),
        ("evidence.json", "[]", "is not a JSON object"),
        ("evidence.json", "[" * 100_000, "is not JSON"),
    ],
)
def test_json_that_is_not_as_it_must_be_is_refused(folder: Path, name: str, content: str, said: str) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    bundle.write_sums(folder)
    assert said in fault(folder)
    assert str(folder / name) in fault(folder)


def test_sums_are_not_written_over_links_and_folders(folder: Path) -> None:
    before = (folder / "SHA256SUMS").read_text(encoding="utf-8")
    (folder / "link").symlink_to(folder)
    with pytest.raises(BundleError, match="is a link"):
        bundle.write_sums(folder)
    (folder / "link").unlink()
    assert bundle.write_sums(folder) == bundle.read(folder).files
    assert (folder / "SHA256SUMS").read_text(encoding="utf-8") == before


def test_evidence_of_a_failure_is_read_as_one(tmp_path: Path) -> None:
    evidence = {"passed": False, "precision": "int8", "parity": {"max": 3.5}}
    found = bundle.read(make(tmp_path / "failed", evidence=evidence))
    assert not found.passed
    assert found.evidence == json.loads(json.dumps(evidence))
