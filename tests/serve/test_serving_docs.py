"""What docs/serving.md and docs/deploy say is what the server takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from live_server import LiveServer
from PIL import Image
from small_bundle import card, make
from typer.main import get_command

from fdml.cli import app
from fdml.serve.config import Config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_the_file_on_the_page_has_every_key_with_its_default() -> None:
    (text,) = [text for kind, text in BLOCKS if kind == "toml"]
    shown = msgspec.toml.decode(text.encode(), type=Config)
    bare = msgspec.structs.replace(shown, models=[], tokens=[], tls=None)
    assert bare == Config()
    for struct in (Config, *(type(getattr(Config(), name)) for name in ("batching", "certify", "compute", "limits"))):
        for field in msgspec.structs.fields(struct):
            assert re.search(rf"^(\[+{field.name}\]+|{field.name} = )", text, re.MULTILINE), field.name


def test_the_examples_run(tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.http")
    bundle = make(tmp_path / "fdml-digits", card((1, 8, 8), tuple(map(str, range(10)))))
    Image.new("L", (8, 8), 90).save(tmp_path / "seven.png")
    with LiveServer(bundle) as server:
        for kind, text in BLOCKS:
            if kind == "python":
                code = text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", code],
                    cwd=tmp_path,
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                assert done.returncode == 0, done.stderr
                assert done.stdout


def test_the_containers_start_the_command_that_there_is() -> None:
    yaml = pytest.importorskip("yaml")
    known = {name for each in get_command(app).commands["serve"].params for name in each.opts}  # pyright: ignore
    folder = ROOT / "docs" / "deploy"
    for name in ("Dockerfile", "Dockerfile.gpu"):
        text = (folder / name).read_text(encoding="utf-8")
        (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
        words = msgspec.json.decode(entry)
        assert words[:2] == ["fdml", "serve"]
        assert {word for word in words if word.startswith("--")} <= known
        assert "USER 10001" in text
    services = yaml.safe_load((folder / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert os.path.exists(folder / services["fdml"]["build"]["context"] / services["fdml"]["build"]["dockerfile"])
    (container,) = yaml.safe_load((folder / "kserve.yaml").read_text(encoding="utf-8"))["spec"]["predictor"][
        "containers"
    ]
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    yaml.safe_load((folder / "prometheus.yml").read_text(encoding="utf-8"))
