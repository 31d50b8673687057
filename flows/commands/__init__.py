"""The commands, by what they are for. Only light imports at the top of these files."""
