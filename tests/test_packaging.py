"""The files around the code agree with it: packages, extras, version, the commands that are written down."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import fdml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIR = PROJECT["tool"]["setuptools"]["package-dir"]
SOURCES = sorted(path for folder in set(PACKAGE_DIR.values()) for path in (ROOT / folder).rglob("*.py"))


def test_every_package_is_listed() -> None:
    folders = set()
    for package, folder in PACKAGE_DIR.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            folders.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == folders, "packages in pyproject.toml against the folders with an __init__.py"


def test_every_module_is_in_a_package() -> None:
    stray = [str(path.relative_to(ROOT)) for path in SOURCES if not (path.parent / "__init__.py").exists()]
    assert not stray, f"no __init__.py beside {stray}: a wheel would leave them out"


def test_files_that_are_no_source_are_listed() -> None:
    """What is missing in package-data is there when installed editable, and missing in the wheel."""
    listed = PROJECT["tool"]["setuptools"]["package-data"]
    for folder in set(PACKAGE_DIR.values()):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in {".py", ".pyc"} and path.name != ".DS_Store":
                package, base = next((p, ROOT / f) for p, f in PACKAGE_DIR.items() if f == folder)
                inside = path.relative_to(base)
                patterns = listed.get(package, [])
                assert any(inside.match(pattern) for pattern in patterns), (
                    f"{inside} of {package} is not in package-data"
                )


def test_nothing_generic_is_installed() -> None:
    assert {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]} == {"fdml"}


def test_every_extra_that_is_named_exists() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    texts = [ROOT / "pyproject.toml", *SOURCES, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for path in texts:
        for group in re.findall(r"fdml\[([\w,\s-]+)\]", path.read_text(encoding="utf-8")):
            missing = {name.strip() for name in group.split(",")} - set(extras)
            assert not missing, f"{path.relative_to(ROOT)} names the unknown extra {missing}"


def test_the_base_installation_carries_no_torch() -> None:
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in PROJECT["project"]["dependencies"]}
    assert not names & {"torch", "onnxruntime", "scipy", "scikit-learn", "matplotlib", "safetensors"}


def test_both_onnxruntimes_are_never_installed_together() -> None:
    extras = PROJECT["project"]["optional-dependencies"]

    def closure(extra: str) -> set[str]:
        found = set()
        for requirement in extras[extra]:
            name, _, inner = requirement.partition("[")
            found.add(re.split(r"[<>=~! ]", name)[0])
            if name == "fdml":
                for other in inner.split("]")[0].split(","):
                    found |= closure(other.strip())
        return found

    for extra in extras:
        assert not {"onnxruntime", "onnxruntime-gpu"} <= closure(extra), f"{extra}: both write the same package"


def test_the_version_is_said_once() -> None:
    assert PROJECT["project"]["version"] == version("fdml") == fdml.__version__


def test_public_names_hide_no_submodule() -> None:
    submodules = {path.stem for path in (ROOT / "fdml").iterdir()} | {"export", "serve", "demo"}
    assert not set(fdml.__all__) & submodules


def test_what_is_written_down_is_what_is_run() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert {"train", "test", "check", "help", "clean"} <= targets
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run"]:
        if path.exists():
            # In a page, only what is set as code: prose may say "make sure".
            text = path.read_text(encoding="utf-8")
            code = (
                text if path.name == "run" else "\n".join(re.findall(r"^(?: {4}|\t).*|`[^`\n]+`", text, re.MULTILINE))
            )
            named = set(re.findall(r"\bmake ([a-z]+)", code))
            assert named <= targets, f"{path.name} names targets that the Makefile lacks: {named - targets}"
    assert re.search(r"step check\n(.*\n)*.*make .*\btest\b[^\n]*\n\Z", ci), "CI ends with the tests, after the check"


def test_the_readme_shows_the_two_commands() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    text = readme.read_text(encoding="utf-8")
    assert "make train" in text
    assert "make test" in text


def test_ci_can_be_executed() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
