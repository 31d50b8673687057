"""A program that speaks llama-bench's command line and JSON, for tests of what stands around the real one.

Its answers follow from its arguments: a prompt token takes 1 ms, a decoded one 2 ms. $FAKE_LLAMA_BENCH may be
`hang`, `fail`, `crash` or `garbage`. As a stock build it does not load Q4_0_64, unless $FAKE_LLAMA_LOADS is set; its backends are
$FAKE_LLAMA_BACKENDS, on the cards of $FAKE_LLAMA_CARDS, and it logs $FAKE_LLAMA_LOG if it is asked to.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    for flag in ("-m", "-p", "-n", "-r", "-o", "-t", "-ngl", "-sm", "-mg"):
        parser.add_argument(flag)
    parser.add_argument("-v", action="store_true")
    arguments = parser.parse_args()
    with Path(os.environ["FAKE_LLAMA_BENCH_LOG"]).open("a") as log:
        log.write(json.dumps(vars(arguments)) + "\n")
    behaviour = os.environ.get("FAKE_LLAMA_BENCH", "")
    if behaviour == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(os.environ["FAKE_LLAMA_BENCH_LOG"]).write_text(str(child.pid))
        time.sleep(600)
    if behaviour == "fail":
        sys.stderr.write("loading\nerror: failed to load model\n")
        return 1
    if behaviour == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "garbage":
        sys.stdout.write("| model | size |\n")
        return 0
    if not os.environ.get("FAKE_LLAMA_LOADS") and b"camera.q4_0_64.layout" in Path(arguments.m).read_bytes():
        sys.stderr.write("error: tensor 'blk.0.attn_norm.weight' has offset 43520, expected 46080\n")
        return 1
    if arguments.v:
        sys.stderr.write(os.environ.get("FAKE_LLAMA_LOG", "") + "\n")
    tests = [(int(arguments.p), 0), *((0, int(n)) for n in arguments.n.split(","))]
    common = {
        "build_commit": "abc1234",
        "build_number": 9999,
        "backends": os.environ.get("FAKE_LLAMA_BACKENDS", "CPU"),
        "gpu_info": os.environ.get("FAKE_LLAMA_CARDS", ""),
        "n_threads": int(arguments.t or 2),
    }
    sys.stdout.write(
        json.dumps(
            [
                {
                    **common,
                    "model_filename": arguments.m,
                    "n_prompt": prompt,
                    "n_gen": generated,
                    "n_depth": 0,
                    "avg_ns": (prompt * 1 + generated * 2) * 1_000_000,
                    "samples_ns": [(prompt * 1 + generated * 2) * 1_000_000] * int(arguments.r),
                }
                for prompt, generated in tests
            ]
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
