"""Every command stays within its memory."""

import pytest

from tests.real.commands import COMMANDS
from tests.real.workshop import Workshop

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if each.slow else []) for name, each in COMMANDS.items()],
)
def test_a_command_stays_within_its_memory(workshop: Workshop, name: str) -> None:
    with workshop.using():
        done = workshop.measured(name)
    peak, bound = done.peak_bytes / 1e9, done.bound_bytes / 1e9
    said = f"{done.command}\ntook {peak:.2f} GB, and {bound:.2f} GB are its bound"
    if bound < peak <= bound + COMMANDS[name].over_gb:
        pytest.xfail(said)
    assert peak <= bound, said
