"""The keys of ours in a GGUF file; what they mean to a reader is in docs/formats.md."""

BLOCK_TYPE_KEY = "camera.block_type"
"""The type that the matrices were asked to be of."""
TWIN_KEY = "camera.twin_of"
"""In a Q4_0 file that holds exactly the numbers of another type: that type."""
LINEAGE_KEY = "camera.lineage"
"""JSON text: what made the model."""
