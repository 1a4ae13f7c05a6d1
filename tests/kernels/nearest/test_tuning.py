"""Block sizes of the Triton kernels: the rule, and the user's file."""

import pytest

from vqssl.kernels.nearest import tuning


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """Return a function that writes the user's file, a new one each time."""

    def write(name, text):
        monkeypatch.setenv("VQSSL_TUNING", str(tmp_path / name))
        (tmp_path / name).write_text(text)

    monkeypatch.setenv("VQSSL_TUNING", str(tmp_path / "missing.json"))
    return write


def test_without_a_file_the_first_candidate_is_chosen(user_file):
    assert tuning.choose((9, 0), 128, "half") == tuning.candidates((9, 0), 128, "half")[0]


def test_unknown_architecture_has_the_least_shared_memory():
    assert tuning.shared_memory((7, 5)) == 99 * 1024


def test_measured_configuration_wins(user_file):
    user_file("measured.json", '{"sm_90/128/half": [64, 32, 128, 4, 2]}')
    assert tuning.choose((9, 0), 128, "half") == (64, 32, 128, 4, 2)
    assert tuning.choose((9, 0), 64, "half") == tuning.candidates((9, 0), 64, "half")[0]
    assert tuning.choose((9, 0), 128, "wide") == tuning.candidates((9, 0), 128, "wide")[0]


def test_broken_file_is_ignored(user_file):
    user_file("broken.json", "{")
    assert tuning.choose((9, 0), 128, "half") == tuning.candidates((9, 0), 128, "half")[0]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_tiles_are_smaller_where_there_are_fewer_than_multiprocessors(user_file, capability, dim):
    usual = tuning.choose(capability, dim, "half")
    few, many = (tuning.choose(capability, dim, "half", rows) for rows in (usual.block_n // 2, 4 * usual.block_n))
    assert many == usual
    assert few in tuning.candidates(capability, dim, "half")
    assert few.block_n < usual.block_n


def test_another_file_is_another_choice(user_file):
    """Though choices are remembered."""
    before = tuning.choose((9, 0), 128, "half", 512)
    user_file("other.json", '{"sm_90/128/half": [32, 32, 128, 4, 1]}')
    assert tuning.choose((9, 0), 128, "half", 512) == (32, 32, 128, 4, 1) != before
