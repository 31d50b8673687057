"""A program that speaks llama-perplexity's command line and writes its file of log-probabilities, for tests of who asks for them.

What it writes is prepared: $FAKE_LOGITS/q4_0.logits or q4_0_64.logits, by the type that the model's file holds.
"""

import argparse
import os
import shutil
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    for flag in ("-m", "-f", "-c", "-b", "--chunks", "--kl-divergence-base", "-ngl", "-sm", "-mg"):
        parser.add_argument(flag)
    arguments = parser.parse_args()
    assert (arguments.c, arguments.b, arguments.chunks) == ("32", "1", "1")
    assert len(Path(arguments.f).read_text()) >= 2 * 32
    is_q4_0_64 = b"camera.q4_0_64.layout" in Path(arguments.m).read_bytes()
    prepared = Path(os.environ["FAKE_LOGITS"]) / f"{'q4_0_64' if is_q4_0_64 else 'q4_0'}.logits"
    if not prepared.exists():
        return 1
    shutil.copyfile(prepared, arguments.kl_divergence_base)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
