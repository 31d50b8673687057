import os
import sys
import types
from pathlib import Path

import pytest

from camera.ascend.host import facts, parse_smi, settings
from tests.camera.ascend.npu_smi import NARROW, WIDE, install_npu_smi

MIB = 1 << 20


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_cards_and_processes_are_read_from_the_narrow_table() -> None:
    first, second = parse_smi(NARROW)
    assert (first.index, first.name, first.health, first.processes) == (0, "910B2", "OK", ())
    assert (first.used_bytes, first.memory_bytes) == (3382 * MIB, 65536 * MIB)
    assert (second.index, second.health) == (1, "Warning")
    assert [(one.pid, one.name, one.memory_bytes // MIB) for one in second.processes] == [
        (485946, "python3", 58020),
        (485990, "python3", 97),
    ]
    assert second.processes[0].pid_in_container is None


def test_each_chip_of_a_card_is_a_device_and_processes_find_theirs_in_the_wide_table() -> None:
    first, second = parse_smi(WIDE)
    assert (first.index, second.index, first.processes) == (0, 1, ())
    assert (second.processes[0].pid, second.processes[0].pid_in_container) == (632268, 77)


def test_a_card_is_busy_if_others_are_on_it_or_its_memory_is_taken_unseen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle, busy = parse_smi(NARROW)
    assert idle.why_busy() is None
    assert busy.why_busy() == "card 1 is in use by python3 (process 485946), python3 (process 485990)"
    own = parse_smi(WIDE)[1]
    assert own.why_busy() == "card 1 is in use by camera (process 632268)"
    monkeypatch.setattr(os, "getpid", lambda: 77)
    assert own.why_busy() is None
    hidden = busy.model_copy(update={"processes": ()})
    assert str(hidden.why_busy()).startswith(
        "60.0 of 64.0 GiB of card 1 are in use, by a process that cannot be seen"
    )


def test_versions_come_from_the_files_of_driver_firmware_and_cann(tmp_path: Path) -> None:
    ascend = "usr/local/Ascend"
    write(tmp_path, f"{ascend}/driver/version.info", "Version=25.2.0\nascendhal_version=7.35.23\n")
    write(tmp_path, f"{ascend}/firmware/version.info", "Version=7.7.0.6.236\nfirmware_version=1.0\n")
    write(
        tmp_path,
        f"{ascend}/ascend-toolkit/latest/version.cfg",
        "# version: 1.0\nruntime_running_version=[7.6.0.1:8.0.0]\n",
    )
    install_npu_smi(tmp_path / "bin", NARROW)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TASK_QUEUE_ENABLE": "2", "HOME": "/"}
    found = facts(tmp_path, environment)
    assert (found.driver, found.firmware, found.cann) == ("25.2.0", "7.7.0.6.236", "8.0.0")
    assert (found.soc, len(found.cards), found.npu_smi) == ("Ascend910B2", 2, None)
    assert found.environment == {"TASK_QUEUE_ENABLE": "2"}
    # What the environment names comes first, and the package's own file before the others.
    write(
        tmp_path,
        "opt/cann/aarch64-linux/ascend_toolkit_install.info",
        "package_name=T\nversion=9.1.0\ninnerversion=V1\n",
    )
    write(tmp_path, "opt/cann/runtime/version.info", "Version=1.83.T8.0.B128\n")
    assert facts(tmp_path, {**environment, "ASCEND_HOME_PATH": str(tmp_path / "opt/cann")}).cann == "9.1.0"


def test_a_loaded_torch_npu_is_asked_for_the_version_of_cann(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = types.ModuleType("torch_npu.npu.utils")
    loaded.get_cann_version = lambda: "9.0.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_npu.npu.utils", loaded)
    assert facts(tmp_path, {}).cann == "9.0.0"


def test_a_host_without_anything_says_so(tmp_path: Path) -> None:
    found = facts(tmp_path, {"PATH": str(tmp_path)})
    assert (found.cann, found.driver, found.firmware, found.soc, found.cards) == (None, None, None, None, ())
    assert found.npu_smi == "npu-smi is not installed, or not on the PATH"


@pytest.mark.parametrize(
    ("output", "code", "reason"),
    [
        (
            "dcmi module initialize failed. ret is -8005",
            1,
            "npu-smi shows no card: dcmi module initialize failed. ret is -8005",
        ),
        ("", 3, "npu-smi shows no card: it says nothing (exit code 3)"),
        (
            "| 0  910B2 | OK | x |\n| 0 | bus | no numbers |",
            0,
            "npu-smi's table has a form that is not known here: ",
        ),
    ],
)
def test_an_npu_smi_that_shows_nothing_is_quoted(tmp_path: Path, output: str, code: int, reason: str) -> None:
    install_npu_smi(tmp_path, output, code)
    assert str(facts(tmp_path, {"PATH": f"{tmp_path}:{os.environ['PATH']}"}).npu_smi).startswith(reason)


def test_only_the_variables_that_matter_are_kept() -> None:
    given = {"ASCEND_LAUNCH_BLOCKING": "1", "GGML_CANN_ACL_GRAPH": "on", "HF_TOKEN": "secret", "PATH": "/bin"}
    assert settings(given) == {"ASCEND_LAUNCH_BLOCKING": "1", "GGML_CANN_ACL_GRAPH": "on"}


@pytest.mark.parametrize(
    ("chosen", "names"), [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), (" 1 ", [1]), ("7", []), ("", [])]
)
def test_torch_numbers_the_cards_that_the_environment_lets_it_see(
    tmp_path: Path, chosen: str | None, names: list[int]
) -> None:
    install_npu_smi(tmp_path, NARROW)
    variable = {} if chosen is None else {"ASCEND_RT_VISIBLE_DEVICES": chosen}
    found = facts(tmp_path, {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variable})
    assert [card.index for card in found.visible] == names
