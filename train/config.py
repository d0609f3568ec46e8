"""Typed configuration of a run: YAML plus dotted overrides, strict.

An unknown key, a wrong type or an impossible value raises `ConfigError` with one line that names
the key. Sizes and durations are in tokens, so that they survive another batch size or world size.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field, model_validator

from hope.config import HopeConfig
from train.callbacks.faults import FaultConfig
from train.callbacks.profiler import ProfilerConfig
from train.consistency import check_consistency
from train.data import DataConfig
from train.optim.config import OptimizerConfig
from train.parallel.config import ParallelConfig
from train.section import ConfigError, LocalPath, Section
from train.spikes import SpikesConfig
from train.watchdog import WatchdogConfig
from train.yaml_format import Dumper, Loader
from train.zero.config import DeepSpeedConfig

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DeepSpeedConfig",
    "EvaluationConfig",
    "FaultConfig",
    "InitFromConfig",
    "MLflowConfig",
    "OptimizerConfig",
    "ProfilerConfig",
    "RunConfig",
    "SpikesConfig",
    "TrainingConfig",
    "WatchdogConfig",
    "dump_config",
    "flatten",
    "load_config",
    "validate_config",
]


class TrainingConfig(Section):
    """Length and shape of training.

    total_tokens: of the whole run; mode continual finds it from the domains when it is left out.
    batch_tokens: tokens of one step over all ranks.
    stop_at_tokens: stop early, with a checkpoint, without changing any schedule.
    flush: at the end, levels in the middle of a period take a last step on what they have.
    max_skipped_in_a_row: a step whose loss or gradient is not finite on any rank is skipped on
        all of them; after more than so many in a row the run stops with a checkpoint.
    state_carry: "stream" carries fast weights from step to step along each row (data.order:
    stream), detached at the step.
    peak_tflops: 10^12 operations a second of one rank's device, for the MFU in the metrics; None:
        of a GPU whose data sheet is known, in bfloat16, that; of others there is no MFU.
    walltime_s: seconds that this process may take, or "slurm" for what Slurm says is left;
        walltime_margin_s before that it stops as on a signal, with exit status 75.
    """

    total_tokens: int = Field(0, ge=0)
    batch_tokens: int = Field(8192, ge=1)
    stop_at_tokens: int | None = Field(None, ge=1)
    state_carry: Literal["none", "stream"] = "none"
    flush: bool = False
    max_skipped_in_a_row: int = Field(10, ge=0)
    peak_tflops: float | None = Field(None, gt=0)
    walltime_s: Annotated[float, Field(gt=0)] | Literal["slurm"] | None = None
    walltime_margin_s: float = Field(120.0, ge=0)


class InitFromConfig(Section):
    """Start from another run's weights, its MLPs becoming levels of the CMS (section 7.3).

    path: a run folder (its newest checkpoint that verifies), or one checkpoint in it. That run's
        model differs from this one in its CMS only, and has one level: a Transformer++, say; its
        tokenizer is this data's.
    levels: the level that takes the MLP of layer 0, 1, ..., repeating; None: the slowest for all.
        The other levels start as exact zeros, so that training begins with the logits of that run.

    Read when a run begins, not when it is resumed. With `optimizer.levels.NAME.lr_scale: 0` a
    level, and `fast` everything else, stays what it was.
    """

    path: LocalPath
    levels: tuple[str, ...] | None = Field(None, min_length=1)


class EvaluationConfig(Section):
    """Held-out loss every so many tokens, over at most max_tokens; once more, whole, at the end.

    In mode continual, at the end of each domain, over at most max_tokens of every domain.
    batch_rows: read at a time over all ranks; where those are more, one a data-parallel rank.
    """

    every_tokens: int = Field(1_000_000, ge=1)
    max_tokens: int = Field(65_536, ge=1)
    batch_rows: int = Field(16, ge=1)


class CheckpointConfig(Section):
    """A checkpoint every so many tokens, at the end, and when the run is asked to stop.

    keep_last: the newest so many stay; keep_every_tokens: and the first at or after each multiple
        of it; keep_best: and so many with the lowest held-out loss; and all that have a tag.
    asynchronous: training waits for a copy in memory only, and a process beside it writes; false
        saves that memory, as much as the checkpoint has on the rank.
    url: an fsspec URL of the folder that takes them, in place of `checkpoints` in the run folder.
    """

    every_tokens: int = Field(1_000_000, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_every_tokens: int | None = Field(None, ge=1)
    keep_best: int = Field(0, ge=0)
    asynchronous: bool = True
    url: str | None = Field(None, pattern=r"^\w[\w+.-]*://.")


class MLflowConfig(Section):
    """Experiment tracking. tracking_uri None: MLFLOW_TRACKING_URI, else SQLite beside the runs.

    flush_s: how long the end of a run waits for MLflow to take what it has not yet.
    """

    enabled: bool = True
    experiment: str = "hope"
    tracking_uri: str | None = None
    every_steps: int = Field(10, ge=1)
    flush_s: float = Field(60.0, ge=0)


class RunConfig(Section):
    """One run. The resolved form is saved as config.yaml in the run folder.

    mode: "pretrain" blends the corpora of data.train; "continual" trains on them one after the
    other, each once, with the memories' state carried on (`train.continual`).
    engine: what computes gradients and shards the model: our own, or DeepSpeed.
    """

    mode: Literal["pretrain", "continual"] = "pretrain"
    run_dir: LocalPath
    seed: int = Field(0, ge=0)
    num_threads: int | None = Field(None, ge=1, le=1 << 10)
    model: HopeConfig
    init_from: InitFromConfig | None = None
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: Literal["native", "deepspeed"] = "native"
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mlflow: MLflowConfig = MLflowConfig()
    spikes: SpikesConfig = SpikesConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    profiler: ProfilerConfig = ProfilerConfig()
    faults: tuple[FaultConfig, ...] = ()

    @property
    def batch_rows(self) -> int:
        """Rows of one step over all ranks."""
        return self.training.batch_tokens // self.data.seq_len

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        check_consistency(self)
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read YAML, apply `key.subkey=value` overrides (values are YAML), validate.

    Raises ConfigError, one line, for a missing or malformed file, a malformed override, an unknown
    key, a wrong type or an impossible value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read configuration {path}: {_one_line(error)}") from None
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections at the top, got {raw!r:.40}")
    for override in overrides or []:
        _apply(raw, override)
    return validate_config(raw, str(path))


def validate_config(raw: dict[str, Any], source: str) -> RunConfig:
    """Validate plain data into a RunConfig; raises ConfigError naming every offending key."""
    try:
        text = json.dumps(raw, default=str)
    except (TypeError, ValueError) as error:  # a key that is a date, an alias to what it is in
        raise ConfigError(f"{source}: not plain data: {_one_line(error)}") from None
    try:
        return RunConfig.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        # A value that may be of several types is a problem for each: one of them is enough.
        problems = {_where(problem): _describe(problem) for problem in reversed(error.errors())}
        for problem in error.errors():  # a list that is short because of an entry with a problem
            where = _where(problem)
            if problem["type"] == "too_short" and any(k.startswith(f"{where}.") for k in problems):
                problems.pop(where, None)
        raise ConfigError(f"{source}: " + "; ".join(reversed(problems.values()))) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; loading it again gives an equal configuration."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data as dotted keys; lists count their entries."""
    if isinstance(tree, dict):
        pairs: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        pairs = list(enumerate(tree))
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # A tag that its value does not fit ends in anything.
        raise ConfigError(f"{source}: not valid YAML: {_one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: nested too deeply") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key.subkey=value")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, override)]
            continue
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part!r} lies below a plain value")
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    value = _parse(text, f"override {override!r}")
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override {override!r}: {last!r} lies below a plain value")


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"override {override!r}: {part!r} is no entry of a list of {len(node)}")
    return int(part)


_TYPES = ("int", "float", "constrained-float", "literal['step']", "literal['slurm']")


def _where(problem: Any) -> str:
    """The dotted key of a problem, without the names of the alternatives of a union."""
    return ".".join(str(part) for part in problem["loc"] if str(part) not in _TYPES)


def _describe(problem: Any) -> str:
    where = _where(problem)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(where.rpartition(".")[2], _known_keys(), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"unknown key {where!r}{hint}"
    if problem["type"] == "missing":
        return f"missing key {where!r}"
    message = _one_line(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error" or not where:
        return message
    return f"{where}: {message[0].lower() + message[1:]}, got {problem['input']!r:.60}"


def _known_keys() -> set[str]:
    keys: set[str] = set()

    def walk(schema: Any) -> None:
        if isinstance(schema, dict):
            keys.update(schema.get("properties", {}))
            for value in schema.values():
                walk(value)

    walk(RunConfig.model_json_schema())
    return keys


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
