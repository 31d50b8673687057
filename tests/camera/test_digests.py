import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camera.digests import canonical_json, digest_file, digest_files, digest_folder, digest_json, files_below

_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aβ系"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abβ"), inner),
    max_leaves=10,
)


def test_the_canonical_text_has_sorted_keys_no_spaces_and_readable_letters() -> None:
    assert (
        canonical_json({"b": [1, 2.5, None], "a": "系统", "A": True})
        == '{"A":true,"a":"系统","b":[1,2.5,null]}'
    )


@given(value=st.dictionaries(st.text("abβ"), _json))
def test_the_order_of_keys_does_not_matter(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert digest_json(turned) == digest_json(value)


@given(left=_json, right=_json)
def test_equal_digests_mean_equal_texts(left: object, right: object) -> None:
    assert (digest_json(left) == digest_json(right)) == (canonical_json(left) == canonical_json(right))


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": -float("inf")}])
def test_numbers_that_json_lacks_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", Path("path"), object()])
def test_values_that_are_no_json_are_refused(value: object) -> None:
    with pytest.raises(TypeError):
        digest_json(value)


@pytest.mark.parametrize("size", [0, 1, (8 << 20) - 1, 8 << 20, (8 << 20) + 1])
def test_a_file_is_digested_by_its_bytes_across_chunks(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "x").write_bytes(data)
    assert digest_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def make_tree(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "b").write_bytes(b"one")
    (folder / "sub" / "a").write_bytes(b"two")
    (folder / ".hidden").write_bytes(b"three")
    return folder


def test_files_below_are_named_relative_and_sorted(tmp_path: Path) -> None:
    assert files_below(make_tree(tmp_path / "t")) == [".hidden", "b", "sub/a"]


def test_files_are_digested_by_name_in_sorted_order(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "t")
    assert list(digest_files(tree, ["sub/a", "b"]).items()) == [
        ("b", hashlib.sha256(b"one").hexdigest()),
        ("sub/a", hashlib.sha256(b"two").hexdigest()),
    ]


def test_equal_folders_have_equal_digests_wherever_they_lie(tmp_path: Path) -> None:
    first, second = make_tree(tmp_path / "t"), make_tree(tmp_path / "elsewhere" / "u")
    os.utime(second / "b", (0, 0))
    assert digest_folder(first) == digest_folder(second)


def test_a_changed_a_renamed_and_an_added_file_change_the_digest(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "t")
    digests = [digest_folder(tree)]
    (tree / "b").write_bytes(b"One")
    digests.append(digest_folder(tree))
    (tree / "b").rename(tree / "c")
    digests.append(digest_folder(tree))
    (tree / "empty").write_bytes(b"")
    digests.append(digest_folder(tree))
    assert len(set(digests)) == 4


def test_the_digest_of_a_folder_never_changes_between_versions(tmp_path: Path) -> None:
    # Artifact keys are made of it: another value would orphan every store.
    expected = hashlib.sha256(
        b'{".hidden":"8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f",'
        b'"b":"7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed",'
        b'"sub/a":"3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"}'
    ).hexdigest()
    assert digest_folder(make_tree(tmp_path / "t")) == expected
