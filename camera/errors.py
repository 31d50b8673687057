"""What a person did, or their machine lacks, that stops the work: one message, and what to do next."""


class CameraError(Exception):
    """Something the user can mend. The message names the field, file or layer, and says what to do next.

    The command line prints it alone (no traceback) and exits with code 2.
    """


class NetworkError(CameraError):
    """A hub or remote did not answer. The only kind of failure that is worth trying again unchanged."""
