"""Our models as lm-eval's language model: log-likelihoods of continuations.

lm-eval's own wrapper of transformers models keeps the logits of whole batches, which for a vocabulary of 153,376 is
gigabytes. This one asks the output head for the continuations only, and computes their softmax in float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM

from camera.checkpoints.guarded_tokenizer import GuardedTokenizer
from camera.devices import dtype_name
from camera.errors import CameraError
from camera.evaluation.head import log_likelihoods
from camera.evaluation.text_model import Advance, TextModel, windows_at_once
from camera.progress import Progress, silent

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

    Tokens = tuple[tuple[str, str], list[int], list[int]]
    """Texts, tokens of the context, tokens of the continuation."""

SHORTEST_SHARE = 0.8
"""Of the longest sequence of a part: how long each is at least, so that little of it is padding."""


@dataclass(frozen=True)
class _Continuation:
    """One request: the last tokens of a sequence that are to be scored."""

    request: int
    tokens: list[int]


class CameraLM(TemplateLM):  # type: ignore[misc]
    """A model for tasks that are scored by likelihood.

    Requests that end in different single tokens after the same text (yes or no) are one sequence.
    """

    def __init__(
        self,
        model: TextModel,
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> None:
        """Wrap a model.

        Args:
            model: what `open_text_model` gives.
            tokenizer: the model's own.
            batch_size: sequences computed at once; changes memory and speed, and results only by rounding.
            progress: called with (requests done, requests in all); of a model that runs layer by layer each layer is a
                part of every request.
        """
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.progress = batch_size, progress
        self.max_length = model.positions
        self._device = model.device
        self._guarded = GuardedTokenizer(tokenizer)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; by default with what the tokenizer adds, unless the text has its own begin token."""
        if add_special_tokens is None:
            add_special_tokens = not (self._begin and string.startswith(self._begin))
        return self._guarded.encode(string, add_special_tokens)

    @cached_property
    def _begin(self) -> str:
        """The text of the token that stands before one without context."""
        return self._guarded.decode([self.prefix_token_id])

    def loglikelihood(
        self, requests: "list[Instance]", disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """See `lm_eval.api.model.LM`."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = True) -> list[float]:
        raise CameraError(
            f"{_name(requests)} measures perplexity: use `camera evaluate MODEL --text` for that"
        )

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = True) -> list[str]:
        raise CameraError(
            f"{_name(requests)} is scored on generated text; only tasks of likelihood can be run"
        )

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: "list[Tokens]", disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self._guarded.close()  # all is encoded
        wanted: dict[tuple[int, ...], list[_Continuation]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            # What does not fit is cut from the left; the last token is only predicted, never read.
            sequence = (context + continuation)[-(self.max_length + 1) : -1]
            wanted.setdefault(tuple(sequence), []).append(
                _Continuation(number, continuation[-len(sequence) :])
            )
        # The longest first: memory runs out at once or never, and the time left is not underestimated.
        sequences = sorted(wanted, key=lambda sequence: (-len(sequence), sequence))
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        passed, in_all = 0, len(sequences) * (1 + self.model.layers)

        def advance(count: int) -> None:
            nonlocal passed
            passed += count
            self.progress(len(requests) * passed // in_all, len(requests))

        for part in self._parts(sequences):
            asked = [(row, each) for row, sequence in enumerate(part) for each in wanted[sequence]]
            for (_, scored), answer in zip(asked, self._score(part, asked, advance), strict=True):
                if not math.isfinite(answer[0]):
                    raise CameraError(
                        f"the model computes NaN or infinity in {dtype_name(self.model.dtype)} on the text "
                        f"{requests[scored.request][0][0][-80:]!r}: measure its perplexity, which names the layer"
                    )
                answers[scored.request] = answer
            advance(len(part))
        return answers

    def _parts(self, sequences: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Sequences that go through the model together, padded to the longest of them, which is the first."""
        start = 0
        while start < len(sequences):
            longest = len(sequences[start])
            stop = start + windows_at_once([self.model], longest, self.batch_size)
            part = [
                sequence for sequence in sequences[start:stop] if len(sequence) >= SHORTEST_SHARE * longest
            ]
            yield part
            start += len(part)

    def _score(
        self, part: list[tuple[int, ...]], asked: list[tuple[int, _Continuation]], advance: Advance
    ) -> Iterator[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation asked for, and whether each token is the likeliest."""
        ids_ST = torch.zeros((len(part), len(part[0])), dtype=torch.int64)
        for row, sequence in enumerate(part):
            ids_ST[row, : len(sequence)] = torch.tensor(sequence)
        hidden_STH = self.model.hidden(ids_ST, self.batch_size, advance)
        hidden_NH = torch.cat(
            [
                hidden_STH[row, len(part[row]) - len(continuation.tokens) : len(part[row])]
                for row, continuation in asked
            ]
        )
        targets_N = torch.tensor([token for _, continuation in asked for token in continuation.tokens])
        log_p_N, likeliest_N = log_likelihoods(self.model, hidden_NH, targets_N, lambda tokens: None)
        lengths = [len(continuation.tokens) for _, continuation in asked]
        greedy_N = likeliest_N == targets_N
        for log_p, greedy in zip(log_p_N.split(lengths), greedy_N.split(lengths), strict=True):
            yield float(log_p.sum()), bool(greedy.all())


def _name(requests: "list[Instance]") -> str:
    return next((str(request.task_name) for request in requests), "the task")
