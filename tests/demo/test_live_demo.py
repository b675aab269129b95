"""The demo's endpoints as programs call them, by gradio's own client."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from live_demo import live_demo

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with live_demo() as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False, analytics_enabled=False)


def test_every_endpoint_is_documented(client: Client) -> None:
    found: Any = client.view_api(print_info=False, return_format="dict")
    assert set(found["named_endpoints"]) == {
        "/models", "/classify", "/attack", "/certify", "/accuracy", "/leaderboard",
    }  # fmt: skip
    assert not found["unnamed_endpoints"]
    assert all(each["description"] for each in found["named_endpoints"].values())


def test_the_endpoints_answer(client: Client) -> None:
    models = client.predict(api_name="/models")
    assert [each["name"] for each in models] == ["fashion-mnist", "digits"]
    found = client.predict("fashion-mnist", "0", api_name="/classify")
    assert found["clean"]["class"] == found["defended"]["class"] == "Ankle boot"
    found = client.predict(exhibit="fashion-mnist", image="0", attack="pgd-best", steps=10, api_name="/attack")
    assert found["models"]["clean"]["fooled"]
    assert not found["models"]["defended"]["fooled"]
    assert found["models"]["clean"]["distances"]["linf"] <= 0.1 + 1e-6
    again = client.predict("fashion-mnist", found["models"]["clean"]["picture"], api_name="/classify")
    assert again["clean"]["class"] == found["models"]["clean"]["after"]["class"]
    proof = client.predict("digits", "0", samples=2000, seed=1, api_name="/certify")
    assert proof["label"] is None or proof["radius"] > 0
    assert client.predict("digits", "0", samples=2000, seed=1, api_name="/certify") == proof
    assert set(client.predict("digits", api_name="/accuracy")) == {"clean", "defended"}
    assert len(client.predict(api_name="/leaderboard")) == 4


@pytest.mark.parametrize(
    ("endpoint", "values", "message"),
    [
        ("/classify", {"exhibit": "cats", "image": "0"}, "unknown models 'cats'"),
        ("/classify", {"exhibit": "digits", "image": "100"}, "there is no picture 100"),
        ("/classify", {"exhibit": "digits", "image": 3}, "image must be text, got '3'"),
        ("/attack", {"exhibit": "digits", "image": "0", "attack": "magic"}, "unknown attack 'magic'"),
        ("/attack", {"exhibit": "digits", "image": "0", "eps": 3.0}, "larger than the whole pixel range"),
        ("/attack", {"exhibit": "digits", "image": "0", "steps": 2.5}, "steps must be a whole number, got '2.5'"),
        ("/certify", {"exhibit": "digits", "image": "0", "samples": 10}, "10 samples are out of range"),
        ("/certify", {"exhibit": "digits", "image": "0", "seed": -2}, "seed -2 is out of range"),
        ("/accuracy", {"exhibit": "digits", "norm": "l7"}, "unknown norm 'l7'"),
    ],
)
def test_a_mistake_is_answered_with_what_would_be_right(
    client: Client, endpoint: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(AppError, match=message):
        client.predict(**values, api_name=endpoint)


def test_several_clients_at_once_get_their_own_answers(address: str, client: Client) -> None:
    wanted = {place: client.predict("digits", str(place), steps=5, api_name="/attack")["models"] for place in range(3)}
    found: dict[int, Any] = {}

    def ask(place: int) -> None:
        own = Client(address, verbose=False, analytics_enabled=False)
        found[place] = own.predict("digits", str(place), steps=5, api_name="/attack")["models"]

    threads = [threading.Thread(target=ask, args=(place,)) for place in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == wanted
