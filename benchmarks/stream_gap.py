"""Whether a training on a stream of phantoms has learnt them by heart: its scores on those it drew from, and on others.

    python benchmarks/stream_gap.py runs/cascade3d [--phantoms 24]

Takes the folder of a run with variant=synthesis, as its training left it: the weights of its last epoch. Both sets are
made anew from the run's seed; whole heads on the model grid, cut at 0.5. A wide gap says that the stream was too short:
lower train.sampler.draws_per_case, or give another seed= to a training that starts from this one.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ich_pipeline.errors import ConfigError
from ich_pipeline.streaming import StreamSampler
from ich_pipeline.training import STATE_FILE, open_workflow


def drawn_from(sampler: StreamSampler, epochs: int) -> list[int]:
    """Numbers of all phantoms that were drawn from in the first epochs."""
    found: set[int] = set()
    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        found.update(draw.case for draw in sampler)
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a training with variant=synthesis")
    parser.add_argument("--phantoms", type=int, default=24, help="in each of the two sets")
    given = parser.parse_args()
    state_file = given.run / STATE_FILE
    if not state_file.is_file():
        raise ConfigError(f"{state_file} is not there: expected the folder of a training with variant=synthesis.")
    state = torch.load(state_file, map_location="cpu", weights_only=True)
    content = open_workflow(given.run / "bundle").parser.get_parsed_content
    network, stream, inferer = (content(name) for name in ("network", "train#dataset", "validate#inferer"))
    network.load_state_dict(state["network"])
    network.eval()
    device = next(network.parameters()).device
    drawn = drawn_from(content("train#sampler"), state["epoch"])
    chosen = np.linspace(0, len(drawn) - 1, given.phantoms).astype(int)
    sets = {
        "drawn from": [drawn[n] for n in chosen],
        "others": range(drawn[-1] + 1, drawn[-1] + 1 + given.phantoms),
    }
    print("| phantoms | with hemorrhage | Dice, mean | Dice, all voxels as one | missed |\n|---|--:|--:|--:|--:|")
    for name, numbers in sets.items():
        overlap, total = [], []
        for number in tqdm(numbers, desc=name, unit="case", file=sys.stderr):
            made = stream.prepared(number)
            with torch.no_grad():
                mask = inferer(made["image"][None].to(device), network)[0].cpu() > 0.5
            label = made["label"] > 0
            overlap.append(2 * int((mask & label).sum()))
            total.append((int(mask.sum() + label.sum()), bool(label.any())))
        bleeding = [(o, n) for o, (n, blood) in zip(overlap, total, strict=True) if blood]
        pooled = sum(overlap) / max(1, sum(n for n, _ in total))
        mean = np.mean([o / n for o, n in bleeding])
        missed = sum(o == 0 for o, _ in bleeding)
        print(f"| {name} | {len(bleeding)} of {len(numbers)} | {mean:.2f} | {pooled:.2f} | {missed} |")
    print(f"\n{len(drawn)} phantoms in {state['epoch']} epochs, seed {content('seed')}")


if __name__ == "__main__":
    main()
