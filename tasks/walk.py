"""The steps of a pipeline, performed in order, past artifacts that were evicted and that nothing needs."""

from collections.abc import Callable
from dataclasses import dataclass

from tasks.pipeline import Pipeline
from tasks.stage import Request, RunReferences, Step, find
from tasks.store import Artifact, Store


def walk(
    pipeline: Pipeline,
    perform: Callable[[Step, Request], Artifact],
    references: RunReferences | None = None,
    store: Store | None = None,
    in_use: Callable[[str], None] = lambda key: None,
) -> dict[str, Artifact]:
    """Perform every step in order; the artifacts by step name.

    Args:
        pipeline: the plan.
        perform: gives the artifact of a request.
        references: where else the run is recorded.
        store: where evicted artifacts are known; one whose files no step needs is not made again, and comes
            back as it is. Without a store every step is performed.
        in_use: told the key of every step before it is looked up.
    """
    steps = _Walk(pipeline, perform, references or RunReferences(), store, in_use)
    while True:
        try:
            return steps.all()
        except _AnotherContentError:
            continue  # what was evicted came out differently, and is whole now: all that follows has new keys


class _AnotherContentError(Exception):
    """An evicted artifact was made again, and its content is not what its manifest said."""


@dataclass(frozen=True)
class _Walk:
    pipeline: Pipeline
    perform: Callable[[Step, Request], Artifact]
    references: RunReferences
    store: Store | None
    in_use: Callable[[str], None]

    def all(self) -> dict[str, Artifact]:
        done: dict[str, Artifact] = {}
        for step in self.pipeline.steps:
            request = step.request(done, self.references)
            self.in_use(request.key)
            done[step.name] = self._evicted(step, request) or self._made(step, done)
        return done

    def _evicted(self, step: Step, request: Request) -> Artifact | None:
        if self.store is None or step.name in self.pipeline.results:
            return None
        return self.store.evicted(step.stage.name, request.key)

    def _made(self, step: Step, done: dict[str, Artifact]) -> Artifact:
        """The artifact of a step, after those of its inputs that were evicted if it must run."""
        lacking = [name for name in step.needs if done[name].evicted]
        if lacking and self.store and find(self.store, step.request(done, self.references)) is None:
            for earlier in self.pipeline.steps:
                if earlier.name in lacking:
                    known = done[earlier.name].digest
                    done[earlier.name] = self._made(earlier, done)
                    if done[earlier.name].digest != known:
                        raise _AnotherContentError
        return self.perform(step, step.request(done, self.references))
