"""Hold our GGUF files against llama.cpp's own tools: tensors byte for byte, and perplexity.

    python scripts/compare_llama_cpp.py MODEL --source llama.cpp --build llama.cpp/build --text held-out.txt

SOURCE holds `convert_hf_to_gguf.py`, BUILD `bin/llama-quantize` and `bin/llama-perplexity`. Our f16 and Q8_0 files are
compared with the converter's, our Q8_0 and Q4_0 files with `llama-quantize --pure` of the converter's f32 file, and
llama-perplexity of our f32 file with transformers' on the same windows. Exit code 1 if a tensor differs.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from gguf import GGUFReader
from rich.console import Console
from rich.table import Table

from camera.checkpoints.checkpoint import Checkpoint
from camera.formats.convert import convert_to_gguf
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint

WINDOW = 512


def main() -> int:
    """Compare and print two tables; 1 if a tensor differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--source", type=Path, required=True, help="llama.cpp's source")
    parser.add_argument("--build", type=Path, required=True, help="where it was built")
    parser.add_argument("--text", type=Path, help="also compare the perplexity of this text")
    parser.add_argument("--windows", type=int, default=20, help="of 512 tokens (default: %(default)s)")
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.model)
    console = Console()
    table = Table(title=f"{arguments.model.name}: tensors", title_justify="left")
    for column in ("ours", "theirs", "equal", "differ"):
        table.add_column(column)
    differ = 0
    with tempfile.TemporaryDirectory(prefix="compare-") as temporary:
        folder = Path(temporary)
        theirs = {type: _convert(arguments, type, folder) for type in ("f32", "f16", "q8_0")}
        pairs: list[tuple[BlockType, str, Path]] = [
            ("f16", "convert_hf_to_gguf.py", theirs["f16"]),
            ("q8_0", "convert_hf_to_gguf.py", theirs["q8_0"]),
            ("q8_0", "llama-quantize --pure", _quantize(arguments, theirs["f32"], "q8_0")),
            ("q4_0", "llama-quantize --pure", _quantize(arguments, theirs["f32"], "q4_0")),
        ]
        for number, (type, tool, path) in enumerate(pairs):
            equal, names = compare(_ours(checkpoint, type, folder / str(number)), path)
            differ += len(names)
            table.add_row(type, tool, str(equal), ", ".join(names) or "none")
        console.print(table)
        if arguments.text is not None:
            text = arguments.text.read_text(encoding="utf-8")
            expected = _their_perplexity(arguments, _ours(checkpoint, "f32", folder / "f32"))
            found = our_perplexity(checkpoint, text, arguments.windows)
            console.print(
                f"perplexity, {arguments.windows} windows of {WINDOW}, second halves: "
                f"llama-perplexity {expected:.4f}, transformers {found:.4f}, apart {abs(found / expected - 1):.1e}"
            )
    return 1 if differ else 0


def compare(ours: Path, theirs: Path) -> tuple[int, list[str]]:
    """How many tensors of two GGUF files have the same type, shape and bytes, and the names of all others."""
    left, right = ({tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (ours, theirs))
    differ = [
        name
        for name in sorted(left.keys() | right.keys())
        if name not in left
        or name not in right
        or left[name].tensor_type != right[name].tensor_type
        or list(left[name].shape) != list(right[name].shape)
        or left[name].data.tobytes() != right[name].data.tobytes()
    ]
    return len(left.keys() | right.keys()) - len(differ), differ


def our_perplexity(checkpoint: Checkpoint, text: str, windows: int) -> float:
    """Perplexity as llama-perplexity counts it: windows that begin with BOS, of which the second half is scored."""
    tokenizer = checkpoint.load_tokenizer()
    model = checkpoint.load_model(torch.float32)
    ids = torch.tensor(tokenizer(text)["input_ids"])[: windows * WINDOW].view(-1, WINDOW).clone()
    ids[:, 0] = tokenizer.bos_token_id
    total = 0.0
    with torch.inference_mode():
        for window_1T in ids.split(1):
            log_probs_TV = model(window_1T).logits[0, WINDOW // 2 : -1].log_softmax(-1)
            total -= float(log_probs_TV.gather(1, window_1T[0, WINDOW // 2 + 1 :, None]).double().sum())
    return math.exp(total / (len(ids) * (WINDOW - WINDOW // 2 - 1)))


def _ours(checkpoint: Checkpoint, type: BlockType, folder: Path) -> Path:
    folder.mkdir()
    quantize_checkpoint(checkpoint, folder, QuantizeOptions(type=type))
    convert_to_gguf(folder, folder.with_suffix(".gguf"), name=type)
    return folder.with_suffix(".gguf")


def _convert(arguments: argparse.Namespace, type: str, folder: Path) -> Path:
    out = folder / f"theirs-{type}.gguf"
    environment = os.environ | {"PYTHONPATH": str((arguments.source / "gguf-py").resolve())}
    script = arguments.source / "convert_hf_to_gguf.py"
    _run([sys.executable, script, arguments.model, "--outtype", type, "--outfile", out], environment)
    return out


def _quantize(arguments: argparse.Namespace, source: Path, type: str) -> Path:
    out = source.with_name(f"theirs-pure-{type}.gguf")
    _run([arguments.build / "bin" / "llama-quantize", "--pure", source, out, type, "1"])
    return out


def _their_perplexity(arguments: argparse.Namespace, path: Path) -> float:
    count = arguments.windows + 1  # it can lose the last line it prints
    command = [arguments.build / "bin" / "llama-perplexity", "-m", path, "-f", arguments.text]
    printed = _run([*command, "-c", WINDOW, "-b", WINDOW, "--chunks", count])
    found = re.search(rf"\[{arguments.windows}\]([0-9.]+)", printed)
    if found is None:
        raise SystemExit(f"llama-perplexity printed no result:\n{printed[-2000:]}")
    return float(found[1])


def _run(command: list[object], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
