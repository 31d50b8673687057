"""What single engines are built of; loaded by them when they load a model."""
