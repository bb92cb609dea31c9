"""Finding bundles, and reaching into their configs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ich_pipeline import bundles, cli
from ich_pipeline.bundles import Bundle, parse_overrides, read_yaml, resolve, write_configs
from ich_pipeline.commands import list_bundles
from ich_pipeline.errors import ConfigError

CONFIGS: dict[str, Any] = {
    "inference": {
        "spacing_mm": [5.0, 0.5, 0.5],
        "threshold": 0.5,
        "inferer": {"roi": [16, 32], "inner": {"mode": "a"}},
    },
    "train": {"spacing_mm": [5.0, 0.5, 0.5], "epochs": 300, "learning_rate": 0.01, "steps": [{"p": 0.5}, {"p": 0.1}]},
}


def make_bundle(folder: Path, description: str = "made for a test") -> Bundle:
    (folder / "configs" / "presets").mkdir(parents=True)
    (folder / "configs" / "variants").mkdir()
    for name, config in CONFIGS.items():
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(config))
    metadata = {"name": folder.name, "version": "0.1.0", "description": description, "weights_sha256": None}
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "configs" / "presets" / "cpu.yaml").write_text("epochs: 3\nthreshold: 0.4\n")
    (folder / "configs" / "variants" / "sharp.yaml").write_text("threshold: 0.9\nname: sharp\ninferer.inner.mode: b\n")
    return Bundle(folder)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.chdir(tmp_path)
    return make_bundle(tmp_path / "mine")


# ---------------------------------------------------------------- finding


def test_a_users_bundle_hides_the_installed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    installed = bundles.find_bundle("cascade3d")
    assert installed.path == bundles.resource("bundles") / "cascade3d"
    mine = make_bundle(tmp_path / "bundles" / "cascade3d")
    other = make_bundle(tmp_path / "bundles" / "another")
    assert bundles.find_bundle("cascade3d").path == mine.path
    assert bundles.find_bundle("another").path == other.path
    assert set(bundles.all_bundles()) >= {"another", "cascade3d", "segresnet2d"}


def test_a_bundle_is_found_by_its_folder(bundle: Bundle) -> None:
    assert bundles.find_bundle(str(bundle.path)) == bundle
    assert bundles.find_bundle("mine") == bundle  # relative to the working folder


def test_a_bundle_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no bundle 'cascad3d'; did you mean 'cascade3d'"):
        bundles.find_bundle("cascad3d")
    with pytest.raises(ConfigError, match=r"no bundle 'zzz'; known: .*cascade3d.*segresnet2d"):
        bundles.find_bundle("zzz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"is no bundle.*metadata.json"):
        bundles.find_bundle("empty")


def test_a_bundle_whose_package_is_not_installed(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    def require(packages: dict[str, str]) -> None:
        metadata = bundle.metadata | {"required_packages_version": packages}
        (bundle.path / "configs" / "metadata.json").write_text(json.dumps(metadata))

    # Our own name is that of the code that runs, wherever it was found.
    require({"ich_pipeline": "0.1.0", "numpy": "1.26.0"})
    assert bundles.require_packages(bundle) is bundle
    require({"numpy": "1.26.0", "no-such-package": "2.0.0"})
    assert bundle.describe()["missing_packages"] == ["no-such-package>=2.0.0"]
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", "bundle=mine", "data=cases.csv"])
    assert end.value.code == 2
    assert (
        'mine needs no-such-package>=2.0.0, not installed here. Install it: pip install "no-such-package>=2.0.0"'
        in (" ".join(capsys.readouterr().err.split()))
    )
    make_bundle(Path("bundles/other"))
    bundle.path.rename("bundles/mine")
    listed = {line.split()[0]: line for line in list_bundles(as_json=False).splitlines()}
    assert listed["mine"].endswith("made for a test [not installed: no-such-package>=2.0.0]")
    assert listed["other"].endswith("made for a test")


def test_description_of_a_bundle(bundle: Bundle) -> None:
    shown = bundle.describe()
    assert (shown["name"], shown["weights"]) == ("mine", None)
    assert (shown["presets"], shown["variants"]) == (["cpu"], ["sharp"])
    (bundle.path / "models").mkdir()
    (bundle.path / "models" / "model.pt").write_bytes(b"weights")
    (bundle.path / "configs" / "metadata.json").write_text(json.dumps(bundle.metadata | {"weights_sha256": "ab" * 32}))
    assert bundle.describe()["weights"] == "ab" * 32


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("k=1e-3", 0.001),  # a string in YAML 1.1
        ("k=-2E5", -2e5),
        ("k=[1e-3, 2.5e1]", [0.001, 25.0]),
        ("k={a: 1e2}", {"a": 100.0}),
        ("k=3", 3),
        ("k=true", True),
        ("k=null", None),
        ("k=", None),
        ("k=a=b", "a=b"),
        ("k=>=6mL or >33%", ">=6mL or >33%"),  # YAML would want lines below a `>`
        ("k=1e-3x", "1e-3x"),
        ("k=[5, 0.488, 0.488]", [5, 0.488, 0.488]),
    ],
)
def test_values_are_yaml(word: str, value: Any) -> None:
    found = parse_overrides([word])["k"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epochs"], "'epochs': expected key=value"),
        (["=3"], "'=3': expected key=value"),
        (["a=1", "a=2"], "'a' is given twice"),
        (["a=[1, 2"], r"a=\[1, 2: the value is not YAML"),
    ],
)
def test_words_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_overrides(words)


def test_a_config_file_that_is_not_one(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_yaml(file)
    file.write_text("a: [1")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_yaml(file)
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected keys and values, found list"):
        read_yaml(file)


# ---------------------------------------------------------------- reaching in


def both(bundle: Bundle, overrides: dict[str, Any], preset: str | None = None) -> dict[str, Any]:
    return resolve(bundle, ("inference", "train"), overrides, preset)


def test_a_key_changes_in_every_config_that_has_it(bundle: Bundle) -> None:
    configs = both(bundle, {"spacing_mm": [1, 1, 1], "epochs": 5})
    assert configs["inference"]["spacing_mm"] == configs["train"]["spacing_mm"] == [1, 1, 1]
    assert configs["train"]["epochs"] == 5
    assert "epochs" not in configs["inference"]
    configs["train"]["spacing_mm"].append(2)  # a copy each
    assert configs["inference"]["spacing_mm"] == [1, 1, 1]


@pytest.mark.parametrize("separator", [".", "::", "#"])
def test_nested_keys(bundle: Bundle, separator: str) -> None:
    configs = both(
        bundle,
        {
            separator.join(["inferer", "inner", "mode"]): "z",
            separator.join(["inferer", "roi", "1"]): 64,
            separator.join(["steps", "1", "p"]): 0.9,
        },
    )
    assert configs["inference"]["inferer"] == {"roi": [16, 64], "inner": {"mode": "z"}}
    assert configs["train"]["steps"] == [{"p": 0.5}, {"p": 0.9}]


@pytest.mark.parametrize(
    ("overrides", "preset", "message"),
    [
        ({"epoch": 5}, None, "mine has no key 'epoch'; did you mean 'epochs'?"),
        ({"qqq": 5}, None, "mine has no key 'qqq'; known: epochs, inferer, "),
        ({"inferer.iner": 5}, None, "no key 'inferer.iner'; did you mean 'inferer.inner'"),
        ({"inferer.roi.2": 5}, None, "no key 'inferer.roi.2'"),
        ({"inferer.roi.-1": 5}, None, "no key 'inferer.roi.-1'"),
        ({"epochs.x": 5}, None, "no key 'epochs.x'"),
        ({"variant": "sharpe"}, None, "mine has no variant 'sharpe'; did you mean 'sharp'?"),
        ({}, "cpus", "mine has no preset 'cpus'; did you mean 'cpu'?"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest_name(
    bundle: Bundle, overrides: dict[str, Any], preset: str | None, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        both(bundle, overrides, preset)
    assert message in str(refused.value)


def test_variant_wins_over_preset_and_a_word_over_both(bundle: Bundle) -> None:
    assert both(bundle, {}, "cpu")["inference"]["threshold"] == 0.4
    configs = both(bundle, {"variant": "sharp"}, "cpu")
    assert configs["inference"]["threshold"] == 0.9
    assert configs["inference"]["inferer"]["inner"]["mode"] == "b"
    assert configs["train"]["epochs"] == 3
    assert both(bundle, {"variant": "sharp", "threshold": 0.1}, "cpu")["inference"]["threshold"] == 0.1


def test_presets_reach_configs_that_were_not_asked_for_and_words_do_not(bundle: Bundle) -> None:
    assert resolve(bundle, ("inference",), {"variant": "sharp"}, "cpu").keys() == {"inference"}
    assert resolve(bundle, ("metadata",), {"variant": "sharp"}, "cpu")["metadata"]["name"] == "sharp"
    with pytest.raises(ConfigError, match="no key 'epochs'"):
        resolve(bundle, ("inference",), {"epochs": 5}, "cpu")


@pytest.mark.parametrize("kind", ["presets", "variants"])
def test_a_key_that_only_an_overlay_has_is_refused(bundle: Bundle, kind: str) -> None:
    (bundle.path / "configs" / kind / "bad.yaml").write_text("epoch: 3\n")
    chosen = (
        {"preset": "bad", "overrides": {}} if kind == "presets" else {"preset": None, "overrides": {"variant": "bad"}}
    )
    with pytest.raises(ConfigError, match="no key 'epoch'; did you mean 'epochs'"):
        both(bundle, **chosen)


def test_a_bundle_without_presets_says_so(bundle: Bundle) -> None:
    (bundle.path / "configs" / "presets" / "cpu.yaml").unlink()
    with pytest.raises(ConfigError, match="no preset 'cpu'; known: none"):
        both(bundle, {}, "cpu")


def test_configs_written_are_configs_read(bundle: Bundle) -> None:
    wanted = resolve(bundle, ("inference", "train", "metadata"), {"learning_rate": 1e-5, "variant": "sharp"}, None)
    write_configs(bundle.path, wanted)
    assert {name: bundle.config(name) for name in wanted} == wanted
    assert bundle.name == "sharp"


@pytest.mark.parametrize("name", bundles.all_bundles())
def test_every_bundle_survives_writing(name: str, tmp_path: Path) -> None:
    source = bundles.all_bundles()[name]
    configs = {n: source.config(n) for n in source.config_names}
    write_configs(tmp_path, configs)
    assert {n: Bundle(tmp_path).config(n) for n in source.config_names} == configs
