"""The quantising methods, one module each."""
