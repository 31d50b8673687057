"""What the families have in common that transformers does not know."""
