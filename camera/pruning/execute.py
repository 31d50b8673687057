"""A plan executed: the layers run one after the other over the calibration tokens, and each is decided.

In one-shot propagation a layer's output is the original model's. In sequential propagation a layer is narrowed as soon as
it is decided, and the next one sees what the narrowed layer puts out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import devices_of, dtype_name, resolve_device, resolve_dtype, synchronize
from camera.digests import digest_json
from camera.errors import CameraError
from camera.held import note
from camera.layerwise.collectives import Collectives, ranks
from camera.layerwise.gram import held_back
from camera.layerwise.resume import StateFiles, StateSaver
from camera.layerwise.runner import LayerRunner
from camera.options import CaptureOptions
from camera.progress import Progress, silent
from camera.pruning.deciding import LayerDecider
from camera.pruning.decision import Decision, decision_tensors, decisions_from
from camera.pruning.passes import Passes, hidden_room
from camera.pruning.plan import PrunePlan
from camera.pruning.sink import NoSink, Sink


def decide(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    plan: PrunePlan,
    options: CaptureOptions,
    work: Path,
    sink: Sink | None = None,
    progress: Progress = silent,
) -> Iterator[Decision]:
    """Run the layers and decide each; what is yielded is to be written before the next is asked for.

    The resume state is saved in `work` after a layer was yielded, as often as costs no more than a few per cent of the
    time. A run that finds a state of the same inputs there yields the layers it holds as `resumed` and goes on behind
    them. The last state stays: `clear_states` once what the run was for is safe.

    Args:
        checkpoint: the source.
        tokens_ST: int64 [samples, tokens].
        plan: what to decide.
        options: batch size, dtype, device, and over how many devices the samples are split.
        work: an existing folder for the resume state.
        sink: where the caller writes them to, if anywhere.
        progress: told (samples done × layers, all).

    Raises:
        CameraError: for weights or activations with NaN or infinity, tokens outside the vocabulary, windows longer than
            the model's positions, for devices that are not there, or if another rank failed.
    """
    devices_of(options.device, options.devices)  # refused here, before there are ranks
    # What no layer reads would go into the pruned model as it is, and be found after the work.
    checkpoint.check_finite(name for name in checkpoint.needed if checkpoint.family.layer_of(name) is None)
    arguments = (checkpoint.folder, tokens_ST, plan, options, work)
    with ranks(options.devices, _other_rank, *arguments) as group:
        execution = _Execution(checkpoint, tokens_ST, plan, options, work, group)
        yield from execution.layers(sink or NoSink(), progress)


def _other_rank(group: Collectives, folder: Path, *arguments: Any) -> None:
    """What the other ranks do: the same layers over their samples."""
    tokens_ST, plan, options, work = arguments
    execution = _Execution(Checkpoint.open(folder), tokens_ST, plan, options, work, group)
    for _ in execution.layers(NoSink(), silent):
        pass


@dataclass(frozen=True)
class _Execution:
    """One rank's part of a run."""

    checkpoint: Checkpoint
    tokens_ST: torch.Tensor
    plan: PrunePlan
    options: CaptureOptions
    work: Path
    group: Collectives

    def layers(self, sink: Sink, progress: Progress) -> Iterator[Decision]:
        checkpoint, plan, group = self.checkpoint, self.plan, self.group
        device = self._device()
        dtype = resolve_dtype(self.options.dtype, checkpoint.dtype)
        self._check_tokens()
        mine_ST = group.share(self.tokens_ST)
        inputs = fingerprint(checkpoint, self.tokens_ST, dtype, plan)
        states = StateFiles(self.work, inputs, group.rank, group.count)
        held_S = group.share(torch.tensor(held_back(len(self.tokens_ST)))).tolist()
        runner = LayerRunner(checkpoint, device, dtype)
        count, samples = checkpoint.layer_count, len(mine_ST)
        with torch.inference_mode(), StateSaver(states, group, sink.sync) as saver:
            decisions, streams_NSTH = self._start(runner, states, mine_ST)
            yield from decisions
            room = partial(self._room, runner)
            passes = Passes(runner, plan, streams_NSTH, self.options.batch_size, held_S, room)
            decider = LayerDecider(checkpoint, plan, device, group, sink.slices)

            def known() -> dict[str, torch.Tensor]:
                synchronize(device)  # which stores hidden states in memory of the host while that goes on
                return decision_tensors(decisions)

            for index in range(len(decisions), count):
                done = index * samples

                def tell(seen: int, done: int = done) -> None:
                    progress(done + seen, samples * count)

                with runner.layer(index) as module:
                    run = passes.begin(index, module, tell)
                    decision = decider.decide(index, run, passes)
                del run
                decisions.append(decision.without_matrices())
                yield decision
                del decision
                if index + 1 < count:
                    saver.save_if_due(index + 1, known, streams_NSTH)
        group.barrier()
        progress(samples * count, samples * count)

    def _start(
        self, runner: LayerRunner, states: StateFiles, mine_ST: torch.Tensor
    ) -> tuple[list[Decision], torch.Tensor]:
        """The layers that an earlier run decided, and the hidden states that enter the next one: of the pruned model,
        and of the source where that is followed."""
        state = states.newest()
        if not self.group.all_equal(0 if state is None else state.count):
            state = None
        streams_NSTH = self._room(runner, self.plan.streams)
        if state is not None:
            streams_NSTH.copy_(state.hidden_STH)
            return decisions_from(state.tensors, state.count, self.work), streams_NSTH
        runner.embed(mine_ST, streams_NSTH[0])
        for stream_STH in streams_NSTH[1:]:
            stream_STH.copy_(streams_NSTH[0])
        return [], streams_NSTH

    def _room(self, runner: LayerRunner, streams: int = 1) -> torch.Tensor:
        """Room for so many times the hidden states of this rank's samples: [streams, samples, tokens, hidden]."""
        shape = streams, *self.group.share(self.tokens_ST).shape, self.checkpoint.hidden_size
        return hidden_room(shape, runner.dtype, runner.device, self.work, self.group.count)

    def _device(self) -> torch.device:
        """Each rank takes an accelerator of its own; on the CPU they share the cores."""
        return resolve_device(str(devices_of(self.options.device, self.group.count)[self.group.rank]))

    def _check_tokens(self) -> None:
        length = self.tokens_ST.shape[1]
        positions = int(self.checkpoint.config.get("max_position_embeddings", length))
        if length > positions:
            raise CameraError(
                f"calibration windows of {length} tokens exceed the model's {positions} positions: lower the length"
            )
        if len(self.tokens_ST) < self.group.count:
            raise CameraError(
                f"{len(self.tokens_ST)} samples cannot be split over {self.group.count} devices: use fewer"
            )


def fingerprint(checkpoint: Checkpoint, tokens_ST: torch.Tensor, dtype: torch.dtype, plan: PrunePlan) -> str:
    """What an unfinished run belongs to. The weights stand by name, shape and file (`Held.mark`): hashing them takes minutes."""
    return digest_json(
        {
            "config": checkpoint.config,
            "folder": str(checkpoint.folder.resolve()),
            "tensors": {name: list(info.shape) for name, info in checkpoint.tensors.items()},
            "files": note(checkpoint.folder, checkpoint.files).mark,
            "shape": list(tokens_ST.shape),
            "tokens": digest_json(tokens_ST.flatten().tolist()),
            "dtype": dtype_name(dtype),
            "plan": plan.identity(),
        }
    )
