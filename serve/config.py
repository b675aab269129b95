"""What a server is told: one TOML file, or the flags of `fdml serve`.

    host = "127.0.0.1"
    port = 8000

    [[models]]
    path = "bundles/fdml-digits"

    [batching]
    delay_ms = 2.0

    [[tokens]]
    name = "camera-7"
    sha256 = "9f86d081…"

Every key and its default are below; `fdml serve --new-token` makes a token and the line for it.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fdml.errors import InputError
from fdml.serve.batcher import Batching
from fdml.serve.http import Limits

CONFIG_LIMIT = 1 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bundle to serve. Its ``name`` is by default that of its folder; of several versions the highest answers where a
    request names none."""

    path: str
    name: str = ""
    version: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$")] = "1"

    @property
    def called(self) -> str:
        """The name in addresses."""
        return self.name or Path(os.path.abspath(self.path)).name


class BatchingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests are gathered: ``fdml.serve.batcher.Batching``."""

    largest: Annotated[int, Meta(ge=1, le=4096)] = 64
    preferred: tuple[Count, ...] = (8, 16, 32, 64)
    delay_ms: Annotated[float, Meta(ge=0, le=1000)] = 2.0
    queue: Count = 1024


class ComputeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What computes: the provider, the ``threads`` of one batch (0: all cores), and how many batches run at once."""

    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    instances: Annotated[int, Meta(ge=1, le=64)] = 1


class CertifyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bounds of a certificate: its samples, the chance of an error, how many are made at once and may wait."""

    max_samples: Annotated[int, Meta(ge=100, le=10_000_000)] = 10_000
    alpha: Annotated[float, Meta(gt=0, lt=0.5)] = 0.001
    workers: Annotated[int, Meta(ge=1, le=64)] = 2
    queue: Annotated[int, Meta(ge=1, le=10_000)] = 32
    cache: Annotated[int, Meta(ge=0, le=10_000_000)] = 4096


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client may take."""

    connections: Count = 1024
    head_bytes: Annotated[int, Meta(ge=1024)] = 16 << 10
    headers: Count = 100
    body_bytes: Annotated[int, Meta(ge=1024)] = 32 << 20
    bodies_bytes: Annotated[int, Meta(ge=1024)] = 512 << 20
    pixels: Count = 25_000_000
    head_seconds: Seconds = 10.0
    body_seconds: Seconds = 30.0
    idle_seconds: Seconds = 75.0
    write_seconds: Seconds = 30.0


class TokenConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may ask: the SHA-256 of a bearer token in hex. ``admin`` may load and unload models as well."""

    name: str
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    admin: bool = False


class TLSConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server's certificate chain and its private key, PEM files."""

    cert: str
    key: str


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a server is told. Times are in seconds, sizes in bytes unless the name says otherwise."""

    models: list[ModelConfig] = []
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8000
    batching: BatchingConfig = BatchingConfig()
    compute: ComputeConfig = ComputeConfig()
    certify: CertifyConfig = CertifyConfig()
    limits: LimitsConfig = LimitsConfig()
    tokens: list[TokenConfig] = []
    tls: TLSConfig | None = None
    allow_admin: bool = False
    deadline_seconds: Seconds = 10.0
    drain_seconds: Seconds = 30.0
    reload_seconds: Annotated[float, Meta(ge=0, le=86_400)] = 2.0
    log: Literal["requests", "errors"] = "requests"
    tracing: bool = False

    def checked(self) -> "Config":
        """Itself. Raises ``InputError`` for what its types do not say."""
        if not self.models:
            raise InputError("no model to serve: name a bundle that `fdml export` wrote")
        seen = set()
        for model in self.models:
            if not NAME.fullmatch(model.called):
                raise InputError(f"a model cannot be called {model.called!r}: use letters, digits and . _ -")
            if (model.called, model.version) in seen:
                raise InputError(
                    f"version {model.version} of {model.called!r} is named twice: give NAME:VERSION=BUNDLE"
                )
            seen.add((model.called, model.version))
        if self.allow_admin and not any(token.admin for token in self.tokens) and not self.local:
            raise InputError(
                f"--allow-admin on {self.host} needs a token with admin = true; see `fdml serve --new-token`"
            )
        return self

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in ("127.0.0.1", "::1", "localhost")

    @property
    def gathering(self) -> Batching:
        """As the batcher takes it."""
        of = self.batching
        return Batching(
            largest=of.largest, preferred=of.preferred, delay=of.delay_ms / 1000, queue=max(of.queue, of.largest)
        )

    @property
    def bounds(self) -> Limits:
        """As the connections take it."""
        of = self.limits
        return Limits(
            connections=of.connections,
            head=of.head_bytes,
            headers=of.headers,
            body=of.body_bytes,
            bodies=max(of.bodies_bytes, of.body_bytes),
            head_seconds=of.head_seconds,
            body_seconds=of.body_seconds,
            idle_seconds=of.idle_seconds,
            write_seconds=of.write_seconds,
        )


def read_config(path: Path) -> Config:
    """The configuration in a TOML file. Raises ``InputError`` in one line that names the file and the key."""
    try:
        with path.open("rb") as file:
            content = file.read(CONFIG_LIMIT + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > CONFIG_LIMIT:
        raise InputError(f"{path}: has more than {CONFIG_LIMIT} bytes, which is no configuration")
    try:
        return msgspec.toml.decode(content, type=Config)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None


def model_of(text: str) -> ModelConfig:
    """The model of a word of the command line: ``BUNDLE``, ``NAME=BUNDLE`` or ``NAME:VERSION=BUNDLE``.

    Raises ``InputError`` for a version that cannot stand in an address.
    """
    name, equals, path = text.partition("=")
    if not equals or os.path.exists(text):
        return ModelConfig(path=text)
    name, _, version = name.partition(":")
    try:
        return msgspec.convert({"path": path, "name": name, "version": version or "1"}, ModelConfig)
    except msgspec.ValidationError:
        raise InputError(f"{text}: a version cannot be {version!r}: use letters, digits and . _ -") from None


def changed(config: Config, **values: object) -> Config:
    """The configuration with other values, without those that are None; ``table__key`` is a key of a table.

    Raises ``InputError`` for a value that cannot be.
    """
    content = msgspec.to_builtins(config)
    for name, value in values.items():
        table, inside, key = name.rpartition("__")
        if value is not None:
            (content[table] if inside else content)[key] = value
    try:
        return msgspec.convert(content, Config)
    except msgspec.ValidationError as error:
        raise InputError(str(error)) from None
