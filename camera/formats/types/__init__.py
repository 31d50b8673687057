"""The block formats, one module each (the 16- and 32-bit floats in one)."""
