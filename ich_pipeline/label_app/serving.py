"""What `label start` hands from the process to the server in it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Serving:
    """What a server is started with.

    Attributes:
        studies: folder of NIfTI scans; MONAI Label keeps its list and the labels there.
        bundles: folders of bundles, by the name of their model.
        out: folder of trained versions, scores and the running server's file.
        origins: web pages that may ask, besides the server's own.
        token: that requests must carry; None on loopback.
    """

    studies: Path
    bundles: dict[str, Path]
    out: Path
    host: str
    port: int
    origins: tuple[str, ...]
    max_upload_mib: int
    token: str | None
