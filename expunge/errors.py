"""Every error that Expunge raises on purpose. Imports nothing, so that every folder may import it."""


class ExpungeError(Exception):
    """Base of all of Expunge's errors: says what was wrong with which file, argument or module, and what to do.

    Args:
        subject: the file, argument or module that is at fault.
        expected: what should have been there.
        found: what was there.
        fix: what the user can do about it, as one sentence or more.
    """

    def __init__(self, subject: str, *, expected: str, found: str, fix: str) -> None:
        super().__init__(f"{subject}: expected {expected}, found {found}. {fix}")
        self.subject = subject
        self.expected = expected
        self.found = found
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own reduction calls cls(message), which keyword-only arguments refuse.
        return _rebuild, (type(self), self.subject, self.expected, self.found, self.fix), self.__dict__.copy()


def _rebuild(cls: type[ExpungeError], subject: str, expected: str, found: str, fix: str) -> ExpungeError:
    return cls(subject, expected=expected, found=found, fix=fix)


class AdapterFormatError(ExpungeError):
    """A file or folder is not an erasure that Expunge can read: malformed, incomplete, or of an unknown layout."""


class AdapterMismatchError(ExpungeError):
    """A well-formed erasure belongs to another model: other modules, shapes, architecture or text encoder."""


class NonFiniteError(ExpungeError):
    """NaN or infinity where a number is needed: in a file's tensors, a conditioning, a loss or a merged weight."""


class UnsafePathError(ExpungeError):
    """A name or path given by a file or a user leads out of the folder that it belongs to."""


class ErasureLostError(ExpungeError):
    """An erasure that was attached is no longer in force; raised before an image is made without it."""


class UnsupportedOperationError(ExpungeError):
    """A well-formed request that Expunge cannot carry out on this model, layer or pipeline."""


class InvalidInputError(ExpungeError):
    """An argument's type or value is outside what the function accepts."""
