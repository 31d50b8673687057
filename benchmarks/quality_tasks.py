"""Multiple-choice tasks, scored as lm-eval's `acc_norm` is: log-likelihood of each choice over its length in bytes.

Prompts are those of lm-eval's own files of these tasks, without examples. Tiny models are near chance, so that what counts
is the paired difference between two models on the same items.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from camera.errors import CameraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Item:
    """One question."""

    context: str
    choices: tuple[str, ...]
    gold: int


def _piqa(row: dict[str, Any]) -> Item:
    return Item(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(row["label"]))


def _arc(row: dict[str, Any]) -> Item:
    choices = row["choices"]
    return Item(
        f"Question: {row['question']}\nAnswer:",
        tuple(choices["text"]),
        choices["label"].index(row["answerKey"]),
    )


TASKS: dict[str, tuple[str, Callable[[dict[str, Any]], Item]]] = {
    "piqa": ("piqa.validation.jsonl", _piqa),
    "arc_easy": ("arc_easy.test.jsonl", _arc),
}


def read_items(folder: Path, task: str, count: int) -> list[Item]:
    """A random choice of `count` items of a task, always the same.

    Raises:
        CameraError: if the file is missing or a row is not one of the task's.
    """
    name, of_row = TASKS[task]
    try:
        rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        return [of_row(row) for row in Random(0).sample(rows, min(count, len(rows)))]
    except OSError as error:
        raise CameraError(f"{folder / name} cannot be read: {error}") from None
    except (KeyError, ValueError) as error:
        raise CameraError(f"{folder / name} does not hold rows of {task}: {error!r}") from None


@dataclass(frozen=True)
class _Choice:
    item: int
    number: int
    tokens: tuple[int, ...]
    scored: int
    """How many tokens at the end are the choice."""
    size: int
    """Bytes of the choice."""


class Task:
    """The items of one task as tokens of one model's tokenizer."""

    def __init__(self, items: list[Item], tokenizer: "PreTrainedTokenizerBase", positions: int) -> None:
        self._items = items
        choices = [
            _tokenise(number, choice, item, tokenizer, positions)
            for number, item in enumerate(items)
            for choice in range(len(item.choices))
        ]
        self._choices = sorted(choices, key=lambda choice: len(choice.tokens))

    def answers(self, model: "PreTrainedModel") -> list[bool]:
        """For every item, whether the model's choice is the right one."""
        scores = [[0.0] * len(item.choices) for item in self._items]
        for batch in _batches(self._choices):
            for choice, score in zip(batch, _log_likelihoods(model, batch), strict=True):
                scores[choice.item][choice.number] = score / choice.size
        return [
            max(range(len(row)), key=row.__getitem__) == item.gold
            for row, item in zip(scores, self._items, strict=True)
        ]


def _tokenise(
    number: int, choice: int, item: Item, tokenizer: "PreTrainedTokenizerBase", positions: int
) -> _Choice:
    text = " " + item.choices[choice]
    context = tokenizer(item.context, verbose=False)["input_ids"]
    whole = tokenizer(item.context + text, verbose=False)["input_ids"]
    scored = max(1, min(len(whole) - len(context), positions - 1))
    return _Choice(number, choice, tuple(whole[-positions:]), scored, len(text.encode()))


def _batches(choices: list[_Choice]) -> list[list[_Choice]]:
    """Of about the same length each, so that little is padding."""
    batches: list[list[_Choice]] = [[]]
    for choice in choices:
        if (len(batches[-1]) + 1) * len(choice.tokens) > _TOKENS_AT_ONCE and batches[-1]:
            batches.append([])
        batches[-1].append(choice)
    return batches


def _log_likelihoods(model: "PreTrainedModel", batch: list[_Choice]) -> list[float]:
    """Log-likelihood of each choice after its context. Padding stands behind, where causal attention never looks."""
    longest = max(len(choice.tokens) for choice in batch)
    tokens_BT = torch.tensor([choice.tokens + (0,) * (longest - len(choice.tokens)) for choice in batch])
    with torch.inference_mode():
        hidden_BTH = model.get_decoder()(input_ids=tokens_BT, use_cache=False).last_hidden_state
        scored = []
        for row, choice in enumerate(batch):
            end = len(choice.tokens)
            scored.append(hidden_BTH[row, end - choice.scored - 1 : end - 1])
        log_p_NV = model.get_output_embeddings()(torch.cat(scored)).float().log_softmax(-1)
        targets = torch.tensor([token for choice in batch for token in choice.tokens[-choice.scored :]])
        log_p_N = log_p_NV.gather(-1, targets[:, None])[:, 0].double()
    return [float(part.sum()) for part in log_p_N.split([choice.scored for choice in batch])]
