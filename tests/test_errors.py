"""The errors: what they say, and that they can be copied and sent between processes."""

import pickle

import pytest

from ced.errors import AudioError, CedError, ConfigError, MissingPackageError, TooLongError, WriteError

ERRORS = [
    (CedError("a"), "a"),
    (ConfigError("a: 2 errors", details=["b", "c"]), "a: 2 errors\nb\nc"),
    (AudioError("no samples", "a.wav"), "a.wav: no samples"),
    (AudioError("no samples"), "no samples"),
    (TooLongError("too long", "a.wav"), "a.wav: too long"),
    (AudioError("unknown", "a.wav", hint="readable are WAV"), "a.wav: unknown; readable are WAV"),
    (WriteError("a.csv", "No space left"), "cannot write a.csv: No space left"),
    (MissingPackageError("av"), "this needs the package av: pip install 'ced-audio[media]'"),
]


@pytest.mark.parametrize(("error", "text"), ERRORS)
def test_copies_of_errors_have_the_same_message(error: CedError, text: str) -> None:
    assert str(error) == text
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied), copied.__dict__) == (type(error), text, error.__dict__)


def test_a_write_error_is_an_operating_system_error() -> None:
    assert isinstance(WriteError("a", "b"), OSError)
