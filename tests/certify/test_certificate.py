import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdml.certify.certificate import Certificate, dump, pack, parse, read, unpack
from fdml.errors import InputError

ONE = Certificate(
    index=3, label=4, answer=4, status="certified", radius=0.31, norm="l2", method="smoothing", seconds=0.2, seed=0,
    sigma=0.25, alpha=0.001, n0=100, n=1664, hits=1655, shift=0.0,
)  # fmt: skip


def test_a_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "certificates.jsonl"
    path.write_text(dump({"method": "smoothing"}, [ONE, ONE]))
    assert read(path) == ({"method": "smoothing"}, [ONE, ONE])
    assert len(path.read_text().splitlines()) == 3


def test_what_holds_is_right_and_reaches_the_radius() -> None:
    assert ONE.holds(0)
    assert ONE.holds(0.31)
    assert not ONE.holds(0.32)
    wrong = parse(ONE.to_json().replace('"label": 4', '"label": 5'), "here")
    assert not wrong.holds(0)
    assert not wrong.holds(0.1)
    assert ONE.stands(9.0)


def test_a_counter_example_survives_as_text() -> None:
    x = np.random.default_rng(0).random(64).astype(np.float32)
    assert np.array_equal(unpack(pack(x), 64), x)


@pytest.mark.parametrize("text", ["", "no base64!", "AAAA", pack(np.zeros(63)), pack(np.zeros(1_000_000))])
def test_a_broken_counter_example_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="64 packed numbers"):
        unpack(text, 64)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "here is not a line"),
        ("[]", "here is not a line"),
        ("[" * 100_000, "here is not a line"),
        ('{"colour": 1}', "'colour' is not a field"),
        ("{}", "index='None'"),
        (ONE.to_json().replace("0.31", "NaN"), "radius='nan'"),
        (ONE.to_json().replace('"certified"', '"proved"'), "status='proved'"),
        (ONE.to_json().replace('"index": 3', '"index": 3.5'), "index='3.5'"),
        (ONE.to_json().replace('"index": 3', '"index": true'), "index='True'"),
        (ONE.to_json().replace('"index": 3', f'"index": {10**30}'), "index="),
    ],
)
def test_a_line_that_is_no_certificate_is_refused(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(line, "here")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda s: st.lists(s) | st.dictionaries(st.sampled_from([*json.loads(ONE.to_json())]), s),
    )
)
def test_no_line_does_anything_but_raise_or_read(value: object) -> None:
    try:
        parse(json.dumps(value), "here")
    except InputError:
        return


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\xfe", b'{"format": "fdml-certificates", "version": 2}\n'])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read(path)
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "missing")
