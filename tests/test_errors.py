"""The closed set of errors: one message shape, picklable, importable from anywhere."""

import copy
import pickle
import subprocess
import sys

import pytest

from expunge import errors

CONCRETE = (
    errors.AdapterFormatError,
    errors.AdapterMismatchError,
    errors.NonFiniteError,
    errors.UnsafePathError,
    errors.ErasureLostError,
    errors.UnsupportedOperationError,
    errors.InvalidInputError,
)


@pytest.mark.parametrize("kind", CONCRETE)
def test_message_names_subject_expected_found_and_fix(kind: type[errors.ExpungeError]) -> None:
    error = kind("cat.safetensors", expected="a rank of 1", found="a rank of 0", fix="Train it again.")
    assert str(error) == "cat.safetensors: expected a rank of 1, found a rank of 0. Train it again."
    assert (error.subject, error.expected, error.found, error.fix) == (
        "cat.safetensors",
        "a rank of 1",
        "a rank of 0",
        "Train it again.",
    )


@pytest.mark.parametrize("kind", CONCRETE)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickling_as_worker_processes_need(kind: type[errors.ExpungeError], protocol: int) -> None:
    error = kind("gate", expected="1.0", found="nan", fix="Check the prompt.")
    error.add_note("row 3")
    for twin in (pickle.loads(pickle.dumps(error, protocol)), copy.deepcopy(error)):
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert twin.__notes__ == ["row 3"]
        assert twin.fix == "Check the prompt."


def test_every_error_is_caught_as_one_and_explains_itself() -> None:
    defined = {value for value in vars(errors).values() if isinstance(value, type) and value is not errors.ExpungeError}
    assert defined == set(CONCRETE)
    for kind in defined:
        assert issubclass(kind, errors.ExpungeError)
        assert kind.__doc__


def test_arguments_cannot_be_left_out() -> None:
    with pytest.raises(TypeError, match="fix"):
        errors.InvalidInputError("x", expected="a", found="b")  # type: ignore[call-arg]


def test_the_module_imports_nothing() -> None:
    code = (
        "import sys; import expunge; before = set(sys.modules); import expunge.errors;"
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["expunge.errors"]
