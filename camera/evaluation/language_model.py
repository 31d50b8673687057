"""Our models as lm-eval's language model: log-likelihoods of continuations.

lm-eval's own wrapper of transformers models keeps the logits of whole batches, which for a vocabulary of 153,376 is
gigabytes. This one asks the output head for the continuations only, and computes their softmax in float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM

from camera.devices import dtype_name
from camera.errors import CameraError
from camera.evaluation.text_model import hidden_states
from camera.evaluation.windows import pieces
from camera.progress import Progress, silent

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Tokens = tuple[tuple[str, str], list[int], list[int]]
    """Texts, tokens of the context, tokens of the continuation."""


@dataclass(frozen=True)
class _Continuation:
    """One request: the last tokens of a sequence that are to be scored."""

    request: int
    tokens: list[int]


class CameraLM(TemplateLM):  # type: ignore[misc]
    """A transformers model on its device, for tasks that are scored by likelihood.

    Requests that end in different single tokens after the same text (yes or no) are one sequence.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> None:
        """Wrap a model.

        Args:
            model: what `camera.loading.load_model` gives, or any other causal model in eval mode.
            tokenizer: the model's own.
            batch_size: sequences computed at once; changes memory and speed, and results only by rounding.
            progress: called with (requests done, requests in all).
        """
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.progress = batch_size, progress
        self.max_length = int(model.config.max_position_embeddings)
        self._device = model.device

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
            begin = str(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False))

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
        done = 0
        for start in range(0, len(sequences), self.batch_size):
            batch = sequences[start : start + self.batch_size]
            asked = [
                (row, continuation) for row, sequence in enumerate(batch) for continuation in wanted[sequence]
            ]
            for (_, scored), answer in zip(asked, self._score(batch, asked), strict=True):
                if not math.isfinite(answer[0]):
                    raise CameraError(
                        f"the model computes NaN or infinity in {dtype_name(self.model.dtype)} on the text "
                        f"{requests[scored.request][0][0][-80:]!r}: measure its perplexity, which names the layer"
                    )
                answers[scored.request] = answer
            done += len(asked)
            self.progress(done, len(requests))
        return answers

    def _score(
        self, batch: list[tuple[int, ...]], asked: list[tuple[int, _Continuation]]
    ) -> Iterator[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation asked for, and whether each token is the likeliest."""
        ids_BT = torch.zeros((len(batch), len(batch[0])), dtype=torch.int64)
        for row, sequence in enumerate(batch):
            ids_BT[row, : len(sequence)] = torch.tensor(sequence)
        hidden_BTH = hidden_states(self.model, ids_BT)
        hidden_NH = torch.cat(
            [
                hidden_BTH[row, len(batch[row]) - len(continuation.tokens) : len(batch[row])]
                for row, continuation in asked
            ]
        )
        targets_N = torch.tensor(
            [token for _, continuation in asked for token in continuation.tokens], device=hidden_NH.device
        )
        head = self.model.get_output_embeddings()
        scores, likeliest = [], []
        for piece in pieces(len(targets_N), int(self.model.config.vocab_size)):
            log_p_CV = head(hidden_NH[piece]).float().log_softmax(-1)
            scores.append(log_p_CV.gather(-1, targets_N[piece, None])[:, 0].cpu())
            likeliest.append((log_p_CV.argmax(-1) == targets_N[piece]).cpu())
        lengths = [len(continuation.tokens) for _, continuation in asked]
        for score, greedy in zip(
            torch.cat(scores).split(lengths), torch.cat(likeliest).split(lengths), strict=True
        ):
            yield float(score.double().sum()), bool(greedy.all())


def _name(requests: "list[Instance]") -> str:
    return next((str(request.task_name) for request in requests), "the task")
