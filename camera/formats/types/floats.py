"""F32, F16 and BF16: a block is one number."""

from typing import ClassVar

import torch

from camera.formats.format import BlockFormat, Encoded, to_float32
from camera.formats.parallel import Scratch
from camera.registry import BLOCK_FORMATS


class Float(BlockFormat):
    """Numbers of a floating dtype, one after the other."""

    block_length = 1
    dtype: ClassVar[torch.dtype]

    def encode(self, chunk: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> bool:
        if self.dtype == torch.bfloat16:  # by way of float32, as ggml goes
            chunk = to_float32(chunk, scratch)
        # Rounding keeps the order, so if the extremes stay finite all do; and NaN is its own extreme.
        if not torch.stack(chunk.aminmax()).to(self.dtype).isfinite().all():
            return False
        out.view(self.dtype).copy_(chunk.reshape(-1, 1))
        return True

    def encode_on_device(self, chunk: torch.Tensor) -> Encoded:
        stored = (chunk.float() if self.dtype == torch.bfloat16 else chunk).to(self.dtype).view(-1, 1)
        return Encoded(stored.view(torch.uint8), stored.float(), stored.isfinite().all())

    def decode(self, stored: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        out.copy_(stored.view(self.dtype))


class F32(Float):
    """IEEE 754 single precision."""

    name, dtype = "f32", torch.float32
    block_bytes = 4
    tensor_number, file_number = 0, 0


class F16(Float):
    """IEEE 754 half precision."""

    name, dtype = "f16", torch.float16
    block_bytes = 2
    tensor_number, file_number = 1, 1


class BF16(Float):
    """The upper half of a single-precision number."""

    name, dtype = "bf16", torch.bfloat16
    block_bytes = 2
    tensor_number, file_number = 30, 32


for form in (F32, F16, BF16):
    BLOCK_FORMATS.register(form.name, form())
