"""What the llama.cpp that defines Q4_0_64 computes wrongly or not at all on an Ascend card, by type and rows.

Read in the sources of its CANN backend (`Lpzhan931/llama.cpp` 521f4fb7) and re-enacted in numbers in
`tests/camera/formats/test_cann_branch.py`; not seen on a card.
"""

MOST_ROWS = 65_535
"""A larger matrix is multiplied in several calls, some rows in each."""
_MULTIPLIED = ("f32", "f16", "q8_0", "q4_0", "q4_0_64")


def why_wrong(type: str, rows: int) -> str | None:
    """Why the product with a matrix would be wrong, or None."""
    if type != "q4_0_64":
        return None
    if rows > MOST_ROWS:
        return (
            f"llama.cpp on an Ascend card computes {type} of more than {MOST_ROWS:,} rows wrongly, and there are {rows:,}; "
            "other blocks it computes rightly for one token at a time (perplexity and parallel requests need f16)"
        )
    if rows % 2:
        return f"llama.cpp on an Ascend card computes {type} of an odd number of rows wrongly, and there are {rows:,}"
    return None


def why_slow(type: str) -> str | None:
    """Why the CPU would multiply by a matrix and not the card, or None."""
    if type in _MULTIPLIED:
        return None
    return f"llama.cpp does not multiply {type} on an Ascend card, so the CPU does, at every token"
