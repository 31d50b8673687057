"""What an error on an Ascend host means, and what to do: from its text, as torch_npu, CANN or the loader words it.

Numbers are those of CANN's `acl/error_codes`; what is said of a number was read in reports of users and in torch_npu's own
messages, none of it was seen on a card here.
"""

import re
from dataclasses import dataclass

from camera.versions import installed

SOURCE_CANN = (
    "source CANN's set_env.sh (/usr/local/Ascend/ascend-toolkit/set_env.sh or /usr/local/Ascend/cann/set_env.sh) before "
    "Python starts; on a machine without CANN uninstall torch_npu. TORCH_DEVICE_BACKEND_AUTOLOAD=0 is not enough: "
    "transformers imports torch_npu wherever it is installed"
)
CANN_MODULES = {"attr": "attrs", "decorator": "decorator", "psutil": "psutil", "scipy": "scipy"}
"""Modules that CANN's own Python imports in our environment, and the distributions they come from."""


@dataclass(frozen=True)
class _Cause:
    pattern: str
    """A regular expression for the text of the error."""
    cause: str
    advice: str
    beside: tuple[str, ...] = ()
    """Distributions of which one must be installed, where the text alone may be of another machine's."""

    def explains(self, text: str) -> bool:
        here = not self.beside or any(map(installed, self.beside))
        return here and re.search(self.pattern, text) is not None


def _code(numbers: str) -> str:
    """A pattern for one of CANN's numbers where it stands as one: `error code is 500001`, `runtime result = 507033`."""
    return rf"(?i:error(?: ?code)?(?: is)?|result|ret|failed)\s*[=:]?\s*(?:{numbers})\b"


_CAUSES = (
    _Cause(
        r"libascend_hal\.so\S*: cannot open",
        "the library of the NPU's driver is not found",
        "in a container, mount the host's /usr/local/Ascend/driver; elsewhere install the driver, and put "
        "/usr/local/Ascend/driver/lib64/driver on LD_LIBRARY_PATH if set_env.sh does not",
    ),
    _Cause(
        r"lib(hccl|ascendcl|acl\w*|ge_\w+|graph|opapi\w*|runtime)\.so\S*: cannot open|Failed to load the backend extension: torch_npu",
        "torch_npu is installed and does not find CANN's libraries",
        SOURCE_CANN,
    ),
    _Cause(
        r"No module named 'torch_npu'",
        "torch_npu is not installed",
        "install the extra `npu` on a host that has CANN (docs/ascend.md), or check another device (--device cuda, cpu)",
    ),
    _Cause(
        rf"No module named '({'|'.join(CANN_MODULES)})'|{_code('50001')}",
        "a module that CANN's Python needs is missing in this environment",
        f"pip install {' '.join(CANN_MODULES.values())}",
        beside=("torch-npu",),
    ),
    _Cause(
        _code("500001"),
        "CANN cannot set its compiler up: CANN 8.2 or older with numpy 2, a module that CANN's Python needs, or an "
        "environment of which only a part was set",
        f"source CANN's set_env.sh; pip install {' '.join(CANN_MODULES.values())}; with CANN 8.2 or older "
        "pip install 'numpy<2', or better install CANN 8.5 or newer",
    ),
    _Cause(
        rf"NPU out of memory|\bEL0004\b|{_code('207001')}",
        "the card's memory is full",
        "look at npu-smi info: end what else is on that card, or take another one (--device npu:N); else use fewer "
        "samples or tokens at a time",
    ),
    _Cause(
        rf"\bE39009\b|{_code('507033')}",
        "the card does not start: somebody else has it or its memory, it does not answer, or the container lacks a device",
        "look at npu-smi info for processes and Health; in a container pass /dev/davinciN, /dev/davinci_manager, "
        "/dev/devmm_svm and /dev/hisi_hdc",
    ),
    _Cause(
        r"dcmi module initialize failed",
        "npu-smi may not open the devices",
        "add the user to the group of /dev/davinci* (often HwHiAiUser), or pass the devices to the container",
    ),
    _Cause(
        _code("507014|507017|507046|507048"),
        "an operator did not end within its time, and the device gave it up",
        "start a new process, this one's context is lost; if it comes again, set ASCEND_LAUNCH_BLOCKING=1 to see which "
        "operator it is (and unset it before anything is timed)",
    ),
    _Cause(
        _code("507899|107022"),
        "the context was lost earlier in this process: this error only follows from the first one",
        "look further up for the first error, and start a new process",
    ),
    _Cause(
        _code(r"507\d{3}"),
        "the device threw an exception in an operator, and everything after it in this process fails too",
        "start a new process; set ASCEND_LAUNCH_BLOCKING=1 to see which operator it is (and unset it before anything is "
        "timed), and send CANN's log (~/ascend/log) with the report",
    ),
    _Cause(
        r"0 active drivers|libtriton.*(cannot open|undefined symbol)|module 'triton\.\w+' has no attribute",
        "another triton than triton-ascend is installed, as a CUDA build of torch brings it, also on aarch64",
        "pip uninstall triton triton-ascend, install a CPU build of torch, and then triton-ascend if you need it",
        beside=("torch-npu", "triton-ascend"),
    ),
)


def explain(text: str) -> str | None:
    """The cause and what to do, in one sentence, for an error's text; None if it is none that we know."""
    known = _find(text)
    return f"{known.cause}: {known.advice}" if known else None


def advice(text: str) -> str | None:
    """What to do, for an error's text; None if it is none that we know."""
    known = _find(text)
    return known.advice if known else None


def _find(text: str) -> _Cause | None:
    return next((known for known in _CAUSES if known.explains(text)), None)
