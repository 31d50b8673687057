"""From the options of a data set to documents, and from documents to tokens."""

from typing import TYPE_CHECKING

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.guarded_tokenizer import GuardedTokenizer
from camera.data.sampling import document_windows, joined_windows
from camera.data.sets import DATA_SETS, Documents
from camera.errors import CameraError
from camera.options import CalibrationOptions, DatasetOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEST_SEED = 0
"""Of the choice of windows that stand for a test part, whatever seed the calibration has."""


def read_documents(options: DatasetOptions) -> Documents:
    """The texts of one part of a dataset.

    Raises:
        NetworkError: if a hub dataset is not cached and cannot be fetched.
        CameraError: if a file is missing or damaged, or there is no text.
    """
    documents: Documents = DATA_SETS[options.name].read(options)
    if not any(text.strip() for text in documents.texts):
        raise CameraError(f"{documents.source} holds no text")
    return documents


def calibration_windows(options: CalibrationOptions, checkpoint: Checkpoint) -> torch.Tensor:
    """The windows that a model's importance is measured on, int64 [samples, length], as `calibration_tokens` gives them.

    Only text needs the model's tokenizer: ready-made windows are held to the rows of its embedding.

    Raises:
        CameraError: as `calibration_tokens`; if text is to be read and the model's folder has no tokenizer.
    """
    ready = _ready_windows(options, int(checkpoint.config["vocab_size"]))
    if ready is not None:
        return ready
    try:
        tokenizer = checkpoint.load_tokenizer()
    except CameraError as error:
        raise CameraError(
            f"{error}\nWithout a tokenizer a model is calibrated on ready-made windows: a .safetensors file with "
            "`input_ids`"
        ) from error
    return calibration_tokens(options, tokenizer)


def calibration_tokens(options: CalibrationOptions, tokenizer: "PreTrainedTokenizerBase") -> torch.Tensor:
    """The windows that importance is measured on, int64 [samples, length].

    They are chosen as the data set's users have agreed on (see `camera.data.sampling`); ready-made windows are taken
    in their order, each cut to its first `length` tokens.

    Raises:
        CameraError: if the data set is empty, damaged, or too short for a window; NetworkError as `read_documents`.
    """
    ready = _ready_windows(options, len(tokenizer))
    if ready is not None:
        return ready
    documents = read_documents(options)
    samples, length, seed = options.samples, options.length, options.seed
    try:
        if documents.strategy == "documents":
            return _of_documents(documents, tokenizer, samples, length, seed)
        return joined_windows(_encode(documents.joined, tokenizer), samples, length, seed)
    except CameraError as error:
        raise CameraError(f"{documents.source}: {error}; choose a shorter `length` or more text") from None


def evaluation_tokens(
    options: DatasetOptions, tokenizer: "PreTrainedTokenizerBase", window: int = 2048
) -> torch.Tensor:
    """The tokens that perplexity is measured on.

    That is the whole text, joined and tokenised once, with what the tokenizer puts before and after a text. C4 is too
    large for that: of its test part come 256 windows, chosen with seed 0, as in the GPTQ line of work and in CAMERA.

    Args:
        options: which text.
        tokenizer: the model's.
        window: tokens in each window of C4; other texts are not cut here.

    Returns:
        int64 [tokens].

    Raises:
        CameraError: as `read_documents`; or if no document of C4 is longer than a window.
    """
    ready: torch.Tensor | None = DATA_SETS[options.name].ready_windows(options, len(tokenizer))
    if ready is not None:
        return ready.flatten()
    documents = read_documents(options)
    count = sampled_windows(options)
    if count is None:
        return _encode(documents.joined, tokenizer)
    try:
        return _of_documents(documents, tokenizer, count, window, TEST_SEED).flatten()
    except CameraError as error:
        raise CameraError(f"{documents.source}: {error}; choose a shorter `window`") from None


def sampled_windows(options: DatasetOptions) -> int | None:
    """How many random windows stand for a text where it is measured on; None if it is read as a whole."""
    windows: int | None = DATA_SETS[options.name].test_windows
    return windows if options.split == "test" else None


def _ready_windows(options: CalibrationOptions, vocab_size: int) -> torch.Tensor | None:
    ids_SL: torch.Tensor | None = DATA_SETS[options.name].ready_windows(options, vocab_size)
    if ids_SL is None:
        return None
    samples, length = ids_SL.shape
    if samples < options.samples or length < options.length:
        raise CameraError(
            f"{options.path}: input_ids has {samples} windows of {length} tokens, and {options.samples} of "
            f"{options.length} are needed: lower `samples` or `length`"
        )
    return ids_SL[: options.samples, : options.length].contiguous()


def _of_documents(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", samples: int, length: int, seed: int
) -> torch.Tensor:
    texts = documents.texts
    with GuardedTokenizer(tokenizer) as guarded:
        return document_windows(lambda i: guarded.ids(texts[i]), len(texts), samples, length, seed)


def _encode(text: str, tokenizer: "PreTrainedTokenizerBase") -> torch.Tensor:
    """Tokens of one text, int64 [tokens]."""
    with GuardedTokenizer(tokenizer) as guarded:
        return guarded.ids(text)
