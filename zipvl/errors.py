"""Every error a user can meet: one sentence that says what was wrong, where, and what to do."""


class ZipvlError(Exception):
    """Base of all errors raised on purpose; the command line prints it and exits with `code`."""

    code = 1


class ModelError(ZipvlError):
    """A checkpoint that cannot be used: config, weights, tokenizer, or the numbers it computes."""


class MediaError(ZipvlError):
    """A picture or video that cannot be read."""


class UsageError(ZipvlError):
    """An argument that makes no sense: unknown method, option out of range, stray marker."""

    code = 2


class OutOfMemory(ZipvlError):
    """The device ran out of memory; the message says how much was needed and what to lower."""

    code = 3
