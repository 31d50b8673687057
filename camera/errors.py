"""Errors that the user can resolve: one message, which says what to do next."""


class CameraError(Exception):
    """An error of input or environment. The message names the field, file or layer, and says what to do next.

    The command line prints it alone (no traceback) and exits with code 2.
    """


class NetworkError(CameraError):
    """A hub or remote did not answer. The only kind of failure that is worth trying again unchanged."""
