"""The system's own Chromium, for the tests, benchmarks and pictures of the page."""

import shutil

BROWSER = next((f for name in ("chromium", "chromium-browser", "google-chrome") if (f := shutil.which(name))), None)
"""Its path; None where there is none."""

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
"""What it is started with: it asks no other machine for anything of its own."""
