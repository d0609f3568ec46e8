"""python -m tools.evaluate RUN: a trained model's loss on token shards, by the text before it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from data_pipeline import Corpus, DataError
from data_pipeline.arguments import at_least
from data_pipeline.command import as_command
from data_pipeline.redaction import redact
from hope import HopeModel
from tools.figures import table
from train.checkpoint import CheckpointError
from train.checkpoint.load import load_run_and_corpus
from train.config import ConfigError, RunConfig
from train.consistency import check_chunks
from train.evaluate.context import LossByContext, loss_by_context
from train.evaluate.perplexity import HeldOut, held_out_batches
from train.parallel.parallelize import PRECISIONS
from train.parallel.ranks import current_device


def main(arguments: list[str] | None = None) -> int:
    """Print the loss of a run's model on token shards, by how many tokens of its document each
    prediction could look back on; exit status 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder, or one checkpoint in it")
    parser.add_argument("--data", help="folder or URL of shards (default: the run's validation)")
    parser.add_argument(
        "--seq-len", type=at_least(1), help="tokens of a row (default: as in training)"
    )
    parser.add_argument("--max-tokens", type=at_least(1), help="read no more (default: all)")
    parser.add_argument(
        "--without-writes",
        action="store_true",
        help="beside it the same weights with memories that are read and never written",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    try:
        if options.json is not None and not options.json.parent.is_dir():
            raise ValueError(f"--json {options.json}: {options.json.parent} is no folder")
        config, model, corpus = load_run_and_corpus(options.run, options.data)
        config = _with_rows_of(config, options.seq_len or config.data.seq_len)
        models = {"trained": model}
        if options.without_writes:
            models["without writes"] = without_writes(model)
        found = {
            name: losses_of(one, config, corpus, options.max_tokens, name)
            for name, one in models.items()
        }
        whole = {name: one.whole(str(corpus.path)) for name, one in found.items()}
        if options.json is not None:
            options.json.write_text(json.dumps(figures(found, whole), indent=1) + "\n")
    except (CheckpointError, ConfigError, DataError, ValueError, OSError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return 2
    read = whole["trained"].tokens
    print(redact(f"{read:,} tokens of {corpus.path}, in rows of {config.data.seq_len:,}"))
    print(_table(found, whole))
    return 0


def without_writes(model: HopeModel) -> HopeModel:
    """The model with the same parameters whose memories stay what they start as.

    Raises ValueError where it has no memories, or none that are written.
    """
    config = model.config
    if "titans" not in config.mixers or not config.titans.writes:
        raise ValueError("--without-writes: the model of this run writes no memories")
    with torch.device("meta"):
        other = HopeModel(replace(config, titans=replace(config.titans, writes=False)), seed=None)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def _with_rows_of(config: RunConfig, seq_len: int) -> RunConfig:
    """The run's configuration for rows of that length, as many tokens a batch as evaluations had.

    Raises ValueError where they are not whole chunks of its memories.
    """
    rows = max(1, config.evaluation.batch_rows * config.data.seq_len // seq_len)
    changed = config.model_copy(
        update={
            "data": config.data.model_copy(update={"seq_len": seq_len}),
            "evaluation": config.evaluation.model_copy(update={"batch_rows": rows}),
        }
    )
    check_chunks(changed)
    return changed


def losses_of(
    model: HopeModel, config: RunConfig, corpus: Corpus, max_tokens: int | None, name: str
) -> LossByContext:
    """A run's losses on at most max_tokens tokens of a corpus, in rows as its own: on the GPU where
    there is one, in the precision that the run computes in. name: of the progress bar."""
    model = model.to(current_device(), PRECISIONS[config.parallel.precision]).eval()
    batches = held_out_batches(config, corpus, max_tokens)
    shown = tqdm(batches, desc=name, unit="batch", disable=None)
    return loss_by_context(
        model, shown, config.data.seq_len, corpus.token_bytes, config.data.tells_documents
    )


def figures(found: dict[str, LossByContext], whole: dict[str, HeldOut]) -> dict[str, object]:
    """What the table says, as plain data."""
    return {
        name: {
            "loss": whole[name].loss,
            "perplexity": whole[name].perplexity,
            "bits_per_byte": whole[name].bits_per_byte,
            "tokens": whole[name].tokens,
            "by_context": [
                {"from": context.start, "loss": one.loss, "tokens": one.tokens}
                for context, one in losses.classes().items()
            ],
        }
        for name, losses in found.items()
    }


def _table(found: dict[str, LossByContext], whole: dict[str, HeldOut]) -> str:
    parts = {name: one.classes() for name, one in found.items()}
    header = ["context, tokens", "predictions", *(f"loss, {name}" for name in found)]
    rows = [
        [
            f"{context.start:,} to {context.stop - 1:,}" if len(context) > 1 else "1",
            f"{one.tokens:,}",
            *(f"{classes[context].loss:.4f}" for classes in parts.values()),
        ]
        for context, one in parts["trained"].items()
    ]
    rows.append(["all", f"{whole['trained'].tokens:,}", *(f"{o.loss:.4f}" for o in whole.values())])
    rows.append(["perplexity", "", *(f"{one.perplexity:.3f}" for one in whole.values())])
    rows.append(["bits per byte", "", *(f"{one.bits_per_byte:.4f}" for one in whole.values())])
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(as_command(main))
