"""The `vae` section refuses what cannot work, and says why."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from vae.config import DiscriminatorConfig, VaeConfig, VaeModelConfig, VaeTrainConfig


def test_defaults_are_whole_and_the_path_follows_the_run_dir() -> None:
    assert VaeConfig().path == "runs/vae/autoencoder"
    assert VaeConfig(run_dir="elsewhere").path == "elsewhere/autoencoder"
    assert VaeConfig(run_dir="elsewhere", path="org/name").path == "org/name"


@pytest.mark.parametrize("section", [VaeConfig, VaeModelConfig, VaeTrainConfig, DiscriminatorConfig])
def test_unknown_keys_are_refused(section: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="kl_wieght"):
        section.model_validate({"kl_wieght": 1.0})


@pytest.mark.parametrize(
    ("section", "wrong", "message"),
    [
        (VaeModelConfig, {"block_out_channels": [16, 20], "norm_num_groups": 8}, r"\[20\] came.*norm_num_groups"),
        (VaeModelConfig, {"block_out_channels": [-8]}, "positive multiples"),
        (VaeModelConfig, {"block_out_channels": []}, "at least 1"),
        (VaeTrainConfig, {"learning_rate": 0}, "greater than 0"),
        (VaeTrainConfig, {"kl_weight": -1e-6}, "greater than or equal to 0"),
        (VaeTrainConfig, {"steps": -1}, "greater than or equal to 0"),
        (VaeTrainConfig, {"reconstruction": "l3"}, "'l1', 'l2' or 'gaussian'"),
        (DiscriminatorConfig, {"num_downsamplings": 0}, "greater than or equal to 1"),
        (VaeTrainConfig, {"global_batch_images": 8, "micro_batch_images": 3}, "3 came, a divisor"),
    ],
)
def test_impossible_values_are_refused(section: type[BaseModel], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section.model_validate(wrong)


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        VaeTrainConfig().steps = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("section", [VaeConfig, VaeModelConfig, VaeTrainConfig, DiscriminatorConfig])
def test_every_field_says_what_it_means(section: type[BaseModel]) -> None:
    assert all(field.description for field in section.model_fields.values())
    assert section.model_json_schema()["additionalProperties"] is False
