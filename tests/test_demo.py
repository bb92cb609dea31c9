"""`ich-pipeline demo` goes through the whole main job and says where everything is."""

import json
import re
from pathlib import Path

import pytest

from ich_pipeline import demo
from ich_pipeline.report import read_rows
from ich_pipeline.settings import Settings


@pytest.mark.slow
def test_demo_leaves_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    of = Settings.of
    # Two steps of a tiny network: what is asked here is whether the parts fit, not what they score.
    tiny = {"preset=cpu": "preset=tiny"}
    monkeypatch.setattr(demo.Settings, "of", lambda words: of([tiny.get(word, word) for word in words]))
    out = tmp_path / "demo"
    assert demo.run_demo(out, cases=6, seed=3) == 0
    said = capsys.readouterr().out
    assert "synthetic phantoms" in said
    table = out / "volumes" / "volumes.csv"
    rows = read_rows(table)
    assert {row.status for row in rows} == {"ok"}
    assert all("phantom_weights" in row.flags for row in rows)
    assert {row.case_id for row in rows} == {row.case_id for row in read_rows(out / "evaluation" / "volumes.csv")}
    named = [Path(word.rstrip(",")) for word in re.findall(rf"{re.escape(str(out))}\S*", said)]
    assert len(named) >= 5
    assert all(path.exists() for path in named)
    assert len(list((out / "evaluation" / "pictures").glob("*.png"))) == len(rows)
    assert json.loads((out / "run" / "run.json").read_text())["exit_status"] == 0
