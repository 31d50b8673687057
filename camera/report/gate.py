"""The quality gate's verdict: what a recipe required of a model, and what was measured."""

from typing import Literal

from camera.results import Result


class Requirement(Result):
    """One requirement, and whether the model meets it."""

    name: Literal["perplexity_increase", "task_drop"]
    """`perplexity_increase` is relative to the original (0.3 is 30 %), `task_drop` in points of the average."""
    of: str
    """The text, or the tasks, that it was measured on."""
    limit: float
    """The most that is allowed."""
    found: float | None
    """What was measured; None if nothing was, which meets no requirement."""

    @property
    def met(self) -> bool:
        """Whether it was measured and is within the limit. Not a number is not."""
        return self.found is not None and self.found <= self.limit

    @property
    def words(self) -> str:
        """`perplexity_increase on stdlib-test: +115.4 %, at most +30.0 % allowed, 85.4 points too much`."""
        head = f"{self.name} on {self.of}: "
        allowed = f"at most {self._quantity(self.limit)} allowed"
        if self.found is None:
            return f"{head}not measured, {allowed}"
        scale = 100 if self.name == "perplexity_increase" else 1
        missed = "" if self.met else f", {scale * (self.found - self.limit):.3g} points too much"
        return f"{head}{self._quantity(self.found)}, {allowed}{missed}"

    def _quantity(self, value: float) -> str:
        return f"{100 * value:+.1f} %" if self.name == "perplexity_increase" else f"{value:.2f} points"


class Gate(Result):
    """Every requirement of a recipe. A model that fails one is kept and marked, and not published."""

    requirements: tuple[Requirement, ...]

    @property
    def passed(self) -> bool:
        """Whether all are met."""
        return all(requirement.met for requirement in self.requirements)

    @property
    def verdict(self) -> Literal["passed", "failed"]:
        """In a word."""
        return "passed" if self.passed else "failed"

    @property
    def reasons(self) -> tuple[str, ...]:
        """The requirements that are not met, in words."""
        return tuple(requirement.words for requirement in self.requirements if not requirement.met)
