"""Write the built-in dataset of the running Python to files, so that another Python can read the same texts.

    python scripts/snapshot_stdlib.py --out data/text

Writes `stdlib-train.jsonl` and `stdlib-test.jsonl`, a document a line. Read them with `name: file`.
"""

import argparse
import json
from pathlib import Path

from camera.data.sets import stdlib
from camera.files import atomic_file


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the two files to")
    out: Path = parser.parse_args().out
    for split in ("train", "test"):
        documents = stdlib.read(split)
        file = out / f"stdlib-{split}.jsonl"
        with atomic_file(file) as temporary:
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents.texts)
            temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{file}: {len(documents.texts)} documents, {documents.source}")


if __name__ == "__main__":
    main()
