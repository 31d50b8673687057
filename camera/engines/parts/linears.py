"""What stands in the place of a model's linear layers and embedding while it decodes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from camera.engines.parts.blocks import Blocks
from camera.engines.parts.embedding import BlockEmbedding
from camera.engines.parts.fusion import put_in_place
from camera.engines.parts.int4_choice import KernelChoice
from camera.engines.parts.int4_linear import INT4_TYPES, Int4Linear, Int4Parts
from camera.loading import Joined, Source


class DecodingLayers:
    """Exchanges modules of a model on the meta device (a `camera.loading.Rebuild`).

    Linear layers that read the same input become one. Those in 4-bit blocks stay in 4 bits where the device has a kernel,
    and so does the embedding. What cannot be done so stays as transformers made it.
    """

    def __init__(self, source: Source, device: torch.device, *, join: bool = True) -> None:
        """Args:
        source: what the model is read from.
        device: where it will be.
        join: whether linear layers of one input become one.
        """
        self.source, self.device, self.join = source, device, join
        self.kernels = KernelChoice(device)
        self.linears: Counter[str] = Counter()
        """How many matrices there are of each kind."""
        self.fallbacks: Counter[str] = Counter()
        """How many are dequantised, by the reason."""

    def __call__(self, model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, Joined]:
        self.names, self.joined = names, dict[str, Joined]()
        together = [paths for paths in self._of_one_input() if self._alike(model, paths)]
        self.kernels.prepare(self._blocks(paths) for paths in self._products(model, together))
        for paths in together:
            self._fuse(model, paths)
        for path, linear in list(model.named_modules()):
            if type(linear) is nn.Linear and linear.weight.is_meta and f"{path}.weight" not in self.joined:
                self._replace(model, path, linear)
        self._embed(model)
        return self.joined

    def _of_one_input(self) -> Iterator[list[str]]:
        """Paths of linear layers that read the same input."""
        config = self.source.config.to_dict()
        for layer in range(int(config["num_hidden_layers"]) if self.join else 0):
            prefix = self.source.family.layer_prefix(layer)
            for paths in self.source.family.shared_inputs(config, layer):
                if len(paths) > 1:
                    yield [prefix + path for path in paths]

    def _alike(self, model: PreTrainedModel, paths: Sequence[str]) -> bool:
        """Whether linear layers can be one."""
        linears = [model.get_submodule(path) for path in paths]
        parents = {path.rpartition(".")[0] for path in paths}
        types = {self._type(path) for path in paths}
        biases = {isinstance(linear, nn.Linear) and linear.bias is not None for linear in linears}
        plain = all(type(linear) is nn.Linear for linear in linears)
        return plain and len(parents) == len(biases) == 1 and (len(types) == 1 or not types & set(INT4_TYPES))

    def _products(self, model: PreTrainedModel, together: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
        """Paths of the linear layers of each product of 4-bit weights."""
        joined = {path for paths in together for path in paths}
        linears = [path for path, module in model.named_modules() if type(module) is nn.Linear]
        for paths in (*together, *([path] for path in linears if path not in joined)):
            if self._type(paths[0]) in INT4_TYPES:
                yield paths

    def _fuse(self, model: PreTrainedModel, paths: Sequence[str]) -> None:
        """Make one of linear layers that read the same input."""
        linears = [model.get_submodule(path) for path in paths]
        types = [self._type(path) for path in paths]
        has_bias = linears[0].bias is not None
        parent = paths[0].rpartition(".")[0]
        members = [path.rpartition(".")[2] for path in paths]
        sizes = [int(linear.get_parameter("weight").shape[0]) for linear in linears]
        one: nn.Module
        if types[0] in INT4_TYPES:
            made = self._int4(paths, has_bias)
            if isinstance(made, str):
                return  # perhaps they have a kernel one by one
            self.linears[f"{types[0]} by {made.kernel}"] += len(paths)
            put_in_place(model.get_submodule(parent), members, made, sizes)
            return
        weight = linears[0].get_parameter("weight")
        one = nn.Linear(
            weight.shape[1], sum(sizes), bias=has_bias, device="meta", dtype=weight.dtype
        ).requires_grad_(False)
        where = f"{parent}.{put_in_place(model.get_submodule(parent), members, one, sizes)}"
        self.linears.update(kind or str(weight.dtype).removeprefix("torch.") for kind in types)
        for kind, _ in one.named_parameters():
            ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
            self.joined[f"{where}.{kind}"] = {
                self._stored(f"{path}.{kind}"): (slice(start, stop),)
                for path, start, stop in zip(paths, ends, ends[1:], strict=False)
            }

    def _replace(self, model: PreTrainedModel, path: str, linear: nn.Linear) -> None:
        """Put a 4-bit layer in the place of one, if its weights are 4-bit and the device has a kernel for them."""
        kind = self._type(path)
        if kind not in INT4_TYPES:
            self.linears[kind or str(linear.weight.dtype).removeprefix("torch.")] += 1
            return
        made = self._int4([path], linear.bias is not None)
        if isinstance(made, str):
            self.fallbacks[f"{kind}: {made}"] += 1
            return
        self.linears[f"{kind} by {made.kernel}"] += 1
        model.set_submodule(path, made)

    def _int4(self, paths: Sequence[str], has_bias: bool) -> Int4Linear | Int4Parts | str:
        """Linear layers of one type as one 4-bit layer, or why there is none."""
        bias = None
        if has_bias:
            bias = torch.cat([self.source.read(self._stored(f"{path}.bias")) for path in paths])
        return self.kernels.layer(self._blocks(paths), bias)

    def _blocks(self, paths: Sequence[str]) -> Blocks:
        """The weights of linear layers of one type, one below the other."""
        assert self.source.packed is not None
        packed = [self.source.packed(self._stored(f"{path}.weight")) for path in paths]
        return Blocks(packed[0][0], *(data for _, data in packed))

    def _embed(self, model: PreTrainedModel) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        name = self.source.family.name("embedding")
        shared = self.source.config.tie_word_embeddings and type(head) is nn.Linear
        if (
            self.source.packed is None
            or type(embedding) is not nn.Embedding
            or shared
            or name not in self.source.names
        ):
            return
        kind, data = self.source.packed(name)
        if kind in INT4_TYPES and len(data) == embedding.num_embeddings:
            blocks = Blocks(kind, data)
            model.set_input_embeddings(BlockEmbedding(blocks, embedding.weight.dtype, self.device))

    def _stored(self, name: str) -> str:
        """The name in the source of a parameter of the model; of a head that is the embedding, the embedding's."""
        found = self.names.get(name, name)
        if found not in self.source.names and self.source.config.tie_word_embeddings:
            return self.source.family.name("embedding")
        return found

    def _type(self, path: str) -> str:
        """The type that a linear layer's blocks are of; empty if its weights are no blocks."""
        name = self._stored(f"{path}.weight")
        if self.source.packed is None or name not in self.source.names:
            return ""
        return self.source.packed(name)[0]
