"""What runs, in which order, on which schedule; and the command line."""
