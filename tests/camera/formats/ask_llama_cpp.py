"""A program that asks the llama.cpp of the extra `llama` questions: JSON in on standard input, JSON out.

In: `{"model": path, "context": positions, "questions": [[route, body], ...]}`; the routes are those of llama.cpp's
server, which listens on loopback while this program runs. Out: the answers. Keys and values are kept in float32.
"""

import json
import os
import secrets
import sys
import urllib.request

import xllamacpp


def main() -> None:
    asked = json.load(sys.stdin)
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.n_ctx = asked["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.offline = True
    params.hostnames = ["127.0.0.1"]
    key = secrets.token_hex()
    params.api_keys = [key]
    params.verbosity = 1
    server = xllamacpp.Server(params)
    answers = []
    for route, body in asked["questions"]:
        request = urllib.request.Request(
            server.listening_address + route,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        with urllib.request.urlopen(request) as response:
            answers.append(json.load(response))
    json.dump(answers, output)
    output.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
