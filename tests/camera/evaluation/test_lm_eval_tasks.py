"""Documents from files, everything else as lm-eval defines it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.api.task import Task
from lm_eval.tasks._yaml_loader import load_yaml

from camera.errors import CameraError
from camera.evaluation.lm_eval_tasks import _DEFINITIONS, NINE_TASKS, open_task, task_files
from tests.camera.evaluation.conftest import arc_rows, boolq_rows, write_rows

Row = dict[str, Any]
Requests = list[tuple[str, str]]


def _same_context(context: str, answers: list[str]) -> Requests:
    return [(context, f" {answer}") for answer in answers]


def _arc(row: Row) -> Requests:
    return _same_context(f"Question: {row['question']}\nAnswer:", row["choices"]["text"])


def _winogrande(row: Row) -> Requests:
    before, after = row["sentence"].split("_", 1)
    return [(before + row[option], f" {after.strip()}") for option in ("option1", "option2")]


def _hellaswag(row: Row) -> Requests:
    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _same_context(clean(context), [clean(ending) for ending in row["endings"]])


def _mathqa(row: Row) -> Requests:
    answers = re.split(r" ?, (?=[b-e] \) )", row["options"])
    return _same_context(
        f"Question: {row['Problem']}\nAnswer:", [answer[4:].rstrip(" ,") for answer in answers]
    )


PROMPTS: dict[str, Callable[[Row], Requests]] = {
    "boolq": lambda row: _same_context(
        f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"]
    ),
    "openbookqa": lambda row: _same_context(row["question_stem"], row["choices"]["text"]),
    "rte": lambda row: _same_context(
        f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:", ["True", "False"]
    ),
    "arc_easy": _arc,
    "winogrande": _winogrande,
    "hellaswag": _hellaswag,
    "arc_challenge": _arc,
    "piqa": lambda row: _same_context(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]),
    "mathqa": _mathqa,
}
"""The prompts as the tasks are published, written down a second time."""


def requests_of(task: Task, document: int) -> Requests:
    return [instance.args for instance in task.instances if instance.doc_id == document]


def build(task: Task, limit: int) -> None:
    task.build_all_requests(limit=limit, rank=0, world_size=1)


@pytest.mark.parametrize("name", NINE_TASKS)
def test_prompt_and_answers_of_real_rows_are_those_of_the_task(shared_data: Path, name: str) -> None:
    file = task_files(name, shared_data / "tasks")[_DEFINITIONS[name].split]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:25]]
    with open_task(name, shared_data / "tasks") as task:
        build(task, 25)
        for number, row in enumerate(rows):
            assert requests_of(task, number) == PROMPTS[name](row)


@pytest.mark.parametrize("name", NINE_TASKS)
def test_only_the_place_of_the_documents_differs_from_the_installed_definition(
    shared_data: Path, name: str
) -> None:
    installed = load_yaml(Path(lm_eval.tasks.__file__).parent / _DEFINITIONS[name].file, resolve_func=False)
    with open_task(name, shared_data / "tasks") as task:
        config = task.dump_config()
    ours = (
        "dataset_path",
        "dataset_name",
        "dataset_kwargs",
        "training_split",
        "validation_split",
        "test_split",
    )
    for field, value in installed.items():
        if field in (*ours, "tag", "include", "task", "metadata"):
            continue
        functions = (isinstance(value, str) and ".doc_to_" in value) or field == "process_docs"
        assert functions or config[field] == value, field
    assert config["metadata"]["version"] == installed["metadata"]["version"]
    measured = "test_split" if installed.get("test_split") else "validation_split"
    assert config[measured] == installed[measured] == _DEFINITIONS[name].split


def shots(context: str) -> list[str]:
    """The questions that a prompt shows, the one that is asked last."""
    return re.findall(r"Question: (.*)\n", context)


def test_examples_come_from_the_training_split_if_there_is_one(tmp_path: Path) -> None:
    write_rows(tmp_path / "arc_easy.test.jsonl", arc_rows(4))
    training = [{**row, "question": f"Training: {row['question']}"} for row in arc_rows(9)]
    write_rows(tmp_path / "arc_easy.train.jsonl", training)
    with open_task("arc_easy", tmp_path, few_shot=3) as task:
        build(task, 4)
        for number in range(4):
            *examples, asked = shots(requests_of(task, number)[0][0])
            assert len(examples) == 3
            assert all(example.startswith("Training: ") for example in examples)
            assert asked == arc_rows(4)[number]["question"]


@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [("arc_easy", "arc_easy.test.jsonl", arc_rows), ("boolq", "boolq.validation.jsonl", boolq_rows)],
)
def test_a_question_is_never_its_own_example(
    tmp_path: Path, name: str, file: str, rows: Callable[[int], list[Row]]
) -> None:
    write_rows(tmp_path / file, rows(6))
    with open_task(name, tmp_path, few_shot=4) as task:
        build(task, 6)
        for number in range(6):
            *examples, asked = shots(requests_of(task, number)[0][0])
            assert len(examples) == 4
            assert asked not in examples


def test_examples_are_the_same_each_time(task_folder: Path) -> None:
    found = []
    for _ in range(2):
        with open_task("arc_easy", task_folder, few_shot=2) as task:
            build(task, 3)
            found.append([instance.args for instance in task.instances])
    assert found[0] == found[1]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"piqa\.validation\.jsonl is missing: .* its validation split"):
        task_files("piqa", tmp_path)


def test_a_task_that_is_not_read_from_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"task gsm8k cannot be read from files, only boolq, .*mathqa can"):
        task_files("gsm8k", tmp_path)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "arc_easy.test.jsonl").write_text("no json\n")
    with (
        pytest.raises(CameraError, match="task arc_easy cannot be read from"),
        open_task("arc_easy", tmp_path),
    ):
        pass


def test_rows_of_another_task_are_refused_with_the_field_they_lack(tmp_path: Path) -> None:
    write_rows(tmp_path / "arc_easy.test.jsonl", boolq_rows(3))
    with pytest.raises(CameraError, match="'choices' is undefined"), open_task("arc_easy", tmp_path):
        pass


def test_nothing_is_left_in_the_cache_of_the_hub(
    task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with open_task("boolq", task_folder):
        pass
    assert not (tmp_path / "cache").exists()
