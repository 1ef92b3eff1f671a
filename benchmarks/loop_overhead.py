"""How much of our training step is neither forward nor backward pass?

python benchmarks/loop_overhead.py [--rounds N]      (one thread; three minutes)

The whole step of train_step.py, with one average, against the passes of the same U-Net on a batch of the same size: the
rest is taking the batch over, noise and weights of the loss, clipping, the update, the average, figures, the journal.
Both are timed in each round, in an order drawn anew; medians over the rounds.  The controls are each against itself.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from functools import partial
from pathlib import Path

import torch
from pairs import ratio, rounds, say, spread
from steps import SEED, PassesAlone, config_of, our_steps, write_set

from pipeline.engine import leave


def main() -> None:
    """Take steps, and passes alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="images of a step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder / "set")
        batch = {"global_batch_images": args.batch}
        ways = {run: partial(next, our_steps(config_of(folder, run, train=batch))) for run in ("step", "step again")}
        ways |= {run: PassesAlone(config_of(folder, run, train=batch)) for run in ("passes", "passes again")}
        for _ in range(5):
            for way in ways.values():
                way()
        found = rounds(ways, args.rounds, random.Random(SEED))
    outside = 100 * (1 - ratio(found, "passes", "step"))
    bound = f"<= 6 (passes over step, quartiles {spread(found, 'passes', 'step')})"
    say(f"of a step of {args.batch} images outside forward and backward", outside, bound, outside <= 6, "%")
    for way in ("step", "passes"):
        control = ratio(found, way, f"{way} again")
        say(f"control: {way} over {way}", control, "0.98 to 1.02", abs(control - 1) <= 0.02, "ratio")


if __name__ == "__main__":
    main()
    leave(0)  # loaders leave signals to the program, and would be waited for
