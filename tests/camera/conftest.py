"""What the tests of `camera` share."""

from tests.fake_npu import npu

__all__ = ["npu"]
