"""The steps, in their order: what each stands on, how long it may take, and where it applies."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from camera.device_check.schema import StepRecord

Kind = Literal["npu", "cuda", "cpu"]


@dataclass(frozen=True)
class Step:
    """Something to try, in a process of its own."""

    name: str
    title: str
    """For people."""
    module: str
    """Its function `run` does it, given a `Context`."""
    seconds: int
    """When they are over, its process is ended."""
    needs: tuple[str, ...] = ()
    """The steps that must have passed."""
    kinds: tuple[Kind, ...] = ("npu", "cuda", "cpu")
    asks: str | None = None
    """The option without which it is not run."""
    heeds: tuple[str, ...] = ()
    """Further options that change its result, where they are given."""
    given: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `run`, plain JSON."""
    version: int = 1
    """Raised when it measures something else, so that an older result is not taken."""


class Tell(Protocol):
    """Told that a step begins, with None, and what became of it."""

    def __call__(self, step: Step, record: "StepRecord | None") -> None: ...


_STEPS = "camera.device_check.steps."
_DAY = 24 * 3600
_PRUNED = {"type": "q4_0_64", "pruned": True}
_INT4 = ("sameness", "int4-kernels")

STEPS: tuple[Step, ...] = (
    Step("host", "Host and versions", f"{_STEPS}host", 60),
    Step("imports", "Imports and the device", f"{_STEPS}imports", 120, ("host",)),
    Step("operators", "Operators against the CPU", f"{_STEPS}operators", 180, ("imports",)),
    Step("int4-kernels", "4-bit kernels", f"{_STEPS}int4_kernels", 540, ("imports",), version=2),
    Step("launch-cost", "Cost of a launch", f"{_STEPS}launch_cost", 120, ("imports",)),
    Step("bandwidth", "Bandwidth", f"{_STEPS}bandwidth", 60, ("imports",)),
    Step("sameness", "The same as on the CPU", f"{_STEPS}sameness", 180, ("operators",)),
    Step("walk", "Pruning, two layers", f"{_STEPS}walk", 240, ("sameness",)),
    Step("quantizing", "Rounding and GPTQ", f"{_STEPS}quantizing", 180, ("sameness",), ("npu", "cuda")),
    *(
        Step(f"decode-{name}", f"Decoding, {title}", f"{_STEPS}decode", 150, needs, given=given)
        for name, title, needs, given in (
            ("16-bit", "16 bits", ("sameness",), {"type": None, "pruned": False}),
            ("q4_0", "Q4_0", _INT4, {"type": "q4_0", "pruned": False}),
            ("q4_0_64", "Q4_0_64", _INT4, {"type": "q4_0_64", "pruned": False}),
            ("q4_0_64-pruned", "Q4_0_64, 20 % pruned", _INT4, _PRUNED),
        )
    ),
    Step("profile", "Profile of a token", f"{_STEPS}profile", 120, ("decode-q4_0_64-pruned",), given=_PRUNED),
    *(
        step
        for build, title in (("llama_cpp", "llama.cpp"), ("llama_cpp_stock", "llama.cpp, stock"))
        for step in (
            Step(
                *(f"{build}-logits", f"{title}: logits", f"{_STEPS}llama_logits", 900, ("imports",)),
                asks=build,
                given={"build": build},
            ),
            Step(
                *(f"{build}-speed", f"{title}: speed", f"{_STEPS}llama_speed", 2400, (f"{build}-logits",)),
                asks=build,
                given={"build": build},
            ),
        )
    ),
    *(
        Step(
            *(name, title, f"{_STEPS}recipe", _DAY, ("sameness",)),
            asks="model",
            heeds=("llama_cpp", "llama_cpp_stock"),
            given={"recipe": file},
        )
        for name, title, file in (
            ("recipe", "The recipe for the 910B", "openpangu-7b-910b.yaml"),
            ("reference", "The reference's own settings", "openpangu-7b-reference.yaml"),
        )
    ),
)
