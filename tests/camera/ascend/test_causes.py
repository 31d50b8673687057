import re

import pytest

from camera.ascend.causes import explain

PTA = "NPU function error: {call}, error code is {code}\n[ERROR] (PID:1, Device:0, RankID:-1) ERR00100 PTA call acl api failed"


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("libhccl.so: cannot open shared object file: No such file or directory", "set_env.sh.*not enough"),
        ("Failed to load the backend extension: torch_npu. You can disable", "uninstall torch_npu"),
        ("libascend_hal.so: cannot open shared object file: No such file or directory", "mount the host's"),
        (PTA.format(call="AclSetCompileopt(ACL_PRECISION_MODE)", code=500001), "'numpy<2'"),
        (PTA.format(call="aclnnLinalgVectorNorm", code=50001), "pip install attrs decorator psutil scipy"),
        ("ModuleNotFoundError: No module named 'torch_npu'", "install the extra `npu`"),
        ("ModuleNotFoundError: No module named 'decorator'", "pip install attrs decorator"),
        ("NPU out of memory. Tried to allocate 20.00 MiB (NPU 0; 61.27 GiB total capacity)", "another one"),
        ("alloc device memory failed, runtime result = 207001[FUNC:ReportCallError]", "another one"),
        (PTA.format(call="c10_npu::SetDevice(device_id_)", code=507033), "/dev/davinci_manager"),
        (PTA.format(call="AclrtSynchronizeStreamWithTimeout", code=507048), "within its time"),
        (PTA.format(call="AclrtSynchronizeDeviceWithTimeout", code=507015), "threw an exception"),
        (PTA.format(call="aclrtFree", code=507899), "first error"),
        ("dcmi module initialize failed. ret is -8005", "HwHiAiUser"),
        ("RuntimeError: 0 active drivers ([]). There should only be one.", "triton-ascend"),
    ],
)
def test_an_error_is_explained_with_what_to_do(
    text: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("camera.ascend.causes.installed", {"torch-npu": "2.10.0"}.get)
    assert re.search(advice, explain(text) or "")


@pytest.mark.parametrize("text", ["No module named 'scipy'", "RuntimeError: 0 active drivers ([])."])
def test_what_may_be_of_a_host_without_an_npu_is_not_explained_there(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("camera.ascend.causes.installed", {}.get)
    assert explain(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "token 507904 is outside the vocabulary of 153376",
        "model.safetensors holds 500001 rows, and 507015 are needed",
        "No module named 'lm_eval'",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "libcudart.so.13: cannot open shared object file",
    ],
)
def test_other_errors_are_left_alone(text: str) -> None:
    assert explain(text) is None
