"""What the `label` commands do; nothing heavy is imported before it is needed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ich_pipeline import bundles
from ich_pipeline.bundles import Bundle
from ich_pipeline.errors import ConfigError
from ich_pipeline.files import write_json
from ich_pipeline.label_app.serving import Serving
from ich_pipeline.label_app.versions import Versions, versions_of
from ich_pipeline.settings import Settings

BUNDLES_FILE = "bundles.json"  # in the server's folder: which bundles it serves


def start(
    studies: Path,
    names: str | None,
    host: str,
    port: int,
    out: Path,
    origins: Sequence[str],
    max_upload_mib: int,
) -> NoReturn:
    """Serve until Ctrl-C or `stop`, then end this process: 0, or 130 after Ctrl-C.

    Args:
        studies: folder of NIfTI scans.
        names: bundles with commas between them; None takes every one with weights, and those that need none.
        origins: web pages that may ask, besides the server's own.

    Raises:
        ConfigError: the extra is not installed, no such folder or bundle, a bundle without weights or with changed
            ones, a port that is taken, or another host without a token.
    """
    from ich_pipeline.label_app import process

    process.require_extra()
    if not studies.is_dir():
        raise ConfigError(f"--studies {studies}: no such folder. Make it, and put NIfTI scans into it.")
    for origin in origins:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise ConfigError(
                f"--origin {origin}: expected scheme, host and port alone, as https://viewer.example:3000"
            )
    token = process.token_for(host)
    chosen = process.named(_chosen(names))

    from ich_pipeline.engines import check_hash

    for folder in chosen.values():
        weights = Bundle(folder).weights
        if weights:
            check_hash(weights)
    out = out.resolve()
    serving = Serving(studies.resolve(), chosen, out, host, port, tuple(origins), max_upload_mib, token)
    write_json(out / BUNDLES_FILE, {name: str(path) for name, path in chosen.items()})
    process.start(serving)


def _chosen(names: str | None) -> list[Bundle]:
    if names is None:
        every = bundles.all_bundles().values()
        return [b for b in every if (b.weights or not b.needs_weights) and not b.missing_packages]
    found = [each.bundle() for each in Settings.of([f"bundle={names}"]).each_bundle()]
    for bundle in found:
        if bundle.weights is None and bundle.needs_weights:
            raise ConfigError(
                f"{bundle.name} has no weights. Train it (ich-pipeline train bundle={bundle.name} data=MANIFEST) and "
                "name the trained bundle's folder."
            )
    return found


def stop(out: Path) -> int:
    """Stop the server that runs with this folder; 0, also where none runs."""
    from ich_pipeline.label_app import process

    url = process.stop(out.resolve())
    print(f"stopped {url}" if url else f"no server runs with {out}")
    return 0


def versions(name: str | None, serve: int | None, out: Path) -> int:
    """List versions, or serve one of them.

    Raises:
        ConfigError: nothing was served from this folder, or no such model or version.
    """
    file = out / BUNDLES_FILE
    if not file.is_file():
        raise ConfigError(f"{out}: no server was started with this folder. Give --out.")
    known = versions_of({n: Bundle(Path(p)) for n, p in json.loads(file.read_text()).items()}, out.resolve())
    if name is not None and name not in known:
        raise ConfigError(f"no model '{name}' here; {bundles.did_you_mean(name, known)}")
    if serve is not None:
        if name is None:
            raise ConfigError(f"--serve {serve}: of which model? Name one of {', '.join(known)}.")
        known[name].serve(serve)
    for each in [known[name]] if name else known.values():
        print(_listed(each))
    return 0


def _listed(each: Versions) -> str:
    lines = [f"{each.name} 0  {each.source.path}"]
    lines += [
        f"{each.name} {h['version']}  from {h['started_from']}, Dice {h['dice_before']:.4f} before, "
        f"{h['dice_after']:.4f} after, {h['n_train']} + {h['n_val']} cases"
        for h in each.history()
    ]
    return "\n".join(
        line + ("  (served)" if n == each.served else "") for n, line in zip(each.numbers(), lines, strict=True)
    )
