"""Which torch runs on which torch_npu and CANN: the vendor's table, as it stood in August 2026."""

import re

ROWS = {
    "9.1": ("2.7.1", "2.9", "2.10", "2.11", "2.12"),
    "9.0": ("2.7.1", "2.8", "2.9"),
    "8.5": ("2.6", "2.7", "2.8", "2.9"),
    "8.3": ("2.1", "2.6", "2.7", "2.8"),
}
"""Releases of torch by release of CANN: `2.9` is any 2.9.z, `2.7.1` that one alone."""


def why_unpaired(torch: str, torch_npu: str | None, cann: str | None) -> str | None:
    """None if the versions belong together as far as they are known, else why not and what to install.

    Args:
        torch: as its distribution has it; a build (`+cpu`) does not count.
        torch_npu: the same; a `.postN` does not count. None: not installed, so there is nothing to pair.
        cann: any form of CANN's version (`9.1.0`, `8.3.RC1`), or None if it is not known.
    """
    if torch_npu is None:
        return None
    release = _release(torch)
    if _release(torch_npu) != release:
        return (
            f"torch_npu {torch_npu} needs torch {_release(torch_npu)}, and {torch} is installed: "
            f"install torch-npu=={release}, or the torch that it needs"
        )
    rows = [row for row, releases in ROWS.items() if _listed(release, releases)]
    if not rows:
        return (
            f"torch {release} is in no row of the vendor's table, so no CANN is tested with it: "
            f"install one of torch {', '.join(ROWS['9.1'])} on CANN 9.1"
        )
    if cann is None:
        return None
    found = re.match(r"\d+\.\d+", cann)
    row = found[0] if found else cann
    if row not in ROWS:
        return (
            f"CANN {cann} is in no row of the vendor's table, which has {', '.join(ROWS)}: "
            f"torch {release} belongs to CANN {' or '.join(rows)}"
        )
    if row not in rows:
        return (
            f"CANN {cann} is paired with torch {', '.join(ROWS[row])}, not with {release}, "
            f"which belongs to CANN {' or '.join(rows)}: install other versions of torch and torch_npu, or that CANN"
        )
    return None


def _release(version: str) -> str:
    """`2.10.0` of `2.10.0.post4` and of `2.10.0+cpu`."""
    found = re.match(r"\d+(\.\d+){0,2}", version)
    return found[0] if found else version


def _listed(release: str, releases: tuple[str, ...]) -> bool:
    return release in releases or release.rpartition(".")[0] in releases
