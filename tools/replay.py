"""python -m tools.replay RUN [--position ROW]: what was in a batch that a run skipped?

Reads the batch again, computes its loss and its gradients with the weights of the newest checkpoint
before it, row by row in one process, and says what is not finite, and in which text. Nothing is
written, and the batch moves no weight.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from data_pipeline import IGNORE, Batch, Tokenizer
from data_pipeline.arguments import at_least
from data_pipeline.command import as_command
from data_pipeline.redaction import redact
from tools.figures import table
from train.callbacks.metrics import read_metrics
from train.checkpoint import CheckpointError
from train.config import RunConfig, load_config
from train.corpora import open_corpora
from train.engines import open_engine
from train.evaluate.perplexity import summed_loss
from train.optim.levels import group_by_level
from train.parallel.carried import state_of
from train.parallel.config import ParallelConfig
from train.parallel.ranks import Ranks
from train.run import prepare_torch
from train.run_files import CONFIG, METRICS
from train.signals import StopSignals
from train.trainer import Trainer

NAMED = 8  # tensors
BEFORE, AFTER = 48, 16  # tokens shown around the one that stands out


@dataclass
class Row:
    """One row of the batch. per_token [T]: nats of each token, 0 where none counts; gradients:
    names of parameters that got something not finite from it."""

    per_token: Tensor
    counted: int
    gradients: list[str]

    @property
    def loss(self) -> float:
        """Nats per token that counts."""
        return float(self.per_token.double().sum()) / max(1, self.counted)

    @property
    def finite(self) -> bool:
        """Whether its loss and what it adds to the gradients are."""
        return math.isfinite(self.loss) and not self.gradients

    @property
    def rank(self) -> tuple[bool, float]:
        """To sort by: what is not finite, then the largest losses."""
        return (True, -self.loss) if self.finite else (False, 0.0)

    @property
    def stands_out(self) -> int:
        """The first position whose loss is not finite; else that of the largest."""
        bad = (~self.per_token.isfinite()).nonzero()
        return int(bad[0]) if len(bad) else int(self.per_token.argmax())


@dataclass
class Found:
    """What a batch gave: its rows, the sum of their gradients by name, whether the state that they
    leave is finite."""

    rows: list[Row] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    state_is_finite: bool = True


def main(arguments: list[str] | None = None) -> int:
    """Say what a skipped step met; exit status 2 with one line for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tools.replay", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder, e.g. runs/quickstart")
    parser.add_argument(
        "--position",
        type=at_least(0),
        metavar="ROW",
        help="of the skipped step, as in metrics.jsonl (default: the last one)",
    )
    parser.add_argument(
        "--repeat",
        action="store_true",
        help="train through the steps between the checkpoint and this one first, in memory",
    )
    parser.add_argument(
        "--rows", type=at_least(0), default=3, help="how many rows to show (default 3)"
    )
    options = parser.parse_args(arguments)
    try:
        skip = skipped_step(options.run, options.position)
        config = in_one_process(load_config(options.run / CONFIG))
        prepare_torch(config.num_threads)
        corpora = open_corpora(config)
        engine = open_engine(config, Ranks.alone())
        trainer = Trainer(config, corpora, StopSignals(), engine)
        try:
            print(go_to(trainer, skip, options.repeat))
            batch = next(trainer.loader)
            print(report(trainer, batch, examine(trainer, batch), options.rows))
        finally:
            trainer.loader.close()
            trainer.store.close()
    except (CheckpointError, OSError, ValueError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


def skipped_step(run: Path, position: int | None) -> dict[str, Any]:
    """The line of metrics.jsonl about a skipped step: the last one that begins with that row of the
    stream, or the last of all. Raises CheckpointError where there is no run, ValueError where it
    skipped no such step."""
    if not (run / CONFIG).exists():
        raise CheckpointError(f"{run} holds no run ({CONFIG} is missing)")
    skips = [row for row in read_metrics(run / METRICS) if row["kind"] == "skip"]
    chosen = [row for row in skips if position in (None, row["position"])]
    if chosen:
        return chosen[-1]
    if not skips:
        raise ValueError(f"{run} skipped no step")
    there = ", ".join(str(one) for one in sorted({row["position"] for row in skips}))
    raise ValueError(f"{run} skipped no step at position {position}; those skipped are at {there}")


def in_one_process(config: RunConfig) -> RunConfig:
    """The same computation, whatever layout and engine the run had, and without faults."""
    given = config.parallel
    parallel = ParallelConfig(
        micro_batches=given.micro_batches,
        activation_checkpointing=given.activation_checkpointing,
        precision=given.precision,
    )
    return config.model_copy(update={"parallel": parallel, "engine": "native", "faults": ()})


def go_to(trainer: Trainer, skip: dict[str, Any], repeat: bool) -> str:
    """Take up the newest checkpoint before the step, and read up to it; repeat: train on what is
    read. Returns what was done in words. Raises CheckpointError where there is none, ValueError
    where batches begin at other rows now."""
    position = skip["position"]
    try:
        folder = trainer.store.newest(position * trainer.config.data.seq_len)
    except CheckpointError as error:
        raise CheckpointError(
            f"nothing to replay the step with: {error}; in a run from before it, save more often "
            "(checkpoint.every_tokens) or keep more (checkpoint.keep_last)"
        ) from None
    trainer.load(folder, rewind=False)
    rows = trainer.config.batch_rows
    between = range(trainer.loader.position, position, rows)
    for _ in tqdm(between, desc="reading on", unit="step", disable=len(between) == 0 or None):
        if repeat:
            trainer.step()
        else:
            next(trainer.loader)
    if trainer.loader.position != position:
        raise ValueError(
            f"batches of {rows} rows don't begin at position {position}: training.batch_tokens has "
            "changed since"
        )
    how = "repeated" if repeat else "not repeated"
    return redact(
        f"skipped after {skip['tokens']:,} tokens: {skip['why']}\n"
        f"rows {position:,} to {position + rows - 1:,}, with the weights of {folder.name}; "
        f"{len(between)} steps between were {how}"
    )


def examine(trainer: Trainer, batch: Batch) -> Found:
    """Forward and backward pass of each row by itself, from the state that it is due."""
    (part,) = trainer.engine.modules
    parameters, device = trainer.engine.parameters, trainer.mesh.device
    carried = trainer.carried
    part.before = None if carried is None else state_of(carried, part.layers)
    part.keeps_state = True
    tells = trainer.config.data.tells_documents
    found = Found()
    for number in tqdm(range(batch.tokens.shape[0]), desc="rows", unit="row", disable=None):
        own = slice(number, number + 1)
        tokens, labels = batch.tokens[own].to(device), batch.labels[own].to(device)
        starts = batch.document_starts[own].to(device) if tells else None
        logits = part(tokens, torch.tensor([number]), starts)
        summed_loss(logits, labels).backward()
        nats = cross_entropy(logits[0].detach().float(), labels[0], reduction="none")
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        bad = [name for name, grad in gradients.items() if not grad.isfinite().all()]
        found.rows.append(Row(nats.cpu(), int((labels != IGNORE).sum()), bad))
        for name, grad in gradients.items():
            held = found.gradients.get(name)
            found.gradients[name] = grad.float() if held is None else held.add_(grad)
            parameters[name].grad = None
    found.state_is_finite = part.take_after().is_finite()
    return found


def report(trainer: Trainer, batch: Batch, found: Found, shown: int) -> str:
    """Loss, gradients by level, what is not finite, and the rows that stand out, with text."""
    valid = sum(row.counted for row in found.rows)
    loss = sum(float(row.per_token.double().sum()) for row in found.rows) / max(1, valid)
    bad = [name for name, grad in found.gradients.items() if not grad.isfinite().all()]
    lines = [f"loss {loss:.4f} nats per token, of {valid:,} tokens that count"]
    if not found.state_is_finite:
        lines.append("the carried state that it leaves is not finite")
    levels = []
    for level, names in group_by_level(found.gradients, trainer.config.model).items():
        squares = sum(float(found.gradients[n].double().square().sum()) for n in names)
        count = sum(name in bad for name in names)
        levels.append([level, f"{math.sqrt(squares) / max(1, valid):.4g}", f"{count}/{len(names)}"])
    lines.append(table(["level", "gradient norm", "tensors not finite"], levels))
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        lines.append(f"not finite: {', '.join(bad[:NAMED])}{more}")
    elif math.isfinite(loss) and found.state_is_finite:
        lines.append("everything is finite here")
    order = sorted(range(len(found.rows)), key=lambda n: found.rows[n].rank)
    tokenizer = trainer.corpora.validation.tokenizer
    lines += [
        _row_in_words(number, found.rows[number], batch, tokenizer) for number in order[:shown]
    ]
    return "\n".join(lines)


def _row_in_words(number: int, row: Row, batch: Batch, tokenizer: Tokenizer) -> str:
    """A row's loss, and the text around the token that stands out, of its document only."""
    at = row.stands_out
    starts = batch.document_starts[number].nonzero().flatten().tolist()
    begin = max([at - BEFORE, 0, *(start for start in starts if start <= at)])
    end = min([at + AFTER, batch.tokens.shape[1], *(start for start in starts if start > at)])
    text = tokenizer.decode(batch.tokens[number, begin:end].tolist())
    bad = f", {len(row.gradients)} gradients not finite" if row.gradients else ""
    before = [start for start in starts if start <= at]
    document = f"the document from token {before[-1]} on" if before else "one that began before"
    return f"row {number}: loss {row.loss:.4f}{bad}; most at token {at}, in {document}: {text!r}"


if __name__ == "__main__":
    sys.exit(as_command(main))
