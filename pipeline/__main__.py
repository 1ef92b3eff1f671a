"""python -m pipeline VERB ...: each verb is a module of this package, imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "prepare": "pictures → image shards",
    "index": "check and index a folder of shards",
    "check": "what a run will take, and what would fail",
    "train-vae": "train the autoencoder",
    "measure-vae": "measure an autoencoder: latents, reconstructions, bound, pictures",
    "encode": "image shards → latent shards",
    "train": "train the diffusion model",
    "ema": "snapshots of averages → an average of another length",
    "export": "checkpoint → a folder that diffusers opens",
    "sample": "draw images from an export",
    "page": "draw from an export in a browser",
    "evaluate": "score an export or a checkpoint, or compare two models",
    "sweep": "score a model at every combination of sampler settings",
    "report": "a run's curves, pictures and scores → one HTML page",
    "schema": "print the JSON Schema of a config, for editors",
}

MODULES = {"ema": "reconstruct"}  # where a verb's module has another name: pipeline.ema is the averages themselves


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to a verb; the exit code.  Without `argv` it is the whole program, and leaves as one."""
    code = run_verb(list(sys.argv[1:] if argv is None else argv))
    if argv is None and "torch" in sys.modules:
        from pipeline.engine import leave

        leave(code)
    return code


def run_verb(words: list[str]) -> int:
    """The verb's exit code."""
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        lines = [f"  {name:<{width}}  {what}" for name, what in VERBS.items()]
        sys.stdout.write("python -m pipeline VERB ...; VERB --help tells more\n\n" + "\n".join(lines) + "\n")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        wanted = f"did you mean {near[0]}?" if near else f"known: {', '.join(VERBS)}"
        sys.stderr.write(f"error: {verb}: no such verb; {wanted}\n")
        return 2
    return importlib.import_module(module_of(verb)).main(words[1:])


def module_of(verb: str) -> str:
    """The full name of the module that a verb is."""
    return f"pipeline.{MODULES.get(verb, verb.replace('-', '_'))}"


if __name__ == "__main__":
    sys.exit(main())
