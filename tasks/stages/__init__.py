"""The stages, one file each: what a stage reads, what it writes, which numbers it reports."""
