import re

import pytest

from camera.ascend.pairing import why_unpaired


@pytest.mark.parametrize(
    ("torch", "torch_npu", "cann"),
    [
        ("2.10.0+cpu", "2.10.0.post4", "9.1.0"),
        ("2.12.1", "2.12.1", "9.1.0-beta.1"),
        ("2.7.1", "2.7.1.post2", "9.0.0"),
        ("2.9.0", "2.9.0", "8.5.0.alpha002"),
        ("2.7.1", "2.7.1", "8.3.RC1"),
        ("2.10.0", "2.10.0", None),
        ("2.13.0", None, "9.1.0"),
    ],
)
def test_versions_of_one_row_belong_together(torch: str, torch_npu: str | None, cann: str | None) -> None:
    assert why_unpaired(torch, torch_npu, cann) is None


@pytest.mark.parametrize(
    ("torch", "torch_npu", "cann", "reason"),
    [
        ("2.13.0", "2.13.0", "9.1.0", "torch 2.13.0 is in no row"),
        (
            "2.10.0",
            "2.10.0",
            "9.0.0",
            "CANN 9.0.0 is paired with torch .*, not with 2.10.0, which belongs to CANN 9.1",
        ),
        ("2.7.0", "2.7.0", "9.1.0", "not with 2.7.0"),
        (
            "2.11.0",
            "2.10.0.post4",
            "9.1.0",
            "torch_npu 2.10.0.post4 needs torch 2.10.0, and 2.11.0 is installed",
        ),
        ("2.9.1", "2.9.0", "9.1.0", "install torch-npu==2.9.1"),
        ("2.9.0", "2.9.0", "9.2.0", "CANN 9.2.0 is in no row .*9.1 or 9.0 or 8.5"),
        ("2.6.0", "2.6.0", "8.2.RC1", "CANN 8.2.RC1 is in no row"),
    ],
)
def test_other_versions_are_named_with_what_to_install(
    torch: str, torch_npu: str, cann: str, reason: str
) -> None:
    assert re.search(reason, why_unpaired(torch, torch_npu, cann) or "")
