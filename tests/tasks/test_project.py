"""What a project sets for the tools that it stands on."""

import urllib.request

import pytest

from tasks.project import exempt_loopback

PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("given", "exempt"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"no_proxy": "", "NO_PROXY": ""}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": ".intern.example, localhost"}, ".intern.example,localhost,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY"])
def test_no_proxy_is_asked_for_what_runs_on_this_machine(
    given: dict[str, str], exempt: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {name: PROXY, **given}
    exempt_loopback(environment)
    assert environment["no_proxy"] == environment["NO_PROXY"] == exempt
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert all(map(urllib.request.proxy_bypass, ("127.0.0.1:4200", "localhost:5000")))


def test_without_a_proxy_nothing_is_set() -> None:
    environment: dict[str, str] = {"no_proxy": "a"}
    exempt_loopback(environment)
    assert environment == {"no_proxy": "a"}
