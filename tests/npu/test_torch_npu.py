"""What torch_npu does, as far as the stub shows it: what the rest of the project is written for."""

import json

from tests.npu.process import OnNpu


def test_a_sum_is_computed_on_the_card(on_npu: OnNpu) -> None:
    done = on_npu("""
        import torch
        from tests.npu.process import mark

        x = torch.arange(6.0).reshape(2, 3).npu()
        y = torch.ones(3, 2).npu().t()
        mark("sum")
        print((x + y).tolist())
    """)
    assert done.output.splitlines()[-1] == "[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]"
    assert done.launches("sum") == {"aclnnAdd": 1}
    assert done.cards == {0}


def test_an_operator_without_a_kernel_on_the_device_is_refused(on_npu: OnNpu) -> None:
    done = on_npu("import torch; torch.linalg.eigh(torch.eye(3).npu())", fails=True)
    assert "eigh" in done.errors


def test_operators_compute_what_the_cpu_computes(on_npu: OnNpu) -> None:
    done = on_npu("""
        import json, torch
        from tests.npu.arithmetic import far

        print(json.dumps({str(dtype): far(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}))
    """)
    assert json.loads(done.output.splitlines()[-1]) == {
        "torch.float32": {},
        "torch.float16": {},
        "torch.bfloat16": {},
    }
