"""An Ascend host: its versions and cards, which versions belong together, and what its errors mean.

Nothing here imports torch or torch_npu, so that it also answers where those cannot be imported.
"""
