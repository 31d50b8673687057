"""How many operators a device is asked for: what decoding costs the host, whatever the kernels take."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts the operators that compute something, by name; a view is none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, op: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = next(iter(op._schema.returns), None)
        if first is None or first.alias_info is None or first.alias_info.is_write:
            self.counts[op._schema.name.partition("::")[2]] += 1
        return op(*args, **(kwargs or {}))


def launches_of(run: Callable[[], object]) -> Counter[str]:
    """The operators that a function launches."""
    with Launches() as launched:
        run()
    counts: Counter[str] = launched.counts
    return counts
