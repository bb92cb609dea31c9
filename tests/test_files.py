"""Files are there whole or not at all, and hashes name their content."""

import json
from pathlib import Path

import numpy as np
import pytest

from ich_pipeline.files import atomic_path, sha256_of, write_csv_rows, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_only_when_whole(tmp_path):
    path = tmp_path / "new" / "x.png"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert temporary.suffix == ".png"
        assert temporary.name.startswith(".")
        assert not path.exists()
    assert path.read_text() == "half"
    assert names(path.parent) == ["x.png"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x.csv"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.csv"]


def test_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        pass


def test_hash_of_a_file_and_of_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "a" / "1") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "a" / "sub").mkdir()
    (tmp_path / "a" / "sub" / "2").write_bytes(b"x")
    before = sha256_of(tmp_path / "a")
    (tmp_path / "a" / "1").rename(tmp_path / "a" / "renamed")
    assert sha256_of(tmp_path / "a") == before
    (tmp_path / "a" / "sub" / "2").write_bytes(b"y")
    assert sha256_of(tmp_path / "a") != before


def test_json(tmp_path):
    value = {"path": Path("a") / "b", "n": np.int64(3), "x": np.float32(0.5), "list": np.arange(2), "set": {"b", "a"}}
    write_json(tmp_path / "x.json", value | {"word": "Blutung, größer"})
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {
        "path": "a/b",
        "n": 3,
        "x": 0.5,
        "list": [0, 1],
        "set": ["a", "b"],
        "word": "Blutung, größer",
    }
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "y.json", {"volume_ml": float("nan")})
    with pytest.raises(TypeError, match="object has no JSON form"):
        write_json(tmp_path / "y.json", object())
    assert names(tmp_path) == ["x.json"]


def test_csv(tmp_path):
    write_csv_rows(tmp_path / "x.csv", [{"a": 1, "b": None}, {"b": 'q"u,o'}], ["a", "b"])
    assert (tmp_path / "x.csv").read_bytes() == b'a,b\n1,\n,"q""u,o"\n'
    with pytest.raises(ValueError, match="c"):
        write_csv_rows(tmp_path / "y.csv", [{"c": 1}], ["a"])
    assert names(tmp_path) == ["x.csv"]
