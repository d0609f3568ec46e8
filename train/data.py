"""What is read: the sections `data.*` of the configuration."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from train.section import LocalPath, Section, expand_home


def _plain(location: str) -> str:
    return location if "://" in location else str(Path(expand_home(location)))


Location = Annotated[str, Field(min_length=1), AfterValidator(_plain)]
"""A folder (`~` is home), or a URL that fsspec reads (s3://, gs://, https://, file://, ...)."""


class CorpusConfig(Section):
    """One corpus of token shards, in a folder or at a URL.

    weight: its share of the training tokens (mode pretrain); 0 leaves it out, until a stage of the
    curriculum. In mode continual a corpus is a domain: name (default: the last part of path),
    validation: held-out shards of it, on which the model is evaluated after every domain; tokens:
    how much of it is read (default: all, once).
    """

    path: Location
    weight: float = Field(1.0, ge=0)
    name: str | None = Field(None, min_length=1)
    validation: Location | None = None
    tokens: int | None = Field(None, ge=1)

    @property
    def domain(self) -> str:
        """What the corpus is called as a domain."""
        return self.name or PurePosixPath(self.path).name


class StageConfig(Section):
    """From so many tokens of the run on, the corpora have other weights, in the order of `train`;
    a weight of 0 leaves a corpus out."""

    from_tokens: int = Field(ge=1)
    weights: tuple[Annotated[float, Field(ge=0)], ...]


class DataConfig(Section):
    """What is read, and in which shape.

    order: "shuffle" draws windows of seq_len tokens in a keyed random order; "window" does so
    among 16 chunks of 512K tokens at a time, which reads each part of a shard once; "stream" gives
    every batch row its own contiguous text, step after step (for training.state_carry: stream).
    packing: "aligned" starts documents on multiples of the memory's projection_chunk, where
    memories, convolutions and attention begin anew; "best-fit" does too, and cuts only documents
    longer than a row; "concat" cuts the running text anywhere, and the model is not told where
    documents start.
    curriculum: weights of the corpora that take over at stated token counts; before the first
    stage the corpora's own hold.
    on_corrupt: "raise" stops at a damaged frame, naming it; "skip" trains on padding in its place,
    on every rank alike, leaves it out of evaluations, and logs it. prefetch: batches made ahead.
    cache_dir, cache_bytes: where shards of URLs are kept, and how much of them.
    """

    train: tuple[CorpusConfig, ...] = Field(min_length=1)
    validation: Location
    seq_len: int = Field(512, ge=1, le=1 << 40)
    order: Literal["shuffle", "window", "stream"] = "shuffle"
    packing: Literal["aligned", "best-fit", "concat"] = "aligned"
    curriculum: tuple[StageConfig, ...] = ()
    on_corrupt: Literal["raise", "skip"] = "raise"
    prefetch: int = Field(2, ge=0, le=1 << 10)
    cache_dir: LocalPath | None = None
    cache_bytes: int = Field(64 << 30, ge=1)

    @property
    def tells_documents(self) -> bool:
        """Whether the model is told where documents start."""
        return self.packing != "concat"

    @property
    def weights(self) -> list[tuple[int, list[float]]]:
        """(tokens, weights of the corpora from there on) for each stage, the first from 0."""
        first = (0, [source.weight for source in self.train])
        return [first, *((stage.from_tokens, list(stage.weights)) for stage in self.curriculum)]

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if not any(source.weight for source in self.train):
            raise ValueError("data.train: every weight is 0: give one above 0")
        starts = [stage.from_tokens for stage in self.curriculum]
        if starts != sorted(set(starts)):
            raise ValueError(f"data.curriculum begins at {starts}: give rising from_tokens")
        for stage in self.curriculum:
            if len(stage.weights) != len(self.train) or sum(stage.weights) <= 0:
                raise ValueError(
                    f"data.curriculum: weights {list(stage.weights)} from {stage.from_tokens} "
                    f"tokens: give {len(self.train)}, one for each corpus, and not only zeros"
                )
        if self.order == "stream" and self.curriculum:
            raise ValueError("data.curriculum needs data.order=shuffle or window: rows stay in one")
        if self.order == "stream" and self.packing == "best-fit":
            raise ValueError(
                "data.packing=best-fit moves the ends of long documents to other rows: "
                "data.order=stream needs aligned or concat"
            )
        return self

    def where(self, location: str) -> dict[str, Any]:
        """The arguments of `Corpus.open` for a location."""
        if "://" not in location:
            return {"path": location}
        return {"path": location, "cache_dir": self.cache_dir, "cache_bytes": self.cache_bytes}
