"""A Hugging Face checkpoint folder, opened lazily and checked before anything is computed from it."""

import copy
import logging
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from camera.checkpoints.inventory import model_tensors, same_numbers
from camera.checkpoints.kinds import what_is_there
from camera.checkpoints.safetensors_file import TensorInfo
from camera.checkpoints.tokenizer import load_tokenizer
from camera.checkpoints.trust import refuse_outside_links
from camera.checkpoints.weights import QUANTIZED_NAME, Weights, is_checkpoint
from camera.errors import CameraError, understood
from camera.files import read_json
from camera.models import Block, Experts, Family, family_of
from camera.models.defaults import completed
from camera.models.limits import check_config, check_counts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint(Weights):
    """A folder with config.json, safetensors (one file, or shards with an index) and tokenizer files."""

    folder: Path
    config: dict[str, Any]
    """config.json, every key kept, with what it leaves to transformers' config class; `tie_word_embeddings` is what
    transformers makes of it."""
    family: Family
    tensors: dict[str, TensorInfo]
    """Every tensor of the model by name, in file order, then in the order of the bytes; those the family ignores included."""

    @classmethod
    def open(cls, folder: Path | str) -> "Checkpoint":
        """Read config, index and headers; no weights but those that are there twice.

        Raises:
            CameraError: if a file is missing, truncated or a link to elsewhere, if the family is not supported, or the
                weights are quantised or an adapter's.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CameraError(f"{folder} is not a folder: give the folder of a Hugging Face checkpoint")
        refuse_outside_links(folder)
        if not (folder / "config.json").is_file():
            told = what_is_there(folder) or "give the folder of a Hugging Face checkpoint"
            raise CameraError(f"{folder / 'config.json'} is missing: {told}")
        if (folder / QUANTIZED_NAME).exists() and is_checkpoint(folder):
            raise CameraError(
                f"{folder} holds a checkpoint and a quantised model ({QUANTIZED_NAME}), and which of them is meant cannot be "
                f"told: move {QUANTIZED_NAME} and its shards to another folder"
            )
        where = str(folder / "config.json")
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise CameraError(f"{where} does not hold a JSON object: fetch it again")
        family = family_of(config, where)  # of what is no model of ours, nothing else is to be said
        check_config(config, where)
        tensors = model_tensors(folder)
        with understood(where):
            check_counts(family, config, len(tensors), where)
            config = completed(family, config, where, len(tensors))
            checkpoint = cls(folder, _as_loaded(folder, config, family, tensors), family, tensors)
            _ = checkpoint.experts
        for name in checkpoint.ffn_names(0):
            if (bias := name.replace(".weight", ".bias")) in tensors:
                raise CameraError(f"{folder} has {bias}: feed-forward layers with biases are not supported")
        return checkpoint

    @property
    def layer_count(self) -> int:
        return self._count("num_hidden_layers")

    @property
    def hidden_size(self) -> int:
        return self._size("hidden_size")

    @property
    def ffn_width(self) -> int:
        """FFN channels of every decoder layer; of a mixture of experts those of one expert."""
        return self._size(self.family.width_keys(self.config)[0])

    @property
    def experts(self) -> Experts | None:
        """How the mixture-of-experts layers are made; None for a model without.

        Raises:
            CameraError: if their numbers make no sense.
        """
        experts = self.family.experts
        if experts is not None:
            self._count(experts.count_key(self.config))
            if (problem := experts.problem(self.config)) is not None:
                raise CameraError(f"{self.folder / 'config.json'}: {problem}")
        return experts

    @property
    def expert_count(self) -> int:
        """Experts of each layer that routes its tokens to experts; 0 for a model without."""
        experts = self.experts
        return 0 if experts is None else experts.count(self.config)

    def is_sparse(self, layer: int) -> bool:
        """Whether a decoder layer routes its tokens to experts."""
        return self.family.is_sparse(self.config, layer)

    def shared_inputs(self, layer: int) -> tuple[tuple[str, ...], ...]:
        """`Family.shared_inputs` of a decoder layer."""
        return self.family.shared_inputs(self.config, layer)

    def blocks(self, layer: int) -> tuple[Block, ...]:
        """The feed-forward networks of a decoder layer."""
        return self.family.blocks(self.config, layer)

    def ffn_names(self, layer: int) -> tuple[str, ...]:
        """Names of all feed-forward matrices of a decoder layer."""
        return tuple(name for block in self.blocks(layer) for name in block.names)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding's matrix."""
        return _tied(self.family, self.config)

    @property
    def embedding(self) -> str:
        """Name of the token embedding."""
        return self.family.name("embedding")

    @property
    def head(self) -> str:
        """Name of the matrix that makes the logits: the embedding's, if it is tied."""
        return self.family.name("embedding" if self.tied else "head")

    @property
    def final_norm(self) -> str:
        """Name of the weight of the norm before the output head."""
        return self.family.name("norm")

    def _count(self, key: str) -> int:
        """A number of parts that each have tensors of their own."""
        count = self._size(key)
        if count > len(self.tensors):  # a billion empty layers would be built before the first is missed
            raise CameraError(
                f"{self.folder / 'config.json'}: {key} is {count}, and the files hold "
                f"{len(self.tensors)} tensors: config and weights do not belong together"
            )
        return count

    def _size(self, key: str) -> int:
        value = self.config.get(key)
        if type(value) is not int or value < 1:
            raise CameraError(f"{self.folder / 'config.json'}: {key} is {value!r}, not a positive integer")
        return value

    @cached_property
    def needed(self) -> dict[str, TensorInfo]:
        """The tensors that a loader reads: all but those the family ignores, and layers that predict further tokens."""
        predicting = self.prediction_tensors
        return {
            name: info
            for name, info in self.tensors.items()
            if name not in predicting and not any(fnmatch(name, pattern) for pattern in self.family.ignored)
        }

    @property
    def prediction_tensors(self) -> set[str]:
        """Tensors of the layers behind the last that predict further tokens."""
        key = self.family.prediction_layers_key
        if key is None or not self.config.get(key):
            return set()
        first = self.layer_count
        behind = range(first, first + int(self.config[key]))
        return {name for name in self.tensors if self.family.layer_of(name) in behind}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: that of the first feed-forward matrix.

        Raises:
            CameraError: if the checkpoint has no such matrix.
        """
        name = self.ffn_names(0)[0]
        if name not in self.tensors:
            other = next(
                (each for each in self.tensors if each.endswith(name) or name.endswith(f".{each}")), None
            )
            why = "it is quantised, or of another family"
            if other is not None:
                why = f"it has {other}, as some trainers save it. Save it again from transformers under its own names"
            raise CameraError(f"{self.folder} has no tensor {name}: {why}")
        if not self.tensors[name].dtype.is_floating_point:
            raise CameraError(
                f"{self.folder}: {name} is {self.tensors[name].dtype}: the weights are quantised already. Dequantise the "
                "checkpoint to bfloat16 first, or take the original"
            )
        return self.tensors[name].dtype

    def layer_tensors(self, layer: int) -> list[str]:
        """Names of one decoder layer's tensors, in file order, without those the family ignores."""
        return self._by_layer.get(layer, [])

    @cached_property
    def _by_layer(self) -> dict[int | None, list[str]]:
        layers: dict[int | None, list[str]] = {}
        for name in self.needed:
            layers.setdefault(self.family.layer_of(name), []).append(name)
        return layers

    @cached_property
    def hf_config(self) -> "PreTrainedConfig":
        """The config as transformers reads it, natively: no remote code.

        Raises:
            CameraError: if transformers refuses the values.
        """
        from transformers import CONFIG_MAPPING  # heavy; only computing needs it

        _ = self.layer_count  # what it refuses must not reach transformers
        self.family.register()
        try:
            # Not `from_pretrained`, which opens the file by itself.
            config: PreTrainedConfig = CONFIG_MAPPING[self.family.model_type].from_dict(
                read_json(self.folder / "config.json"), name_or_path=str(self.folder)
            )
        except Exception as error:  # its checked dataclasses raise types of their own
            raise CameraError(f"{self.folder / 'config.json'} is refused by transformers: {error}") from error
        config.tie_word_embeddings = self.tied
        return config

    def empty_model(
        self, experts_implementation: str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> "PreTrainedModel":
        """The transformers model of this config on the meta device: its structure without its weights.

        Args:
            experts_implementation: of transformers' table, for a mixture of experts; None for its default.
            dtype: of its parameters, but those that choose their own; None for the checkpoint's.
            changes: values of config.json to replace.

        Raises:
            CameraError: if transformers refuses the values.
        """
        from transformers import AutoModelForCausalLM  # heavy; only computing needs it

        config = copy.deepcopy(self.hf_config)
        for key, value in changes.items():
            setattr(config, key, value)
        dtype = dtype or self.dtype
        extra = {} if self.family.experts is None else {"experts_implementation": experts_implementation}
        try:
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=self.family.attention, **extra
                )
        except Exception as error:  # nearly any type: a value that no layer can be built with
            raise CameraError(
                f"{self.folder / 'config.json'} describes no model that transformers can build: {error!r}"
            ) from error
        model.eval()
        return model

    def load_model(self, dtype: torch.dtype | None = None, device: str = "cpu") -> "PreTrainedModel":
        """The whole model in memory, loaded by transformers itself."""
        from transformers import AutoModelForCausalLM  # heavy; only computing needs it

        self.family.register()
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.folder,
            dtype=dtype or self.dtype,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation=self.family.attention,
        )
        model.eval().to(device)
        return model

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, natively.

        Raises:
            CameraError: if there is none, or its ids do not fit the embedding.
        """
        return load_tokenizer(self.folder)

    def check_shapes(self) -> None:
        """Compare every tensor with what the config asks for.

        Raises:
            CameraError: naming the first tensor that is missing, has another shape, or is asked for nowhere.
        """
        with understood(str(self.folder / "config.json")):
            self._check_shapes()

    def _check_shapes(self) -> None:
        self.empty_model()  # transformers refuses values that no layer can be built with
        _ = self.experts  # and this, numbers that it would only stumble over
        config = {**self.config, **self.hf_config.to_dict()}  # with its defaults
        expected_names = self.family.names(config)
        for name, placed in expected_names.items():
            if name not in self.tensors:
                raise CameraError(f"{self.folder}: {name} is missing, and config.json asks for it")
            found, expected = self.tensors[name].shape, self.family.shape(config, placed.weight)
            if found != expected:
                raise CameraError(
                    f"{self.folder}: {name} has shape {list(found)} and config.json asks for "
                    f"{list(expected)}: config and weights do not belong together"
                )
        beyond = self.layer_tensors(self.layer_count)
        if beyond:
            raise CameraError(
                f"{self.folder} has {beyond[0]}, and config.json asks for {self.layer_count} layers only: "
                "config and weights do not belong together"
            )
        for name in self.needed:
            if name not in expected_names and not (self.tied and name == self.family.name("head")):
                raise CameraError(
                    f"{self.folder} has {name}, which a {self.family.model_type} with this config.json lacks, so that "
                    "transformers would leave it out: mend config.json if the model needs it, else save the model again "
                    "from transformers"
                )


def _tied(family: Family, config: dict[str, Any]) -> bool:
    head = next(weight for weight in family.weights if weight.role == "head")
    return head.when is not None and not head.when.holds(config)


def _as_loaded(
    folder: Path, config: dict[str, Any], family: Family, tensors: dict[str, TensorInfo]
) -> dict[str, Any]:
    """The config of the model that transformers loads: a head that is stored and is not the embedding is not tied to it."""
    head, embedding = family.name("head"), family.name("embedding")
    if not _tied(family, config) or not {head, embedding} <= tensors.keys():
        return config
    if same_numbers(folder, head, embedding, tensors):
        return config
    _tell_untied(folder, head)
    return {**config, "tie_word_embeddings": False}


@cache
def _tell_untied(folder: Path, head: str) -> None:
    """Once in a process: a run opens its model many times."""
    _log.warning(
        "%s: config.json says tie_word_embeddings, and %s is stored and another matrix: taken as not tied, as transformers 5 "
        "does; what is written says so",
        folder,
        head,
    )
