"""What a check of a device found, as data: report.json."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from camera.results import Result

Verdict = Literal["passed", "failed", "timed out", "skipped"]
Reason = Literal["does not apply", "not asked for", "stands on others"]
Size = Literal["full", "quick", "tiny"]


class Measurement(Result):
    """One figure: a time, a size, an error against the CPU."""

    what: str
    """`time of a token`."""
    of: Mapping[str, str | int] = Field(default_factory=dict)
    """What it was measured on: `{"matrix": "down", "layout": "tiled"}`."""
    value: float | None = None
    """None if it could not be measured; `error` says why."""
    unit: str = ""
    at_most: float | None = None
    """A larger value is a failure."""
    at_least: float | None = None
    """A smaller value is a failure."""
    beside: float | None = None
    """A published figure to read it beside."""
    error: str | None = None
    optional: bool = False
    """Whether the step passes without it: one of several ways, of which one must work."""

    @model_validator(mode="before")
    @classmethod
    def _no_value_that_json_lacks(cls, given: dict[str, Any]) -> dict[str, Any]:
        value = given.get("value")
        if value is None or math.isfinite(value):
            return given
        return given | {"value": None, "error": given.get("error") or f"{value} came out"}

    @property
    def holds(self) -> bool:
        """Whether there is a value, within its bounds."""
        if self.error is not None or self.value is None:
            return False
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    @property
    def name(self) -> str:
        """What, and of what."""
        return ", ".join([self.what, *map(str, self.of.values())])


class StepRecord(Result):
    """One step of the check."""

    name: str
    title: str
    key: str
    """Digest of what its result depends on; empty if it was not run."""
    verdict: Verdict
    reason: Reason | None = None
    """Of a step that was skipped."""
    cause: str = ""
    """Why it did not pass, or what was missing."""
    advice: str = ""
    """What is known of such a failure, and what to do."""
    seconds: float = 0.0
    measurements: tuple[Measurement, ...] = ()
    details: dict[str, Any] = Field(default_factory=dict)
    """What is no figure: versions, the engine's description, a profile."""

    @property
    def fine(self) -> bool:
        """Whether all of it that applies here passed."""
        return self.verdict == "passed" or self.reason in ("does not apply", "not asked for")

    def values(self, what: str) -> list[Measurement]:
        """The figures of one quantity."""
        return [one for one in self.measurements if one.what == what]


class CheckReport(Result):
    """The whole check."""

    version: Literal[1] = 1
    """Of this schema: raised when a field changes its meaning or goes."""
    camera: str
    """Version of the program."""
    made: str
    """UTC, to the second."""
    device: str
    """As asked for: `npu:0`."""
    name: str
    """What the device calls itself."""
    stub: bool
    """Whether the numbers are those of a stub of CANN, and not of a card."""
    size: Size
    """`tiny`: small shapes, whose times mean nothing."""
    passed: bool
    """Whether every step that applies here passed."""
    host: dict[str, Any]
    """Versions, cards, environment: what the first step found."""
    settings: dict[str, Any]
    """The options, without paths."""
    steps: tuple[StepRecord, ...]

    def step(self, name: str) -> StepRecord | None:
        """A step if it passed: nothing is read from one that did not."""
        return next((one for one in self.steps if one.name == name and one.verdict == "passed"), None)
