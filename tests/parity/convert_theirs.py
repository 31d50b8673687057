"""A program that converts checkpoints with llama.cpp's own converter, all in one process: JSON in on standard input.

In: `{"source": path of llama.cpp, "jobs": [{"model": path, "type": "f16", "out": path, "pre": name or null}, ...]}`. The
converter knows a tokenizer by the digest of what it makes of a text, so a tiny one has to be told its rule's name: `pre`.
Out: for each job null, or why the converter gave up.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path


def main() -> None:
    asked = json.load(sys.stdin)
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    source = Path(asked["source"])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel  # type: ignore[import-not-found]
    from conversion.hunyuan import HunYuanMoEModel  # type: ignore[import-not-found]

    HunYuanMoEModel.set_vocab = TextModel._set_vocab_gpt2  # its own needs the published tiktoken file
    by_digest = TextModel.get_vocab_base_pre
    converter = runpy.run_path(str(source / "convert_hf_to_gguf.py"))
    outcomes = []
    for job in asked["jobs"]:
        TextModel.get_vocab_base_pre = by_digest if job["pre"] is None else lambda *_, name=job["pre"]: name
        sys.argv = ["convert", job["model"], "--outtype", job["type"], "--outfile", job["out"]]
        try:
            converter["main"]()
            outcomes.append(None)
        except (Exception, SystemExit):  # whatever their code raises is what the test shows
            outcomes.append(traceback.format_exc(limit=-2))
    json.dump(outcomes, output)


if __name__ == "__main__":
    main()
