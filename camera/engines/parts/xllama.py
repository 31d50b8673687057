"""llama-bench's command line and JSON, answered by the llama.cpp in the wheel `xllamacpp`.

    python -P camera/engines/parts/xllama.py -m model.gguf -p 4 -n 256,512 -r 1 -o json -t 2 -ngl 0

A program of its own, so that what crashes or hangs in llama.cpp does so in another process; it imports nothing of this
project. It uses the wheel's documented interface: `CommonParams`, `Server.handle_completions`, and the
`timings` that every completion carries. The server also listens; it is bound to loopback, and asks for a key that
is given to nobody.

Unlike llama-bench it decodes after a prompt and not from an empty context, and picks each token by its logit.
"""

import argparse
import json
import os
import secrets
import sys
from typing import Any


class _Refused(Exception):
    """What llama.cpp said instead of a completion."""


def main() -> int:
    """Run the command; what is wrong is on standard error, and the exit code is 1."""
    arguments = _arguments()
    # Whatever C code writes to standard output goes to standard error: the JSON stays whole.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        import xllamacpp

        tests = _measure(xllamacpp, arguments)
    except (ImportError, RuntimeError, _Refused) as error:  # RuntimeError: the model does not load
        sys.stderr.write(f"{error}\n")
        return 1
    json.dump(tests, output)
    output.flush()
    os._exit(0)  # the result is out: nothing that llama.cpp does while it shuts down can spoil it


def _measure(xllamacpp: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    lengths = [int(length) for length in arguments.n.split(",")]
    prompt = arguments.p
    # A token less than the prompt, so that prompt, decoded tokens and the one picked last need no more
    # positions than the prompt and the decoded tokens.
    depth = max(1, prompt - 1)
    server = _server(xllamacpp, arguments, context=max(prompt, depth + max(lengths) + 1))
    _complete(server, prompt, 1)  # warms up both kinds of pass
    samples: dict[tuple[int, int], list[int]] = {}
    for _ in range(arguments.r):
        samples.setdefault((prompt, 0), []).append(_complete(server, prompt, 0)[0])
        for length in lengths:
            samples.setdefault((0, length), []).append(_complete(server, depth, length)[1])
    build = _build(xllamacpp, arguments)
    return [
        {
            **build,
            "model_filename": arguments.m,
            "n_prompt": prefilled,
            "n_gen": decoded,
            "n_depth": depth if decoded else 0,
            "avg_ns": sum(nanoseconds) // len(nanoseconds),
            "samples_ns": nanoseconds,
        }
        for (prefilled, decoded), nanoseconds in samples.items()
    ]


def _server(xllamacpp: Any, arguments: argparse.Namespace, context: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = arguments.m
    params.n_ctx = context
    params.n_parallel = 1
    params.fit_params = False  # what does not fit fails, instead of running with fewer layers or positions
    params.cache_ram_mib = 0
    params.offline = True
    params.ui = False
    params.hostnames = ["127.0.0.1"]
    params.api_keys = [secrets.token_hex()]
    params.verbosity = 3 if arguments.v else 1  # information, or errors alone
    params.main_gpu = arguments.mg
    if arguments.sm == "none":
        params.split_mode = xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_NONE
    if arguments.t is not None:
        params.cpuparams.n_threads = arguments.t
        params.cpuparams_batch.n_threads = arguments.t
    if arguments.ngl is not None:
        params.n_gpu_layers = arguments.ngl
    return xllamacpp.Server(params)


def _complete(server: Any, prompt: int, decode: int) -> tuple[int, int]:
    """Nanoseconds of prefilling `prompt` tokens and of decoding `decode` more.

    The first token picked belongs to the prefill, so one more is asked for than is decoded.
    """
    answer = server.handle_completions(
        {
            "prompt": [number % 32 for number in range(1, prompt + 1)],
            "max_tokens": decode + 1,
            "ignore_eos": True,
            "cache_prompt": False,
            "samplers": ["top_k"],
            "top_k": 1,
        }
    )
    if "error" in answer:
        raise _Refused(answer["error"].get("message", str(answer["error"])))
    timings = answer["timings"]
    if (timings["prompt_n"], timings["predicted_n"]) != (prompt, decode + 1):
        raise _Refused(
            f"asked for {prompt} + {decode + 1} tokens, it computed {timings['prompt_n']} + {timings['predicted_n']}"
        )
    return round(timings["prompt_ms"] * 1e6), round(timings["predicted_ms"] * 1e6)


def _build(xllamacpp: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    devices = xllamacpp.get_device_info()
    build = {
        # The wheel's build does not know the commit; the last part of its version is llama.cpp's build number.
        "build_commit": f"xllamacpp {xllamacpp.__version__}",
        "build_number": int(xllamacpp.__version__.rpartition(".")[2]),
        "backends": ",".join(dict.fromkeys(device["name"] for device in devices)),
        "cpu_info": next((device["description"] for device in devices if device["name"] == "CPU"), ""),
        "system_info": xllamacpp.get_system_info().strip(" |"),
    }
    named = {"n_threads": arguments.t, "n_gpu_layers": arguments.ngl}
    return build | {key: value for key, value in named.items() if value is not None}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", required=True, metavar="FILE", help="a GGUF file")
    parser.add_argument("-p", type=int, default=512, help="prompt tokens")
    parser.add_argument("-n", default="128", help="tokens to decode; several with commas between")
    parser.add_argument("-r", type=int, default=5, help="repetitions")
    parser.add_argument("-o", default="json", choices=("json",), help="form of the output")
    parser.add_argument("-t", type=int, help="CPU threads")
    parser.add_argument("-ngl", type=int, help="layers on an accelerator")
    parser.add_argument("-sm", choices=("none",), help="keep a model on one accelerator")
    parser.add_argument("-mg", type=int, default=0, help="which one")
    parser.add_argument("-v", action="store_true", help="log more")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
