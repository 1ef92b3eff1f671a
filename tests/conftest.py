"""Fixtures of every room: a small world, made once by the programs themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from world import World, small_config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in tests/system carry the mark that make test leaves out."""
    for item in items:
        if "system" in item.path.parts:
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Digits, a trained VAE and latents, made once by the programs themselves."""
    from pipeline.data.prepare import prepare_digits

    world = World(tmp_path_factory.mktemp("world"))
    prepare_digits(world.root / "digits", size=16, seed=0, validation_share=0.2)
    world.config.write_text(yaml.safe_dump(small_config(world.root)))
    assert world.do("train_vae") == [0], world.said()
    assert world.do("encode") == [0], world.said()
    return world


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    """A config of its own over the data, VAE and latents made once; its run folder is new."""
    values = small_config(made.root)
    values["run_dir"] = str(tmp_path / "run")
    here = World(tmp_path)
    here.config.write_text(yaml.safe_dump(values))
    return here
