"""Build the stub of CANN: the libraries that torch_npu's wheel loads, for x86-64 Linux with gcc, g++ and readelf.

Names come from the wheel itself: what its libraries need and torch, Python and libc lack, and every name of CANN's that it
looks up at run time. driver.cpp and operators/ say what some of them do. All others return 0; of those, operators are logged
as not computed.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
TORCH = Path(torch.__file__).parent
_COMPILE = ("g++", "-std=c++20", "-fPIC", "-O1", "-w")
_ALIASES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
"""Libraries of CANN that hold nothing of their own here: their names are in libascendcl.so."""


def why_not() -> str | None:
    """None if the stub can be built on this machine, else what it lacks."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the stub of CANN is built for x86-64 Linux"
    missing = [tool for tool in ("gcc", "g++", "readelf", "nm", "ldd") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found, which build the stub of CANN" if missing else None


def build(wheel: Path, cache: Path) -> Path:
    """The root of the stub of CANN for an unpacked wheel, with its libraries in `lib64`; built unless the cache has it.

    Raises:
        subprocess.CalledProcessError: if a source does not compile.
    """
    sources = [SOURCES / "driver.cpp", *sorted((SOURCES / "operators").glob("*.cpp"))]
    headers = [SOURCES / "stub.h", SOURCES / "operators" / "operator.h"]
    common = [path.read_text() for path in (*headers, next(wheel.glob("torch_npu-*/RECORD")))] + [
        torch.__version__
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compiled(source, wheel, cache, common), sources))
    out = cache / f"cann-{_digest(Path(__file__).read_text(), *(path.name for path in objects))}"
    if not out.exists():
        working = Path(f"{out}.{os.getpid()}")
        for name in ("lib64", "runtime", "compiler", "opp"):  # torch_npu asks whether the latter exist
            (working / name).mkdir(parents=True)
        _link(wheel, objects[0], objects[1:], working / "lib64")
        if not out.exists():  # two processes may build at once
            working.rename(out)
    return out


def _digest(*texts: str) -> str:
    return sha256("\0".join(texts).encode()).hexdigest()[:16]


def _compiled(source: Path, wheel: Path, cache: Path, common: list[str]) -> Path:
    made = cache / "objects" / f"{source.stem}-{_digest(source.read_text(), *common)}.o"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        working = Path(f"{made}.{os.getpid()}")
        headers = (f"-I{wheel}/torch_npu/include/third_party/acl/inc", f"-I{TORCH}/include")
        subprocess.run([*_COMPILE, *headers, "-c", source, "-o", working], check=True)
        working.rename(made)
    return made


def _link(wheel: Path, driver: Path, operators: list[Path], out: Path) -> None:
    ours = [
        *wheel.glob("torch_npu/lib/*.so"),
        *wheel.glob("torch_npu/_C*.so"),
        *wheel.glob("torch_npu.libs/*"),
    ]
    looked_up = {name for library in ours for name in _texts(library)}
    kernels = {name.removesuffix("GetWorkspaceSize") for name in looked_up if name.startswith("aclnn")}
    linked = subprocess.run(["ldd", TORCH / "lib/libtorch_cpu.so"], capture_output=True, text=True).stdout
    theirs = [*TORCH.glob("lib/*.so*"), *TORCH.glob("_C*.so"), Path(sys.executable).resolve()]
    theirs += [Path(word) for word in linked.split() if word.startswith("/")]
    here = {name for library in (*ours, *theirs) for name in _symbols(library, needed=False)}
    needed = {name for library in ours for name in _symbols(library, needed=True)} - here
    needed = {name for name in needed if not name.startswith(("Py", "_Py"))}
    functions = needed | {name for name in looked_up if not name.startswith("aclnn")}
    _library("ascendcl", [driver], functions - _own(operators), [], out)
    _library(
        "opapi",
        operators,
        set(),
        sorted(kernels),
        out,
        f"-L{out}",
        "-lascendcl",
        f"-L{TORCH}/lib",
        "-ltorch_cpu",
        "-lc10",
    )
    for name in _ALIASES:
        _library(name, [], set(), [], out, f"-L{out}", "-Wl,--no-as-needed", "-lascendcl")


def _texts(library: Path) -> set[str]:
    """Names of CANN's functions that a library may look up: they stand in it as text."""
    found = re.findall(rb"\b(?:acl|rt|Hccl)[A-Za-z0-9_]{3,80}(?=\0)", library.read_bytes())
    return {name.decode() for name in found}


def _symbols(library: Path, *, needed: bool) -> set[str]:
    table = subprocess.run(["readelf", "-Ws", "--dyn-syms", library], capture_output=True, text=True).stdout
    names = set()
    for line in table.splitlines():
        part = line.split()
        if len(part) < 8 or not part[0].endswith(":"):
            continue
        undefined, binding, name = part[6] == "UND", part[4], part[7].split("@")[0]
        if (undefined and binding == "GLOBAL") if needed else not undefined:
            names.add(name)
    return names


def _own(objects: list[Path]) -> set[str]:
    """The C functions that objects define."""
    table = subprocess.run(["nm", *objects], capture_output=True, text=True).stdout if objects else ""
    return set(re.findall(r"^\w+ T (\w+)$", table, re.MULTILINE))


def _library(
    name: str, objects: list[Path], zero: Iterable[str], kernels: list[str], out: Path, *flags: str
) -> None:
    """Link a library from objects, functions that return 0, and both phases of every operator that the wheel knows."""
    own = _own(objects)
    lines = [".text"]
    for symbol in sorted({symbol for symbol in zero if re.fullmatch(r"\w+", symbol)} - own):
        lines += [*_function(symbol), "xorl %eax, %eax", "ret"]
    for number, kernel in enumerate(kernels):
        lines += [*_function(kernel), "jmp stub_execute@PLT"] if kernel not in own else []
        if f"{kernel}GetWorkspaceSize" not in own:
            lines += [
                *_function(f"{kernel}GetWorkspaceSize"),
                f"leaq .Lname{number}(%rip), %rdi",
                "jmp stub_not_computed@PLT",
            ]
            lines += [".section .rodata", f'.Lname{number}: .asciz "{kernel}"', ".text"]
    assembly = out / f"{name}.S"
    assembly.write_text("\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""]))
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-o", out / f"lib{name}.so", *objects, assembly, *flags], check=True
    )
    assembly.unlink()


def _function(name: str) -> list[str]:
    return [f".globl {name}", f".type {name}, @function", f"{name}:"]
