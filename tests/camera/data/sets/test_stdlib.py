"""The built-in dataset: doc strings of the standard library."""

import hashlib
import inspect
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from camera.data.sets import Documents, stdlib


@pytest.fixture(scope="module")
def train() -> Documents:
    return stdlib.read("train")


@pytest.fixture(scope="module")
def test() -> Documents:
    return stdlib.read("test")


def test_no_text_of_the_test_part_occurs_in_the_train_part(train: Documents, test: Documents) -> None:
    assert not set(train.texts) & set(test.texts)


def test_no_text_occurs_twice(train: Documents, test: Documents) -> None:
    assert len(set(train.texts)) == len(train.texts)
    assert len(set(test.texts)) == len(test.texts)


def test_about_15_percent_of_the_files_are_held_out() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    parts = [stdlib.part_of(file.relative_to(root).as_posix()) for file in stdlib.source_files(root)]
    assert 0.10 < parts.count("test") / len(parts) < 0.20


def test_the_text_is_enough_for_128_windows_of_2048_tokens_and_a_test(
    train: Documents, test: Documents
) -> None:
    assert len(train.joined) > 128 * 2048 * 4
    assert len(test.joined) > 100_000


def test_doc_strings_that_python_itself_shows_are_in_it(train: Documents, test: Documents) -> None:
    everything = {*train.texts, *test.texts}
    assert inspect.cleandoc(textwrap.__doc__ or "") in everything
    assert inspect.getdoc(textwrap.dedent) in everything


def test_another_process_reads_the_same_texts_in_the_same_order(train: Documents) -> None:
    code = (
        "import hashlib; from camera.data.sets import stdlib; "
        "print(hashlib.sha256(stdlib.read('train').joined.encode()).hexdigest())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == hashlib.sha256(train.joined.encode()).hexdigest()


def test_the_source_names_python_and_the_part(train: Documents) -> None:
    assert f"{sys.version_info.major}.{sys.version_info.minor}." in train.source
    assert "train" in train.source


def test_tests_and_installed_packages_are_not_read(tmp_path: Path) -> None:
    for name in ("json/tool.py", "test/test_json.py", "site-packages/x.py", "json/__pycache__/y.py", "a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [file.relative_to(tmp_path).as_posix() for file in stdlib.source_files(tmp_path)]
    assert names == ["a.py", "json/tool.py"]


def test_doc_strings_come_cleaned_and_in_the_order_of_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""Module."""\n'
        "def outer():\n"
        '    """Outer.\n\n        indented\n    not\n    """\n'
        "    def inner():\n"
        '        """Inner."""\n'
        "class Last:\n"
        '    """   """\n'
        "    async def method(self):\n"
        '        "Method."\n'
    )
    assert list(stdlib.docstrings(file)) == ["Module.", "Outer.\n\n    indented\nnot", "Inner.", "Method."]


def test_a_file_that_does_not_parse_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text('"""Text."""\ndef (:\n')
    assert list(stdlib.docstrings(tmp_path / "broken.py")) == []
