"""A pipeline resolved against the store: which step is cached, which runs; and the same, executed.

An artifact that was evicted is made again only if a step that must run needs its files.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tasks.pipeline import Pipeline
from tasks.stage import Request, Step, find
from tasks.store import Artifact, Store

State = Literal["cached", "evicted", "run", "after"]
"""`cached`; `evicted` (and no step needs its files); `run`; `after`: runs unless what it waits for comes out as an
artifact that the store has."""
Look = Callable[[Request], Artifact | None]
Perform = Callable[[Step, Request], Artifact]


@dataclass(frozen=True)
class Resolved:
    """What is known of a step."""

    step: Step
    state: State
    request: Request | None
    """None while it waits for an artifact."""
    artifact: Artifact | None
    """None until it is made."""


def resolve(pipeline: Pipeline, look: Look, store: Store | None = None) -> dict[str, Resolved]:
    """What would become of every step, by name.

    Args:
        pipeline: its steps.
        look: gives the artifact of a request if there is one.
        store: where evicted artifacts are known; without it none is.
    """
    return _Resolution(pipeline, look, store).all()


def execute(
    pipeline: Pipeline,
    perform: Perform,
    store: Store | None = None,
    in_use: Callable[[str], None] = lambda key: None,
) -> dict[str, Artifact]:
    """Perform every step in order; the artifacts by step name.

    Args:
        pipeline: its steps.
        perform: gives the artifact of a request.
        store: where evicted artifacts are known; one that no step needs comes back as it is.
        in_use: called with the key of every step before it is looked up.
    """
    while True:
        try:
            resolved = _Resolution(pipeline, lambda request: None, store, perform, in_use).all()
        except _ContentChangedError:
            continue  # what was evicted is whole again, and all that follows has new keys
        return {name: each.artifact for name, each in resolved.items() if each.artifact is not None}


class _ContentChangedError(Exception):
    """An evicted artifact was made again, and its content is not what its manifest said."""


@dataclass
class _Resolution:
    pipeline: Pipeline
    look: Look
    store: Store | None
    perform: Perform | None = None
    in_use: Callable[[str], None] = lambda key: None
    found: dict[str, Resolved] = field(default_factory=dict)

    def all(self) -> dict[str, Resolved]:
        for step in self.pipeline.steps:
            request = self._request(step)
            if request is None:
                self._make(step, "after")
                continue
            self.in_use(request.key)
            artifact = self.look(request)
            if artifact is None and self.store is not None and step.name not in self.pipeline.results:
                artifact = self.store.evicted(step.stage.name, request.key)
            if artifact is None:
                self._make(step, "run")
            else:
                state: State = "evicted" if artifact.evicted else "cached"
                self.found[step.name] = Resolved(step, state, request, artifact)
        return self.found

    def _request(self, step: Step) -> Request | None:
        """The request of a step if the artifacts that it reads are known."""
        known = {name: each.artifact for name, each in self.found.items() if each.artifact is not None}
        return step.request(known) if all(name in known for name in step.needs) else None

    def _make(self, step: Step, state: State) -> None:
        """Have a step run, after those whose evicted artifacts it reads."""
        request = self._request(step)
        evicted = [each for name in step.needs if (each := self.found[name]).state == "evicted"]
        if not (evicted and self.perform and self.store and request and find(self.store, request)):
            for earlier in sorted(evicted, key=lambda each: self.pipeline.steps.index(each.step)):
                self._make(earlier.step, state)
                again, known = self.found[earlier.step.name].artifact, earlier.artifact
                if again is not None and known is not None and again.digest != known.digest:
                    raise _ContentChangedError
        request = self._request(step)
        artifact = self.perform(step, request) if self.perform and request else None
        self.found[step.name] = Resolved(step, state, request, artifact)
