"""Which cards a run of several ranks touches, locks and refuses."""

from pathlib import Path

import pytest

from camera.checkpoints.safetensors_file import read_tensors
from tests.npu.process import OnNpu
from tests.npu.test_commands import CARDS, TEXT, same
from tests.tiny import tiny_checkpoint


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    model = tiny_checkpoint(tmp_path / "model", "PanguEmbedded")
    (tmp_path / "story.txt").write_text(TEXT)
    calibration = ["--calibration", str(tmp_path / "story.txt"), "--samples", "7", "--length", "48"]
    return ["prune", str(model), *calibration, "--ratio", "0.4"]


def test_two_ranks_compute_on_two_cards_from_the_named_one_on(
    on_npu: OnNpu, words: list[str], tmp_path: Path
) -> None:
    one = on_npu([*words, str(tmp_path / "one"), "--device", "npu:1"], environment=CARDS)
    two = on_npu([*words, str(tmp_path / "two"), "--device", "npu:1", "--nproc", "2"], environment=CARDS)
    assert one.cards == {1}
    assert two.cards == {1, 2}
    computed = [event["card"] for event in two.events if event["event"] == "launch"]
    assert 0.2 < computed.count(2) / len(computed) < 0.8
    same(tmp_path / "two" / "model.safetensors", tmp_path / "one" / "model.safetensors", 0)
    assert read_tensors(tmp_path / "one" / "model.safetensors")


def test_cards_that_are_not_there_are_refused_before_anything_is_opened(
    on_npu: OnNpu, words: list[str], tmp_path: Path
) -> None:
    asked = [*words, str(tmp_path / "out"), "--device", "npu:2", "--nproc", "2"]
    refused = on_npu(asked, environment=CARDS, fails=True)
    assert "up to npu:3, which does not exist: this machine has 3 npu" in refused.errors
    assert refused.cards == set()


def test_what_is_locked_is_what_computes_and_locking_opens_no_card(on_npu: OnNpu) -> None:
    done = on_npu(
        """
        from camera.options import CaptureOptions
        from flows.device_limits import limit_names
        from tasks.options import Sections
        from tasks.stage import Request
        from tasks.stages import capture

        options = Sections(capture=CaptureOptions(device="npu:1", devices=2))
        print(*limit_names(Request("capture", capture.STAGE, options, {}, {"device": "npu"})))
        """,
        environment=CARDS,
    )
    assert [name[-6:] for name in done.output.split()[-2:]] == ["-npu-1", "-npu-2"]
    assert done.cards == set()


def test_each_thread_says_which_card_is_its_own(on_npu: OnNpu) -> None:
    told = """
        from threading import Thread
        import torch
        from camera.devices import resolve_device, use_device
        from camera.layerwise.transfer import Transfer

        device = resolve_device("npu:1")

        def work():
            {first}
            Transfer(device).upload([("x", torch.ones(3), torch.float32)]).take()

        thread = Thread(target=work)
        thread.start()
        thread.join()
        """
    assert on_npu(told.format(first="use_device(device)"), environment=CARDS).cards == {1}
    assert on_npu(told.format(first="pass"), environment=CARDS).cards == {0, 1}, "why `use_device` is needed"
