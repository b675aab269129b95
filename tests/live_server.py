"""A server of its own process, as users start it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


class LiveServer:
    """`fdml serve` with ``words`` on a free port, with ``env`` added to the environment; ``address`` is where it
    answers, ``log`` what it wrote so far."""

    def __init__(self, *words: str | Path, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "fdml", "serve", "--port", "0", *map(str, words)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {})
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"https?://\S+:(\d+)", line)
        assert found, self._error()
        self.address, self.port = found[0], int(found[1])
        self.log: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "LiveServer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and gives the exit status."""
        os.kill(self.process.pid, number)
        code = self.process.wait(20)
        self._reader.join(10)
        return code

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of the log about one kind of event."""
        return [line for line in self.log if line["event"] == name]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(json.loads(line))

    def _error(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()
