"""What is installed on an Ascend host and who uses its cards, from files, the environment and `npu-smi info`."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from camera.ascend.pairing import why_unpaired
from camera.results import Result
from camera.versions import installed

_SMI = ("npu-smi", "info")
_SMI_SECONDS = 30
_MATTER = (
    *(
        "ASCEND_",
        "GGML_CANN_",
        "HCCL_",
        "PYTORCH_NPU_",
        "TORCH_NPU_",
        "CPU_AFFINITY_CONF",
        "TASK_QUEUE_ENABLE",
    ),
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)
HELPFUL = {
    "TASK_QUEUE_ENABLE": "2",
    "CPU_AFFINITY_CONF": "2",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
}
"""Variables that torch_npu's users set for speed and memory. What they bring here was not measured."""
_IDLE_SHARE = 1 / 8
"""Share of a card's memory that the driver itself may take: idle cards of 32 and 64 GiB show up to 3.4 GiB in use."""


class CardProcess(Result):
    """A process that has a card open."""

    pid: int
    """As the host numbers it."""
    name: str
    memory_bytes: int
    pid_in_container: int | None = None
    """As its container numbers it, where npu-smi says so."""


class Card(Result):
    """One chip, which torch calls one device."""

    index: int
    """Its place in npu-smi's list; which is `npu:N`, `HostFacts.visible` says."""
    npu: int
    """npu-smi's number of the card it is on."""
    name: str
    health: str
    """`OK`, or what npu-smi says."""
    memory_bytes: int
    used_bytes: int
    processes: tuple[CardProcess, ...] = ()
    """Those that npu-smi shows: in a container it hides those of others."""

    def why_busy(self) -> str | None:
        """None if nobody else seems to use this card, else who or what does."""
        others = [one for one in self.processes if os.getpid() not in (one.pid, one.pid_in_container)]
        if others:
            named = ", ".join(f"{one.name} (process {one.pid})" for one in others)
            return f"card {self.index} is in use by {named}"
        if not self.processes and self.used_bytes > _IDLE_SHARE * self.memory_bytes:
            return (
                f"{self.used_bytes / 2**30:.1f} of {self.memory_bytes / 2**30:.1f} GiB of card {self.index} are in use, "
                "by a process that cannot be seen from here"
            )
        return None


class HostFacts(Result):
    """What a result of an NPU depends on. A version that is not found is None."""

    architecture: str
    """`aarch64` or `x86_64`."""
    soc: str | None
    """As torch and CANN name it: `Ascend910B1`."""
    cann: str | None
    driver: str | None
    firmware: str | None
    torch: str | None
    torch_npu: str | None
    unpaired: str | None
    """Why the versions do not belong together; None if they do, or if nothing is known against it."""
    environment: dict[str, str]
    """The variables that change what the NPU does or how fast."""
    cards: tuple[Card, ...]
    npu_smi: str | None
    """Why npu-smi showed no cards; None if it did."""
    internal_formats: bool | None
    """Whether torch_npu lays weights out in tiles (FRACTAL_NZ) when asked to; None while it is not loaded."""
    graphs: bool | None
    """Whether this torch_npu has NPUGraph; None while it is not loaded."""

    @property
    def visible(self) -> tuple[Card, ...]:
        """The cards that torch calls `npu:0`, `npu:1` and so on: those that ASCEND_RT_VISIBLE_DEVICES names, or all."""
        if (chosen := self.environment.get("ASCEND_RT_VISIBLE_DEVICES")) is None:
            return self.cards
        by_index = {str(card.index): card for card in self.cards}
        return tuple(by_index[number] for each in chosen.split(",") if (number := each.strip()) in by_index)

    @property
    def present(self) -> bool:
        """Whether anything of an Ascend host is here."""
        return any((self.torch_npu, self.cann, self.driver, self.cards))


def facts(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> HostFacts:
    """Look at this host. Neither imports torch_npu nor opens a device; a loaded torch_npu is asked for CANN's version.

    Args:
        root: where the host's file system begins.
        environment: the variables; the default is those of this process.
    """
    environment = os.environ if environment is None else environment
    ascend = root / "usr/local/Ascend"
    cards, failure = _cards(environment)
    torch, torch_npu, cann = installed("torch"), installed("torch-npu"), _cann(ascend, environment)
    return HostFacts(
        architecture=platform.machine(),
        soc=_soc(cards),
        cann=cann,
        driver=_version(ascend / "driver/version.info"),
        firmware=_version(ascend / "firmware/version.info"),
        torch=torch,
        torch_npu=torch_npu,
        unpaired=None if torch is None else why_unpaired(torch, torch_npu, cann),
        environment=settings(environment),
        cards=cards,
        npu_smi=failure,
        internal_formats=_internal_formats(),
        graphs=hasattr(npu, "NPUGraph") if (npu := sys.modules.get("torch_npu.npu")) else None,
    )


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what an NPU does or how fast, by name."""
    return {name: environment[name] for name in sorted(environment) if name.startswith(_MATTER)}


def parse_smi(text: str) -> tuple[Card, ...]:
    """The cards and their processes in what `npu-smi info` prints.

    A chip is two lines, of the first of which the left column is `NPU Name` and of the second `Chip` or `Chip Phy-ID`;
    the table of processes below names both numbers. Versions differ in widths, and newer ones add the process's number in
    its container.
    """
    chips: dict[tuple[int, int], Card] = {}
    processes: dict[tuple[int, int], list[CardProcess]] = {}
    first: tuple[int, str, str] | None = None
    in_processes = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        in_processes = in_processes or "Process id" in line
        numbers = cells[0].split()
        if len(cells) < 3 or not numbers or not numbers[0].isdecimal():
            continue
        if in_processes:
            # NPU and chip, process, name, MB
            chip = (int(numbers[0]), int(numbers[1]))
            inside = int(cells[4]) if len(cells) > 4 and cells[4].isdecimal() else None
            processes.setdefault(chip, []).append(
                CardProcess(
                    pid=int(cells[1]),
                    name=cells[2],
                    memory_bytes=int(cells[3]) << 20,
                    pid_in_container=inside,
                )
            )
        elif first is None:
            first = int(numbers[0]), numbers[1], cells[1]
        else:
            (npu, name, health), first = first, None
            # Used and all, of the memory and of the HBM: a card has one of them.
            pairs = [(int(used), int(all_)) for used, all_ in re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])]
            used, memory = max(pairs, key=lambda pair: pair[1])
            chips[npu, int(numbers[0])] = Card(
                index=len(chips),
                npu=npu,
                name=name,
                health=health,
                memory_bytes=memory << 20,
                used_bytes=used << 20,
            )
    return tuple(
        card.model_copy(update={"processes": tuple(processes.get(chip, ()))}) for chip, card in chips.items()
    )


def _cards(environment: Mapping[str, str]) -> tuple[tuple[Card, ...], str | None]:
    """The cards that npu-smi shows, or why it shows none."""
    try:
        done = subprocess.run(
            _SMI, capture_output=True, text=True, timeout=_SMI_SECONDS, env=dict(environment), check=False
        )
    except FileNotFoundError:
        return (), "npu-smi is not installed, or not on the PATH"
    except (OSError, subprocess.SubprocessError) as error:
        return (), f"npu-smi cannot be run: {error}"
    try:
        cards = parse_smi(done.stdout)
    except (ValueError, IndexError) as error:
        return (), f"npu-smi's table has a form that is not known here: {error}"
    if not cards:
        told = " ".join((done.stdout + done.stderr).split())[:300]
        return (), f"npu-smi shows no card: {told or f'it says nothing (exit code {done.returncode})'}"
    return cards, None


def _soc(cards: tuple[Card, ...]) -> str | None:
    """The kind of chip, as a loaded torch_npu says, else as npu-smi does, which leaves `Ascend` out of some names."""
    if (npu := sys.modules.get("torch_npu.npu")) is not None:
        with suppress(RuntimeError):  # a driver that does not answer is npu-smi's to tell
            if npu.is_available():
                return str(npu.get_device_name(0))
    return f"Ascend{cards[0].name.removeprefix('Ascend')}" if cards else None


def _internal_formats() -> bool | None:
    native = sys.modules.get("torch_npu._C")
    return None if native is None else bytes(native._npu_getOption("ALLOW_INTERNAL_FORMAT")) == b"enable"


def _cann(ascend: Path, environment: Mapping[str, str]) -> str | None:
    """CANN's version: as a loaded torch_npu says, else of the files where it is installed."""
    if (utilities := sys.modules.get("torch_npu.npu.utils")) is not None:
        with suppress(RuntimeError):  # it looks for files too, and complains where they are elsewhere
            if told := utilities.get_cann_version():
                return str(told)
    named = (environment.get(name) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"))
    for home in (*map(Path, filter(None, named)), ascend / "ascend-toolkit/latest", ascend / "cann"):
        for file in (
            *sorted(home.glob("*-linux/ascend_toolkit_install.info")),
            *(home / "version.cfg", home / "runtime/version.info"),
        ):
            if version := _version(file):
                return version
    return None


def _version(file: Path) -> str | None:
    """The version in a file of lines `Version=25.2.0`, or `runtime_running_version=[7.6.0.1.220:8.0.0]` (`version.cfg`)."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if found := re.search(r"^version\s*=\s*\[?([^\s\[\]:]+)", text, re.MULTILINE | re.IGNORECASE):
        return found[1]
    found = re.search(r"^\w+_running_version\s*=\s*\[(?:[^\]:]*:)?([^\]:]+)\]", text, re.MULTILINE)
    return found[1] if found else None
