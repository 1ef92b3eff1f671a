"""A config is right and whole, or refused in one line per mistake: where, what came, what was wanted."""

import difflib
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pipeline.config import Config, identity, json_schema
from pipeline.config_data import DataConfig
from pipeline.config_file import find_config, load_config, to_yaml
from pipeline.errors import UsageError
from pipeline.schema import schema_text

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
SMALLEST = """\
run_dir: runs/here
seed: 7
data:
  train_images: images
  train_latents: latents
  image_size: 32
vae:
  model:
    latent_channels: 4
conditioning:
  num_classes: 3
train:
  steps: 100
  global_batch_images: 8
"""


def fields(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted key → field of every leaf of a section."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def sections(section: type[BaseModel]) -> list[type[BaseModel]]:
    """A section and all within it."""
    inner = [field.annotation for field in section.model_fields.values()]
    models = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [section, *(found for model in models for found in sections(model))]


LEAVES = fields(Config)
KNOWN = {*LEAVES, *Config.model_fields, "vae.model", "vae.train"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the smallest config that is whole."""
    file = tmp_path / "my.yaml"
    file.write_text(SMALLEST)
    return file


def refused(path: Path, *overrides: str) -> list[str]:
    """The lines in which a config is refused."""
    with pytest.raises(UsageError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def refusal(path: Path, *overrides: str) -> str:
    """The one line in which a config with one mistake is refused."""
    (line,) = refused(path, *overrides)
    return line


# what is right ------------------------------------------------------------------------------------


def test_a_file_gives_its_values_and_the_defaults(path: Path) -> None:
    config = load_config(path)
    assert (config.seed, config.data.image_size, config.train.steps) == (7, 32, 100)
    assert config.diffusion.num_timesteps == 1000


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=8", 8),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("optimizer.learning_rate=1", 1.0),
        ("vae.model.latent_channels=16", 16),
        ("unet.block_out_channels=[64, 64]", (64, 64)),
        ("data.validation_images=null", None),
        ("data.validation_images=a=b", "a=b"),
        ("run_dir=größer", "größer"),
        ("run_dir='12'", "12"),
        ("run_dir=${vae.run_dir}/too", "runs/vae/too"),
        ("tracking.tensorboard=false", False),
    ],
)
def test_an_override_is_laid_over_the_file(path: Path, override: str, value: object) -> None:
    found: Any = load_config(path, [override, "vae.run_dir=runs/vae"])
    for name in override.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_an_override_leaves_its_neighbours_alone(path: Path) -> None:
    config = load_config(path, ["data.lanes=12", "vae.train.steps=9", "vae.train.global_batch_images=3"])
    assert (config.data.image_size, config.vae.model.latent_channels) == (32, 4)


def test_a_value_can_name_another(path: Path) -> None:
    path.write_text(SMALLEST + "evaluation:\n  num_images: ${train.steps}\n")
    assert load_config(path).evaluation.num_images == 100
    assert load_config(path, ["train.steps=50"]).evaluation.num_images == 50


def test_a_feature_network_is_named_by_a_word_or_by_all_of_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    keys = "{network: transformers, path: mine, image_size: 64, mean: [0.1, 0.2, 0.3], std: [1, 1, 1]}"
    path.write_text(f"{SMALLEST}evaluation:\n  features: [classifier, {keys}]\n")
    word, network = load_config(path).evaluation.features
    assert word.network == "classifier"
    assert (network.image_size, network.mean, network.std) == (64, (0.1, 0.2, 0.3), (1, 1, 1))


@pytest.mark.parametrize("change", [("seed", 9), ("train", None)])
def test_a_config_is_frozen(path: Path, change: tuple[str, Any]) -> None:
    config = load_config(path)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, *change)


@pytest.mark.parametrize("section", sections(Config)[1:], ids=lambda section: section.__name__)
def test_every_section_is_frozen(section: type[BaseModel]) -> None:
    assert section.model_config.get("frozen")
    assert section.model_config.get("extra") == "forbid"


# unknown keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "key", "nearest"),
    [
        (SMALLEST + "sed: 3\n", 15, "sed", "seed"),
        (SMALLEST + "optimiser:\n  learning_rate: 1\n", 15, "optimiser", "optimizer"),
        (SMALLEST + "learning_rate: 1.0e-3\n", 15, "learning_rate", "optimizer.learning_rate"),
        (SMALLEST + "optimizer:\n  # a remark\n  warmup: 3\n", 17, "optimizer.warmup", "optimizer.warmup_steps"),
        (SMALLEST + "train_images: x\n", 15, "train_images", "data.train_images"),
        (SMALLEST.replace("latent_channels", "latent_chanels"), 9, "vae.model.latent_chanels", "latent_channels"),
        (SMALLEST.replace("model:", "modle:"), 8, "vae.modle", "vae.model"),
        (SMALLEST.replace("image_size", "size"), 6, "data.size", "data.image_size"),
    ],
)
def test_an_unknown_key_in_the_file(path: Path, text: str, line: int, key: str, nearest: str) -> None:
    path.write_text(text)
    (told,) = [told for told in refused(path) if "unknown key" in told]
    assert told.startswith(f"{path}:{line}: {key}: unknown key; ")
    assert told.endswith(nearest)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("sed=3", "nearest known key: seed"),
        ("optimizer.learning_rat=1", "nearest known key: optimizer.learning_rate"),
        ("train.learning_rate=1", "nearest known key: optimizer.learning_rate"),
        ("vae.train.lr_warmup_steps=1", "nearest known key: vae.train.kl_warmup_steps"),
        ("vae.zzz=1", "known here: run_dir, path, preview, tile_pixels, latent_scale, model, train"),
        ("zzz.zzz=1", "known here: run_dir, seed, data, vae"),
    ],
)
def test_an_unknown_key_on_the_command_line(path: Path, override: str, nearest: str) -> None:
    told = refusal(path, override)
    assert told.startswith("command line: ")
    assert nearest in told


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_slip_in_any_key_is_refused_and_the_nearest_named(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One letter left out, put in, exchanged, or swapped with the next."""
    path = tmp_path_factory.getbasetemp() / "slip.yaml"
    path.write_text(SMALLEST)
    key = data.draw(st.sampled_from(sorted(LEAVES)))
    section, dot, word = key.rpartition(".")
    at = data.draw(st.integers(0, len(word) - 1))
    letter = data.draw(st.sampled_from(string.ascii_lowercase))
    slip = data.draw(
        st.sampled_from(
            [
                word[:at] + word[at + 1 :],
                word[:at] + letter + word[at:],
                word[:at] + letter + word[at + 1 :],
                word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
            ]
        )
    )
    assume(slip.isidentifier() and f"{section}{dot}{slip}" not in KNOWN)

    told = refusal(path, f"{section}{dot}{slip}=1")

    start, _, named = told.partition("nearest known key: ")
    assert start == f"command line: {section}{dot}{slip}: unknown key; "
    assert named in KNOWN

    def likeness(known: str) -> float:
        return difflib.SequenceMatcher(None, known.rpartition(".")[2], slip).ratio()

    assert named == key or likeness(named) >= likeness(key) - 1e-9


# values of another kind ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "came", "wanted"),
    [
        ("train.steps='32'", "'32' came", "integer"),
        ("train.steps=1.5", "1.5 came", "integer"),
        ("train.steps=100.0", "100.0 came", "integer"),
        ("train.steps=true", "True came", "integer"),
        ("train.steps=null", "None came", "integer"),
        ("train.steps=", "None came", "integer"),
        ("train.steps=[1]", "[1] came", "integer"),
        ("train.steps=-1", "-1 came", "greater than 0"),
        ("train.steps=0", "0 came", "greater than 0"),
        ("seed=-1", "-1 came", "greater than or equal to 0"),
        ("seed=9223372036854775808", "9223372036854775808 came", "less than"),
        ("optimizer.learning_rate=fast", "'fast' came", "number"),
        ("optimizer.learning_rate=true", "True came", "number"),
        ("optimizer.learning_rate=.nan", "nan came", "finite"),
        ("optimizer.learning_rate=.inf", "inf came", "finite"),
        ("vae.train.kl_weight=.inf", "inf came", "finite"),
        ("unet.block_out_channels=wide", "'wide' came", "array"),
        ("unet.block_out_channels=64", "64 came", "array"),
        ("unet.block_out_channels=[64, 1.5]", "unet.block_out_channels.1: 1.5 came", "integer"),
        ("ema.decays=[1.0]", "ema.decays.0: 1.0 came", "less than 1"),
        ("ema.sigma_rels=[0.29]", "ema.sigma_rels.0: 0.29 came", "less than or equal to 0.28"),
        ("ema.sigma_rels=[0]", "ema.sigma_rels.0: 0 came", "greater than 0"),
        ("ema.snapshot_every_steps=0", "0 came", "greater than 0"),
        ("tracking.tensorboard=1", "1 came", "boolean"),
        ("run_dir=12", "12 came", "string"),
        ("run_dir=''", "'' came", "at least 1 character"),
        ("data.train_images=''", "'' came", "at least 1 character"),
        ("diffusion.schedule=cosin", "'cosin' came", "'cosine'"),
        ("data=3", "3 came", "object"),
        ("vae=null", "None came", "object"),
        ("seed.x=3", "{'x': 3} came", "integer"),
        ("run_dir.x.y=3", "{'x': {'y': 3}} came", "string"),
    ],
)
def test_an_ill_typed_value(path: Path, override: str, came: str, wanted: str) -> None:
    told = refusal(path, override)
    assert told.startswith(f"command line: {override.partition('=')[0].partition('.')[0]}")
    assert came in told
    assert wanted in told


def test_an_ill_typed_value_in_the_file_names_its_line(path: Path) -> None:
    path.write_text(SMALLEST.replace("steps: 100", "steps: '100'"))
    assert refusal(path).startswith(f"{path}:13: train.steps: '100' came: ")


def test_an_ill_typed_item_of_a_list_names_the_lists_line(path: Path) -> None:
    path.write_text(SMALLEST + "ema:\n  decays:\n    - 0.9\n    - 1.5\n")
    assert refusal(path).startswith(f"{path}:16: ema.decays.1: 1.5 came: ")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("unet.block_out_channels=[64, 128, 256]", "down_block_types has 2 entries, block_out_channels has 3"),
        ("unet.norm_num_groups=48", "norm_num_groups=48"),
        ("conditioning.class_names=[a, b]", "class_names has 2 entries, num_classes is 3"),
        ("conditioning.class_names=[a, b, a]", "class_names has a name twice"),
        ("evaluation.num_inference_steps=7", "evaluation.num_inference_steps=7 must divide"),
        ("evaluation.likelihood.num_images=1", "evaluation.likelihood.num_images: 1 came; 2 or more was wanted"),
        ("evaluation={bits: true, likelihood: {num_images: 0}}", "bits: true came with likelihood.num_images: 0"),
        ("evaluation.likelihood.ode_images=1", "evaluation.likelihood.ode_images: 1 came; 2 or more was wanted"),
        ("ema.decays=[]", "decays and sigma_rels are both empty"),
        ("ema.decays=[0.9,0.99,0.9]", "decays names an average twice"),
        ("ema.sigma_rels=[0.1,0.1]", "sigma_rels names an average twice"),
        ("ema.snapshot_every_steps=1000", "snapshot_every_steps=1000 wants two sigma_rels at least"),
        ("ema={sigma_rels: [0.05, 0.1], snapshot_every_steps: 1400}", "checkpoint.every_steps=1000; nearest: 1000"),
        ("diffusion.zero_terminal_snr=true", "zero_terminal_snr wants prediction_type: v_prediction or sample"),
        ("diffusion.min_snr_gamma=3", "min_snr_gamma=3.0 has a meaning only with weighting: min_snr"),
        ("diffusion.sigmoid_bias=1", "sigmoid_bias=1.0 has a meaning only with weighting: sigmoid"),
        ("diffusion.vlb_weight=2", "vlb_weight=2.0 has a meaning only with variance_type: learned_range"),
        (
            "diffusion.noise_mean=0",
            "noise_mean=0.0 has a meaning only with timestep_density: log_normal, or objective:",
        ),
        ("diffusion={objective: edm, weighting: simple}", "weighting=simple has a meaning only with objective: ddpm"),
        ("diffusion={objective: flow, schedule: cosine}", "schedule=cosine has a meaning only with objective: ddpm"),
        ("diffusion={variance_type: learned_range, weighting: vlb}", "weighting: vlb wants a fixed variance_type"),
        (
            "diffusion={variance_type: learned_range, learned_weighting: true}",
            "learned_weighting wants a loss that is never negative",
        ),
        ("train.alignment={features: {network: classifier}}", "features.network: classifier came; transformers was"),
        (
            "train.alignment={features: {network: transformers, path: a, name: b}}",
            "features.name has a meaning only in",
        ),
        ("diffusion.timestep_density=[0, 0]", "timestep_density holds no number above 0"),
        ("diffusion={num_timesteps: 2, timestep_density: [1, 2, 3]}", "timestep_density has 3 entries, T is 2"),
        ("vae.train.micro_batch_images=7", "micro_batch_images: 7 came, a divisor of global_batch_images"),
        ("vae.model.norm_num_groups=3", "positive multiples of norm_num_groups"),
    ],
)
def test_values_that_do_not_go_together(path: Path, override: str, told: str) -> None:
    assert told in refusal(path, override)


@pytest.mark.parametrize("objective", ["edm", "flow"])
def test_bits_are_of_a_chain_of_timesteps(path: Path, objective: str) -> None:
    words = (f"diffusion.objective={objective}", "evaluation.bits=true")
    assert f"evaluation.bits=true came with diffusion.objective={objective}, which" in refusal(path, *words)
    assert not load_config(path, words[:1]).evaluation.bits


def test_features_lie_beside_latents(path: Path) -> None:
    words = ["train.alignment={features: {network: transformers, path: a}}", "diffusion={objective: edm}"]
    assert load_config(path, [*words, "diffusion.learned_weighting=true"]).train.alignment is not None
    assert "train.alignment: the features lie beside latents; data.train_latents was wanted" in refusal(
        path, *words, "data.train_latents=null"
    )


def test_averages_of_one_kind_alone_are_enough(path: Path) -> None:
    alone = load_config(path, ["ema.decays=[]", "ema.sigma_rels=[0.05,0.1]", "ema.snapshot_every_steps=3000"])
    assert (alone.ema.decays, alone.ema.sigma_rels) == ((), (0.05, 0.1))
    assert load_config(path).ema.sigma_rels == ()


def test_a_mistake_of_two_places_names_both(path: Path) -> None:
    path.write_text(SMALLEST + "unet:\n  layers_per_block: 1\n")
    told = refusal(path, "unet.block_out_channels=[64]")
    assert told.startswith(f"{path}:15 and command line: unet: ")


# missing values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("removed", "told"),
    [
        ("run_dir: runs/here\n", ": run_dir: missing"),
        ("  image_size: 32\n", ":3: data.image_size: missing"),
        ("  num_classes: 3\n", ":10: conditioning"),
        ("  train_images: images\n", ":3: data.train_images: missing"),
    ],
)
def test_a_missing_value_names_its_section(path: Path, removed: str, told: str) -> None:
    path.write_text(SMALLEST.replace(removed, ""))
    assert refusal(path).startswith(f"{path}{told}")


def test_several_mistakes_are_told_at_once_in_a_line_each(path: Path) -> None:
    path.write_text(SMALLEST.replace("seed: 7", "sed: 7").replace("image_size: 32", "image_size: big"))
    told = refused(path, "train.steps=0", "optimizer.beta1=2")
    assert sorted(line.removeprefix(f"{path}:").split(": ")[:2] for line in told) == [
        ["2", "sed"],
        ["6", "data.image_size"],
        ["command line", "optimizer.beta1"],
        ["command line", "train.steps"],
    ]


# files that are no config -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SMALLEST + "seed: 4\n", ":15: not valid YAML: while constructing a mapping, found duplicate key seed"),
        (SMALLEST.replace("  steps: 100", "  steps: 100\n  steps: 200"), ":14: not valid YAML: "),
        ("run_dir: [1\nseed: 2\n", ":2: not valid YAML: "),
        ("data:\n\tlanes: 3\n", ":2: not valid YAML: "),
        ("run_dir: a\n---\nrun_dir: b\n", ":2: not valid YAML: expected a single document"),
        ("run_dir: !!python/object/apply:os.getcwd []\n", ":1: not valid YAML: "),
        ("a: &a\n  b: *a\n", ":1: not valid YAML: "),
        ("", ": an empty file came, a mapping of sections was wanted"),
        ("# only a remark\n", ": an empty file came, a mapping of sections was wanted"),
        ("- run_dir: a\n- seed: 2\n", ": a sequence came, a mapping of sections was wanted"),
        ("run_dir\n", ": a scalar came, a mapping of sections was wanted"),
        ("3\n", ": a scalar came, a mapping of sections was wanted"),
        (SMALLEST.replace("runs/here", "!!binary aGVsbG8="), ": text, numbers, lists and mappings were wanted: "),
    ],
)
def test_a_file_that_is_no_config(path: Path, text: str, told: str) -> None:
    path.write_text(text)
    assert refusal(path).startswith(f"{path}{told}")


def test_a_file_that_is_no_text(path: Path) -> None:
    path.write_bytes(b"run_dir: caf\xe9\n")
    assert refusal(path).startswith(f"{path}: 'utf-8' codec can't decode byte 0xe9")


@pytest.mark.parametrize("name", ["no.yaml", "folder/no.yaml", "."])
def test_a_missing_file_names_the_shipped_ones(tmp_path: Path, name: str) -> None:
    told = refusal(tmp_path / name)
    assert told.startswith(f"{tmp_path / name}: no such config; shipped with the package: ")
    assert "digits_class.yaml" in told


# overrides that are none --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "seed",
        "",
        "=3",
        ".seed=3",
        "seed.=3",
        "data..lanes=3",
        " seed=3",
        "--seed=3",
        "unet.block_out_channels[0]=32",
        "ema.decays.0=0.5",
        "run_dir=???",
    ],
)
def test_an_override_that_is_not_key_and_value(path: Path, override: str) -> None:
    assert refusal(path, override) == f"command line: {override!r} came, dotted.key=value was wanted"


@pytest.mark.parametrize("override", ["seed=[", "run_dir=${", "ema.decays={a: 1}", "data=[1]", "seed={a: 1, a: 2}"])
def test_an_override_that_cannot_be_read(path: Path, override: str) -> None:
    path.write_text(SMALLEST + "ema:\n  decays: [0.9]\n")
    assert refusal(path, override).startswith(f"command line: {override!r}: ")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("${nowhere}", "'nowhere' not found"),
        ("${data.nowhere}", "'data.nowhere' not found"),
        ("${run_dir}", "Recursive"),
        ("${oc.env:NO_SUCH_VARIABLE_HERE}", "'NO_SUCH_VARIABLE_HERE' not found"),
        ("${nothing_like_it:1}", "nothing_like_it"),
        ("???", "Missing mandatory value"),
    ],
)
def test_an_interpolation_that_fails(path: Path, value: str, told: str) -> None:
    path.write_text(SMALLEST.replace("runs/here", value))
    line = refusal(path)
    assert line.startswith(f"{path}:1: run_dir: ")
    assert told in line


def test_an_interpolation_that_fails_in_a_list(path: Path) -> None:
    path.write_text(SMALLEST + "ema:\n  decays: [0.9, '${nowhere}']\n")
    assert refusal(path).startswith(f"{path}:16: ema.decays.1: ")


def test_an_interpolation_that_fails_on_the_command_line(path: Path) -> None:
    assert refusal(path, "data.train_images=${nowhere}").startswith("command line: data.train_images: ")


# writing it down ----------------------------------------------------------------------------------


def test_what_is_written_down_is_complete(path: Path) -> None:
    written = yaml.safe_load(to_yaml(load_config(path)))
    for key in LEAVES:
        value = written
        for name in key.split("."):
            value = value[name]


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["C"]), min_size=1).filter(lambda text: text != "???"),
    rate=st.floats(0, 1e30, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
)
@example(text="12e4", rate=1e-4, seed=0)
@example(text="${x} \\${y} \\\\${z}", rate=1e22, seed=0)
@example(text="yes", rate=5e-324, seed=0)
@example(text=" a: b # c", rate=1e-8, seed=0)
def test_what_is_written_down_reads_as_an_equal_config(
    text: str, rate: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(SMALLEST)
    config = load_config(file)
    changed = config.model_copy(
        update={
            "run_dir": text,
            "seed": seed,
            "optimizer": config.optimizer.model_copy(update={"learning_rate": rate}),
            "conditioning": config.conditioning.model_copy(update={"class_names": (text, f"{text} 1", f"2 {text}")}),
        }
    )
    file.write_text(to_yaml(changed), encoding="utf-8")
    assert load_config(file) == changed


# what makes a run what it is ----------------------------------------------------------------------


def test_the_identity_holds_what_may_not_change(path: Path) -> None:
    found = identity(
        load_config(path, ["optimizer.learning_rate=0.5", "unet.block_out_channels=[64, 64]"]),
        tuple(Config.model_fields),
    )
    assert found["optimizer.learning_rate"] == 0.5
    assert found["unet.block_out_channels"] == [64, 64]
    assert {
        "seed",
        "data.image_size",
        "data.crop",
        "data.flip",
        "data.lanes",
        "data.shuffle_block",
        "vae.model.latent_channels",
        "vae.train.learning_rate",
        "conditioning.num_classes",
        "conditioning.dropout",
        "diffusion.prediction_type",
        "optimizer.beta2",
        "train.global_batch_images",
        "engine.precision",
        "ema.decays",
        "ema.sigma_rels",
    } <= set(found)


@pytest.mark.parametrize(
    "free",
    [
        "run_dir",
        "data.train_images",
        "data.validation_images",
        "data.train_latents",
        "data.validation_latents",
        "data.quarantine",
        "data.remote",
        "data.workers",
        "vae.run_dir",
        "vae.path",
        "vae.train.steps",
        "vae.train.micro_batch_images",
        "conditioning.class_names",
        "train.steps",
        "train.micro_batch_images",
        "train.spike_factor",
        "train.spike_window_steps",
        "train.max_spikes",
        "train.limit_s",
        "train.hang_timeout_s",
        "engine.num_processes",
        "engine.device",
        "engine.strategy",
        "engine.offload_optimizer",
        "engine.gradient_checkpointing",
        "ema.snapshot_every_steps",
        "checkpoint",
        "evaluation",
        "tracking",
    ],
)
def test_the_identity_leaves_out_what_may_change(path: Path, free: str) -> None:
    keys = [key for key in LEAVES if key == free or key.startswith(f"{free}.")]
    found = identity(load_config(path), tuple(Config.model_fields))
    assert keys
    assert not set(keys) & set(found)


def test_the_identity_is_of_the_sections_asked_for(path: Path) -> None:
    found = identity(load_config(path), ("seed", "train"))
    assert found == {"seed": 7, "train.global_batch_images": 8, "train.alignment": None}


def test_every_key_is_in_the_identity_or_marked_free(path: Path) -> None:
    found = set(identity(load_config(path), tuple(Config.model_fields)))
    free_sections = {f"{name}." for name, field in Config.model_fields.items() if field.json_schema_extra}
    free_sections |= {f"data.{name}." for name, field in DataConfig.model_fields.items() if field.json_schema_extra}
    for key, field in LEAVES.items():
        free = bool(field.json_schema_extra) or key.startswith(tuple(free_sections))
        assert free != (key in found), key


# the schema as documentation ----------------------------------------------------------------------


@pytest.mark.parametrize("key", LEAVES)
def test_every_field_says_what_it_means(key: str) -> None:
    assert (LEAVES[key].description or "").strip().endswith((".", "]"))


@pytest.mark.parametrize("section", sections(Config), ids=lambda section: section.__name__)
def test_every_section_says_what_it_is(section: type[BaseModel]) -> None:
    own = section.__dict__.get("__doc__") or ""
    assert own.strip()


def test_the_schema_for_editors_is_the_one_that_is_checked() -> None:
    assert (CONFIGS / "schema.json").read_text(encoding="utf-8") == schema_text(), (
        "configs/schema.json is old; run: python -m pipeline schema > configs/schema.json"
    )


def test_the_schema_for_editors_refuses_unknown_keys_everywhere() -> None:
    schema = json_schema()
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
    assert set(schema["required"]) == {"run_dir", "data", "vae", "conditioning", "train"}


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_config_loads_and_names_its_schema(shipped: Path) -> None:
    load_config(shipped)
    assert shipped.read_text(encoding="utf-8").splitlines()[0] == "# yaml-language-server: $schema=schema.json"


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("folder", ["", "configs/"])
def test_a_shipped_config_is_found_by_name_from_anywhere(
    shipped: Path, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(folder + shipped.name).read_bytes() == shipped.read_bytes()


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / SHIPPED[0].name).write_text(SMALLEST)
    assert load_config(SHIPPED[0].name).run_dir == "runs/here"
