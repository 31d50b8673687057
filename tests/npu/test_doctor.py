"""What `camera doctor`, results and errors say of an NPU: the real torch_npu on the stub."""

import json
import os
from pathlib import Path
from typing import Any

from tests.camera.ascend.npu_smi import NARROW, install_npu_smi
from tests.npu.process import OnNpu

PAIRED_BY_NO_CANN = "2.13."


def with_npu_smi(folder: Path) -> dict[str, str]:
    install_npu_smi(folder, NARROW)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "80"}


def test_doctor_tells_versions_cards_formats_and_graphs_in_80_columns(on_npu: OnNpu, tmp_path: Path) -> None:
    done = on_npu(["doctor"], environment={**with_npu_smi(tmp_path), "ASCEND_LAUNCH_BLOCKING": "1"})
    lines = done.output[done.output.index("devices ") :].splitlines()
    assert max(map(len, lines)) <= 80
    told = " ".join(" ".join(lines).split())
    assert "npu Ascend910B1, 64.0 GiB" in told
    assert "npu:0 910B2, 3.3 GiB of 64.0 GiB in use, health OK" in told
    assert "card 1 is in use by python3 (process 485946)" in told
    assert "tiled weights (allow_internal_format) are off" in told
    assert "NPUGraph is there" in told
    assert "unset ASCEND_LAUNCH_BLOCKING" in told
    assert done.cards == {0}


def test_doctor_judges_the_versions_in_json(on_npu: OnNpu) -> None:
    def pairing(cann: str) -> dict[str, Any]:
        done = on_npu(["doctor", "--json"], environment={"STUB_CANN": cann})
        findings = json.loads(done.output[done.output.index("[\n") :])
        return next(finding for finding in findings if finding["name"] == "pairing")

    newest, old = pairing("9.1.0"), pairing("8.2.RC1")
    assert newest["detail"].endswith("CANN 9.1.0")
    assert old["detail"].endswith("CANN 8.2.RC1")
    if f"torch_npu {PAIRED_BY_NO_CANN}" in newest["detail"]:
        assert newest["status"] == "warn"
        assert "is in no row of the vendor's table" in newest["advice"]
    else:
        assert newest["status"] == "ok"
    assert old["status"] == "warn"


def test_facts_open_no_card_and_a_result_holds_them(on_npu: OnNpu) -> None:
    facts = on_npu("""
        import torch
        from camera.ascend.host import facts
        print(facts().model_dump_json())
    """)
    told = json.loads(facts.output.splitlines()[-1])
    assert facts.cards == set()
    assert (told["soc"], told["cann"]) == ("Ascend910B1", "9.1.0")
    assert (told["internal_formats"], told["graphs"]) == (False, True)
    described = on_npu("""
        import json
        from camera.devices import describe_device, resolve_device
        device = resolve_device("npu")
        import torch
        torch.npu.config.allow_internal_format = True
        print(json.dumps(describe_device(device)["ascend"]))
    """)
    result = json.loads(described.output.splitlines()[-1])
    assert result == {**{name: told[name] for name in result}, "internal_formats": True}


def test_doctor_works_where_torch_npu_takes_torch_down(on_npu: OnNpu) -> None:
    done = on_npu(["doctor"], environment={"LD_LIBRARY_PATH": "", "COLUMNS": "80"}, fails=True)
    told = " ".join(done.output.split())
    assert done.returncode == 1
    assert "cannot be imported: libhccl.so: cannot open shared object file" in told
    assert "source CANN's set_env.sh" in told


def test_a_full_card_is_explained_below_what_torch_npu_says(on_npu: OnNpu) -> None:
    done = on_npu(
        """
        import torch
        from camera.ascend.causes import explain
        try:
            torch.empty(1 << 30, device="npu")
        except RuntimeError as error:
            print(explain(str(error)))
        """,
        environment={"STUB_MEMORY": str(1 << 30)},
    )
    assert done.output.splitlines()[-1].startswith("the card's memory is full: look at npu-smi info")
