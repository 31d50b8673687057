"""A few rows of tasks, with the fields that their data sets have."""

import json
from pathlib import Path
from typing import Any

import pytest

_SUBJECTS = ("lighthouse", "harbour", "storm", "keeper", "signal", "lamp", "boat", "tower", "gull", "rock")


def arc_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": str(number),
            "question": f"Which of these is number {number}, the {_SUBJECTS[number % 10]}?",
            "choices": {
                "text": [f"the {_SUBJECTS[(number * step + number // 10) % 10]}" for step in (1, 3, 7, 9)],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "ABCD"[number % 4],
        }
        for number in range(count)
    ]


def boolq_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"is the {_SUBJECTS[number % 10]} number {number}",
            "passage": f"The {_SUBJECTS[number % 10]} was seen in the evening. It was old."
            * (1 + number % 3),
            "label": number % 2,
        }
        for number in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of two tasks, one that measures on its test split and one on its validation split."""
    folder = tmp_path_factory.mktemp("tasks")
    write_rows(folder / "arc_easy.test.jsonl", arc_rows(12))
    write_rows(folder / "boolq.validation.jsonl", boolq_rows(10))
    return folder
